"""One owned partition: take its messages in order, fold them, write state and offset together."""

import asyncio
import contextlib
import random
import time
from dataclasses import replace

import nats.errors
import nats.js.errors
import structlog
from google.protobuf.message import DecodeError
from nats.aio.client import Client
from nats.js import JetStreamContext
from redis.exceptions import RedisError
from sqlalchemy.exc import SQLAlchemyError

from moe_analyzer.aggregate import POISON, Limits, SessionPart, SessionWrites
from moe_analyzer.feed import EventFeed, FeedBrokenError, StoredMessage
from moe_analyzer.lifecycle import SessionDirectory
from moe_analyzer.live import publish_live
from moe_analyzer.lost import LostRange, add_lost
from moe_analyzer.ownership import Lease
from moe_analyzer.requests import counts_field, decode_counts
from moe_analyzer.store import Applied, FencedError, Store
from moe_analyzer.stream import EventStream, LayoutMismatchError, ensure_dead_letter_stream, ensure_stream
from moe_debugger.errors import WireFormatError
from moe_debugger.v1 import routing_pb2 as pb
from moe_debugger.wire.codec import format_version
from moe_debugger.wire.subjects import (
    DEAD_LETTER_SUBJECT,
    EVENT_STREAM,
    StoredSubject,
    parse_stored_subject,
)

__all__ = ["PartitionContext", "PartitionWorker"]

_log = structlog.get_logger()

_TRANSIENT = (nats.errors.Error, RedisError, SQLAlchemyError, OSError, TimeoutError, FeedBrokenError)
_MIN_BACKOFF_S, _MAX_BACKOFF_S = 0.05, 2.0
# What is folded but not written; at this much a flush comes early.
_MAX_UNFLUSHED_BYTES = 16 << 20
# A session that was silent this long leaves the memory; Redis has it.
_IDLE_SESSION_S = 60.0
_MAX_DEAD_PAYLOAD_BYTES = 900_000
# How often a partition that takes messages looks whether the stream's discard has overtaken it.
_OVERTAKEN_CHECK_S = 2.0


class PartitionContext:
    """What all partitions of a replica share."""

    def __init__(
        self,
        client: Client,
        store: Store,
        directory: SessionDirectory,
        *,
        num_partitions: int,
        stream_max_bytes: int,
        flush_interval_s: float,
        limits: Limits,
    ) -> None:
        self.client = client
        self.js: JetStreamContext = client.jetstream(timeout=5.0)
        self.store = store
        self.directory = directory
        self.num_partitions = num_partitions
        self.stream_max_bytes = stream_max_bytes
        self.flush_interval_s = flush_interval_s
        self.limits = limits

    async def ensure_stream(self) -> EventStream:
        """Return the event stream as it is now, made anew if it is gone."""
        return await ensure_stream(self.js, self.num_partitions, self.stream_max_bytes)


class PartitionWorker:
    """Consumes one partition as long as its lease holds."""

    def __init__(self, context: PartitionContext, lease: Lease) -> None:
        self.lease = lease
        self._context = context
        self._log = _log.bind(partition=lease.partition, epoch=lease.epoch)
        self._feed: EventFeed | None = None
        self._stop = asyncio.Event()
        self._reset()

    def _reset(self) -> None:
        self._parts: dict[tuple[str, str], SessionPart] = {}
        self._used_at: dict[tuple[str, str], float] = {}
        self._dead: list[tuple[str, pb.DeadLetter]] = []
        self._before = self._applied = Applied()
        self._unflushed_bytes = 0
        self._closes: list[tuple[str, int]] = []
        self._reached, self._safe, self._look_at = 0, 0, 0.0

    def connection_lost(self) -> None:
        """Begin again at the applied offset: the consumer may be gone with the connection."""
        if self._feed is not None:
            self._feed.break_off()

    def stop(self) -> None:
        """Write what is pending and end `run`."""
        self._stop.set()
        self.connection_lost()

    async def run(self) -> None:
        """Consume until stopped, or until the lease is lost."""
        backoff_s = _MIN_BACKOFF_S
        while not self._stop.is_set():
            began = time.monotonic()
            try:
                await self._consume()
            except FencedError as error:
                self._log.warning("partition_fenced", reason=str(error))
                return
            except LayoutMismatchError:
                raise
            except _TRANSIENT as error:
                if time.monotonic() - began > 10 * _MAX_BACKOFF_S:
                    backoff_s = _MIN_BACKOFF_S
                if not self._stop.is_set():
                    self._log.info("partition_retries", reason=f"{type(error).__name__}: {error}", backoff_s=backoff_s)
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(backoff_s * random.uniform(0.5, 1.0)):  # noqa: S311
                            await self._stop.wait()
                    backoff_s = min(2 * backoff_s, _MAX_BACKOFF_S)

    async def _consume(self) -> None:
        self._reset()
        if not self._context.client.is_connected:
            raise FeedBrokenError("NATS is not connected")
        stream = await self._context.ensure_stream()
        self._before = self._applied = await self._context.store.load_applied(self.lease.partition)
        start = await self._start_sequence(stream)
        if self._applied != self._before:
            # At once: this partition may get no message for long, or never.
            await self._flush()
        # Up to `_reached` no message is left to take; up to `_safe` that was so when the stream was last looked at.
        self._reached = self._safe = start - 1
        self._look_at = 0.0
        async with EventFeed(self._context.client, self._context.js, self.lease.partition, start) as feed:
            self._feed = feed
            flush_at: float | None = None
            try:
                while not self._stop.is_set():
                    look_at = self._look_at if self._reached > self._safe else None
                    wake_at = min((at for at in (flush_at, look_at) if at is not None), default=None)
                    message = await feed.next(None if wake_at is None else max(0.0, wake_at - time.monotonic()))
                    if message is not None:
                        await self._take(message, stream)
                    elif feed.checked_sequence > max(self._applied.checked, self._applied.sequence):
                        self._check_off(feed.checked_sequence, stream)
                    if look_at is not None and time.monotonic() >= look_at:
                        await self._look_whether_overtaken(stream)
                    if flush_at is None and self._applied != self._before:
                        flush_at = time.monotonic() + self._context.flush_interval_s
                    if flush_at is not None and (
                        time.monotonic() >= flush_at or self._unflushed_bytes > _MAX_UNFLUSHED_BYTES
                    ):
                        await self._flush()
                        flush_at = None
            except FeedBrokenError:
                # What was folded came in order and without a gap, so it can be written.
                if self._applied != self._before:
                    await self._flush()
                if not self._stop.is_set():
                    raise
            finally:
                self._feed = None

    async def _start_sequence(self, stream: EventStream) -> int:
        """Return where to begin. Beginning too early is harmless: sources' watermarks drop what was counted."""
        applied = self._applied
        if not applied.is_empty and applied.stream != stream.identity:
            # What the old stream held and nobody counted is unknown here; the sources' own sequences tell.
            self._log.warning("stream_was_recreated", before=applied.stream, now=stream.identity)
            applied = Applied(lost=applied.lost)
        # A broker that crashed and lost its tail may give what it had checked out again.
        known = max(applied.sequence, applied.checked if applied.checked <= stream.last_sequence else 0)
        if known + 1 < stream.first_sequence:
            self._lose(stream, known + 1, stream.first_sequence - 1, applied)
            return stream.first_sequence
        if applied.is_empty or applied.sequence < stream.first_sequence:
            return stream.first_sequence
        if not await self._still_has(applied, stream):
            self._log.warning("stream_lost_its_tail", applied=applied.sequence, last=stream.last_sequence)
            return stream.first_sequence
        return applied.sequence + 1

    async def _look_whether_overtaken(self, stream: EventStream) -> None:
        """Note what the stream discarded in front of a consumer that is slower than the sources.

        The broker goes on at what is left, without a gap in what it sends. But where the stream still begins at or
        before the place that this partition had reached at the last look, all that came since came whole.
        """
        self._look_at = time.monotonic() + _OVERTAKEN_CHECK_S
        try:
            now = await self._context.ensure_stream()
        except (nats.errors.Error, TimeoutError):
            return  # the next look spans this time, too
        if now.identity != stream.identity:
            raise FeedBrokenError(f"partition {self.lease.partition}: the stream was made anew")
        reached = self._reached
        if self._safe + 1 < now.first_sequence:
            self._log.warning("stream_overtook", safe=self._safe, first=now.first_sequence)
            gone = LostRange(stream.identity, self._safe + 1, now.first_sequence - 1, 0, time.time_ns())
            self._applied = replace(self._applied, lost=add_lost(self._applied.lost, gone))
            # What lies before the stream's begin now is noted, whether it came or not.
            reached = max(reached, now.first_sequence - 1)
        self._safe = reached

    def _check_off(self, sequence: int, stream: EventStream) -> None:
        """Note that no message of this partition is left up to `sequence`, so its discard loses nothing here."""
        self._reached = max(self._reached, sequence)
        if self._applied.stream == stream.identity:
            self._applied = replace(self._applied, checked=sequence)
        else:
            self._applied = Applied(0, 0, stream.identity, sequence, self._applied.lost)

    def _lose(self, stream: EventStream, first: int, last: int, applied: Applied) -> None:
        """Note that a range left the stream before this partition came to it, and go on behind it."""
        self._log.warning("stream_gap", first_lost=first, last_lost=last, stream=stream.identity)
        gone = LostRange(stream.identity, first, last, applied.stored_ns, time.time_ns())
        self._applied = Applied(last, 0, stream.identity, last, add_lost(applied.lost, gone))

    async def _still_has(self, applied: Applied, stream: EventStream) -> bool:
        """False where a broker that crashed lost acknowledged messages and gave their sequences out again."""
        if applied.sequence > stream.last_sequence:
            return False
        if applied.sequence < stream.first_sequence or not applied.stored_ns:
            return True
        try:
            message = await self._context.js.get_msg(EVENT_STREAM, seq=applied.sequence)
        except nats.js.errors.NotFoundError:
            return True  # removed by hand
        # The client rounds to microseconds.
        return message.time is None or abs(message.time.timestamp() * 1e9 - applied.stored_ns) < 1e6

    async def _take(self, message: StoredMessage, stream: EventStream) -> None:
        self._unflushed_bytes += len(message.payload)
        try:
            subject = parse_stored_subject(message.subject)
        except WireFormatError as error:
            self._bury(message.subject, message.payload, message.sequence, message.stored_ns, str(error))
        else:
            await self._take_event(message, subject)
        self._reached = message.sequence
        self._applied = Applied(
            message.sequence, message.stored_ns, stream.identity, message.sequence, self._applied.lost
        )

    async def _take_event(self, message: StoredMessage, subject: StoredSubject) -> None:
        part = await self._part(subject)
        self._context.directory.saw(subject.session_id, message.stored_ns)
        sequence = 0
        try:
            try:
                event = pb.SourceMessage.FromString(message.payload)
            except DecodeError as error:
                raise WireFormatError(f"not a SourceMessage: {error}") from error
            if event.source_id != subject.source_id:
                raise WireFormatError(f"source_id {event.source_id[:40]!r} on the subject of {subject.source_id}")
            sequence = event.sequence
            if part.is_duplicate(event.source_id, sequence):
                return
            await self._prepare(part, subject, event)
            part.apply(
                event, message.stored_ns, is_late=self._context.directory.is_late(subject.session_id, message.stored_ns)
            )
        except POISON as error:
            part.reject(subject.source_id, sequence, message.stored_ns)
            self._bury(message.subject, message.payload, message.sequence, message.stored_ns, str(error))
            return
        for _, payload, stored_ns, reason in part.rejected:
            self._bury(message.subject, payload, 0, stored_ns, reason)
        part.rejected.clear()
        kind = event.WhichOneof("payload")
        if kind == "manifest":
            self._context.directory.record_source(subject.tenant, event.manifest)
        elif kind == "goodbye" and event.goodbye.closes_session:
            self._closes.append((subject.session_id, message.stored_ns))

    async def _prepare(self, part: SessionPart, subject: StoredSubject, event: pb.SourceMessage) -> None:
        """Load what the message needs and is not in memory."""
        kind = event.WhichOneof("payload")
        source = part.source(subject.source_id)
        if kind in ("batch", "counts") and source.manifest is None:
            manifest = await self._context.directory.manifest(subject.tenant, subject.session_id, subject.source_id)
            if manifest is not None:
                part.adopt_manifest(source, manifest)
        if kind == "batch" and (names := part.requests.needs_counts(list(event.batch.request_ids))):
            values = await self._context.store.load_rows(
                self.lease.partition, subject.tenant, subject.session_id, [counts_field(name) for name in names]
            )
            for name, value in zip(names, values, strict=True):
                if value is None:
                    raise FencedError(f"partition {self.lease.partition}: the counts of request {name} are gone")
                part.requests.set_counts(name, decode_counts(value))

    async def _part(self, subject: StoredSubject) -> SessionPart:
        key = (subject.tenant, subject.session_id)
        self._used_at[key] = time.monotonic()
        part = self._parts.get(key)
        if part is None:
            await self._context.directory.learn(subject.session_id)
            part = SessionPart(subject.session_id, self._context.limits)
            part.load(*await self._context.store.load_session(self.lease.partition, *key))
            self._parts[key] = part
        return part

    def _bury(self, subject: str, payload: bytes, sequence: int, stored_ns: int, reason: str) -> None:
        self._log.warning("message_dead_lettered", subject=subject, stream_sequence=sequence, reason=reason)
        letter = pb.DeadLetter(
            format_version=format_version(),
            reason=reason,
            subject=subject,
            stream_sequence=sequence,
            payload=payload[:_MAX_DEAD_PAYLOAD_BYTES],
            stored_at_unix_ns=stored_ns,
        )
        self._dead.append((f"{self._applied.stream}-{subject}-{sequence}-{stored_ns}", letter))

    async def _flush(self) -> None:
        # Letters first: a crash between the two writes them again under the same id, which the broker drops.
        if self._dead:
            await ensure_dead_letter_stream(self._context.js)
        for message_id, letter in self._dead:
            await self._context.js.publish(
                DEAD_LETTER_SUBJECT, letter.SerializeToString(), headers={"Nats-Msg-Id": message_id}
            )
        self._dead.clear()
        writes = {key: part.take_writes() for key, part in self._parts.items() if part.is_dirty}
        await self._write(writes)
        self._before = self._applied
        self._unflushed_bytes = 0
        for session_id, stored_ns in self._closes:
            self._context.directory.close_soon(session_id, stored_ns, "the source ended the session")
        self._closes.clear()
        for (tenant, session_id), write in writes.items():
            await publish_live(self._context.client, self.lease.partition, tenant, session_id, write)
        limit = time.monotonic() - _IDLE_SESSION_S
        for key in [key for key, used in self._used_at.items() if used < limit]:
            self._parts.pop(key, None)
            del self._used_at[key]

    async def _write(self, writes: dict[tuple[str, str], SessionWrites]) -> None:
        backoff_s = _MIN_BACKOFF_S
        while True:
            try:
                return await self._context.store.flush(self.lease, self._before, self._applied, writes)
            except (RedisError, OSError, TimeoutError) as error:
                if self._stop.is_set():
                    raise
                self._log.info("flush_retries", reason=f"{type(error).__name__}: {error}", backoff_s=backoff_s)
                await asyncio.sleep(backoff_s)
                backoff_s = min(2 * backoff_s, _MAX_BACKOFF_S)
