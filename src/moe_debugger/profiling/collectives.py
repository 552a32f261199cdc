"""Times collectives of torch.distributed while a model of several ranks is profiled: what a rank waits for others.

The functions of the module `torch.distributed` are replaced while a profiler is attached, and put back afterwards.
What calls them by a name that it took before, calls functional collectives, or starts them asynchronously is not seen.
"""

import functools
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from .hooks import ThreadState
from .places import WHOLE_MODEL

__all__ = ["COLLECTIVES", "CollectiveWatch"]

COLLECTIVES = (
    "all_gather",
    "all_gather_into_tensor",
    "all_reduce",
    "all_to_all",
    "all_to_all_single",
    "barrier",
    "broadcast",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
)
ONE_PROCESS = "not applicable: one process, so no rank waits for another"
# Wrappers may lie in each other when several models are profiled; they are placed and removed one at a time.
_lock = threading.Lock()


class CollectiveWatch:
    """Notes begin and end of collectives in the forward that runs on the thread.

    Args:
        state: of the profiler's threads.
        codes: code and clock of the wait by plan; -1 = outside of the MoE blocks.
        module: in place of torch.distributed, for tests.
    """

    def __init__(self, state: ThreadState, codes: Mapping[int, tuple[int, Any]], module: Any = None) -> None:
        self._state = state
        self._codes = codes
        self._module = _distributed() if module is None else module
        self._placed: dict[str, tuple[Any, Any]] = {}
        self.num_asynchronous = 0

    @property
    def reason(self) -> str:
        """Why there are no times of waiting; empty where there can be."""
        if self._module is None or not self._module.is_initialized() or self._module.get_world_size() < 2:
            return ONE_PROCESS
        if self.num_asynchronous:
            return f"not wholly observable: {self.num_asynchronous} collectives were started asynchronously"
        return ""

    def install(self) -> None:
        """Replace the collectives, where there are several ranks."""
        if self.reason == ONE_PROCESS or self._placed:
            return
        with _lock:
            for name in COLLECTIVES:
                original = getattr(self._module, name, None)
                if callable(original):
                    wrapper = self._wrap(original)
                    self._placed[name] = (original, wrapper)
                    setattr(self._module, name, wrapper)

    def remove(self) -> None:
        """Put back what is still ours; where another wrapper lies around it, ours goes on without noting anything."""
        with _lock:
            for name, (original, wrapper) in self._placed.items():
                if getattr(self._module, name, None) is wrapper:
                    setattr(self._module, name, original)
            self._placed.clear()

    def _wrap(self, original: Callable[..., Any]) -> Callable[..., Any]:
        from torch import compiler

        @functools.wraps(original)
        def collective(*args: Any, **kwargs: Any) -> Any:
            forward = None if compiler.is_compiling() else self._state.open
            if forward is None or not self._placed:
                return original(*args, **kwargs)
            if kwargs.get("async_op"):
                self.num_asynchronous += 1
                return original(*args, **kwargs)
            code, clock = self._codes[forward.layers[-1] if forward.layers else WHOLE_MODEL]
            started = clock.mark()
            try:
                return original(*args, **kwargs)
            finally:
                ended, now_ns = clock.mark(), time.perf_counter_ns()
                forward.codes += (code, code + 1)
                forward.marks += (started, ended)
                forward.rows += (0, 0)
                forward.own_ns += time.perf_counter_ns() - now_ns

        return collective


def _distributed() -> Any:
    from torch import distributed

    return distributed if distributed.is_available() else None
