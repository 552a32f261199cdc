"""The profiler's hooks: apart from the capture's, so that a capture without profiling runs none of this.

A hook notes a mark and a number. It computes nothing, never raises into the model and never waits; while torch traces
or compiles it does nothing. It refers to its profiler weakly, and a model that is copied or pickled takes none along.
"""

import sys
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Protocol

from .clocks import CudaClock, HostClock

if TYPE_CHECKING:
    from torch import nn

__all__ = ["EndHook", "EnterHook", "IdHook", "LeaveHook", "OpenForward", "StartHook", "ThreadState", "Watcher"]

# Takes any arguments and returns None, as a hook that does nothing has to; pickled by its name.
_nothing = nullcontext().__exit__
# torch's number where no backward runs.
_NO_TASK = -1


class OpenForward:
    """A forward that runs on this thread."""

    __slots__ = (
        "anchors", "began_ns", "codes", "entry", "forward_index", "host_anchor", "ids", "lane", "layers", "marks",
        "own_ns", "rows", "start_ns", "step",
    )  # fmt: skip

    def __init__(self, entry: object, forward_index: int, step: int, lane: int) -> None:
        self.entry = entry
        self.forward_index = forward_index
        self.step = step
        self.lane = lane
        self.start_ns = time.time_ns()
        # When the model went on, by the host's counter, and the mark from which its clock counts.
        self.began_ns = 0
        self.host_anchor = 0
        self.codes: list[int] = []
        self.marks: list[Any] = []
        self.rows: list[int] = []
        # (plan, expert ids or number of rows by expert) of each call.
        self.ids: list[tuple[int, Any]] = []
        # The plans whose blocks run, the innermost last.
        self.layers: list[int] = []
        self.anchors: dict[str, Any] = {}
        self.own_ns = 0


class ThreadState(threading.local):
    """What runs on this thread."""

    def __init__(self) -> None:
        self.open: OpenForward | None = None


class Watcher(Protocol):
    """What the hooks call (`profiler.LayerProfiler`)."""

    def begin(self, entry: object) -> None:
        """A module was called whose call may be a forward."""

    def end(self, entry: object, *, raised: bool) -> None:
        """Such a call ends."""

    def note(self, text: str) -> None:
        """Something could not be measured."""

    def passed_over(self) -> None:
        """A block ran outside of a forward."""


class _Hook:
    def __init__(self, watcher: Watcher) -> None:
        from torch import compiler

        self._watcher = weakref.ref(watcher)
        # Looked up once: an import in each call costs as much as the rest of a hook.
        self._is_compiling = compiler.is_compiling

    def __deepcopy__(self, memo: Any) -> Callable[..., None]:
        return _nothing

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (nullcontext(), "__exit__")

    def _failed(self, error: Exception) -> None:
        watcher = self._watcher()
        if watcher is not None:
            watcher.note(f"a hook failed: {type(error).__name__}: {error}")


class EnterHook(_Hook):
    """Pre-hook of a module whose call may be a forward."""

    def __init__(self, watcher: Watcher) -> None:
        from torch import _C

        super().__init__(watcher)
        self._current_graph_task: Callable[[], int] = _C._current_graph_task_id

    def __call__(self, module: "nn.Module", args: tuple[Any, ...]) -> None:
        """Open a forward."""
        # Within backward a checkpoint computes a forward again: that is no forward of its own.
        if self._is_compiling() or self._current_graph_task() != _NO_TASK:
            return
        watcher = self._watcher()
        if watcher is not None:
            watcher.begin(module)


class LeaveHook(EnterHook):
    """Hook of the same module, called also where it raises."""

    def __call__(self, module: "nn.Module", args: Any, output: Any = None) -> None:
        """Close the forward."""
        if self._is_compiling() or self._current_graph_task() != _NO_TASK:
            return
        watcher = self._watcher()
        if watcher is not None:
            # torch calls it with no output where the module raised, while that exception is handled.
            watcher.end(module, raised=output is None and sys.exc_info()[0] is not None)


class _PlaceHook(_Hook):
    """Args:
    codes: the number to note, by the plan whose block runs; a module that several layers share has several.
    """

    def __init__(
        self, watcher: Watcher, state: ThreadState, clock: HostClock | CudaClock, codes: Mapping[int, int], plan: int
    ) -> None:
        super().__init__(watcher)
        self._state = state
        self._mark = clock.mark
        self._code = codes[plan]
        self._shared = dict(codes) if len(codes) > 1 else None
        self._plan = plan

    def _code_in(self, forward: OpenForward) -> int:
        if self._shared is None or not forward.layers:
            return self._code
        return self._shared.get(forward.layers[-1], self._code)


class StartHook(_PlaceHook):
    """Pre-hook of a timed module: notes how many rows it is given, and when it begins."""

    def __init__(self, *args: Any, is_block: bool = False) -> None:
        super().__init__(*args)
        self._is_block = is_block

    def __call__(self, module: "nn.Module", args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note the begin."""
        if self._is_compiling():
            return
        forward = self._state.open
        if forward is None:
            watcher = self._watcher()
            if self._is_block and watcher is not None:
                watcher.passed_over()
            return
        started_ns = time.perf_counter_ns()
        try:
            if self._is_block:
                forward.layers.append(self._plan)
            given = args[0] if args else kwargs.get("hidden_states")
            shape = getattr(given, "shape", None)
            num_rows = 0
            if shape:
                num_rows = 1
                for size in shape[:-1]:
                    num_rows *= size
            forward.rows.append(num_rows)
            forward.codes.append(self._code_in(forward))
            forward.marks.append(self._mark())
        except Exception as error:  # noqa: BLE001 - a hook never raises into the model
            self._failed(error)
        forward.own_ns += time.perf_counter_ns() - started_ns


class EndHook(_PlaceHook):
    """Hook of a timed module: notes when it ended."""

    def __init__(self, *args: Any, is_block: bool = False) -> None:
        super().__init__(*args)
        self._is_block = is_block

    def __call__(self, module: "nn.Module", args: tuple[Any, ...], output: Any) -> None:
        """Note the end."""
        if self._is_compiling():
            return
        forward = self._state.open
        if forward is None:
            return
        started_ns = time.perf_counter_ns()
        try:
            forward.marks.append(self._mark())
            forward.codes.append(self._code_in(forward) + 1)
            forward.rows.append(0)
            if self._is_block and forward.layers:
                forward.layers.pop()
        except Exception as error:  # noqa: BLE001 - a hook never raises into the model
            self._failed(error)
        forward.own_ns += time.perf_counter_ns() - started_ns


class IdHook(_Hook):
    """Hook or pre-hook of the call that shows the expert ids: keeps them until they are counted."""

    def __init__(self, watcher: Watcher, state: ThreadState, plan: int, plans: frozenset[int], read: Any) -> None:
        super().__init__(watcher)
        self._state = state
        self._plan = plan
        self._plans = plans
        self._read = read

    def __call__(self, module: "nn.Module", args: tuple[Any, ...], kwargs: dict[str, Any], output: Any = None) -> None:
        """Keep the ids."""
        if self._is_compiling():
            return
        forward = self._state.open
        if forward is None:
            return
        started_ns = time.perf_counter_ns()
        try:
            ids = self._read(args, kwargs, output)
            if ids is not None:
                inner = forward.layers[-1] if forward.layers else self._plan
                # A copy: routers may write every call's ids into one buffer.
                kept = ids if isinstance(ids, list) else ids.detach().clone()
                forward.ids.append((inner if inner in self._plans else self._plan, kept))
        except Exception as error:  # noqa: BLE001 - a hook never raises into the model
            self._failed(error)
        forward.own_ns += time.perf_counter_ns() - started_ns
