"""Loads over steps, bounded: a history of all steps, and single steps drawn by hash.

Two questions need more than one sum over all rows. *Since when?* needs the loads in order of steps. *How uneven is one
step?* needs the loads of single steps: an expert that is hot in one step and another in the next sum up to even load,
while every step waits for its hottest expert.

    LoadSeries   loads of all steps in equal buckets of ``2**w`` steps. ``w`` is the smallest for which the steps seen
                 so far fit, so it depends on nothing but the first and the last step: any split and order of the
                 rows gives the same series.
    StepSample   loads of at most S single steps, those with the smallest hash of their number. A step that is among the
                 S smallest of all steps is among them at any earlier time, too, so nothing of it is ever missed; up to
                 S steps all are there, and of more it is a random sample that knows no order.

Example: steps 0..1023 with a capacity of 512 (of 128 experts) give a series of 512 buckets of width 2.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from moe_debugger.analysis._row_runs import distinct, sums_by_group
from moe_debugger.analysis.sketch import mix

__all__ = ["LoadSeries", "StepSample", "sample_capacity", "series_capacity"]

_U64 = npt.NDArray[np.uint64]
_ONE = np.uint64(1)


def series_capacity(num_experts: int) -> int:
    """Return how many buckets a layer's series has: 4,096, fewer for wide layers (bounded memory), 128 at least.

    As long as no two steps share a bucket, an early warning comes as early as it can: 64 experts have 2,048 buckets.
    """
    cells = 1 << 17 if num_experts <= 64 else 1 << 16
    return max(128, min(4096, cells // num_experts))


def sample_capacity(num_experts: int) -> int:
    """Return how many single steps a layer keeps: 64, down to 16 for wide layers (bounded memory)."""
    return max(16, min(64, 4096 // num_experts))


def _shift_for(first: int, last: int, capacity: int) -> int:
    shift = 0
    while (last >> shift) - (first >> shift) >= capacity:
        shift += 1
    return shift


def _grouped(groups: _U64, counts: _U64, num_tokens: _U64) -> tuple[_U64, _U64, _U64]:
    """Return the sums of rows with equal `groups`, by ascending group."""
    names, index = np.unique(groups, return_inverse=True)
    if len(names) == len(groups):
        order = np.argsort(groups, kind="stable")
        return groups[order], counts[order], num_tokens[order]
    summed = np.zeros((len(names), counts.shape[1]), np.uint64)
    np.add.at(summed, index, counts)
    tokens = np.zeros(len(names), np.uint64)
    np.add.at(tokens, index, num_tokens)
    return names, summed, tokens


@dataclass(slots=True)
class LoadSeries:
    """Loads of one layer over steps, in buckets of equal width; see the module's text.

    Attributes:
        shift: a bucket holds ``2**shift`` steps.
        buckets: [n] uint64, ascending: number of the bucket, which is its first step >> shift. Only those with tokens.
        counts: [n, E] uint64, load per expert.
        num_tokens: [n] uint64, valid tokens.
        first, last: exact first and last step; None before the first token.
        low_source, high_source: smallest and largest key of the step's clock; they differ where steps of several
            independent clocks were put together.
    """

    shift: int
    buckets: _U64
    counts: _U64
    num_tokens: _U64
    first: int | None = None
    last: int | None = None
    low_source: int = 0
    high_source: int = 0

    @classmethod
    def empty(cls, num_experts: int) -> Self:
        """Return the series of a layer that has seen nothing."""
        return cls(0, np.zeros(0, np.uint64), np.zeros((0, num_experts), np.uint64), np.zeros(0, np.uint64))

    @property
    def num_experts(self) -> int:
        """E."""
        return int(self.counts.shape[1])

    @property
    def width(self) -> int:
        """Steps per bucket."""
        return 1 << self.shift

    @property
    def first_steps(self) -> _U64:
        """[n] uint64, the first step that each bucket may hold."""
        return self.buckets << np.uint64(self.shift)

    @property
    def has_one_clock(self) -> bool:
        """False where steps of independent sources were put together: their equal numbers mean nothing."""
        return self.low_source == self.high_source

    def fold(self, steps: _U64, ids: npt.NDArray[np.int32], is_load: npt.NDArray[np.bool_], source: int = 0) -> None:
        """Add rows, in place.

        Args:
            steps: [n], step of each valid row.
            ids: [n, k] expert ids.
            is_load: [n, k], slots that are load.
            source: key of the clock that counted the steps; 0 = the global one.
        """
        if not len(steps):
            return
        first, last = int(steps.min()), int(steps.max())
        self._widen(first, last, source)
        local = steps >> np.uint64(self.shift)
        low, num = first >> self.shift, (last >> self.shift) - (first >> self.shift) + 1
        at = (local - np.uint64(low)).astype(np.intp)
        tokens = np.bincount(at, minlength=num).astype(np.uint64)
        experts = self.num_experts
        cells = ids[is_load] if num == 1 else (at[:, None] * experts + ids)[is_load]
        table = np.bincount(cells, minlength=num * experts).astype(np.uint64).reshape(num, experts)
        self._add(np.arange(low, low + num, dtype=np.uint64)[tokens > 0], table[tokens > 0], tokens[tokens > 0])

    def fold_runs(self, steps: _U64, counts: _U64, num_tokens: _U64, source: int = 0) -> None:
        """Add sums of rows, in place.

        Args:
            steps: [s], step of each sum, in any order, also several times.
            counts: [s, E], load.
            num_tokens: [s], valid rows behind each, at least 1.
            source: key of the clock that counted the steps; 0 = the global one.
        """
        if not len(steps):
            return
        first, last = int(steps.min()), int(steps.max())
        self._widen(first, last, source)
        low, num = first >> self.shift, (last >> self.shift) - (first >> self.shift) + 1
        at = ((steps >> np.uint64(self.shift)) - np.uint64(low)).astype(np.intp)
        tokens = sums_by_group(num_tokens, at, num)
        used = tokens > 0
        self._add(np.arange(low, low + num, dtype=np.uint64)[used], sums_by_group(counts, at, num)[used], tokens[used])

    def add_sums(self, step: int, counts: _U64, num_tokens: int, source: int = 0) -> None:
        """Add sums of tokens that ended at `step`, in place."""
        if num_tokens:
            self._widen(step, step, source)
            self._add(
                np.array([step >> self.shift], np.uint64), counts.reshape(1, -1), np.array([num_tokens], np.uint64)
            )

    def _widen(self, first: int, last: int, source: int) -> None:
        if self.first is None or self.last is None:
            self.first, self.last, self.low_source, self.high_source = first, last, source, source
        else:
            self.first, self.last = min(self.first, first), max(self.last, last)
            self.low_source, self.high_source = min(self.low_source, source), max(self.high_source, source)
        shift = _shift_for(self.first, self.last, series_capacity(self.num_experts))
        if shift > self.shift:
            coarse = self.buckets >> np.uint64(shift - self.shift)
            self.buckets, self.counts, self.num_tokens = _grouped(coarse, self.counts, self.num_tokens)
            self.shift = shift

    def _add(self, buckets: _U64, counts: _U64, num_tokens: _U64) -> None:
        if len(buckets) and len(self.buckets):
            at = np.minimum(np.searchsorted(self.buckets, buckets), len(self.buckets) - 1)
            if (self.buckets[at] == buckets).all():
                # The usual case, more rows of known buckets: nothing moves.
                np.add.at(self.counts, at, counts)
                np.add.at(self.num_tokens, at, num_tokens)
                return
        self.buckets, self.counts, self.num_tokens = _grouped(
            np.concatenate([self.buckets, buckets]),
            np.concatenate([self.counts, counts]),
            np.concatenate([self.num_tokens, num_tokens]),
        )

    def merge(self, other: "LoadSeries") -> "LoadSeries":
        """Return the series of both sets of rows."""
        merged = LoadSeries(
            self.shift,
            self.buckets.copy(),
            self.counts.copy(),
            self.num_tokens.copy(),
            self.first,
            self.last,
            self.low_source,
            self.high_source,
        )
        if other.first is None or other.last is None:
            return merged
        merged._widen(other.first, other.last, other.low_source)
        merged.high_source = max(merged.high_source, other.high_source)
        # A series of wider buckets has a range that needs them, and so has the merged one.
        fine = other.buckets >> np.uint64(merged.shift - other.shift)
        merged._add(*_grouped(fine, other.counts, other.num_tokens))
        return merged


@dataclass(slots=True)
class StepSample:
    """Loads of single steps of one layer, drawn by hash; see the module's text.

    Attributes:
        hashes: [s] uint64, ascending; the order is that of the draw, not of time.
        steps: [s] uint64.
        counts: [s, E] uint64, load per expert.
        num_tokens: [s] uint64, valid tokens.
    """

    hashes: _U64
    steps: _U64
    counts: _U64
    num_tokens: _U64

    @classmethod
    def empty(cls, num_experts: int) -> Self:
        """Return the sample of a layer that has seen nothing."""
        none = np.zeros(0, np.uint64)
        return cls(none, none.copy(), np.zeros((0, num_experts), np.uint64), none.copy())

    @property
    def is_whole(self) -> bool:
        """True where it holds every step that the layer has seen (it never had to leave one out)."""
        return len(self.steps) < sample_capacity(self.counts.shape[1])

    def fold(self, steps: _U64, ids: npt.NDArray[np.int32], is_load: npt.NDArray[np.bool_], source: int = 0) -> None:
        """Add rows, in place; see `LoadSeries.fold`."""
        if not len(steps):
            return
        experts = self.counts.shape[1]
        chosen = self._chosen(distinct(steps), source)
        if not len(chosen):
            return
        at = np.minimum(np.searchsorted(chosen, steps), len(chosen) - 1)
        rows = chosen[at] == steps
        if not rows.all():
            at, ids, is_load = at[rows], ids[rows], is_load[rows]
        cells = (at[:, None] * experts + ids)[is_load]
        table = np.bincount(cells, minlength=len(chosen) * experts).astype(np.uint64).reshape(-1, experts)
        tokens = np.bincount(at, minlength=len(chosen)).astype(np.uint64)
        self._add(_step_hashes(chosen, source), chosen, table, tokens)

    def fold_runs(self, steps: _U64, counts: _U64, num_tokens: _U64, source: int = 0) -> None:
        """Add sums of rows, in place; see `LoadSeries.fold_runs`."""
        if not len(steps):
            return
        chosen = self._chosen(distinct(steps), source)
        if not len(chosen):
            return
        at = np.minimum(np.searchsorted(chosen, steps), len(chosen) - 1)
        is_mine = chosen[at] == steps
        if not is_mine.all():
            at, counts, num_tokens = at[is_mine], counts[is_mine], num_tokens[is_mine]
        table, tokens = sums_by_group(counts, at, len(chosen)), sums_by_group(num_tokens, at, len(chosen))
        self._add(_step_hashes(chosen, source), chosen, table, tokens)

    def _chosen(self, seen: _U64, source: int) -> _U64:
        """Return which of the different steps `seen` may be in the sample, ascending."""
        capacity = sample_capacity(self.counts.shape[1])
        hashes = _step_hashes(seen, source)
        order = np.argsort(hashes)[:capacity]
        if len(self.hashes) >= capacity:
            order = order[hashes[order] <= self.hashes[-1]]
        return np.sort(seen[order])

    def add_sums(self, step: int, counts: _U64, num_tokens: int, source: int = 0) -> None:
        """Add sums of tokens of the one step `step`, in place."""
        if num_tokens:
            steps = np.array([step], np.uint64)
            tokens = np.array([num_tokens], np.uint64)
            self._add(_step_hashes(steps, source), steps, counts.reshape(1, -1), tokens)

    def _add(self, hashes: _U64, steps: _U64, counts: _U64, num_tokens: _U64) -> None:
        all_hashes = np.concatenate([self.hashes, hashes])
        by_hash = dict(zip(all_hashes.tolist(), np.concatenate([self.steps, steps]).tolist(), strict=True))
        kept, summed, tokens = _grouped(
            all_hashes, np.concatenate([self.counts, counts]), np.concatenate([self.num_tokens, num_tokens])
        )
        capacity = sample_capacity(self.counts.shape[1])
        self.hashes, self.counts, self.num_tokens = kept[:capacity], summed[:capacity], tokens[:capacity]
        self.steps = np.array([by_hash[name] for name in self.hashes.tolist()], np.uint64)

    def merge(self, other: "StepSample") -> "StepSample":
        """Return the sample of both sets of rows."""
        merged = StepSample(self.hashes, self.steps, self.counts, self.num_tokens)
        merged._add(other.hashes, other.steps, other.counts, other.num_tokens)
        return merged


def _step_hashes(steps: _U64, source: int) -> _U64:
    return mix(steps ^ mix(np.array([source], np.uint64)))
