"""Columns that are no decisions are refused by every reader of rows, which say why; tables are read as mappings."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from moe_debugger.analysis import (
    RowSet,
    analyze,
    capacity_drops,
    expert_coactivation,
    layer_transitions,
    routing_locality,
)
from moe_debugger.errors import InvalidInputError
from moe_debugger.planning import loads_from_decisions

NUM_ROWS = 8
READERS: dict[str, Callable[..., Any]] = {
    "analyze": analyze,
    "RowSet": RowSet.of,
    "coactivation": expert_coactivation,
    "transitions": layer_transitions,
    "locality": routing_locality,
    "drops": capacity_drops,
}


def rows(**changes: Any) -> dict[str, Any]:
    columns = {
        "layer_index": np.repeat([0, 1], 4),
        "expert_ids": np.array([[0, 1], [2, 3], [0, 2], [1, 3]] * 2, np.int64),
        "request_id": ["a", "a", "b", "b"] * 2,
        "position": [0, 1, 0, 1] * 2,
        "forward_index": np.zeros(NUM_ROWS, np.int64),
        "phase": np.full(NUM_ROWS, 2),
    }
    return {name: column for name, column in (columns | changes).items() if column is not None}


def ids(*first: float) -> np.ndarray:
    """Return ids whose first row is `first`."""
    table = np.array([[0, 1]] * NUM_ROWS, np.asarray(first).dtype)
    table[0] = first
    return table


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "ids beyond 32 bits": ({"expert_ids": ids(2**32 + 3, 0)}, "expert_ids is 4294967299 in row 0"),
    "a fraction of an id": ({"expert_ids": ids(1.7, 0)}, r"expert_ids is 1\.7 in row 0, expected whole numbers"),
    "no number as id": ({"expert_ids": ids(np.nan, 0)}, "expert_ids is nan in row 0"),
    "ids as text": ({"expert_ids": [["0", "1"]] * NUM_ROWS}, "expert_ids holds <U1"),
    "ragged ids": ({"expert_ids": [[0]] + [[0, 1]] * (NUM_ROWS - 1)}, "expert_ids is ragged"),
    "ids without slots": ({"expert_ids": np.zeros(NUM_ROWS, int)}, r"shape \(8,\), expected \[n, k\]"),
    "too few rows": ({"expert_ids": np.zeros((3, 2), int)}, "other lengths than layer_index"),
    "a fraction of a layer": ({"layer_index": np.full(NUM_ROWS, 0.6)}, r"layer_index is 0\.6"),
    "a layer below 0": ({"layer_index": np.full(NUM_ROWS, -1)}, "layer_index is -1"),
    "no layers": ({"layer_index": None}, r"no column \['layer_index'\]"),
    "2-D padding": ({"is_padding": np.zeros((NUM_ROWS, 2), bool)}, r"is_padding has shape \(8, 2\), expected \(8,\)"),
    "status of one slot": ({"slot_status": np.ones((NUM_ROWS, 1), int)}, r"slot_status has shape \(8, 1\)"),
    "one value": ({"is_padding": False}, "is_padding is the single value False"),
}
BAD_WHERE_USED: dict[str, tuple[dict[str, Any], str, set[str]]] = {
    "position below 0": ({"position": np.arange(-1, NUM_ROWS - 1)}, "position is -1 in row 0", set(READERS)),
    "no position": ({"position": [np.nan] * NUM_ROWS}, "position is nan", set(READERS)),
    "no step": ({"step": [np.nan] * NUM_ROWS}, "step is nan", set(READERS)),
    "a step below 0": ({"step": [-3] * NUM_ROWS}, "step is -3", set(READERS)),
    "text as margin": ({"margin": ["x"] * NUM_ROWS}, "margin holds <U1, expected real numbers", {"analyze", "RowSet"}),
    "forwards of fewer rows": ({"forward_index": [0]}, "other lengths", set(READERS) - {"RowSet"}),
    "forwards of more rows": ({"forward_index": [0] * 99}, "other lengths", set(READERS) - {"RowSet"}),
    "intended ids of one slot": (
        {"intended_expert_ids": np.zeros((NUM_ROWS, 1), int)},
        r"intended_expert_ids has shape \(8, 1\), expected \(8, 2\)",
        set(READERS) - {"RowSet", "analyze"},
    ),
}
CASES = [
    *((reader, what, change, said) for what, (change, said) in BAD.items() for reader in READERS),
    *(
        (reader, what, change, said)
        for what, (change, said, readers) in BAD_WHERE_USED.items()
        for reader in sorted(readers)
    ),
]


@pytest.mark.parametrize(("reader", "what", "change", "said"), CASES, ids=[f"{case[0]}: {case[1]}" for case in CASES])
def test_columns_that_are_none_are_refused(reader: str, what: str, change: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidInputError, match=said):
        READERS[reader](rows(**change), num_experts=4, top_k=2)


@pytest.mark.parametrize(("change", "said"), BAD.values(), ids=BAD)
def test_loads_of_columns_that_are_none_are_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidInputError, match=said):
        loads_from_decisions(rows(**change), num_experts=4)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("size", [8.0, {1: 8}, "8", [8], [8, 8.5]], ids=str)
def test_sizes_that_are_no_whole_numbers_are_refused(reader: str, size: Any) -> None:
    with pytest.raises(InvalidInputError, match=r"num_experts (is|has)"):
        READERS[reader](rows(), num_experts=size, top_k=2)


def test_tables_give_what_the_same_columns_give() -> None:
    expected = analyze(rows(), num_experts=4, top_k=2).to_dict()
    lists = rows() | {"expert_ids": rows()["expert_ids"].tolist()}
    frame = pd.DataFrame(lists)
    tables: list[Any] = [frame, frame.astype({"position": "float64", "layer_index": "Int64"}), pa.table(lists)]
    for table in tables:
        assert str(analyze(table, num_experts=4, top_k=2).to_dict()) == str(expected)
        assert RowSet.of(table, num_experts=4, top_k=2).documents == ("a", "b")
        assert loads_from_decisions(table, num_experts=4).counts.sum() == 2 * NUM_ROWS
        assert routing_locality(table, num_experts=4, top_k=2)[0].num_tokens == 4
    with pytest.raises(InvalidInputError, match="got int: this needs rows"):
        analyze(3, num_experts=4, top_k=2)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [np.int8, np.uint16, np.uint64, np.float32, object])
def test_whole_numbers_of_any_dtype_are_the_same_rows(dtype: Any) -> None:
    expected = RowSet.of(rows(), num_experts=4, top_k=2)
    found = RowSet.of(
        rows(expert_ids=rows()["expert_ids"].astype(dtype), layer_index=rows()["layer_index"].astype(dtype)),
        num_experts=4,
        top_k=2,
    )
    assert found.expert_ids.tolist() == expected.expert_ids.tolist()
    assert found.bounds == expected.bounds


@pytest.mark.parametrize("status", [None, np.zeros((NUM_ROWS, 2), np.uint8), np.array([[1, 2], [0, 1]] * 4, np.uint8)])
@pytest.mark.parametrize("padding", [None, [True] + [False] * (NUM_ROWS - 1)])
def test_loads_count_the_slots_that_the_metrics_count(status: Any, padding: Any) -> None:
    columns = rows() | {"slot_status": status, "is_padding": padding}
    metrics = analyze(columns, num_experts=4, top_k=2).metrics
    counts = loads_from_decisions(columns, num_experts=4).counts.sum(axis=(0, 2))
    assert counts.tolist() == [metrics[0].num_assignments, metrics[1].num_assignments]
