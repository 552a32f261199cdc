"""The analyzer's one wiring place: settings -> build -> serve -> drain."""

import asyncio
import contextlib
import functools
import logging
import os
import signal
import socket
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import nats.errors
import structlog
from nats.aio.client import Client
from redis.exceptions import RedisError
from sqlalchemy.exc import SQLAlchemyError

from moe_analyzer.aggregate import Limits
from moe_analyzer.consumer import Consumer
from moe_analyzer.lifecycle import SessionDirectory, answer_open_session
from moe_analyzer.live import publish_news
from moe_analyzer.ownership import Ownership
from moe_analyzer.partition import PartitionContext
from moe_analyzer.queries import Queries
from moe_analyzer.recordings import Recordings
from moe_analyzer.server import AnalyzerServer, AnalyzerService
from moe_analyzer.settings import Settings, load_settings
from moe_analyzer.store import Store, connect_redis
from moe_analyzer.stream import LayoutMismatchError, check_server_version, ensure_dead_letter_stream
from moe_debugger.catalogue import Catalogue, upgrade
from moe_debugger.errors import ConfigError, FleetError, MoEDebuggerError
from moe_debugger.wire.ids import new_id

__all__ = ["main", "run"]

_log = structlog.get_logger()

_EVALUATE_S = 1.0
_RETRY_S = 0.3


def main() -> None:
    """Run one replica until SIGTERM or SIGINT; exit code 2 for wrong settings, 1 where the fleet cannot be used."""
    try:
        settings = load_settings()
    except ConfigError as error:
        print(error, file=sys.stderr)  # noqa: T201 - before there is a log
        sys.exit(2)
    _configure_log(settings.log_level)
    try:
        asyncio.run(run(settings))
    except FleetError as error:
        _log.error("analyzer_cannot_run", error=str(error))
        sys.exit(1)


def _configure_log(level: str) -> None:
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level)),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )


async def run(settings: Settings, *, stop: asyncio.Event | None = None) -> None:
    """Serve until `stop` is set, or a signal comes.

    Raises:
        FleetError: the stream or the server is not made for this program.
    """
    if stop is None:
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
    replica_id = f"{socket.gethostname()}-{os.getpid()}-{new_id()}"
    database_url = settings.database_url.get_secret_value()
    await _until_it_answers("catalogue", lambda: upgrade(database_url), (SQLAlchemyError, OSError), stop)
    redis = connect_redis(settings.redis_url.get_secret_value())
    store, catalogue = Store(redis), Catalogue(database_url)
    consumer: Consumer | None = None
    recordings: Recordings | None = None

    async def lost() -> None:
        if consumer is not None:
            consumer.connection_lost()
        if recordings is not None:
            recordings.connection_lost()

    client = await _connect_nats(settings.nats_url.get_secret_value(), lost, stop)
    try:
        if stop.is_set():
            return
        check_server_version(client)
        directory = SessionDirectory(catalogue, close_after_s=settings.close_after_s)
        queries = Queries(
            store,
            catalogue,
            num_partitions=settings.num_partitions,
            recent_window_s=settings.recent_window_s,
            stale_after_s=settings.stale_after_s,
            thresholds=settings.thresholds,
        )
        ownership = Ownership(redis, replica_id, settings.lease_s)
        context = PartitionContext(
            client,
            store,
            directory,
            num_partitions=settings.num_partitions,
            stream_max_bytes=settings.stream_max_bytes,
            flush_interval_s=settings.flush_interval_s,
            limits=Limits(settings.max_requests, settings.rows_budget_bytes),
        )
        consumer = Consumer(context, ownership, settings.lease_s)
        transient = (nats.errors.Error, OSError, TimeoutError)
        await _until_it_answers("stream", context.ensure_stream, transient, stop)
        await _until_it_answers("stream", lambda: ensure_dead_letter_stream(context.js), transient, stop)
        recordings = Recordings(
            client,
            catalogue,
            replica_id=replica_id,
            root=Path(settings.recordings_dir),
            max_bytes=settings.recording_max_bytes,
            min_free_bytes=settings.recording_min_free_bytes,
            members=lambda: ownership.members,
        )
        service = AnalyzerService(queries, directory, tell=functools.partial(publish_news, client))
        service.recordings = recordings
        server = AnalyzerServer(service, settings.host, settings.port)
        await server.start()
        await answer_open_session(client, catalogue)
        try:
            async with asyncio.TaskGroup() as tasks:
                running = [
                    tasks.create_task(consumer.run(), name="consumer"),
                    tasks.create_task(directory.run(), name="directory"),
                    tasks.create_task(recordings.run(), name="recordings"),
                    tasks.create_task(_evaluate_findings(queries, catalogue, ownership), name="findings"),
                    tasks.create_task(_say_ready(server, consumer), name="ready"),
                ]
                await stop.wait()
                for task in running:
                    task.cancel()
        except* LayoutMismatchError as group:
            raise FleetError(str(group.exceptions[0])) from None
        finally:
            await server.stop()
            await recordings.close()
            await consumer.stop()
        with contextlib.suppress(SQLAlchemyError, OSError):
            await directory.sync()
        _log.info("analyzer_stopped", replica_id=replica_id)
    finally:
        await client.close()
        await redis.aclose()
        await catalogue.close()


async def _say_ready(server: AnalyzerServer, consumer: Consumer) -> None:
    await consumer.first_pass_done.wait()
    await server.set_ready(is_ready=True)
    _log.info("analyzer_ready", port=server.port, partitions=consumer.owned)


async def _until_it_answers(
    what: str, call: Callable[[], Awaitable[object]], errors: tuple[type[Exception], ...], stop: asyncio.Event
) -> None:
    while not stop.is_set():
        try:
            await call()
        except errors as error:
            _log.warning(f"{what}_unavailable", error=f"{type(error).__name__}: {error}")
            await asyncio.sleep(_RETRY_S)
        else:
            return


async def _connect_nats(url: str, on_lost: Callable[[], Awaitable[None]], stop: asyncio.Event) -> Client:
    """Return a connection that, once made, reconnects for ever."""
    client = Client()

    async def log_error(error: Exception) -> None:
        _log.debug("nats_error", error=f"{type(error).__name__}: {error}")

    async def disconnected() -> None:
        _log.warning("nats_disconnected")
        await on_lost()

    async def reconnected() -> None:
        _log.info("nats_reconnected")
        await on_lost()

    async def connect() -> None:
        await client.connect(
            url,
            name="moe-analyzer",
            error_cb=log_error,
            disconnected_cb=disconnected,
            reconnected_cb=reconnected,
            allow_reconnect=True,
            max_reconnect_attempts=-1,
            reconnect_time_wait=_RETRY_S,  # type: ignore[arg-type]  # seconds; fractions are passed to asyncio.sleep
            connect_timeout=2,
            ping_interval=10,
        )

    await _until_it_answers("nats", connect, (nats.errors.Error, OSError, TimeoutError), stop)
    return client


async def _evaluate_findings(queries: Queries, catalogue: Catalogue, ownership: Ownership) -> None:
    """Look at each open session of this replica once a second, watched or not: a finding says since when."""
    seen: dict[str, int] = {}
    while True:
        await asyncio.sleep(_EVALUATE_S)
        try:
            for row in await catalogue.open_sessions():
                if row.last_seen_at_unix_ns != seen.get(row.session_id) and ownership.owns(row.session_id):
                    await queries.evaluate(row.tenant, row.session_id)
                    seen[row.session_id] = row.last_seen_at_unix_ns
        except (RedisError, SQLAlchemyError, OSError, TimeoutError) as error:
            _log.debug("findings_postponed", error=str(error))
        except MoEDebuggerError as error:
            _log.error("findings_failed", error=str(error))


if __name__ == "__main__":
    main()
