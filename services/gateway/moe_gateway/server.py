"""The gateway's wiring: every object is made here, once, and both ports are opened, served and drained here."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Iterator
from importlib.util import find_spec
from typing import Any

import grpc
import structlog
import uvicorn
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio  # pyright: ignore[reportAttributeAccessIssue]

from moe_debugger.errors import FleetError
from moe_debugger.v1 import gateway_pb2, gateway_pb2_grpc
from moe_gateway.analyzer_client import CHANNEL_OPTIONS, AnalyzerClient
from moe_gateway.components import ComponentMonitor, Probe, ProbeError, probe_analyzer, probe_worker, redis_probe
from moe_gateway.grpc_web import GrpcWebApp, MethodRegistry
from moe_gateway.interceptors import ErrorInterceptor, PermissionInterceptor
from moe_gateway.nats_link import NatsLink
from moe_gateway.push_door import PushDoor
from moe_gateway.service import DebuggerService, WorkerClient
from moe_gateway.settings import GatewaySettings
from moe_gateway.watch import Listeners, WatchService
from moe_gateway.web import StaticFiles, WebApp

__all__ = ["Gateway", "PortTakenError", "run_gateway"]

log = structlog.get_logger(__name__)

SERVICE_NAME: str = gateway_pb2.DESCRIPTOR.services_by_name["DebuggerService"].full_name
# Streams end by themselves as soon as the drain begins; these bound what does not.
_GRPC_GRACE_S = 0.5
_WEB_GRACE_S = 1
_MAX_CONNECTIONS = 1024


class PortTakenError(FleetError):
    """A port of the settings is in use."""


class Gateway:
    """A running gateway.

    Attributes:
        web_port, grpc_port: the ports that are really bound.
    """

    def __init__(self, settings: GatewaySettings, stack: contextlib.AsyncExitStack) -> None:
        self._settings = settings
        self._stack = stack
        self._health_listeners = Listeners()
        self.web_port = 0
        self.grpc_port = 0

    async def start(self) -> None:
        """Open both ports.

        Raises:
            PortTakenError: a port is in use; the text names it.
        """
        settings, stack = self._settings, self._stack
        web_socket = stack.enter_context(_bound_socket(settings.host, settings.web_port))
        self.web_port = int(web_socket.getsockname()[1])

        self.link = NatsLink(settings.nats_url.get_secret_value(), self._on_nats_change)
        self.analyzer = AnalyzerClient(settings.analyzer_target, settings.tenant, settings.analyzer_timeout_s)
        stack.push_async_callback(self.analyzer.close)
        worker = await self._open_worker()
        self.monitor = ComponentMonitor(
            await self._probes(worker), settings.probe_interval_s, self._health_listeners.notify
        )
        self.watches = WatchService(
            self.analyzer,
            self.link,
            self.monitor,
            self._health_listeners,
            tenant=settings.tenant,
            max_hz=settings.max_watch_hz,
            max_watches=settings.max_watches,
        )
        self.push_door = PushDoor(settings)
        stack.push_async_callback(self.push_door.drain)
        service = DebuggerService(
            settings,
            self.analyzer,
            self.watches,
            self.monitor,
            worker,
            self.push_door,
            lambda: self.monitor.probe_now("worker"),
        )
        interceptors = (ErrorInterceptor(), PermissionInterceptor())
        await self._start_grpc(service, interceptors)
        for work in (self.link.run(), self.monitor.run(), self.watches.run(), self.push_door.run()):
            await stack.enter_async_context(_background(work))
        await self._start_web(service, interceptors, web_socket)
        log.info("gateway_ready", host=settings.host, web_port=self.web_port, grpc_port=self.grpc_port)

    async def drain(self) -> None:
        """Say that the gateway is going, and end all Watch streams; closing the stack does the rest."""
        log.info("gateway_draining", num_watches=self.watches.num_watches)
        await self._health.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
        await self._health.set(SERVICE_NAME, health_pb2.HealthCheckResponse.NOT_SERVING)
        self.watches.stop()

    async def _open_worker(self) -> WorkerClient | None:
        if not self._settings.worker_target:
            return None
        channel = grpc.aio.insecure_channel(self._settings.worker_target, options=CHANNEL_OPTIONS)
        self._stack.push_async_callback(channel.close)
        return WorkerClient(self._settings.worker_target, self._settings.fleet_token.get_secret_value(), channel)

    async def _probes(self, worker: WorkerClient | None) -> dict[str, Probe]:
        async def probe_nats() -> None:
            if not self.link.is_up:
                reason = f" ({self.link.last_error})" if self.link.last_error else ""
                raise ProbeError(
                    f"NATS is not connected{reason}; counts are polled once a second, and sources keep what they "
                    "capture in their buffers until it is back"
                )

        probes: dict[str, Probe] = {"nats": probe_nats}
        redis_url = self._settings.redis_url.get_secret_value()
        if redis_url:
            probes["redis"] = await self._stack.enter_async_context(redis_probe(redis_url))
        probes["analyzer"] = lambda: probe_analyzer(self.analyzer.channel, self.analyzer.target)
        if worker is not None:
            probes["worker"] = lambda: probe_worker(worker.stub, worker.target, worker.metadata)
        return probes

    def _on_nats_change(self) -> None:
        self.monitor.probe_now("nats")

    async def _start_grpc(self, service: DebuggerService, interceptors: tuple[grpc.aio.ServerInterceptor, ...]) -> None:
        settings = self._settings
        server = grpc.aio.server(
            interceptors=interceptors,
            options=(
                ("grpc.max_receive_message_length", settings.max_request_bytes),
                ("grpc.max_metadata_size", 16 * 1024),
                ("grpc.max_concurrent_streams", 1000),
                # Without this a second gateway would share the port in silence.
                ("grpc.so_reuseport", 0),
            ),
        )
        gateway_pb2_grpc.add_DebuggerServiceServicer_to_server(service, server)
        self._health = health_aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        if find_spec("grpc_reflection") is not None:
            from grpc_reflection.v1alpha import reflection

            names = (SERVICE_NAME, "grpc.health.v1.Health", reflection.SERVICE_NAME)
            reflection.enable_server_reflection(names, server)
        # grpc's own message for a taken port names neither the port nor the remedy.
        with _bound_socket(settings.host, settings.grpc_port) as probe:
            address = probe.getsockname()
        host = f"[{address[0]}]" if ":" in address[0] else address[0]
        try:
            self.grpc_port = server.add_insecure_port(f"{host}:{settings.grpc_port}")
        except RuntimeError:
            raise _port_taken(settings.host, settings.grpc_port) from None
        await server.start()
        self._stack.push_async_callback(server.stop, _GRPC_GRACE_S)
        await self._health.set("", health_pb2.HealthCheckResponse.SERVING)
        await self._health.set(SERVICE_NAME, health_pb2.HealthCheckResponse.SERVING)

    async def _start_web(
        self,
        service: DebuggerService,
        interceptors: tuple[grpc.aio.ServerInterceptor, ...],
        web_socket: socket.socket,
    ) -> None:
        registry: Any = MethodRegistry()
        gateway_pb2_grpc.add_DebuggerServiceServicer_to_server(service, registry)
        app = WebApp(
            GrpcWebApp(registry.methods, interceptors, max_message_bytes=self._settings.max_request_bytes),
            StaticFiles(self._settings.static_dir),
            self.monitor,
            self.web_port,
        )
        config = uvicorn.Config(
            app,
            http="httptools",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            limit_concurrency=_MAX_CONNECTIONS,
            timeout_graceful_shutdown=_WEB_GRACE_S,
        )
        await self._stack.enter_async_context(_serving(_QuietServer(config), web_socket))


class _QuietServer(uvicorn.Server):
    """uvicorn without its signal handlers: the process has its own, which drain both ports."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@contextlib.asynccontextmanager
async def _serving(server: uvicorn.Server, web_socket: socket.socket) -> AsyncIterator[None]:
    task = asyncio.get_running_loop().create_task(server.serve(sockets=[web_socket]))
    try:
        # uvicorn has a flag for this, no event.
        while not server.started and not task.done():  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        if task.done():
            task.result()
            raise FleetError("the web server ended at once; its log says why")
        yield
    finally:
        server.should_exit = True
        await task


@contextlib.asynccontextmanager
async def _background(work: Any) -> AsyncIterator[None]:
    task: asyncio.Task[None] = asyncio.get_running_loop().create_task(work)
    task.add_done_callback(_note_fault)
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def _note_fault(task: "asyncio.Task[None]") -> None:
    if not task.cancelled() and (fault := task.exception()) is not None:
        log.error("background_task_failed", exc_info=fault)


@contextlib.contextmanager
def _bound_socket(host: str, port: int) -> Iterator[socket.socket]:
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind, protocol) as bound:
        # A port in TIME_WAIT after a restart is free; one with a listener stays taken.
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            bound.bind(address)
            bound.listen(1)
        except OSError as error:
            raise _port_taken(host, port, error.strerror or str(error)) from None
        yield bound


def _port_taken(host: str, port: int, reason: str = "Address already in use") -> PortTakenError:
    return PortTakenError(
        f"port {port} on {host} cannot be bound ({reason}); end the program that has it, or set MOE_GATEWAY_WEB_PORT "
        "or MOE_GATEWAY_GRPC_PORT to another one"
    )


@contextlib.asynccontextmanager
async def run_gateway(settings: GatewaySettings) -> AsyncIterator[Gateway]:
    """Run a gateway for the time of the block, and drain it at the end.

    Raises:
        PortTakenError: a port is in use.
    """
    async with contextlib.AsyncExitStack() as stack:
        gateway = Gateway(settings, stack)
        await gateway.start()
        try:
            yield gateway
        finally:
            await gateway.drain()
