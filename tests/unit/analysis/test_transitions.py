"""Transitions between layers against hand-worked examples and slow, independent references."""

import itertools
import json
import math
from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from random_rows import Case, Token, cases, shuffled, tokens_of

from moe_debugger.analysis.transitions import layer_transitions
from moe_debugger.errors import InvalidInputError


def hand_rows() -> dict[str, Any]:
    """Layer 0 saw the tokens at 0, 1, 2, layer 1 those at 2, 1, 3: two are the same, in another order."""
    return {
        "layer_index": [0, 0, 0, 1, 1, 1],
        "request_id": ["r"] * 6,
        "position": [0, 1, 2, 2, 1, 3],
        "expert_ids": np.array([[0, 1], [0, 1], [2, 0], [4, -1], [3, -1], [0, -1]], np.int32),
    }


def test_transitions_equal_the_hand_worked_example() -> None:
    result = layer_transitions(hand_rows(), num_experts=[3, 5], top_k=[2, 1])[0, 1]
    # Token 1: {0, 1} -> 3. Token 2: {0, 2} -> 4.
    assert (result.num_tokens, result.num_unmatched, result.num_ambiguous) == (2, 2, 0)
    assert result.expert_tokens.tolist() == [2, 1, 1]
    assert result.next_expert_tokens.tolist() == [0, 0, 0, 1, 1]
    assert result.counts is not None
    assert result.conditional is not None
    assert result.lift is not None
    assert result.counts.tolist() == [[0, 0, 0, 1, 1], [0, 0, 0, 1, 0], [0, 0, 0, 0, 1]]
    assert result.conditional[0, 3:].tolist() == [0.5, 0.5]
    assert result.lift[1, 3] == 2  # 1 * 2 / (1 * 1)
    assert math.isnan(result.lift[0, 0])
    assert result.chance.tolist() == [0, 0, 0, 0.5, 0.5]
    assert result.row_sum_error == 0
    assert {(pair.first, pair.second) for pair in result.top_pairs} == {(1, 3), (2, 4)}
    json.dumps(result.to_dict())


def test_rows_match_by_request_forward_and_position_and_not_by_their_number() -> None:
    rows = {
        "layer_index": [0, 0, 1, 1],
        "request_id": ["a", "b", "b", "a"],
        "forward_index": [7, 7, 7, 7],
        "position": [0, 0, 0, 0],
        "expert_ids": np.array([[0], [1], [1], [0]], np.int32),
    }
    result = layer_transitions(rows, num_experts=2, top_k=1)[0, 1]
    assert result.counts is not None
    assert result.counts.tolist() == [[1, 0], [0, 1]]
    later = layer_transitions(rows | {"forward_index": [7, 7, 8, 8]}, num_experts=2, top_k=1)[0, 1]
    assert (later.num_tokens, later.num_unmatched) == (0, 4)
    assert later.not_applicable == "no token has rows in both layers"
    assert np.isnan(later.chance).all()
    other = layer_transitions(rows | {"rank": [0, 0, 1, 1]}, num_experts=2, top_k=1)[0, 1]
    assert other.num_tokens == 0


def test_tokens_with_another_id_and_rows_that_share_a_key_are_left_out_and_counted() -> None:
    rows = hand_rows() | {"token_id": [5, 5, 5, 5, 6, 5]}
    result = layer_transitions(rows, num_experts=[3, 5], top_k=[2, 1])[0, 1]
    assert (result.num_tokens, result.num_other_token) == (1, 1)
    rows = hand_rows() | {"position": [0, 2, 2, 2, 1, 3]}
    result = layer_transitions(rows, num_experts=[3, 5], top_k=[2, 1])[0, 1]
    assert (result.num_tokens, result.num_ambiguous, result.num_unmatched) == (0, 2, 4)


@settings(max_examples=60, deadline=None)
@given(case=cases(max_layers=3))
def test_transitions_equal_a_slow_reference(case: Case) -> None:
    results = layer_transitions(case.columns, **case.sizes)
    layers = {int(layer) for layer in case.columns["layer_index"]}
    assert set(results) == {(layer, layer + 1) for layer in layers if layer + 1 in layers}
    for (one, two), result in results.items():
        first, ambiguous = _by_key(tokens_of(case, one))
        second, next_ambiguous = _by_key(tokens_of(case, two))
        keys = first.keys() & second.keys()
        matched = [
            (first[key], second[key])
            for key in keys
            if first[key].token_id == second[key].token_id or min(first[key].token_id, second[key].token_id) < 0
        ]
        assert result.num_tokens == len(matched)
        assert result.num_other_token == len(keys) - len(matched)
        assert result.num_ambiguous == ambiguous + next_ambiguous
        assert result.num_unmatched == len(first) + len(second) - 2 * len(keys)
        both = Counter(pair for a, b in matched for pair in itertools.product(a.experts, b.experts))
        used = Counter(expert for a, _ in matched for expert in a.experts)
        next_used = Counter(expert for _, b in matched for expert in b.experts)
        assert result.counts is not None
        assert result.conditional is not None
        assert result.lift is not None
        for i, j in itertools.product(range(case.num_experts[one]), range(case.num_experts[two])):
            assert result.counts[i, j] == both[i, j]
            share = both[i, j] / used[i] if used[i] else math.nan
            assert result.conditional[i, j] == pytest.approx(share, nan_ok=True)
            product = used[i] * next_used[j]
            lift = both[i, j] * len(matched) / product if product else math.nan
            assert result.lift[i, j] == pytest.approx(lift, nan_ok=True)
        if used:
            assert result.row_sum_error < 1e-12


def _by_key(tokens: list[Token]) -> tuple[dict[tuple[str, int, int], Token], int]:
    keys = Counter((token.request, token.forward, token.position) for token in tokens)
    unique = {key: token for token in tokens if keys[key := (token.request, token.forward, token.position)] == 1}
    return unique, len(tokens) - len(unique)


@settings(max_examples=15, deadline=None)
@given(case=cases(max_layers=3))
def test_transitions_do_not_depend_on_the_order_of_rows(case: Case) -> None:
    once, again = (layer_transitions(each.columns, **each.sizes) for each in (case, shuffled(case)))
    assert str({pair: result.to_dict() for pair, result in once.items()}) == str(
        {pair: result.to_dict() for pair, result in again.items()}
    )


def test_a_fixed_map_between_layers_has_lift_e_over_k_and_independence_has_lift_1() -> None:
    rng = np.random.default_rng(1)
    n = 4000
    one = rng.integers(0, 8, n)
    ids = np.concatenate([one, (one + 3) % 8, rng.integers(0, 8, n)])[:, None]
    rows = {
        "layer_index": np.repeat([0, 1, 2], n),
        "request_id": np.tile(np.array([f"r{i // 40}" for i in range(n)], dtype=object), 3),
        "position": np.tile(np.arange(n) % 40, 3),
        "expert_ids": ids,
    }
    results = layer_transitions(rows, num_experts=8, top_k=1, num_top_pairs=8)
    fixed, independent = results[0, 1], results[1, 2]
    assert {(pair.first, pair.second) for pair in fixed.top_pairs} == {(i, (i + 3) % 8) for i in range(8)}
    assert fixed.lift is not None
    assert fixed.lift[0, 3] == pytest.approx(8, rel=0.15)
    assert fixed.lift[0, 4] == 0
    assert independent.lift is not None
    assert np.abs(independent.lift - 1).max() < 0.5
    assert all(pair.lift_interval.lower > 5 for pair in fixed.top_pairs)


def test_pairs_can_be_named_and_those_of_two_stacks_are_left_out() -> None:
    rows = hand_rows()
    named = layer_transitions(rows, num_experts=[3, 5], top_k=[2, 1], pairs=[(1, 0)])
    assert list(named) == [(1, 0)]
    assert named[1, 0].expert_tokens.tolist() == [0, 0, 0, 1, 1]
    with pytest.raises(InvalidInputError, match=r"layers \[4\], which have no rows"):
        layer_transitions(rows, num_experts=[3, 5], top_k=[2, 1], pairs=[(0, 4)])

    class Session(dict[str, Any]):
        layers = {0: SimpleNamespace(stack="encoder"), 1: SimpleNamespace(stack="decoder")}  # noqa: RUF012

    assert layer_transitions(Session(rows), num_experts=[3, 5], top_k=[2, 1]) == {}


@pytest.mark.parametrize("name", ["request_id", "position"])
def test_rows_that_cannot_be_matched_are_refused(name: str) -> None:
    rows = hand_rows()
    del rows[name]
    with pytest.raises(InvalidInputError, match=name):
        layer_transitions(rows, num_experts=[3, 5], top_k=[2, 1])


def test_numbers_too_large_to_be_packed_match_as_small_ones_do(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(9)
    n = 60
    place = rng.permutation(n)
    rows = {
        "layer_index": np.repeat([0, 1], n),
        "request_id": np.array([f"r{i % 7}" for i in [*range(n), *place]], dtype=object),
        "forward_index": np.r_[np.arange(n) % 5, place % 5].astype(np.uint64),
        "position": np.r_[np.arange(n) // 3, place // 3].astype(np.uint32),
        "expert_ids": rng.integers(0, 4, (2 * n, 1)),
    }
    small = layer_transitions(rows, num_experts=4, top_k=1)[0, 1]
    assert (small.num_tokens, small.num_ambiguous) == (n, 0)
    large = rows | {
        "forward_index": rows["forward_index"] * np.uint64(2**61),
        "position": rows["position"] + np.uint32(2**32 - 100),
    }
    assert str(layer_transitions(large, num_experts=4, top_k=1)[0, 1].to_dict()) == str(small.to_dict())
    monkeypatch.setattr("moe_debugger.analysis.token_rows._LARGEST_CODE", 1)
    assert str(layer_transitions(large, num_experts=4, top_k=1)[0, 1].to_dict()) == str(small.to_dict())
