"""Similarity of experts: hand-worked, against all orders of hidden units, and CKA against sums over tokens."""

import itertools
import math

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_debugger.analysis.expert_similarity import aligned_similarity, linear_cka, output_similarity
from moe_debugger.errors import InvalidInputError

Floats = npt.NDArray[np.float64]


def test_exchanged_units_are_the_same_expert() -> None:
    units = [np.array([[1.0, 0], [0, 1]]), np.array([[0.0, 1], [1, 0]]), np.array([[1.0, 0], [0, -1]])]
    found = aligned_similarity(units.__getitem__, [0, 1, 2], layer_index=4)
    assert found.aligned_cosine[0, 1] == found.aligned_cosine[1, 0] == pytest.approx(1)
    assert found.flattened_cosine[0, 1] == 0
    # One unit matches, the other is its opposite: (1 - 1)/2, or exchanged (0 + 0)/2.
    assert found.aligned_cosine[0, 2] == 0
    assert (found.layer_index, found.num_units, found.is_exact) == (4, 2, True)
    assert np.diag(found.aligned_cosine).tolist() == [1, 1, 1]
    assert np.isnan(found.output_cosine).all()
    assert found.to_dict()["expert_ids"] == (0, 1, 2)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_aligned_cosine_equals_the_best_over_all_orders(num_units: int, width: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    experts = rng.normal(size=(3, num_units, width))
    found = aligned_similarity(experts.__getitem__, [0, 1, 2])
    for i, j in itertools.combinations(range(3), 2):
        best = max(
            sum(experts[i][u] @ experts[j][p[u]] for u in range(num_units))
            for p in itertools.permutations(range(num_units))
        )
        norm = math.sqrt((experts[i] ** 2).sum() * (experts[j] ** 2).sum())
        assert found.aligned_cosine[i, j] == pytest.approx(best / norm)
        flat = float(experts[i].ravel() @ experts[j].ravel()) / norm
        assert found.flattened_cosine[i, j] == pytest.approx(flat)
        assert flat <= found.aligned_cosine[i, j] + 1e-12 <= found.aligned_cosine_upper[i, j] + 2e-12


def test_a_noisy_copy_stands_above_chance_and_unrelated_experts_do_not() -> None:
    rng = np.random.default_rng(0)
    experts = rng.normal(size=(6, 48, 90))
    experts[4] = (experts[1] + 0.1 * rng.normal(size=(48, 90)))[rng.permutation(48)]
    found = aligned_similarity(experts.__getitem__, range(6))
    assert found.aligned_cosine[1, 4] == pytest.approx(1 / math.sqrt(1.01), abs=0.01)
    assert abs(found.flattened_cosine[1, 4]) < 0.2
    others = [found.aligned_cosine[i, j] for i, j in itertools.combinations(range(6), 2) if (i, j) != (1, 4)]
    # Matching alone makes unrelated weights look alike; the level of chance says how much.
    assert np.mean(others) == pytest.approx(found.chance, abs=0.02)
    assert found.chance > 0.15
    rough = aligned_similarity(experts.__getitem__, [0, 2], max_exact=4)
    assert not rough.is_exact
    assert rough.aligned_cosine[0, 1] <= found.aligned_cosine[0, 2] <= rough.aligned_cosine_upper[0, 1]


def test_odd_experts_are_refused_or_not_applicable() -> None:
    with pytest.raises(InvalidInputError, match="no expert"):
        aligned_similarity(lambda expert: np.eye(2), [])
    shapes = [np.eye(2), np.eye(3)]
    with pytest.raises(InvalidInputError, match=r"expert 1 has units of shape \(3, 3\)"):
        aligned_similarity(shapes.__getitem__, [0, 1])
    nothing = aligned_similarity(lambda expert: np.zeros((2, 2)), [0, 1])
    assert math.isnan(nothing.aligned_cosine[0, 1])
    assert math.isnan(aligned_similarity(lambda expert: np.eye(2), [0]).chance)


def _slow_unbiased_hsic(k: Floats, m: Floats) -> float:
    """Song et al. 2012, eq. 4: sums over different tokens, written out."""
    n = len(k)
    pairs = list(itertools.permutations(range(n), 2))
    first = sum(k[i, j] * m[i, j] for i, j in pairs) / (n * (n - 1))
    triples = itertools.permutations(range(n), 3)
    third = sum(k[i, j] * m[i, q] for i, j, q in triples) / (n * (n - 1) * (n - 2))
    fours = itertools.permutations(range(n), 4)
    second = sum(k[i, j] * m[q, r] for i, j, q, r in fours) / (n * (n - 1) * (n - 2) * (n - 3))
    return float(first + second - 2 * third)


@settings(max_examples=15, deadline=None)
@given(st.integers(4, 7), st.integers(0, 2**32 - 1))
def test_cka_equals_its_sums_over_tokens(n: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(n, 3)), rng.normal(size=(n, 2))
    k, m = x @ x.T, y @ y.T
    expected = _slow_unbiased_hsic(k, m) / math.sqrt(abs(_slow_unbiased_hsic(k, k) * _slow_unbiased_hsic(m, m)))
    if _slow_unbiased_hsic(k, k) * _slow_unbiased_hsic(m, m) > 0:
        assert linear_cka(x, y) == pytest.approx(expected, abs=1e-7)
    centred_x, centred_y = x - x.mean(axis=0), y - y.mean(axis=0)
    cross = sum(float(centred_x[:, a] @ centred_y[:, b]) ** 2 for a in range(x.shape[1]) for b in range(y.shape[1]))
    own_x = math.sqrt(sum(float(a @ b) ** 2 for a in centred_x.T for b in centred_x.T))
    own_y = math.sqrt(sum(float(a @ b) ** 2 for a in centred_y.T for b in centred_y.T))
    assert linear_cka(x, y, is_debiased=False) == pytest.approx(cross / (own_x * own_y))


def test_cka_does_not_see_rotations_and_the_cosine_of_outputs_does() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 8))
    turned = x @ np.linalg.qr(rng.normal(size=(8, 8)))[0]
    assert linear_cka(x, turned) == pytest.approx(1)
    assert linear_cka(x, 3 * x + 7) == pytest.approx(1)
    cosine, cka = output_similarity([x, turned, 2 * x])
    assert cka[0, 1] == pytest.approx(1)
    assert abs(cosine[0, 1]) < 0.5
    assert cosine[0, 2] == pytest.approx(1)
    # Fewer tokens than numbers: the plain one is high for unrelated outputs.
    wide = [rng.normal(size=(20, 400)) for _ in range(2)]
    assert linear_cka(*wide, is_debiased=False) > 0.9
    assert abs(linear_cka(*wide)) < 0.2


def test_cka_is_not_applicable_to_few_tokens_and_constant_outputs() -> None:
    assert math.isnan(linear_cka(np.eye(3), np.eye(3)))
    assert math.isnan(linear_cka(np.ones((9, 2)), np.arange(18.0).reshape(9, 2)))
    with pytest.raises(InvalidInputError, match="same n tokens"):
        linear_cka(np.eye(4), np.eye(5))
    with pytest.raises(InvalidInputError, match="expected one"):
        output_similarity([np.eye(4), np.eye(5)])
    cosine, _ = output_similarity([np.zeros((5, 2)), np.ones((5, 2))])
    assert math.isnan(cosine[0, 1])
