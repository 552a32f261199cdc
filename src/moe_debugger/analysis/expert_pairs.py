"""Counts of pairs of experts over tokens, in bounded memory, and the pairs that stand out.

A table of E x E' counts is made in stripes of rows, so that at most 4 million cells are in memory at a time however
many experts there are; each stripe is one `bincount`, and no loop runs over experts or tokens.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moe_debugger.analysis.intervals import MIN_BLOCKS, Interval, student_quantile
from moe_debugger.analysis.token_rows import Floats, Ints, block_sums

__all__ = ["MAX_DENSE_EXPERTS", "ExpertPair", "PairCandidates", "pair_stripes"]

# Up to here whole tables are kept (2 MiB each); beyond, only the pairs that stand out.
MAX_DENSE_EXPERTS = 512
_MAX_CELLS = 1 << 22
_MAX_CODES = 1 << 21

_Experts = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class ExpertPair:
    """Two experts that tokens use together.

    Attributes:
        first, second: expert ids; of two layers, `first` is the earlier layer's.
        num_tokens: tokens that use both, N_ij.
        num_first, num_second: tokens that use each, N_i and N_j: the sample sizes.
        conditional: P(second | first) = N_ij / N_i.
        lift: N_ij T / (N_i N_j), with `lift_interval`: two-sided 95 %, from blocks of whole requests; NaN without.
            Pairs that were picked because they stand out read high.
    """

    first: int
    second: int
    num_tokens: int
    num_first: int
    num_second: int
    conditional: float
    lift: float
    lift_interval: Interval


def pair_stripes(
    a: _Experts, num_a: int, b: _Experts, num_b: int, *, max_cells: int = _MAX_CELLS
) -> Iterator[tuple[int, Ints]]:
    """Yield (first row, N[rows, num_b]), stripe by stripe: N_ij = rows of tokens with expert i in `a` and j in `b`.

    Args:
        a: [n, k] sets; `num_a` stands for "no expert".
        num_a: experts of `a`.
        b: [n, k'] sets of the same tokens; `num_b` stands for "no expert".
        num_b: experts of `b`.
        max_cells: cells in memory at a time (at least one row).
    """
    height = max(1, min(num_a, max_cells // (num_b + 1)))
    if height == num_a:
        num_pairs = max(1, a.shape[1] * b.shape[1])
        table = np.zeros((num_a + 1) * (num_b + 1), np.int64)
        for chunk in _chunks(len(a), max(1, _MAX_CODES // num_pairs)):
            # Slots first, so that numpy's inner loops run over tokens.
            one = np.ascontiguousarray(a[chunk].T, np.int64) * (num_b + 1)
            two = np.ascontiguousarray(b[chunk].T, np.int64)
            codes = one[:, None, :] + two[None, :, :]
            table += np.bincount(codes.reshape(-1), minlength=table.size)
        yield 0, table.reshape(num_a + 1, num_b + 1)[:num_a, :num_b]
        return
    slots = a.reshape(-1)
    order = np.argsort(slots, kind="stable")
    bounds = np.searchsorted(slots[order], np.arange(0, num_a + height, height))
    for number, first in enumerate(range(0, num_a, height)):
        rows = min(height, num_a - first)
        table = np.zeros(rows * (num_b + 1), np.int64)
        own = order[bounds[number] : bounds[number + 1]]
        own = own[slots[own] < num_a]
        for chunk in _chunks(len(own), max(1, _MAX_CODES // max(1, b.shape[1]))):
            part = own[chunk]
            codes = (slots[part].astype(np.int64) - first)[:, None] * (num_b + 1) + b[part // a.shape[1]]
            table += np.bincount(codes.reshape(-1), minlength=table.size)
        yield first, table.reshape(rows, num_b + 1)[:, :num_b]


def _chunks(total: int, size: int) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, total, size))


class PairCandidates:
    """The pairs seen more often than expected, by likelihood ratio (Dunning 1993): rare pairs do not win by luck.

    Args:
        a, b: sets of the same tokens, as in `pair_stripes`.
        num_pairs: how many to keep.
        expected_lift: lift of a pair that nothing binds together.
        is_unordered: the pairs are of one layer, so (i, j) is (j, i), and (i, i) is none.
    """

    def __init__(
        self, a: _Experts, b: _Experts, *, num_pairs: int, expected_lift: float = 1.0, is_unordered: bool = False
    ) -> None:
        self._a, self._b = a, b
        self._num_pairs, self._expected_lift, self._is_unordered = num_pairs, expected_lift, is_unordered
        self._best: list[tuple[float, int, int, int]] = []

    def add(self, first: int, table: Ints, num_a: Ints, num_b: Ints) -> None:
        """Look at a stripe; `num_a` and `num_b` are N_i of all experts of either side."""
        total = len(self._a)
        if not total or not self._num_pairs:
            return
        own = num_a[first : first + len(table)]
        expected = own[:, None] * (num_b * (self._expected_lift / total))[None, :]
        is_more = table > expected
        if self._is_unordered:
            is_more &= np.arange(len(num_b))[None, :] > (first + np.arange(len(table)))[:, None]
        i, j = np.nonzero(is_more)
        seen, wanted = table[i, j].astype(np.float64), expected[i, j]
        ratio = 2 * (seen * np.log(seen / wanted) - (seen - wanted))
        if len(ratio) > self._num_pairs:
            floor = np.partition(ratio, len(ratio) - self._num_pairs)[len(ratio) - self._num_pairs]
            kept = np.flatnonzero(ratio >= floor)[: 4 * self._num_pairs]
            i, j, seen, ratio = i[kept], j[kept], seen[kept], ratio[kept]
        found = zip((-ratio).tolist(), (i + first).tolist(), j.tolist(), seen.astype(np.int64).tolist(), strict=True)
        self._best = sorted([*self._best, *found])[: self._num_pairs]

    def pairs(self, num_a: Ints, num_b: Ints, block: Ints, num_blocks: int) -> tuple[ExpertPair, ...]:
        """Return the pairs kept, most telling first, each with its interval."""
        total = len(self._a)
        tokens = block_sums(block, num_blocks)
        # Slots first, so that numpy's inner loops run over tokens.
        one, two = np.ascontiguousarray(self._a.T), np.ascontiguousarray(self._b.T)
        uses_a = {i: (one == i).any(axis=0) for i in {i for _, i, _, _ in self._best}}
        uses_b = {j: (two == j).any(axis=0) for j in {j for _, _, j, _ in self._best}}
        sums_a = {i: block_sums(block[uses], num_blocks) for i, uses in uses_a.items()}
        sums_b = {j: block_sums(block[uses], num_blocks) for j, uses in uses_b.items()}
        found = []
        for _, i, j, seen in self._best:
            both = block_sums(block[uses_a[i] & uses_b[j]], num_blocks)
            lift = seen * total / (int(num_a[i]) * int(num_b[j]))
            interval = _lift_interval(lift, both, sums_a[i], sums_b[j], tokens)
            found.append(ExpertPair(i, j, seen, int(num_a[i]), int(num_b[j]), seen / int(num_a[i]), lift, interval))
        return tuple(found)


def _lift_interval(lift: float, both: Floats, first: Floats, second: Floats, tokens: Floats) -> Interval:
    """Return the 95 % interval of a lift: the logarithm's, linearised over blocks."""
    is_occupied = tokens > 0
    num = int(is_occupied.sum())
    kish = float(tokens.sum()) ** 2 / float(np.square(tokens).sum()) if num else 0.0
    if kish < MIN_BLOCKS or not both.sum():
        return Interval(math.nan, math.nan)
    parts = both / both.sum() + tokens / tokens.sum() - first / first.sum() - second / second.sum()
    error = math.sqrt(num / (num - 1) * float(np.square(parts[is_occupied]).sum()))
    width = student_quantile(kish - 1) * error
    # Beyond e^700 a float ends; an interval that wide says "unknown" already.
    return Interval(lift * math.exp(-min(width, 700.0)), lift * math.exp(min(width, 700.0)))
