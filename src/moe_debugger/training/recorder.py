"""Takes a session's series: numbers at once, device values when they have arrived."""

import threading
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from moe_debugger.errors import InvalidInputError

from .gradients import GradientProbe, Reading
from .readout import Readout, is_tensor
from .series import NO_INDEX, SeriesPoint, SeriesStore, SeriesTable

__all__ = ["SeriesRecorder"]

_LIMIT_BYTES = 64 * 1024 * 1024
# Steps whose values are on their way; a device that is this far behind has stopped, and the oldest are given up.
_MAX_PENDING = 1024
_MAX_NAME_CHARS = 64
_MAX_NOTES = 256


class _Scalars:
    """Values of series of the whole model that are on their way."""

    def __init__(self, step: int, names: Sequence[str], readout: Readout) -> None:
        self.step = step
        self.notes: list[str] = []
        self._names = names
        self._readout = readout

    def is_ready(self) -> bool:
        """Return whether `points` would not wait."""
        return self._readout.is_ready()

    def points(self) -> list[SeriesPoint]:
        """Return the points, waiting for the device."""
        values = self._readout.values()
        return [
            SeriesPoint(self.step, name, NO_INDEX, False, value)
            for name, value in zip(self._names, values, strict=True)
        ]


class SeriesRecorder:
    """Records series; safe to call from several threads.

    Args:
        probe: makes the probe of gradients when they are first asked for.
        sink: called with points once they are there, in their order, on whichever thread found them.
        limit_bytes: bound on the points kept; the oldest steps go first.
    """

    def __init__(
        self,
        probe: Callable[[], GradientProbe],
        sink: Callable[[Sequence[SeriesPoint]], None] = lambda _: None,
        *,
        limit_bytes: int = _LIMIT_BYTES,
    ) -> None:
        self._make_probe = probe
        self._probe: GradientProbe | None = None
        self._sink = sink
        self._store = SeriesStore(limit_bytes)
        self._notes: Counter[str] = Counter()
        self._pending: deque[Reading | _Scalars] = deque()
        self._lock = threading.RLock()

    def record(self, step: int, series: Mapping[str, Any]) -> None:
        """Record values of the whole model: numbers, or tensors of one element.

        Raises:
            InvalidInputError: a name is too long, or a value is no number.
        """
        tensors: dict[str, Any] = {}
        points: list[SeriesPoint] = []
        for name, value in series.items():
            if not 0 < len(name) <= _MAX_NAME_CHARS:
                raise InvalidInputError(f"step {step}: series {name[:80]!r} needs a name of 1 to {_MAX_NAME_CHARS}")
            if is_tensor(value) and value.numel() == 1 and not value.is_complex():
                tensors[name] = value
                continue
            try:
                points.append(SeriesPoint(step, name, NO_INDEX, False, np.array([float(value)])))
            except (TypeError, ValueError, RuntimeError) as error:
                raise InvalidInputError(f"step {step}: series {name!r} has no number ({error})") from error
        with self._lock:
            self._keep(points)
            if tensors:
                self._put(_Scalars(step, tuple(tensors), Readout(list(tensors.values()))))
            self.poll()

    def record_gradients(self, step: int) -> None:
        """Start to read the norms of gradients and weights as they are now."""
        with self._lock:
            try:
                if self._probe is None:
                    self._probe = self._make_probe()
                self._put(self._probe.measure(step))
                self.poll()
            except Exception as error:  # noqa: BLE001 - what watches a training never ends it
                self._note(f"gradients could not be read: {type(error).__name__}: {error}")

    def poll(self, *, waits: bool = False) -> None:
        """Take in what has arrived; with `waits` all that is on its way, which is not for the training thread."""
        with self._lock:
            while self._pending and (waits or self._pending[0].is_ready()):
                pending = self._pending.popleft()
                for note in pending.notes:
                    self._note(note)
                self._keep(pending.points())

    def table(self) -> SeriesTable:
        """Return all kept values, waiting for those on their way."""
        with self._lock:
            self.poll(waits=True)
            return SeriesTable(self._store.points(), notes=self._notes, num_not_kept=self._store.num_not_kept)

    def points(self) -> list[SeriesPoint]:
        """Return the points that are kept now, by step."""
        with self._lock:
            return self._store.points()

    def _put(self, pending: "Reading | _Scalars") -> None:
        self._pending.append(pending)
        if len(self._pending) > _MAX_PENDING:
            self._pending.popleft()
            self._note("the device is more than 1024 readings behind, the oldest were given up")

    def _note(self, text: str) -> None:
        if text in self._notes or len(self._notes) < _MAX_NOTES:
            self._notes[text] += 1

    def _keep(self, points: Sequence[SeriesPoint]) -> None:
        for point in points:
            self._store.add(point)
        if points:
            self._sink(points)
