"""Rules that need the order of steps, or single steps: hot experts that rotate, and collapse in the course of a run."""

import math

import numpy as np
import numpy.typing as npt

from moe_debugger.analysis.early_warning import LayerSeries, WarningReport, collapse_warnings
from moe_debugger.analysis.findings import EvidenceRow, Finding, FindingKind, Severity
from moe_debugger.analysis.intervals import (
    MIN_UNITS,
    BlockKind,
    Blocks,
    design_effect,
    jackknife,
    row_entropies,
    student_quantile,
)
from moe_debugger.analysis.metrics import effective_experts
from moe_debugger.analysis.rules.load import collapse_limit
from moe_debugger.analysis.rules.look import Look, formatted
from moe_debugger.analysis.step_loads import LoadSeries

__all__ = ["collapse_over_steps", "step_imbalance", "watch_steps"]

# Steps from which the baseline of a run is learnt, and points that "now" is made of at least.
_BASELINE_STEPS = 100
_MIN_RECENT_POINTS = 10
# Draws of each step's loads that give the maximum expected of chance.
_NUM_DRAWS = 20
# Steps are uneven by themselves, not by the requests in them, where they differ this much more than requests do.
_MIN_STEP_EFFECT = 1.5

_Floats = npt.NDArray[np.float64]


def step_imbalance(look: Look, layer_index: int) -> list[Finding]:
    """Find a layer whose single steps are uneven, though their sum may be even: a hot expert that rotates.

    The statistic is the mean over steps of max/mean, less what chance adds in steps of this size. It is a warning where
    steps differ from each other more than requests do; else the requests of each step explain it.
    """
    layer, limits = look.state.layers[layer_index], look.thresholds
    sample = layer.step_sample
    if sample is None or look.shortage(layer_index):
        return []
    table = sample.counts[sample.counts.sum(axis=1) > 0].astype(np.float64)
    if len(table) < MIN_UNITS:
        return []
    ratios = table.max(axis=1) / table.mean(axis=1)
    error = student_quantile(len(table) - 1) * float(ratios.std(ddof=1)) / math.sqrt(len(table))
    long_run = look.metrics[layer_index].max_over_mean
    by_chance = _expected_max_over_mean(table, layer.counts.astype(np.float64)) - long_run
    lower = float(ratios.mean()) - error - max(by_chance, 0.0)
    if not lower > limits.step_imbalance or long_run > limits.step_imbalance:
        return []
    of_steps = design_effect(table, layer.routed_per_token)
    of_requests = max(look.metrics[layer_index].design_effect, 1.0)
    is_own = look.blocks[layer_index].kind is not BlockKind.STEPS and of_steps > _MIN_STEP_EFFECT * of_requests
    # Every training begins with routers so undecided that a small change moves all their tokens at once.
    is_own = is_own and not look.is_undecided(layer_index)
    hottest = np.unique(table.argmax(axis=1))
    return [
        Finding(
            FindingKind.LOAD_IMBALANCE,
            Severity.WARNING if is_own else Severity.INFO,
            "load_imbalance_steps",
            layer_index,
            since_step=layer.first_step,
            args={
                "layer": str(layer_index),
                "ratio": formatted(float(ratios.mean())),
                "longRun": formatted(long_run),
                "steps": str(len(table)),
                "hottest": str(len(hottest)),
            },
            evidence=(
                EvidenceRow("max_over_mean_batch", float(ratios.mean()), "", None, len(table), "x mean of the step"),
                EvidenceRow(
                    "max_over_mean_batch_lower", lower, f"> {formatted(limits.step_imbalance)}", None, len(table)
                ),
                EvidenceRow("max_over_mean", long_run, sample_size=layer.num_tokens),
                EvidenceRow(
                    "design_effect_steps", of_steps, f"> {_MIN_STEP_EFFECT:g} x requests'", of_requests, len(table)
                ),
            ),
            statistic=lower,
        )
    ]


def _expected_max_over_mean(table: _Floats, counts: _Floats) -> float:
    """Return the mean of max/mean over steps of these sizes whose slots are drawn from the long-run shares."""
    # A fixed seed: the same rows must give the same findings.
    rng = np.random.default_rng(0)
    share = counts / counts.sum()
    sizes = np.repeat(table.sum(axis=1).astype(np.int64), _NUM_DRAWS)
    drawn = rng.multinomial(sizes, share)
    return float((drawn.max(axis=1) / drawn.mean(axis=1)).mean())


def collapse_over_steps(look: Look, layer_index: int) -> list[Finding]:
    """Find a router that in the newest steps of a training uses less than half of what it did in the run's first steps.

    Or less than the limit without a baseline: a run that collapsed early has no healthy first steps to compare with.

    Only where steps may be those of a training: in serving, other requests use other experts.
    """
    layer, limits = look.state.layers[layer_index], look.thresholds
    series = _training_series(look, layer_index)
    if series is None or look.shortage(layer_index):
        return []
    num_learnt = -(-_BASELINE_STEPS // series.width)
    if len(series.counts) < num_learnt + _MIN_RECENT_POINTS:
        return []
    levels = np.exp(row_entropies(np.maximum(series.counts.astype(np.float64), np.finfo(np.float64).tiny)))
    baseline = float(max(np.median(levels[:num_learnt]), np.median(levels)))
    limit = max(limits.collapse_baseline_ratio * baseline, collapse_limit(look, layer_index))
    recent = _recent(series, num_learnt, limits.min_tokens)
    if recent is None:
        return []
    table = series.counts[-recent:].astype(np.float64)
    interval, _ = jackknife(Blocks(table, BlockKind.STEPS), layer.routed_per_token)
    now = effective_experts(table.sum(axis=0))
    if not interval.upper < limit:
        return []
    first = len(levels) - 1
    while first > 0 and np.median(levels[max(first - 3, 0) : first]) < limit:
        first -= 1
    return [
        Finding(
            FindingKind.ROUTER_COLLAPSE,
            Severity.CRITICAL,
            "router_collapse_in_training",
            layer_index,
            since_step=int(series.first_steps[first]),
            args={
                "layer": str(layer_index),
                "effective": formatted(now),
                "experts": str(layer.shape.num_experts),
                "limit": formatted(limit),
                "upper": formatted(interval.upper),
                "topK": str(layer.shape.top_k),
                "points": str(recent),
                "hottest": str(int(table.sum(axis=0).argmax())),
                "baseline": formatted(baseline),
            },
            evidence=(
                EvidenceRow(
                    "effective_experts",
                    now,
                    f"< {formatted(limit)}",
                    baseline,
                    int(series.num_tokens[-recent:].sum()),
                    "experts",
                ),
                EvidenceRow(
                    "effective_experts_upper", interval.upper, f"< {formatted(limit)}", None, recent, "experts"
                ),
            ),
            statistic=interval.upper,
        )
    ]


def _training_series(look: Look, layer_index: int) -> LoadSeries | None:
    """Return a layer's loads over steps, None where these are not, or cannot be, the steps of one training."""
    series = look.state.layers[layer_index].load_series
    return series if series is not None and look.may_be_training and series.has_one_clock else None


def _recent(series: LoadSeries, num_learnt: int, min_tokens: int) -> int | None:
    """Return how many points at the end hold enough tokens, none of those that the baseline is learnt from."""
    tokens = np.cumsum(series.num_tokens[::-1].astype(np.int64))
    enough = int(np.searchsorted(tokens, min_tokens)) + 1
    recent = max(enough, _MIN_RECENT_POINTS)
    return recent if recent <= len(series.counts) - num_learnt else None


def watch_steps(look: Look) -> WarningReport | None:
    """Return what the sequential chart says of each layer's loads over steps; None where steps are none of a training.

    In serving other requests use other experts, and no run length holds.
    """
    series = {}
    for index in look.state.layers:
        loads = _training_series(look, index)
        if loads is not None and len(loads.counts) >= MIN_UNITS:
            series[index] = LayerSeries.from_loads(
                loads.first_steps, loads.counts.astype(np.int64), loads.num_tokens.astype(np.int64), width=loads.width
            )
    return collapse_warnings(series) if series else None
