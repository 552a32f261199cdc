"""From marks to spans: which begin belongs to which end, and what lies between the parts of a block. Pure numpy.

Glossary:
    span  one call of one part: when it began, how long it took, what it was given.
    call  the number of a block's call within its forward, from 0; every part inside carries its block's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .places import Layout, Part
from .store import ForwardRecord

__all__ = ["BlockCalls", "Gaps", "Places", "Spans", "block_calls", "spans_of"]

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Places:
    """What the codes of records mean: layer (plan), part and expert of each place, [p] int32."""

    layers: npt.NDArray[np.int32]
    parts: npt.NDArray[np.int32]
    experts: npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Spans:
    """s spans, ordered by forward, then by their begin.

    Attributes:
        record: [s] index of the forward among the records.
        layer, part, expert: [s]; layer is the plan's position, -1 = none.
        call: [s], -1 = outside of a block of its layer.
        start, duration: [s] nanoseconds; the start since the begin of the forward.
        rows: [s] rows that the part was given, 0 where they are not seen.
        num_unmatched: marks without a partner: their module was called by itself, or raised.
    """

    record: Ints
    layer: Ints
    part: Ints
    expert: Ints
    call: Ints
    start: Ints
    duration: Ints
    rows: Ints
    num_unmatched: int = 0

    def __len__(self) -> int:
        return len(self.record)

    @property
    def end(self) -> Ints:
        """[s] nanoseconds since the begin of the forward."""
        return self.start + self.duration


def spans_of(records: Sequence[ForwardRecord], places: Places) -> Spans:
    """Pair begins and ends: the k-th begin of a place in a forward belongs to its k-th end."""
    sizes = [len(record.codes) for record in records]
    record = np.repeat(np.arange(len(records)), sizes)
    codes = _joined([one.codes for one in records])
    offsets, rows = _joined([one.offsets for one in records]), _joined([one.rows for one in records])
    place, is_end = codes >> 1, (codes & 1).astype(bool)
    order = np.arange(len(codes))
    call = _calls(record, places.layers[place], ~is_end & (places.parts[place] == Part.BLOCK))
    starts = np.flatnonzero(~is_end)
    ends = np.flatnonzero(is_end)
    starts = starts[np.lexsort((order[starts], place[starts], record[starts]))]
    ends = ends[np.lexsort((order[ends], place[ends], record[ends]))]
    starts, ends, num_unmatched = _partners(starts, ends, record, place, len(places.parts))
    # Back to the order in time.
    back = np.argsort(starts, kind="stable")
    starts, ends = starts[back], ends[back]
    where = place[starts]
    return Spans(
        record=record[starts],
        layer=places.layers[where].astype(np.int64),
        part=places.parts[where].astype(np.int64),
        expert=places.experts[where].astype(np.int64),
        call=call[starts],
        start=offsets[starts],
        duration=np.maximum(offsets[ends] - offsets[starts], 0),
        rows=rows[starts],
        num_unmatched=num_unmatched,
    )


def _joined(arrays: Sequence[npt.NDArray[np.int32] | Ints]) -> Ints:
    return np.concatenate([np.zeros(0, np.int64), *arrays]).astype(np.int64)


def _calls(record: Ints, layer: npt.NDArray[np.int32], is_block: npt.NDArray[np.bool_]) -> Ints:
    """Return [m] the number of the layer's block calls begun so far in the forward, less one."""
    if not len(record):
        return np.zeros(0, np.int64)
    order = np.lexsort((np.arange(len(record)), layer, record))
    begun = np.cumsum(is_block[order])
    is_new = np.ones(len(order), bool)
    is_new[1:] = (np.diff(record[order]) != 0) | (np.diff(layer[order]) != 0)
    before: Ints = (begun - is_block[order])[is_new]
    calls = np.empty(len(order), np.int64)
    calls[order] = begun - before[np.cumsum(is_new) - 1] - 1
    return calls


def _partners(starts: Ints, ends: Ints, record: Ints, place: Ints, num_places: int) -> tuple[Ints, Ints, int]:
    """Drop the places of forwards where there are not as many ends as begins."""
    start_keys, end_keys = record[starts] * num_places + place[starts], record[ends] * num_places + place[ends]
    if np.array_equal(start_keys, end_keys):
        return starts, ends, 0
    keys, start_counts = np.unique(start_keys, return_counts=True)
    other, end_counts = np.unique(end_keys, return_counts=True)
    common, at, at_other = np.intersect1d(keys, other, return_indices=True)
    whole = common[start_counts[at] == end_counts[at_other]]
    kept, kept_ends = starts[np.isin(start_keys, whole)], ends[np.isin(end_keys, whole)]
    return kept, kept_ends, len(starts) + len(ends) - len(kept) - len(kept_ends)


@dataclass(frozen=True, slots=True)
class Gaps:
    """g stretches of a block's time in which no measured part ran; they overlap neither each other nor such a part.

    Attributes:
        call: [g] which of the calls, in their order.
        part: [g] `Part.DISPATCH`, `Part.COMBINE` or `Part.REST`.
        start, duration: [g] nanoseconds; the start since the begin of the forward; durations are above 0.
    """

    call: Ints
    part: Ints
    start: Ints
    duration: Ints

    def __len__(self) -> int:
        return len(self.call)

    def total(self, part: Part, num_calls: int) -> npt.NDArray[np.float64]:
        """Return [num_calls] the time of a part."""
        own = self.part == part
        return np.bincount(self.call[own], self.duration[own], minlength=num_calls).astype(np.float64)


@dataclass(frozen=True, slots=True)
class BlockCalls:
    """b calls of one layer's block, in time; times in nanoseconds, NaN where there is no such number.

    Attributes:
        record, call: [b] which forward, and which call in it.
        start: [b] since the begin of the forward.
        rows: [b] rows that the block was given.
        block, router, experts, shared, wait, dispatch, combine, rest: [b] float64. `experts` is the call of the experts
            module, or the sum over the modules of its experts. `rest` is what remains of the block.
        dispatch_start, combine_start: [b], NaN where there is no such number.
        gaps: the stretches that dispatch, combine and rest are the sums of.
        expert_times: [b, E] float64, 0 where an expert was not called; None where experts are no modules.
        expert_rows: [b, E] int64; None where they are not known.
    """

    record: Ints
    call: Ints
    start: Ints
    rows: Ints
    block: npt.NDArray[np.float64]
    router: npt.NDArray[np.float64]
    experts: npt.NDArray[np.float64]
    shared: npt.NDArray[np.float64]
    wait: npt.NDArray[np.float64]
    dispatch: npt.NDArray[np.float64]
    combine: npt.NDArray[np.float64]
    rest: npt.NDArray[np.float64]
    dispatch_start: npt.NDArray[np.float64]
    combine_start: npt.NDArray[np.float64]
    gaps: Gaps
    expert_times: npt.NDArray[np.float64] | None
    expert_rows: Ints | None

    def __len__(self) -> int:
        return len(self.record)

    @property
    def num_experts(self) -> int:
        """E; 0 where the experts' rows are not known."""
        return 0 if self.expert_rows is None else self.expert_rows.shape[1]


def block_calls(
    spans: Spans, records: Sequence[ForwardRecord], layer: int, layout: Layout, num_experts: int
) -> BlockCalls:
    """Return the calls of one layer's block with the times of its parts."""
    own = spans.layer == layer
    blocks = np.flatnonzero(own & (spans.part == Part.BLOCK))
    width = int(spans.call.max(initial=0)) + 2
    keys = spans.record[blocks] * width + spans.call[blocks]
    inside = np.flatnonzero(own & (spans.part != Part.BLOCK) & (spans.call >= 0))
    inside = inside[np.isin(spans.record[inside] * width + spans.call[inside], keys)]
    at = np.searchsorted(keys, spans.record[inside] * width + spans.call[inside])
    parts, n = _Parts(spans, inside, at, len(blocks)), len(blocks)
    compute = Part.EXPERT if layout == "modules" else Part.EXPERTS
    first, last = parts.first_start(compute), parts.last_end(compute)
    router_end = parts.last_end(Part.ROUTER)
    block_start, block_end = spans.start[blocks], spans.end[blocks]
    experts, router, shared = parts.total(compute), parts.total(Part.ROUTER), parts.total(Part.SHARED)
    is_told_apart = layout in ("modules", "dense")
    # A router that runs after its experts, or experts that were not called, leave nothing to tell apart.
    dispatch_start = np.where(is_told_apart & (router_end <= first), router_end, np.nan)
    combine_start = np.where(is_told_apart & (last <= block_end), last, np.nan)
    call, start, end = parts.gaps(block_start, block_end, compute)
    kind = np.full(len(call), int(Part.REST))
    kind[(start >= dispatch_start[call]) & (end <= first[call])] = Part.DISPATCH
    kind[start >= combine_start[call]] = Part.COMBINE
    gaps = Gaps(call, kind, start, end - start)
    times, rows = _by_expert(parts, n, num_experts) if layout == "modules" else (None, None)
    if rows is None:
        rows = _counted(records, spans.record[blocks], spans.call[blocks], layer, num_experts)
    if layout == "dense":
        rows = np.repeat(spans.rows[blocks][:, None], num_experts, axis=1)
    return BlockCalls(
        record=spans.record[blocks],
        call=spans.call[blocks],
        start=spans.start[blocks],
        rows=spans.rows[blocks],
        block=spans.duration[blocks].astype(float),
        router=router,
        experts=np.full(n, np.nan) if layout == "whole" else experts,
        shared=shared,
        wait=parts.total(Part.WAIT),
        dispatch=np.where(np.isnan(dispatch_start), np.nan, gaps.total(Part.DISPATCH, n)),
        combine=np.where(np.isnan(combine_start), np.nan, gaps.total(Part.COMBINE, n)),
        rest=gaps.total(Part.REST, n),
        dispatch_start=dispatch_start,
        combine_start=combine_start,
        gaps=gaps,
        expert_times=times,
        expert_rows=rows,
    )


class _Parts:
    """The spans inside the calls of a block: `inside` [i], each in call `at` [i] of n."""

    def __init__(self, spans: Spans, inside: Ints, at: Ints, n: int) -> None:
        self.at, self.n = at, n
        self.part, self.expert = spans.part[inside], spans.expert[inside]
        self.start, self.end = spans.start[inside].astype(float), spans.end[inside].astype(float)
        self.duration, self.rows = spans.duration[inside].astype(float), spans.rows[inside]

    def _chosen(self, parts: Sequence[Part]) -> npt.NDArray[np.bool_]:
        return np.isin(self.part, parts)

    def total(self, *parts: Part) -> npt.NDArray[np.float64]:
        chosen = self._chosen(parts)
        return self._sums(self.at[chosen], self.duration[chosen])

    def first_start(self, *parts: Part) -> npt.NDArray[np.float64]:
        chosen, found = self._chosen(parts), np.full(self.n, np.inf)
        np.minimum.at(found, self.at[chosen], self.start[chosen])
        return np.where(np.isinf(found), np.nan, found)

    def last_end(self, *parts: Part) -> npt.NDArray[np.float64]:
        chosen, found = self._chosen(parts), np.full(self.n, -np.inf)
        np.maximum.at(found, self.at[chosen], self.end[chosen])
        return np.where(np.isinf(found), np.nan, found)

    def gaps(self, block_start: Ints, block_end: Ints, compute: Part) -> tuple[Ints, Ints, Ints]:
        """Return call, begin and end of what no part covers; a wait inside of the experts is the experts'."""
        chosen = np.flatnonzero(self._chosen((Part.ROUTER, Part.SHARED, Part.WAIT, compute)))
        # A list of experts that is itself called lies around them: it covers nothing, but no gap reaches over its ends.
        around = np.flatnonzero(self._chosen((Part.EXPERTS,))) if compute is Part.EXPERT else chosen[:0]
        at = np.concatenate([self.at[chosen], self.at[around], self.at[around], np.arange(self.n)])
        edges = [self.start[around], self.end[around]]
        start = np.concatenate([self.start[chosen], *edges, block_end]).astype(np.int64)
        end = np.concatenate([self.end[chosen], *edges, block_end]).astype(np.int64)
        start = np.minimum(start, block_end[at])
        # Each call on a stretch of its own, so that one running maximum serves all of them.
        stretch = int(end.max(initial=0)) + 1
        order = np.argsort(at * stretch + start, kind="stable")
        at, start, end = at[order], start[order], end[order]
        reached = np.maximum.accumulate(at * stretch + end) - at * stretch
        began = np.concatenate([np.zeros(min(1, len(at)), np.int64), reached[:-1]])
        is_first = np.diff(at, prepend=-1) != 0
        began[is_first] = block_start[at[is_first]]
        is_gap = start > began
        return at[is_gap], began[is_gap], start[is_gap]

    def _sums(self, at: Ints, values: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        # Without any weight numpy counts in integers.
        return np.bincount(at, values, minlength=self.n).astype(np.float64)


def _by_expert(parts: _Parts, n: int, num_experts: int) -> tuple[npt.NDArray[np.float64], Ints]:
    chosen = parts.part == Part.EXPERT
    place = parts.at[chosen] * num_experts + parts.expert[chosen]
    times = np.bincount(place, parts.duration[chosen], minlength=n * num_experts).astype(np.float64)
    rows = np.bincount(place, parts.rows[chosen], minlength=n * num_experts).astype(np.int64)
    return times.reshape(n, num_experts), rows.reshape(n, num_experts)


def _counted(records: Sequence[ForwardRecord], record: Ints, call: Ints, layer: int, num_experts: int) -> Ints | None:
    """Return [b, E] the rows of each expert; None where any call was not counted: half a table would mislead."""
    rows = np.zeros((len(record), num_experts), np.int64)
    found: dict[int, npt.NDArray[np.int64]] = {}
    for place, (index, nth) in enumerate(zip(record.tolist(), call.tolist(), strict=True)):
        if index not in found:
            found[index] = np.flatnonzero(records[index].count_layers == layer)
        if nth >= len(found[index]):
            return None
        rows[place] = records[index].counts[found[index][nth], :num_experts]
    return rows if len(record) else None
