"""The web port: gRPC-Web, the static page and `/healthz`, behind Host and Origin checks. One pure ASGI application."""

import asyncio
import json
import mimetypes
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

import structlog

from moe_debugger.v1 import gateway_pb2 as pb
from moe_gateway.components import ComponentMonitor
from moe_gateway.grpc_web import CONTENT_TYPES, GrpcWebApp

__all__ = ["SECURITY_HEADERS", "StaticFiles", "WebApp", "allowed_hosts"]

log = structlog.get_logger(__name__)

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

_CSP = (
    "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "frame-ancestors 'none'; base-uri 'none'; object-src 'none'"
)
SECURITY_HEADERS: tuple[tuple[bytes, bytes], ...] = (
    (b"content-security-policy", _CSP.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
)
_MAX_HEADER_BYTES = 16 * 1024
# mimetypes reads the machine's own tables, which may say anything; these are what the page is made of.
_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".ico": "image/x-icon",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".map": "application/json",
    ".mjs": "text/javascript; charset=utf-8",
    ".png": "image/png",
    ".svg": "image/svg+xml",
    ".txt": "text/plain; charset=utf-8",
    ".webmanifest": "application/manifest+json",
    ".woff2": "font/woff2",
}
_NOT_BUILT = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>MoE Debugger</title></head>
<body style="font-family: system-ui; margin: 4rem; max-width: 40rem"><h1>The web page is not built</h1>
<p>The gateway runs, and its API answers on this port and by native gRPC. To build the page, run <code>make web</code>
in the repository, then reload.</p></body></html>
"""


def allowed_hosts(port: int) -> frozenset[str]:
    """Return the Host headers that the web port answers to; any other is somebody's DNS pointing here."""
    names = ("127.0.0.1", "localhost", "[::1]")
    # Browsers leave HTTP's own port out.
    return frozenset((*(f"{name}:{port}" for name in names), *(names if port == 80 else ())))


class StaticFiles:
    """Reads the built page.

    Args:
        root: its folder; may be missing.
    """

    def __init__(self, root: Path) -> None:
        self._root = root.resolve()

    def find(self, path: str) -> Path | None:
        """Return the file for a URL path; None where there is none, or it would lie outside the folder."""
        parts = [part for part in path.split("/") if part]
        if any(part.startswith(".") or "\\" in part or "\0" in part for part in parts):
            return None
        try:
            file = self._root.joinpath(*parts).resolve()
            return file if parts and file.is_relative_to(self._root) and file.is_file() else None
        except (OSError, ValueError):
            # A name too long for the file system, for one.
            return None

    async def respond(self, path: str, is_head: bool, send: Send) -> None:
        """Answer a GET or HEAD of `path`."""
        file = await asyncio.to_thread(self.find, path)
        last = path.rsplit("/", 1)[-1]
        if file is None and (path.startswith("/assets/") or "." in last):
            await respond(send, 404, "text/plain; charset=utf-8", b"there is no such file\n", is_head=is_head)
            return
        # Any other path is a view of the single-page application.
        file = file or await asyncio.to_thread(self.find, "/index.html")
        if file is None:
            await respond(send, 503, _TYPES[".html"], _NOT_BUILT.encode(), is_head=is_head)
            return
        content_type = _TYPES.get(file.suffix) or mimetypes.guess_type(file.name)[0] or "application/octet-stream"
        # Vite puts a content hash into every name below /assets.
        cache = b"public, max-age=31536000, immutable" if path.startswith("/assets/") else b"no-cache"
        body = await asyncio.to_thread(file.read_bytes)
        await respond(send, 200, content_type, body, cache=cache, is_head=is_head)


class WebApp:
    """Checks every request, then hands it to gRPC-Web, the health check or the static files.

    Args:
        port: the port that browsers name in Host; the gateway knows it once it is bound.
    """

    def __init__(self, grpc_web: GrpcWebApp, static: StaticFiles, monitor: ComponentMonitor, port: int) -> None:
        self._grpc_web = grpc_web
        self._static = static
        self._monitor = monitor
        self._hosts = allowed_hosts(port)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            # WebSockets and the lifespan protocol are switched off in the server.
            return
        send = _with_security_headers(send)
        refusal = self._refusal(scope)
        if refusal is not None:
            status, text = refusal
            log.info("http_refused", status=status, reason=text, path=scope["path"][:200])
            # Closing saves reading a body that nobody wants.
            await respond(send, status, "text/plain; charset=utf-8", text.encode() + b"\n", close=True)
        elif scope["method"] == "POST":
            await self._grpc_web(scope, receive, send)
        elif scope["path"] == "/healthz":
            await self._respond_health(scope["method"] == "HEAD", send)
        else:
            await self._static.respond(scope["path"], scope["method"] == "HEAD", send)

    def _refusal(self, scope: Scope) -> tuple[int, str] | None:
        headers: list[tuple[bytes, bytes]] = scope["headers"]
        if sum(len(name) + len(value) for name, value in headers) > _MAX_HEADER_BYTES:
            return 431, f"the headers have more than {_MAX_HEADER_BYTES} bytes"
        hosts = [value.decode("latin-1").lower() for name, value in headers if name == b"host"]
        if len(hosts) != 1 or hosts[0] not in self._hosts:
            return 421, f"Host {', '.join(hosts)[:100]!r} is not served here; use {' or '.join(sorted(self._hosts))}"
        origins = [value.decode("latin-1").lower() for name, value in headers if name == b"origin"]
        if origins and origins != [f"http://{hosts[0]}"]:
            return 403, f"Origin {', '.join(origins)[:100]!r} may not use this server; open http://{hosts[0]} itself"
        if scope["method"] not in ("GET", "HEAD", "POST"):
            return 405, f"method {scope['method'][:20]} is not supported; use GET, HEAD, or POST for gRPC-Web"
        if scope["method"] == "POST":
            types = [value.decode("latin-1") for name, value in headers if name == b"content-type"]
            if len(types) != 1 or types[0].partition(";")[0].strip().lower() not in CONTENT_TYPES:
                return 415, f"content type {', '.join(types)[:100]!r} is not gRPC-Web; use {', '.join(CONTENT_TYPES)}"
        return None

    async def _respond_health(self, is_head: bool, send: Send) -> None:
        components = {c.name: pb.ComponentState.Name(c.state) for c in self._monitor.components()}
        prefix = "COMPONENT_STATE_"
        body = {"status": "ok", "components": {k: v.removeprefix(prefix).lower() for k, v in components.items()}}
        await respond(send, 200, "application/json", json.dumps(body).encode(), cache=b"no-store", is_head=is_head)


async def respond(
    send: Send,
    status: int,
    content_type: str,
    body: bytes,
    *,
    cache: bytes = b"no-store",
    is_head: bool = False,
    close: bool = False,
) -> None:
    """Send a whole response."""
    headers = [
        (b"content-type", content_type.encode()),
        (b"content-length", str(len(body)).encode()),
        (b"cache-control", cache),
    ]
    if close:
        headers.append((b"connection", b"close"))
    if status == 405:
        headers.append((b"allow", b"GET, HEAD, POST"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": b"" if is_head else body})


def _with_security_headers(send: Send) -> Send:
    async def secured(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message.get("headers", ()), *SECURITY_HEADERS]
        await send(message)

    return secured
