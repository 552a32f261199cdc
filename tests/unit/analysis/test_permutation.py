"""The permutation test against all arrangements, and its rate of false alarms on healthy documents."""

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_debugger.analysis import PermutationResult, RoutingState, RowSet, jensen_shannon_bits, permutation_test
from moe_debugger.errors import InvalidInputError


def rows_of(ids: Any, documents: Any, *, num_experts: int = 8, layer: Any = None) -> RowSet:
    ids = np.asarray(ids, np.int32)
    columns = {
        "layer_index": np.zeros(len(ids), np.int64) if layer is None else layer,
        "expert_ids": ids,
        "request_id": np.asarray(documents),
    }
    return RowSet.of(columns, num_experts=num_experts, top_k=ids.shape[1])


def healthy(rng: np.random.Generator, *, num: int = 40, length: int = 32, topic: float = 1.0) -> Any:
    """Return ids [num, length, 2] of documents of one population that each prefer some experts."""
    scores = rng.normal(0, topic, (num, 1, 8)) + rng.gumbel(size=(num, length, 8))
    return np.argsort(-scores, axis=2)[:, :, :2]


def test_permutation_test_equals_the_hand_worked_example() -> None:
    a, b = rows_of([[0]] * 3, ["a", "b", "c"]), rows_of([[1]] * 3, ["d", "e", "f"])
    result = permutation_test(a, b, num_permutations=4999)
    assert result.layers[0].statistic == 1
    # 2 of the 20 ways to deal six documents into three and three.
    assert result.p_value == pytest.approx(0.1, abs=0.02)
    assert result.smallest_p_value == pytest.approx(2 / 20)
    assert (result.num_units_a, result.num_units_b, result.num_paired) == (3, 3, 0)


@settings(max_examples=15, deadline=None)
@given(
    pairs=st.lists(st.tuples(*[st.lists(st.integers(0, 2), min_size=1, max_size=4)] * 2), min_size=0, max_size=2),
    singles_a=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=4), min_size=2, max_size=3),
    singles_b=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=4), min_size=2, max_size=3),
)
def test_permutation_test_approaches_the_share_of_all_arrangements(
    pairs: list[Any], singles_a: list[list[int]], singles_b: list[list[int]]
) -> None:
    sides = []
    for side, singles in ((0, singles_a), (1, singles_b)):
        texts = {f"pair {i}": pair[side] for i, pair in enumerate(pairs)}
        texts |= {f"single {side} {i}": text for i, text in enumerate(singles)}
        ids = [[e] for text in texts.values() for e in text]
        sides.append(rows_of(ids, [name for name, text in texts.items() for _ in text], num_experts=3))
    result = permutation_test(*sides, num_permutations=2000, seed=1)

    def statistic(first: list[list[int]], second: list[list[int]]) -> float:
        loads = [[sum(text.count(e) for text in group) for e in range(3)] for group in (first, second)]
        return float(jensen_shannon_bits(*loads))

    singles = singles_a + singles_b
    values = []
    for swaps in itertools.product((0, 1), repeat=len(pairs)):
        for chosen in itertools.combinations(range(len(singles)), len(singles_a)):
            first = [pair[swap] for pair, swap in zip(pairs, swaps, strict=True)] + [singles[i] for i in chosen]
            second = [pair[1 - swap] for pair, swap in zip(pairs, swaps, strict=True)]
            second += [singles[i] for i in range(len(singles)) if i not in chosen]
            values.append(statistic(first, second))
    observed = statistic([p[0] for p in pairs] + singles_a, [p[1] for p in pairs] + singles_b)
    exact = sum(value >= observed - 1e-12 for value in values) / len(values)
    assert result.layers[0].statistic == pytest.approx(observed, abs=1e-12)
    assert result.p_value == pytest.approx(exact, abs=0.06)
    # Swapped sides differ as much, and are an arrangement of their own where they are of one size.
    least = (2 if len(singles_a) == len(singles_b) else 1) / len(values)
    assert result.layers[0].null_mean == pytest.approx(np.mean(values), abs=0.06)
    assert result.smallest_p_value == pytest.approx(max(least, 1 / 2001))


def test_halves_of_one_population_are_rejected_at_the_nominal_rate_but_nearly_always_by_a_test_of_single_tokens() -> (
    None
):
    rng = np.random.default_rng(0)
    num_trials, by_documents, by_tokens = 300, 0, 0
    documents = np.repeat(np.arange(20), 32)
    for trial in range(num_trials):
        ids = healthy(rng).reshape(2, -1, 2)
        a, b = (rows_of(half, np.char.add(name, documents.astype(str))) for half, name in zip(ids, "ab", strict=True))
        by_documents += permutation_test(a, b, num_permutations=99, seed=trial).p_value <= 0.05
        if trial < 60:
            # The same test, with each token as a document of its own.
            tokens = np.arange(640).astype(str)
            a, b = (rows_of(half, np.char.add(name, tokens)) for half, name in zip(ids, "ab", strict=True))
            by_tokens += permutation_test(a, b, num_permutations=99, seed=trial).p_value <= 0.05
    # 15 of 300 are expected; above 27, or below 5, a binomial test rejects the nominal 5 % at 0.002.
    assert 5 <= by_documents <= 27
    assert by_tokens > 48  # 80 %


def test_layers_together_are_rejected_at_the_nominal_rate_by_adjusted_p_values_alone() -> None:
    rng = np.random.default_rng(1)
    adjusted = naive = 0
    layer, documents = np.repeat(np.arange(6), 20 * 8), np.tile(np.repeat(np.arange(20), 8), 6)
    for trial in range(120):
        sides = []
        for name in "ab":
            ids = np.concatenate([healthy(rng, num=20, length=8).reshape(-1, 2) for _ in range(6)])
            sides.append(rows_of(ids, np.char.add(name, documents.astype(str)), layer=layer))
        result = permutation_test(*sides, num_permutations=99, seed=trial)
        adjusted += result.p_value <= 0.05
        naive += min(layer.p_value for layer in result.layers.values()) <= 0.05
    assert 1 <= adjusted <= 13  # 6 expected
    assert naive > 18


def planted(strength: float) -> PermutationResult:
    rng = np.random.default_rng(2)
    ids = healthy(rng, num=60)
    ids[30:][rng.random((30, 32)) < strength] = [0, 1]
    documents = np.repeat(np.arange(30), 32).astype(str)
    halves = (
        rows_of(half.reshape(-1, 2), np.char.add(n, documents))
        for half, n in zip((ids[:30], ids[30:]), "ab", strict=True)
    )
    return permutation_test(*halves)


def test_permutation_test_finds_a_planted_difference() -> None:
    assert planted(0.4).p_value == planted(0.4).layers[0].p_value == 0.001
    assert planted(0.4).layers[0].statistic > planted(0.4).layers[0].null_upper
    assert planted(0.0).p_value > 0.05


def test_documents_of_both_groups_are_exchanged_within_their_pair() -> None:
    rng = np.random.default_rng(3)
    ids = healthy(rng, num=30, topic=3.0).reshape(-1, 2)
    changed = np.where(rng.random((len(ids), 1)) < 0.1, [0, 1], ids)
    names = np.repeat(np.arange(30), 32).astype(str)
    paired = permutation_test(rows_of(ids, names), rows_of(changed, names))
    apart = permutation_test(rows_of(ids, names), rows_of(changed, np.char.add("other ", names)))
    # One and the same difference, which the spread between documents hides where the pairs are not known.
    assert paired.layers[0].statistic == apart.layers[0].statistic
    assert paired.num_paired == 30
    assert paired.p_value <= 0.01
    assert apart.p_value > 0.2


def test_permutation_test_is_the_same_for_any_order_of_rows_and_takes_another_statistic() -> None:
    rng = np.random.default_rng(4)
    ids = healthy(rng, num=10).reshape(-1, 2)
    names, order = np.repeat(np.arange(10), 32).astype(str), rng.permutation(320)
    other = rows_of(healthy(rng, num=10).reshape(-1, 2), np.char.add("b", names))
    first = permutation_test(rows_of(ids, names), other, seed=5)
    assert permutation_test(rows_of(ids[order], names[order]), other, seed=5) == first
    largest = permutation_test(
        rows_of(ids, names),
        other,
        statistic=lambda a, b: abs(a / a.sum(1, keepdims=True) - b / b.sum(1, keepdims=True)).max(1),
    )
    loads = [rows.unit_loads(0).sum(axis=0) for rows in (rows_of(ids, names), other)]
    assert largest.layers[0].statistic == pytest.approx(abs(loads[0] / 640 - loads[1] / 640).max())


def test_permutation_test_says_that_it_needs_rows_of_named_documents() -> None:
    rows = rows_of([[0], [1]], ["a", "b"])
    with pytest.raises(InvalidInputError, match="this needs rows"):
        permutation_test(RoutingState({}), RoutingState({}))  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="2 and 1 documents"):
        permutation_test(rows, rows_of([[0]], ["c"]))
    with pytest.raises(InvalidInputError, match="expected 19 or more"):
        permutation_test(rows, rows, num_permutations=18)
    with pytest.raises(InvalidInputError, match="no load"):
        permutation_test(rows, rows_of([[-1], [-1]], ["c", "d"]))
    with pytest.raises(InvalidInputError, match="different models"):
        permutation_test(rows, rows_of([[0], [1]], ["c", "d"], num_experts=4))
