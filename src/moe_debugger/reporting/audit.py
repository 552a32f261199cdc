"""The audit: 0 to 100 for each category, from numbers with enough behind them, or the reason why there is no score.

A category has the score of its lowest layer: layers are never averaged, because four opposite collapses average to
"even". The anchors are those of the rules: a score is below 75 exactly where a rule's line is crossed, so that score
and findings cannot contradict each other. docs/report.md has all formulas.

Example: E = 8, k = 2 and 5.6 effective experts (0.7 E, where skew begins) is 75; 3 (where a router has collapsed) is
25; 4.3, halfway between, is 50.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

import numpy as np

from moe_debugger.analysis import Finding, FindingKind, LayerMetrics, Severity, Thresholds
from moe_debugger.capture_health import CheckStatus
from moe_debugger.planning import StepLoads, contiguous_placement, rank_loads, rank_metrics
from moe_debugger.reporting.content import Category, EvidenceLine, Text, known, say, show
from moe_debugger.reporting.material import Material
from moe_debugger.reporting.step_series import LayerSteps, effective_over_steps

__all__ = ["audit", "collapse_limit", "interpolate", "load_balance_points", "overall_score", "steadiness"]

# A warning keeps the overall score below "good", a critical finding below "fair".
_CAP_WARNING, _CAP_CRITICAL, _CAP_COLLAPSED = 74.0, 49.0, 25.0
_MIN_BUCKETS, _MIN_BUCKET_TOKENS = 8, 1000
_MIN_RANK_STEPS = 32
# Least weight of the categories that have a score, of the 13 there are, for an overall one.
_MIN_WEIGHT = 5

_WEIGHTS = {
    "load_balance": 3,
    "expert_use": 2,
    "router_confidence": 1,
    "capacity": 1,
    "rank_balance": 2,
    "capture_quality": 2,
    "stability": 2,
}

_Points = Sequence[tuple[float, float]]
_Scored = tuple[dict[int, float | None], Text | None, list[EvidenceLine]]


def interpolate(value: float, points: _Points) -> float:
    """Return the height at `value` of the line through `points` (ascending), level outside of them."""
    if value <= points[0][0]:
        return points[0][1]
    for (x0, y0), (x1, y1) in pairwise(points):
        if value < x1:
            return y0 + (y1 - y0) * (value - x0) / (x1 - x0)
    return points[-1][1]


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


def overall_score(categories: Sequence[Category], findings: Sequence[Finding]) -> tuple[float | None, Text]:
    """Return the weighted mean of the categories that have a score, and what bounds it."""
    scored = [(category.weight, category.score) for category in categories if category.score is not None]
    weight = sum(each for each, _ in scored)
    if weight < _MIN_WEIGHT:
        names = ", ".join(category.title.text for category in categories if category.score is not None)
        return None, say("overall.too_little", scored=names or "none")
    mean = sum(each * score for each, score in scored) / weight
    worst = max((finding.severity for finding in findings), key=lambda severity: severity.rank, default=None)
    cap = {Severity.CRITICAL: _CAP_CRITICAL, Severity.WARNING: _CAP_WARNING}.get(worst or Severity.INFO, 100.0)
    args = {"mean": round(mean, 1), "num": len(scored), "of": len(categories)}
    if mean > cap and worst is not None:
        return cap, say("overall.capped", cap=cap, severity=worst.value, **args)
    return round(mean, 1), say("overall.mean", **args)


def audit(material: Material, num_ranks: int, loads_of: Mapping[int, StepLoads]) -> list[Category]:
    """Return all categories, in the order in which they are shown.

    Args:
        material: what was recorded.
        num_ranks: expert-parallel ranks; below 2 there is no balance of ranks.
        loads_of: loads per step by number of experts, of `loads_by_width`.
    """
    parts: dict[str, Callable[[], _Scored]] = {
        "load_balance": lambda: _load_balance(material),
        "expert_use": lambda: _expert_use(material),
        "router_confidence": lambda: _router_confidence(material),
        "capacity": lambda: _capacity(material),
        "rank_balance": lambda: _rank_balance(material, num_ranks, loads_of),
        "capture_quality": lambda: _capture_quality(material),
        "stability": lambda: _stability(material),
    }
    return [_category(key, *parts[key]()) for key in _WEIGHTS]


def _category(
    key: str, layer_scores: dict[int, float | None], why_not: Text | None, lines: list[EvidenceLine]
) -> Category:
    scored = {index: score for index, score in layer_scores.items() if score is not None}
    worst = min(scored, key=lambda index: (scored[index], index), default=None)
    if worst is None:
        why = why_not or say("score.no_layers")
    elif worst < 0:
        why = why_not or say("score.whole")
    else:
        left_out = len(layer_scores) - len(scored)
        code = "score.lowest_layer_some" if left_out else "score.lowest_layer"
        why = say(code, layer=worst, num=len(scored), left_out=left_out, reason=why_not or "")
    return Category(
        key=key,
        title=say(f"category.{key}"),
        score=None if worst is None else round(scored[worst], 1),
        why=why,
        formula=say(f"formula.{key}"),
        weight=_WEIGHTS[key],
        layer_index=None if worst is None or worst < 0 else worst,
        layer_scores=layer_scores if worst is None or worst >= 0 else {},
        evidence=lines,
    )


def _shortage(material: Material, metrics: LayerMetrics) -> Text | None:
    """Return what is missing for a score of a layer's load, by the limits of the rules."""
    limits = material.thresholds
    for finding in material.analysis.findings:
        if finding.code == "insufficient_evidence" and finding.layer_index == metrics.layer_index:
            return say("shortage.other", missing=finding.args.get("missing", ""))
    if metrics.num_tokens < limits.min_tokens:
        return say("shortage.tokens", num=metrics.num_tokens, least=limits.min_tokens)
    if material.level == "counts":
        return say("shortage.counts")
    if material.analysis.num_requests < limits.min_requests:
        return say("shortage.requests", num=material.analysis.num_requests, least=limits.min_requests)
    if math.isnan(metrics.effective_experts_interval.upper):
        return say("shortage.blocks")
    return None


def _before(material: Material, index: int) -> LayerMetrics | None:
    return None if material.baseline is None else material.baseline.metrics.get(index)


def _load_cap(material: Material, index: int) -> float:
    """Return the most that a layer's findings allow: a rule that looks at single steps sees what sums dilute."""
    cap = 100.0
    for finding in material.analysis.findings:
        if finding.layer_index != index:
            continue
        if finding.kind is FindingKind.ROUTER_COLLAPSE:
            cap = min(cap, _CAP_COLLAPSED)
        elif finding.kind is FindingKind.LOAD_IMBALANCE and finding.severity is not Severity.INFO:
            cap = min(cap, _CAP_WARNING)
    return cap


def _load_balance(material: Material) -> _Scored:
    scores: dict[int, float | None] = {}
    lines, reason = [], None
    for index, metrics in material.analysis.metrics.items():
        missing = _shortage(material, metrics)
        reason = reason or missing
        points = load_balance_points(metrics.num_experts, metrics.top_k, material.thresholds)
        value, before = metrics.effective_experts, _before(material, index)
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
                sample_size=metrics.num_assignments,
                sample_unit="assignments",
                layer_index=index,
            )
            for name in ("max_over_mean", "gini", "cv_debiased")
        ]
    return scores, reason, lines


_UNUSED_KINDS = (FindingKind.DEAD_EXPERT, FindingKind.COLD_EXPERT, FindingKind.HOT_EXPERT)


def _expert_use(material: Material) -> _Scored:
    scores: dict[int, float | None] = {}
    lines, reason = [], None
    findings = material.analysis.findings
    collapsed = {f.layer_index: _effective(f) for f in findings if f.kind is FindingKind.ROUTER_COLLAPSE}
    for index, metrics in material.analysis.metrics.items():
        missing = _shortage(material, metrics)
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
        before = _before(material, index)
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


def _router_confidence(material: Material) -> _Scored:
    scores: dict[int, float | None] = {}
    lines, reason = [], None
    limits = material.thresholds
    points = [(0.0, 0.0), (limits.routing_confidence, 75.0), (5 * limits.routing_confidence, 100.0)]
    for index, metrics in material.analysis.metrics.items():
        info = material.layers.get(index)
        choices = metrics.num_experts + (info.num_identity_experts if info is not None else 0)
        value = 1 - metrics.mean_token_entropy / math.log(choices) if choices > 1 else float("nan")
        missing: Text | None
        if not metrics.num_token_entropy:
            cause = info.unavailable_reason if info is not None else ""
            missing = say("shortage.no_entropy", reason=cause or "no router probabilities were captured")
        elif metrics.num_token_entropy < limits.min_tokens:
            missing = say("shortage.tokens", num=metrics.num_token_entropy, least=limits.min_tokens)
        else:
            missing = _shortage(material, metrics)
        reason = reason or missing
        scores[index] = None if missing or math.isnan(value) else interpolate(value, points)
        before = _before(material, index)
        then = None
        if before is not None and before.num_token_entropy and choices > 1:
            then = known(1 - before.mean_token_entropy / math.log(choices))
        lines.append(
            EvidenceLine(
                metric="routing_confidence",
                now=known(value),
                baseline=then,
                rule=f"< {show(limits.routing_confidence)}",
                sample_size=metrics.num_token_entropy,
                layer_index=index,
            )
        )
        for name, sample in (("mean_confidence", metrics.num_confidence), ("mean_margin", metrics.num_margin)):
            lines.append(
                EvidenceLine(
                    metric=name,
                    now=known(getattr(metrics, name)),
                    baseline=None if before is None else known(getattr(before, name)),
                    sample_size=sample,
                    layer_index=index,
                )
            )
    return scores, reason, lines


def _capacity(material: Material) -> _Scored:
    scores: dict[int, float | None] = {}
    lines = []
    limit = material.thresholds.capacity_overflow
    points = [(0.0, 100.0), (limit, 75.0), (max(0.2, 2 * limit), 0.0)]
    dropped = any(metrics.dropped_share > 0 for metrics in material.analysis.metrics.values())
    if not dropped:
        return dict.fromkeys(material.analysis.metrics), say("shortage.dropless"), []
    for index, metrics in material.analysis.metrics.items():
        is_enough = metrics.num_tokens >= material.thresholds.min_tokens
        scores[index] = interpolate(metrics.dropped_share, points) if is_enough else None
        before = _before(material, index)
        lines.append(
            EvidenceLine(
                metric="dropped_share",
                now=known(metrics.dropped_share),
                baseline=None if before is None else known(before.dropped_share),
                rule=f"> {show(limit)}",
                sample_size=metrics.num_tokens * metrics.top_k,
                sample_unit="slots",
                layer_index=index,
            )
        )
    return scores, say("shortage.some_tokens", least=material.thresholds.min_tokens), lines


def _rank_balance(material: Material, num_ranks: int, loads_of: Mapping[int, StepLoads]) -> _Scored:
    none: dict[int, float | None] = dict.fromkeys(material.analysis.metrics)
    if num_ranks < 2:
        return none, say("shortage.one_rank"), []
    if material.rows is None:
        return none, say("shortage.no_rows"), []
    lines: list[EvidenceLine] = []
    waste: list[tuple[float, float]] = []
    reason = None
    for experts, loads in loads_of.items():
        if experts % num_ranks:
            reason = say("shortage.uneven_ranks", experts=experts, ranks=num_ranks)
            continue
        if len(loads.counts) < _MIN_RANK_STEPS:
            reason = say("shortage.steps", num=len(loads.counts), least=_MIN_RANK_STEPS)
            continue
        placement = contiguous_placement(loads.counts.shape[1], experts, num_ranks)
        ranks = rank_loads(loads, placement)
        metrics = rank_metrics(ranks)
        waste.append((float(ranks.max(axis=2).sum()), float(ranks.mean(axis=2).sum())))
        for name, value in (
            ("rank_waste_share", metrics.waste_share),
            ("rank_imbalance", metrics.imbalance),
            ("rank_window_imbalance", metrics.window_imbalance),
        ):
            lines.append(
                EvidenceLine(
                    metric=name,
                    now=known(value),
                    sample_size=metrics.num_steps,
                    sample_unit="steps",
                    rule="1 = even" if "imbalance" in name else "0 = no waiting",
                )
            )
    if not waste:
        return none, reason or say("shortage.no_rows"), lines
    share = sum(mean for _, mean in waste) / sum(most for most, _ in waste)
    return {-1: 100 * share}, say("score.ranks", ranks=num_ranks), lines


def _capture_quality(material: Material) -> _Scored:
    manifest, health = material.manifest, material.health
    if material.source == "analysis":
        return {}, say("shortage.no_capture"), []
    not_written = sum(manifest.num_rows_not_written.values()) if manifest is not None else 0
    lost = material.verification.num_rows_lost if material.verification is not None else 0
    if manifest is not None:
        dropped = sum(manifest.num_decisions_dropped.values())
        kept = max(0, manifest.num_rows - lost) if manifest.level != "counts" else sum(
            metrics.num_tokens for metrics in material.analysis.metrics.values()
        )  # fmt: skip
    else:
        dropped = sum((health.dropped or {}).values()) if health is not None else 0
        kept = max(0, health.num_produced - dropped) if health is not None else 0
    whole = kept + not_written + lost + dropped
    lines = [
        EvidenceLine(metric=name, now=float(num), rule="> 0", sample_size=whole, sample_unit="rows")
        for name, num in (("decisions_dropped", dropped), ("rows_not_written", not_written), ("rows_damaged", lost))
    ]
    checks = health.checks if health is not None else ()
    failed = [check for check in checks if check.status is CheckStatus.FAILED and check.name != "overhead"]
    lines += [
        EvidenceLine(
            metric=f"capture_{check.name}",
            now=float(check.num_violations) if check.status is not CheckStatus.UNKNOWN else None,
            rule=check.status.value,
            sample_size=check.num_checked,
            sample_unit=check.unit or "rows",
        )
        for check in checks
    ]
    if not whole:
        return {}, say("shortage.nothing"), lines
    score, why = 100 * kept / whole, say("score.capture_whole")
    is_uncertain = bool(material.problems) or dropped + not_written + lost > 0 or health is None
    if health is not None and (health.problems or health.num_missing_messages):
        is_uncertain = True
    if manifest is not None and not manifest.is_finished:
        is_uncertain = True
    if is_uncertain:
        score, why = min(score, _CAP_WARNING), say("score.capture_lost")
    if failed:
        score, why = min(score, _CAP_CRITICAL), say("score.capture_failed", checks=", ".join(c.name for c in failed))
    return {-1: score}, why, lines


def _stability(material: Material) -> _Scored:
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
