"""A slow evaluator of parsed queries in plain Python, one row at a time, and a source whose rows a test knows.

It shares the parsed form with the product and nothing else: no numpy, no plan.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from moe_debugger.query import form
from moe_debugger.query.binding import Capabilities, Plan, Scope
from moe_debugger.query.columns import SUBJECTS
from moe_debugger.query.rows import LayerFacts, RowBatch
from moe_debugger.query.tables import Table

__all__ = ["Row", "RowsSource", "TableSource", "evaluate", "holds", "random_source", "token_rows"]

Row = Mapping[str, Any]
"""Values by column; None = missing; a tuple = several values."""


def holds(condition: form.Condition, row: Row, subject: str) -> bool:
    """Return whether a condition holds for a row."""
    if isinstance(condition, form.And):
        return all(holds(part, row, subject) for part in condition.parts)
    if isinstance(condition, form.Or):
        return any(holds(part, row, subject) for part in condition.parts)
    if isinstance(condition, form.Not):
        return not holds(condition.part, row, subject)
    column = SUBJECTS[subject].column(condition.column.text)
    assert column is not None
    cell = row[column.name]
    values = list(cell) if isinstance(cell, tuple) else [] if cell is None else [cell]
    if isinstance(condition, form.Missing):
        return not values
    if isinstance(condition, form.Contains):
        return any(str(condition.text.value).lower() in value.lower() for value in values)

    def ranked(value: Any) -> Any:
        return column.choices.index(value) if column.is_ordered else value

    def literal(value: form.Literal) -> Any:
        found = value.value
        if isinstance(found, str) and column.choices:
            found = found.lower()
        elif value.unit == "%":
            assert not isinstance(found, str)
            found = found / 100
        return ranked(found)

    for value in values:
        mine = ranked(value)
        if isinstance(condition, form.Membership):
            found = any(mine == literal(each) for each in condition.values)
        elif isinstance(condition, form.Between):
            found = literal(condition.low) <= mine <= literal(condition.high)
        else:
            other = literal(condition.value)
            found = {
                "=": lambda a, b: a == b,
                "!=": lambda a, b: a != b,
                "<": lambda a, b: a < b,
                "<=": lambda a, b: a <= b,
                ">": lambda a, b: a > b,
                ">=": lambda a, b: a >= b,
            }[condition.op](mine, other)
        if found:
            return True
    return False


def _aggregate(item: form.Aggregate, rows: Sequence[Row]) -> Any:
    if item.column is None:
        return len(rows)
    values = [row[item.column.text] for row in rows if row[item.column.text] is not None]
    match item.function.text:
        case "sum":
            return sum(values)
        case "mean":
            return sum(values) / len(values) if values else None
        case "min":
            return min(values, default=None)
        case _:
            return max(values, default=None)


def _sort(rows: list[dict[str, Any]], keys: Sequence[tuple[str, bool]], subject: str) -> list[dict[str, Any]]:
    for label, is_descending in reversed(keys):
        column = SUBJECTS[subject].column(label)
        present = [row for row in rows if row[label] is not None]
        missing = [row for row in rows if row[label] is None]

        def rank(row: dict[str, Any], label: str = label, column: Any = column) -> Any:
            return column.choices.index(row[label]) if column is not None and column.is_ordered else row[label]

        rows = sorted(present, key=rank, reverse=is_descending) + missing
    return rows


def evaluate(query: form.Query, rows: Sequence[Row], limit: int = 1000) -> tuple[list[str], list[tuple[Any, ...]]]:
    """Return the columns' names and the rows that a query with `show` or `by` finds."""
    subject = query.subject.text
    found = [row for row in rows if query.where is None or holds(query.where, row, subject)]
    by = [name.text for name in query.by]
    aggregates = {
        item.label: item
        for item in (*query.show, *(key.item for key in query.order))
        if isinstance(item, form.Aggregate)
    }
    keys = [(_label(key.item), key.is_descending) for key in query.order]
    result: list[dict[str, Any]]
    if not by and not aggregates:
        names = [_label(item) for item in query.show]
        result = [dict(row) for row in found]
    else:
        if not query.show:
            aggregates["count"] = form.Aggregate(form.Name("count"))
        groups: dict[tuple[Any, ...], list[Row]] = {} if by else {(): []}
        for row in found:
            many = [name for name in by if isinstance(row[name], tuple)]
            for value in row[many[0]] if many else [None]:
                key = tuple(value if name in many else row[name] for name in by)
                groups.setdefault(key, []).append(row)
        result = [
            dict(zip(by, key, strict=True)) | {label: _aggregate(item, of) for label, item in aggregates.items()}
            for key, of in groups.items()
        ]
        shown = [_label(item) for item in query.show] or ["count"]
        names = [*(name for name in by if name not in shown), *shown]
        keys += [(name, False) for name in by]
    names = list(dict.fromkeys(names))
    ordered = _sort(result, keys, subject)[: query.limit or limit]
    return names, [tuple(list(c) if isinstance(c := row[name], tuple) else c for name in names) for row in ordered]


def _label(item: form.Item) -> str:
    return item.text if isinstance(item, form.Name) else item.label


@dataclass
class TableSource:
    """A source of one table."""

    made: Table
    layers: Sequence[LayerFacts] = ()
    capabilities: Capabilities = field(default_factory=lambda: Capabilities("a test"))

    def num_rows(self, scope: Scope) -> int:
        return 0

    def batches(self, raw: frozenset[str], scope: Scope) -> Iterator[RowBatch]:
        yield from ()

    def table(self, plan: Plan) -> Table | None:
        return self.made

    def notes(self, plan: Plan) -> Sequence[str]:
        return ()


@dataclass
class RowsSource:
    """Token rows in batches; every column that is asked for, and no other, is given."""

    columns: Mapping[str, Any]
    request_ids: Sequence[str]
    layers: Sequence[LayerFacts]
    cuts: Sequence[int] = ()
    capabilities: Capabilities = field(default_factory=lambda: Capabilities("a test"))
    num_read: int = 0

    def num_rows(self, scope: Scope) -> int:
        return len(self.columns["layer_index"])

    def batches(self, raw: frozenset[str], scope: Scope) -> Iterator[RowBatch]:
        edges = [0, *sorted(self.cuts), len(self.columns["layer_index"])]
        for start, stop in pairwise(edges):
            self.num_read += stop - start
            yield RowBatch({name: self.columns[name][start:stop] for name in raw}, self.request_ids)

    def table(self, plan: Plan) -> Table | None:
        return None

    def notes(self, plan: Plan) -> Sequence[str]:
        return ()


def token_rows(source: RowsSource) -> list[Row]:
    """Return the valid rows of a source, read value by value."""
    c = source.columns
    modules = {layer.layer_index: layer.module for layer in source.layers}
    phases = ("unspecified", "prefill", "decode", "train", "eval")
    rows: list[Row] = []
    for at in range(len(c["layer_index"])):
        if c["is_padding"][at]:
            continue
        reached = [slot for slot in range(c["expert_ids"].shape[1]) if c["expert_ids"][at][slot] >= 0]

        def number(name: str, at: int = at) -> float | None:
            value = float(c[name][at])
            return None if value != value else value

        token_id = int(c["token_id"][at])
        rows.append({
            "request": source.request_ids[int(c["request_index"][at])],
            "position": int(c["position"][at]),
            "phase": phases[int(c["phase"][at])],
            "step": int(c["step"][at]),
            "token_id": None if token_id < 0 else token_id,
            "layer": int(c["layer_index"][at]),
            "module": modules[int(c["layer_index"][at])],
            "experts": tuple(int(c["expert_ids"][at][slot]) for slot in reached),
            "expert": tuple(int(c["expert_ids"][at][slot]) for slot in reached),
            "weights": tuple(float(c["gate_weights"][at][slot]) for slot in reached),
            "num_experts_reached": len(reached),
            "dropped_slots": sum(int(each) == 2 for each in c["slot_status"][at]),
            **{name: number(name) for name in ("margin", "router_entropy", "router_logsumexp", "top1_probability")},
        })  # fmt: skip
    return rows


def random_source(seed: int, num_rows: int, cuts: Sequence[int] = ()) -> RowsSource:
    """Return rows with every kind of slot, padding, missing values and texts that repeat."""
    rng = np.random.default_rng(seed)
    layers = [LayerFacts(0, 5, 2, module="a.mlp"), LayerFacts(1, 4, 2, 1, "b.mlp"), LayerFacts(2, 4, 1, module="a.mlp")]
    layer = rng.integers(0, 3, num_rows)
    ids = np.stack([rng.permutation(4)[:2] for _ in range(num_rows)]) if num_rows else np.zeros((0, 2), int)
    status = rng.choice([1, 1, 1, 2, 3], (num_rows, 2))
    status[layer == 2, 1] = 5
    ids = np.where(status == 1, ids, -1)
    # Layer 1 has an identity expert, whose id is 4: it is no load.
    is_identity = (layer[:, None] == 1) & (status == 1) & (rng.random((num_rows, 2)) < 0.2) & [True, False]
    ids, status = np.where(is_identity, 4, ids), np.where(is_identity, 4, status)
    # Quarters are exact in every width of float.
    quarters = {
        name: np.where(rng.random(num_rows) < 0.2, np.nan, rng.integers(0, 9, num_rows) / 4).astype(np.float32)
        for name in ("margin", "router_entropy", "router_logsumexp", "top1_probability")
    }
    return RowsSource(
        {
            "layer_index": layer.astype(np.uint32),
            "is_padding": rng.random(num_rows) < 0.1,
            "request_index": rng.integers(0, 3, num_rows).astype(np.uint32),
            "position": rng.integers(0, 6, num_rows).astype(np.uint32),
            "phase": rng.integers(0, 5, num_rows).astype(np.uint8),
            "step": rng.integers(0, 5, num_rows).astype(np.uint64),
            "token_id": rng.integers(-1, 4, num_rows).astype(np.int32),
            "expert_ids": ids.astype(np.int32),
            "slot_status": status.astype(np.uint8),
            "gate_weights": np.where(ids >= 0, rng.integers(1, 4, (num_rows, 2)) / 4, np.nan).astype(np.float32),
            **quarters,
        },
        ("req-b", "req-a", "Req-C"),
        layers,
        cuts,
    )
