"""Sums of real values by groups of whole requests, exact whatever the order in which they are added.

A mean over tokens says nothing of how sure it is, since tokens of one request resemble each other; sums of groups of
requests do (`document_means.ratio_interval`). A request is in group ``hash(request id) mod 20``, as with the blocks of
loads (`moe_debugger.analysis.state`); one more group takes the rows whose request is not known.

Example: values [0.5, 1.5, 4.0] of requests in the groups 3, 3, 7 have sums 2 and 4 there, and the mean 2.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["FRACTION_BITS", "NUM_GROUPS", "UNKNOWN_GROUP", "FixedSums", "RowGroups"]

NUM_GROUPS = 20
UNKNOWN_GROUP = NUM_GROUPS
# Sums are kept as wholes and multiples of 2**-40, in two integers: exact to 1e-12 a value.
FRACTION_BITS = 40
# Beyond this (a logsumexp above 65,536) a router statistic is no statistic any more.
_MAX_VALUE = float(1 << 32)
# So many fractions, and routers' values of usual size, sum up inside 64 bits.
_ROWS_AT_ONCE = 1 << 18

_Floats = npt.NDArray[np.float64]
_I64 = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class RowGroups:
    """The groups of a batch's rows, as runs of neighbours.

    Attributes:
        starts: [r] ascending, first row of each run; the first one is 0.
        numbers: [r] 0..20, group of each run.
    """

    starts: npt.NDArray[np.intp]
    numbers: npt.NDArray[np.intp]


@dataclass(slots=True, eq=False)
class FixedSums:
    """Sums with their sample sizes.

    Attributes:
        wholes, fractions: [21] int64, the sum of each group is ``wholes + fractions * 2**-40``, with fractions in
            0..2**40 - 1.
        counts: [21] int64, values of each group.
    """

    wholes: _I64 = field(default_factory=lambda: np.zeros(NUM_GROUPS + 1, np.int64))
    fractions: _I64 = field(default_factory=lambda: np.zeros(NUM_GROUPS + 1, np.int64))
    counts: _I64 = field(default_factory=lambda: np.zeros(NUM_GROUPS + 1, np.int64))

    def add(self, values: npt.NDArray[np.number[Any]], groups: RowGroups) -> None:
        """Add the values ([n]) of at most 2**32; the others, and NaN, are in no sum and no sample size."""
        for first in range(0, len(values), _ROWS_AT_ONCE):
            rows = slice(first, first + _ROWS_AT_ONCE)
            low = int(np.searchsorted(groups.starts, first, side="right")) - 1
            high = int(np.searchsorted(groups.starts, rows.stop))
            starts = np.maximum(groups.starts[low:high] - first, 0)
            self._add(values[rows].astype(np.float64), starts, groups.numbers[low:high])

    def _add(self, values: _Floats, starts: npt.NDArray[np.intp], numbers: npt.NDArray[np.intp]) -> None:
        usable = np.abs(values) <= _MAX_VALUE
        if usable.all():
            counts: _I64 = np.diff(starts, append=len(values))
        else:
            values = np.where(usable, values, 0.0)
            counts = np.add.reduceat(usable, starts, dtype=np.int64)
        largest = max(float(values.max()), -float(values.min()))
        if largest * len(values) < 1 << (62 - FRACTION_BITS):
            self.add_sums(0, np.add.reduceat(_fixed(values), starts), counts, numbers)
            return
        # One 64-bit sum could overflow: wholes and fractions have one each.
        wholes = np.trunc(values)
        fractions = np.add.reduceat(_fixed(values - wholes), starts)
        self.add_sums(np.add.reduceat(wholes.astype(np.int64), starts), fractions, counts, numbers)

    def add_sums(
        self, wholes: _I64 | int, fractions: _I64 | int, counts: _I64 | int, numbers: npt.NDArray[np.intp] | int
    ) -> None:
        """Add sums ([r], or one for all) of `counts` values to the groups `numbers`; fractions in units of 2**-40."""
        np.add.at(self.wholes, numbers, wholes + (fractions >> FRACTION_BITS))
        np.add.at(self.fractions, numbers, fractions & ((1 << FRACTION_BITS) - 1))
        np.add.at(self.counts, numbers, counts)
        self._carry()

    def plus(self, other: "FixedSums") -> "FixedSums":
        """Return the sums of both."""
        both = FixedSums(self.wholes + other.wholes, self.fractions + other.fractions, self.counts + other.counts)
        both._carry()
        return both

    def _carry(self) -> None:
        self.wholes += self.fractions >> FRACTION_BITS
        self.fractions &= (1 << FRACTION_BITS) - 1

    @property
    def num_values(self) -> int:
        """Sample size of the mean."""
        return int(self.counts.sum())

    @property
    def mean(self) -> float:
        """The mean of all values, NaN without one."""
        total = (int(self.wholes.sum()) << FRACTION_BITS) + int(self.fractions.sum())
        # One rounding, of two exact integers.
        return total / (self.num_values << FRACTION_BITS) if self.num_values else float("nan")

    def by_group(self) -> tuple[_Floats, _Floats]:
        """Return the sums and the sample sizes of the groups that have values, but that of unknown requests."""
        known = np.flatnonzero(self.counts[:NUM_GROUPS])
        sums = self.wholes[known] + self.fractions[known] / float(1 << FRACTION_BITS)
        return sums, self.counts[known].astype(np.float64)


def _fixed(values: _Floats) -> _I64:
    return np.rint(values * (1 << FRACTION_BITS)).astype(np.int64)
