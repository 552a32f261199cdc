"""Router statistics from logits, given only where the applied weights or ids confirm how the logits are read.

A router's logits are raw: with a correction bias or expert groups their top-k is not the selection, and sigmoid scores
are not a softmax. So the reading (softmax, sigmoid, or probabilities as they are) is confirmed by the weights that the
experts were given, and the margin is given only for rows whose recomputed top-k equals the captured ids.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from torch import nn

__all__ = ["RouterStatistics", "SelectionRule", "confirm_scoring", "router_statistics"]

Floats = npt.NDArray[np.float32]

# Weights of bf16 models carry 8 bits: 2^-8 of relative rounding, on two numbers.
_RATIO_TOLERANCE = 0.03
_CONFIRMED_SHARE = 0.97


@dataclass(frozen=True, slots=True)
class RouterStatistics:
    """Per-row statistics [n] float32 and the probabilities [n, E] that they come from."""

    entropy: Floats
    logsumexp: Floats
    top1_probability: Floats
    margin: Floats
    probabilities: Floats


class SelectionRule:
    """What is added to the scores for selection only: a correction bias, and groups of experts."""

    def __init__(self, router: "nn.Module | None") -> None:
        names = ("e_score_correction_bias", "expert_bias", "balancing_biases")
        self._bias = next((bias for name in names if (bias := getattr(router, name, None)) is not None), None)
        self.num_groups = _count(getattr(router, "num_group", None) or getattr(router, "n_group", None))
        self.top_groups = _count(getattr(router, "topk_group", None))

    def scores(self, probabilities: Floats, logits: Floats, *, scoring: str) -> Floats:
        """Return the selection scores [n, E].

        Without a bias a softmax is monotone in the logits, and its margin is given in logits, where it does not
        vanish for a confident router.
        """
        bias = self._bias
        if bias is None and scoring == "softmax" and self.num_groups <= 1:
            return logits
        scores = probabilities if scoring == "softmax" else _scores(logits, scoring)
        assert scores is not None
        if bias is not None:
            scores = scores + bias.detach().float().cpu().numpy().reshape(1, -1)
        if self.num_groups > 1 and scores.shape[1] % self.num_groups == 0:
            scores = self._limit_groups(scores)
        return scores

    def _limit_groups(self, scores: Floats) -> Floats:
        grouped = scores.reshape(len(scores), self.num_groups, -1)
        # DeepSeek-V3: a group counts for the sum of its two best experts.
        best = np.sort(grouped, axis=-1)[:, :, -2:].sum(axis=-1)
        kept = np.argsort(-best, axis=-1, kind="stable")[:, : self.top_groups]
        limited = np.full_like(grouped, -np.inf)
        rows = np.arange(len(scores))[:, None]
        limited[rows, kept] = grouped[rows, kept]
        return limited.reshape(scores.shape)


def confirm_scoring(
    logits: Floats, expert_ids: npt.NDArray[np.int32], weights: Floats, declared: str
) -> tuple[str, bool]:
    """Return how the logits are read ("unknown" where no reading fits), and whether these rows prove it.

    With k slots the ratios between a row's weights decide, since scaling and renormalisation keep them. A single slot
    has no ratio: there the weight itself must fit.
    """
    usable = (
        np.isfinite(weights).all(axis=1) & (expert_ids >= 0).all(axis=1) & (expert_ids < logits.shape[1]).all(axis=1)
    )
    if not usable.any():
        return declared, False
    logits, expert_ids, weights = logits[usable], expert_ids[usable], weights[usable]
    for scoring in dict.fromkeys((declared, "softmax", "sigmoid", "sqrt_softplus", "probabilities")):
        scores = _scores(logits, scoring)
        if scores is None:
            continue
        expected = np.take_along_axis(scores, expert_ids, axis=1)
        applied = weights
        if weights.shape[1] > 1:
            expected = expected / np.maximum(expected.sum(axis=1, keepdims=True), 1e-20)
            applied = weights / np.maximum(np.abs(weights.sum(axis=1, keepdims=True)), 1e-20)
            # A row whose weights are all alike fits every reading and proves none.
            telling = np.ptp(applied, axis=1) > _RATIO_TOLERANCE
        else:
            # One slot has no ratio: the weight itself must fit, up to one factor for the layer.
            expected = expected * (np.median(applied) / max(float(np.median(expected)), 1e-20))
            telling = np.full(
                len(applied), np.ptp(applied) > _RATIO_TOLERANCE * max(float(np.abs(applied).max()), 1e-20)
            )
        fits = np.abs(expected - applied).max(axis=1) <= _RATIO_TOLERANCE
        if not telling.any():
            return declared, False
        if fits[telling].mean() >= _CONFIRMED_SHARE:
            return scoring, True
    return "unknown", True


def router_statistics(
    logits: Floats, expert_ids: npt.NDArray[np.int32], scoring: str, rule: SelectionRule
) -> RouterStatistics:
    """Return entropy (nats), logsumexp, top-1 probability and selection margin of each row.

    For sigmoid scores the probabilities are the scores divided by their sum.
    """
    peak = logits.max(axis=1, keepdims=True)
    exponentials = np.exp(logits - peak)
    total = np.einsum("te->t", exponentials)
    logsumexp = peak[:, 0] + np.log(total)
    if scoring == "softmax":
        probabilities = np.multiply(exponentials, (1 / total)[:, None], out=exponentials)
        # H = -sum p ln p with ln p = x - logsumexp, which needs no logarithm per expert. An expert that is masked out
        # (x = -inf) has p = 0 and adds nothing.
        finite = logits if np.isfinite(peak).all() and np.isfinite(logits.min()) else np.maximum(logits, -1e30)
        entropy = np.maximum(logsumexp - np.einsum("te,te->t", probabilities, finite), 0)
    else:
        scores = _scores(logits, scoring)
        assert scores is not None
        probabilities = scores / np.maximum(scores.sum(axis=1, keepdims=True), 1e-20)
        entropy = -np.einsum("te,te->t", probabilities, np.log(np.maximum(probabilities, 1e-30)))
    if scoring == "probabilities":
        logsumexp = np.full_like(logsumexp, np.nan)
    return RouterStatistics(
        entropy=entropy.astype(np.float32, copy=False),
        logsumexp=logsumexp.astype(np.float32, copy=False),
        top1_probability=probabilities.max(axis=1).astype(np.float32, copy=False),
        margin=_margin(rule.scores(probabilities, logits, scoring=scoring), expert_ids),
        probabilities=probabilities,
    )


def _margin(scores: Floats, expert_ids: npt.NDArray[np.int32]) -> Floats:
    """K-th minus (K+1)-th score; NaN where the recomputed top-k is not the captured one, or there is no (K+1)-th.

    The captured experts are a top-k exactly where the lowest of them scores at least what the best other one does,
    which needs no sorting. In a tie both are a top-k, and the margin is 0.
    """
    num_experts, k = scores.shape[1], expert_ids.shape[1]
    if k >= num_experts:
        return np.full(len(scores), np.nan, np.float32)
    # A slot without an expert leaves its row without a margin.
    is_whole = (expert_ids >= 0).all(axis=1)
    expert_ids = np.maximum(expert_ids, 0)
    lowest = np.take_along_axis(scores, expert_ids, axis=1).min(axis=1)
    others = scores.copy()
    np.put_along_axis(others, expert_ids, -np.inf, axis=1)
    gap: npt.NDArray[np.float64] = (lowest - others.max(axis=1)).astype(np.float64)
    gap[~np.isfinite(gap) | (gap < 0) | ~is_whole] = np.nan
    return gap.astype(np.float32)


def sigmoid(logits: Floats) -> Floats:
    """Return 1 / (1 + exp(-x)) without overflow."""
    positive = np.exp(-np.abs(logits))
    return np.where(logits >= 0, 1 / (1 + positive), positive / (1 + positive)).astype(np.float32)


def _scores(logits: Floats, scoring: str) -> Floats | None:
    if scoring == "softmax":
        exponentials: Floats = np.exp(logits - logits.max(axis=1, keepdims=True))
        probabilities: Floats = exponentials / exponentials.sum(axis=1, keepdims=True)
        return probabilities
    if scoring == "sigmoid":
        return sigmoid(logits)
    if scoring == "sqrt_softplus":
        return np.sqrt(np.logaddexp(0, logits)).astype(np.float32)
    if (
        scoring == "probabilities"
        and logits.size
        and (logits >= 0).all()
        and np.allclose(logits.sum(axis=1), 1, atol=1e-2)
    ):
        return logits
    return None


def _count(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else 1
