"""Rows in runs: neighbours that agree are looked at once, which is most of the speed of folding.

Rows of a session stand forward after forward, layer after layer, and within a layer request after request. So whatever
is asked of a row's request, step or stretch of positions has one answer for a run of neighbours. Nothing here depends
on the order but the time: rows in any order give the same sums.

Example: values [7, 7, 9, 7] have run starts [0, 2, 3]; tables [[1, 0], [0, 2], [3, 3]] of the groups [1, 0, 1] sum up
to [[0, 2], [4, 3]].
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["RowsOf", "distinct", "load_of_runs", "rows_of_each", "run_starts", "sums_by_group"]

_Ints = npt.NDArray[np.intp]
_U64 = npt.NDArray[np.uint64]
_ROWS_AT_ONCE = 1 << 14
# Rows of a run from which copying slices beats picking rows one by one.
_LONG_RUN = 256


@dataclass(frozen=True, slots=True)
class RowsOf:
    """Some rows of columns, as runs of neighbours.

    Attributes:
        starts, ends: [r] ascending; the rows are those of all ``starts[i]:ends[i]``.
    """

    starts: _Ints
    ends: _Ints

    def __len__(self) -> int:
        return int((self.ends - self.starts).sum())

    def of(self, column: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Return these rows of `column` ([n, ...]); a view where they are neighbours all."""
        if len(self.starts) == 1:
            return column[self.starts[0] : self.ends[0]]
        if len(self) >= _LONG_RUN * len(self.starts):
            parts = zip(self.starts.tolist(), self.ends.tolist(), strict=True)
            return np.concatenate([column[start:end] for start, end in parts])
        return column.take(self.starts if len(self) == len(self.starts) else self.indices, axis=0)

    @property
    def indices(self) -> _Ints:
        """[n] the rows."""
        lengths = self.ends - self.starts
        # What was left out before each run.
        skipped = np.repeat(self.starts - (np.cumsum(lengths) - lengths), lengths)
        rows: _Ints = np.arange(len(self)) + skipped
        return rows


def rows_of_each(values: npt.NDArray[Any]) -> dict[int, RowsOf]:
    """Return the rows of each different value, by ascending value."""
    if not len(values):
        return {}
    starts = run_starts(values)
    if len(starts) * 2 > len(values):
        # Runs that are hardly any: each row is one by itself.
        starts = np.arange(len(values))
        ends = starts + 1
        owner = values
    else:
        ends = np.append(starts[1:], len(values))
        owner = values[starts]
    if owner.dtype.itemsize > 2 and owner.min() >= 0 and owner.max() < 2**16:
        # Sorted by counting: where layers alternate, there is a run for each row.
        owner = owner.astype(np.uint16)
    order = np.argsort(owner, kind="stable")
    bounds = run_starts(owner[order]).tolist()
    groups = [order[first:last] for first, last in zip(bounds, [*bounds[1:], len(order)], strict=True)]
    return {int(owner[group[0]]): RowsOf(starts[group], ends[group]) for group in groups}


def run_starts(*columns: npt.NDArray[Any]) -> _Ints:
    """Return the indices of rows that differ from the row before in any of `columns` ([n] each); the first is one."""
    num = len(columns[0])
    is_start = np.ones(num, np.bool_)
    if num > 1:
        np.not_equal(columns[0][1:], columns[0][:-1], out=is_start[1:])
        for column in columns[1:]:
            is_start[1:] |= column[1:] != column[:-1]
    return np.flatnonzero(is_start)


def distinct(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return the different values, ascending."""
    # Hashing or sorting one row of each run is much less than all.
    found: npt.NDArray[Any] = np.unique(values[run_starts(values)])
    return found


def load_of_runs(
    ids: npt.NDArray[np.int32], is_load: npt.NDArray[np.bool_] | None, starts: _Ints, num_experts: int
) -> _U64:
    """Return [s, E] uint64, the load of each run of rows.

    Args:
        ids: [n, k] expert ids.
        is_load: [n, k], slots that are load; None = all of them.
        starts: [s] first row of each run.
        num_experts: E.
    """
    table = np.empty((len(starts), num_experts), np.uint64)
    ends = np.append(starts[1:], len(ids))
    # Part by part, so that what is computed of each row stays in the cache.
    first = 0
    while first < len(starts):
        last = max(int(np.searchsorted(ends, starts[first] + _ROWS_AT_ONCE, side="right")), first + 1)
        rows = slice(int(starts[first]), int(ends[last - 1]))
        lengths = ends[first:last] - starts[first:last]
        offset = np.repeat(np.arange(last - first, dtype=np.intp) * num_experts, lengths)
        cells = ids[rows] + offset[:, None]
        flat = cells.ravel() if is_load is None else cells[is_load[rows]]
        sums = np.bincount(flat, minlength=(last - first) * num_experts)
        table[first:last] = sums.reshape(last - first, num_experts)
        first = last
    return table


def sums_by_group(table: npt.NDArray[Any], groups: npt.NDArray[Any], num_groups: int) -> _U64:
    """Return [num_groups, ...] uint64, the sum of the rows of `table` of each group.

    Args:
        table: [s, E] or [s].
        groups: [s] in 0..num_groups - 1.
        num_groups: groups, those without a row among them.
    """
    result = np.zeros((num_groups, *table.shape[1:]), np.uint64)
    if not len(table):
        return result
    groups = groups.astype(np.intp, copy=False)
    if (groups[1:] < groups[:-1]).any():
        order = np.argsort(groups, kind="stable")
        groups, table = groups[order], table[order]
    starts = run_starts(groups)
    result[groups[starts]] = np.add.reduceat(table, starts, axis=0, dtype=np.uint64)
    return result
