"""What the gateway reads from clients, and gives back to them."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import httpcore
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import Send

from e2p_jax.json_files import object_in
from e2p_jax.serve import chat_api

_PASSED_BACK = ("content-type", "retry-after")
# What asking the engine, and reading its answer, may raise.
FAILURES = (httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException)
_BODY_SECONDS = 10  # that a body may take to come


class Refused(Exception):
    """An answer that is an error, in the API's form."""

    def __init__(self, status: int, message: str, code: str | None = None):
        super().__init__(message)
        kind = "invalid_request_error" if status < 500 else "server_error"
        self.status, self.error = status, {"error": {"message": message, "type": kind, "param": None, "code": code}}

    def response(self, headers: dict[str, str] | None = None) -> JSONResponse:
        """To be sent."""
        return JSONResponse(self.error, self.status, headers)


class Relay:
    """Gives the engine's answer to the client."""

    def __init__(self, answer: httpcore.Response, send: Send, timeout: float, translated: bool):
        """
        Args:
          timeout: seconds that the client may take to read what is there.
          translated: from the completions endpoint.
        """
        self._answer, self._send, self._timeout, self._translated = answer, send, timeout, translated
        self.began = 0.0  # when the first byte was there

    async def run(self) -> int:
        """Returns the status.

        Raises:
          one of FAILURES: the engine failed before anything was sent.
          TimeoutError: the client does not read.
        """
        answer = self._answer
        if passed_back(answer).get("content-type", "").startswith("text/event-stream"):
            return await self._stream()
        content = await answer.aread()
        self.began = time.monotonic()
        if self._translated and answer.status == 200:
            try:
                content = json.dumps(chat_api.chat_reply(json.loads(content))).encode()
            except (ValueError, LookupError, TypeError, AttributeError) as error:
                raise Refused(502, "the engine's answer is no completion", "engine_unavailable") from error
        await self._start({"content-length": str(len(content))})
        await self._give(content, more=False)
        return answer.status

    async def _stream(self) -> int:
        status, begun = self._answer.status, set[int]()
        try:
            async for event in _events(self._answer):
                if not self.began:
                    self.began = time.monotonic()
                    await self._start({})
                data = event.removeprefix(b"data: ")
                if self._translated and data.startswith(b"{") and "choices" in (chunk := json.loads(data)):
                    event = f"data: {json.dumps(chat_api.chat_chunk(chunk, begun))}".encode()
                await self._give(event + b"\n\n")
        except (*FAILURES, ValueError, LookupError, TypeError) as error:
            if not self.began:
                raise
            reason = f"the engine's answer broke off ({type(error).__name__})"
            status, broken = 502, Refused(502, reason, "engine_unavailable")
            await self._give(f"data: {json.dumps(broken.error)}\n\n".encode())
        if not self.began:
            raise Refused(502, "the engine's answer is empty", "engine_unavailable")
        await self._give(b"", more=False)
        return status

    async def _start(self, more: dict[str, str]) -> None:
        headers = [(name.encode(), value.encode()) for name, value in (passed_back(self._answer) | more).items()]
        await self._send({"type": "http.response.start", "status": self._answer.status, "headers": headers})

    async def _give(self, body: bytes, more: bool = True) -> None:
        async with asyncio.timeout(self._timeout):
            await self._send({"type": "http.response.body", "body": body, "more_body": more})


async def read_object(request: Request, largest: int) -> dict[str, Any]:
    """The JSON object of a request's body.

    Raises:
      Refused: of another type, too large, too slow, or malformed.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refused(415, "send Content-Type: application/json")  # no page of another site can, without being asked
    body = b""
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            async for piece in request.stream():
                body += piece
                if len(body) > largest:
                    raise Refused(413, f"the body has more than {largest} bytes")
    except TimeoutError as error:
        raise Refused(408, f"the body took more than {_BODY_SECONDS} s to come") from error
    try:
        return object_in(body)
    except ValueError as error:
        raise Refused(400, f"the body is no JSON object ({error})") from error


async def _events(answer: httpcore.Response) -> AsyncIterator[bytes]:
    """The lines of a stream of events that say something: a line ends in a line feed, and in nothing else."""
    unread = b""
    async for piece in answer.aiter_stream():
        *lines, unread = (unread + piece).split(b"\n")
        for line in lines:
            if line := line.removesuffix(b"\r"):
                yield line


def passed_back(answer: httpcore.Response) -> dict[str, str]:
    """Headers of the engine's answer that the client gets."""
    there = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in answer.headers}
    return {name: there[name] for name in _PASSED_BACK if name in there}
