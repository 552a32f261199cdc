"""Scores of the load: balance of a layer, use of its experts, stability along the steps."""

import math

import numpy as np

from moe_debugger.analysis import Finding, FindingKind, LayerMetrics, Severity, Thresholds
from moe_debugger.reporting.content import EvidenceLine, known, say, show
from moe_debugger.reporting.material import Material
from moe_debugger.reporting.scoring import CAP_WARNING, Scored, before_of, interpolate, shortage
from moe_debugger.reporting.step_series import LayerSteps, effective_over_steps

__all__ = ["collapse_limit", "expert_use", "load_balance", "load_balance_points", "stability", "steadiness"]

_CAP_COLLAPSED = 25.0
_MIN_BUCKETS, _MIN_BUCKET_TOKENS = 8, 1000
_UNUSED_KINDS = (FindingKind.DEAD_EXPERT, FindingKind.COLD_EXPERT, FindingKind.HOT_EXPERT)


def collapse_limit(num_experts: int, top_k: int, thresholds: Thresholds) -> float:
    """Return below how many effective experts a router has collapsed, without a baseline."""
    limit = max(thresholds.collapse_top_k_factor * top_k, thresholds.collapse_share * num_experts)
    return min(limit, 0.75 * num_experts)


def load_balance_points(num_experts: int, top_k: int, thresholds: Thresholds) -> list[tuple[float, float]]:
    """Return score by effective experts: 0 at k, 25 at the collapse limit, 75 where skew begins, 100 at E."""
    skew = thresholds.load_balance * num_experts
    # With few experts the collapse limit can lie above where skew begins.
    collapse = min(collapse_limit(num_experts, top_k, thresholds), 0.9 * skew)
    points = [(min(float(top_k), 0.9 * collapse), 0.0), (collapse, 25.0), (skew, 75.0), (float(num_experts), 100.0)]
    return points


def steadiness(steps: LayerSteps) -> tuple[float, float, float, int] | None:
    """Return lowest / median effective experts over the buckets, the two, and how many buckets; None with too few.

    Neighbouring buckets are joined until each has 1,000 tokens. The lowest is that of running medians of three, so that
    one odd bucket is no fall.
    """
    joined = steps.at_least(_MIN_BUCKET_TOKENS)
    effective = effective_over_steps(joined.counts)
    effective = effective[np.isfinite(effective)]
    if len(effective) < _MIN_BUCKETS:
        return None
    smooth = np.median(np.lib.stride_tricks.sliding_window_view(effective, 3), axis=1)
    lowest, median = float(smooth.min()), float(np.median(effective))
    return lowest / median, lowest, median, len(effective)


def _load_cap(material: Material, index: int) -> float:
    """Return the most that a layer's findings allow: a rule that looks at single steps sees what sums dilute."""
    cap = 100.0
    for finding in material.analysis.findings:
        if finding.layer_index != index:
            continue
        if finding.kind is FindingKind.ROUTER_COLLAPSE:
            cap = min(cap, _CAP_COLLAPSED)
        elif finding.kind is FindingKind.LOAD_IMBALANCE and finding.severity is not Severity.INFO:
            cap = min(cap, CAP_WARNING)
    return cap


def load_balance(material: Material) -> Scored:
    """Return the scores of load balance, by the effective experts of each layer."""
    scores: dict[int, float | None] = {}
    lines, reason = [], None
    for index, metrics in material.analysis.metrics.items():
        missing = shortage(material, metrics)
        reason = reason or missing
        points = load_balance_points(metrics.num_experts, metrics.top_k, material.thresholds)
        value, before = metrics.effective_experts, before_of(material, index)
        scores[index] = None
        if not missing and not math.isnan(value):
            scores[index] = min(interpolate(value, points), _load_cap(material, index))
        interval = metrics.effective_experts_interval
        lines.append(
            EvidenceLine(
                metric="effective_experts",
                now=known(value),
                lower=known(interval.lower),
                upper=known(interval.upper),
                baseline=None if before is None else known(before.effective_experts),
                rule=f"< {show(points[2][0])} skew, < {show(points[1][0])} collapse, of {metrics.num_experts}",
                sample_size=metrics.num_tokens,
                unit="experts",
                layer_index=index,
            )
        )
        lines += [
            EvidenceLine(
                metric=name,
                now=known(getattr(metrics, name)),
                baseline=None if before is None else known(getattr(before, name)),
                rule=_at_balance(metrics, name),
                sample_size=metrics.num_assignments,
                sample_unit="assignments",
                layer_index=index,
            )
            for name in ("max_over_mean", "gini", "cv_debiased")
        ]
    return scores, reason, lines


def _at_balance(metrics: LayerMetrics, name: str) -> str:
    """Return the range of a perfectly balanced router on as many effective tokens; empty where there is none."""
    band = getattr(metrics.balanced_band, name, None)
    return "" if band is None or math.isnan(band.lower) else f"{show(band.lower)} to {show(band.upper)} at balance"


def expert_use(material: Material) -> Scored:
    """Return the scores of expert use, by the findings about single experts."""
    scores: dict[int, float | None] = {}
    lines, reason = [], None
    findings = material.analysis.findings
    collapsed = {f.layer_index: _effective(f) for f in findings if f.kind is FindingKind.ROUTER_COLLAPSE}
    for index, metrics in material.analysis.metrics.items():
        missing = shortage(material, metrics)
        reason = reason or missing
        experts = metrics.num_experts
        marked = {
            kind: {f.expert_id for f in findings if f.kind is kind and f.layer_index == index} for kind in _UNUSED_KINDS
        }
        num_marked = len(set().union(*marked.values()))
        if missing or math.isnan(metrics.effective_experts):
            scores[index] = None
        elif index in collapsed:
            # The rules say nothing of single experts of a collapsed layer.
            effective = collapsed[index]
            scores[index] = 100 * (metrics.effective_experts if effective is None else effective) / experts
        else:
            scores[index] = 100 * (experts - num_marked) / experts
        before = before_of(material, index)
        lines.append(
            EvidenceLine(
                metric="num_unused",
                now=float(metrics.num_unused),
                baseline=None if before is None else float(before.num_unused),
                sample_size=metrics.num_assignments,
                sample_unit="assignments",
                unit="experts",
                layer_index=index,
            )
        )
        if not missing:
            limits = material.thresholds
            rules = (
                f"share < {show(limits.dead_expert)}x",
                f"< {show(limits.cold_expert)}x",
                f"> {show(limits.hot_expert)}x",
            )
            lines += [
                EvidenceLine(
                    metric=f"{kind.value}s",
                    now=float(len(marked[kind])),
                    rule=f"{rule} fair",
                    sample_size=metrics.num_tokens,
                    unit="experts",
                    layer_index=index,
                )
                for kind, rule in zip(_UNUSED_KINDS, rules, strict=True)
            ]
    return scores, reason, lines


def _effective(finding: Finding) -> float | None:
    """Return the effective experts that a finding judged, which may be those of its last steps."""
    values = [row.value for row in finding.evidence if row.metric == "effective_experts"]
    return values[0] if values and math.isfinite(values[0]) else None


def stability(material: Material) -> Scored:
    """Return the scores of stability, by the lowest stretch of steps."""
    points = [(0.0, 0.0), (material.thresholds.collapse_baseline_ratio, 25.0), (0.8, 75.0), (1.0, 100.0)]
    scores: dict[int, float | None] = {}
    lines = []
    for index in material.analysis.metrics:
        found = steadiness(material.steps[index]) if index in material.steps else None
        if found is None:
            scores[index] = None
            continue
        ratio, lowest, median, num_buckets = found
        scores[index] = interpolate(ratio, points)
        lines.append(
            EvidenceLine(
                metric="lowest_over_median_effective_experts",
                now=ratio,
                rule=f"< 0.8 changed, < {show(points[1][0])} halved",
                sample_size=num_buckets,
                sample_unit="buckets of steps",
                layer_index=index,
            )
        )
        lines.append(
            EvidenceLine(
                metric="lowest_effective_experts",
                now=lowest,
                baseline=median,
                rule="baseline = median over steps",
                sample_size=num_buckets,
                sample_unit="buckets of steps",
                unit="experts",
                layer_index=index,
            )
        )
    reason = say("shortage.buckets", least=_MIN_BUCKETS, tokens=_MIN_BUCKET_TOKENS)
    return scores, reason, lines
