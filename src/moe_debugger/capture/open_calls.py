"""Which watched calls are open on a thread, and what was kept of their forward so far.

A module's exit hook does not run where an interrupt (KeyboardInterrupt, SystemExit) leaves it, so a count of entries
and exits would be off for good. Each call is remembered by the Python frame that made it instead: a call whose frame is
no longer on the thread's stack is over.
"""

import sys
import threading
from dataclasses import dataclass, field
from types import CodeType, FrameType
from typing import Any

from .context import RequestScope
from .raw import RawForward, TokenFrame
from .sites import Site, Tap

__all__ = ["OpenCall", "OpenForward", "ThreadState"]


@dataclass(frozen=True, slots=True)
class OpenCall:
    """A call of a watched module that has not ended.

    Attributes:
        entry: the module, or what stands for it; compared by identity.
        frame_id: address of the frame that runs the module's hooks; only an address, since a reference would keep what
            the frame holds alive after an interrupt. 0 in compiled code, which has no such frame.
        code: of that frame.
        outer_error: the exception that was being handled when the call began.
    """

    entry: object
    frame_id: int = 0
    code: CodeType | None = None
    outer_error: BaseException | None = None

    @classmethod
    def begun(cls, entry: object, caller: FrameType | None) -> "OpenCall":
        """Return the call of `entry` whose hooks `caller` runs (None in compiled code)."""
        if caller is None:
            return cls(entry, outer_error=sys.exception())
        return cls(entry, id(caller), caller.f_code, sys.exception())

    def is_running(self, inner: FrameType | None) -> bool:
        """Return whether this call is on the stack above `inner`."""
        while inner is not None:
            # Another frame may have got the same address; of another call of this very module it cannot be: that call
            # would have begun a forward of its own.
            if id(inner) == self.frame_id and inner.f_code is self.code and inner.f_locals.get("self") is self.entry:
                return True
            inner = inner.f_back
        return False


@dataclass(slots=True)
class OpenForward:
    """A forward under way.

    Attributes:
        raw: None where opening it failed.
        calls: the entries that are open, outermost first.
        outer: the inputs of the outermost call.
        frames: tokens by the name of their stack.
        broken: stacks whose tokens could not be read because of an error of ours: their rows are lost, not guessed.
        minted: request ids by number of rows.
        parts: what the taps of a layer kept until its call is whole, by layer index.
        noted: calls of taps that wait: site, tap, arguments but the first, output, autograd's current task.
        hook_ns: time in the hooks that noted them.
    """

    calls: list[OpenCall]
    started_ns: int
    raw: RawForward | None = None
    is_training: bool = False
    is_batched: bool = False
    outer: dict[str, Any] = field(default_factory=dict)
    frames: dict[str, TokenFrame] = field(default_factory=dict)
    broken: set[str] = field(default_factory=set)
    minted: dict[int, tuple[str, ...]] = field(default_factory=dict)
    parts: dict[int, tuple[dict[str, Any], int]] = field(default_factory=dict)
    noted: list[tuple[Site, Tap, tuple[Any, ...], Any, int]] = field(default_factory=list)
    hook_ns: int = 0


class ThreadState(threading.local):
    """What one thread of the caller is doing; models may run on several."""

    scope: RequestScope | None = None

    def __init__(self) -> None:
        # A forward within another one of the same model stands after it.
        self._open: list[OpenForward] = []
        # The innermost one; looked up by each hook.
        self.forward: OpenForward | None = None

    def _note_innermost(self) -> None:
        self.forward = self._open[-1] if self._open else None

    def begin(
        self, entry: object, caller: FrameType | None, started_ns: int
    ) -> tuple[OpenForward, bool, list[OpenForward]]:
        """Note that a call of `entry` begins.

        Returns:
            The forward that it belongs to, whether that one begins here, and the forwards that turn out to be over.
        """
        call = OpenCall.begun(entry, caller)
        abandoned = []
        while self._open:
            first = self._open[-1].calls[0]
            if first.frame_id:
                is_over = not first.is_running(sys._getframe().f_back if caller is None else caller.f_back)
            else:
                is_over = any(each.entry is entry for each in self._open[-1].calls)
            if not is_over:
                break
            abandoned.append(self._open.pop())
        is_new = not self._open or any(each.entry is entry for each in self._open[-1].calls)
        if is_new:
            self._open.append(OpenForward([call], started_ns))
        else:
            self._open[-1].calls.append(call)
        self._note_innermost()
        return self._open[-1], is_new, abandoned

    def end(self, entry: object) -> tuple[OpenForward | None, bool]:
        """Note that a call of `entry` ends.

        Returns:
            The forward that ends with it (None where an outer call goes on, or none was begun), and whether the call
            ends by an error.
        """
        if not self._open:
            return None, False
        calls = self._open[-1].calls
        index = next((i for i in reversed(range(len(calls))) if calls[i].entry is entry), None)
        if index is None:
            # A hook of someone else raised before ours could note that the call began.
            return None, False
        error = sys.exception()
        is_error = error is not None and error is not calls[index].outer_error
        del calls[index:]
        if calls:
            return None, is_error
        ended = self._open.pop()
        self._note_innermost()
        return ended, is_error

    def abandon(self) -> list[OpenForward]:
        """Forget all forwards of this thread, and return them."""
        abandoned, self._open, self.forward = self._open, [], None
        return abandoned
