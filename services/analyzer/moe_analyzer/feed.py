"""One partition's messages in the stream's order, from a given sequence.

An ephemeral push consumer without acknowledgements: the server sends a message when there is one and a heartbeat
when there is none, so an idle partition costs next to nothing. Flow control is answered only after everything before
it was taken, which bounds what waits here. The broker's consumer sequence has no gaps, so anything that was lost on
the way is noticed and the feed ends: its owner makes a new one from the offset that it has applied.
"""

import asyncio
import contextlib
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import nats.errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.js import JetStreamContext, api

from moe_debugger.errors import FleetError
from moe_debugger.wire.subjects import EVENT_STREAM, partition_filter

__all__ = ["EventFeed", "FeedBrokenError", "StoredMessage"]

_HEARTBEAT_S = 5.0
_SILENCE_S = 2.5 * _HEARTBEAT_S
# The server forgets the consumer of a replica that is gone.
_INACTIVE_S = 30.0


class FeedBrokenError(FleetError):
    """Messages may have been lost between the broker and us; begin again at the applied offset."""


@dataclass(frozen=True, slots=True)
class StoredMessage:
    """A message of the stream.

    Attributes:
        stored_ns: the broker's time of storing, the one clock of all roll-ups.
        num_pending: messages of this partition after this one.
    """

    subject: str
    payload: bytes
    sequence: int
    stored_ns: int
    num_pending: int


class EventFeed:
    """Async context manager around one consumer; `next` gives its messages.

    Args:
        partition: whose messages; None where `filter_subject` says which.
        start_sequence: of the stream.
    """

    def __init__(
        self,
        client: Client,
        js: JetStreamContext,
        partition: int | None,
        start_sequence: int,
        *,
        filter_subject: str | None = None,
    ) -> None:
        self._client, self._js = client, js
        self._what = filter_subject if partition is None else f"partition {partition}"
        self._filter = filter_subject or partition_filter(partition or 0)
        self._start = start_sequence
        self._queue: asyncio.Queue[Msg | None] = asyncio.Queue()
        self._subscription: Subscription | None = None
        self._consumer: str | None = None
        self._consumer_sequence = 0
        # Up to here the broker has looked for messages of this partition, and all that it found were taken.
        self.checked_sequence = 0

    async def __aenter__(self) -> Self:
        inbox = self._client.new_inbox()
        self._subscription = await self._client.subscribe(inbox, cb=self._take)
        try:
            info = await self._js.add_consumer(
                EVENT_STREAM,
                api.ConsumerConfig(
                    deliver_subject=inbox,
                    deliver_policy=api.DeliverPolicy.BY_START_SEQUENCE,
                    opt_start_seq=max(1, self._start),
                    filter_subject=self._filter,
                    ack_policy=api.AckPolicy.NONE,
                    max_deliver=1,
                    flow_control=True,
                    idle_heartbeat=_HEARTBEAT_S,
                    inactive_threshold=_INACTIVE_S,
                    mem_storage=True,
                    num_replicas=1,
                ),
            )
        except BaseException:
            await self._unsubscribe()
            raise
        self._consumer = info.name
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._unsubscribe()
        if self._consumer is not None and self._client.is_connected:
            with contextlib.suppress(nats.errors.Error, TimeoutError, asyncio.TimeoutError):
                await self._js.delete_consumer(EVENT_STREAM, self._consumer)

    async def _unsubscribe(self) -> None:
        if self._subscription is not None:
            with contextlib.suppress(nats.errors.Error):
                await self._subscription.unsubscribe()
            self._subscription = None

    async def _take(self, message: Msg) -> None:
        self._queue.put_nowait(message)

    def break_off(self) -> None:
        """End the feed: the connection was lost, so the consumer may be gone."""
        self._queue.put_nowait(None)

    async def is_drained(self) -> bool:
        """Ask the broker whether every message that it has stored until now was taken.

        Raises:
            FeedBrokenError: the consumer is gone.
        """
        if self._consumer is None:
            raise FeedBrokenError(f"{self._what}: the feed is not open")
        try:
            info = await self._js.consumer_info(EVENT_STREAM, self._consumer)
        except nats.errors.Error as error:
            raise FeedBrokenError(f"{self._what}: the consumer cannot be asked: {error}") from error
        delivered = info.delivered.consumer_seq if info.delivered is not None else 0
        return not info.num_pending and delivered == self._consumer_sequence

    async def next(self, timeout_s: float | None) -> StoredMessage | None:
        """Return the next message; None after `timeout_s` without one, or where `checked_sequence` has grown.

        Raises:
            FeedBrokenError: a message was lost, or the consumer is silent.
        """
        loop = asyncio.get_running_loop()
        deadline = None if timeout_s is None else loop.time() + timeout_s
        while True:
            try:
                message = self._queue.get_nowait()
            except asyncio.QueueEmpty:
                wait_s = _SILENCE_S if deadline is None else min(_SILENCE_S, max(0.0, deadline - loop.time()))
                try:
                    async with asyncio.timeout(wait_s):
                        message = await self._queue.get()
                except TimeoutError:
                    if deadline is not None and loop.time() >= deadline:
                        return None
                    raise FeedBrokenError(f"{self._what}: neither message nor heartbeat for {_SILENCE_S} s") from None
            if message is None:
                raise FeedBrokenError(f"{self._what}: the connection to NATS was lost")
            status = (message.headers or {}).get("Status")
            if status is None:
                return self._read(message)
            before = self.checked_sequence
            await self._answer(message, status)
            if self.checked_sequence > before:
                return None

    async def _answer(self, message: Msg, status: str) -> None:
        headers = message.headers or {}
        if status != "100":
            raise FeedBrokenError(f"{self._what}: consumer ended: {status} {headers.get('Description')}")
        if message.reply:
            await self._client.publish(message.reply)
        elif stalled := headers.get("Nats-Consumer-Stalled"):
            await self._client.publish(stalled)
        last = headers.get("Nats-Last-Consumer")
        if last is not None and int(last) != self._consumer_sequence:
            raise FeedBrokenError(f"{self._what}: message {last} was sent, {self._consumer_sequence} came")
        if (checked := headers.get("Nats-Last-Stream")) is not None:
            # Past the last message that was sent: the broker skipped those of other partitions.
            self.checked_sequence = max(self.checked_sequence, int(checked))

    def _read(self, message: Msg) -> StoredMessage:
        # $JS.ACK.<stream>.<consumer>.<delivered>.<stream seq>.<consumer seq>.<time ns>.<pending>, in newer servers with
        # domain and account hash after $JS.ACK. Read from the end that both have in common by their length.
        tokens = message.reply.split(".")
        if len(tokens) > 9:
            tokens = [*tokens[:2], *tokens[4:]]
        sequence, consumer_sequence, stored_ns, num_pending = (int(token) for token in tokens[5:9])
        if consumer_sequence != self._consumer_sequence + 1:
            raise FeedBrokenError(
                f"{self._what}: consumer sequence {consumer_sequence} after {self._consumer_sequence}"
            )
        self._consumer_sequence = consumer_sequence
        return StoredMessage(message.subject, message.data, sequence, stored_ns, num_pending)
