"""Balance of ranks: hand-worked, against plain loops, and where counts summed over steps hide what a step waits for."""

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from moe_debugger.errors import InvalidInputError
from moe_debugger.planning import (
    Placement,
    active_experts,
    contiguous_placement,
    critical_load,
    eplb_placement,
    expected_active_experts,
    loads_from_decisions,
    mean_load,
    rank_loads,
    rank_metrics,
)

LOADS = arrays.arrays(np.int64, (3, 2, 6), elements=st.integers(0, 20))


def test_ranks_equal_the_hand_worked_example() -> None:
    # One layer, experts 0, 1 on rank 0 and 2, 3 on rank 1: rank loads (4, 2), then (1, 5).
    loads = np.array([[[3, 1, 2, 0]], [[0, 1, 2, 3]]])
    ranks = rank_loads(loads, contiguous_placement(1, 4, 2))
    assert ranks.tolist() == [[[4, 2]], [[1, 5]]]
    assert critical_load(ranks).tolist() == [4, 5]
    assert mean_load(ranks).tolist() == [3, 3]
    metrics = rank_metrics(ranks)
    assert metrics.layer_imbalance.tolist() == pytest.approx([(4 / 3 + 5 / 3) / 2])
    assert metrics.layer_balancedness.tolist() == pytest.approx([(3 / 4 + 3 / 5) / 2])
    assert metrics.layer_window_imbalance.tolist() == pytest.approx([7 / 6])
    assert metrics.imbalance == pytest.approx(9 / 6)
    assert metrics.waste_share == pytest.approx(1 - 6 / 9)
    assert metrics.step_bound == 4.5
    assert metrics.persistent_share == pytest.approx((7 / 6 - 1) / 0.5)


def test_a_hot_expert_that_rotates_is_even_in_the_sums_and_uneven_in_every_step() -> None:
    # Each of 8 experts on a rank of its own; each is given 44 of 128 in its turn, the others 12 each.
    loads = np.full((64, 1, 8), 12)
    loads[np.arange(64), 0, np.arange(64) % 8] = 44
    metrics = rank_metrics(rank_loads(loads, contiguous_placement(1, 8, 8)))
    assert metrics.layer_window_imbalance.tolist() == [1.0]
    assert metrics.layer_imbalance.tolist() == [44 / 16]
    assert metrics.waste_share == pytest.approx(1 - 16 / 44)
    assert metrics.persistent_share == pytest.approx(0)


def test_layers_that_are_uneven_in_opposite_ways_do_not_cancel() -> None:
    loads = np.array([[[8, 0], [0, 8]]] * 4)
    metrics = rank_metrics(rank_loads(loads, contiguous_placement(2, 2, 2)))
    assert metrics.layer_imbalance.tolist() == [2, 2]
    assert metrics.imbalance == 2


def test_layers_and_windows_without_load_have_no_balance() -> None:
    loads = np.array([[[2, 2], [0, 0]], [[0, 0], [0, 0]]])
    metrics = rank_metrics(rank_loads(loads, contiguous_placement(2, 2, 2)))
    assert metrics.layer_imbalance[0] == 1
    assert np.isnan(metrics.layer_imbalance[1])
    assert metrics.num_layer_steps.tolist() == [1, 0]
    nothing = rank_metrics(np.zeros((0, 1, 2)))
    assert np.isnan([nothing.imbalance, nothing.waste_share, nothing.step_bound, nothing.persistent_share]).all()


@settings(max_examples=40, deadline=None)
@given(loads=LOADS, table=st.permutations([0, 1, 2, 3, 4, 5, 0, 1, 2]))
def test_rank_metrics_equal_plain_loops(loads: Any, table: list[int]) -> None:
    placement = Placement("any", 6, 3, np.array([table, table[::-1]]))
    ranks = rank_loads(loads, placement)
    copies = [[row.count(expert) for expert in range(6)] for row in (table, table[::-1])]
    highest = means = 0.0
    ratios: list[list[float]] = [[], []]
    for step, layer in itertools.product(range(3), range(2)):
        row = (table, table[::-1])[layer]
        expected = [0.0] * 3
        for slot, expert in enumerate(row):
            expected[slot // 3] += loads[step, layer, expert] / copies[layer][expert]
        assert ranks[step, layer].tolist() == pytest.approx(expected)
        highest, means = highest + max(expected), means + sum(expected) / 3
        if sum(expected):
            ratios[layer].append(max(expected) / (sum(expected) / 3))
    metrics = rank_metrics(ranks)
    assert metrics.step_bound == pytest.approx(highest / 3)
    for layer, own in enumerate(ratios):
        expected_ratio = sum(own) / len(own) if own else float("nan")
        assert metrics.layer_imbalance[layer] == pytest.approx(expected_ratio, nan_ok=True)
    if means:
        assert metrics.waste_share == pytest.approx(1 - means / highest)
        # The maximum of sums is never above the sum of maxima.
        assert 1 - 1e-9 <= metrics.window_imbalance <= metrics.imbalance + 1e-9


@settings(max_examples=20, deadline=None)
@given(loads=LOADS, seed=st.integers(0, 100))
def test_dealing_at_random_keeps_every_assignment_and_unreplicated_experts(loads: Any, seed: int) -> None:
    placement = eplb_placement(loads.sum(axis=0), 3, num_slots=9)
    dealt = rank_loads(loads, placement, rng=np.random.default_rng(seed))
    assert (dealt.sum(axis=2) == loads.sum(axis=2)).all()
    assert (dealt == np.floor(dealt)).all()
    alone = contiguous_placement(2, 6, 3)
    assert (rank_loads(loads, alone, rng=np.random.default_rng(seed)) == rank_loads(loads, alone)).all()


def test_dealing_at_random_is_even_on_average() -> None:
    placement = Placement("two copies", 3, 2, np.array([[0, 1, 2, 0]]))
    loads = np.full((400, 1, 3), [100, 10, 10])
    dealt = rank_loads(loads, placement, rng=np.random.default_rng(0))
    assert rank_loads(loads, placement)[0].tolist() == [[60, 60]]
    assert dealt.mean(axis=0)[0].tolist() == pytest.approx([60, 60], abs=1)
    assert dealt.max(axis=2).mean() > 62  # one step waits for the luckier rank
    with pytest.raises(InvalidInputError, match="whole numbers"):
        rank_loads(loads + 0.5, placement, rng=np.random.default_rng(0))


@settings(max_examples=30, deadline=None)
@given(loads=arrays.arrays(np.int64, (2, 1, 4), elements=st.integers(0, 3)))
def test_active_experts_equal_plain_loops(loads: Any) -> None:
    table = [0, 1, 2, 3, 0, 0]
    active = active_experts(loads, Placement("any", 4, 2, np.array([table])))
    for step in range(2):
        expected, seen = [0, 0], [0, 0, 0, 0]
        for slot, expert in enumerate(table):
            expected[slot // 3] += loads[step, 0, expert] > seen[expert]
            seen[expert] += 1
        assert active[step, 0].tolist() == expected


def test_expected_active_experts_equal_the_mean_over_all_choices() -> None:
    choices = list(itertools.combinations(range(4), 2))
    for num_tokens in (0, 1, 2, 3):
        sizes = [len(set().union(*chosen)) for chosen in itertools.product(choices, repeat=num_tokens)]
        assert expected_active_experts(4, 2, num_tokens) == pytest.approx(sum(sizes) / len(sizes))
    assert expected_active_experts(256, 8, 64) == pytest.approx(222.4, abs=0.1)
    with pytest.raises(InvalidInputError, match="top_k 5"):
        expected_active_experts(4, 5, 1)


def test_loads_of_decisions_count_routed_slots_of_valid_tokens_by_forward() -> None:
    columns = {
        "layer_index": [0, 0, 1, 0, 1, 0],
        "forward_index": [7, 7, 7, 9, 9, 11],
        "phase": [1, 1, 1, 2, 2, 2],
        "is_padding": [False, True, False, False, False, True],
        "expert_ids": np.array([[0, 2], [1, 2], [1, -1], [2, 3], [0, 1], [0, 1]], np.int32),
        "slot_status": np.array([[1, 1], [1, 1], [1, 5], [1, 4], [1, 2], [1, 1]], np.uint8),
    }
    loads = loads_from_decisions(columns, num_experts=3)
    assert loads.steps.tolist() == [7, 9]  # forward 11 has padding only
    assert loads.counts.tolist() == [[[1, 0, 1], [0, 1, 0]], [[0, 0, 1], [1, 0, 0]]]
    without_status = {name: value for name, value in columns.items() if name != "slot_status"}
    # Expert 3 of 3 is an identity expert whether or not a status says so.
    assert loads_from_decisions(without_status, num_experts=3).counts[1].tolist() == [[0, 0, 1], [1, 1, 0]]
    decode = loads_from_decisions(columns, num_experts=3, num_layers=3, phase="decode")
    assert decode.steps.tolist() == [9]
    assert decode.counts[0].tolist() == [[0, 0, 1], [1, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer_index": None}, r"no column \['layer_index'\]"),
        ({"expert_ids": np.zeros((2, 1), np.int32)}, "'expert_ids': 2"),
        ({"expert_ids": np.full((1, 1), -5, np.int32)}, "reach down to -5"),
        ({"forward_index": [1, 2]}, "'forward_index': 2"),
    ],
)
def test_decisions_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    columns: dict[str, Any] = {"layer_index": [0], "forward_index": [0], "expert_ids": np.zeros((1, 1), np.int32)}
    columns = {name: value for name, value in (columns | change).items() if value is not None}
    with pytest.raises(InvalidInputError, match=message):
        loads_from_decisions(columns, num_experts=2)


def test_loads_that_are_no_loads_are_refused() -> None:
    placement = contiguous_placement(1, 2, 2)
    for loads, message in (
        (np.zeros((1, 2)), "2 dimensions"),
        (np.array([[[1.0, -1.0]]]), r"-1.0 at step, layer, expert \(0, 0, 1\)"),
        (np.array([[[1.0, np.nan]]]), "nan at"),
        (np.zeros((1, 1, 3)), "1 layers of 3 experts, the placement 1 of 2"),
    ):
        with pytest.raises(InvalidInputError, match=message):
            rank_loads(loads, placement)
