"""`python -m moe_collector`: settings, then the front on loopback, then Ray Serve behind it, then drain.

Exit codes: 0 after SIGTERM, SIGINT or SIGHUP; 2 for wrong settings; 1 where the worker could not start, or where its
Ray cluster died: whoever supervises this process starts it anew.
"""

import asyncio
import concurrent.futures
import contextlib
import os
import secrets
import shutil
import signal
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog
from pydantic import SecretStr

from moe_debugger.errors import ConfigError, FleetError

from ._guard import TEMP_DIR_VARIABLE, run_guarded
from ._logging import configure_logging
from ._processes import adopt_orphans, kill_descendants
from ._temp_dir import make_temp_dir
from .settings import CollectorSettings

if TYPE_CHECKING:
    from .deployment import RayServe
    from .front import Front

__all__ = ["main"]

_BIND_DEADLINE_S = 8.0
_PROBE_INTERVAL_S = 1.0
_PROBE_TIMEOUT_S = 3.0
# Together they stay under 8 s, what a supervisor waits for before it kills.
_DRAIN_GRACE_S = 1.0
_DRAIN_TIMEOUT_S = 3.0
_STOP_TIMEOUT_S = 3.0

_log = structlog.get_logger(__name__)


def main() -> None:
    """Run the worker until a signal or a failure; exits the process."""
    try:
        settings = _complete(CollectorSettings.from_environment())
        temp_dir = os.environ.get(TEMP_DIR_VARIABLE) or make_temp_dir(settings.ray_temp_dir)
    except ConfigError as error:
        print(error, file=sys.stderr)  # noqa: T201 - the answer to whoever started this by hand
        raise SystemExit(2) from None
    if TEMP_DIR_VARIABLE not in os.environ:
        # grpc's fork handlers would only write to stderr each time that Ray starts a process.
        os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
        raise SystemExit(run_guarded([sys.executable, "-m", "moe_collector"], Path(temp_dir)))
    configure_logging(settings.log_level)
    adopt_orphans()
    code = asyncio.run(_serve(settings, Path(temp_dir)))
    # Ray leaves threads that would keep the interpreter waiting; everything of ours is closed by now.
    sys.stderr.flush()
    os._exit(code)


def _complete(settings: CollectorSettings) -> CollectorSettings:
    """Return the settings with a token and an ingress port where none were given."""
    update: dict[str, object] = {}
    if not settings.fleet_token.get_secret_value():
        update["fleet_token"] = SecretStr(secrets.token_urlsafe(32))
    if not settings.ingress_port:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            update["ingress_port"] = probe.getsockname()[1]
    return settings.model_copy(update=update)


async def _serve(settings: CollectorSettings, temp_dir: Path) -> int:
    from .deployment import RayServe
    from .front import Front

    stopping = asyncio.Event()
    _listen_for_stop(stopping)
    front = Front(
        settings.host,
        settings.port,
        ingress=f"127.0.0.1:{settings.ingress_port}",
        token=settings.fleet_token.get_secret_value(),
    )
    try:
        # A worker that was here before may need a moment to let go of the port.
        await front.start(deadline_s=_BIND_DEADLINE_S)
    except OSError as error:
        _log.error("front_failed", error=str(error))
        return 1
    _log.info("front_started", address=f"{settings.host}:{front.port}", pid=os.getpid())
    # One thread for all that Ray does, alive to the end: Ray's processes die with the thread that started them.
    ray_thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="ray")
    cluster = RayServe(settings, temp_dir)
    started = asyncio.get_running_loop().run_in_executor(ray_thread, cluster.start)
    try:
        return await _run(front, cluster, ray_thread, started, stopping)
    finally:
        await _stop(front, cluster, ray_thread, started)
        # The process above us does so too, but it may have been killed.
        await asyncio.to_thread(shutil.rmtree, temp_dir, ignore_errors=True)


def _listen_for_stop(stopping: asyncio.Event) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        loop.add_signal_handler(number, stopping.set)


async def _run(
    front: "Front",
    cluster: "RayServe",
    ray_thread: concurrent.futures.Executor,
    started: "asyncio.Future[None]",
    stopping: asyncio.Event,
) -> int:
    stop = asyncio.create_task(stopping.wait())
    waited: list[asyncio.Future[Any]] = [started, stop]
    await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
    if started.done():
        try:
            started.result()
        except FleetError as error:
            _log.error("start_failed", error=str(error))
            return 1
        # Again, in place of Ray's handler, which writes a stack trace at each SIGTERM.
        _listen_for_stop(stopping)
    loop = asyncio.get_running_loop()
    while not stopping.is_set():
        await front.probe(_PROBE_TIMEOUT_S)
        if not await loop.run_in_executor(ray_thread, cluster.is_cluster_alive):
            _log.error("ray_cluster_died", remedy="this worker ends, so that its supervisor starts a new one")
            return 1
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(stop), _PROBE_INTERVAL_S if front.is_ready else 0.2)
    _log.info("stopping")
    return 0


async def _stop(
    front: "Front",
    cluster: "RayServe",
    ray_thread: concurrent.futures.ThreadPoolExecutor,
    started: "asyncio.Future[None]",
) -> None:
    loop = asyncio.get_running_loop()
    await front.refuse()
    # A start that is under way is not waited for: its processes are killed below.
    if started.done() and started.exception() is None:
        await _within(
            _DRAIN_TIMEOUT_S + 0.5,
            loop.run_in_executor(ray_thread, cluster.drain, _DRAIN_GRACE_S, _DRAIN_TIMEOUT_S),
        )
        await front.stop(0.2)
        await _within(_STOP_TIMEOUT_S, loop.run_in_executor(ray_thread, cluster.stop))
    else:
        await front.stop(0)
    num_killed = await asyncio.to_thread(kill_descendants, 0.3)
    if num_killed:
        _log.info("processes_killed", num_processes=num_killed)


async def _within(timeout_s: float, work: "asyncio.Future[None]") -> None:
    try:
        await asyncio.wait_for(work, timeout_s)
    except TimeoutError:
        _log.warning("stop_step_timed_out", timeout_s=timeout_s)


if __name__ == "__main__":
    main()
