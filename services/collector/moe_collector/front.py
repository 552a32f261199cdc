"""The worker's gRPC port on loopback: it adds the fleet token and forwards to Ray Serve's ingress.

It answers from the first moment on, while Ray still starts, and in the gaps when a replica is being replaced: then with
UNAVAILABLE and the reason. Messages pass through as bytes, unread.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from moe_debugger.v1 import collector_pb2 as pb

from ._token import AUTHORIZATION, bearer
from .deployment import APPLICATION
from .server import MODEL_FAILED

__all__ = ["SERVICE", "STARTING", "Front"]

SERVICE = "moe_debugger.v1.WorkerService"
STARTING = "the worker is starting; try again in a few seconds"
RESTARTING = "the worker's replica is being restarted; try again in a few seconds"
REPLICA_DIED = "the worker's replica died during this call and is being restarted; send the request again"
STOPPING = "the worker is stopping; send the request again when it is back"
# Room for the pieces of a prompt at its longest setting (1 MiB of one-byte tokens).
_MESSAGE_OPTIONS = [("grpc.max_receive_message_length", 64 << 20), ("grpc.max_send_message_length", 64 << 20)]
_MISSED_PROBES = 2

_log = structlog.get_logger(__name__)

Context = grpc.aio.ServicerContext[bytes, bytes]


class Front:
    """A grpc.aio server for `WorkerService` and grpc's health service.

    Args:
        host: a loopback address.
        port: 0 takes a free one, see `port` after `start`.
        ingress: host:port of Ray Serve's gRPC ingress.
        token: the fleet token that the ingress asks for.
    """

    def __init__(self, host: str, port: int, *, ingress: str, token: str) -> None:
        self._host = host
        self.port = port
        self._metadata = ((AUTHORIZATION, bearer(token)), ("application", APPLICATION))
        channel = grpc.aio.insecure_channel(
            ingress,
            options=[
                *_MESSAGE_OPTIONS,
                # A proxy that comes back is found within a second, not after grpc's usual two minutes of backoff.
                ("grpc.max_reconnect_backoff_ms", 1000),
                ("grpc.initial_reconnect_backoff_ms", 200),
                ("grpc.enable_http_proxy", 0),
            ],
        )
        self._channel = channel
        self._forward_generate: grpc.aio.UnaryStreamMultiCallable[bytes, bytes]
        self._forward_generate = channel.unary_stream(f"/{SERVICE}/Generate")
        self._forward_info: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes]
        self._forward_info = channel.unary_unary(f"/{SERVICE}/GetWorkerInfo")
        self._unavailable: str | None = STARTING
        self._missed = 0
        self._server: grpc.aio.Server | None = None
        self._health = health.aio.HealthServicer()  # pyright: ignore[reportAttributeAccessIssue]

    @property
    def is_ready(self) -> bool:
        """Whether calls are forwarded."""
        return self._unavailable is None

    async def start(self, *, deadline_s: float = 0.0) -> None:
        """Bind the port and answer; a port that is taken is tried again for `deadline_s`.

        Raises:
            OSError: the port is taken.
        """
        give_up_at = time.monotonic() + deadline_s
        while True:
            try:
                return await self._start()
            except OSError:
                if time.monotonic() >= give_up_at:
                    raise
            await asyncio.sleep(0.2)

    async def _start(self) -> None:
        # Without SO_REUSEPORT a second worker on this port is an error, not a silent share of the calls.
        server = grpc.aio.server(options=[*_MESSAGE_OPTIONS, ("grpc.so_reuseport", 0)])
        handlers: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {
            "Generate": grpc.unary_stream_rpc_method_handler(self._generate),
            "GetWorkerInfo": grpc.unary_unary_rpc_method_handler(self._get_worker_info),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        host = f"[{self._host}]" if ":" in self._host else self._host
        try:
            self.port = server.add_insecure_port(f"{host}:{self.port}")
        except RuntimeError as error:
            raise OSError(f"{host}:{self.port} cannot be bound, another program may listen there: {error}") from None
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        await server.start()
        self._server = server

    async def stop(self, grace_s: float) -> None:
        """Refuse new calls, and cut those that still run after `grace_s`."""
        self._unavailable = STOPPING
        await self._health.enter_graceful_shutdown()
        if self._server is not None:
            await self._server.stop(grace_s)
        await self._channel.close()

    async def refuse(self) -> None:
        """Refuse new calls for good; those that run go on."""
        self._unavailable = STOPPING
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)

    async def probe(self, timeout_s: float) -> None:
        """Ask the replica once whether it answers, and set what callers are told."""
        if self._unavailable == STOPPING:
            return
        request = pb.GetWorkerInfoRequest().SerializeToString()
        try:
            await self._forward_info(request, timeout=timeout_s, metadata=self._metadata)
        except grpc.aio.AioRpcError as error:
            self._missed += 1
            _log.debug("probe_failed", code=error.code().name, details=(error.details() or "")[:300])
            # One slow answer on a loaded machine is not a dead replica.
            if self._missed >= _MISSED_PROBES or error.code() != grpc.StatusCode.DEADLINE_EXCEEDED:
                await self._mark_unavailable(error)
            return
        self._missed = 0
        if self._unavailable not in (None, STOPPING):
            self._unavailable = None
            _log.info("worker_ready", address=f"{self._host}:{self.port}")
            await self._set_health(health_pb2.HealthCheckResponse.SERVING)

    async def _mark_unavailable(self, error: grpc.aio.AioRpcError) -> None:
        if self._unavailable is None:
            self._unavailable = RESTARTING
            _log.warning("worker_unavailable", code=error.code().name, details=(error.details() or "")[:300])
            await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)

    async def _set_health(self, status: Any) -> None:
        for service in ("", SERVICE):
            await self._health.set(service, status)

    async def _generate(self, request: bytes, context: Context) -> AsyncIterator[bytes]:
        await self._check_available(context)
        call = self._forward_generate(request, timeout=context.time_remaining(), metadata=self._metadata)
        try:
            async for response in call:
                yield response
        except grpc.aio.AioRpcError as error:
            await self._pass_on(error, context)
        finally:
            # Where our caller is gone, the request has to leave the batch.
            call.cancel()

    async def _get_worker_info(self, request: bytes, context: Context) -> bytes:
        await self._check_available(context)
        try:
            response = await self._forward_info(request, timeout=context.time_remaining(), metadata=self._metadata)
        except grpc.aio.AioRpcError as error:
            await self._pass_on(error, context)
            raise  # abort has raised already
        return response

    async def _check_available(self, context: Context) -> None:
        if self._unavailable is not None:
            await context.abort(grpc.StatusCode.UNAVAILABLE, self._unavailable)

    async def _pass_on(self, error: grpc.aio.AioRpcError, context: Context) -> None:
        code, details = error.code(), error.details() or ""
        if self._unavailable == STOPPING and code != grpc.StatusCode.INVALID_ARGUMENT:
            await context.abort(grpc.StatusCode.UNAVAILABLE, STOPPING)
        if _is_loss(code, details):
            _log.warning("replica_lost", code=code.name, details=details[:300])
            await self._mark_unavailable(error)
            await context.abort(grpc.StatusCode.UNAVAILABLE, REPLICA_DIED)
        await context.abort(code, details, _trailing(error))


def _is_loss(code: grpc.StatusCode, details: str) -> bool:
    """Return whether an error says that the replica, its proxy or the way to them is gone.

    The worker's own UNAVAILABLE (it is stopping) is told to callers as it is.
    """
    if code == grpc.StatusCode.INTERNAL:
        return not details.startswith(MODEL_FAILED)
    if code == grpc.StatusCode.UNAVAILABLE:
        return not details.startswith("the worker ")
    # Ray Serve's proxy is up but does not know the application (yet).
    return code == grpc.StatusCode.NOT_FOUND


def _trailing(error: grpc.aio.AioRpcError) -> Sequence[tuple[str, str | bytes]]:
    metadata = error.trailing_metadata() or ()
    with contextlib.suppress(TypeError):
        return tuple((key, value) for key, value in metadata if not key.startswith("grpc-"))
    return ()
