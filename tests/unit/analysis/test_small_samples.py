"""Bands of a balanced router: against published figures, exact formulas and a router that is drawn token by token."""

import itertools
import math
import random
import statistics

import numpy as np
import pytest

from moe_debugger.analysis import analyze, metrics
from moe_debugger.analysis.small_samples import balanced_band, balanced_counts
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
    # Half of the slots were dropped: the load is that of half as many tokens.
    ids[:, 1] = -1
    half = analyze(rows, num_experts=8, top_k=2).metrics[0]
    assert half.balanced_band.num_tokens == pytest.approx(half.effective_tokens / 2, rel=0.05)
