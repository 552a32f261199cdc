"""The best matching against all matchings, and against certificates of optimality."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_debugger.analysis.assignment import best_assignment
from moe_debugger.errors import InvalidInputError


def test_best_assignment_gives_up_the_best_pair_where_that_pays() -> None:
    found = best_assignment([[3, 2], [2, 0]])
    assert found.column.tolist() == [1, 0]
    assert (found.total, found.is_exact) == (4, True)
    greedy = best_assignment([[3, 2], [2, 0]], max_exact=1)
    assert greedy.column.tolist() == [0, 1]
    assert (greedy.total, greedy.upper_bound, greedy.is_exact) == (3, 5, False)


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 6), st.integers(0, 2**32 - 1), st.sampled_from([2, 5, 1000]))
def test_best_assignment_equals_the_best_of_all_permutations(n: int, seed: int, levels: int) -> None:
    # Few levels make many ties.
    table = np.random.default_rng(seed).integers(-levels, levels, (n, n)).astype(float)
    best = max(sum(table[i][p[i]] for i in range(n)) for p in itertools.permutations(range(n)))
    found = best_assignment(table)
    assert sorted(found.column.tolist()) == list(range(n))
    assert found.total == pytest.approx(best)
    assert sum(table[i][c] for i, c in enumerate(found.column.tolist())) == pytest.approx(found.total)
    rough = best_assignment(table, max_exact=0)
    assert sorted(rough.column.tolist()) == list(range(n))
    assert rough.total <= best + 1e-9 <= rough.upper_bound + 2e-9


def test_no_exchange_of_two_or_three_betters_a_large_matching() -> None:
    table = np.random.default_rng(3).normal(size=(150, 150))
    found = best_assignment(table)
    column = found.column
    matched = table[np.arange(150), column]
    swapped = table[:, column] + table[:, column].T - matched[:, None] - matched[None, :]
    assert swapped.max() <= 1e-9
    greedy = best_assignment(table, max_exact=10)
    assert greedy.total < found.total < greedy.upper_bound


def test_a_hidden_permutation_is_found_at_any_size() -> None:
    order = np.random.default_rng(0).permutation(300)
    found = best_assignment(np.eye(300)[order] + 0.1, max_exact=1)
    assert found.is_exact
    assert found.column.tolist() == order.tolist()
    assert best_assignment(np.zeros((0, 0))).total == 0


@pytest.mark.parametrize("scores", [np.zeros((2, 3)), np.zeros(4), [[0, np.nan], [0, 0]]])
def test_what_is_no_square_table_is_refused(scores: object) -> None:
    with pytest.raises(InvalidInputError, match="scores"):
        best_assignment(scores)  # type: ignore[arg-type]
