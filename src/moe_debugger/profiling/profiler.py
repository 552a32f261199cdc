"""Times the parts of a model's MoE layers while it runs."""

import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_debugger.capture import Site

from .clocks import CudaClock, EventRuntime, HostClock
from .collectives import CollectiveWatch
from .counting import ExpertCounts
from .hooks import EndHook, EnterHook, IdHook, LeaveHook, OpenForward, StartHook, ThreadState
from .places import LayerPlan, Part
from .placing import Placement, refuse_compiled
from .store import ForwardRecord, RecordStore

if TYPE_CHECKING:
    from torch import nn

__all__ = ["LayerProfiler", "refuse_compiled"]

_LIMIT_BYTES = 32 * 1024 * 1024
# Forwards whose times a device still owes; one that is this far behind has stopped.
_MAX_PENDING = 512
# Marks of one forward; more means that its end was never seen.
_MAX_MARKS = 1 << 20
_MAX_NOTES = 64
# Forwards that are read together, and expert ids on the host that may wait for it.
_BATCH = 32
_MAX_HELD = 1 << 20
_NO_NUMBER = (-1, -1)
# Modules that a note names.
_MAX_NAMES = 3


@dataclass(slots=True)
class _Pending:
    forward: OpenForward
    counts: ExpertCounts


class LayerProfiler:
    """Times blocks, routers and experts of the MoE layers that a capture found.

    Args:
        model: the model; only hooks are placed on it, from `attach` to `detach`.
        sites: its MoE layers.
        numbering: gives index and step of the forward that begins on this thread, None where it has none; default: 0,
            1, 2... A forward without a number gets -1.
        limit_bytes: bound on what is kept; the oldest forwards go first, and are counted.
        runtime: of CUDA events; a test gives one without a device.

    Raises:
        ModelNotSupportedError: the model is compiled.
    """

    def __init__(
        self,
        model: "nn.Module",
        sites: Sequence[Site],
        *,
        numbering: Callable[[], tuple[int, int] | None] | None = None,
        limit_bytes: int = _LIMIT_BYTES,
        runtime: EventRuntime | None = None,
    ) -> None:
        refuse_compiled(model)
        self._model = model
        own_numbers = count()
        self._numbering = numbering or (lambda: (next(own_numbers),) * 2)
        self._host = HostClock()
        self._state = ThreadState()
        self._lanes: dict[int, int] = {}
        self._handles: list[Any] = []
        self._pending: deque[_Pending] = deque()
        self._settling = threading.Lock()
        # Several threads may run forwards; += is no single step.
        self._counting = threading.Lock()
        self.store = RecordStore(limit_bytes)
        self.notes: Counter[str] = Counter()
        self._compiled_note: dict[str, int] = {}
        self.num_forwards = 0
        self.num_given_up = 0
        self._num_held = 0
        self.num_outside = 0
        self.own_ns = 0
        self.forward_ns = 0
        self._placement = Placement(model, sites, runtime, self.note)
        self.plans, self.places = self._placement.plans, self._placement.places
        self._collectives = CollectiveWatch(self._state, self._placement.waits())
        # A profiler that everyone lost takes its hooks along.
        self._unhook = weakref.finalize(self, _remove, self._handles)
        self._unhook.atexit = False

    @property
    def wait_reason(self) -> str:
        """Why there are no times of waiting for other ranks; empty where there can be."""
        return self._collectives.reason

    @property
    def is_attached(self) -> bool:
        """Whether the hooks are on the model."""
        return bool(self._handles)

    @property
    def num_pending(self) -> int:
        """Forwards whose times the device has not given yet."""
        return len(self._pending)

    def attach(self) -> None:
        """Place the hooks; again does nothing.

        Raises:
            ModelNotSupportedError: the model was compiled meanwhile.
        """
        if self._handles:
            return
        refuse_compiled(self._model)
        for entry in self._placement.entries():
            self._handles.append(entry.register_forward_pre_hook(EnterHook(self)))
            self._handles.append(entry.register_forward_hook(LeaveHook(self), prepend=True, always_call=True))
        codes = self._placement.codes()
        for plan, layer in enumerate(self.plans):
            for place in layer.places:
                own = codes[id(place.module), place.part]
                # A module that several layers share gets one pair of hooks.
                if plan == min(own):
                    self._add_place(place.module, place.part, own, plan)
        for plan, layer in enumerate(self.plans):
            self._add_id_hook(plan, layer)
        self._collectives.install()

    def detach(self) -> None:
        """Remove the hooks; what was timed stays readable."""
        self.look_for_compiled()
        self._collectives.remove()
        _remove(self._handles)
        self._state.open = None
        self.settle()

    def settle(self, *, timeout_s: float = 0.0) -> int:
        """Take in the times that are there; never waits for the device's stream.

        Args:
            timeout_s: ask again for so long; 0 asks once.

        Returns:
            How many forwards are not there yet.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            # Someone else is at it: what a hook would wait for is not worth it.
            if self._settling.acquire(blocking=timeout_s > 0):
                try:
                    while self._pending and self._is_over(self._pending[0]):
                        self._take(self._pending.popleft())
                finally:
                    self._settling.release()
            if not self._pending or time.monotonic() >= deadline:
                return len(self._pending)
            time.sleep(0.002)

    def look_for_compiled(self) -> None:
        """Note the modules that were compiled while they were timed: their times stop without a word of their own."""
        if not self._handles:
            return
        names = self._placement.compiled()
        if names:
            shown = ", ".join(names[:_MAX_NAMES]) + (f" and {len(names) - _MAX_NAMES} more" * (len(names) > _MAX_NAMES))
            self._compiled_note = {
                f"compiled after profiling began: {shown}; compiled code has no calls left to time, so their times are "
                "missing from then on": 1
            }

    @property
    def all_notes(self) -> dict[str, int]:
        """What could not be measured, with how often."""
        with self._counting:
            return {**self.notes, **self._compiled_note}

    def begin(self, entry: object) -> None:
        """Open a forward where none is open on this thread."""
        started_ns = time.perf_counter_ns()
        try:
            state = self._state
            if state.open is not None:
                if state.open.entry is not entry and len(state.open.marks) < _MAX_MARKS:
                    return
                self._give_up("a forward was interrupted")
            devices = self._placement.devices
            if any(clock.runtime.is_capturing() for clock in devices.values()):
                self.note("a forward was captured into a CUDA graph, where events cannot be timed: not measured")
                return
            index, step = self._numbering() or _NO_NUMBER
            with self._counting:
                lane = self._lanes.setdefault(threading.get_ident(), len(self._lanes))
            forward = OpenForward(entry, index, step, lane)
            forward.anchors = {name: clock.mark() for name, clock in devices.items()}
            forward.codes.append(0)
            forward.rows.append(0)
            forward.marks.append(self._placement.clocks[0].mark())
            state.open = forward
            # Last: the host's clock counts from here, and what came before is the profiler's.
            forward.host_anchor = self._host.mark()
            forward.began_ns = time.perf_counter_ns()
            forward.own_ns = forward.began_ns - started_ns
        except Exception as error:  # noqa: BLE001 - a hook never raises into the model
            self.note(f"begin of a forward: {type(error).__name__}: {error}")

    def end(self, entry: object, *, raised: bool = False) -> None:
        """Close the forward that `entry` opened."""
        state = self._state
        forward = state.open
        if forward is None or forward.entry is not entry:
            return
        started_ns = time.perf_counter_ns()
        try:
            state.open = None
            forward.marks.append(self._placement.clocks[0].mark())
            forward.codes.append(1)
            forward.rows.append(0)
            num_ends = sum(code & 1 for code in forward.codes)
            if raised or 2 * num_ends != len(forward.codes):
                self._give_up("a forward raised")
                return
            counts = ExpertCounts(forward.ids, [plan.info.num_experts for plan in self.plans])
            forward.ids = []
            if len(self._pending) >= _MAX_PENDING:
                self._pending.popleft()
                self._give_up("the device is too far behind")
            self._pending.append(_Pending(forward, counts))
            with self._counting:
                self.num_forwards += 1
                self._num_held += counts.num_held
            # In batches: between two forwards the processor has forgotten this code, so the less often it runs the
            # less it costs. What is held until then are references to expert ids.
            if len(self._pending) % _BATCH == 0 or self._num_held > _MAX_HELD:
                self._num_held = 0
                self.settle()
        except Exception as error:  # noqa: BLE001 - a hook never raises into the model
            self.note(f"end of a forward: {type(error).__name__}: {error}")
        finally:
            now_ns = time.perf_counter_ns()
            with self._counting:
                self.own_ns += forward.own_ns + now_ns - started_ns
                self.forward_ns += now_ns - forward.began_ns

    def note(self, text: str) -> None:
        """Count something that could not be measured."""
        with self._counting:
            if text in self.notes or len(self.notes) < _MAX_NOTES:
                self.notes[text] += 1

    def spent(self, ns: int) -> None:
        """Add nanoseconds to what profiling cost."""
        with self._counting:
            self.own_ns += ns

    def passed_over(self) -> None:
        """A block ran outside of a forward: a checkpoint that computes it again, or a call of the block alone."""
        with self._counting:
            self.num_outside += 1

    def _give_up(self, why: str) -> None:
        self._state.open = None
        with self._counting:
            self.num_given_up += 1
        self.note(f"{why}: its times were not kept")

    def _is_over(self, pending: _Pending) -> bool:
        if not pending.counts.is_ready():
            return False
        forward = pending.forward
        for code, mark in zip(reversed(forward.codes), reversed(forward.marks), strict=True):
            clock = self._placement.clocks[code >> 1]
            if isinstance(clock, CudaClock) and not clock.is_over(mark):
                return False
        return True

    def _take(self, pending: _Pending) -> None:
        forward = pending.forward
        offsets = np.empty(len(forward.marks), np.int64)
        used: dict[str, list[Any]] = {}
        for at, (code, mark) in enumerate(zip(forward.codes, forward.marks, strict=True)):
            clock, name = self._placement.clocks[code >> 1], self._placement.names[code >> 1]
            if isinstance(clock, CudaClock):
                offsets[at] = clock.since_ns(forward.anchors[name], mark)
                used.setdefault(name, []).append(mark)
            else:
                offsets[at] = mark - forward.host_anchor
        for name, marks in used.items():
            self._placement.devices[name].give_back([*marks, forward.anchors[name]])
        layers, counts = pending.counts.values()
        self.store.add(
            ForwardRecord(
                forward_index=forward.forward_index,
                step=forward.step,
                lane=forward.lane,
                start_ns=forward.start_ns,
                codes=np.asarray(forward.codes, np.int32),
                offsets=np.maximum(offsets, 0),
                rows=np.asarray(forward.rows, np.int32),
                count_layers=layers,
                counts=counts,
                own_ns=forward.own_ns,
            )
        )

    def _add_place(self, module: "nn.Module", part: Part, codes: Mapping[int, int], plan: int) -> None:
        clock = self._placement.clocks[codes[plan] >> 1]
        is_block = part is Part.BLOCK
        start = StartHook(self, self._state, clock, codes, plan, is_block=is_block)
        end = EndHook(self, self._state, clock, codes, plan, is_block=is_block)
        # Other hooks of the module, those of the capture too, lie outside of what is timed.
        self._handles.append(module.register_forward_pre_hook(start, with_kwargs=True))
        self._handles.append(module.register_forward_hook(end, prepend=True))

    def _add_id_hook(self, plan: int, layer: LayerPlan) -> None:
        module = layer.id_module
        same = frozenset(at for at, each in enumerate(self.plans) if each.id_module is module)
        if module is None or plan != min(same):
            return
        hook = IdHook(self, self._state, plan, same, layer.read_ids)
        if layer.id_moment == "before":
            self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True, prepend=True))
        else:
            self._handles.append(module.register_forward_hook(hook, with_kwargs=True))


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()
    handles.clear()
