"""The hooks themselves: what torch holds on to while a model is watched.

A hook refers to its capture weakly, so that a model does not keep a debugger alive which nobody holds any more. A model
that is copied or pickled while it is watched takes no hook along but a function of the standard library that does
nothing: the copy is not watched, and can be loaded where moe_debugger is not installed.
"""

import sys
import time
import weakref
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from types import FrameType
from typing import TYPE_CHECKING, Any, Protocol

from .compiled import is_exporting
from .context import traced_inputs
from .open_calls import ThreadState
from .sites import Site, Tap

if TYPE_CHECKING:
    from torch import nn

__all__ = ["EnterHook", "LeaveHook", "TapHook", "Watcher"]

Deliver = Callable[[Mapping[str, Any]], None]

# Takes any arguments and returns None, as a hook that does nothing has to; pickled by its name.
_nothing = nullcontext().__exit__


class Watcher(Protocol):
    """What the hooks call (`hooks.Capture`)."""

    def enter(
        self, entry: object, inputs: dict[str, Any], root: str | None, caller: FrameType | None, *, is_training: bool
    ) -> None:
        """A watched module was called."""

    def leave(self, entry: object, output: Any) -> None:
        """A watched module's call ends."""

    def keep(self, site: Site, tap: Tap, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        """A tap's module was called."""


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


class EnterHook(_Hook):
    """Pre-hook of a module whose call may open a forward, or a stack of it."""

    def __init__(
        self, watcher: Watcher, names: tuple[str, ...], root: str | None, deliver: Callable[..., None]
    ) -> None:
        super().__init__(watcher)
        self._names = names
        self._root = root
        self._deliver = deliver

    def __call__(self, module: "nn.Module", args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note the inputs by name."""
        inputs = {**dict(zip(self._names, args, strict=False)), **kwargs}
        if self._is_compiling():
            if not is_exporting():
                self._deliver(traced_inputs(inputs, is_training=module.training))
            return
        watcher = self._watcher()
        if watcher is not None:
            watcher.enter(module, inputs, self._root, sys._getframe(1), is_training=module.training)


class LeaveHook(_Hook):
    """Hook of the same modules, always called, except where an interrupt passes."""

    def __init__(self, watcher: Watcher, deliver: Deliver) -> None:
        super().__init__(watcher)
        self._deliver = deliver

    def __call__(self, module: "nn.Module", args: Any, kwargs: Any, output: Any) -> None:
        """Note the output."""
        if self._is_compiling():
            if not is_exporting():
                self._deliver({})
            return
        watcher = self._watcher()
        if watcher is not None:
            watcher.leave(module, output)


class TapHook(_Hook):
    """Hook or pre-hook of a tap; it notes references, or hands them over at once."""

    def __init__(self, watcher: Watcher, state: ThreadState, site: Site, tap: Tap, deliver: Deliver) -> None:
        from torch import _C

        super().__init__(watcher)
        self._state = state
        # Patches of images are told apart by the shape of the first argument.
        self._may_wait = tap.may_wait and all(each.may_wait for each in site.taps) and site.info.stack != "vision"
        self._current_graph_task: Callable[[], int] = _C._current_graph_task_id
        self._site = site
        self._tap = tap
        self._deliver = deliver

    def reads_at_once(self) -> None:
        """Hand over what the tap picks in the call itself, from now on."""
        self._may_wait = False

    def __call__(self, module: "nn.Module", args: tuple[Any, ...], kwargs: dict[str, Any], output: Any = None) -> None:
        """Keep what the tap picks."""
        if self._is_compiling():
            if not is_exporting():
                kept = self._tap.keep(args, kwargs, output)
                if kept is not None:
                    self._deliver({**kept[0], "num_rows": kept[1]})
            return
        forward = self._state.forward
        if self._may_wait and forward is not None and not kwargs:
            # Between a model's layers the processor has forgotten our code, so the less of it runs here the better.
            started_ns = time.perf_counter_ns()
            forward.noted.append((self._site, self._tap, args[1:], output, self._current_graph_task()))
            forward.hook_ns += time.perf_counter_ns() - started_ns
            return
        watcher = self._watcher()
        if watcher is not None:
            watcher.keep(self._site, self._tap, args, kwargs, output)
