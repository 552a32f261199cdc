"""From matching rows to the rows of a result: chosen, grouped, sorted and cut, batch by batch in bounded memory."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_debugger.query.binding import AggregateSpec, Plan
from moe_debugger.query.columns import ColumnSpec, Kind
from moe_debugger.query.derive import TooManyGroupsError
from moe_debugger.query.result import ResultColumn
from moe_debugger.query.table import Column

__all__ = ["Gathered", "Groups", "Rows", "gatherer"]

Array = npt.NDArray[Any]
Columns = Callable[[str], Column]
# Sorted rows are cut back to the limit when there are so many times as many.
_SLACK, _MIN_KEPT = 4, 8192


class Gathered:
    """Columns of a result, and how many rows matched."""

    def __init__(self, columns: Sequence[ResultColumn], num_matched: int) -> None:
        self.columns = tuple(columns)
        self.num_matched = num_matched


def gatherer(plan: Plan, max_groups: int) -> "Rows | Groups":
    """Return what takes in the matching rows of a plan."""
    return Groups(plan, max_groups) if plan.is_grouped else Rows(plan)


class Rows:
    """Rows as they are: the first ones, or the first ones in an order.

    Attributes:
        is_full: no further row can become one of the result.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._names = tuple(dict.fromkeys([*plan.shown, *(key.label for key in plan.order)]))
        self._pieces: list[dict[str, _Plain]] = []
        self._num_kept = 0
        self.num_matched = 0
        self.is_full = False

    def add(self, columns: Columns, rows: Array) -> None:
        """Take in the rows of a batch with the indexes `rows`."""
        self.num_matched += len(rows)
        if not self._plan.order:
            # One more than asked for shows that there are more.
            rows = rows[: self._plan.limit + 1 - self._num_kept]
        self._num_kept += len(rows)
        if len(rows):
            self._pieces.append({name: _Plain.of(columns(name).take(rows)) for name in self._names})
        if not self._plan.order:
            self.is_full = self._num_kept > self._plan.limit
        elif self._num_kept > max(_MIN_KEPT, _SLACK * self._plan.limit):
            self._cut()

    def _cut(self) -> None:
        whole = {name: _Plain.join([piece[name] for piece in self._pieces]) for name in self._names}
        keys = [(whole[key.label], key.is_descending) for key in self._plan.order]
        order = _sorted(keys, self._num_kept) if keys else np.arange(self._num_kept)
        # In the order in which they came, so that rows of equal keys stay so.
        kept = order[: self._plan.limit]
        self._pieces = [{name: plain.take(kept) for name, plain in whole.items()}]
        self._num_kept = len(kept)

    def finish(self) -> Gathered:
        """Return the result."""
        if self._pieces:
            self._cut()
        columns = [
            self._result(self._plan.columns[name], self._pieces[0][name] if self._pieces else None)
            for name in self._plan.shown
        ]
        return Gathered(columns, self.num_matched)

    @staticmethod
    def _result(column: ColumnSpec, plain: "_Plain | None") -> ResultColumn:
        return ResultColumn(column.name, column.kind, column.unit, () if plain is None else tuple(plain.to_list()))


class Groups:
    """Rows by the values of columns, and aggregates of each group.

    Raises:
        TooManyGroupsError: by `add`.
    """

    is_full = False

    def __init__(self, plan: Plan, max_groups: int) -> None:
        self._plan = plan
        self._max_groups = max_groups
        self._groups: dict[tuple[Any, ...], list[_Sum]] = {}
        if not plan.by:
            self._groups[()] = [_Sum(each) for each in plan.aggregates]

    def add(self, columns: Columns, rows: Array) -> None:
        """Take in the rows of a batch with the indexes `rows`."""
        rows, keys = self._keys(columns, rows)
        if not len(rows):
            return
        place = np.zeros(len(rows), np.int64)
        num_groups = 1
        for key in keys:
            at, num_distinct = _numbered(key.codes)
            # Numbered anew with each column, so that the product of their sizes never overflows.
            place, num_groups = _numbered(place * num_distinct + at)
        # Written backwards, so that the first row of each group is the one that stays.
        firsts = np.zeros(num_groups, np.int64)
        firsts[place[::-1]] = np.arange(len(rows) - 1, -1, -1)
        values = [key.decode(firsts) for key in keys]
        groups = list(zip(*values, strict=True)) if keys else [()]
        held = [self._groups.setdefault(group, []) for group in groups]
        for sums in held:
            sums.extend(_Sum(each) for each in self._plan.aggregates[len(sums) :])
        if len(self._groups) > self._max_groups:
            raise TooManyGroupsError("groups", len(self._groups))
        counts = np.bincount(place, minlength=num_groups).tolist()
        for number, spec in enumerate(self._plan.aggregates):
            if spec.column is None:
                for sums, count in zip(held, counts, strict=True):
                    sums[number].count += count
                continue
            parts = _grouped(spec, columns(spec.column.name).take(rows), place, num_groups)
            for sums, part in zip(held, zip(*parts, strict=True), strict=True):
                if part[0]:
                    sums[number].add(*part)

    def _keys(self, columns: Columns, rows: Array) -> tuple[Array, list["_Key"]]:
        multiple = [name for name in self._plan.by if self._plan.columns[name].is_multiple]
        slot: Array | None = None
        if multiple:
            column = columns(multiple[0])
            missing = column.is_missing()
            there = np.ones(column.values.shape, np.bool_) if missing is None else ~missing
            at, slot = np.nonzero(there[rows])
            rows = rows[at]
        keys = []
        for name in self._plan.by:
            column = columns(name)
            if name in multiple:
                keys.append(_Key(Column(column.values[rows, slot])))
            else:
                keys.append(_Key(column.take(rows)))
        return rows, keys

    def finish(self) -> Gathered:
        """Return the result, in the order of its keys where the query has none."""
        plan = self._plan
        plain: dict[str, _Plain] = {}
        groups = list(self._groups)
        for number, name in enumerate(plan.by):
            plain[name] = _Plain.of_values([group[number] for group in groups], plan.columns[name])
        for number, spec in enumerate(plan.aggregates):
            plain[spec.label] = _Plain.of_values([self._groups[group][number].value() for group in groups], None)
        keys = [(plain[key.label], key.is_descending) for key in plan.order]
        # Groups that are equal so far stand by what makes them, in whatever order their rows were read.
        keys += [(plain[name], False) for name in plan.by]
        order = (_sorted(keys, len(groups)) if keys else np.arange(len(groups)))[: plan.limit]
        columns = [self._result(label, plain[label].take(order)) for label in plan.shown]
        return Gathered(columns, len(groups))

    def _result(self, label: str, plain: "_Plain") -> ResultColumn:
        values = tuple(plain.to_list())
        for spec in self._plan.aggregates:
            if spec.label == label:
                return ResultColumn(label, *_kind_of(spec), values)
        column = self._plan.columns[label]
        return ResultColumn(label, column.kind, column.unit, values)


def _kind_of(spec: AggregateSpec) -> tuple[Kind, str]:
    if spec.column is None:
        return Kind.INTEGER, ""
    return (Kind.NUMBER if spec.function == "mean" else spec.column.kind), spec.column.unit


def _numbered(codes: Array) -> tuple[Array, int]:
    """Return numbers from 0 on that are equal where `codes` are, and how many there are."""
    low, high = int(codes.min()), int(codes.max())
    if high - low > 4 * len(codes) + 1024:
        distinct, place = np.unique(codes, return_inverse=True)
        return place, len(distinct)
    # Far less than sorting.
    shifted = codes - low
    is_there = np.zeros(high - low + 1, np.bool_)
    is_there[shifted] = True
    numbers = np.cumsum(is_there) - 1
    return numbers[shifted], int(numbers[-1]) + 1


# Sums of whole numbers below this are exact in a double.
_EXACT = 2**53


def _grouped(spec: AggregateSpec, column: Column, place: Array, num_groups: int) -> tuple[list[int], list[Any]]:
    """Return, for each group, how many values are there, and their sum, the least or the greatest of them."""
    missing = column.is_missing()
    values = column.values
    if missing is not None:
        values, place = values[~missing], place[~missing]
    counts = np.bincount(place, minlength=num_groups).tolist()
    is_whole = spec.column is not None and spec.column.kind is Kind.INTEGER
    if spec.function in ("sum", "mean"):
        if is_whole and len(values) and max(abs(int(values.min())), abs(int(values.max()))) * len(values) >= _EXACT:
            totals = np.zeros(num_groups, dtype=object)
            np.add.at(totals, place, values.astype(object))
            return counts, totals.tolist()
        sums = np.bincount(place, values.astype(np.float64), minlength=num_groups)
        return counts, [int(each) for each in sums] if is_whole else sums.tolist()
    extreme = np.minimum if spec.function == "min" else np.maximum
    found = np.zeros(num_groups, values.dtype)
    # Each group begins with one of its own values.
    found[place] = values
    extreme.at(found, place, values)
    return counts, found.tolist()


class _Sum:
    """One aggregate of one group."""

    def __init__(self, spec: AggregateSpec) -> None:
        self._function = spec.function
        self._is_whole = spec.column is not None and spec.column.kind is Kind.INTEGER
        self.count = 0
        self._total: int | float = 0
        self._low: Any = None
        self._high: Any = None

    def add(self, count: int, result: int | float) -> None:
        """Take in `count` values, of which `result` is the sum, the least or the greatest."""
        self.count += count
        if self._function in ("sum", "mean"):
            self._total += result
        elif self._function == "min":
            self._low = result if self._low is None else min(self._low, result)
        else:
            self._high = result if self._high is None else max(self._high, result)

    def value(self) -> int | float | None:
        """Return the aggregate; None where no value was there, but 0 of counts and sums."""
        match self._function:
            case "count":
                return self.count
            case "sum":
                return self._total if self._is_whole else float(self._total)
            case "mean":
                return self._total / self.count if self.count else None
            case "min":
                return self._low  # type: ignore[no-any-return]
            case _:
                return self._high  # type: ignore[no-any-return]


class _Key:
    """A column that makes groups: whole numbers that are equal where its values are."""

    def __init__(self, column: Column) -> None:
        self._column = column
        missing = column.is_missing()
        if column.labels is not None or column.values.dtype.kind in "iub":
            codes = column.values.astype(np.int64)
        else:
            codes = np.unique(column.values, return_inverse=True)[1].astype(np.int64)
        self.codes = codes if missing is None else np.where(missing, np.iinfo(np.int64).min, codes)

    def decode(self, rows: Array) -> list[Any]:
        return self._column.take(rows).to_list()


class _Plain:
    """Values that no longer depend on a batch: numbers, or objects with None for what is missing."""

    def __init__(self, values: Array, missing: Array) -> None:
        self.values = values
        self.missing = missing

    @classmethod
    def of(cls, column: Column) -> "_Plain":
        missing = column.is_missing()
        if column.values.ndim == 2:
            lists = np.empty(len(column), dtype=object)
            lists[:] = column.to_list()
            return cls(lists, np.zeros(len(column), np.bool_))
        absent = np.zeros(len(column), np.bool_) if missing is None else missing
        if column.labels is None:
            return cls(column.values, absent)
        if column.labels.is_ordered:
            return cls(_ranked(column.to_list(), column.labels.texts), absent)
        texts = np.empty(len(column), dtype=object)
        texts[:] = [text or "" for text in column.to_list()]
        return cls(texts, absent)

    @classmethod
    def of_values(cls, values: Sequence[Any], column: ColumnSpec | None) -> "_Plain":
        missing = np.array([value is None for value in values], np.bool_)
        if column is not None and column.kind is Kind.CHOICE and column.is_ordered:
            return cls(_ranked(values, column.choices), missing)
        filled = np.empty(len(values), dtype=object)
        fill: Any = "" if any(isinstance(value, str) for value in values) else 0
        filled[:] = [fill if value is None else value for value in values]
        return cls(filled, missing)

    @classmethod
    def join(cls, parts: Sequence["_Plain"]) -> "_Plain":
        return cls(np.concatenate([each.values for each in parts]), np.concatenate([each.missing for each in parts]))

    def take(self, rows: Array) -> "_Plain":
        return _Plain(self.values[rows], self.missing[rows])

    def to_list(self) -> list[Any]:
        values = [value.text if isinstance(value, _Ranked) else value for value in self.values.tolist()]
        return [None if absent else value for value, absent in zip(values, self.missing.tolist(), strict=True)]


class _Ranked:
    """A text of an ordered choice: sorted by its rank."""

    __slots__ = ("rank", "text")

    def __init__(self, text: str, rank: int) -> None:
        self.text, self.rank = text, rank

    def __lt__(self, other: "_Ranked") -> bool:
        return self.rank < other.rank

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Ranked) and self.rank == other.rank

    def __hash__(self) -> int:
        return hash(self.rank)


def _ranked(texts: Sequence[Any], order: Sequence[str]) -> Array:
    places: Mapping[str, _Ranked] = {text: _Ranked(text, rank) for rank, text in enumerate(order)}
    values = np.empty(len(texts), dtype=object)
    values[:] = [places[text or order[0]] for text in texts]
    return values


def _sorted(keys: Sequence[tuple[_Plain, bool]], num_rows: int) -> Array:
    """Return the rows in order; what is missing comes last either way, and rows of equal keys stay as they came."""
    columns: list[Array] = []
    for plain, is_descending in keys:
        _, codes = np.unique(plain.values, return_inverse=True)
        # What stands in place of a missing value says nothing.
        ranks = np.where(plain.missing, 0, -codes if is_descending else codes)
        columns += [plain.missing, ranks]
    # The last key is the first for lexsort, and of a pair the missing flag decides first.
    pairs = [columns[at : at + 2] for at in range(0, len(columns), 2)]
    lexical = [column for missing, ranks in reversed(pairs) for column in (ranks, missing)]
    order: Array = np.lexsort(lexical) if lexical else np.arange(num_rows)
    return order
