"""A bounded buffer between the hooks and the thread that turns forwards into columns.

The buffer is bounded in bytes of the tensors that it keeps alive. A forward that does not fit is dropped whole and
counted: the model is never made to wait.

The thread rests between its turns, for many times as long as the last one took: what waits meanwhile is worked on
together, which costs hardly more than one forward alone, and the model's own Python gets the interpreter nearly always.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .raw import RawForward

__all__ = ["Intake", "IntakeStatistics"]

# While forwards are small the thread works for at most about 1 / 250 of the time, and what it knows is at most about a
# second old; whoever asks before that wakes it.
_REST_PER_WORK = 250
_MIN_REST_S = 0.02
_MAX_REST_S = 1.0
# With so many tokens more forwards together save nothing any more, and with so much of the buffer full a rest would
# cost forwards.
_ENOUGH_TOKENS = 4096
_ENOUGH_SHARE = 0.25


@dataclass(frozen=True, slots=True)
class IntakeStatistics:
    """A snapshot of the buffer's account, in decisions."""

    num_accepted: int
    num_dropped: int
    num_failed: int
    num_waiting: int
    used_bytes: int
    limit_bytes: int
    peak_bytes: int


@dataclass(slots=True)
class _Item:
    raw: RawForward
    size_bytes: int
    num_tokens: int
    num_decisions: int


class Intake:
    """Runs `process` over the accepted forwards, in order, on its own daemon thread.

    Args:
        process: called with one or more forwards. Where it raises it must have done nothing with them; several are
            then given to it again one by one.
        failed: called with a forward and the error that `process` raised for it alone.
        limit_bytes: bound on the tensors kept alive.
    """

    def __init__(
        self,
        process: Callable[[Sequence[RawForward]], None],
        failed: Callable[[RawForward, Exception], None],
        limit_bytes: int,
    ) -> None:
        self._process = process
        self._failed = failed
        self._limit_bytes = limit_bytes
        self._queue: deque[_Item] = deque()
        self._condition = threading.Condition()
        self._num_tokens = 0
        self._used_bytes = 0
        self._peak_bytes = 0
        self._num_accepted = 0
        self._num_dropped = 0
        self._num_failed = 0
        self._num_flushing = 0
        self._is_idle = False
        self._is_busy = False
        self._is_closed = False
        self._rest_s = _MIN_REST_S
        self._thread = threading.Thread(target=self._run, name="moe-debugger-capture", daemon=True)
        self._thread.start()

    def offer(self, raw: RawForward) -> bool:
        """Take `raw`, or return False where it does not fit."""
        item = _Item(raw, raw.size_bytes, raw.num_tokens, raw.num_decisions)
        with self._condition:
            if self._is_closed or self._used_bytes + item.size_bytes > self._limit_bytes:
                self._num_dropped += item.num_decisions
                return False
            self._queue.append(item)
            self._num_tokens += item.num_tokens
            self._used_bytes += item.size_bytes
            self._peak_bytes = max(self._peak_bytes, self._used_bytes)
            self._num_accepted += item.num_decisions
            # Waking a thread costs as much as a hook: only the first forward does it, and one that ends the rest.
            if self._is_idle or self._has_enough:
                self._condition.notify_all()
            return True

    def flush(self, timeout_s: float) -> bool:
        """Wait until everything accepted so far was processed; return False when the time is up."""
        if threading.current_thread() is self._thread:
            return True
        deadline = time.monotonic() + timeout_s
        with self._condition:
            self._num_flushing += 1
            self._condition.notify_all()
            try:
                while self._queue or self._is_busy:
                    remaining = deadline - time.monotonic()
                    if remaining <= 0:
                        return False
                    self._condition.wait(remaining)
            finally:
                self._num_flushing -= 1
        return True

    def close(self, timeout_s: float) -> None:
        """Process what is left, then end the thread."""
        with self._condition:
            self._is_closed = True
            self._condition.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout_s)

    def statistics(self) -> IntakeStatistics:
        """Return the account."""
        with self._condition:
            return IntakeStatistics(
                num_accepted=self._num_accepted,
                num_dropped=self._num_dropped,
                num_failed=self._num_failed,
                num_waiting=sum(item.num_decisions for item in self._queue),
                used_bytes=self._used_bytes,
                limit_bytes=self._limit_bytes,
                peak_bytes=self._peak_bytes,
            )

    @property
    def _has_enough(self) -> bool:
        return self._num_tokens >= _ENOUGH_TOKENS or self._used_bytes > _ENOUGH_SHARE * self._limit_bytes

    def _run(self) -> None:
        while items := self._next():
            started = time.monotonic()
            self._work([item.raw for item in items])
            size_bytes = sum(item.size_bytes for item in items)
            # The buffer counts what is alive, so nothing may be held here while the thread waits.
            items.clear()
            with self._condition:
                self._rest_s = min(_MAX_REST_S, max(_MIN_REST_S, _REST_PER_WORK * (time.monotonic() - started)))
                self._used_bytes -= size_bytes
                self._is_busy = False
                self._condition.notify_all()

    def _next(self) -> list[_Item]:
        """Return what to work on, waiting for it; nothing at the end."""
        with self._condition:
            self._is_idle = True
            self._condition.wait_for(lambda: self._queue or self._is_closed)
            self._is_idle = False
            if not (self._is_closed or self._num_flushing or self._has_enough):
                self._condition.wait_for(
                    lambda: self._is_closed or self._num_flushing or self._has_enough, timeout=self._rest_s
                )
            items: list[_Item] = []
            num_tokens = 0
            while self._queue and (not items or num_tokens + self._queue[0].num_tokens <= _ENOUGH_TOKENS):
                items.append(self._queue.popleft())
                num_tokens += items[-1].num_tokens
            self._num_tokens -= num_tokens
            self._is_busy = bool(items)
            return items

    def _work(self, raws: list[RawForward]) -> None:
        try:
            self._process(raws)
        except Exception as error:  # noqa: BLE001 - one bad forward must not end the capture of all others
            if len(raws) > 1:
                for raw in raws:
                    self._work([raw])
                return
            with self._condition:
                self._num_failed += raws[0].num_decisions
            self._failed(raws[0], error)
