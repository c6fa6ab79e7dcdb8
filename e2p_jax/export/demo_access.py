"""Guards the demo: it lets in requests of its own page alone, of a size and number that it can serve."""

import asyncio

from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

NAMES = ("127.0.0.1", "localhost")  # by which a browser on this machine asks
LARGEST_BODY = 256 * 1024  # bytes
BODY_SECONDS = 10  # that a body may take to come

# What the page asks for. Gradio serves more: uploads, files, calls past the queue, a proxy.
_READ = ("/assets/", "/static/", "/svelte/", "/gradio_api/heartbeat/")
_READ_WHOLE = (
    "/",
    "/config",
    "/favicon.ico",
    "/gradio_api/queue/data",
    "/gradio_api/startup-events",
    "/manifest.json",
    "/theme.css",
)
_WRITE = ("/gradio_api/queue/join", "/gradio_api/cancel", "/gradio_api/reset")


class OwnPageOnly:
    """ASGI middleware behind Starlette's check of the Host header: origin, path and body of every request.

    A page of another site whose name comes to point at this machine (DNS rebinding) sends its own name as Host; one
    that posts here without that sends its own Origin.
    """

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        refusal = _refusal(scope)
        body = b""
        if refusal is None and scope["method"] == "POST":
            try:
                body = await asyncio.wait_for(_read(receive), BODY_SECONDS)
            except (TimeoutError, ValueError):
                refusal = 413, f"more than {LARGEST_BODY} bytes, or more than {BODY_SECONDS} s to come"
        if refusal is not None:
            await PlainTextResponse(refusal[1], refusal[0])(scope, receive, send)
            return
        unread = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive_again() -> Message:
            return unread.pop() if unread else await receive()

        await self.app(scope, receive_again if scope["method"] == "POST" else receive, send)


def _refusal(scope: Scope) -> tuple[int, str] | None:
    """Status and reason, for a request that the page does not make."""
    if scope["type"] != "http":
        return 403, "HTTP only"
    headers, path = Headers(scope=scope), scope["path"].rstrip("/") or "/"
    if headers.get("origin", own := f"http://{headers.get('host')}") != own:
        return 403, "asked by a page of another origin"
    reads = scope["method"] in ("GET", "HEAD") and (path in _READ_WHOLE or path.startswith(_READ))
    if not reads and not (scope["method"] == "POST" and path in _WRITE):
        return 404, "the page has no use for this"
    return None


async def _read(receive: Receive) -> bytes:
    """Raises ValueError for a body that is too large."""
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if len(body) > LARGEST_BODY:
            raise ValueError(len(body))
        if not message.get("more_body"):
            return body
