"""Runs of rows against loops over rows."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_debugger.analysis import _row_runs
from moe_debugger.analysis._row_runs import RowsOf, distinct, load_of_runs, rows_of_each, run_starts, sums_by_group

FEW = st.lists(st.integers(0, 3), min_size=0, max_size=40)


def test_runs_equal_the_hand_worked_example() -> None:
    assert run_starts(np.array([7, 7, 9, 7])).tolist() == [0, 2, 3]
    assert run_starts(np.array([7, 7, 9, 9]), np.array([1, 2, 2, 2])).tolist() == [0, 1, 2]
    sums = sums_by_group(np.array([[1, 0], [0, 2], [3, 3]]), np.array([1, 0, 1]), 3)
    assert sums.tolist() == [[0, 2], [4, 3], [0, 0]]
    load = load_of_runs(np.array([[0, 1], [0, 2], [1, 2]], np.int32), None, np.array([0, 2]), 3)
    assert load.tolist() == [[2, 1, 1], [0, 1, 1]]


@settings(max_examples=80, deadline=None)
@given(FEW)
def test_rows_of_each_value_equal_a_loop(values: list[int]) -> None:
    column, payload = np.array(values, np.int64), np.arange(len(values)) * 10
    found = rows_of_each(column)
    assert list(found) == sorted(set(values))
    for value, rows in found.items():
        expected = [row for row, each in enumerate(values) if each == value]
        assert rows.indices.tolist() == expected
        assert len(rows) == len(expected)
        assert rows.of(payload).tolist() == [10 * row for row in expected]
        assert rows.of(np.column_stack([payload, payload])).tolist() == [[10 * row] * 2 for row in expected]
    assert distinct(column).tolist() == sorted(set(values))


def test_long_runs_are_copied_and_short_ones_picked() -> None:
    column = np.arange(1000)
    long = RowsOf(np.array([0, 400]), np.array([300, 700]))
    short = RowsOf(np.array([3, 5, 9]), np.array([4, 6, 11]))
    assert long.of(column).tolist() == [*range(300), *range(400, 700)]
    assert short.of(column).tolist() == [3, 5, 9, 10]
    one = RowsOf(np.array([20]), np.array([30])).of(column)
    assert one.base is column


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.sampled_from([1, 3, 100]))
def test_load_of_runs_equals_a_loop(seed: int, num: int, rows_at_once: int) -> None:
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 4, (num, 2)).astype(np.int32)
    is_load = rng.random((num, 2)) < 0.7 if seed % 2 else None
    starts = np.unique(np.append(rng.integers(0, num, 3), 0))
    expected = np.zeros((len(starts), 4), int)
    for row, slot in itertools.product(range(num), range(2)):
        run = sum(start <= row for start in starts) - 1
        expected[run][ids[row, slot]] += is_load is None or bool(is_load[row, slot])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_row_runs, "_ROWS_AT_ONCE", rows_at_once)
        assert load_of_runs(ids, is_load, starts, 4).tolist() == expected.tolist()


@settings(max_examples=60, deadline=None)
@given(FEW)
def test_sums_by_group_equal_a_loop(groups: list[int]) -> None:
    table = np.arange(2 * len(groups), dtype=np.uint64).reshape(-1, 2)
    expected = [
        [sum(int(table[i][c]) for i, g in enumerate(groups) if g == group) for c in range(2)] for group in range(4)
    ]
    found = sums_by_group(table, np.array(groups, np.int64), 4)
    assert found.tolist() == expected
    assert found.dtype == np.uint64
    assert sums_by_group(table[:, 0], np.array(groups, np.int64), 4).tolist() == [row[0] for row in expected]
