"""Rules about long-run load: collapse, skew, and experts that are dead, hot or cold."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from moe_debugger.analysis.findings import EvidenceRow, Finding, FindingKind, Severity
from moe_debugger.analysis.intervals import benjamini_hochberg, share_tests
from moe_debugger.analysis.metrics import effective_experts
from moe_debugger.analysis.rules.look import Look, formatted
from moe_debugger.analysis.state import LayerShape, LayerState

__all__ = [
    "collapse",
    "collapse_limit",
    "dead_experts",
    "hot_and_cold_experts",
    "hot_floor",
    "is_explained_by_hot_experts",
    "load_imbalance",
    "since",
]

# Simultaneous level of the dead-expert bound over all layers and experts (research: a = 1 %).
_DEAD_LEVEL = 0.01
# In small layers the part of all tokens that a hot expert takes, and the least multiple of the fair share that it has.
_HOT_PART = 0.9
_LEAST_HOT = 1.25
# A layer that had this part of today's effective experts or less in the baseline has not changed.
_UNCHANGED = 0.8


def since(layer: LayerState, shows_it: Callable[[npt.NDArray[np.float64]], bool]) -> int | None:
    """Return the first step from which on all rows together, and those after any later step, show something.

    Args:
        layer: with its series; where it keeps none, the answer is the first step of the rows, None without steps.
        shows_it: of counts [E], summed from a step to the end of the rows.
    """
    series = layer.load_series
    if layer.first_step is None or series is None or not len(series.counts) or not series.has_one_clock:
        return layer.first_step
    # Sums from each bucket to the end: the first from which on every one of them shows it.
    tails = np.cumsum(series.counts[::-1].astype(np.float64), axis=0)[::-1]
    first = len(tails) - 1
    while first > 0 and shows_it(tails[first - 1]):
        first -= 1
    # A tail also holds a little of what came before the change: the bucket itself must show it, too.
    while first < len(tails) - 1 and not shows_it(series.counts[first].astype(np.float64)):
        first += 1
    return max(int(series.first_steps[first]), series.first or 0)


def collapse_limit(look: Look, layer_index: int) -> float:
    """Return the number of effective experts below which a router has collapsed, without a baseline."""
    limits, shape = look.thresholds, look.state.layers[layer_index].shape
    # With few experts 1.5 k can reach E, where even perfect balance would lie below it.
    return min(
        max(limits.collapse_top_k_factor * shape.top_k, limits.collapse_share * shape.num_experts),
        0.75 * shape.num_experts,
    )


def collapse(look: Look, layer_index: int) -> list[Finding]:
    """Find a router that uses barely more experts than one token does, or half of what it did in the baseline."""
    layer, metrics, limits = look.state.layers[layer_index], look.metrics[layer_index], look.thresholds
    shape = layer.shape
    if shape.top_k >= shape.num_experts or not layer.num_assignments:
        return []
    before = look.baseline.get(layer_index)
    baseline = before.effective_experts if before and before.num_tokens >= limits.min_tokens else None
    limit = collapse_limit(look, layer_index)
    if baseline is not None:
        half = limits.collapse_baseline_ratio * baseline
        # A few requests use few experts: against those of others that is no fall.
        limit = half if look.compares_requests(layer_index) else min(half, limit)
    interval = metrics.effective_experts_interval
    missing = look.shortage(layer_index)
    evidence = (
        EvidenceRow(
            "effective_experts",
            metrics.effective_experts,
            f"< {formatted(limit)}",
            baseline,
            layer.num_tokens,
            "experts",
        ),
        EvidenceRow(
            "effective_experts_upper", interval.upper, f"< {formatted(limit)}", None, metrics.num_blocks, "experts"
        ),
        EvidenceRow("num_requests", look.state.num_requests, unit="requests"),
        EvidenceRow("max_over_mean", metrics.max_over_mean, sample_size=layer.num_tokens),
        *_design(look, layer_index),
    )
    args = {
        "layer": str(layer_index),
        "effective": formatted(metrics.effective_experts),
        "experts": str(shape.num_experts),
        "limit": formatted(limit),
        "upper": formatted(interval.upper),
        "topK": str(shape.top_k),
        "requests": str(look.state.num_requests),
        "hottest": str(metrics.hottest_expert),
        "baseline": "" if baseline is None else formatted(baseline),
    }
    if not missing and interval.upper < limit:
        return [
            Finding(
                FindingKind.ROUTER_COLLAPSE,
                Severity.CRITICAL if look.knows_variety(layer_index) else Severity.WARNING,
                "router_collapse" if baseline is None else "router_collapse_from_baseline",
                layer_index,
                since_step=since(layer, lambda counts: effective_experts(counts) < limit),
                args=args,
                evidence=evidence,
                statistic=interval.upper,
            )
        ]
    is_low = metrics.effective_experts < limit and layer.num_assignments >= 10 * limit
    if missing and (is_low or missing == look.repetition()):
        return [
            Finding(
                FindingKind.LOAD_IMBALANCE,
                Severity.INFO,
                "insufficient_evidence",
                layer_index,
                since_step=layer.first_step,
                args={**args, "missing": missing},
                evidence=evidence,
                statistic=metrics.effective_experts,
            )
        ]
    return []


def _design(look: Look, layer_index: int) -> tuple[EvidenceRow, EvidenceRow]:
    """Evidence of how far tokens are from independent ones."""
    metrics = look.metrics[layer_index]
    return (
        EvidenceRow(
            "design_effect",
            metrics.design_effect,
            sample_size=metrics.num_blocks,
            unit=f"from {metrics.blocks_of}",
        ),
        EvidenceRow("effective_tokens", metrics.effective_tokens, unit="tokens"),
    )


def load_imbalance(look: Look, layer_index: int) -> list[Finding]:
    """Find a layer whose long-run load is skewed over many experts."""
    layer, metrics = look.state.layers[layer_index], look.metrics[layer_index]
    shape = layer.shape
    limit = look.thresholds.load_balance * shape.num_experts
    upper = metrics.effective_experts_interval.upper
    # A token that uses all experts of a small layer cannot be skewed below k effective experts.
    if look.shortage(layer_index) or not upper < limit or shape.top_k >= limit:
        return []
    before = look.baseline.get(layer_index)
    is_new = before is not None and metrics.effective_experts < _UNCHANGED * before.effective_experts
    is_new = is_new and look.compares_requests(layer_index)
    is_specific = before is None and not look.is_representative
    is_warning = is_new or (before is None and not is_specific and look.rests_on_requests(layer_index))
    return [
        Finding(
            FindingKind.LOAD_IMBALANCE,
            Severity.WARNING if is_warning else Severity.INFO,
            "load_imbalance_one_workload" if is_specific else "load_imbalance",
            layer_index,
            since_step=since(layer, lambda counts: effective_experts(counts) < limit),
            args={
                "layer": str(layer_index),
                "effective": formatted(metrics.effective_experts),
                "experts": str(shape.num_experts),
                "limit": formatted(limit),
                "hottest": str(metrics.hottest_expert),
                "ratio": formatted(metrics.max_over_mean),
            },
            evidence=(
                EvidenceRow(
                    "effective_experts",
                    metrics.effective_experts,
                    f"< {formatted(limit)}",
                    before.effective_experts if before else None,
                    layer.num_tokens,
                    "experts",
                ),
                EvidenceRow(
                    "effective_experts_upper", upper, f"< {formatted(limit)}", None, metrics.num_blocks, "experts"
                ),
                EvidenceRow("max_over_mean", metrics.max_over_mean, sample_size=layer.num_tokens),
                *_design(look, layer_index),
            ),
            statistic=upper,
        )
    ]


def is_explained_by_hot_experts(look: Look, finding: Finding, found: list[Finding]) -> bool:
    """Return whether a layer's skew is gone without its hot experts, which are findings already."""
    index = finding.layer_index
    if finding.code not in ("load_imbalance", "load_imbalance_one_workload") or index is None:
        return False
    is_hot = np.zeros(look.state.layers[index].shape.num_experts, np.bool_)
    for other in found:
        if other.kind is FindingKind.HOT_EXPERT and other.layer_index == index and other.expert_id is not None:
            is_hot[other.expert_id] = True
    rest = look.state.layers[index].counts[~is_hot]
    return bool(is_hot.any()) and effective_experts(rest) >= look.thresholds.load_balance * rest.size


def dead_experts(look: Look, layer_index: int) -> Iterator[Finding]:
    """Find experts without a hit among so many tokens that chance would have given them one."""
    layer, metrics, limits = look.state.layers[layer_index], look.metrics[layer_index], look.thresholds
    shape = layer.shape
    if look.shortage(layer_index) or math.isnan(metrics.effective_tokens):
        return
    # With no hit in n independent tokens the share is below this at the level, over all experts at once.
    level, limit = _dead_limits(look, shape)
    bound = 1 - level ** (1 / metrics.effective_tokens)
    if bound >= limit:
        return
    before = look.baseline.get(layer_index)
    for expert in np.flatnonzero(layer.counts == 0).tolist():
        was_used = before is not None and before.share[expert] * shape.num_experts > limits.cold_expert
        if not look.rests_on_requests(layer_index) or (before is not None and not was_used):
            severity = Severity.INFO
        else:
            severity = Severity.CRITICAL if look.num_workloads >= 2 else Severity.WARNING
        yield Finding(
            FindingKind.DEAD_EXPERT,
            severity,
            "dead_expert" if look.num_workloads < 2 else "dead_expert_everywhere",
            layer_index,
            expert,
            since(layer, lambda counts, at=expert: counts[at] == 0),  # type: ignore[misc]
            {
                "layer": str(layer_index),
                "expert": str(expert),
                "tokens": str(layer.num_tokens),
                "effectiveTokens": formatted(metrics.effective_tokens),
                "requests": str(look.state.num_requests),
                "workloads": str(look.num_workloads),
            },
            (
                EvidenceRow(
                    "num_assignments",
                    0,
                    "= 0",
                    None if before is None else before.share[expert] * before.num_assignments,
                    layer.num_tokens,
                    "assignments",
                ),
                EvidenceRow("share_upper", bound, f"< {limit:.3g}", None, int(metrics.effective_tokens), "per token"),
                EvidenceRow("num_workloads", look.num_workloads, ">= 2 to be critical", unit="workloads"),
                *_design(look, layer_index),
            ),
            bound,
        )


def _dead_limits(look: Look, shape: LayerShape) -> tuple[float, float]:
    """Return the level of one expert's test, and the share per token below which an expert is dead."""
    level = _DEAD_LEVEL / sum(shape.num_experts for shape in look.state.shapes)
    return level, look.thresholds.dead_expert * shape.top_k / shape.num_experts


def _tokens_to_be_dead(look: Look, shape: LayerShape) -> float:
    """Return above how many effective tokens an expert without a hit is dead."""
    level, limit = _dead_limits(look, shape)
    return math.log(level) / math.log1p(-limit) if limit < 1 else 0.0


def hot_floor(look: Look, shape: LayerShape) -> float:
    """Return the multiple of the fair share above which an expert is hot.

    An expert that takes every token has E/k times the fair share: in small layers that is less than the threshold, and
    hot is what takes 0.9 of the tokens at least. Where tokens use most experts, none can be hot.
    """
    most = _HOT_PART * shape.num_experts / shape.top_k
    return min(look.thresholds.hot_expert, most) if most > _LEAST_HOT else look.thresholds.hot_expert


def hot_and_cold_experts(look: Look, layers: list[int], dead: set[tuple[int | None, int | None]]) -> Iterator[Finding]:
    """Find experts whose long-run share lies beyond the floors."""
    limits = look.thresholds
    tested = []
    for index in layers:
        if look.shortage(index):
            continue
        layer = look.state.layers[index]
        hot = hot_floor(look, layer.shape)
        tests = share_tests(look.blocks[index], layer.routed_per_token, hot=hot, cold=limits.cold_expert)
        if tests is not None:
            tested.append((index, tests))
    if not tested:
        return
    # Hot and cold are one family: every layer x expert x direction of this call.
    flat = np.concatenate([np.concatenate(tests) for _, tests in tested])
    significant = benjamini_hochberg(flat, limits.false_discovery_rate)
    at = 0
    for index, tests in tested:
        num_experts = look.state.layers[index].shape.num_experts
        for direction, p_values in zip((FindingKind.HOT_EXPERT, FindingKind.COLD_EXPERT), tests, strict=True):
            for expert in np.flatnonzero(significant[at : at + num_experts]).tolist():
                if (index, expert) not in dead:
                    yield _skewed(look, index, expert, direction, float(p_values[expert]))
            at += num_experts


def _skewed(look: Look, index: int, expert: int, kind: FindingKind, p_value: float) -> Finding:
    layer, metrics, before = look.state.layers[index], look.metrics[index], look.baseline.get(index)
    is_hot = kind is FindingKind.HOT_EXPERT
    floor = hot_floor(look, layer.shape) if is_hot else look.thresholds.cold_expert
    ratio = metrics.share[expert] * metrics.num_experts
    baseline = before.share[expert] * before.num_experts if before else None
    is_new = baseline is not None and (baseline < floor if is_hot else baseline > floor)
    is_new = is_new and look.compares_requests(index)
    # A hot expert is a matter of placement on any workload; a cold one may be a specialist for other text.
    is_natural = baseline is None and look.rests_on_requests(index) and (is_hot or look.is_representative)
    limit = floor / metrics.num_experts
    design, unused_args = _design(look, index), {}
    if not layer.counts[expert]:
        needed = formatted(_tokens_to_be_dead(look, layer.shape))
        design = (design[0], replace(design[1], rule=f"> {needed} to be dead"))
        effective = formatted(metrics.effective_tokens)
        unused_args = {"tokens": str(layer.num_tokens), "effectiveTokens": effective, "needed": needed}

    def shows_it(counts: npt.NDArray[np.float64]) -> bool:
        share = counts[expert] / max(counts.sum(), 1)
        return bool(share > limit if is_hot else share < limit)

    return Finding(
        kind,
        Severity.WARNING if is_new or is_natural else Severity.INFO,
        "cold_expert_unused" if unused_args else kind.value,
        index,
        expert,
        since(layer, shows_it),
        {
            "layer": str(index),
            "expert": str(expert),
            "ratio": formatted(ratio),
            "floor": formatted(floor),
            "percent": formatted(100 * metrics.share[expert]),
            "requests": str(look.state.num_requests),
            **unused_args,
        },
        (
            EvidenceRow(
                "load_ratio",
                ratio,
                f"{'>' if is_hot else '<'} {formatted(floor)}",
                baseline,
                layer.num_tokens,
                "x fair share",
            ),
            EvidenceRow("p_value", p_value, "Benjamini-Hochberg", None, metrics.num_blocks),
            *design,
        ),
        ratio,
    )
