"""Bands of a balanced router: against published figures, exact formulas and a router that is drawn token by token."""

import itertools
import math
import random
import statistics

import numpy as np
import pytest

from moe_debugger.analysis import analyze, metrics
from moe_debugger.analysis.small_samples import balanced_band, balanced_counts, balanced_rank_imbalance
from moe_debugger.errors import InvalidInputError

# Simulated apart from this code (docs/metrics.md): E, k, T: max/mean, CV, Gini, H / ln E, share of unused experts.
PUBLISHED = {
    (8, 2, 16): (1.70, 0.42, 0.23, 0.951, 0.011),
    (8, 2, 256): (1.17, 0.11, 0.06, 0.997, 0),
    (64, 8, 16): (2.78, 0.66, 0.36, 0.939, 0.12),
    (64, 8, 256): (1.41, 0.16, 0.09, 0.997, 0),
    (64, 8, 4096): (1.10, 0.04, 0.02, 1.0, 0),
    (256, 8, 16): (6.56, 1.39, 0.67, 0.821, 0.60),
    (256, 8, 256): (2.12, 0.35, 0.19, 0.989, 0.0003),
}


@pytest.mark.parametrize(("sizes", "expected"), PUBLISHED.items(), ids=lambda value: str(value))
def test_bands_agree_with_the_published_table(sizes: tuple[int, int, int], expected: tuple[float, ...]) -> None:
    band = balanced_band(*sizes)
    found = (band.max_over_mean, band.cv, band.gini, band.normalised_load_entropy)
    for value, each in zip(expected, found, strict=False):
        assert each.expected == pytest.approx(value, rel=0.04, abs=0.008)
        assert each.lower <= each.expected <= each.upper
    assert band.num_unused.expected / sizes[0] == pytest.approx(expected[4], rel=0.05, abs=0.002)


def test_bands_of_one_token_are_those_of_all_its_sets() -> None:
    # E = 4, k = 2, T = 1, by hand: two experts with one assignment each, in every one of the 6 sets.
    band = balanced_band(4, 2, 1)
    assert (band.cv.expected, band.max_over_mean.expected, band.gini.expected) == (1, 2, 0.5)
    assert band.effective_experts.expected == pytest.approx(2)
    assert band.num_unused.expected == 2
    assert band.cv_rms == 1


def test_counts_of_two_tokens_have_the_exact_distribution() -> None:
    # E = 3, k = 2, T = 2: of the 9 pairs of sets 3 are equal (loads 2 2 0), the others overlap in one (2 1 1).
    sets = list(itertools.combinations(range(3), 2))
    exact = sum(max(np.bincount(a + b, minlength=3).tolist()) == 2 and a == b for a in sets for b in sets) / 9
    counts = balanced_counts(3, 2, 2, 20_000, np.random.default_rng(0))
    assert (counts.sum(axis=1) == 4).all()
    assert np.mean((counts == 0).any(axis=1)) == pytest.approx(exact, abs=0.015)
    assert counts.mean(axis=0) == pytest.approx([4 / 3] * 3, abs=0.02)


@pytest.mark.parametrize(("num_experts", "top_k", "num_tokens"), [(8, 2, 20), (16, 4, 60)])
def test_bands_agree_with_routers_drawn_token_by_token(num_experts: int, top_k: int, num_tokens: int) -> None:
    rng = random.Random(0)
    cvs = []
    for _ in range(400):
        loads = [0] * num_experts
        for _ in range(num_tokens):
            for expert in rng.sample(range(num_experts), top_k):
                loads[expert] += 1
        mean = sum(loads) / num_experts
        cvs.append(statistics.pstdev(loads) / mean)
    band = balanced_band(num_experts, top_k, num_tokens)
    assert band.cv.expected == pytest.approx(statistics.mean(cvs), rel=0.05)
    assert band.cv_rms**2 == pytest.approx(statistics.mean(cv * cv for cv in cvs), rel=0.1)
    outside = sum(not band.cv.holds(cv) for cv in cvs) / len(cvs)
    assert 0.005 < outside < 0.12


def test_where_every_token_takes_all_experts_there_is_no_spread() -> None:
    band = balanced_band(4, 4, 1000)
    assert band.cv_rms == 0
    assert band.cv.holds(0)
    assert not band.cv.holds(0.01)
    assert band.max_over_mean.holds(1)


def test_without_tokens_and_with_one_expert_it_is_not_applicable() -> None:
    empty = balanced_band(8, 2, 0)
    assert math.isnan(empty.cv.expected)
    assert math.isnan(empty.cv_rms)
    assert not empty.cv.holds(0.1)
    assert math.isnan(balanced_band(1, 1, 10).normalised_load_entropy.expected)


def test_wide_layers_and_large_samples_are_quick_and_close_to_the_exact_formula() -> None:
    wide = balanced_band(4096, 8, 4096)
    assert wide.cv.expected == pytest.approx(wide.cv_rms, rel=0.02)
    large = balanced_band(64, 8, 10**9)
    assert large.cv.expected == pytest.approx(large.cv_rms, rel=0.05)
    assert balanced_band(64, 8, 1_000_003).cv_rms == pytest.approx(math.sqrt(64 * (1 - 1 / 8) / (1_000_003 * 8)))


@pytest.mark.parametrize(("num_experts", "top_k", "num_tokens"), [(8, 2, 300), (64, 8, 150), (64, 8, 3000)])
def test_bands_between_two_simulated_sizes_agree_with_a_simulation(
    num_experts: int, top_k: int, num_tokens: int
) -> None:
    counts = balanced_counts(num_experts, top_k, num_tokens, 4000, np.random.default_rng(1))
    band = balanced_band(num_experts, top_k, num_tokens)
    for name, function in (
        ("cv", metrics.coefficient_of_variation),
        ("max_over_mean", metrics.max_over_mean),
        ("gini", metrics.gini),
        ("normalised_load_entropy", metrics.normalised_load_entropy),
        ("effective_experts", metrics.effective_experts),
    ):
        values = [function(row) for row in counts]
        found, spread = getattr(band, name), statistics.pstdev(values)
        assert found.expected == pytest.approx(statistics.mean(values), abs=0.2 * spread)
        # Of few tokens the highest load has few values, and no limits with exactly 5 % outside.
        assert 0.02 < sum(not found.holds(value) for value in values) / len(values) < 0.1


@pytest.mark.parametrize("sizes", [(8, 9, 1), (8, 0, 1), (8, 2, -1), (8, 2, math.inf)])
def test_impossible_sizes_are_refused(sizes: tuple[int, int, float]) -> None:
    with pytest.raises(InvalidInputError, match="expected 1 <= k <= E"):
        balanced_band(*sizes)


def test_metrics_of_a_layer_carry_the_band_of_their_effective_tokens() -> None:
    rng = np.random.default_rng(1)
    ids = np.argsort(rng.random((640, 8)), axis=1)[:, :2].astype(np.int32)
    requests = [f"request {row // 8}" for row in range(640)]
    rows = {"layer_index": np.zeros(640, np.int64), "expert_ids": ids, "request_id": requests}
    layer = analyze(rows, num_experts=8, top_k=2).metrics[0]
    assert layer.balanced_band.num_tokens == round(layer.effective_tokens)
    assert layer.balanced_band.max_over_mean.holds(layer.max_over_mean)
    assert layer.balanced_band.cv.holds(metrics.coefficient_of_variation(np.bincount(ids.ravel(), minlength=8)))
    assert layer.to_dict()["balanced_band"]["top_k"] == 2
    # Half of the slots were dropped: the load is that of tokens with one expert each.
    ids[:, 1] = -1
    half = analyze(rows, num_experts=8, top_k=2).metrics[0]
    assert half.balanced_band.top_k == 1
    assert half.balanced_band.num_tokens == round(half.effective_tokens)


@pytest.mark.parametrize(
    ("num_experts", "num_identity", "top_k", "num_tokens", "dropped"),
    [(512, 256, 12, 500, 0.0), (4, 28, 8, 3000, 0.0), (8, 8, 4, 240, 0.0), (8, 0, 2, 240, 0.5)],
    ids=["LongCat", "mostly identity", "half identity", "whole tokens dropped"],
)
def test_balanced_routers_are_balanced_where_tokens_have_fewer_routed_slots_than_k(
    num_experts: int, num_identity: int, top_k: int, num_tokens: int, dropped: float
) -> None:
    rng = np.random.default_rng(0)
    found = []
    for _ in range(10 if num_experts > 100 else 100):
        ids = np.argsort(rng.random((num_tokens, num_experts + num_identity)), axis=1)[:, :top_k]
        ids[rng.random(num_tokens) < dropped] = -1
        rows = {
            "layer_index": np.zeros(num_tokens, np.int64),
            "expert_ids": ids,
            "request_id": [f"request {row // 4}" for row in range(num_tokens)],
        }
        result = analyze(rows, num_experts=num_experts, top_k=top_k, num_identity_experts=num_identity)
        found.append(result.metrics[0])
    # CV^2 is 1 times what sampling adds, with the relative spread of a chi-square of E - 1 degrees.
    error = 4 * math.sqrt(2 / (num_experts - 1) / len(found))
    ratios = [(layer.cv / layer.balanced_band.cv_rms) ** 2 for layer in found]
    assert statistics.mean(ratios) == pytest.approx(1, abs=error + 0.02)
    assert statistics.mean(layer.cv**2 - layer.cv_debiased**2 for layer in found) <= found[0].balanced_band.cv_rms ** 2
    assert all(layer.cv_debiased < layer.cv for layer in found)
    held = sum(layer.balanced_band.cv.holds(layer.cv) for layer in found)
    assert held >= 0.87 * len(found)
    if not dropped:
        assert statistics.mean(layer.design_effect for layer in found) == pytest.approx(1, abs=0.03)
        assert min(layer.effective_tokens for layer in found) > 0.7 * num_tokens


def test_bands_of_fractional_sizes_keep_the_load_and_lie_between_those_of_whole_ones() -> None:
    for a in (1.001, 1.3, 2.5, 7.5):
        band = balanced_band(8, a, 1200 / a)
        below, above = (balanced_band(8, k, 1200 / k) for k in (math.floor(a), math.ceil(a)))
        assert band.num_tokens * band.top_k == pytest.approx(1200, rel=0.005)
        assert above.cv_rms < band.cv_rms <= below.cv_rms
        assert band.cv_rms**2 == pytest.approx(8 * (1 - a / 8) / 1200, rel=0.03)
        assert band.cv.expected == pytest.approx(0.965 * band.cv_rms, rel=0.05)


def test_the_loss_of_a_balanced_router_is_1_and_what_its_loads_add() -> None:
    rng = np.random.default_rng(2)
    band = balanced_band(16, 2, 100)
    losses, flat = [], []
    for _ in range(400):
        scores = rng.random((100, 16))
        ids = np.argsort(-scores, axis=1)[:, :2]
        counts = np.bincount(ids.ravel(), minlength=16)
        losses.append(metrics.switch_balancing_loss(counts, counts / counts.sum()))
        flat.append(metrics.switch_balancing_loss(counts, np.full(16, 1 / 16)))
    assert statistics.mean(losses) == pytest.approx(band.switch_balancing_loss.expected, rel=0.01)
    assert 0.9 < sum(map(band.switch_balancing_loss.holds, losses)) / 400 < 0.99
    assert flat == pytest.approx([1] * 400)


def test_rank_imbalance_at_balance_is_that_of_routers_drawn_token_by_token() -> None:
    rng = np.random.default_rng(3)
    found = []
    for _ in range(400):
        ids = np.argsort(rng.random((256, 16)), axis=1)[:, :2]
        ranks = np.bincount(ids.ravel() // 4, minlength=4)
        found.append(ranks.max() / ranks.mean())
    band = balanced_rank_imbalance(16, 2, 4, 256)
    assert band.expected == pytest.approx(statistics.mean(found), abs=0.006)
    assert 0.9 < sum(map(band.holds, found)) / 400 < 0.99
    assert balanced_rank_imbalance(16, 16, 4, 10).expected == 1
    assert math.isnan(balanced_rank_imbalance(16, 2, 4, 0).expected)
    with pytest.raises(InvalidInputError, match="expected a divisor of the 16 experts"):
        balanced_rank_imbalance(16, 2, 3, 10)
