"""Where every captured decision went, and the bounded buffer that decides it."""

import threading
from collections import deque
from dataclasses import dataclass, field

from moe_debugger.v1 import routing_pb2 as pb
from moe_debugger.wire.codec import CountsColumns, RoutingColumns

__all__ = ["Buffer", "PublisherStatistics"]


@dataclass(frozen=True, slots=True)
class PublisherStatistics:
    """A snapshot of a publisher; decision counts satisfy produced = published + dropped + in flight.

    Attributes:
        num_dropped: decisions dropped, by reason in lower case ("buffer_full", "sampled_out", "closed"...).
        state: "connecting", "opening_session", "publishing", "refused" or "stopped".
        last_error: the newest problem with the broker; empty where there is none.
    """

    num_produced: int = 0
    num_published: int = 0
    num_dropped: dict[str, int] = field(default_factory=dict)
    num_in_flight: int = 0
    buffer_used_bytes: int = 0
    buffer_limit_bytes: int = 0
    buffer_peak_bytes: int = 0
    num_messages: int = 0
    num_retries: int = 0
    last_sequence: int = 0
    state: str = "connecting"
    last_error: str = ""


@dataclass(slots=True)
class _Item:
    columns: RoutingColumns | CountsColumns
    num_decisions: int
    size_bytes: int


class Buffer:
    """A bounded queue of columns with the source's account; thread-safe, never waits.

    The bytes of an item count until the broker has acknowledged it.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self._lock = threading.Condition()
        self._items: deque[_Item] = deque()
        self._used_bytes = 0
        self._queued_decisions = 0
        self._peak_bytes = 0
        self._num_produced = 0
        self._num_published = 0
        self._dropped: dict[int, int] = {}

    def put(
        self, columns: RoutingColumns | CountsColumns, num_decisions: int, size_bytes: int
    ) -> tuple[bool, int, int]:
        """Take an item, or drop and count it where it does not fit.

        Returns:
            Whether it was taken, the decisions that wait now, and the items that wait now.
        """
        with self._lock:
            self._num_produced += num_decisions
            if self._used_bytes + size_bytes > self.limit_bytes:
                self._drop(pb.DROP_REASON_BUFFER_FULL, num_decisions)
                return False, self._queued_decisions, len(self._items)
            self._items.append(_Item(columns, num_decisions, size_bytes))
            self._used_bytes += size_bytes
            self._peak_bytes = max(self._peak_bytes, self._used_bytes)
            self._queued_decisions += num_decisions
            return True, self._queued_decisions, len(self._items)

    def take(self, max_decisions: int) -> tuple[list[RoutingColumns | CountsColumns], int, int]:
        """Return waiting items of at most about `max_decisions`, with their decisions and bytes."""
        with self._lock:
            taken: list[_Item] = []
            num_decisions = 0
            while self._items and (not taken or num_decisions + self._items[0].num_decisions <= max_decisions):
                item = self._items.popleft()
                taken.append(item)
                num_decisions += item.num_decisions
            self._queued_decisions -= num_decisions
            return [item.columns for item in taken], num_decisions, sum(item.size_bytes for item in taken)

    def acknowledge(self, num_decisions: int) -> None:
        """Count decisions as published."""
        with self._lock:
            self._num_published += num_decisions
            self._lock.notify_all()

    def release(self, size_bytes: int) -> None:
        """Give back the bytes of what is on the broker, or was dropped."""
        with self._lock:
            self._used_bytes -= size_bytes

    def count_dropped(self, reason: int, num_decisions: int, *, is_produced: bool = False) -> None:
        """Count a drop; `is_produced` says that it was counted as produced before."""
        if num_decisions <= 0:
            return
        with self._lock:
            if not is_produced:
                self._num_produced += num_decisions
            self._drop(reason, num_decisions)

    def drop_rest(self, reason: int) -> None:
        """Drop and count all that is not published yet."""
        with self._lock:
            self._items.clear()
            self._queued_decisions = 0
            self._used_bytes = 0
            self._drop(reason, self._in_flight())

    def wait_until_settled(self, timeout_s: float) -> bool:
        """Wait until nothing is in flight; return False when the time is up."""
        with self._lock:
            return self._lock.wait_for(lambda: self._in_flight() == 0, timeout_s)

    @property
    def is_empty(self) -> bool:
        """True where nothing waits."""
        with self._lock:
            return not self._items

    def counters(self) -> pb.SourceCounters:
        """Return the account as it goes on the wire."""
        with self._lock:
            return pb.SourceCounters(
                num_produced=self._num_produced,
                num_published=self._num_published,
                dropped=[
                    pb.DropCounter(reason=pb.DropReason.ValueType(reason), num_decisions=number)
                    for reason, number in sorted(self._dropped.items())
                ],
                num_in_flight=self._in_flight(),
            )

    def statistics(
        self, *, num_messages: int, num_retries: int, last_sequence: int, state: str, last_error: str
    ) -> PublisherStatistics:
        """Return the account and what the publisher adds to it."""
        with self._lock:
            return PublisherStatistics(
                num_produced=self._num_produced,
                num_published=self._num_published,
                num_dropped={reason_name(reason): number for reason, number in sorted(self._dropped.items())},
                num_in_flight=self._in_flight(),
                buffer_used_bytes=self._used_bytes,
                buffer_limit_bytes=self.limit_bytes,
                buffer_peak_bytes=self._peak_bytes,
                num_messages=num_messages,
                num_retries=num_retries,
                last_sequence=last_sequence,
                state=state,
                last_error=last_error,
            )

    def _in_flight(self) -> int:
        return self._num_produced - self._num_published - sum(self._dropped.values())

    def _drop(self, reason: int, num_decisions: int) -> None:
        if num_decisions:
            self._dropped[reason] = self._dropped.get(reason, 0) + num_decisions
            self._lock.notify_all()


def reason_name(reason: int) -> str:
    """Return "buffer_full" for DROP_REASON_BUFFER_FULL."""
    return pb.DropReason.Name(pb.DropReason.ValueType(reason)).removeprefix("DROP_REASON_").lower()
