"""From parsed form to plan: names by the allow list, values by the columns' units, and what must be read for it."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import TypeVar

from moe_debugger.analysis import RoutingState
from moe_debugger.errors import QueryError
from moe_debugger.query import form
from moe_debugger.query.columns import SUBJECTS, ColumnSpec, Kind, Place, Subject
from moe_debugger.query.limits import Limits
from moe_debugger.query.table import (
    All,
    AnyOf,
    Bound,
    Compare,
    HasText,
    IsMissing,
    OneOf,
    Opposite,
    Scalar,
    Within,
    columns_of,
)
from moe_debugger.query.vocabulary import Vocabulary

__all__ = ["AggregateSpec", "Capabilities", "Plan", "Scope", "SortKey", "bind"]

_NUMERIC = (Kind.INTEGER, Kind.NUMBER)
_LISTS = (Kind.INTEGERS, Kind.NUMBERS)
_T = TypeVar("_T")
# A wider range is a bound and names nothing.
_MAX_NAMED = 10_000


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a source has.

    Attributes:
        name: of the source, for messages: "this recording", "a live session of the fleet".
        absent: why a column of a subject, or all of it ("*"), is not there: {"tokens": {"step": "..."}}.
        vocabulary: None where token texts are not known.
        probabilities: reads the router's probabilities of all rows, summed, which the rows themselves do not hold;
            None where rows have no such sums beside them.
    """

    name: str
    absent: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    vocabulary: Vocabulary | None = None
    probabilities: Callable[[], RoutingState] | None = None


@dataclass(frozen=True, slots=True)
class Scope:
    """Bounds of the token rows that can matter, for what reads them; the conditions are tested all the same.

    Attributes:
        layers, requests: the only ones; None = all.
        first_step, last_step: both included; None = no bound.
    """

    layers: frozenset[int] | None = None
    requests: frozenset[str] | None = None
    first_step: int | None = None
    last_step: int | None = None

    def has_step(self, first: int, last: int) -> bool:
        """Return whether steps `first` to `last` can have a row in the scope."""
        return not (
            (self.first_step is not None and last < self.first_step)
            or (self.last_step is not None and first > self.last_step)
        )

    def has_layer(self, first: int, last: int) -> bool:
        """Return whether layers `first` to `last` can have a row in the scope."""
        return self.layers is None or any(first <= layer <= last for layer in self.layers)


@dataclass(frozen=True, slots=True)
class AggregateSpec:
    """An aggregate of the result.

    Attributes:
        column: None of `count`.
    """

    label: str
    function: str
    column: ColumnSpec | None = None


@dataclass(frozen=True, slots=True)
class SortKey:
    """A column of the result, or a column or aggregate that is computed for sorting alone."""

    label: str
    is_descending: bool


@dataclass(frozen=True, slots=True)
class Plan:
    """What a query does, with every name checked.

    Attributes:
        query, text: as given.
        row_condition: which token rows are counted; None = all, so that sums can answer.
        condition: which rows of the result stay.
        scope: what of the token rows must be read.
        shown: labels of the result's columns, in order.
        columns: of the subject, that must be computed, by name.
        by: names of the columns that make groups.
        aggregates: empty = rows of the subject itself.
        order: empty = as they come.
        limit: most rows of the result.
    """

    query: form.Query
    text: str
    subject: Subject
    row_condition: Bound | None
    condition: Bound | None
    scope: Scope
    shown: tuple[str, ...]
    columns: Mapping[str, ColumnSpec]
    by: tuple[str, ...]
    aggregates: tuple[AggregateSpec, ...]
    order: tuple[SortKey, ...]
    limit: int

    @property
    def is_grouped(self) -> bool:
        """Whether the result has groups instead of rows."""
        return bool(self.by or self.aggregates)

    def asked(self, name: str) -> frozenset[int]:
        """Return the values of a column of whole numbers that the conditions joined by `and` ask for by name."""
        return _named(name, [part for part in (self.row_condition, self.condition) if part is not None])

    @property
    def row_columns(self) -> frozenset[str]:
        """Columns of token rows that choose them."""
        return columns_of(self.row_condition)


def bind(query: form.Query, text: str, source: Capabilities, limits: Limits) -> Plan:
    """Return the plan of a query.

    Raises:
        QueryError: a name is not in the allow list, a value does not fit its column, or the source has no such thing.
    """
    return _Binder(text, source, limits).plan(query)


class _Binder:
    def __init__(self, text: str, source: Capabilities, limits: Limits) -> None:
        self._text = text
        self._source = source
        self._limits = limits
        self._subject = SUBJECTS["tokens"]

    def plan(self, query: form.Query) -> Plan:
        self._subject = subject = self._bind_subject(query.subject)
        where = query.where
        conjuncts = where.parts if isinstance(where, form.And) else () if where is None else (where,)
        row_parts: list[Bound] = []
        parts: list[Bound] = []
        for conjunct in conjuncts:
            (row_parts if self._is_of_rows(conjunct) else parts).append(self._condition(conjunct))
        by = tuple(self._result_column(name, "by") for name in query.by)
        if sum(column.is_multiple for column in by) > 1:
            raise self._error("one column with several values a row can make groups", query.by[-1])
        shown, aggregates, columns = self._shown(query, by)
        order, more = self._order(query, by, aggregates, row_parts)
        aggregates += tuple(each for each in more if isinstance(each, AggregateSpec))
        columns |= {each.name: each for each in more if isinstance(each, ColumnSpec)}
        columns |= {each.name: each for each in by}
        columns |= {each.column.name: each.column for each in aggregates if each.column is not None}
        for part in parts:
            for name in columns_of(part):
                column = subject.column(name)
                assert column is not None
                columns[name] = column
        limit = query.limit or self._limits.default_result_rows
        if limit > self._limits.max_result_rows:
            span = query.limit_span
            raise QueryError(
                f"`limit {limit}` is more than the {self._limits.max_result_rows:,} rows that a result may have here",
                self._text, span.start, span.end,
            )  # fmt: skip
        # Of the tokens themselves, every condition is one of rows.
        every = row_parts + [part for part in parts if subject.name == "tokens" or _is_both(part, subject)]
        return Plan(
            query=query,
            text=self._text,
            subject=subject,
            row_condition=_all(row_parts),
            condition=_all(parts),
            scope=_scope(every),
            shown=shown,
            columns=columns,
            by=tuple(column.name for column in by),
            aggregates=aggregates,
            order=order,
            limit=limit,
        )

    def _error(self, reason: str, place: form.Name | form.Literal) -> QueryError:
        return QueryError(reason, self._text, place.span.start, place.span.end)

    def _bind_subject(self, name: form.Name) -> Subject:
        subject = SUBJECTS.get(name.text)
        if subject is None:
            raise self._error(
                f"there is no subject `{name.text}`; there are {', '.join(SUBJECTS)}{_near(name.text, SUBJECTS)}", name
            )
        reason = self._source.absent.get(subject.name, {}).get("*")
        if reason:
            raise self._error(f"{self._source.name} has no `{subject.name}`: {reason}", name)
        return subject

    def _column(self, name: form.Name) -> ColumnSpec:
        column = self._subject.column(name.text)
        if column is None:
            elsewhere = [subject.name for subject in SUBJECTS.values() if subject.column(name.text) is not None]
            near = _near(name.text, self._subject.names)
            hint = near or (f"; `{'`, `'.join(elsewhere)}` have it." if elsewhere else ".")
            raise self._error(
                f"`{self._subject.name}` has no column `{name.text}`{hint} Its columns are "
                f"{', '.join(self._subject.names)}",
                name,
            )
        reason = self._source.absent.get(self._subject.name, {}).get(column.name)
        if reason:
            raise self._error(f"{self._source.name} has no `{column.name}`: {reason}", name)
        return column

    def _result_column(self, name: form.Name, where: str) -> ColumnSpec:
        column = self._column(name)
        if column.place is Place.ROWS:
            raise self._error(
                f"`{column.name}` chooses the tokens that are counted, in `where`; a row of `{self._subject.name}` has "
                f"none to {where}; `tokens` have it",
                name,
            )
        if column.kind in _LISTS and where != "show":
            hint = "; use `expert`" if column.name == "experts" else ""
            raise self._error(f"`{column.name}` is a list in each row and cannot be used with `{where}`{hint}", name)
        if column.is_multiple and where not in ("by",):
            raise self._error(
                f"`{column.name}` has several values a row: it can be used in `where` and `by`; `experts` shows them",
                name,
            )
        return column

    def _is_of_rows(self, condition: form.Condition) -> bool:
        names = list(form.names_of(condition))
        columns = [self._column(name) for name in names]
        of_rows = [name for name, column in zip(names, columns, strict=True) if column.place is Place.ROWS]
        of_result = [name for name, column in zip(names, columns, strict=True) if column.place is Place.RESULT]
        if of_rows and of_result:
            raise self._error(
                f"`{of_rows[0].text}` chooses the tokens that are counted, and `{of_result[0].text}` is known only "
                "after counting: join them with `and`, outside of `or` and `not`",
                of_result[0],
            )
        return bool(of_rows)

    def _shown(
        self, query: form.Query, by: Sequence[ColumnSpec]
    ) -> tuple[tuple[str, ...], tuple[AggregateSpec, ...], dict[str, ColumnSpec]]:
        items = query.show
        is_grouped = bool(by) or any(isinstance(item, form.Aggregate) for item in items)
        if not items and not is_grouped:
            absent = self._source.absent.get(self._subject.name, {})
            chosen = [
                column
                for column in self._subject.columns
                if column.is_shown and column.place is not Place.ROWS and column.name not in absent
            ]
            return tuple(column.name for column in chosen), (), {column.name: column for column in chosen}
        if not items:
            count = AggregateSpec("count", "count")
            return (*(column.name for column in by), count.label), (count,), {}
        labels: list[str] = []
        aggregates: list[AggregateSpec] = []
        columns: dict[str, ColumnSpec] = {}
        for item in items:
            if isinstance(item, form.Aggregate):
                aggregate = self._aggregate(item)
                aggregates.append(aggregate)
                labels.append(aggregate.label)
                continue
            is_group = any(column.name == self._column(item).name for column in by)
            column = self._column(item) if is_group else self._result_column(item, "show")
            if is_grouped and not is_group:
                raise self._error(
                    f"`{column.name}` differs within a group: group `by` it too, or show an aggregate such as "
                    f"`count` or `max({column.name})`",
                    item,
                )
            columns[column.name] = column
            labels.append(column.name)
        # Groups without their columns would be rows that nobody can tell apart.
        labels = [*(column.name for column in by if column.name not in labels), *labels]
        return tuple(dict.fromkeys(labels)), tuple(dict.fromkeys(aggregates)), columns

    def _aggregate(self, item: form.Aggregate) -> AggregateSpec:
        if item.column is None:
            return AggregateSpec("count", "count")
        column = self._result_column(item.column, f"{item.function.text}()")
        if column.kind not in _NUMERIC:
            raise self._error(f"`{column.name}` has no numbers to take the {item.function.text} of", item.column)
        return AggregateSpec(f"{item.function.text}({column.name})", item.function.text, column)

    def _order(
        self,
        query: form.Query,
        by: Sequence[ColumnSpec],
        aggregates: Sequence[AggregateSpec],
        row_parts: Sequence[Bound],
    ) -> tuple[tuple[SortKey, ...], list[ColumnSpec | AggregateSpec]]:
        keys: list[SortKey] = []
        more: list[ColumnSpec | AggregateSpec] = []
        is_grouped = bool(by or aggregates)
        for key in query.order:
            if isinstance(key.item, form.Aggregate):
                if not is_grouped:
                    raise self._error(f"`{key.item.label}` needs groups: add `by` a column", key.item.function)
                aggregate = self._aggregate(key.item)
                if aggregate not in aggregates:
                    more.append(aggregate)
                keys.append(SortKey(aggregate.label, key.is_descending))
                continue
            is_group = any(each.name == self._column(key.item).name for each in by)
            column = self._column(key.item) if is_group else self._result_column(key.item, "order by")
            if is_grouped and not is_group:
                raise self._error(
                    f"`{column.name}` differs within a group: order by a column of `by`, or by an aggregate", key.item
                )
            more.append(column)
            keys.append(SortKey(column.name, key.is_descending))
        if not keys and not is_grouped and self._subject.name == "experts" and row_parts:
            # Of chosen tokens it is asked where they went.
            load = self._subject.column("load")
            assert load is not None
            return (SortKey("load", True),), [load]
        return tuple(keys), more

    def _condition(self, condition: form.Condition) -> Bound:
        match condition:
            case form.And(parts):
                return All(tuple(self._condition(part) for part in parts))
            case form.Or(parts):
                return AnyOf(tuple(self._condition(part) for part in parts))
            case form.Not(part):
                return Opposite(self._condition(part))
            case form.Missing(name):
                return IsMissing(self._column(name).name)
            case form.Contains(name, text):
                column = self._column(name)
                if column.kind is not Kind.TEXT:
                    raise self._error(
                        f"`contains` looks into texts, and `{column.name}` is not one: it holds {column.kind} values",
                        name,
                    )
                return HasText(column.name, str(text.value).lower())
            case form.Membership(name, values):
                column = self._searchable(name)
                return OneOf(column.name, tuple(self._value(column, value) for value in values))
            case form.Between(name, low, high):
                column = self._searchable(name)
                self._check_order(column, name)
                return Within(column.name, self._value(column, low), self._value(column, high))
            case form.Comparison(name, op, value):
                column = self._searchable(name)
                if op not in ("=", "!="):
                    self._check_order(column, name)
                return Compare(column.name, op, self._value(column, value))

    def _searchable(self, name: form.Name) -> ColumnSpec:
        column = self._column(name)
        if column.kind in _LISTS:
            hint = "; use `expert`, as in `expert = 5`" if column.name == "experts" else ""
            raise self._error(f"`{column.name}` is a list in each row and cannot be compared{hint}", name)
        return column

    def _check_order(self, column: ColumnSpec, name: form.Name) -> None:
        if column.kind in (Kind.TEXT, Kind.BOOLEAN) or (column.kind is Kind.CHOICE and not column.is_ordered):
            raise self._error(f"`{column.name}` has no order: use `=`, `!=`, `in` or `contains`", name)

    def _value(self, column: ColumnSpec, literal: form.Literal) -> Scalar:
        value = literal.value
        if column.kind in _NUMERIC:
            if isinstance(value, bool | str):
                raise self._error(f"`{column.name}` is compared with a number{_unit_words(column)}", literal)
            if literal.unit == "":
                return value
            if literal.unit == "%" and column.unit == "1":
                return value / 100
            if literal.unit == "x" and column.unit == "x":
                return value
            raise self._error(
                f"`{literal.unit}` does not fit `{column.name}`, which is {_unit_of(column)}{_unit_words(column)}",
                literal,
            )
        if column.kind is Kind.BOOLEAN:
            if not isinstance(value, bool):
                raise self._error(f"`{column.name}` is true or false", literal)
            return value
        if not isinstance(value, str):
            raise self._error(f'`{column.name}` is compared with a text, as in `{column.name} = "..."`', literal)
        if column.kind is Kind.CHOICE:
            if value.lower() not in column.choices:
                raise self._error(
                    f"`{column.name}` is never {value[:40]!r}; it is one of {', '.join(column.choices[1:])}"
                    f"{_near(value, column.choices)}",
                    literal,
                )
            return value.lower()
        if column.name == "token":
            self._check_token(value, literal)
        return value

    def _check_token(self, text: str, literal: form.Literal) -> None:
        """Refuse a text that is not one token: nothing would ever equal it."""
        vocabulary = self._source.vocabulary
        if vocabulary is None:
            return
        ids = vocabulary.encode(text)
        if any(vocabulary.piece(each).decode("utf-8", errors="backslashreplace") == text for each in ids):
            return
        shown = ", ".join(str(each) for each in ids[:8]) + (", …" if len(ids) > 8 else "")
        raise self._error(
            f"{text[:40]!r} is not one token of this tokenizer but {len(ids)}: {shown}; ask for one of them, as in "
            f"`token_id = {ids[0] if ids else 0}`",
            literal,
        )


def _near(word: str, known: Iterable[str]) -> str:
    close = get_close_matches(word.lower(), list(known), n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(f'`{each}`' for each in close)}?" if close else ""


def _unit_of(column: ColumnSpec) -> str:
    words = {"x": "a multiple of the fair share", "1": "a part of a whole", "nats": "in nats", "s": "in Unix seconds"}
    return words.get(column.unit, "a plain number")


def _unit_words(column: ColumnSpec) -> str:
    example = {"x": f", as in `{column.name} > 8x`", "1": f", as in `{column.name} > 5%`"}
    return example.get(column.unit, f", as in `{column.name} > 8`")


def _all(parts: Sequence[Bound]) -> Bound | None:
    return None if not parts else parts[0] if len(parts) == 1 else All(tuple(parts))


def _is_both(part: Bound, subject: Subject) -> bool:
    columns = (subject.column(name) for name in columns_of(part))
    return all(column is not None and column.place is Place.BOTH for column in columns)


def _scope(parts: Sequence[Bound]) -> Scope:
    """Return the bounds that a row must keep for all of `parts` to hold."""
    layers: frozenset[int] | None = None
    requests: frozenset[str] | None = None
    first: int | None = None
    last: int | None = None
    for part in parts:
        match part:
            case All(inner):
                found = _scope(inner)
                layers, requests = _both(layers, found.layers), _both(requests, found.requests)
                first, last = _larger(first, found.first_step), _smaller(last, found.last_step)
            case Compare("layer", "=", value):
                layers = _both(layers, _whole([value]))
            case OneOf("layer", values):
                layers = _both(layers, _whole(values))
            case Within("layer", int(low), int(high)) if high - low < _MAX_NAMED:
                layers = _both(layers, frozenset(range(low, high + 1)))
            case Compare("request", "=", str(value)):
                requests = _both(requests, frozenset((value,)))
            case OneOf("request", values):
                requests = _both(requests, frozenset(str(value) for value in values))
            case Compare("step", op, int() | float() as value):
                # A bound may be too wide and never too narrow.
                if op in ("=", ">", ">="):
                    first = _larger(first, int(value // 1))
                if op in ("=", "<", "<="):
                    last = _smaller(last, int(-(-value // 1)))
            case Within("step", int() | float() as low, int() | float() as high):
                first, last = _larger(first, int(low // 1)), _smaller(last, int(-(-high // 1)))
            case _:
                pass
    return Scope(layers, requests, first, last)


def _named(name: str, parts: Sequence[Bound]) -> frozenset[int]:
    found: frozenset[int] = frozenset()
    for part in parts:
        match part:
            case All(inner):
                found |= _named(name, inner)
            case Compare(column, "=", value) if column == name:
                found |= _whole([value])
            case OneOf(column, values) if column == name:
                found |= _whole(values)
            case Within(column, int(low), int(high)) if column == name and high - low < _MAX_NAMED:
                found |= frozenset(range(low, high + 1))
            case _:
                pass
    return found


def _whole(values: Iterable[Scalar]) -> frozenset[int]:
    return frozenset(int(value) for value in values if not isinstance(value, str) and value == value // 1)


def _both(one: "frozenset[_T] | None", other: "frozenset[_T] | None") -> "frozenset[_T] | None":
    return other if one is None else one if other is None else one & other


def _larger(one: int | None, other: int | None) -> int | None:
    return other if one is None else one if other is None else max(one, other)


def _smaller(one: int | None, other: int | None) -> int | None:
    return other if one is None else one if other is None else min(one, other)
