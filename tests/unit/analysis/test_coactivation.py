"""Co-activation against hand-worked examples and slow, independent references."""

import itertools
import json
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from random_rows import Case, cases, shuffled, tokens_of

from moe_debugger.analysis.coactivation import expert_coactivation
from moe_debugger.analysis.expert_pairs import pair_stripes
from moe_debugger.analysis.token_rows import DecisionRows
from moe_debugger.errors import InvalidInputError


def one_layer(ids: list[list[int]]) -> dict[str, Any]:
    return {"layer_index": [0] * len(ids), "expert_ids": np.array(ids, np.int32)}


def test_coactivation_equals_the_hand_worked_example() -> None:
    rows = one_layer([[0, 1], [1, 0], [2, 0], [2, 1]])
    rows["is_padding"] = [False, False, False, True]
    result = expert_coactivation(rows, num_experts=3, top_k=2)[0]
    assert (result.num_tokens, result.not_applicable) == (3, "")
    assert result.expert_tokens.tolist() == [3, 2, 1]
    assert result.counts is not None
    assert result.conditional is not None
    assert result.lift is not None
    assert result.counts.tolist() == [[0, 2, 1], [2, 0, 0], [1, 0, 0]]
    assert result.conditional[0].tolist() == [0, pytest.approx(2 / 3), pytest.approx(1 / 3)]
    assert result.conditional[1].tolist() == [1, 0, 0]
    assert result.lift[0, 1:].tolist() == [1, 1]
    assert np.isnan(result.lift.diagonal()).all()
    assert result.row_sum.tolist() == [1, 1, 1]
    assert result.row_sum_error == 0
    assert result.chance == 0.5
    assert result.chance_lift == pytest.approx(0.75)
    # Expected counts are 0.75 * 3 * 2 / 3 = 1.5 and 0.75: both pairs lie above, (0, 1) further.
    assert [(pair.first, pair.second, pair.num_tokens) for pair in result.top_pairs] == [(0, 1, 2), (0, 2, 1)]
    assert result.top_pairs[1].conditional == pytest.approx(1 / 3)
    assert result.top_pairs[1].lift == 1
    assert math.isnan(result.top_pairs[0].lift_interval.lower)  # one block of rows
    json.dumps(result.to_dict())


@pytest.mark.parametrize(
    ("ids", "sizes", "reason"),
    [
        ([[0], [1]], (2, 1), "one expert"),
        ([[0, -1], [-1, 1]], (2, 2), "no valid token"),
        ([[-1, -1]], (4, 2), "no valid token"),
    ],
)
def test_coactivation_is_not_applicable_without_pairs(
    ids: list[list[int]], sizes: tuple[int, int], reason: str
) -> None:
    result = expert_coactivation(one_layer(ids), num_experts=sizes[0], top_k=sizes[1])[0]
    assert reason in result.not_applicable
    assert (result.counts, result.conditional, result.lift, result.top_pairs) == (None, None, None, ())
    assert math.isnan(result.chance)


@settings(max_examples=60, deadline=None)
@given(case=cases(min_top_k=2))
def test_coactivation_equals_a_slow_reference(case: Case) -> None:
    results = expert_coactivation(case.columns, **case.sizes)
    for layer, result in results.items():
        sets = [token.experts for token in tokens_of(case, layer)]
        num = case.num_experts[layer]
        used = Counter(expert for experts in sets for expert in experts)
        together = Counter(pair for experts in sets for pair in itertools.permutations(sorted(experts), 2))
        assert result.num_tokens == len(sets)
        assert result.num_partial_tokens == sum(len(experts) < case.top_k[layer] for experts in sets)
        assert result.expert_tokens.tolist() == [used[expert] for expert in range(num)]
        assert bool(result.not_applicable) == (not together)
        if result.not_applicable:
            continue
        assert result.counts is not None
        assert result.conditional is not None
        assert result.lift is not None
        for i, j in itertools.product(range(num), repeat=2):
            assert result.counts[i, j] == together[i, j]
            share = together[i, j] / used[i] if used[i] else math.nan
            assert result.conditional[i, j] == pytest.approx(share, nan_ok=True)
            lift = together[i, j] * len(sets) / (used[i] * used[j]) if used[i] * used[j] and i != j else math.nan
            assert result.lift[i, j] == pytest.approx(lift, nan_ok=True)
        others = [[len(experts) - 1 for experts in sets if expert in experts] for expert in range(num)]
        means = [sum(sizes) / len(sizes) if sizes else math.nan for sizes in others]
        assert result.row_sum.tolist() == pytest.approx(means, nan_ok=True)
        assert result.row_sum_error < 1e-12
        full = [pair for pair in together if pair[0] < pair[1]]
        above = {
            (i, j) for i, j in full if together[i, j] > used[i] * used[j] / len(sets) * result.chance_lift * (1 + 1e-12)
        }
        assert above <= {(pair.first, pair.second) for pair in result.top_pairs} <= set(full)


@settings(max_examples=15, deadline=None)
@given(case=cases(min_top_k=2))
def test_coactivation_does_not_depend_on_the_order_of_rows_that_name_requests(case: Case) -> None:
    once, again = (expert_coactivation(each.columns, **each.sizes) for each in (case, shuffled(case)))
    assert str({i: result.to_dict() for i, result in once.items()}) == str(
        {i: result.to_dict() for i, result in again.items()}
    )


def test_row_sums_are_k_minus_1_and_chance_is_met_by_even_independent_choices(
    simulate: Callable[..., dict[str, Any]],
) -> None:
    rows = simulate(np.random.default_rng(3), num_experts=16, top_k=4, num_tokens=20_000, num_layers=1)
    result = expert_coactivation(rows, num_experts=16, top_k=4)[0]
    assert result.row_sum.tolist() == pytest.approx([3.0] * 16)
    assert result.chance == pytest.approx(3 / 15)
    assert result.chance_lift == pytest.approx(0.75 * 16 / 15)
    assert result.conditional is not None
    assert result.lift is not None
    off_diagonal = ~np.eye(16, dtype=bool)
    assert result.conditional[off_diagonal].mean() == pytest.approx(result.chance)
    # 240 shares of about 5,000 tokens each: four standard errors.
    assert np.abs(result.conditional[off_diagonal] - 0.2).max() < 4.5 * math.sqrt(0.2 * 0.8 / 5000)
    assert np.nanmean(result.lift) == pytest.approx(result.chance_lift, rel=0.01)


def test_the_interval_of_a_planted_pair_holds_and_excludes_chance() -> None:
    rng = np.random.default_rng(5)
    ids = np.argsort(rng.random((6400, 8)), axis=1)[:, :2]
    ids[rng.random(6400) < 0.1] = [3, 5]
    rows = one_layer(ids.tolist()) | {"request_id": [f"r{i // 32}" for i in range(6400)]}
    pair = expert_coactivation(rows, num_experts=8, top_k=2)[0].top_pairs[0]
    assert (pair.first, pair.second) == (3, 5)
    # By hand: P(3 and 5) = .1 + .9/28, P(3) = .1 + .9/4.
    truth = (0.1 + 0.9 / 28) / (0.1 + 0.9 / 4) ** 2
    assert pair.lift_interval.lower < truth < pair.lift_interval.upper
    assert pair.lift_interval.lower > 0.571


def test_the_interval_of_a_lift_is_that_of_the_jackknife() -> None:
    rng = np.random.default_rng(8)
    n, length = 6400, 32
    # Every request prefers experts of its own, so tokens are far from independent.
    preference = np.repeat(rng.normal(0, 1.5, (n // length, 8)), length, axis=0)
    ids = np.argsort(-(preference + rng.gumbel(size=(n, 8))), axis=1)[:, :2]
    rows = one_layer(ids.tolist()) | {"request_id": [f"r{i // length}" for i in range(n)]}
    block = DecisionRows(rows, num_experts=8, top_k=2).layer(0).block
    for pair in expert_coactivation(rows, num_experts=8, top_k=2, num_top_pairs=3)[0].top_pairs:
        one, two = (ids == pair.first).any(axis=1), (ids == pair.second).any(axis=1)
        logs = []
        for left_out in np.unique(block):
            kept = block != left_out
            lift = (one & two & kept).sum() * kept.sum() / ((one & kept).sum() * (two & kept).sum())
            logs.append(math.log(lift))
        error = math.sqrt((len(logs) - 1) / len(logs) * sum((each - np.mean(logs)) ** 2 for each in logs))
        width = math.log(pair.lift_interval.upper / pair.lift)
        assert width == pytest.approx(math.log(pair.lift / pair.lift_interval.lower))
        # 2.0 = the 97.5 % quantile of Student's t for some 50 to 60 degrees of freedom.
        assert width == pytest.approx(2.0 * error, rel=0.1)


def test_many_experts_give_the_pairs_that_stand_out_without_tables() -> None:
    rng = np.random.default_rng(2)
    ids = np.sort(rng.integers(0, 2000, (3000, 3)), axis=1)
    ids = ids[(np.diff(ids, axis=1) > 0).all(axis=1)]
    ids[::100] = [7, 1100, 1999]
    result = expert_coactivation(one_layer(ids.tolist()), num_experts=2000, top_k=3, num_top_pairs=3)[0]
    assert (result.counts, result.conditional, result.lift) == (None, None, None)
    assert {(pair.first, pair.second) for pair in result.top_pairs} == {(7, 1100), (7, 1999), (1100, 1999)}
    assert all(pair.num_tokens >= 29 for pair in result.top_pairs)
    assert result.row_sum_error < 1e-12


@settings(max_examples=30, deadline=None)
@given(case=cases())
def test_stripes_of_any_height_make_the_same_table(case: Case) -> None:
    tokens = tokens_of(case, 0)
    if not tokens:
        return
    num, k = case.num_experts[0], case.top_k[0]
    sets = np.array([sorted(token.experts) + [num] * (k - len(token.experts)) for token in tokens], np.int32)
    whole = next(table for _, table in pair_stripes(sets, num, sets, num))
    for cells in (1, 2 * (num + 1), 3 * (num + 1)):
        stripes = list(pair_stripes(sets, num, sets, num, max_cells=cells))
        assert [first for first, _ in stripes] == list(np.cumsum([0] + [len(table) for _, table in stripes[:-1]]))
        assert np.concatenate([table for _, table in stripes]).tolist() == whole.tolist()


def test_ids_out_of_range_and_columns_of_other_lengths_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="reach from 0 to 4"):
        expert_coactivation(one_layer([[0, 4]]), num_experts=4, top_k=2)
    with pytest.raises(InvalidInputError, match="top_k = 3"):
        expert_coactivation(one_layer([[0, 1]]), num_experts=4, top_k=3)
    with pytest.raises(InvalidInputError, match=r"other lengths than layer_index \(1 rows\): {'rank': 2}"):
        expert_coactivation(one_layer([[0, 1]]) | {"rank": [0, 0]}, num_experts=4, top_k=2)


def test_an_expert_that_a_row_names_twice_counts_once() -> None:
    result = expert_coactivation(one_layer([[1, 1, 2], [0, 1, 2]]), num_experts=3, top_k=3)[0]
    assert result.expert_tokens.tolist() == [1, 2, 2]
    assert result.num_partial_tokens == 1
    assert result.counts is not None
    assert result.counts[1].tolist() == [1, 0, 2]
