"""Margins and the reading of logits, against their definitions."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_debugger.capture.scoring import SelectionRule, confirm_scoring, router_statistics, sigmoid

RULE = SelectionRule(None)


def _softmax(logits: np.ndarray) -> np.ndarray:
    exponentials = np.exp(logits - logits.max(1, keepdims=True))
    return exponentials / exponentials.sum(1, keepdims=True)  # type: ignore[no-any-return]


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 16), st.integers(1, 15), st.integers(0, 10_000))
def test_margin_is_the_gap_below_the_last_chosen_expert(num_experts: int, k: int, seed: int) -> None:
    k = min(k, num_experts)
    logits = np.random.default_rng(seed).normal(size=(7, num_experts)).astype(np.float32)
    order = np.argsort(-logits, axis=1)
    margin = router_statistics(logits, order[:, :k].astype(np.int32), "softmax", RULE).margin
    if k == num_experts:
        assert np.isnan(margin).all()
        return
    ordered = np.take_along_axis(logits, order, axis=1)
    np.testing.assert_allclose(margin, ordered[:, k - 1] - ordered[:, k], rtol=1e-5)


def test_margin_is_not_given_where_the_experts_are_no_top_k() -> None:
    logits = np.array([[3.0, 2.0, 1.0, 0.0], [3.0, 2.0, 1.0, 0.0]], np.float32)
    margin = router_statistics(logits, np.array([[0, 1], [0, 2]], np.int32), "softmax", RULE).margin
    assert margin[0] == 1.0
    assert np.isnan(margin[1])


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid", "probabilities"])
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_the_applied_weights_tell_how_logits_are_read(scoring: str, k: int, scale: float) -> None:
    raw = np.random.default_rng(0).normal(scale=2, size=(200, 8)).astype(np.float32)
    scores = sigmoid(raw) if scoring == "sigmoid" else _softmax(raw)
    logits = scores.astype(np.float32) if scoring == "probabilities" else raw
    ids = np.argsort(-logits, axis=1)[:, :k].astype(np.int32)
    weights = np.take_along_axis(scores, ids, axis=1).astype(np.float32) * (scale if k > 1 else 1.0)
    for declared in ("softmax", "sigmoid"):
        assert confirm_scoring(logits, ids, weights, declared) == (scoring, True)


def test_weights_that_fit_no_reading_give_no_statistics() -> None:
    random = np.random.default_rng(0)
    logits = random.normal(size=(200, 8)).astype(np.float32)
    ids = np.argsort(-logits, axis=1)[:, :2].astype(np.int32)
    weights = random.random((200, 2)).astype(np.float32)
    assert confirm_scoring(logits, ids, weights, "softmax") == ("unknown", True)


def test_weights_that_are_all_alike_prove_nothing() -> None:
    logits = np.zeros((5, 4), np.float32)
    ids = np.tile(np.array([0, 1], np.int32), (5, 1))
    assert confirm_scoring(logits, ids, np.full((5, 2), 0.5, np.float32), "sigmoid") == ("sigmoid", False)


def test_sigmoid_does_not_overflow() -> None:
    np.testing.assert_allclose(sigmoid(np.array([-1e4, 0.0, 1e4], np.float32)), [0.0, 0.5, 1.0])
