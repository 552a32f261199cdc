"""gRPC-Web as a pure ASGI application that calls grpc.aio servicers in-process.

`MethodRegistry` stands in for a `grpc.aio.Server` when servicers register themselves; `GrpcWebApp` looks a request's
handler up through the same interceptors that the native port has, and runs it with `WebServicerContext`. Proxying
through a channel instead would cost ten times the CPU per message.
"""

import asyncio
import contextlib
import functools
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple, Never, TypeAlias

import grpc
import structlog

from moe_debugger.errors import InvalidInputError, MoEDebuggerError
from moe_gateway.errors import status_of
from moe_gateway.framing import (
    FrameError,
    FrameTooLargeError,
    decode_message,
    decode_metadata,
    decode_text,
    encode_frame,
    encode_message_text,
    encode_metadata,
    encode_trailers,
    parse_timeout_s,
    status_fields,
)

__all__ = ["CONTENT_TYPES", "GrpcWebApp", "MethodRegistry", "WebServicerContext"]

log = structlog.get_logger(__name__)

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
# A string: at run time grpc's class takes no type arguments.
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Metadata = Sequence[tuple[str, str | bytes]]

_BINARY = ("application/grpc-web", "application/grpc-web+proto")
_TEXT = ("application/grpc-web-text", "application/grpc-web-text+proto")
CONTENT_TYPES = _BINARY + _TEXT
# A client that sends its request slower than this is not one of ours.
_BODY_TIMEOUT_S = 15.0
_SINGLE_HEADERS = frozenset({"content-type", "content-length", "grpc-timeout", "grpc-encoding"})


class _HandlerCallDetails(NamedTuple):
    method: str
    invocation_metadata: Metadata


class _ClientGoneError(Exception):
    """The browser closed the request."""


class _AbortError(grpc.aio.AbortError):
    """Raised by `abort` in a handler, as grpc.aio does."""


class MethodRegistry:
    """Records what `add_<Service>Servicer_to_server` registers."""

    def __init__(self) -> None:
        self.methods: dict[str, Handler] = {}

    def add_generic_rpc_handlers(self, generic_rpc_handlers: Iterable[grpc.GenericRpcHandler]) -> None:
        """Accept generic handlers; generated code registers the same methods by name as well, which is what counts."""

    def add_registered_method_handlers(self, service_name: str, method_handlers: Mapping[str, Handler]) -> None:
        """Record a service's methods under their paths."""
        for name, handler in method_handlers.items():
            self.methods[f"/{service_name}/{name}"] = handler


class WebServicerContext(grpc.aio.ServicerContext[Any, Any]):
    """What a handler sees of a gRPC-Web call."""

    def __init__(self, response: "_Response", metadata: Metadata, peer: str, deadline: float | None) -> None:
        self._response = response
        self._metadata = grpc.aio.Metadata(*metadata)
        self._peer = peer
        self._deadline = deadline
        self._trailing: list[Sequence[str | bytes]] = []
        self._code: grpc.StatusCode | None = None
        self._details = ""
        self._callbacks: list[Callable[[Any], None]] = []
        self._is_done = False
        self._is_cancelled = False

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing_metadata: Any = ()) -> Never:
        """End the call with a status."""
        self._code = grpc.StatusCode.UNKNOWN if code is grpc.StatusCode.OK else code
        self._details = details
        if trailing_metadata:
            self._trailing = list(trailing_metadata)
        raise _AbortError(f"{code} {details}")

    async def abort_with_status(self, status: grpc.Status) -> Never:
        """End the call with a status that carries details."""
        await self.abort(status.code, status.details, status.trailing_metadata or ())

    async def send_initial_metadata(self, initial_metadata: Any) -> None:
        """Send the headers now."""
        await self._response.start(encode_metadata(initial_metadata))

    async def write(self, message: Any) -> None:
        """Send one message of a stream."""
        await self._response.send_message(message)

    async def read(self) -> Any:
        """There are no client streams in gRPC-Web."""
        raise NotImplementedError("gRPC-Web has no client streams")

    def set_trailing_metadata(self, trailing_metadata: Any) -> None:
        """Set the metadata that follows the last message."""
        self._trailing = list(trailing_metadata)

    def trailing_metadata(self) -> Any:
        """Return the metadata that follows the last message."""
        return tuple(self._trailing)

    def invocation_metadata(self) -> grpc.aio.Metadata:
        """Return the client's metadata."""
        return self._metadata

    def set_code(self, code: grpc.StatusCode) -> None:
        """Set the status code of a call that returns."""
        self._code = code

    def set_details(self, details: str) -> None:
        """Set the status message of a call that returns."""
        self._details = details

    def code(self) -> grpc.StatusCode:
        """Return the status code so far."""
        return self._code or grpc.StatusCode.OK

    def details(self) -> str:
        """Return the status message so far."""
        return self._details

    def set_compression(self, compression: grpc.Compression) -> None:
        """Responses are not compressed here: HTTP in front of the gateway may do it."""

    def disable_next_message_compression(self) -> None:
        """Responses are not compressed."""

    def peer(self) -> str:
        """Return the client's address as gRPC writes it."""
        return self._peer

    def peer_identities(self) -> None:
        """Return nothing: there are no client certificates."""
        return

    def peer_identity_key(self) -> None:
        """Return nothing: there are no client certificates."""
        return

    def auth_context(self) -> Mapping[str, Iterable[bytes]]:
        """Return nothing: there are no client certificates."""
        return {}

    def time_remaining(self) -> float:
        """Return the seconds until the client's deadline; None where it has none, as grpc.aio does."""
        if self._deadline is None:
            return None  # type: ignore[return-value]
        return max(0.0, self._deadline - asyncio.get_running_loop().time())

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        """Call back when the call is over."""
        self._callbacks.append(callback)

    def cancelled(self) -> bool:
        """Return whether the client went away."""
        return self._is_cancelled

    def done(self) -> bool:
        """Return whether the call is over."""
        return self._is_done

    def finish(self, *, is_cancelled: bool) -> None:
        """Mark the call as over; for the adapter."""
        self._is_done, self._is_cancelled = True, is_cancelled
        for callback in self._callbacks:
            callback(self)


class _Response:
    """The HTTP response: headers with the first message, or all in the headers where there is none."""

    def __init__(self, send: Send, content_type: str, serializer: Callable[[Any], bytes] | None) -> None:
        self._send = send
        self._content_type = content_type
        self._is_text = content_type.startswith("application/grpc-web-text")
        self._serializer = serializer
        self._is_started = False

    async def start(self, fields: Iterable[tuple[str, str]] = ()) -> None:
        if self._is_started:
            return
        self._is_started = True
        headers = [("content-type", self._content_type), ("cache-control", "no-store"), *fields]
        encoded = [(name.encode("ascii"), value.encode("ascii")) for name, value in headers]
        await self._send({"type": "http.response.start", "status": 200, "headers": encoded})

    async def send_message(self, message: Any) -> None:
        await self.start()
        payload = self._serializer(message) if self._serializer else message
        await self._send_body(encode_frame(0, payload), more=True)

    async def end(self, code: int, message: str, trailing: Iterable[Sequence[str | bytes]]) -> None:
        fields = status_fields(code, message, trailing)
        if self._is_started:
            await self._send_body(encode_trailers(fields), more=False)
        elif code == 0:
            # connect-web and grpc-web both want the trailers of a success in the body.
            await self.start()
            await self._send_body(encode_trailers(fields), more=False)
        else:
            await self.start([("grpc-accept-encoding", "identity,gzip"), *fields])
            await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_body(self, data: bytes, *, more: bool) -> None:
        # Each flush is a base64 segment of its own, so that a client can decode what it has.
        body = encode_message_text(data) if self._is_text else data
        await self._send({"type": "http.response.body", "body": body, "more_body": more})


class GrpcWebApp:
    """ASGI application for POST requests with a gRPC-Web content type; the caller has checked both.

    Args:
        methods: handlers by path, of a `MethodRegistry`.
        interceptors: outermost first, the ones of the native port.
        max_message_bytes: limit of a request's message, after decompression.
    """

    def __init__(
        self,
        methods: Mapping[str, Handler],
        interceptors: Sequence[grpc.aio.ServerInterceptor],
        *,
        max_message_bytes: int,
    ) -> None:
        self._methods = methods
        self._interceptors = tuple(interceptors)
        self._max_message_bytes = max_message_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one call."""
        fields = [(name.decode("latin-1").lower(), value.decode("latin-1")) for name, value in scope["headers"]]
        headers = dict(fields)
        content_type = headers.get("content-type", "").partition(";")[0].strip().lower()
        response = _Response(send, content_type, None)
        try:
            names = [name for name, _ in fields if name in _SINGLE_HEADERS]
            if len(names) != len(set(names)):
                raise FrameError("content-type, content-length, grpc-timeout and grpc-encoding may be given once only")
            metadata = decode_metadata(fields)
            timeout_s = parse_timeout_s(headers["grpc-timeout"]) if "grpc-timeout" in headers else None
            handler = await self._find_handler(scope["path"], metadata)
            if handler is None or handler.request_streaming:
                what = "is not a method of this server" if handler is None else "is a client stream; use native gRPC"
                await response.end(grpc.StatusCode.UNIMPLEMENTED.value[0], f"{scope['path'][:200]} {what}", ())
                return
            body = await self._read_body(receive, content_type in _TEXT, headers.get("content-length", ""))
            payload = decode_message(body, headers.get("grpc-encoding", "").strip().lower(), self._max_message_bytes)
            request = _deserialize(handler, payload)
        except _ClientGoneError:
            return
        except MoEDebuggerError as error:
            await _end_with_error(response, error)
            return
        response = _Response(send, content_type, handler.response_serializer)
        deadline = None if timeout_s is None else asyncio.get_running_loop().time() + timeout_s
        context = WebServicerContext(response, metadata, _peer(scope), deadline)
        await self._run(handler, request, context, response, receive, timeout_s)

    async def _find_handler(self, path: str, metadata: Metadata) -> "Handler | None":
        async def look_up(details: grpc.HandlerCallDetails) -> "Handler | None":
            return self._methods.get(details.method)

        find: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]] = look_up
        for interceptor in reversed(self._interceptors):
            find = functools.partial(interceptor.intercept_service, find)
        details: Any = _HandlerCallDetails(path, tuple(metadata))
        return await find(details)

    async def _read_body(self, receive: Receive, is_text: bool, content_length: str) -> bytes:
        # Room for the frame's header, and in text mode for base64 of several segments.
        limit = (self._max_message_bytes + 16) * (2 if is_text else 1)
        too_large = FrameTooLargeError(f"the request is larger than {self._max_message_bytes} bytes, the most accepted")
        if content_length.isdecimal() and int(content_length) > limit:
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(_BODY_TIMEOUT_S):
                while True:
                    event = await receive()
                    if event["type"] == "http.disconnect":
                        raise _ClientGoneError
                    body += event.get("body", b"")
                    if len(body) > limit:
                        raise too_large
                    if not event.get("more_body", False):
                        break
        except TimeoutError:
            raise FrameError(f"the request's body did not arrive within {_BODY_TIMEOUT_S:g} s") from None
        return decode_text(bytes(body)) if is_text else bytes(body)

    async def _run(
        self,
        handler: Handler,
        request: Any,
        context: WebServicerContext,
        response: _Response,
        receive: Receive,
        timeout_s: float | None,
    ) -> None:
        call = asyncio.ensure_future(_call(handler, request, context, response))
        gone = asyncio.ensure_future(_until_disconnect(receive))
        try:
            await asyncio.wait((call, gone), timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if call.done():
                await _finish(call, context, response)
            else:
                is_late = not gone.done()
                await _cancel(call)
                if is_late:
                    await response.end(grpc.StatusCode.DEADLINE_EXCEEDED.value[0], "the deadline is exceeded", ())
        except OSError:
            # The connection broke while the last bytes were written; there is nobody left to tell.
            log.debug("client_gone")
        finally:
            context.finish(is_cancelled=gone.done())
            await _cancel(gone)
            await _cancel(call)


async def _call(handler: Handler, request: Any, context: WebServicerContext, response: _Response) -> None:
    unary: Any = handler.unary_unary
    stream: Any = handler.unary_stream
    if unary is not None:
        reply = await unary(request, context)
        if context.code() is grpc.StatusCode.OK:
            await response.send_message(reply)
        return
    replies = stream(request, context)
    if not hasattr(replies, "__aiter__"):
        await replies
        return
    async with contextlib.aclosing(replies) as messages:
        async for message in messages:
            await response.send_message(message)


async def _finish(call: "asyncio.Future[None]", context: WebServicerContext, response: _Response) -> None:
    try:
        call.result()
    except grpc.aio.AbortError:
        pass
    except asyncio.CancelledError:
        context.set_code(grpc.StatusCode.CANCELLED)
        context.set_details("the call was cancelled by the server")
    except OSError:
        raise
    except Exception as error:
        log.error("rpc_failed_outside_interceptors", exc_info=error)
        context.set_code(grpc.StatusCode.INTERNAL)
        context.set_details("the gateway has an internal error; its log holds the cause")
    await response.end(context.code().value[0], context.details(), context.trailing_metadata())


async def _until_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancel(task: "asyncio.Future[None]") -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError, Exception):
        await task


async def _end_with_error(response: _Response, error: MoEDebuggerError) -> None:
    status = status_of(error)
    await response.end(status.code, status.message, (("grpc-status-details-bin", status.SerializeToString()),))


def _deserialize(handler: Handler, payload: bytes) -> Any:
    deserializer: Any = handler.request_deserializer
    if deserializer is None:
        return payload
    try:
        return deserializer(payload)
    except Exception as error:
        # upb raises DecodeError; a custom deserializer may raise anything, and all of it is about the client's bytes.
        raise InvalidInputError("the message is not a valid protobuf of this method's request type") from error


def _peer(scope: Scope) -> str:
    client = scope.get("client")
    if not client:
        return "unknown"
    host, port = client[0], client[1]
    return f"ipv6:[{host}]:{port}" if ":" in host else f"ipv4:{host}:{port}"
