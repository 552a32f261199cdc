"""Reads one session's messages from the stream into a recording, from a given place until a given one.

It has a consumer of its own, without acknowledgements: partitions, offsets and aggregates do not know of it. What is
not taken stays in the stream, so a slow disk costs nothing as long as the stream keeps it.
"""

import asyncio
import contextlib
import time

import nats.errors
import structlog
from google.protobuf.message import DecodeError
from nats.aio.client import Client
from nats.js import JetStreamContext
from sqlalchemy.exc import SQLAlchemyError

from moe_analyzer.feed import EventFeed, FeedBrokenError, StoredMessage
from moe_analyzer.lifecycle import CLOSE_GRACE_NS
from moe_analyzer.recording_book import BookStatistics, RecordingBook
from moe_debugger.catalogue import Catalogue, RecordingRow
from moe_debugger.v1 import routing_pb2 as pb
from moe_debugger.wire.subjects import EVENT_STREAM, parse_stored_subject, session_filter, source_filter

__all__ = ["RecordingTask", "row_values", "stream_end"]

_log = structlog.get_logger()

_POLL_S = 0.2
_HEARTBEAT_S = 0.5
_TICK_S = 1.0
# Messages that go to the disk's thread at once.
_MAX_TOGETHER = 64
_MAX_BACKOFF_S = 2.0
_END_ATTEMPTS = 10
_TRANSIENT = (nats.errors.Error, OSError, TimeoutError, FeedBrokenError)


async def stream_end(js: JetStreamContext) -> tuple[str, int, int]:
    """Return the event stream's identity, its first and its last sequence."""
    info = await js.stream_info(EVENT_STREAM)
    return str(info.created), info.state.first_seq, info.state.last_seq


def row_values(statistics: BookStatistics) -> dict[str, int]:
    """Return the catalogue's columns of what a recording holds."""
    return {
        "num_rows": statistics.num_rows,
        "size_bytes": statistics.size_bytes,
        "num_sources": statistics.num_sources,
        "num_missing_messages": statistics.num_missing_messages,
        "num_decisions_dropped": statistics.num_decisions_dropped,
    }


class RecordingTask:
    """One recording that this replica writes.

    Args:
        row: of the catalogue, as it was stored.
        stream: identity of the event stream; position: what was stored after it belongs to the recording.
    """

    def __init__(
        self,
        client: Client,
        js: JetStreamContext,
        catalogue: Catalogue,
        row: RecordingRow,
        book: RecordingBook,
        *,
        stream: str,
        position: int,
    ) -> None:
        self.row = row
        self._client, self._js, self._catalogue, self._book = client, js, catalogue, book
        self._stream, self._position = stream, position
        self._stop_at: int | None = None
        self._closed_at_ns = 0
        self._abort_reason = ""
        self._end_reason = ""
        self._is_over = False
        self._wake = asyncio.Event()
        self._feed: EventFeed | None = None
        # The book takes one call at a time; its calls wait for the disk, so they have a thread.
        self._book_lock = asyncio.Lock()
        self._statistics = BookStatistics()
        self._log = _log.bind(recording_id=row.recording_id, session_id=row.session_id)

    def look_now(self) -> None:
        """Look at once at what the catalogue says."""
        self._wake.set()

    def abort(self, reason: str) -> None:
        """End as soon as can be: this replica stops."""
        self._abort_reason = self._abort_reason or reason
        self._wake.set()
        self.connection_lost()

    def connection_lost(self) -> None:
        """Begin again after the last message that was taken: the consumer may be gone with the connection."""
        if self._feed is not None:
            self._feed.break_off()

    async def run(self) -> None:
        """Record until asked to stop, until the session is closed, or until the disk refuses."""
        heart = asyncio.create_task(self._beat_until_over())
        try:
            await self._consume_to_the_end()
        finally:
            # Not cancelled: it may be in a transaction, or in the book.
            self._is_over = True
            self._wake.set()
            await heart
        await self._finish()

    async def _consume_to_the_end(self) -> None:
        backoff_s = _POLL_S
        while not self._abort_reason:
            try:
                if await self._consume():
                    return
            except _TRANSIENT as error:
                if self._abort_reason:
                    return
                self._log.info("recording_retries", reason=f"{type(error).__name__}: {error}")
                await asyncio.sleep(backoff_s)
                backoff_s = min(2 * backoff_s, _MAX_BACKOFF_S)

    async def _consume(self) -> bool:
        """Take messages; return True at the end."""
        stream, first, _ = await stream_end(self._js)
        if stream != self._stream:
            await self._note("the event stream was made anew: what the old one held after the last row is lost")
            self._stream, self._position, self._stop_at = stream, 0, None
        elif self._position + 1 < first:
            await self._note("the event stream has discarded messages before they were recorded")
        subject = session_filter(self.row.tenant, self.row.session_id)
        async with EventFeed(self._client, self._js, None, self._position + 1, filter_subject=subject) as feed:
            self._feed = feed
            try:
                while not self._abort_reason:
                    messages = await self._next(feed)
                    if messages:
                        await self._take(messages)
                    if self._stop_at is not None and (
                        self._position >= self._stop_at or (not messages and await feed.is_drained())
                    ):
                        return True
            finally:
                self._feed = None
        return False

    async def _next(self, feed: EventFeed) -> list[StoredMessage]:
        """Return the messages that are there, or None of them after a moment."""
        messages: list[StoredMessage] = []
        message = await feed.next(_POLL_S)
        while message is not None:
            messages.append(message)
            message = await feed.next(0.0) if len(messages) < _MAX_TOGETHER else None
        return messages

    async def _take(self, messages: list[StoredMessage]) -> None:
        stop_at = self._stop_at
        wanted = [one for one in messages if stop_at is None or one.sequence <= stop_at]
        if self._closed_at_ns:
            wanted = [one for one in wanted if one.stored_ns <= self._closed_at_ns + CLOSE_GRACE_NS]

        def take() -> list[str]:
            for one in wanted:
                self._book.take(parse_stored_subject(one.subject).source_id, one.payload)
            return self._book.unknown_sources()

        async with self._book_lock:
            unknown = await asyncio.to_thread(take)
        self._position = messages[-1].sequence
        if unknown:
            await self._look_up(unknown)

    async def _look_up(self, unknown: list[str]) -> None:
        """Look for the manifests of sources that were there before the recording."""
        for source_id in unknown:
            manifest = await self._stored_manifest(source_id) or await self._first_message(source_id)
            if manifest is not None:
                async with self._book_lock:
                    await asyncio.to_thread(self._book.add_manifest, source_id, manifest)

    async def _stored_manifest(self, source_id: str) -> pb.SourceManifest | None:
        try:
            data = await self._catalogue.get_manifest(self.row.tenant, self.row.session_id, source_id)
        except (SQLAlchemyError, OSError) as error:
            self._log.warning("recording_asks_for_a_manifest", source_id=source_id, error=str(error))
            return None
        return None if data is None else pb.SourceManifest.FromString(data)

    async def _first_message(self, source_id: str) -> pb.SourceManifest | None:
        """Return the manifest from the stream: the owner of the source's partition may not have come to it."""
        subject = source_filter(self.row.tenant, self.row.session_id, source_id)
        try:
            first = await self._js.get_msg(EVENT_STREAM, seq=1, subject=subject, next=True)
            message = pb.SourceMessage.FromString(first.data or b"")
        except (*_TRANSIENT, DecodeError):
            return None  # asked again; at the end it is said
        return message.manifest if message.WhichOneof("payload") == "manifest" else None

    async def _beat_until_over(self) -> None:
        """Say that the recording goes on, and hear whether it should; also while NATS is away."""
        ticked = time.monotonic()
        while not self._is_over:
            self._wake.clear()
            try:
                await self._beat()
                if time.monotonic() - ticked >= _TICK_S:
                    ticked = time.monotonic()
                    await self._tick()
            except (SQLAlchemyError, *_TRANSIENT) as error:
                self._log.warning("recording_cannot_say_that_it_lives", error=str(error))
            if self._is_over:
                return
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_HEARTBEAT_S):
                    await self._wake.wait()

    async def _tick(self) -> None:
        async with self._book_lock:
            await asyncio.to_thread(self._book.tick)
            unknown = self._book.unknown_sources()
        if unknown:
            await self._look_up(unknown)

    async def _beat(self) -> None:
        async with self._book_lock:
            statistics = await asyncio.to_thread(self._book.statistics)
        values = {"heartbeat_at_unix_ns": time.time_ns(), **row_values(statistics)}
        row = await self._catalogue.recordings.update_running(self.row.recording_id, self.row.owner, **values)
        if row is None:
            self.abort("another replica took this recording for interrupted")
            return
        if statistics.has_failed:
            self.abort("the disk refused")
            return
        if row.stop_at_sequence and self._stop_at is None:
            self._stop_at = row.stop_at_sequence
        if self._stop_at is None:
            await self._look_at_the_session()

    async def _look_at_the_session(self) -> None:
        session = await self._catalogue.get_session(self.row.tenant, self.row.session_id)
        if session is None:
            self.abort("the session was deleted")
        elif session.closed_at_unix_ns:
            self._closed_at_ns = session.closed_at_unix_ns
            # What was stored this soon after the close still counts.
            if time.time_ns() > self._closed_at_ns + CLOSE_GRACE_NS:
                self._end_reason = f"the session was closed: {session.close_reason}"
                self._stop_at = (await stream_end(self._js))[2]

    async def _note(self, text: str) -> None:
        async with self._book_lock:
            self._book.note(text)

    async def _finish(self) -> None:
        """Write what waits and say how it ended."""
        reason = self._abort_reason or self._end_reason
        async with self._book_lock:
            unknown = self._book.unknown_sources()
        if unknown:
            await self._look_up(unknown)
        async with self._book_lock:
            statistics = await asyncio.to_thread(self._book.finish, reason)
        state = "failed" if statistics.has_failed else "interrupted" if self._abort_reason else "finished"
        detail = "; ".join([*([reason] if reason else []), *statistics.problems])
        values = {
            "state": state,
            "ended_at_unix_ns": time.time_ns(),
            "detail": detail[:2000],
            "not_written": statistics.not_written_json(),
            **row_values(statistics),
        }
        for attempt in range(_END_ATTEMPTS):
            try:
                await self._catalogue.recordings.update_running(self.row.recording_id, self.row.owner, **values)
                break
            except (SQLAlchemyError, OSError) as error:
                # Where it never succeeds it is taken for interrupted; its files say that it is whole.
                self._log.warning("recording_end_not_stored", attempt=attempt, error=str(error))
                await asyncio.sleep(_POLL_S)
        self._log.info("recording_ended", state=state, num_rows=statistics.num_rows, size_bytes=statistics.size_bytes)
