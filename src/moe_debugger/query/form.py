"""The parsed form of a query, and its canonical text: ``parse(unparse(query)) == query``.

Every part knows the characters that it was read from (`Span`), which errors point at; equality leaves them out.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

__all__ = [
    "Aggregate",
    "And",
    "Between",
    "Comparison",
    "Condition",
    "Contains",
    "Item",
    "Literal",
    "Membership",
    "Missing",
    "Name",
    "Not",
    "Or",
    "OrderKey",
    "Query",
    "Span",
    "names_of",
    "unparse",
]


@dataclass(frozen=True, slots=True)
class Span:
    """Characters `start` to before `end` of the text."""

    start: int = 0
    end: int = 0

    def to(self, other: "Span") -> "Span":
        """Return the characters from this one's first to the other's last."""
        return Span(self.start, other.end)


_NOWHERE = Span()


@dataclass(frozen=True, slots=True)
class Name:
    """A column, a subject or a function, in lower case."""

    text: str
    span: Span = field(default=_NOWHERE, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Literal:
    """A value.

    Attributes:
        value: int or float of a number, str of a text, bool of true and false.
        unit: "x", "%" or none, of a number.
        is_word: a text without quotes.
    """

    value: int | float | str | bool
    unit: str = ""
    is_word: bool = False
    span: Span = field(default=_NOWHERE, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Comparison:
    """``column op value``; op is one of ``= != < <= > >=``."""

    column: Name
    op: str
    value: Literal


@dataclass(frozen=True, slots=True)
class Membership:
    """``column in (values)``."""

    column: Name
    values: tuple[Literal, ...]


@dataclass(frozen=True, slots=True)
class Between:
    """``column between low and high``, both included."""

    column: Name
    low: Literal
    high: Literal


@dataclass(frozen=True, slots=True)
class Contains:
    """``column contains "text"``, whatever the case."""

    column: Name
    text: Literal


@dataclass(frozen=True, slots=True)
class Missing:
    """``column is missing``: no such value, or not captured."""

    column: Name


@dataclass(frozen=True, slots=True)
class Not:
    """The opposite; ``not in``, ``!=`` of what is missing and the like are true where their opposite is not."""

    part: "Condition"


@dataclass(frozen=True, slots=True)
class And:
    """All of the parts; two or more."""

    parts: tuple["Condition", ...]


@dataclass(frozen=True, slots=True)
class Or:
    """Any of the parts; two or more."""

    parts: tuple["Condition", ...]


Condition = Comparison | Membership | Between | Contains | Missing | Not | And | Or


@dataclass(frozen=True, slots=True)
class Aggregate:
    """``count``, or a function of a column such as ``mean(margin)``."""

    function: Name
    column: Name | None = None

    @property
    def label(self) -> str:
        """Return the name of its column in the result."""
        return self.function.text if self.column is None else f"{self.function.text}({self.column.text})"


Item = Name | Aggregate


@dataclass(frozen=True, slots=True)
class OrderKey:
    """What rows are sorted by."""

    item: Item
    is_descending: bool = False


@dataclass(frozen=True, slots=True)
class Query:
    """A whole query.

    Attributes:
        where: None = all rows.
        by: columns that make groups.
        show: columns and aggregates of the result; empty = the subject's own choice.
        limit: most rows of the result; None = the default.
    """

    subject: Name
    where: Condition | None = None
    by: tuple[Name, ...] = ()
    show: tuple[Item, ...] = ()
    order: tuple[OrderKey, ...] = ()
    limit: int | None = None
    limit_span: Span = field(default=_NOWHERE, compare=False, repr=False)

    def __str__(self) -> str:
        return unparse(self)


def names_of(condition: Condition) -> Iterator[Name]:
    """Yield the columns of a condition, from left to right."""
    if isinstance(condition, Not):
        yield from names_of(condition.part)
    elif isinstance(condition, And | Or):
        for part in condition.parts:
            yield from names_of(part)
    else:
        yield condition.column


_ESCAPES = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\t": "\\t", "\r": "\\r"}


def _literal(value: Literal) -> str:
    if isinstance(value.value, bool):
        return "true" if value.value else "false"
    if isinstance(value.value, str):
        return value.value if value.is_word else '"' + "".join(_ESCAPES.get(c, c) for c in value.value) + '"'
    return f"{value.value!r}{value.unit}"


def _condition(condition: Condition, *, is_inner: bool = False) -> str:
    match condition:
        case Comparison(column, op, value):
            return f"{column.text} {op} {_literal(value)}"
        case Membership(column, values):
            return f"{column.text} in ({', '.join(_literal(value) for value in values)})"
        case Between(column, low, high):
            return f"{column.text} between {_literal(low)} and {_literal(high)}"
        case Contains(column, text):
            return f"{column.text} contains {_literal(text)}"
        case Missing(column):
            return f"{column.text} is missing"
        case Not(part):
            return f"not {_condition(part, is_inner=True)}"
        case And(parts) | Or(parts):
            word = " and " if isinstance(condition, And) else " or "
            joined = word.join(_condition(part, is_inner=True) for part in parts)
            return f"({joined})" if is_inner else joined


def _item(item: Item) -> str:
    return item.text if isinstance(item, Name) else item.label


def unparse(query: Query) -> str:
    """Return the canonical text of a query."""
    words = [query.subject.text]
    if query.where is not None:
        words.append(f"where {_condition(query.where)}")
    if query.by:
        words.append("by " + ", ".join(name.text for name in query.by))
    if query.show:
        words.append("show " + ", ".join(_item(item) for item in query.show))
    if query.order:
        keys = (f"{_item(key.item)}{' desc' if key.is_descending else ''}" for key in query.order)
        words.append("order by " + ", ".join(keys))
    if query.limit is not None:
        words.append(f"limit {query.limit}")
    return " ".join(words)
