"""Every metric against a hand-worked example and a slow, independent reference."""

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_debugger.analysis import analyze, metrics
from moe_debugger.analysis.fixed_sums import NUM_GROUPS
from moe_debugger.analysis.metrics import layer_metrics
from moe_debugger.analysis.sketch import hash_strings
from moe_debugger.analysis.state import LayerShape, RoutingState

COUNTS = st.lists(st.integers(0, 10_000), min_size=1, max_size=40).filter(lambda counts: sum(counts) > 0)
EXAMPLE = [6, 2, 0, 0]


def test_metrics_equal_the_hand_worked_example() -> None:
    assert metrics.expert_share(EXAMPLE).tolist() == [0.75, 0.25, 0, 0]
    assert metrics.load_entropy(EXAMPLE) == pytest.approx(0.5623351446)
    assert metrics.normalised_load_entropy(EXAMPLE) == pytest.approx(0.5623351446 / 1.3862943611)
    assert metrics.effective_experts(EXAMPLE) == pytest.approx(1.7547653506)
    assert metrics.inverse_simpson(EXAMPLE) == pytest.approx(1.6)
    assert metrics.max_over_mean(EXAMPLE) == 3
    assert metrics.max_violation(EXAMPLE) == 2
    assert metrics.coefficient_of_variation(EXAMPLE) == pytest.approx(math.sqrt(6) / 2)
    # 4 tokens, k = 2: CV^2 = 1.5, less 4 * (1 - 2/4) / 8 = 0.25.
    assert metrics.debiased_coefficient_of_variation(EXAMPLE, per_token=2) == pytest.approx(math.sqrt(1.25))
    assert metrics.gini(EXAMPLE) == pytest.approx(0.625)
    assert metrics.jain(EXAMPLE) == pytest.approx(0.4)
    assert metrics.unused_experts(EXAMPLE) == 2
    assert metrics.switch_balancing_loss(EXAMPLE, [0.7, 0.1, 0.1, 0.1]) == pytest.approx(4 * (0.75 * 0.7 + 0.25 * 0.1))


@settings(max_examples=200, deadline=None)
@given(counts=COUNTS)
def test_metrics_equal_slow_references(counts: list[int]) -> None:
    num, total = len(counts), sum(counts)
    shares = [Fraction(count, total) for count in counts]
    entropy = -sum(float(p) * math.log(float(p)) for p in shares if p)
    mean = Fraction(total, num)
    variance = sum((count - mean) ** 2 for count in counts) / num
    # Half the mean absolute difference of all pairs over the mean: Gini by its definition, not by sorting.
    pairs = sum(abs(a - b) for a in counts for b in counts)
    assert metrics.expert_share(counts) == pytest.approx([float(p) for p in shares])
    assert metrics.load_entropy(counts) == pytest.approx(entropy, abs=1e-9)
    assert metrics.effective_experts(counts) == pytest.approx(math.exp(entropy))
    assert metrics.inverse_simpson(counts) == pytest.approx(float(1 / sum(p * p for p in shares)))
    assert metrics.max_over_mean(counts) == pytest.approx(float(max(counts) / mean))
    assert metrics.max_violation(counts) == pytest.approx(float((max(counts) - mean) / mean))
    assert metrics.coefficient_of_variation(counts) == pytest.approx(math.sqrt(variance) / float(mean))
    assert metrics.gini(counts) == pytest.approx(float(Fraction(pairs, 2 * num * num) / mean), abs=1e-9)
    assert metrics.jain(counts) == pytest.approx(1 / (1 + float(variance / mean**2)))
    assert metrics.unused_experts(counts) == counts.count(0)
    if num > 1:
        assert metrics.normalised_load_entropy(counts) == pytest.approx(entropy / math.log(num), abs=1e-9)


@settings(max_examples=100, deadline=None)
@given(counts=COUNTS, seed=st.integers(0, 1000))
def test_metrics_keep_their_ranges_and_do_not_depend_on_the_experts_names(counts: list[int], seed: int) -> None:
    shuffled = np.random.default_rng(seed).permutation(counts)
    num = len(counts)
    for function, low, high in (
        (metrics.load_entropy, 0, math.log(num)),
        (metrics.effective_experts, 1, num),
        (metrics.inverse_simpson, 1, num),
        (metrics.max_over_mean, 1, num),
        (metrics.coefficient_of_variation, 0, math.sqrt(num - 1)),
        (metrics.gini, 0, (num - 1) / num),
        (metrics.jain, 1 / num, 1),
    ):
        assert low - 1e-9 <= function(counts) <= high + 1e-9, function.__name__
        assert function(shuffled) == pytest.approx(function(counts), abs=1e-9)


def test_metrics_without_load_are_not_a_number() -> None:
    state = RoutingState.empty([LayerShape(0, 4, 2)])
    got = layer_metrics(state.layers[0])
    for name in ("load_entropy", "effective_experts", "max_over_mean", "cv", "cv_debiased", "gini", "jain"):
        assert math.isnan(getattr(got, name)), name
    assert (got.num_tokens, got.hottest_expert, got.num_blocks) == (0, -1, 0)
    assert math.isnan(metrics.normalised_load_entropy([5]))


def test_debiased_cv_is_near_zero_at_perfect_balance_where_the_raw_one_is_not() -> None:
    rng = np.random.default_rng(0)
    ids = np.argsort(rng.random((256, 64)), axis=1)[:, :8]
    counts = np.bincount(ids.ravel(), minlength=64)
    assert metrics.coefficient_of_variation(counts) == pytest.approx(0.16, abs=0.04)
    assert metrics.debiased_coefficient_of_variation(counts, per_token=8) < 0.08


def test_entropy_of_the_load_and_of_tokens_are_apart(simulate: Callable[..., dict[str, Any]]) -> None:
    rows = simulate(np.random.default_rng(0), num_layers=1)
    # Even load from a router that is certain about every token.
    rows["router_entropy"] = np.zeros(4096, np.float32)
    rows["top1_probability"] = np.ones(4096, np.float32)
    got = analyze(rows, num_experts=8, top_k=2).metrics[0]
    assert got.normalised_load_entropy > 0.99
    assert (got.mean_token_entropy, got.num_token_entropy) == (0, 4096)
    assert (got.mean_confidence, got.num_confidence) == (1, 4096)


def test_means_over_tokens_have_intervals_from_requests() -> None:
    # 20 groups of two requests of one token each: half of the groups have the values 1, half of them 3.
    names = [f"request {number}" for number in range(1000)]
    group = (hash_strings(names) >> np.uint64(32)) % np.uint64(NUM_GROUPS)
    chosen = np.concatenate([np.flatnonzero(group == number)[:2] for number in range(NUM_GROUPS)])
    rows = {
        "layer_index": np.zeros(40, int),
        "expert_ids": np.tile([[0, 1], [2, 3]], (20, 1)),
        "request_id": [names[index] for index in chosen],
        "margin": np.repeat([1.0, 3.0], 20),
    }
    got = analyze(rows, num_experts=4, top_k=2).metrics[0]
    # The sums 2 and 6 lie 2 away from 20 pairs' mean of 4: t_19 sqrt(20/19 * 20 * 4) / 40 tokens.
    width = 2.0930 * math.sqrt(20 / 19 * 80) / 40
    assert got.mean_margin == 2
    assert got.mean_margin_interval.lower == pytest.approx(2 - width, rel=0.01)
    assert got.mean_margin_interval.upper == pytest.approx(2 + width, rel=0.01)
    # Not captured; and none dropped, whose spread says nothing.
    assert math.isnan(got.mean_confidence_interval.upper)
    assert (got.dropped_share, math.isnan(got.dropped_share_interval.upper)) == (0, True)
    rows["request_id"] = ["one"] * 40
    assert math.isnan(analyze(rows, num_experts=4, top_k=2).metrics[0].mean_margin_interval.upper)


def test_intervals_of_means_hold_where_requests_differ(simulate: Callable[..., dict[str, Any]]) -> None:
    held = {"mean_token_entropy": 0, "mean_confidence": 0, "router_z_loss": 0, "dropped_share": 0}
    draws = 200
    for seed in range(draws):
        rng = np.random.default_rng(seed)
        rows = simulate(rng, num_layers=1, num_requests=60, num_tokens=1200)
        request = np.unique(rows["request_id"], return_inverse=True)[1]
        rows["router_entropy"] = rng.normal(1, 0.2, 60)[request] + rng.normal(0, 0.1, 1200)
        rows["top1_probability"] = rng.beta(6, 4, 60)[request]
        rows["router_logsumexp"] = np.sqrt(rng.gamma(4, 0.5, 60)[request])
        is_dropped = rng.random((1200, 2)) < rng.beta(2, 18, 60)[request, None]
        rows["slot_status"] = np.where(is_dropped, 2, 1)
        rows["expert_ids"] = np.where(is_dropped, -1, rows["expert_ids"])
        got = analyze(rows, num_experts=8, top_k=2).metrics[0]
        truth = {"mean_token_entropy": 1, "mean_confidence": 0.6, "router_z_loss": 2, "dropped_share": 0.1}
        for name, value in truth.items():
            interval = getattr(got, f"{name}_interval")
            held[name] += interval.lower <= value <= interval.upper
    for name, number in held.items():
        # 95 % of 200 are 190; 180 and 198 are its limits at 0.002.
        assert 179 <= number <= 199, (name, number)


def test_layers_are_never_pooled(simulate: Callable[..., dict[str, Any]]) -> None:
    rows = simulate(np.random.default_rng(0), num_layers=2)
    rows["expert_ids"][:4096] = [0, 1]
    got = analyze(rows, num_experts=8, top_k=2).metrics
    assert got[0].effective_experts == pytest.approx(2)
    assert got[1].effective_experts > 7.9
