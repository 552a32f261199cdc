"""What was timed, kept within a bound of bytes: one record for each forward. Pure numpy."""

import threading
from collections import deque
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["ForwardRecord", "RecordStore"]

# What a record costs beside its arrays.
_RECORD_BYTES = 600


@dataclass(frozen=True, slots=True)
class ForwardRecord:
    """Begins and ends of the parts of one forward; m marks, in the order in which the host placed them.

    Attributes:
        forward_index, step: as the capture numbers them.
        lane: which of the process's threads ran it, from 0.
        start_ns: Unix time of its begin by the host's clock, nanoseconds.
        codes: [m] int32, 2 x place, + 1 where the place ends.
        offsets: [m] int64, nanoseconds since the begin, by the clock of the place's device.
        rows: [m] int32, rows (tokens) that a begun part was given; 0 at ends and where they are not seen.
        count_layers: [c] int32, the plans whose experts were counted, one entry for each call.
        counts: [c, E] int32, rows of each expert in that call; padded with 0 where layers differ in E.
        own_ns: time that the profiler's hooks took on the host.
    """

    forward_index: int
    step: int
    lane: int
    start_ns: int
    codes: npt.NDArray[np.int32]
    offsets: npt.NDArray[np.int64]
    rows: npt.NDArray[np.int32]
    count_layers: npt.NDArray[np.int32]
    counts: npt.NDArray[np.int32]
    own_ns: int

    @property
    def num_bytes(self) -> int:
        """What it takes in memory, about."""
        arrays = (self.codes, self.offsets, self.rows, self.count_layers, self.counts)
        return _RECORD_BYTES + sum(array.nbytes for array in arrays)


class RecordStore:
    """The newest records within `limit_bytes`; the oldest go first and are counted. Safe for several threads."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self._records: deque[ForwardRecord] = deque()
        self._used_bytes = 0
        self._num_added = 0
        self._num_dropped = 0
        self._lock = threading.Lock()

    def add(self, record: ForwardRecord) -> None:
        """Keep a record; the newest one is kept whatever its size."""
        with self._lock:
            self._records.append(record)
            self._num_added += 1
            self._used_bytes += record.num_bytes
            while self._used_bytes > self.limit_bytes and len(self._records) > 1:
                self._used_bytes -= self._records.popleft().num_bytes
                self._num_dropped += 1

    def records(self, *, after: int = 0, newest: int | None = None) -> list[ForwardRecord]:
        """Return the kept records beyond the first `after` that were ever added, at most the `newest` ones."""
        with self._lock:
            kept = list(self._records)
            skipped = max(0, after - self._num_dropped)
        chosen = kept[skipped:]
        return chosen if newest is None else chosen[max(0, len(chosen) - newest) :]

    @property
    def num_added(self) -> int:
        """Records that were ever added."""
        return self._num_added

    @property
    def num_dropped(self) -> int:
        """Records that made room for newer ones."""
        return self._num_dropped

    @property
    def used_bytes(self) -> int:
        """Bytes of the kept records, about."""
        return self._used_bytes
