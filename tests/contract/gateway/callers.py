"""Four clients of the same API behind one interface: native grpcio, our own minimal gRPC-Web in both modes, connectrpc.

The gRPC-Web client is written against the protocol's text, with sockets, and shares no code with the gateway.
"""

import asyncio
import base64
import contextlib
import gzip
import struct
import urllib.parse
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any, Protocol

import grpc
from connectrpc.client import ConnectClient
from connectrpc.code import Code
from connectrpc.compat import google_protobuf_binary_codec
from connectrpc.errors import ConnectError
from connectrpc.method import IdempotencyLevel, MethodInfo, StreamType
from connectrpc.protocol import ProtocolType
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from moe_debugger.v1 import gateway_pb2 as pb
from moe_debugger.v1 import gateway_pb2_grpc

SERVICE = "moe_debugger.v1.DebuggerService"
TRANSPORTS = ("native", "web-binary", "web-text", "connectrpc")
_METHODS = pb.DESCRIPTOR.services_by_name["DebuggerService"].methods_by_name


class CallError(Exception):
    """A status other than OK, as a client sees it."""

    def __init__(self, code: int, message: str, reasons: list[str]) -> None:
        self.code, self.message, self.reasons = code, message, reasons
        super().__init__(f"{code} {message} {reasons}")


class Caller(Protocol):
    async def unary(self, method: str, request: Any, timeout_s: float | None = None) -> Any: ...

    def stream(self, method: str, request: Any, timeout_s: float | None = None) -> AsyncGenerator[Any, None]: ...


def response_class(method: str) -> Any:
    """Return the message class of a method's response."""
    return getattr(pb, _METHODS[method].output_type.name)


def _reasons(status: status_pb2.Status) -> list[str]:
    reasons = []
    for detail in status.details:
        info = error_details_pb2.ErrorInfo()
        if detail.Unpack(info):
            reasons.append(info.reason)
    return reasons


class NativeCaller:
    def __init__(self, port: int) -> None:
        self._channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=(("grpc.enable_http_proxy", 0),))
        self._stub: Any = gateway_pb2_grpc.DebuggerServiceStub(self._channel)

    async def unary(self, method: str, request: Any, timeout_s: float | None = None) -> Any:
        with _native_errors():
            return await getattr(self._stub, method)(request, timeout=timeout_s)

    async def stream(self, method: str, request: Any, timeout_s: float | None = None) -> AsyncGenerator[Any, None]:
        call = getattr(self._stub, method)(request, timeout=timeout_s)
        try:
            with _native_errors():
                async for response in call:
                    yield response
        finally:
            call.cancel()

    async def close(self) -> None:
        await self._channel.close()


@contextlib.contextmanager
def _native_errors() -> Any:
    try:
        yield
    except grpc.aio.AioRpcError as error:
        call: Any = error
        status = rpc_status.from_call(call)
        raise CallError(error.code().value[0], error.details() or "", _reasons(status) if status else []) from None


class HttpResponse:
    """Status, headers and a body that is read as it comes."""

    def __init__(self, status: int, headers: dict[str, str], reader: asyncio.StreamReader) -> None:
        self.status, self.headers, self._reader = status, headers, reader

    async def chunks(self) -> AsyncIterator[bytes]:
        if self.headers.get("transfer-encoding") == "chunked":
            while size := int((await self._reader.readline()).strip() or b"0", 16):
                yield await self._reader.readexactly(size)
                await self._reader.readexactly(2)
            await self._reader.readline()
        elif "content-length" in self.headers:
            yield await self._reader.readexactly(int(self.headers["content-length"]))
        else:
            yield await self._reader.read()

    async def body(self) -> bytes:
        return b"".join([chunk async for chunk in self.chunks()])


@contextlib.asynccontextmanager
async def http(
    port: int, method: str, path: str, headers: dict[str, str] | list[tuple[str, str]] | None = None, body: bytes = b""
) -> AsyncIterator[HttpResponse]:
    """Send one HTTP/1.1 request on a connection of its own; leaving the block closes it."""
    fields = list(headers.items() if isinstance(headers, dict) else headers or [])
    names = {name.lower() for name, _ in fields}
    if "host" not in names:
        fields.append(("host", f"127.0.0.1:{port}"))
    if "transfer-encoding" not in names and "content-length" not in names and method == "POST":
        fields.append(("content-length", str(len(body))))
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 24)
    try:
        head = f"{method} {path} HTTP/1.1\r\n" + "".join(f"{name}: {value}\r\n" for name, value in fields) + "\r\n"
        writer.write(head.encode("latin-1") + body)
        status = int((await reader.readline()).split()[1])
        got: dict[str, str] = {}
        while (line := (await reader.readline()).strip()) != b"":
            name, _, value = line.decode("latin-1").partition(":")
            got[name.lower()] = value.strip()
        yield HttpResponse(status, got, reader)
    finally:
        writer.close()


def frame(message: bytes, *, compressed: bool = False) -> bytes:
    """Return a message's frame."""
    payload = gzip.compress(message) if compressed else message
    return struct.pack(">BI", int(compressed), len(payload)) + payload


class WebCaller:
    """gRPC-Web, binary or text."""

    def __init__(self, port: int, *, is_text: bool = False, compressed: bool = False) -> None:
        self.port, self.is_text, self.compressed = port, is_text, compressed
        self.headers: dict[str, str] = {}

    async def unary(self, method: str, request: Any, timeout_s: float | None = None) -> Any:
        responses = [response async for response in self.stream(method, request, timeout_s)]
        assert len(responses) == 1
        return responses[0]

    async def stream(self, method: str, request: Any, timeout_s: float | None = None) -> AsyncGenerator[Any, None]:
        body = frame(request.SerializeToString(), compressed=self.compressed)
        response_type = response_class(method)
        async for payload in self.raw(f"/{SERVICE}/{method}", body, timeout_s):
            yield response_type.FromString(payload)

    async def raw(self, path: str, body: bytes, timeout_s: float | None = None) -> AsyncGenerator[bytes, None]:
        """Send bytes, yield messages' bytes, raise `CallError` on a status other than OK."""
        kind = "application/grpc-web-text" if self.is_text else "application/grpc-web+proto"
        headers = {"content-type": kind, "x-grpc-web": "1", **self.headers}
        if self.compressed:
            headers["grpc-encoding"] = "gzip"
        if timeout_s is not None:
            headers["grpc-timeout"] = f"{int(timeout_s * 1000)}m"
        async with http(self.port, "POST", path, headers, base64.b64encode(body) if self.is_text else body) as response:
            assert response.status == 200, (response.status, await response.body())
            assert response.headers["content-type"] == kind
            if "grpc-status" in response.headers:
                assert await response.body() == b""
                _raise_status(response.headers)
                return
            pending = bytearray()
            async for chunk in response.chunks():
                # Each flush is decodable by itself, else a browser could not show a stream as it comes.
                pending += base64.b64decode(chunk, validate=True) if self.is_text else chunk
                while len(pending) >= 5:
                    flag, size = struct.unpack_from(">BI", pending)
                    if len(pending) < 5 + size:
                        break
                    payload = bytes(pending[5 : 5 + size])
                    del pending[: 5 + size]
                    if flag == 0x80:
                        lines = payload.decode("ascii").split("\r\n")
                        pairs = (line.partition(":") for line in lines if line)
                        _raise_status({name.strip(): value.strip() for name, _, value in pairs})
                        assert not pending
                        return
                    assert flag == 0
                    yield payload
            raise AssertionError("the stream ended without trailers")


def _raise_status(fields: dict[str, str]) -> None:
    code = int(fields["grpc-status"])
    if code:
        details = fields.get("grpc-status-details-bin", "")
        status = status_pb2.Status.FromString(base64.b64decode(details + "=" * (-len(details) % 4)))
        raise CallError(code, urllib.parse.unquote(fields.get("grpc-message", "")), _reasons(status))


def _code_number(code: Code) -> int:
    return int(next(number.value[0] for number in grpc.StatusCode if _NAMES.get(number.name, number.name) == code.name))


# The one status whose spelling differs.
_NAMES = {"CANCELLED": "CANCELED"}


class ConnectCaller:
    """connectrpc's client in its gRPC-Web protocol, an implementation by others. It gzips its requests."""

    def __init__(self, port: int) -> None:
        codec: Any = google_protobuf_binary_codec()
        self._client = ConnectClient(f"http://127.0.0.1:{port}", protocol=ProtocolType.GRPC_WEB, codec=codec)

    def _method(self, name: str) -> MethodInfo[Any, Any]:
        kind = StreamType.SERVER_STREAM if name in ("Watch", "Generate") else StreamType.UNARY
        return MethodInfo(
            name=name,
            service_name=SERVICE,
            input=getattr(pb, _METHODS[name].input_type.name),
            output=response_class(name),
            idempotency_level=IdempotencyLevel.UNKNOWN,
            stream_type=kind,
        )

    async def unary(self, method: str, request: Any, timeout_s: float | None = None) -> Any:
        try:
            return await self._client.execute_unary(
                request=request, method=self._method(method), timeout_ms=int(timeout_s * 1000) if timeout_s else None
            )
        except ConnectError as error:
            raise self._error(error) from None

    async def stream(self, method: str, request: Any, timeout_s: float | None = None) -> AsyncGenerator[Any, None]:
        timeout_ms = int(timeout_s * 1000) if timeout_s else None
        responses: Any = self._client.execute_server_stream(
            request=request, method=self._method(method), timeout_ms=timeout_ms
        )
        try:
            async with contextlib.aclosing(responses) as stream:
                async for response in stream:
                    yield response
        except ConnectError as error:
            raise self._error(error) from None

    def _error(self, error: ConnectError) -> CallError:
        reasons = []
        for detail in error.details:
            info = error_details_pb2.ErrorInfo()
            if detail._any.type_url.endswith("/google.rpc.ErrorInfo"):
                info.ParseFromString(detail._any.value)
                reasons.append(info.reason)
        return CallError(_code_number(error.code), error.message, reasons)

    async def close(self) -> None:
        await self._client.close()
