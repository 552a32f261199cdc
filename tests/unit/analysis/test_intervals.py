"""Intervals and tests against tables, and against routers of known truth."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from moe_debugger.analysis.analyze import fold_decisions
from moe_debugger.analysis.intervals import (
    BlockKind,
    benjamini_hochberg,
    jackknife,
    student_quantile,
    student_upper_tail,
    variance_blocks,
)

Simulate = Callable[..., dict[str, Any]]


@pytest.mark.parametrize(("degrees", "expected"), [(5, 2.5706), (10, 2.2281), (19, 2.0930), (63, 1.9983)])
def test_student_quantile_equals_the_table(degrees: float, expected: float) -> None:
    assert student_quantile(degrees) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(
    ("t", "degrees", "expected"), [(2.0930, 19, 0.025), (3.8834, 19, 0.0005), (-2.0930, 19, 0.975), (0.0, 5, 0.5)]
)
def test_student_tail_equals_the_table(t: float, degrees: float, expected: float) -> None:
    assert float(student_upper_tail(np.array([t]), degrees)[0]) == pytest.approx(expected, rel=0.02)


def test_benjamini_hochberg_equals_its_paper_example() -> None:
    # Benjamini & Hochberg 1995, section 3.2: 15 p-values, four discoveries at 0.05.
    p_values = [
        *(0.0001, 0.0004, 0.0019, 0.0095, 0.0201, 0.0278, 0.0298, 0.0344),
        *(0.0459, 0.3240, 0.4262, 0.5719, 0.6528, 0.7590, 1.0),
    ]
    shuffled = np.array(p_values)[np.random.default_rng(0).permutation(15)]
    found = benjamini_hochberg(shuffled, 0.05)
    assert sorted(shuffled[found].tolist()) == [0.0001, 0.0004, 0.0019, 0.0095]
    assert not benjamini_hochberg(np.array([]), 0.05).any()


def test_jackknife_equals_leaving_each_block_out_by_hand(simulate: Simulate) -> None:
    rows = simulate(np.random.default_rng(1), num_layers=1, topic_strength=1.0)
    layer = fold_decisions(rows, num_experts=8, top_k=2).layers[0]
    blocks = [block for block in layer.block_counts.astype(float) if block.sum()]

    def entropy(counts: Any) -> float:
        return float(-sum(c / counts.sum() * math.log(c / counts.sum()) for c in counts if c))

    total = sum(blocks)
    left_out = [entropy(total - block) for block in blocks]
    num = len(blocks)
    mean = sum(left_out) / num
    error = math.sqrt((num - 1) / num * sum((value - mean) ** 2 for value in left_out))
    sizes = [block.sum() for block in blocks]
    kish = sum(sizes) ** 2 / sum(size**2 for size in sizes)
    interval, _ = jackknife(variance_blocks(layer), 2)
    assert interval.lower == pytest.approx(math.exp(entropy(total) - student_quantile(kish - 1) * error))


def test_design_effect_is_one_for_independent_tokens_and_large_for_documents(simulate: Simulate) -> None:
    def mean_effect(strength: float) -> float:
        rows = simulate(np.random.default_rng(2), num_experts=64, top_k=8, num_tokens=8192, topic_strength=strength)
        state = fold_decisions(rows, num_experts=64, top_k=8)
        return float(np.mean([jackknife(variance_blocks(layer), 8)[1] for layer in state.layers.values()]))

    assert mean_effect(0.0) == pytest.approx(1, abs=0.1)
    assert mean_effect(1.0) > 4


def test_interval_covers_the_long_run_value_for_documents(simulate: Simulate) -> None:
    rng = np.random.default_rng(3)
    covered = above = 0
    runs = 150
    for _ in range(runs):
        # Preference has no mean, so in the long run every expert is used alike: 8 effective experts.
        rows = simulate(rng, num_layers=1, num_tokens=3000, num_requests=30, topic_strength=1.0)
        interval, _ = jackknife(variance_blocks(fold_decisions(rows, num_experts=8, top_k=2).layers[0]), 2)
        covered += interval.lower <= 8 <= interval.upper + 1e-9
        above += interval.upper >= 7.5
    # Entropy at its maximum is the hardest case: a plain interval would never reach it.
    assert above >= 0.95 * runs
    assert covered >= 0.6 * runs


def test_blocks_are_requests_else_stretches_of_positions_else_nothing(simulate: Simulate) -> None:
    layer = fold_decisions(
        simulate(np.random.default_rng(4), num_layers=1, num_requests=1), num_experts=8, top_k=2
    ).layers[0]
    # One request is one opinion: its 64 stretches of 64 positions answer instead.
    blocks = variance_blocks(layer)
    assert blocks.kind is BlockKind.POSITIONS
    assert not math.isnan(jackknife(blocks, 2)[0].upper)
    bare = variance_blocks(layer.without_history())
    assert bare.kind is BlockKind.NONE
    interval, effect = jackknife(bare, 2)
    assert math.isnan(interval.upper)
    assert math.isnan(effect)
    many = fold_decisions(
        simulate(np.random.default_rng(4), num_layers=1, num_requests=40), num_experts=8, top_k=2
    ).layers[0]
    assert variance_blocks(many, num_requests=40).kind is BlockKind.REQUESTS
    assert variance_blocks(many, num_requests=12).kind is BlockKind.POSITIONS
