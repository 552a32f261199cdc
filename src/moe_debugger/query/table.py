"""Columns in memory, and conditions over them: the vectorised evaluator.

Two-valued logic: a comparison with what is missing (NaN, -1 of an index that is none, a null) is false, whatever the
operator, and `not` turns false into true. So ``expert != 5`` leaves out rows without an expert, and
``not expert = 5`` has them. A column with several values a row matches where one of them does.
"""

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = [
    "All",
    "AnyOf",
    "Bound",
    "Column",
    "Compare",
    "HasText",
    "IsMissing",
    "Labels",
    "OneOf",
    "Opposite",
    "Test",
    "Within",
    "columns_of",
    "matches",
]  # fmt: skip

Array = npt.NDArray[Any]
Mask = npt.NDArray[np.bool_]
Scalar = int | float | str | bool


@dataclass(frozen=True, slots=True)
class Compare:
    """``column op value``."""

    column: str
    op: str
    value: Scalar


@dataclass(frozen=True, slots=True)
class OneOf:
    """``column in values``."""

    column: str
    values: tuple[Scalar, ...]


@dataclass(frozen=True, slots=True)
class Within:
    """``low <= column <= high``."""

    column: str
    low: Scalar
    high: Scalar


@dataclass(frozen=True, slots=True)
class HasText:
    """The column's text contains `text`, which is in lower case."""

    column: str
    text: str


@dataclass(frozen=True, slots=True)
class IsMissing:
    """The column has no value."""

    column: str


@dataclass(frozen=True, slots=True)
class Opposite:
    """Where the part does not hold."""

    part: "Bound"


@dataclass(frozen=True, slots=True)
class All:
    """Where every part holds."""

    parts: tuple["Bound", ...]


@dataclass(frozen=True, slots=True)
class AnyOf:
    """Where a part holds."""

    parts: tuple["Bound", ...]


Test = Compare | OneOf | Within | HasText
Bound = Test | IsMissing | Opposite | All | AnyOf

_OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    "=": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


@dataclass(slots=True, eq=False)
class Labels:
    """The distinct texts of a column; what was asked of them once is kept.

    Attributes:
        is_ordered: texts stand from the least to the greatest, and are compared by their place.
    """

    texts: Sequence[str]
    is_ordered: bool = False
    _flags: dict[Test, Mask] = field(default_factory=dict)

    def flags(self, test: Test) -> Mask:
        """Return which texts a test holds for, [len(texts)] bool."""
        found = self._flags.get(test)
        # A vocabulary may have grown since.
        if found is None or len(found) < len(self.texts):
            found = self._flags[test] = np.array([self._holds(test, place) for place in range(len(self.texts))], bool)
        return found

    def _holds(self, test: Test, place: int) -> bool:
        text = self.texts[place]
        match test:
            case HasText(_, part):
                return part in text.lower()
            case OneOf(_, values):
                return text in values
            case Compare(_, op, value):
                if self.is_ordered:
                    return bool(_OPERATORS[op](place, self.texts.index(str(value))))
                return bool(_OPERATORS[op](text, value))
            case Within(_, low, high):
                first, last = self.texts.index(str(low)), self.texts.index(str(high))
                return first <= place <= last


@dataclass(frozen=True, slots=True, eq=False)
class Column:
    """Values of n rows.

    Attributes:
        values: [n] or, of several values a row, [n, k]; codes where there are `labels`.
        missing: the same shape, bool; None = nothing but NaN is missing.
    """

    values: Array
    missing: Mask | None = None
    labels: Labels | None = None

    def __len__(self) -> int:
        return len(self.values)

    def is_missing(self) -> Mask | None:
        """Return where there is no value, in the shape of `values`; None where there is one everywhere."""
        if self.missing is not None or self.values.dtype.kind != "f":
            return self.missing
        nan = np.isnan(self.values)
        return nan if nan.any() else None

    def take(self, rows: Array) -> "Column":
        """Return some rows."""
        return Column(self.values[rows], None if self.missing is None else self.missing[rows], self.labels)

    def to_list(self) -> list[Any]:
        """Return plain values; None = missing, lists of several values a row hold those that are there."""
        missing = self.is_missing()
        if self.values.ndim == 2:
            rows = self.values.tolist()
            if missing is None:
                return rows  # type: ignore[no-any-return]
            pairs = zip(rows, missing.tolist(), strict=True)
            return [[value for value, is_absent in zip(*pair, strict=True) if not is_absent] for pair in pairs]
        values = self.values.tolist()
        if self.labels is not None:
            texts = self.labels.texts
            values = [texts[code] if 0 <= code < len(texts) else None for code in values]
        if missing is not None:
            values = [None if absent else value for value, absent in zip(values, missing.tolist(), strict=True)]
        return values  # type: ignore[no-any-return]


def matches(condition: Bound, columns: Callable[[str], Column], num_rows: int) -> Mask:
    """Return which rows a condition holds for, [num_rows] bool.

    Args:
        columns: gives a column by its name; asked for what the condition needs alone.
    """
    match condition:
        case All(parts):
            mask = np.ones(num_rows, np.bool_)
            for part in parts:
                mask &= matches(part, columns, num_rows)
            return mask
        case AnyOf(parts):
            mask = np.zeros(num_rows, np.bool_)
            for part in parts:
                mask |= matches(part, columns, num_rows)
            return mask
        case Opposite(part):
            return ~matches(part, columns, num_rows)
        case IsMissing(name):
            missing = columns(name).is_missing()
            if missing is None:
                return np.zeros(num_rows, np.bool_)
            return np.asarray(missing.all(axis=1)) if missing.ndim == 2 else missing
        case _:
            return _tested(condition, columns(condition.column))


def _tested(test: Test, column: Column) -> Mask:
    values = column.values
    if column.labels is not None:
        flags = column.labels.flags(test)
        is_known = (values >= 0) & (values < len(flags))
        holds = np.zeros(values.shape, np.bool_)
        holds[is_known] = flags[values[is_known]]
    else:
        holds = np.asarray(_numbers(test, values), np.bool_)
    missing = column.is_missing()
    if missing is not None:
        holds = holds & ~missing
    return np.asarray(holds.any(axis=1)) if holds.ndim == 2 else holds


def _numbers(test: Test, values: Array) -> Any:
    match test:
        case Compare(_, op, value):
            return _OPERATORS[op](values, value)
        case Within(_, low, high):
            return (values >= low) & (values <= high)
        case OneOf(_, members):
            holds = np.zeros(values.shape, np.bool_)
            for member in members:
                holds |= values == member
            return holds
        case HasText():
            raise AssertionError("a text is not looked for in numbers: the binder refuses it")


def columns_of(condition: Bound | None) -> frozenset[str]:
    """Return the names of the columns that a condition needs."""
    match condition:
        case None:
            return frozenset()
        case All(parts) | AnyOf(parts):
            return frozenset().union(*(columns_of(part) for part in parts))
        case Opposite(part):
            return columns_of(part)
        case _:
            return frozenset((condition.column,))
