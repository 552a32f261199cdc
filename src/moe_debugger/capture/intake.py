"""A bounded buffer between the hooks and the thread that turns forwards into columns.

The buffer is bounded in bytes of the tensors that it keeps alive. A forward that does not fit is dropped whole and
counted: the model is never made to wait.
"""

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from .raw import RawForward

__all__ = ["Intake", "IntakeStatistics"]


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


class Intake:
    """Runs `process` for each accepted forward, in order, on its own daemon thread.

    Args:
        process: called with each forward.
        failed: called with a forward and the error that `process` raised.
        limit_bytes: bound on the tensors kept alive.
    """

    def __init__(
        self,
        process: Callable[[RawForward], None],
        failed: Callable[[RawForward, Exception], None],
        limit_bytes: int,
    ) -> None:
        self._process = process
        self._failed = failed
        self._limit_bytes = limit_bytes
        self._queue: deque[tuple[RawForward, int]] = deque()
        self._condition = threading.Condition()
        self._used_bytes = 0
        self._peak_bytes = 0
        self._num_accepted = 0
        self._num_dropped = 0
        self._num_failed = 0
        self._is_busy = False
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="moe-debugger-capture", daemon=True)
        self._thread.start()

    def offer(self, raw: RawForward) -> bool:
        """Take `raw`, or return False where it does not fit."""
        size = raw.size_bytes
        with self._condition:
            if self._is_closed or self._used_bytes + size > self._limit_bytes:
                self._num_dropped += raw.num_decisions
                return False
            self._queue.append((raw, size))
            self._used_bytes += size
            self._peak_bytes = max(self._peak_bytes, self._used_bytes)
            self._num_accepted += raw.num_decisions
            self._condition.notify_all()
            return True

    def flush(self, timeout_s: float) -> bool:
        """Wait until everything accepted so far was processed; return False when the time is up."""
        if threading.current_thread() is self._thread:
            return True
        deadline = time.monotonic() + timeout_s
        with self._condition:
            while self._queue or self._is_busy:
                remaining = deadline - time.monotonic()
                if remaining <= 0:
                    return False
                self._condition.wait(remaining)
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
                num_waiting=sum(raw.num_decisions for raw, _ in self._queue),
                used_bytes=self._used_bytes,
                limit_bytes=self._limit_bytes,
                peak_bytes=self._peak_bytes,
            )

    def _run(self) -> None:
        while True:
            with self._condition:
                while not self._queue and not self._is_closed:
                    self._condition.wait()
                if not self._queue:
                    return
                raw, size = self._queue.popleft()
                self._is_busy = True
            try:
                self._process(raw)
            except Exception as error:  # noqa: BLE001 - one bad forward must not end the capture of all others
                with self._condition:
                    self._num_failed += raw.num_decisions
                self._failed(raw, error)
            del raw
            with self._condition:
                self._used_bytes -= size
                self._is_busy = False
                self._condition.notify_all()
