"""Router statistics from logits, given only where the applied weights or ids confirm how the logits are read.

A router's logits are raw: with a correction bias or expert groups their top-k is not the selection, and sigmoid scores
are not a softmax. So the reading (softmax, sigmoid, or probabilities as they are) is confirmed by the weights that the
experts were given, and the margin is given only for rows whose recomputed top-k equals the captured ids.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "RouterStatistics",
    "SelectionRule",
    "confirm_scoring",
    "probability_sum",
    "router_statistics",
]

Floats = npt.NDArray[np.float32]
Sums = npt.NDArray[np.float64]

# Weights of bf16 models carry 8 bits: 2^-8 of relative rounding, on two numbers.
_RATIO_TOLERANCE = 0.03
_CONFIRMED_SHARE = 0.97
# A float32 sum of so many probabilities loses less than their own rounding.
_ROWS_PER_SUM = 64
# torch runs an operation over no more values than this (its grain) on the calling thread alone.
_PART_VALUES = 32_768


@dataclass(frozen=True, slots=True)
class RouterStatistics:
    """Per-row statistics [n] float32, and the sum of the probabilities over the valid rows, [C] float64."""

    entropy: Floats
    logsumexp: Floats
    top1_probability: Floats
    margin: Floats
    probability_sum: Sums


class SelectionRule:
    """What is added to the scores for selection only: a correction bias, and groups of experts."""

    def __init__(self, router: "nn.Module | None") -> None:
        names = ("e_score_correction_bias", "expert_bias", "balancing_biases")
        self._bias = next((bias for name in names if (bias := getattr(router, name, None)) is not None), None)
        self.num_groups = _count(getattr(router, "num_group", None) or getattr(router, "n_group", None))
        self.top_groups = _count(getattr(router, "topk_group", None))

    def is_by_logits(self, scoring: str) -> bool:
        """Return whether the logits themselves select.

        Without a bias a softmax is monotone in the logits, and its margin is given in logits, where it does not
        vanish for a confident router.
        """
        return self._bias is None and scoring == "softmax" and self.num_groups <= 1

    def selection_scores(self, scores: Floats) -> Floats:
        """Return what the top-k is taken of, [n, E]: the scores of all experts, with bias and groups."""
        if self._bias is not None:
            scores = scores + self._bias.detach().float().cpu().numpy().reshape(1, -1)
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
    logits: Floats,
    expert_ids: npt.NDArray[np.int32],
    scoring: str,
    rule: SelectionRule,
    is_valid: npt.NDArray[np.bool_] | None = None,
) -> RouterStatistics:
    """Return entropy (nats), logsumexp, top-1 probability and selection margin of each row.

    For sigmoid scores the probabilities are the scores divided by their sum.

    Args:
        is_valid: [n] rows that are no padding, over which the probabilities are summed; None = all.
    """
    entropy, logsumexp, top1, margin = columns = tuple(np.empty(len(logits), np.float32) for _ in range(4))
    total = np.zeros(logits.shape[1])
    for rows in _parts(logits):
        *found, probabilities = _statistics(logits[rows], expert_ids[rows], scoring, rule)
        for column, values in zip(columns, found, strict=True):
            column[rows] = values
        total += _sum_of_rows(probabilities, None if is_valid is None else is_valid[rows])
    return RouterStatistics(entropy, logsumexp, top1, margin, total)


def probability_sum(logits: Floats, scoring: str, is_valid: npt.NDArray[np.bool_] | None = None) -> Sums:
    """Return the sum of the probabilities of `router_statistics` alone."""
    total = np.zeros(logits.shape[1])
    for rows in _parts(logits):
        total += _sum_of_rows(_probabilities(logits[rows], scoring), None if is_valid is None else is_valid[rows])
    return total


def _parts(values: Floats) -> Iterator[slice]:
    """Yield slices of rows that are small enough for the processor's cache, and for torch not to start threads.

    Larger temporary arrays are given back to the system each time, and cost several times what is computed in them.
    """
    num_rows = max(1, _PART_VALUES // max(1, values.shape[1]))
    for first in range(0, len(values), num_rows):
        yield slice(first, first + num_rows)


def _statistics(
    logits: Floats, expert_ids: npt.NDArray[np.int32], scoring: str, rule: SelectionRule
) -> tuple[Floats, Floats, Floats, Floats, Floats]:
    """Return entropy, logsumexp, top-1 probability and margin [n], and the probabilities [n, E]."""
    # Where the logits select, the margin finds each row's best one on the way.
    margin, peak = _margin(logits, expert_ids) if rule.is_by_logits(scoring) else (None, None)
    if peak is None:
        peak = _row_max(logits)
    exponentials: Floats = np.subtract(logits, peak[:, None])
    np.exp(exponentials, out=exponentials)
    total = np.einsum("te->t", exponentials)
    logsumexp = peak + np.log(total)
    if scoring == "softmax":
        # The largest probability is that of the peak, whose exponential is 1.
        top1 = 1 / total
        scores = probabilities = np.multiply(exponentials, top1[:, None], out=exponentials)
        # H = -sum p ln p with ln p = x - logsumexp, which needs no logarithm per expert. An expert that is masked out
        # (x = -inf) has p = 0 and adds nothing.
        finite = logits if np.isfinite(logits.min()) and np.isfinite(peak).all() else np.maximum(logits, -1e30)
        entropy = np.maximum(logsumexp - np.einsum("te,te->t", probabilities, finite), 0)
    else:
        scores = _known_scores(logits, scoring)
        probabilities = _shares(scores)
        top1 = _row_max(probabilities)
        entropy = -np.einsum("te,te->t", probabilities, np.log(np.maximum(probabilities, 1e-30)))
        if scoring == "probabilities":
            logsumexp = np.full_like(logsumexp, np.nan)
    if margin is None:
        margin, _ = _margin(rule.selection_scores(scores), expert_ids)
    return entropy, logsumexp, top1, margin, probabilities


def _probabilities(logits: Floats, scoring: str) -> Floats:
    if scoring != "softmax":
        return _shares(_known_scores(logits, scoring))
    probabilities: Floats = np.subtract(logits, _row_max(logits)[:, None])
    np.exp(probabilities, out=probabilities)
    probabilities *= (1 / np.einsum("te->t", probabilities))[:, None]
    return probabilities


def _shares(scores: Floats) -> Floats:
    shares: Floats = scores / np.maximum(np.einsum("te->t", scores), 1e-20)[:, None]
    return shares


def _sum_of_rows(values: Floats, is_valid: npt.NDArray[np.bool_] | None) -> Sums:
    if is_valid is not None and not is_valid.all():
        values = values[is_valid]
    # A float64 sum over float32 converts each value first. A float32 sum of a few rows, added up in float64, loses
    # less than the rounding of the values.
    whole = len(values) // _ROWS_PER_SUM * _ROWS_PER_SUM
    parts = values[:whole].reshape(-1, _ROWS_PER_SUM, values.shape[1]).sum(axis=1)
    total: Sums = parts.sum(axis=0, dtype=np.float64)
    total += values[whole:].sum(axis=0, dtype=np.float64)
    return total


def _margin(scores: Floats, expert_ids: npt.NDArray[np.int32]) -> tuple[Floats, Floats | None]:
    """Return K-th minus (K+1)-th score, and the best score of each row where it was found on the way.

    The margin is NaN where the recomputed top-k is not the captured one, or there is no (K+1)-th. The captured experts
    are a top-k exactly where the lowest of them scores at least what the best other one does, which needs no sorting.
    In a tie both are a top-k, and the margin is 0.
    """
    num_rows, num_experts = scores.shape
    if expert_ids.shape[1] >= num_experts:
        return np.full(num_rows, np.nan, np.float32), None
    # A slot without an expert leaves its row without a margin.
    is_whole = None
    if expert_ids.size and int(expert_ids.min()) < 0:
        is_whole = (expert_ids >= 0).all(axis=1)
        expert_ids = np.maximum(expert_ids, 0)
    if expert_ids.size and int(expert_ids.max()) >= num_experts:
        return np.full(num_rows, np.nan, np.float32), None
    cells = expert_ids + np.arange(0, scores.size, num_experts)[:, None]
    chosen = scores.take(cells)
    others = scores.copy()
    others.reshape(-1)[cells] = -np.inf
    best_other = _row_max(others)
    # Infinite scores, where all experts but the chosen ones are masked out, differ by NaN, and leave no margin.
    with np.errstate(invalid="ignore"):
        gap = -_row_max(-chosen) - best_other
    gap[~np.isfinite(gap) | (gap < 0)] = np.nan
    if is_whole is not None:
        gap[~is_whole] = np.nan
    return gap.astype(np.float32, copy=False), np.maximum(_row_max(chosen), best_other)


def _row_max(values: Floats) -> Floats:
    """Return the largest value of each row of [n, E]: for short rows torch is several times faster than numpy."""
    import torch

    largest: Floats = torch.from_numpy(values).amax(dim=1).numpy()
    return largest


def sigmoid(logits: Floats) -> Floats:
    """Return 1 / (1 + exp(-x)) without a warning where the exponential overflows, which gives the 0 that it should."""
    with np.errstate(over="ignore"):
        values: Floats = np.exp(-logits)
    values += 1
    return np.reciprocal(values, out=values)


def _known_scores(logits: Floats, scoring: str) -> Floats:
    scores = logits if scoring == "probabilities" else _scores(logits, scoring)
    assert scores is not None
    return scores


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
