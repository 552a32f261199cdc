"""What a placement would do on steps that it was not fitted to, with an interval, and the verdict.

Steps that follow each other are alike (the same requests are decoded), so the interval comes from blocks of
neighbouring steps, not from steps as if independent, and is widened where neighbouring blocks are alike still.
"""

import math
from dataclasses import dataclass
from enum import StrEnum
from statistics import NormalDist
from typing import Any

import numpy as np

from moe_debugger.errors import InvalidInputError
from moe_debugger.planning.loads import Floats, check_counts
from moe_debugger.planning.placement import Placement
from moe_debugger.planning.rank_metrics import (
    RankMetrics,
    active_experts,
    critical_load,
    rank_loads,
    rank_metrics,
)

__all__ = ["GainInterval", "Verdict", "WindowResult", "evaluate", "gain_interval", "judge", "student_quantile"]

# Long blocks bridge slow changes, many blocks give a good variance: 16 steps each, within these numbers.
MIN_BLOCKS, MAX_BLOCKS, BLOCK_STEPS = 8, 20, 16
# Fewer held-out steps than these say nothing: 8 blocks of 4 steps.
MIN_STEPS = MIN_BLOCKS * 4
# 2 / sqrt(16 blocks), the 95 % limit of the correlation of independent blocks: beyond it the window is too short for
# how slowly the loads change.
_SLOW_ABOVE = 0.5
# Below this share of the excess in the window's sums, the imbalance is one of single steps.
_ROTATES_BELOW = 0.25


class Verdict(StrEnum):
    """What the steps that were held out say.

    HELPS: the whole interval of the gain lies above the least gain asked for, and no other workload is harmed.
    ONLY_THIS_WORKLOAD: it helps here, and on another workload the whole interval lies below no gain.
    WOULD_NOT_HELP: no gain, or none that can be told from none.
    WOULD_HARM: the whole interval lies below no gain.
    NOT_ENOUGH_STEPS: too few steps with load to fit or to judge.
    """

    HELPS = "helps"
    ONLY_THIS_WORKLOAD = "only_this_workload"
    WOULD_NOT_HELP = "would_not_help"
    WOULD_HARM = "would_harm"
    NOT_ENOUGH_STEPS = "not_enough_steps"


@dataclass(frozen=True, slots=True)
class GainInterval:
    """Share by which the sum of per-step maxima is lower, with its interval; NaN where steps do not allow one.

    Attributes:
        gain: 1 - candidate / baseline, below 1; negative where it is worse.
        lower, upper: interval at `confidence`.
        num_blocks: blocks of neighbouring steps that it comes from.
        block_correlation: lag-1 correlation of the blocks, by which it was widened; 0 where that is negative.
    """

    gain: float
    lower: float
    upper: float
    confidence: float
    num_blocks: int
    block_correlation: float


@dataclass(frozen=True, slots=True, eq=False)
class WindowResult:
    """A placement against the current one, over the steps of one window that it was not fitted to.

    Attributes:
        window: its name.
        current, planned: balance of the ranks under each placement.
        gain: by how much the step-time bound falls.
        current_active_experts, planned_active_experts: mean over steps and layers of the most slots with a token on one
            rank: what counts in memory-bound decode.
    """

    window: str
    current: RankMetrics
    planned: RankMetrics
    gain: GainInterval
    current_active_experts: float
    planned_active_experts: float

    def to_dict(self) -> dict[str, Any]:
        """Return plain values; what is not known is None."""
        sides = (("current", self.current), ("planned", self.planned))
        return {
            "window": self.window,
            "num_steps": self.current.num_steps,
            "gain": _known(self.gain.gain),
            "gain_lower": _known(self.gain.lower),
            "gain_upper": _known(self.gain.upper),
            "confidence": self.gain.confidence,
            "num_blocks": self.gain.num_blocks,
            "block_correlation": _known(self.gain.block_correlation),
            "current_max_active_experts": _known(self.current_active_experts),
            "planned_max_active_experts": _known(self.planned_active_experts),
        } | {
            name: {
                "imbalance": _known(side.imbalance),
                "window_imbalance": _known(side.window_imbalance),
                "waste_share": _known(side.waste_share),
                "step_bound_assignments": _known(side.step_bound),
                "layer_imbalance": [_known(value) for value in side.layer_imbalance.tolist()],
            }
            for name, side in sides
        }


def gain_interval(baseline: Floats, candidate: Floats, *, confidence: float = 0.95) -> GainInterval:
    """Return by how much `candidate` is lower than `baseline`, paired by step.

    Delete-one-block jackknife of 1 - sum candidate / sum baseline over equal blocks of neighbouring steps, Student's t;
    the standard error is multiplied by sqrt((1 + r) / (1 - r)), r the lag-1 correlation of the blocks' residuals.

    Args:
        baseline, candidate: [num_steps] critical loads, in the order of the steps.

    Raises:
        InvalidInputError: they are of different lengths, or confidence is not between 0 and 1.
    """
    if baseline.shape != candidate.shape or baseline.ndim != 1 or not 0 < confidence < 1:
        raise InvalidInputError(
            f"baseline {baseline.shape}, candidate {candidate.shape}, confidence {confidence}: expected equal lengths, "
            "and a confidence between 0 and 1"
        )
    nan = float("nan")
    total = float(baseline.sum())
    gain = 1 - float(candidate.sum()) / total if total else nan
    if len(baseline) < MIN_STEPS or not total:
        return GainInterval(gain, nan, nan, confidence, 0, nan)
    num = min(max(len(baseline) // BLOCK_STEPS, MIN_BLOCKS), MAX_BLOCKS)
    edges = np.linspace(0, len(baseline), num + 1).astype(np.int64)[:-1]
    before, after = np.add.reduceat(baseline, edges), np.add.reduceat(candidate, edges)
    if (total - before <= 0).any():
        return GainInterval(gain, nan, nan, confidence, num, nan)
    left_out = 1 - (after.sum() - after) / (total - before)
    variance = (num - 1) / num * float(np.square(left_out - left_out.mean()).sum())
    residual = after - (1 - gain) * before
    power = float(np.square(residual).sum())
    correlation = float((residual[1:] * residual[:-1]).sum()) / power if power > 0 else 0.0
    correlation = min(max(correlation, 0.0), 0.9)
    error = math.sqrt(variance * (1 + correlation) / (1 - correlation))
    width = student_quantile((1 + confidence) / 2, num - 1) * error
    return GainInterval(gain, gain - width, gain + width, confidence, num, correlation)


def student_quantile(probability: float, degrees: int) -> float:
    """Return the quantile of Student's t (Cornish-Fisher expansion; within 1 % up to 0.999 from 7 degrees on)."""
    z, v = NormalDist().inv_cdf(probability), float(degrees)
    return (
        z
        + (z**3 + z) / (4 * v)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3)
        + (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / (92160 * v**4)
    )


def evaluate(
    window: str, loads: Any, current: Placement, planned: Placement, *, confidence: float = 0.95, seed: int = 0
) -> WindowResult:
    """Judge `planned` against `current` on the steps of a window.

    Loads that are whole numbers are dealt to the copies of an expert at random (seeded), as engines do without looking
    at the load; other loads are split evenly, which makes copies look better than they are in small steps. Steps
    without load are left out.

    Raises:
        InvalidInputError: loads and placements do not fit each other.
    """
    counts = check_counts(loads, window)
    counts = counts[counts.sum(axis=(1, 2)) > 0]
    rng = np.random.default_rng(seed) if bool((counts == np.floor(counts)).all()) else None
    before, after = rank_loads(counts, current, rng=rng), rank_loads(counts, planned, rng=rng)
    return WindowResult(
        window=window,
        current=rank_metrics(before),
        planned=rank_metrics(after),
        gain=gain_interval(critical_load(before), critical_load(after), confidence=confidence),
        current_active_experts=_most_active(counts, current),
        planned_active_experts=_most_active(counts, planned),
    )


def judge(
    held_out: WindowResult, others: tuple[WindowResult, ...], *, fitted_gain: float, min_gain: float
) -> tuple[Verdict, str]:
    """Return the verdict on a placement, and why in one sentence.

    Args:
        held_out: steps of the workload that it was fitted to.
        others: other workloads.
        fitted_gain: its gain on the fitting window.
        min_gain: gains up to this are none.
    """
    gain, current = held_out.gain, held_out.current
    if math.isnan(gain.lower):
        return Verdict.NOT_ENOUGH_STEPS, (
            f"{current.num_steps} held-out steps with load; an interval takes {MIN_STEPS} or more"
        )
    said = f"{gain.gain:+.1%} ({gain.lower:+.1%} to {gain.upper:+.1%})"
    if gain.block_correlation > _SLOW_ABOVE:
        return Verdict.NOT_ENOUGH_STEPS, (
            f"loads change slowly over the {current.num_steps} held-out steps (correlation of neighbouring blocks "
            f"{gain.block_correlation:.2f}), so they are few independent ones; gain {said}"
        )
    if gain.upper < 0:
        return Verdict.WOULD_HARM, f"on held-out steps the gain is {said}: ranks would wait longer than now"
    if gain.lower > min_gain:
        harmed = [other for other in others if other.gain.upper < 0]
        if harmed:
            names = ", ".join(f"{other.window} {other.gain.gain:+.1%}" for other in harmed)
            return Verdict.ONLY_THIS_WORKLOAD, f"gain {said} on held-out steps, but it harms {names}"
        range_ = f"{gain.gain:.1%} ({gain.lower:.1%} to {gain.upper:.1%})"
        return Verdict.HELPS, f"on held-out steps the bound on step time falls by {range_}"
    if current.waste_share <= min_gain:
        return Verdict.WOULD_NOT_HELP, (
            f"ranks are even already: they wait {current.waste_share:.1%} of the time in experts, and no placement can "
            "gain more than that"
        )
    if current.persistent_share < _ROTATES_BELOW:
        return Verdict.WOULD_NOT_HELP, (
            f"the imbalance changes from step to step: {current.imbalance:.2f} in the step, "
            f"{current.window_imbalance:.2f} in the sums of the window, and a fixed placement follows the sums; "
            f"held-out gain {said}"
        )
    if fitted_gain > min_gain:
        return Verdict.WOULD_NOT_HELP, (
            f"the gain of {fitted_gain:+.1%} on the fitting window did not carry over: {said} on held-out steps"
        )
    return Verdict.WOULD_NOT_HELP, f"no better packing was found: {said} on held-out steps"


def _most_active(counts: Floats, placement: Placement) -> float:
    most = active_experts(counts, placement).max(axis=2)
    has_load = counts.sum(axis=2) > 0
    return float(most[has_load].mean()) if has_load.any() else float("nan")


def _known(value: float) -> float | None:
    return None if math.isnan(value) else float(value)
