"""Publishes one source's columns to JetStream, on its own thread and event loop.

A source's messages carry gap-free sequences: 1 is the manifest, then batches and a status every second, the goodbye
last. A sequence is given when a message is built, after the buffer, so that a dropped batch takes none; once given, the
message is sent until the broker has it, always under the same message id, so that a retry is never counted twice.
"""

import asyncio
import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import urlsplit, urlunsplit

import nats.errors
import structlog
from nats.aio.client import Client as NatsClient
from nats.js import JetStreamContext

from moe_debugger.capture_health import HealthCheck
from moe_debugger.errors import FleetError
from moe_debugger.v1 import control_pb2
from moe_debugger.v1 import routing_pb2 as pb
from moe_debugger.wire.codec import CountsColumns, RoutingColumns, encode_batch, encode_counts, format_version
from moe_debugger.wire.ids import DEFAULT_TENANT, check_tenant, new_id
from moe_debugger.wire.subjects import event_subject, open_session_subject

from .account import Buffer, PublisherStatistics
from .batching import (
    MAX_DECISIONS,
    columns_size_bytes,
    join_and_split,
    join_counts,
    reduce_to_counts,
    split_counts,
)
from .series import SeriesQueue

__all__ = ["Health", "Publisher", "SourceDescription", "redact_url"]

# At decode a step is a few decisions: waiting longer than under load makes one message of several steps.
_LINGER_LOADED_S = 0.010
_LINGER_IDLE_S = 0.100
_LOADED_DECISIONS = 1024
_MAX_UNACKED_MESSAGES = 16
_ACK_TIMEOUT_S = 2.0
_STATUS_INTERVAL_S = 1.0
_MAX_BACKOFF_S = 2.0

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class SourceDescription:
    """What the manifest says about a source."""

    session_name: str
    model_name: str
    model_type: str
    layers: Sequence[pb.LayerDescription]
    level: int = pb.CAPTURE_LEVEL_ROUTES
    sampling_rate: float = 1.0
    step_domain: int = pb.STEP_DOMAIN_SOURCE
    window_steps: int = 64
    kind: str = "library"
    model_fingerprint: str = ""
    model_class_name: str = ""
    coordinates: pb.ParallelCoordinates | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    must_be_new: bool = False


@dataclass(frozen=True, slots=True)
class Health:
    """What the capture says about itself with every status."""

    last_step: int = 0
    hook_time_share: float = 0.0
    is_healthy: bool = True
    problems: tuple[str, ...] = ()
    checks: tuple[HealthCheck, ...] = ()


class Publisher:
    """Publishes the columns of one source; `submit` never waits.

    Args:
        url: NATS URL, with user and password where the server asks for them.
        description: what the manifest says.
        tenant: whose session it is.
        buffer_bytes: bound on what waits for the broker; beyond it whole batches are dropped and counted.
    """

    def __init__(
        self,
        url: str,
        description: SourceDescription,
        *,
        tenant: str = DEFAULT_TENANT,
        buffer_bytes: int = 64 * 1024 * 1024,
    ) -> None:
        self.source_id = new_id()
        self._url = url
        self._description = description
        self._tenant = check_tenant(tenant)
        self._health: Callable[[], Health] = Health
        self._buffer = Buffer(buffer_bytes)
        self._is_counts = description.level == pb.CAPTURE_LEVEL_COUNTS
        self._series: dict[str, float] = {}
        self._points = SeriesQueue()
        self._state: Literal["connecting", "opening_session", "publishing", "refused", "stopped"] = "connecting"
        self._last_error = ""
        self._session_id: str | None = None
        self._is_settled = threading.Event()
        self._sequence = 0
        self._num_messages = 0
        self._num_retries = 0
        self._closes_session = False
        self._reason = ""
        self._stop_timeout_s = 0.0
        self._is_stopping = False
        self._lock = threading.Lock()
        self._loop = asyncio.new_event_loop()
        self._has_items = asyncio.Event()
        self._has_enough = asyncio.Event()
        self._stop_asked = asyncio.Event()
        self._is_connected = asyncio.Event()
        self._unacked: set[asyncio.Task[None]] = set()
        self._slots = asyncio.Semaphore(_MAX_UNACKED_MESSAGES)
        self._client: NatsClient | None = None
        self._jetstream: JetStreamContext | None = None
        self._thread = threading.Thread(target=self._run, name="moe-debugger-publish", daemon=True)

    def set_health_source(self, health: Callable[[], Health]) -> None:
        """Take the health of statuses from `health`, which is called on the publisher's thread."""
        self._health = health

    def start(self) -> None:
        """Start the thread: connect, open the session, publish."""
        self._thread.start()

    @property
    def session_id(self) -> str | None:
        """The session's id, None until an analyzer answered."""
        return self._session_id

    def wait_for_session(self, timeout_s: float) -> str:
        """Return the session's id, waiting for it.

        Raises:
            FleetError: none came in time, or the fleet refused; the text holds the URL without its password.
        """
        self._is_settled.wait(timeout_s)
        if self._session_id is not None:
            return self._session_id
        detail = f": {self._last_error}" if self._last_error else ""
        if self._state == "refused":
            raise FleetError(f"the fleet at {redact_url(self._url)} refused the session{detail}")
        doing = "no connection to NATS" if self._state == "connecting" else "NATS answers, but no analyzer does"
        raise FleetError(
            f"no session from the fleet at {redact_url(self._url)} within {timeout_s:g} s ({doing}{detail}); "
            "check that `moe-debugger up` runs and that the URL is the `nats` value of `moe-debugger up --json`"
        )

    def submit(self, columns: RoutingColumns | CountsColumns) -> bool:
        """Take columns for publishing; return False where they were dropped (and counted).

        At level "counts" rows are reduced to sums here: no row waits in the buffer, and none gets onto the wire.
        """
        if self._is_counts and isinstance(columns, RoutingColumns):
            taken = [self._put(sums) for sums in reduce_to_counts(columns)]
            return all(taken)
        return self._put(columns)

    def _put(self, columns: RoutingColumns | CountsColumns) -> bool:
        num_decisions = columns.num_decisions
        if self._is_stopping or self._state == "refused":
            reason = pb.DROP_REASON_CLOSED if self._is_stopping else pb.DROP_REASON_BROKER_REFUSED
            self._buffer.count_dropped(reason, num_decisions)
            return False
        taken, waiting, num_items = self._buffer.put(columns, num_decisions, columns_size_bytes(columns))
        # One wake-up for the first item and one where a batch is full: not one per forward.
        if taken and num_items == 1:
            self._call(self._has_items.set)
        if taken and waiting >= MAX_DECISIONS:
            self._call(self._has_enough.set)
        return taken

    def count_dropped(self, reason: int, num_decisions: int) -> None:
        """Count decisions that were captured, but dropped before they came here."""
        self._buffer.count_dropped(reason, num_decisions)

    def set_series(self, series: Mapping[str, float]) -> None:
        """Send the newest values of training series with the next status."""
        with self._lock:
            self._series.update(series)

    def add_series_points(self, points: Iterable[pb.SeriesPoint]) -> None:
        """Send points of training series with the next statuses, as far as they fit."""
        self._points.put(points)

    @property
    def num_series_points_waiting(self) -> int:
        """Points of training series that no status has carried away yet."""
        return len(self._points)

    def statistics(self) -> PublisherStatistics:
        """Return the account."""
        return self._buffer.statistics(
            num_messages=self._num_messages,
            num_retries=self._num_retries,
            last_sequence=self._sequence,
            state=self._state,
            last_error=self._last_error,
        )

    def flush(self, timeout_s: float) -> bool:
        """Wait until everything submitted so far is on the broker; return False when the time is up."""
        self._call(self._has_enough.set)
        return self._buffer.wait_until_settled(timeout_s)

    def stop(self, timeout_s: float = 3.0, *, closes_session: bool = False, reason: str = "closed") -> bool:
        """Publish what waits and the goodbye, for at most `timeout_s`; then end. Return whether all was published."""
        if self._is_stopping:
            self._thread.join(timeout_s + 2)
            return False
        self._stop_timeout_s, self._closes_session, self._reason = timeout_s, closes_session, reason
        self._is_stopping = True
        if self._thread.ident is None:  # never started, so nobody else closes its loop
            self._loop.close()
        if not self._thread.is_alive():
            return False
        self._call(self._stop_asked.set)
        self._thread.join(timeout_s + 2)
        return self._state == "stopped" and not self._buffer.counters().dropped

    def _call(self, callback: Callable[[], None]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nothing waits for this any more
            self._loop.call_soon_threadsafe(callback)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._main())
        except Exception as error:  # noqa: BLE001 - the thread's edge: the model goes on, the account says why
            self._last_error = f"{type(error).__name__}: {error}"
            _log.error("publisher_failed", source_id=self.source_id, error=self._last_error)
        finally:
            self._buffer.drop_rest(pb.DROP_REASON_CLOSED)
            self._state = "refused" if self._state == "refused" else "stopped"
            self._is_stopping = True
            self._is_settled.set()
            with contextlib.suppress(Exception):
                self._loop.run_until_complete(_end_tasks())
                self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            self._loop.close()

    async def _main(self) -> None:
        work = asyncio.ensure_future(self._work())
        asked = asyncio.ensure_future(self._stop_asked.wait())
        try:
            await asyncio.wait({work, asked}, return_when=asyncio.FIRST_COMPLETED)
            if not asked.done() and work.exception() is None:
                await asked
            # Wake the batch loop, which ends once the buffer is empty.
            self._has_items.set()
            self._has_enough.set()
            await asyncio.wait({work}, timeout=self._stop_timeout_s)
            if work.done() and (error := work.exception()) is not None:
                raise error
        finally:
            leftovers = [work, asked, *self._unacked]
            for task in leftovers:
                task.cancel()
            await asyncio.gather(*leftovers, return_exceptions=True)
            if self._client is not None:
                with contextlib.suppress(Exception):
                    async with asyncio.timeout(1.0):
                        await self._client.close()

    async def _work(self) -> None:
        await self._connect()
        self._state = "opening_session"
        if not await self._open_session():
            self._is_settled.set()
            self._buffer.drop_rest(pb.DROP_REASON_BROKER_REFUSED)
            return
        await self._publish(self._message(manifest=self._manifest()))
        self._state = "publishing"
        status = asyncio.ensure_future(self._send_statuses())
        try:
            await self._send_batches()
        finally:
            status.cancel()
            await asyncio.gather(status, return_exceptions=True)
        if self._unacked:
            await asyncio.wait(self._unacked)
        # What the capture says at its end: a source that lived a second or less has sent no other.
        await self._publish(self._message(status=self._status()))
        while not self._points.is_empty:
            await self._publish(self._message(status=self._status()))
        goodbye = pb.SourceGoodbye(
            counters=self._buffer.counters(), closes_session=self._closes_session, reason=self._reason
        )
        await self._publish(self._message(goodbye=goodbye))

    async def _connect(self) -> None:
        async def on_error(error: Exception) -> None:
            self._last_error = _error_text(error)

        async def on_disconnected() -> None:
            self._is_connected.clear()
            if not self._is_stopping:
                _log.warning("nats_disconnected", source_id=self.source_id)

        async def on_reconnected() -> None:
            self._is_connected.set()
            _log.info("nats_reconnected", source_id=self.source_id)

        options: dict[str, Any] = {
            "name": f"moe-debugger-source-{self.source_id}",
            "error_cb": on_error,
            "disconnected_cb": on_disconnected,
            "reconnected_cb": on_reconnected,
            "max_reconnect_attempts": -1,
            "reconnect_time_wait": 0.25,
            "connect_timeout": 2,
        }
        backoff_s = 0.1
        while True:
            # Ours before it connects: a stop in the middle of it has something to close.
            self._client = NatsClient()
            try:
                await self._client.connect(self._url, **options)
                break
            except (OSError, nats.errors.Error) as error:
                self._last_error = _error_text(error)
                await asyncio.sleep(backoff_s)
                backoff_s = min(_MAX_BACKOFF_S, backoff_s * 2)
        self._last_error = ""
        self._is_connected.set()
        self._jetstream = self._client.jetstream()

    async def _open_session(self) -> bool:
        assert self._client is not None
        request = control_pb2.OpenSessionRequest(
            format_version=format_version(),
            name=self._description.session_name,
            model_name=self._description.model_name,
            model_type=self._description.model_type,
            must_be_new=self._description.must_be_new,
        )
        backoff_s = 0.1
        while True:
            try:
                reply = await self._client.request(
                    open_session_subject(self._tenant), request.SerializeToString(), timeout=_ACK_TIMEOUT_S
                )
                response = control_pb2.OpenSessionResponse.FromString(reply.data)
                if response.error:
                    self._last_error = response.error
                    self._state = "refused"
                    _log.error("session_refused", source_id=self.source_id, error=response.error)
                    return False
                # Checks the id: a subject must never be built from what is none.
                event_subject(self._tenant, response.session_id, self.source_id)
                self._session_id = response.session_id
                self._last_error = ""
                self._is_settled.set()
                _log.info("session_opened", session_id=self._session_id, source_id=self.source_id)
                return True
            except (TimeoutError, OSError, nats.errors.Error) as error:
                self._last_error = _error_text(error)
                await asyncio.sleep(backoff_s)
                backoff_s = min(_MAX_BACKOFF_S, backoff_s * 2)

    async def _send_batches(self) -> None:
        was_loaded = False
        while True:
            await self._has_items.wait()
            self._has_items.clear()
            if not self._stop_asked.is_set():
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_LINGER_LOADED_S if was_loaded else _LINGER_IDLE_S):
                        await self._has_enough.wait()
            self._has_enough.clear()
            sent = 0
            while not self._buffer.is_empty:
                # A slot first: what waits for the broker stays in the buffer, where it is joined into larger batches.
                await self._slots.acquire()
                items, num_decisions, size_bytes = self._buffer.take(MAX_DECISIONS)
                sent += num_decisions
                try:
                    messages = self._batch_messages(items)
                except Exception as error:  # noqa: BLE001 - one bad batch is counted, not the end of all others
                    self._last_error = f"encoding failed: {type(error).__name__}: {error}"
                    self._buffer.count_dropped(pb.DROP_REASON_ENCODE_FAILED, num_decisions, is_produced=True)
                    messages = []
                self._slots.release()
                await self._start_sending(messages, size_bytes)
            was_loaded = sent >= _LOADED_DECISIONS
            if self._stop_asked.is_set() and self._buffer.is_empty:
                return

    def _batch_messages(self, items: Sequence[RoutingColumns | CountsColumns]) -> list[tuple[pb.SourceMessage, int]]:
        """Build the messages of `items` without sequences, with the decisions that each holds."""
        rows = [item for item in items if isinstance(item, RoutingColumns)]
        sums = [item for item in items if isinstance(item, CountsColumns)]
        return [
            *((pb.SourceMessage(batch=encode_batch(part)), part.num_decisions) for part in join_and_split(rows)),
            *(
                (pb.SourceMessage(counts=encode_counts(part)), part.num_decisions)
                for joined in join_counts(sums)
                for part in split_counts(joined)
            ),
        ]

    async def _start_sending(self, messages: list[tuple[pb.SourceMessage, int]], size_bytes: int) -> None:
        if not messages:
            self._buffer.release(size_bytes)
        for place, (message, num_decisions) in enumerate(messages):
            await self._slots.acquire()
            # The bytes are given back with the last message of these items.
            released = size_bytes if place == len(messages) - 1 else 0
            payload = message.WhichOneof("payload")
            getattr(message, payload or "batch").counters.CopyFrom(self._buffer.counters())
            self._stamp(message)
            task = asyncio.ensure_future(self._send(message, num_decisions, released))
            self._unacked.add(task)
            task.add_done_callback(self._unacked.discard)

    async def _send(self, message: pb.SourceMessage, num_decisions: int, released_bytes: int) -> None:
        try:
            await self._publish(message)
            self._buffer.acknowledge(num_decisions)
            self._buffer.release(released_bytes)
        finally:
            self._slots.release()

    async def _send_statuses(self) -> None:
        while True:
            # A status in the air is finished even where this loop is ended: its sequence must not become a gap.
            task = asyncio.ensure_future(self._publish(self._message(status=self._status())))
            self._unacked.add(task)
            task.add_done_callback(self._unacked.discard)
            await asyncio.shield(task)
            await asyncio.sleep(_STATUS_INTERVAL_S)

    def _status(self) -> pb.SourceStatus:
        health = self._health()
        statistics = self.statistics()
        with self._lock:
            series = dict(self._series)
        return pb.SourceStatus(
            counters=self._buffer.counters(),
            last_step=health.last_step,
            buffer_used_bytes=statistics.buffer_used_bytes,
            buffer_limit_bytes=statistics.buffer_limit_bytes,
            hook_time_share=health.hook_time_share,
            is_healthy=health.is_healthy,
            problems=health.problems,
            series=series,
            series_points=self._points.take(),
            num_series_points_dropped=self._points.num_dropped,
            checks=[check.to_proto() for check in health.checks],
        )

    def _message(
        self,
        *,
        manifest: pb.SourceManifest | None = None,
        status: pb.SourceStatus | None = None,
        goodbye: pb.SourceGoodbye | None = None,
    ) -> pb.SourceMessage:
        message = pb.SourceMessage(manifest=manifest, status=status, goodbye=goodbye)
        self._stamp(message)
        return message

    def _stamp(self, message: pb.SourceMessage) -> None:
        self._sequence += 1
        message.format_version.CopyFrom(format_version())
        message.source_id = self.source_id
        message.sequence = self._sequence

    async def _publish(self, message: pb.SourceMessage) -> None:
        """Send a message until the broker has stored it."""
        assert self._jetstream is not None
        assert self._session_id is not None
        subject = event_subject(self._tenant, self._session_id, self.source_id)
        headers = {"Nats-Msg-Id": f"{self.source_id}-{message.sequence}"}
        message.sent_at_unix_ns = time.time_ns()
        data = message.SerializeToString()
        backoff_s = 0.05
        while True:
            await self._is_connected.wait()
            try:
                await self._jetstream.publish(subject, data, timeout=_ACK_TIMEOUT_S, headers=headers)
            except (TimeoutError, OSError, nats.errors.Error) as error:
                self._num_retries += 1
                self._last_error = _error_text(error)
                await asyncio.sleep(backoff_s)
                backoff_s = min(_MAX_BACKOFF_S, backoff_s * 2)
            else:
                self._num_messages += 1
                self._last_error = ""
                return

    def _manifest(self) -> pb.SourceManifest:
        description = self._description
        return pb.SourceManifest(
            format_version=format_version(),
            source_id=self.source_id,
            session_id=self._session_id or "",
            model_name=description.model_name,
            model_type=description.model_type,
            model_fingerprint=description.model_fingerprint,
            model_class_name=description.model_class_name,
            layers=description.layers,
            coordinates=description.coordinates or pb.ParallelCoordinates(world_size=1),
            level=pb.CaptureLevel.ValueType(description.level),
            sampling_rate=description.sampling_rate,
            step_domain=pb.StepDomain.ValueType(description.step_domain),
            window_steps=description.window_steps,
            versions=dict(description.versions),
            host_name=socket.gethostname(),
            process_id=os.getpid(),
            started_at_unix_ns=time.time_ns(),
            kind=description.kind,
        )


def redact_url(url: str) -> str:
    """Return `url` without user and password."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit((parts.scheme, host, parts.path, "", ""))


async def _end_tasks() -> None:
    """End what the NATS client left: its `close` cancels its tasks and does not wait for them."""
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks, timeout=1.0)


def _error_text(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
