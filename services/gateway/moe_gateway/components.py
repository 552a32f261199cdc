"""Health of the fleet's other parts, probed in the background so that asking for it costs nothing."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, RedisError

from moe_debugger.v1 import collector_pb2, collector_pb2_grpc
from moe_debugger.v1 import gateway_pb2 as pb

__all__ = ["ComponentMonitor", "ProbeError", "probe_analyzer", "probe_worker", "redis_probe"]

log = structlog.get_logger(__name__)

PROBE_TIMEOUT_S = 1.0


class ProbeError(Exception):
    """A part does not answer as it should; the text says what and what happens next."""


Probe = Callable[[], Awaitable[None]]


class ComponentMonitor:
    """Probes each part again and again, and remembers the newest answer.

    Args:
        probes: by component name, in the order in which they are shown. A probe returns or raises `ProbeError`.
        on_change: called whenever any part's health changed.
    """

    def __init__(self, probes: dict[str, Probe], interval_s: float, on_change: Callable[[], None]) -> None:
        self._probes = probes
        self._interval_s = interval_s
        self._on_change = on_change
        self._kicks = {name: asyncio.Event() for name in probes}
        starting = pb.COMPONENT_STATE_STARTING
        self._health = {name: pb.ComponentHealth(name=name, state=starting, detail="not probed yet") for name in probes}
        self._was_ready: set[str] = set()
        self.version = 1

    def components(self) -> list[pb.ComponentHealth]:
        """Return the health of all parts."""
        return list(self._health.values())

    def is_starting(self, name: str) -> bool:
        """Return whether a part has not answered since the gateway started."""
        return name in self._health and self._health[name].state == pb.COMPONENT_STATE_STARTING

    def probe_now(self, name: str) -> None:
        """Probe a part at once: a call to it has failed, or its connection changed."""
        if name in self._kicks:
            self._kicks[name].set()

    async def run(self) -> None:
        """Probe until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for name in self._probes:
                tasks.create_task(self._probe_forever(name))

    async def _probe_forever(self, name: str) -> None:
        while True:
            self._kicks[name].clear()
            try:
                async with asyncio.timeout(2 * PROBE_TIMEOUT_S):
                    await self._probes[name]()
            except ProbeError as error:
                self._set(name, str(error))
            except TimeoutError:
                self._set(name, f"{name} does not answer its health check within {2 * PROBE_TIMEOUT_S:g} s")
            else:
                self._set(name, "")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._interval_s):
                    await self._kicks[name].wait()

    def _set(self, name: str, detail: str) -> None:
        if not detail:
            self._was_ready.add(name)
            state = pb.COMPONENT_STATE_READY
        else:
            # A part that never answered is still coming up: Ray alone takes half a minute.
            state = pb.COMPONENT_STATE_DOWN if name in self._was_ready else pb.COMPONENT_STATE_STARTING
        health = pb.ComponentHealth(name=name, state=state, detail=detail)
        if health != self._health[name]:
            if state != self._health[name].state:
                log.info("component_changed", component=name, state=pb.ComponentState.Name(state), detail=detail)
            self._health[name] = health
            self.version += 1
            self._on_change()


async def probe_analyzer(channel: grpc.aio.Channel, target: str) -> None:
    """Ask an analyzer's health service."""
    # The stubs of grpcio-health-checking know no method of it.
    stub: Any = health_pb2_grpc.HealthStub(channel)
    advice = "captured data is kept in the stream meanwhile"
    try:
        response = await stub.Check(health_pb2.HealthCheckRequest(), timeout=PROBE_TIMEOUT_S)
    except grpc.aio.AioRpcError as error:
        if error.code() is grpc.StatusCode.UNIMPLEMENTED:
            return
        raise ProbeError(f"the analyzer at {target} does not answer ({error.code().name}); {advice}") from None
    if response.status != health_pb2.HealthCheckResponse.SERVING:
        raise ProbeError(f"the analyzer at {target} is not serving yet; {advice}")


async def probe_worker(
    stub: "collector_pb2_grpc.WorkerServiceAsyncStub", target: str, metadata: tuple[tuple[str, str], ...]
) -> None:
    """Ask the worker about itself."""
    try:
        await stub.GetWorkerInfo(collector_pb2.GetWorkerInfoRequest(), timeout=PROBE_TIMEOUT_S, metadata=metadata)
    except grpc.aio.AioRpcError as error:
        if error.code() is grpc.StatusCode.UNAUTHENTICATED:
            raise ProbeError(f"the worker at {target} refused the gateway's fleet token") from None
        raise ProbeError(
            f"the worker at {target} does not answer ({error.code().name}); nothing can be generated until it is back"
        ) from None


@contextlib.asynccontextmanager
async def redis_probe(url: str) -> AsyncIterator[Probe]:
    """Open a Redis client of one connection and give a probe that pings it."""
    # redis-py by default tries ten times with five seconds each, which a health check must not.
    client = Redis.from_url(
        url,
        max_connections=1,
        socket_timeout=PROBE_TIMEOUT_S,
        socket_connect_timeout=PROBE_TIMEOUT_S,
        retry=Retry(NoBackoff(), 0),
    )

    async def probe() -> None:
        try:
            await client.ping()
        except AuthenticationError:
            raise ProbeError("Redis refused the gateway's password; check MOE_GATEWAY_REDIS_URL") from None
        except (RedisError, OSError) as error:
            await client.connection_pool.disconnect()
            raise ProbeError(
                f"Redis does not answer ({type(error).__name__}); live numbers stand still until it is back"
            ) from None

    try:
        yield probe
    finally:
        with contextlib.suppress(RedisError, OSError):
            await client.aclose()
