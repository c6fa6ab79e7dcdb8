"""What the gateway reads from clients, and gives back to them."""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
from aiohttp import web

from e2p_jax.json_files import object_in
from e2p_jax.serve import chat_api

_PASSED_BACK = ("content-type", "retry-after")
_BODY_SECONDS = 10  # that a body may take to come


class Refused(Exception):
    """An answer that is an error, in the API's form."""

    def __init__(self, status: int, message: str, code: str | None = None):
        super().__init__(message)
        kind = "invalid_request_error" if status < 500 else "server_error"
        self.status, self.error = status, {"error": {"message": message, "type": kind, "param": None, "code": code}}

    def response(self, headers: dict[str, str] | None = None) -> web.Response:
        """To be sent."""
        return web.json_response(self.error, status=self.status, headers=headers)


class Gone(Exception):
    """The client went, or does not read."""


class Relay:
    """Gives the engine's answer to the client."""

    def __init__(self, answer: aiohttp.ClientResponse, request: web.Request, timeout: float, translated: bool):
        """
        Args:
          timeout: seconds that the client may take to read what is there.
          translated: from the completions endpoint.
        """
        self._answer, self._request, self._timeout, self._translated = answer, request, timeout, translated
        self.began = 0.0  # when the first byte was there

    async def run(self) -> tuple[web.StreamResponse, int]:
        """Returns what was sent, and its status: 502 if the engine's answer broke off.

        Raises:
          aiohttp.ClientError: the engine failed before anything was sent.
          Gone: the client.
        """
        answer = self._answer
        if answer.content_type == "text/event-stream":
            return await self._stream()
        content = await answer.read()
        self.began = time.monotonic()
        if self._translated and answer.status == 200:
            try:
                content = json.dumps(chat_api.chat_reply(json.loads(content))).encode()
            except (ValueError, LookupError, TypeError, AttributeError) as error:
                raise Refused(502, "the engine's answer is no completion", "engine_unavailable") from error
        response = web.Response(body=content, status=answer.status, headers=passed_back(answer))
        async with self._reading():
            await response.prepare(self._request)
            await response.write_eof()
        return response, answer.status

    async def _stream(self) -> tuple[web.StreamResponse, int]:
        status, begun = self._answer.status, set[int]()
        response = web.StreamResponse(status=status, headers=passed_back(self._answer))
        try:
            async for event in _events(self._answer):
                if not self.began:
                    self.began = time.monotonic()
                    await response.prepare(self._request)
                field, _, data = event.partition(b":")
                told = field == b"data" and data.lstrip(b" ").startswith(b"{")
                if self._translated and told and "choices" in (chunk := json.loads(data)):
                    event = f"data: {json.dumps(chat_api.chat_chunk(chunk, begun))}".encode()
                async with self._reading():
                    await response.write(event + b"\n\n")
        except (aiohttp.ClientError, ValueError, LookupError, TypeError) as error:
            if not self.began:
                raise
            reason = f"the engine's answer broke off ({type(error).__name__})"
            status, broken = 502, Refused(502, reason, "engine_unavailable")
            async with self._reading():
                await response.write(f"data: {json.dumps(broken.error)}\n\n".encode())
        if not self.began:
            raise Refused(502, "the engine's answer is empty", "engine_unavailable")
        async with self._reading():
            await response.write_eof()
        return response, status

    @contextlib.asynccontextmanager
    async def _reading(self) -> AsyncIterator[None]:
        """
        Raises:
          Gone: the client.
        """
        try:
            async with asyncio.timeout(self._timeout):
                yield
        except (ConnectionError, TimeoutError) as error:
            raise Gone from error


async def read_object(request: web.Request, largest: int) -> dict[str, Any]:
    """The JSON object of a request's body.

    Raises:
      Refused: of another type, too large, too slow, or malformed.
    """
    if request.content_type != "application/json":
        raise Refused(415, "send Content-Type: application/json")  # no page of another site can, without being asked
    body = b""
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            async for piece in request.content.iter_any():
                body += piece
                if len(body) > largest:
                    raise Refused(413, f"the body has more than {largest} bytes")
    except TimeoutError as error:
        raise Refused(408, f"the body took more than {_BODY_SECONDS} s to come") from error
    try:
        return object_in(body)
    except ValueError as error:
        raise Refused(400, f"the body is no JSON object ({error})") from error


async def _events(answer: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    """The lines of a stream of events that say something: a line ends in a line feed, and in nothing else."""
    unread = b""
    async for piece in answer.content.iter_any():
        *lines, unread = (unread + piece).split(b"\n")
        for line in lines:
            if line := line.removesuffix(b"\r"):
                yield line


def passed_back(answer: aiohttp.ClientResponse) -> dict[str, str]:
    """Headers of the engine's answer that the client gets."""
    return {name: answer.headers[name] for name in _PASSED_BACK if name in answer.headers}
