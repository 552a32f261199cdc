"""Points of training series that wait for the next status."""

import threading
from collections import deque
from collections.abc import Iterable

from moe_debugger.v1 import routing_pb2 as pb

__all__ = ["SeriesQueue"]

# With one status a second: the newest values of 64 layers x 256 experts are 130 KB.
_MAX_STATUS_BYTES = 256 * 1024
_MAX_QUEUE_BYTES = 4 * 1024 * 1024


class SeriesQueue:
    """A bounded queue; beyond it the oldest points are dropped and counted."""

    def __init__(self) -> None:
        self.num_dropped = 0
        self._points: deque[tuple[pb.SeriesPoint, int]] = deque()
        self._size_bytes = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._points)

    @property
    def is_empty(self) -> bool:
        """True where no point waits."""
        return not self._points

    def put(self, points: Iterable[pb.SeriesPoint]) -> None:
        """Take points for the next statuses."""
        sized = [(point, point.ByteSize()) for point in points]
        with self._lock:
            for point, size in sized:
                self._points.append((point, size))
                self._size_bytes += size
            while self._size_bytes > _MAX_QUEUE_BYTES:
                self._size_bytes -= self._points.popleft()[1]
                self.num_dropped += 1

    def take(self) -> list[pb.SeriesPoint]:
        """Return the oldest points that fit one status, and forget them; at least one where one waits."""
        taken: list[pb.SeriesPoint] = []
        size_bytes = 0
        with self._lock:
            while self._points and (not taken or size_bytes + self._points[0][1] <= _MAX_STATUS_BYTES):
                point, size = self._points.popleft()
                taken.append(point)
                size_bytes += size
            self._size_bytes -= size_bytes
        return taken
