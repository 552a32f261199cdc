"""What a source without a fleet keeps in its own process: exact counts, and rows within a bound.

Folding is not done by whoever publishes: columns wait in a bounded buffer for one thread, and what does not fit is
dropped whole and counted.
"""

import threading
from collections import deque
from collections.abc import Callable, Sequence

from moe_debugger._counted import CountedRoutes
from moe_debugger._decisions import Decisions
from moe_debugger._rows import RowStore
from moe_debugger._stats import ExpertMetrics, RoutingStats, layer_routing_stats
from moe_debugger.analysis import RoutingState
from moe_debugger.capture import LayerInfo
from moe_debugger.publish.batching import columns_size_bytes
from moe_debugger.wire.codec import CountsColumns, RoutingColumns

__all__ = ["LocalRoutes"]


class LocalRoutes:
    """Counts and rows of one source; thread-safe.

    Args:
        layers: of the model.
        buffer_bytes: bound on the columns that wait.
        max_rows_bytes: bound on the rows that are kept; the oldest go first. Counts stay exact.
        keeps_rows: False at level "counts".
    """

    def __init__(
        self, layers: Sequence[LayerInfo], *, buffer_bytes: int, max_rows_bytes: int, keeps_rows: bool
    ) -> None:
        self._layers = tuple(layers)
        self._buffer_bytes = buffer_bytes
        self._keeps_rows = keeps_rows
        self._counted = CountedRoutes(layers)
        self._rows = RowStore(max_rows_bytes)
        self._num_calls = 0
        self._waiting: deque[tuple[RoutingColumns | CountsColumns, int]] = deque()
        self._used_bytes = 0
        self._is_busy = False
        self._is_closed = False
        self._failed: Callable[[RoutingColumns | CountsColumns, Exception], None] = lambda *_: None
        self._changed = threading.Condition()
        # Of what has been folded; held while folding, so that a reader sees whole batches.
        self._fold_lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="moe-debugger-source", daemon=True)
        self._thread.start()

    def set_failure_sink(self, failed: Callable[[RoutingColumns | CountsColumns, Exception], None]) -> None:
        """Tell of columns that could not be counted, on this object's thread."""
        self._failed = failed

    def offer(self, columns: RoutingColumns | CountsColumns) -> bool:
        """Take columns; return False where they do not fit, or after `close`."""
        size = columns_size_bytes(columns)
        with self._changed:
            if self._is_closed or self._used_bytes + size > self._buffer_bytes:
                return False
            self._waiting.append((columns, size))
            self._used_bytes += size
            self._changed.notify_all()
            return True

    def settle(self, timeout_s: float) -> bool:
        """Wait until all that was taken is counted; return False when the time is up."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._waiting and not self._is_busy, timeout_s)

    def close(self, timeout_s: float) -> None:
        """Fold what waits for at most `timeout_s`, then end the thread and free the rows."""
        self.settle(timeout_s)
        with self._changed:
            self._is_closed = True
            self._waiting.clear()
            self._changed.notify_all()
        self._thread.join(timeout_s)
        self._rows.close()

    def state(self) -> RoutingState:
        """Return a copy of what was counted."""
        with self._fold_lock:
            return self._counted.state.copy()

    def decisions(self) -> Decisions:
        """Return the kept rows as columns."""
        return Decisions(list(self._rows.blocks()), self._layers)

    def routing_stats(self, name: str) -> RoutingStats:
        """Return load per layer; a "forward" of a source is one call."""
        with self._fold_lock:
            return RoutingStats(
                session_name=name,
                num_forwards=self._num_calls,
                num_tokens=self._counted.state.num_tokens,
                num_requests=self._counted.state.num_requests,
                sampling_rate=1.0,
                layers=tuple(layer_routing_stats(x, self._counted.layer(x)) for x in self._layers),
            )

    def expert_metrics(self, name: str) -> ExpertMetrics:
        """Return the load of every expert."""
        with self._fold_lock:
            return ExpertMetrics(name, tuple(row for info in self._layers for row in self._counted.expert_rows(info)))

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._waiting) or self._is_closed)
                if self._is_closed:
                    return
                columns, size = self._waiting.popleft()
                self._is_busy = True
            try:
                with self._fold_lock:
                    self._fold(columns)
            except Exception as error:  # noqa: BLE001 - one bad batch is said and dropped, not the end of all others
                self._failed(columns, error)
            finally:
                with self._changed:
                    self._used_bytes -= size
                    self._is_busy = False
                    self._changed.notify_all()

    def _fold(self, columns: RoutingColumns | CountsColumns) -> None:
        self._num_calls += 1
        self._counted.fold(columns)
        if self._keeps_rows and isinstance(columns, RoutingColumns):
            self._rows.add(columns)
