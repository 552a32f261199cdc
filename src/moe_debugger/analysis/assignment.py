"""The best one-to-one matching of two sets by a table of scores (the linear assignment problem).

Example: scores [[3, 2], [2, 0]]: the best matching is 0 -> 1, 1 -> 0 with 4; taking the best first gives 3 + 0.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moe_debugger.errors import InvalidInputError

__all__ = ["MAX_EXACT", "Assignment", "best_assignment"]

_Floats = npt.NDArray[np.float64]
_Ints = npt.NDArray[np.int64]
# Shortest augmenting paths take O(n^3) at worst: 0.015 s for 256 random rows on one core, 0.2 s for 1,000.
MAX_EXACT = 1024


@dataclass(frozen=True, slots=True, eq=False)
class Assignment:
    """A matching of rows with columns.

    Attributes:
        column: [n] int64, the column of each row; each column once.
        total: sum of the scores of the matched pairs.
        upper_bound: no matching has more; equal to `total` (but for rounding) where `is_exact`.
        is_exact: this is the best one, and not only a good one.
    """

    column: _Ints
    total: float
    upper_bound: float
    is_exact: bool


def best_assignment(scores: npt.ArrayLike, *, max_exact: int = MAX_EXACT) -> Assignment:
    """Return the matching with the highest sum of scores.

    Up to `max_exact` rows by shortest augmenting paths (Jonker & Volgenant 1987, in the form of Crouse 2016), which is
    exact, O(n^3). Beyond that by taking the best remaining pair again and again, which is at least half of the best
    where scores are not negative; it is exact all the same where every row's favourite is another column.

    Args:
        scores: [n, n], finite.
        max_exact: most rows for which the exact method is used.

    Raises:
        InvalidInputError: scores are no square table of finite numbers.
    """
    table = np.asarray(scores, dtype=np.float64)
    if table.ndim != 2 or table.shape[0] != table.shape[1]:
        raise InvalidInputError(f"scores have shape {table.shape}, expected a square table")
    if not np.isfinite(table).all():
        raise InvalidInputError("scores hold NaN or infinity; a matching needs finite numbers")
    if not len(table):
        return Assignment(np.zeros(0, np.int64), 0.0, 0.0, True)
    rows = np.arange(len(table))
    favourite = table.argmax(axis=1)
    bound = float(min(table.max(axis=1).sum(), table.max(axis=0).sum()))
    if len(np.unique(favourite)) == len(table):
        return Assignment(favourite.astype(np.int64), bound, bound, True)
    if len(table) <= max_exact:
        column = _shortest_paths(table.max() - table)
        total = float(table[rows, column].sum())
        return Assignment(column, total, total, True)
    column = _greedy(table)
    total = float(table[rows, column].sum())
    return Assignment(column, total, max(bound, total), False)


def _greedy(table: _Floats) -> _Ints:
    """Match pairs that are each other's best among those left, until none is left: the greedy matching, in rounds."""
    column = np.full(len(table), -1, np.int64)
    rows, columns = np.arange(len(table)), np.arange(len(table))
    while len(rows):
        best_column, best_row = table.argmax(axis=1), table.argmax(axis=0)
        is_mutual = best_row[best_column] == np.arange(len(rows))
        column[rows[is_mutual]] = columns[best_column[is_mutual]]
        is_left = np.ones(len(columns), np.bool_)
        is_left[best_column[is_mutual]] = False
        table = table[~is_mutual][:, is_left]
        rows, columns = rows[~is_mutual], columns[is_left]
    return column


def _shortest_paths(cost: _Floats) -> _Ints:
    num = len(cost)
    # Dual prices from column and row minima make most rows free to take a column at once.
    v = cost.min(axis=0)
    u = (cost - v).min(axis=1)
    row_of, column_of = np.full(num, -1, np.int64), np.full(num, -1, np.int64)
    is_tight = cost - u[:, None] - v <= 0
    for row in range(num):
        free = np.flatnonzero(is_tight[row] & (row_of < 0))
        if len(free):
            column_of[row], row_of[free[0]] = free[0], row
    for row in np.flatnonzero(column_of < 0).tolist():
        _augment(cost, u, v, row_of, column_of, row)
    return column_of


def _augment(cost: _Floats, u: _Floats, v: _Floats, row_of: _Ints, column_of: _Ints, start: int) -> None:
    """Give row `start` a column along the cheapest chain of exchanges, and adjust the prices."""
    num = len(cost)
    shortest, via = np.full(num, np.inf), np.full(num, -1, np.int64)
    open_cost = np.full(num, np.inf)
    is_done = np.zeros(num, np.bool_)
    visited: list[int] = []
    row, lowest = start, 0.0
    while True:
        visited.append(row)
        reached = lowest + cost[row] - u[row] - v
        is_better = ~is_done & (reached < shortest)
        shortest[is_better] = reached[is_better]
        open_cost[is_better] = reached[is_better]
        via[is_better] = row
        column = int(open_cost.argmin())
        lowest = float(open_cost[column])
        is_done[column] = True
        open_cost[column] = np.inf
        if row_of[column] < 0:
            break
        row = int(row_of[column])
    others = np.asarray(visited[1:], np.int64)
    u[start] += lowest
    u[others] += lowest - shortest[column_of[others]]
    v[is_done] -= lowest - shortest[is_done]
    while True:
        row = int(via[column])
        row_of[column] = row
        column, column_of[row] = int(column_of[row]), column
        if row == start:
            return
