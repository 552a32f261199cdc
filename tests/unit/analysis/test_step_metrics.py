"""MaxVio of single steps beside that of their sum."""

import math
import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_debugger.analysis.step_metrics import step_balance
from moe_debugger.errors import InvalidInputError


def test_step_balance_equals_the_hand_worked_example() -> None:
    found = step_balance([[2, 0], [0, 2], [0, 0]])
    assert found.num_steps == 2
    assert found.num_assignments == 4
    assert found.max_violation_batch == 1
    assert found.max_violation_global == 0
    assert found.persistent_share == 0
    assert found.num_hottest_experts == 2
    assert (found.cv_batch, found.cv_global) == (1, 0)
    # Steps of (3, 1) and (1, 1): MaxVio 0.5 and 0; the sum (4, 2) has 1/3.
    uneven = step_balance([[3, 1], [1, 1]])
    assert uneven.max_violation_batch == 0.25
    assert uneven.max_violation_highest == 0.5
    assert uneven.max_violation_global == pytest.approx(1 / 3)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 50), min_size=3, max_size=3), min_size=1, max_size=12))
def test_step_balance_equals_a_slow_reference(table: list[list[int]]) -> None:
    found = step_balance(table)
    steps = [row for row in table if sum(row)]
    assert found.num_steps == len(steps)
    if not steps:
        assert math.isnan(found.max_violation_batch)
        assert found.num_hottest_experts == 0
        return
    violations = [(max(row) - sum(row) / 3) / (sum(row) / 3) for row in steps]
    total = [sum(row[e] for row in steps) for e in range(3)]
    assert found.max_violation_batch == pytest.approx(statistics.mean(violations))
    assert found.max_violation_highest == pytest.approx(max(violations))
    assert found.max_violation_global == pytest.approx(max(total) * 3 / sum(total) - 1)
    assert found.cv_batch == pytest.approx(statistics.mean(statistics.pstdev(row) / (sum(row) / 3) for row in steps))
    assert found.cv_global == pytest.approx(statistics.pstdev(total) / (sum(total) / 3))
    assert found.num_hottest_experts == len({row.index(max(row)) for row in steps})
    if max(violations) > 0:
        assert found.persistent_share == pytest.approx(found.max_violation_global / found.max_violation_batch)
    else:
        assert math.isnan(found.persistent_share)


def test_a_balanced_router_has_the_violation_that_its_small_steps_explain() -> None:
    rng = np.random.default_rng(0)
    sizes = rng.integers(20, 40, 60)
    steps = [np.bincount(np.argsort(rng.random((n, 16)), axis=1)[:, :2].ravel(), minlength=16) for n in sizes]
    found = step_balance(steps, top_k=2)
    assert found.max_violation_batch == pytest.approx(found.max_violation_at_balance, rel=0.07)
    assert found.max_violation_batch > 5 * found.max_violation_global
    assert math.isnan(step_balance(steps).max_violation_at_balance)
    # More different sizes than are simulated one by one.
    many = step_balance(np.outer(np.arange(1, 200), np.ones(16, int)), top_k=2)
    assert 0 < many.max_violation_at_balance < 2
    assert many.max_violation_batch == 0


@pytest.mark.parametrize("counts", [[1, 2], [[1, -2]], [[1, math.nan]], np.zeros((3, 0)), [["a"]], [[1], [1, 2]]])
def test_what_is_no_table_of_counts_is_refused(counts: object) -> None:
    with pytest.raises(InvalidInputError, match="step loads"):
        step_balance(counts)  # type: ignore[arg-type]


@pytest.mark.parametrize("top_k", [0, 3, -1])
def test_k_that_is_none_of_the_layers_is_refused(top_k: int) -> None:
    with pytest.raises(InvalidInputError, match="expected 1 to 2"):
        step_balance([[1, 2]], top_k=top_k)
