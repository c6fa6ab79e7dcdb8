"""Stands between clients of the OpenAI chat API and an engine: puts each user's soft tokens into the prompt.

A request names its user; the gateway writes the prompt as training did, looks the soft tokens up, asks the engine, and
gives its answer back as that of a chat, streamed or whole. Needs Starlette, uvicorn and httpx: the extra `[serve]`.
"""

import asyncio
import contextlib
import dataclasses
import functools
import ipaddress
import json
import socket
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from e2p_jax.datasets.records import to_answer
from e2p_jax.errors import UserError, shown
from e2p_jax.export.client import EngineClient
from e2p_jax.export.demo_access import NAMES
from e2p_jax.export.payloads import SAMPLING
from e2p_jax.export.prefix_reader import PrefixTable
from e2p_jax.serve import chat_api
from e2p_jax.serve.metrics import CONTENT_TYPE, Metrics
from e2p_jax.serve.relay import Refused, Relay, passed_back, read_object
from e2p_jax.terminal import say

USER_HEADER = "x-e2p-user"
_PASSED_ON = ("authorization", "x-request-id")  # headers, to the engine
_CONNECT_SECONDS = 5
_ALIVE_SECONDS = 2  # that the engine may take to say that it is well
_GONE = 499  # what nginx notes for a client that went before its answer
_COMPLETIONS = "/v1/completions"
_STOP_SECONDS = 30  # that answers may take to end when the process is told to stop
_NEAR = (*NAMES, "[::1]")
_WRITE_PROMPT = ["chat_template", "chat_template_kwargs", "continue_final_message", "documents", "echo"]


@dataclasses.dataclass(frozen=True)
class Settings:
    """How the gateway answers."""

    engine: str
    """URL of the engine, without /v1."""
    unknown: Literal["none", "error"]
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


def application(table: PrefixTable, settings: Settings, hosts: tuple[str, ...]) -> Starlette:
    """The gateway as an ASGI application.

    Args:
      hosts: names by which it may be asked; `*` is any. With the names of this machine alone, no page of another site
        can ask it through a browser here (DNS rebinding).

    Raises:
      UserError: a table that no engine can be served from, or one without a chat form.
    """
    gateway = Gateway(table, settings)
    routes = [
        Route("/v1/chat/completions", gateway.chat, methods=["POST"]),
        Route("/v1/models", gateway.models),
        Route("/v1/models/{name:path}", gateway.models),
        Route("/health", gateway.health),
        Route("/metrics", gateway.metrics_page),
    ]
    guards = [Middleware(TrustedHostMiddleware, allowed_hosts=hosts, www_redirect=False)]
    return Starlette(routes=routes, middleware=guards, lifespan=gateway.lifespan)


class Gateway:
    """What the routes share: the table, the connections to the engine, and the counts."""

    def __init__(self, table: PrefixTable, settings: Settings):
        if settings.chat and not table.manifest["chat"]:
            raise UserError(
                f"{table.directory}: trained with soft tokens {table.manifest['placement']}, which the engine's chat "
                "endpoint cannot say for this template; leave --chat out"
            )
        self.table, self.settings, self.metrics = table, settings, Metrics()
        self._client = EngineClient(table, "", settings.cache_salt)
        self._client.vllm_completion(None, [{"role": "user", "content": "hi"}])  # loads the tokenizer: seconds
        self._rooms: dict[str, int | None] = {}  # of the engine's models: tokens of prompt and reply together
        self._worker = ThreadPoolExecutor(1, "prompts")  # a long prompt keeps no other request's bytes waiting
        self.chat = _Chat(self)

    @contextlib.asynccontextmanager
    async def lifespan(self, _: Starlette) -> AsyncIterator[None]:
        """Holds the connections."""
        timeout = httpx.Timeout(self.settings.timeout, connect=_CONNECT_SECONDS)
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=self.settings.at_once)
        url, plain = self.settings.engine, {"accept-encoding": "identity"}
        async with httpx.AsyncClient(
            base_url=url, headers=plain, timeout=timeout, limits=limits, trust_env=False
        ) as self.engine:
            yield
        self._worker.shutdown()

    async def models(self, request: Request) -> Response:
        """The engine's answer, as it is."""
        try:
            answer = await self.engine.get(request.url.path, headers=_passed_on(request))
        except httpx.HTTPError as error:
            return self._unreachable(error).response()
        return Response(answer.content, answer.status_code, passed_back(answer))

    async def health(self, _: Request) -> Response:
        """200 if the engine says that it is well."""
        try:
            answer = await self.engine.get("/health", timeout=_ALIVE_SECONDS)
            fault = None if answer.is_success else f"the engine answers {answer.status_code}"
        except httpx.HTTPError as error:
            fault = str(self._unreachable(error))
        said = {"status": fault or "ok", "users": len(self.table)}
        return JSONResponse(said, 503 if fault else 200)

    async def metrics_page(self, _: Request) -> Response:
        """See `Metrics`."""
        return PlainTextResponse(self.metrics.text(len(self.table)), media_type=CONTENT_TYPE)

    async def ask(self, values: dict[str, Any], request: Request, send: Send) -> int:
        """Answers one chat request; returns the status.

        Raises:
          Refused: with the reason, before anything was sent.
        """
        began, passed_on = time.monotonic(), _passed_on(request)
        try:
            model, room = await self._model(values.get("model"), passed_on)
            make = functools.partial(self._prepare, values, _header(request), model, room)
            path, content = await asyncio.get_running_loop().run_in_executor(self._worker, make)
            asked = time.monotonic()
            self.metrics.preparing.add(asked - began)
            headers = passed_on | {"content-type": "application/json"}
            async with self.engine.stream("POST", path, content=content, headers=headers) as answer:
                relay = Relay(answer, send, self.settings.timeout, path == _COMPLETIONS)
                status = await relay.run()
            self.metrics.first_byte.add(relay.began - asked)
            return status
        except UserError as error:
            raise Refused(400, str(error)) from error
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error

    async def _model(self, name: Any, headers: dict[str, str]) -> tuple[str, int | None]:
        """A model's name, the engine's first for None, and how many tokens its prompt and reply may have together.

        Raises:
          Refused: the engine does not serve it.
        """
        if not isinstance(name, str | None):
            raise Refused(400, "model must be text")
        if not self._rooms or name not in (None, *self._rooms):
            answer = await self.engine.get("/v1/models", headers=headers)
            if not answer.is_success:
                raise Refused(answer.status_code, f"the engine answers {answer.status_code} when asked for its models")
            try:
                self._rooms = {card["id"]: card.get("max_model_len") for card in answer.json()["data"]}
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
          Refused: an unknown user.
        """
        messages = to_answer({"user_id": "user", "messages": _plain(values.get("messages"))}, "the request").messages
        user = self._user(values.get("user") if header is None else header)
        if user is not None and self.settings.chat:
            chat_api.refuse_prompt_fields(values, _WRITE_PROMPT)
            path, body = "/v1/chat/completions", self._client.vllm_chat(user, messages)
            fields, default = values, {}
        else:
            path, body = _COMPLETIONS, self._client.vllm_completion(user, messages, room)
            fields, default = chat_api.completion_fields(values), {"max_tokens": body["max_tokens"]} if room else {}
        stops = values.get("stop_token_ids") or []
        if not isinstance(stops, list):
            raise UserError("stop_token_ids must be a list of whole numbers")
        made = {name: value for name, value in body.items() if name not in SAMPLING}
        made |= {"model": model, "stop_token_ids": [*body["stop_token_ids"], *stops]}
        passed = {name: value for name, value in fields.items() if name != "user"}
        return path, json.dumps(default | passed | made).encode()

    def _user(self, name: Any) -> str | None:
        """The user whose soft tokens the prompt gets; None is nobody.

        Raises:
          UserError: not a name.
          Refused: an unknown one, where those are refused.
        """
        if not isinstance(name, str | None):
            raise UserError("user must be text")
        if name and name in self.table:
            self.metrics.users["known"] += 1
            return name
        if self.settings.unknown == "error":
            if name:
                raise Refused(404, f"user {shown(name)} has no prefix; see --unknown of e2p serve", "user_not_found")
            raise Refused(400, "no user is named; give `user`, or the header X-E2P-User", "user_not_found")
        self.metrics.users[self.settings.unknown] += 1
        return None

    def _unreachable(self, error: httpx.HTTPError) -> Refused:
        self._rooms = {}  # another engine may answer next time
        if isinstance(error, httpx.TimeoutException) and not isinstance(error, httpx.ConnectTimeout):
            return Refused(504, f"the engine said nothing for {self.settings.timeout:g} s", "engine_unavailable")
        return Refused(502, f"the engine cannot be reached ({type(error).__name__})", "engine_unavailable")


class _Chat:
    """The chat endpoint: limits, and an end to what nobody waits for."""

    def __init__(self, gateway: Gateway):
        self._gateway, self._settings, self._metrics = gateway, gateway.settings, gateway.metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._metrics.answering >= self._settings.at_once:
            busy = Refused(503, f"{self._settings.at_once} requests are being answered; try again", "busy")
            self._metrics.answers[503] += 1
            await busy.response({"retry-after": "1"})(scope, receive, send)
            return
        self._metrics.answering += 1
        status = _GONE
        try:
            status = await self._answer(Request(scope, receive), send)
        except Refused as refused:
            status = refused.status
            await refused.response()(scope, receive, send)
        except (TimeoutError, ClientDisconnect):
            pass
        finally:
            self._metrics.answers[status] += 1
            self._metrics.answering -= 1

    async def _answer(self, request: Request, send: Send) -> int:
        values = await read_object(request, self._settings.largest_body)
        work = asyncio.ensure_future(self._gateway.ask(values, request, send))
        gone = asyncio.ensure_future(request.receive())  # nothing else comes after the body
        try:
            await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
            return work.result() if work.done() else _GONE
        finally:
            gone.cancel()
            work.cancel()  # closes the connection to the engine, which then stops
            await asyncio.wait((work, gone))


def _plain(messages: Any) -> Any:
    """The messages without keys that say nothing, as clients send back what they were answered."""
    if not isinstance(messages, list):
        return messages
    objects = [message if isinstance(message, dict) else {} for message in messages]
    return [{key: value for key, value in message.items() if value not in (None, [])} for message in objects]


def _header(request: Request) -> str | None:
    """The user that the header names.

    Raises:
      UserError: not UTF-8.
    """
    value = request.headers.get(USER_HEADER)
    try:
        return None if value is None else value.encode("latin-1").decode()
    except UnicodeDecodeError as error:
        raise UserError("the header X-E2P-User is not UTF-8") from error


def _passed_on(request: Request) -> dict[str, str]:
    return {name: value for name in _PASSED_ON if (value := request.headers.get(name)) is not None}


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
        app = application(table, settings, _NEAR if near else ("*",))
        config = uvicorn.Config(
            app, log_level="warning", access_log=False, server_header=False, timeout_graceful_shutdown=_STOP_SECONDS
        )
        if not near:
            say(
                f"whoever reaches {address}, port {number}, can ask as any user, unencrypted; put in front what checks "
                "users and speaks TLS"
            )
        print(f"http://{f'[{address}]' if ':' in address else address}:{number}", flush=True)
        uvicorn.Server(config).run([listening])
