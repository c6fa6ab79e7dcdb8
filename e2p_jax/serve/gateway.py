"""Stands between clients of the OpenAI chat API and an engine: puts each user's soft tokens into the prompt.

A request names its user; the gateway writes the prompt as training did, looks the soft tokens up, asks the engine, and
gives its answer back as that of a chat, streamed or whole. Needs aiohttp: the extra `[serve]`.
"""

import asyncio
import contextlib
import dataclasses
import io
import ipaddress
import json
import re
import socket
import time
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from typing import Any, Literal

import aiohttp
from aiohttp import web
from aiohttp.typedefs import Handler, Middleware
from yarl import URL

from e2p_jax.datasets.records import to_answer
from e2p_jax.errors import UserError, shown
from e2p_jax.export.client import EngineClient, Messages
from e2p_jax.export.demo_access import NAMES
from e2p_jax.export.payloads import SAMPLING
from e2p_jax.export.prefix_reader import AbsentUser, Damaged, PrefixTable
from e2p_jax.serve import chat_api
from e2p_jax.serve.metrics import CONTENT_TYPE, Metrics
from e2p_jax.serve.relay import Gone, Refused, Relay, passed_back, read_object
from e2p_jax.terminal import say

USER_HEADER = "x-e2p-user"
_PASSED_ON = ("authorization", "x-request-id")  # headers, to the engine
_CONNECT_SECONDS = 5
_IDLE_SECONDS = 4  # that a connection is kept; vLLM closes it after five
_ALIVE_SECONDS = 2  # that the engine may take to say that it is well
_GONE = 499  # what nginx notes for a client that went before its answer
_COMPLETIONS = "/v1/completions"
_NO_USER = "user_not_found"
_STOP_SECONDS = 30  # that answers may take to end when the process is told to stop
NEAR = (*NAMES, "[::1]")  # names of this machine
# How aiohttp runs it. A client that goes cancels its request's handler, which closes the connection to the engine.
HOW: dict[str, Any] = {"handler_cancellation": True, "auto_decompress": False, "access_log": None}
_WRITE_PROMPT = ["chat_template", "chat_template_kwargs", "continue_final_message", "documents", "echo"]


@dataclasses.dataclass(frozen=True)
class Settings:
    """How the gateway answers."""

    engine: str
    """URL of the engine, without /v1."""
    unknown: Literal["null", "none", "error"]
    """What a request gets whose user is not in the table, or that names none."""
    chat: bool
    """Whether the engine's chat endpoint gets the messages and the soft tokens, or its other one the whole prompt."""
    cache_salt: bool
    """Whether users are kept apart in the engine's prefix cache; see `EngineClient`."""
    largest_body: int
    """Bytes."""
    at_once: int
    """Requests that are answered at the same time."""
    timeout: float
    """Seconds that the engine may be silent, and a client may not read."""
    reload: float
    """Seconds between two looks for a new version of the table."""


def application(table: PrefixTable, settings: Settings, hosts: tuple[str, ...] | None) -> web.Application:
    """The gateway, to be run as `HOW` says.

    Args:
      hosts: names by which it may be asked; None is any. With the names of this machine alone, no page of another site
        can ask it through a browser here (DNS rebinding).

    Raises:
      UserError: a table that no engine can be served from, or one without a chat form.
    """
    gateway = Gateway(table, settings)
    app = web.Application(middlewares=[] if hosts is None else [_named(hosts)])
    app.router.add_post("/v1/chat/completions", gateway.chat)
    app.router.add_get("/v1/models", gateway.models)
    app.router.add_get("/v1/models/{name:.*}", gateway.models)
    app.router.add_get("/health", gateway.health)
    app.router.add_get("/metrics", gateway.metrics_page)
    app.on_response_prepare.append(_unsigned)
    app.cleanup_ctx.append(gateway.lifespan)
    return app


class Gateway:
    """What the routes share: the table, the connections to the engine, and the counts."""

    def __init__(self, table: PrefixTable, settings: Settings):
        if settings.chat and not table.manifest["chat"]:
            raise UserError(
                f"{table.directory}: trained with soft tokens {table.manifest['placement']}, which the engine's chat "
                "endpoint cannot say for this template; leave --chat out"
            )
        self.settings, self.metrics = settings, Metrics()
        self._client = EngineClient(table, "", settings.cache_salt, "null" if settings.unknown == "null" else "error")
        _warm(self._client)
        self._rooms: dict[str, int | None] = {}  # of the engine's models: tokens of prompt and reply together

    async def lifespan(self, _: web.Application) -> AsyncIterator[None]:
        """Holds the connections."""
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=_IDLE_SECONDS)
        async with aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            headers={"accept-encoding": "identity"},
        ) as self._session:
            following = asyncio.ensure_future(self._follow())
            yield
            following.cancel()

    async def _follow(self) -> None:
        """Takes up new versions of the table; one that is damaged, or for another backbone, is not served."""
        while True:
            await asyncio.sleep(self.settings.reload)
            try:
                client = await asyncio.to_thread(self._client.reload)
                if client is self._client:
                    continue
                there, here = (one.table.manifest["backbone"]["fingerprint"] for one in (client, self._client))
                if there != here:
                    raise UserError(
                        f"{client.table.directory}: for another backbone now; start engine and gateway anew"
                    )
                await asyncio.to_thread(_warm, client)
                self._client = client
            except (UserError, OSError) as error:
                self.metrics.reloads_failed += 1
                say(f"the table is served as it was: {error}")

    def _asking(
        self, path: str, headers: dict[str, str], content: bytes | None = None, timeout: float | None = None
    ) -> AbstractAsyncContextManager[aiohttp.ClientResponse]:
        """The engine's answer, from when its headers are there; a POST of what there is to post.

        Raises:
          aiohttp.ClientError: when it is entered or read.
        """
        wait = timeout or self.settings.timeout
        return self._session.request(
            "GET" if content is None else "POST",
            URL(f"{self.settings.engine}{path}", encoded=True),
            headers=headers,
            data=None if content is None else io.BytesIO(content),
            timeout=aiohttp.ClientTimeout(sock_connect=min(wait, _CONNECT_SECONDS), sock_read=wait),
            allow_redirects=False,
        )

    async def _get(self, path: str, headers: dict[str, str], timeout: float | None = None) -> web.Response:
        """The same, whole, as it can be passed back."""
        async with self._asking(path, headers, timeout=timeout) as answer:
            return web.Response(body=await answer.read(), status=answer.status, headers=passed_back(answer))

    async def models(self, request: web.Request) -> web.Response:
        """The engine's answer, as it is."""
        try:
            return await self._get(request.rel_url.raw_path, _passed_on(request))
        except UserError as error:
            return Refused(400, str(error)).response()
        except aiohttp.ClientError as error:
            return self._unreachable(error).response()

    async def health(self, _: web.Request) -> web.Response:
        """200 if the engine says that it is well."""
        try:
            answer = await self._get("/health", {}, _ALIVE_SECONDS)
            fault = None if answer.status == 200 else f"the engine answers {answer.status}"
        except aiohttp.ClientError as error:
            fault = str(self._unreachable(error))
        said = {"status": fault or "ok", "users": len(self._client.table)}
        return web.json_response(said, status=503 if fault else 200)

    async def metrics_page(self, _: web.Request) -> web.Response:
        """See `Metrics`."""
        text = self.metrics.text(len(self._client.table))
        return web.Response(body=text.encode(), headers={"content-type": CONTENT_TYPE})

    async def chat(self, request: web.Request) -> web.StreamResponse:
        """Answers a request within the limits, and counts it."""
        if self.metrics.answering >= self.settings.at_once:
            self.metrics.answers[503] += 1
            busy = Refused(503, f"{self.settings.at_once} requests are being answered; try again", "busy")
            return busy.response({"retry-after": "1"})
        self.metrics.answering += 1
        status = 500  # where what nobody foresaw ends this
        try:
            values = await read_object(request, self.settings.largest_body)
            response, status = await self._answer(values, request)
            return response
        except Refused as refused:
            status = refused.status
            return refused.response()
        except Gone:
            status = _GONE
            if request.transport is not None:
                request.transport.abort()
            return web.Response(status=_GONE)  # to nobody
        except asyncio.CancelledError:
            status = _GONE
            raise
        finally:
            self.metrics.answers[status] += 1
            self.metrics.answering -= 1

    async def _answer(self, values: dict[str, Any], request: web.Request) -> tuple[web.StreamResponse, int]:
        """What the client was sent, and the status to count.

        Raises:
          Refused: with the reason, before anything was sent.
          Gone: the client.
        """
        began = time.monotonic()
        try:
            passed_on, user = _passed_on(request), _header(request, USER_HEADER)
            model, room = await self._model(values.get("model"), passed_on)
            # Not in a thread: Python runs one at a time, and handing over costs more than most prompts.
            path, content = self._prepare(values, user, model, room)
            asked = time.monotonic()
            self.metrics.preparing.add(asked - began)
            headers = passed_on | {"content-type": "application/json"}
            async with self._asking(path, headers, content) as answer:
                relay = Relay(answer, request, self.settings.timeout, path == _COMPLETIONS)
                made = await relay.run()
            self.metrics.first_byte.add(relay.began - asked)
            return made
        except Damaged as error:  # no fault of the client's, whom names of files do not concern
            say(str(error))
            raise Refused(500, "the table of soft tokens is damaged; the gateway's log says where") from error
        except UserError as error:
            raise Refused(400, str(error)) from error
        except aiohttp.ClientError as error:
            raise self._unreachable(error) from error

    async def _model(self, name: Any, headers: dict[str, str]) -> tuple[str, int | None]:
        """A model's name, the engine's first for None, and how many tokens its prompt and reply may have together.

        Raises:
          Refused: the engine does not serve it.
        """
        if not isinstance(name, str | None):
            raise Refused(400, "model must be text")
        if not self._rooms or name not in (None, *self._rooms):
            answer = await self._get("/v1/models", headers)
            if answer.status != 200:
                raise Refused(answer.status, f"the engine answers {answer.status} when it is asked for its models")
            try:
                self._rooms = {card["id"]: card.get("max_model_len") for card in json.loads(answer.text or "")["data"]}
            except (ValueError, LookupError, TypeError, AttributeError) as error:
                raise Refused(502, "the engine does not say which models it serves", "engine_unavailable") from error
        name = next(iter(self._rooms), "") if name is None else name
        if name not in self._rooms:
            raise Refused(404, f"model {shown(name)} is not served; {', '.join(self._rooms)} is", "model_not_found")
        return name, self._rooms[name]

    def _prepare(self, values: dict[str, Any], header: str | None, model: str, room: int | None) -> tuple[str, bytes]:
        """Path and body of the engine's request.

        Raises:
          UserError: a request that cannot be answered.
          Refused: an unknown user, where those are refused.
        """
        messages = to_answer({"user_id": "user", "messages": _plain(values.get("messages"))}, "the request").messages
        name = values.get("user") if header is None else header
        if not isinstance(name, str | None):
            raise UserError("user must be text")
        try:
            made = self._with(name or "", values, messages, model, room)  # nobody in a table has no name
            is_known = self.settings.unknown != "null" or (name or "") in self._client.table
            self.metrics.users["known" if is_known else "null"] += 1
        except AbsentUser as error:
            if self.settings.unknown == "error" and name:
                raise Refused(404, f"user {shown(name)} has no prefix; see --unknown of e2p serve", _NO_USER) from error
            if self.settings.unknown == "error":
                raise Refused(400, "no user is named; give `user`, or the header X-E2P-User", _NO_USER) from error
            made = self._with(None, values, messages, model, room)
            self.metrics.users["none"] += 1
        return made

    def _with(
        self, user: str | None, values: dict[str, Any], messages: Messages, model: str, room: int | None
    ) -> tuple[str, bytes]:
        """The same, with the soft tokens of this user, or of nobody."""
        if user is not None and self.settings.chat:
            chat_api.refuse_prompt_fields(values, _WRITE_PROMPT)
            path, body = "/v1/chat/completions", self._client.vllm_chat(user, messages)
            fields, default = values, {}
        else:
            path, body = _COMPLETIONS, self._client.vllm_completion(user, messages, room)
            # Without a word of it a completion ends after 16 tokens; null is all that there is room for (vLLM).
            fields, default = chat_api.completion_fields(values), {"max_tokens": body["max_tokens"] if room else None}
        stops = values.get("stop_token_ids") or []
        if not isinstance(stops, list):
            raise UserError("stop_token_ids must be a list of whole numbers")
        made = {name: value for name, value in body.items() if name not in SAMPLING}
        made |= {"model": model, "stop_token_ids": [*body["stop_token_ids"], *stops]}
        passed = {name: value for name, value in fields.items() if name != "user"}
        return path, json.dumps(default | passed | made).encode()

    def _unreachable(self, error: Exception) -> Refused:
        self._rooms = {}  # another engine may answer next time
        if isinstance(error, aiohttp.SocketTimeoutError):
            return Refused(504, f"the engine said nothing for {self.settings.timeout:g} s", "engine_unavailable")
        return Refused(502, f"the engine cannot be reached ({type(error).__name__})", "engine_unavailable")


def _warm(client: EngineClient) -> None:
    """Loads the tokenizer, which takes seconds, before a request waits for it."""
    client.vllm_completion(None, [{"role": "user", "content": "hi"}])


def _plain(messages: Any) -> Any:
    """The messages without keys that say nothing, as clients send back what they were answered."""
    if not isinstance(messages, list):
        return messages
    objects = [message if isinstance(message, dict) else {} for message in messages]
    return [{key: value for key, value in message.items() if value not in (None, [])} for message in objects]


def _header(request: web.Request, name: str) -> str | None:
    """
    Raises:
      UserError: not UTF-8.
    """
    value = request.headers.get(name)
    try:
        (value or "").encode()  # what is no UTF-8 was read as surrogates
    except UnicodeEncodeError as error:
        raise UserError(f"the header {name} is not UTF-8") from error
    return value


def _passed_on(request: web.Request) -> dict[str, str]:
    return {name: value for name in _PASSED_ON if (value := _header(request, name)) is not None}


def _named(hosts: tuple[str, ...]) -> Middleware:
    """Refuses who asks by another name."""

    @web.middleware
    async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
        name = re.sub(r":\d*$", "", request.headers.get("host", "")).lower()
        return await handler(request) if name in hosts else web.Response(text="another host's name", status=400)

    return guard


async def _unsigned(_: web.Request, response: web.StreamResponse) -> None:
    """Says nothing of versions."""
    del response.headers["server"]


def serve(table: PrefixTable, settings: Settings, host: str, port: int) -> None:
    """Serves until the process is told to stop; prints the address when it listens.

    Args:
      port: 0 is any that is free.

    Raises:
      UserError: the table cannot be served so, or nothing can listen there.
    """
    try:
        listening = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise UserError(f"--host {host} --port {port}: {error}; choose another") from error
    with contextlib.closing(listening):
        address, number = listening.getsockname()[:2]
        near = ipaddress.ip_address(address).is_loopback
        app = application(table, settings, NEAR if near else None)
        if not near:
            say(
                f"whoever reaches {address}, port {number}, can ask as any user, unencrypted; put in front what checks "
                "users and speaks TLS"
            )
        print(f"http://{f'[{address}]' if ':' in address else address}:{number}", flush=True)
        web.run_app(app, sock=listening, print=None, shutdown_timeout=_STOP_SECONDS, **HOW)
