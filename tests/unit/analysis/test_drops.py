"""Capacity and drops against hand-worked examples and slow, independent references."""

import json
import math
from collections import Counter, defaultdict
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_rows import DROPPED, ROUTED, Case, cases, tokens_of

from moe_debugger.analysis.drops import balanced_overflow, capacity_drops, expert_capacity
from moe_debugger.errors import InvalidInputError


def hand_rows() -> dict[str, Any]:
    """Four tokens of one forward want the experts 0, 0, 0, 1; the third was dropped."""
    return {
        "layer_index": [0] * 4,
        "expert_ids": np.array([[0], [0], [-1], [1]], np.int32),
        "intended_expert_ids": np.array([[0], [0], [0], [1]], np.int32),
        "slot_status": np.array([[1], [1], [2], [1]], np.uint8),
        "forward_index": np.zeros(4, np.uint64),
        "position": np.arange(4),
    }


def test_drops_equal_the_hand_worked_example() -> None:
    result = capacity_drops(hand_rows(), num_experts=2, top_k=1, capacity_factor=1.0, position_bounds=(0, 2, 8))[0]
    assert (result.num_slots, result.num_dropped, result.dropped_share) == (4, 1, 0.25)
    assert (result.num_overflow, result.overflow_share, result.num_forwards) == (1, 0.25, 1)
    assert [(part.first, part.last, part.num_slots) for part in result.by_position] == [(0, 1, 2), (2, 7, 2)]
    assert [part.dropped_share for part in result.by_position] == [0, 0.5]
    assert [part.overflow_share for part in result.by_position] == [0, 0.5]
    # X of 4 fair coins: 2 experts * (1 * P(3) + 2 * P(4)) = 2 * (4 + 2) / 16 slots of 4.
    assert result.balanced_overflow_share == pytest.approx(0.75 / 4)
    assert math.isnan(result.interval.lower)
    json.dumps(result.to_dict())


@pytest.mark.parametrize(
    ("arguments", "capacity"),
    [((1.0, 4, 1, 2), 2), ((1.25, 100, 2, 8), 32), ((1.1, 10, 1, 1), 11), ((0.1, 1, 1, 64), 1), ((1.0, 0, 2, 8), 0)],
)
def test_capacity_is_rounded_up(arguments: tuple[float, int, int, int], capacity: int) -> None:
    assert expert_capacity(*arguments) == capacity


def test_dropless_layers_are_not_applicable_rather_than_zero() -> None:
    rows = hand_rows() | {"slot_status": np.ones((4, 1), np.uint8), "expert_ids": np.array([[0], [0], [0], [1]])}
    dropless = capacity_drops(rows, num_experts=2, top_k=1)[0]
    assert math.isnan(dropless.dropped_share)
    assert "dropless" in dropless.not_applicable
    assert math.isnan(dropless.overflow_share)
    assert "no capacity factor" in dropless.overflow_not_applicable
    assert all(math.isnan(part.dropped_share) for part in dropless.by_position)
    # With a capacity it could have dropped, so that it did not is a fact.
    assert capacity_drops(rows, num_experts=2, top_k=1, capacity_factor=2.0)[0].dropped_share == 0
    del rows["slot_status"]
    unknown = capacity_drops(rows, num_experts=2, top_k=1, capacity_factor=2.0)[0]
    assert math.isnan(unknown.dropped_share)
    assert "slot_status" in unknown.not_applicable
    assert unknown.overflow_share == 0


@pytest.mark.parametrize(
    ("name", "reason"), [("forward_index", "forward_index was not given"), ("intended_expert_ids", "not known")]
)
def test_overflow_is_not_applicable_without_what_it_takes(name: str, reason: str) -> None:
    rows = hand_rows()
    del rows[name]
    result = capacity_drops(rows, num_experts=2, top_k=1, capacity_factor=1.0)[0]
    assert reason in result.overflow_not_applicable
    assert math.isnan(result.overflow_share)
    assert result.dropped_share == 0.25


def test_each_layer_may_have_a_capacity_of_its_own() -> None:
    rows = hand_rows()
    both = {name: np.concatenate([column, column]) for name, column in rows.items()} | {
        "layer_index": [0] * 4 + [1] * 4
    }
    results = capacity_drops(both, num_experts=2, top_k=1, capacity_factor=[None, 1.0])
    assert math.isnan(results[0].capacity_factor)
    assert results[0].dropped_share == 0.25  # a slot was dropped, so the layer is none of the dropless ones
    assert results[1].overflow_share == 0.25
    with pytest.raises(InvalidInputError, match="2 entries"):
        capacity_drops(both | {"layer_index": [2] * 8}, num_experts=2, top_k=1, capacity_factor=[None, 1.0])


@settings(max_examples=80, deadline=None)
@given(case=cases(), factor=st.sampled_from([0.2, 0.5, 1.0, 1.25]))
def test_drops_equal_a_slow_reference(case: Case, factor: float) -> None:
    bounds = (0, 5, 20)
    results = capacity_drops(case.columns, **case.sizes, capacity_factor=factor, position_bounds=bounds)
    for layer, result in results.items():
        tokens, num, k = tokens_of(case, layer), case.num_experts[layer], case.top_k[layer]
        slots = len(tokens) * k
        dropped = Counter(_bucket(bounds, t.position) for t in tokens for slot in t.slots if slot[1] == DROPPED)
        sizes = Counter(token.forward for token in tokens)
        queues: dict[tuple[int, int], int] = defaultdict(int)
        late: Counter[int] = Counter()
        demand: Counter[tuple[int, int]] = Counter()
        for token in tokens:
            for expert, status, intended in token.slots:
                wanted = intended if status == DROPPED else expert
                if status not in (ROUTED, DROPPED):
                    continue
                demand[token.forward, wanted] += 1
                if queues[token.forward, wanted] >= math.ceil(factor * sizes[token.forward] * k / num - 1e-9):
                    late[_bucket(bounds, token.position)] += 1
                queues[token.forward, wanted] += 1
        assert result.num_slots == slots
        assert result.num_dropped == sum(dropped.values())
        if not tokens:
            assert result.not_applicable == result.overflow_not_applicable == "no valid tokens"
            continue
        assert result.dropped_share == pytest.approx(sum(dropped.values()) / slots)
        # The order of the batch decides who is late, and not how many are.
        formula = sum(
            max(0, wants - math.ceil(factor * sizes[forward] * k / num - 1e-9))
            for (forward, _), wants in demand.items()
        )
        assert result.num_overflow == sum(late.values()) == formula
        assert result.overflow_share == pytest.approx(formula / slots)
        assert result.num_forwards == len(sizes)
        members = Counter(_bucket(bounds, token.position) for token in tokens)
        assert {part.first: part.num_slots for part in result.by_position} == {
            bounds[number]: count * k for number, count in members.items()
        }
        for part in result.by_position:
            number = bounds.index(part.first)
            assert part.num_dropped == dropped[number]
            assert part.num_overflow == late[number]
            assert part.dropped_share == pytest.approx(dropped[number] / part.num_slots)


def _bucket(bounds: tuple[int, ...], position: int) -> int:
    return max(number for number, first in enumerate(bounds) if position >= first)


@settings(max_examples=30, deadline=None)
@given(tokens=st.integers(1, 30), top_k=st.integers(1, 4), num=st.integers(1, 6), factor=st.sampled_from([0.3, 1.0, 2]))
def test_balanced_overflow_equals_the_binomial_sum(tokens: int, top_k: int, num: int, factor: float) -> None:
    top_k = min(top_k, num)
    capacity, chance = expert_capacity(factor, tokens, top_k, num), top_k / num
    expected = sum(
        max(0, x - capacity) * math.comb(tokens, x) * chance**x * (1 - chance) ** (tokens - x)
        for x in range(tokens + 1)
    )
    assert balanced_overflow(factor, tokens, top_k, num) == pytest.approx(num * expected, abs=1e-9)


def test_balanced_routing_overflows_as_much_as_is_said() -> None:
    rng = np.random.default_rng(4)
    forwards, size = 400, 16
    n = forwards * size
    rows = {
        "layer_index": np.zeros(n, int),
        "expert_ids": np.argsort(rng.random((n, 8)), axis=1)[:, :2],
        "forward_index": np.repeat(np.arange(forwards), size).astype(np.uint64),
        "request_id": [f"r{i // size}" for i in range(n)],
    }
    result = capacity_drops(rows, num_experts=8, top_k=2, capacity_factor=1.0)[0]
    assert result.overflow_share == pytest.approx(result.balanced_overflow_share, rel=0.05)
    assert result.balanced_overflow_share > 0.1
    assert result.by_position == ()


def test_the_interval_of_drops_comes_from_requests() -> None:
    rng = np.random.default_rng(6)
    # Half of 200 requests lose 40 % of their slots, the others none: 20 % in all.
    is_lossy = np.repeat(rng.permutation(200) % 2 == 0, 32)
    status = np.where(is_lossy & (rng.random(6400) < 0.4), 2, 1).astype(np.uint8)[:, None]
    rows = {
        "layer_index": np.zeros(6400, int),
        "expert_ids": np.where(status == 1, 0, -1),
        "slot_status": status,
        "request_id": [f"r{i // 32}" for i in range(6400)],
        "position": np.arange(6400) % 32,
    }
    result = capacity_drops(rows, num_experts=2, top_k=1)[0]
    assert result.interval.lower < 0.2 < result.interval.upper
    independent = 1.96 * math.sqrt(0.2 * 0.8 / 6400)
    assert result.interval.upper - result.interval.lower > 4 * independent
    assert [part.interval.lower < 0.2 < part.interval.upper for part in result.by_position] == [True, True]


@pytest.mark.parametrize(
    "argument",
    [
        {"capacity_factor": 0.0},
        {"capacity_factor": math.inf},
        {"capacity_factor": "1"},
        {"capacity_factor": {0: 1.0}},
        {"position_bounds": (1, 2)},
        {"position_bounds": (0, 0)},
    ],
)
def test_arguments_out_of_range_are_refused(argument: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError, match="expected"):
        capacity_drops(hand_rows(), num_experts=2, top_k=1, **argument)
