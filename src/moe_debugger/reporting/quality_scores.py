"""Scores of what is not the load: the router's confidence, capacity, ranks, and the capture itself."""

import math
from collections.abc import Mapping

import numpy as np

from moe_debugger.capture_health import CheckStatus
from moe_debugger.planning import StepLoads, contiguous_placement, rank_loads, rank_metrics
from moe_debugger.reporting.content import EvidenceLine, Text, known, say, show
from moe_debugger.reporting.material import Material
from moe_debugger.reporting.scoring import CAP_CRITICAL, CAP_WARNING, Scored, before_of, interpolate, shortage

__all__ = ["capacity", "capture_quality", "rank_balance", "router_confidence"]

_MIN_RANK_STEPS = 32


def router_confidence(material: Material) -> Scored:
    """Return the scores of the routers' confidence."""
    scores: dict[int, float | None] = {}
    lines, reason = [], None
    limits = material.thresholds
    points = [(0.0, 0.0), (limits.routing_confidence, 75.0), (5 * limits.routing_confidence, 100.0)]
    for index, metrics in material.analysis.metrics.items():
        info = material.layers.get(index)
        choices = metrics.num_experts + (info.num_identity_experts if info is not None else 0)
        value = _confidence(metrics.mean_token_entropy, choices)
        interval = metrics.mean_token_entropy_interval
        missing: Text | None
        if not metrics.num_tokens:
            missing = shortage(material, metrics)
        elif not metrics.num_token_entropy:
            cause = info.unavailable_reason if info is not None else ""
            missing = say("shortage.no_entropy", reason=cause or "no router probabilities were captured")
        elif metrics.num_token_entropy < limits.min_tokens:
            missing = say("shortage.tokens", num=metrics.num_token_entropy, least=limits.min_tokens)
        else:
            missing = shortage(material, metrics)
        reason = reason or missing
        scores[index] = None if missing or math.isnan(value) else interpolate(value, points)
        before = before_of(material, index)
        lines.append(
            EvidenceLine(
                metric="routing_confidence",
                now=known(value),
                lower=known(_confidence(interval.upper, choices)),
                upper=known(_confidence(interval.lower, choices)),
                baseline=None if before is None else known(_confidence(before.mean_token_entropy, choices)),
                rule=f"< {show(limits.routing_confidence)}",
                sample_size=metrics.num_token_entropy,
                layer_index=index,
            )
        )
        for name, sample, interval in (
            ("mean_confidence", metrics.num_confidence, metrics.mean_confidence_interval),
            ("mean_margin", metrics.num_margin, metrics.mean_margin_interval),
        ):
            lines.append(
                EvidenceLine(
                    metric=name,
                    now=known(getattr(metrics, name)),
                    lower=known(interval.lower),
                    upper=known(interval.upper),
                    baseline=None if before is None else known(getattr(before, name)),
                    sample_size=sample,
                    layer_index=index,
                )
            )
    return scores, reason, lines


def _confidence(entropy: float, choices: int) -> float:
    """Return 1 - `entropy` (nats) / ln `choices`, 0..1; NaN with a single choice."""
    return float(np.clip(1 - entropy / math.log(choices), 0, 1)) if choices > 1 else float("nan")


def capacity(material: Material) -> Scored:
    """Return the scores of capacity; none where nothing was dropped."""
    scores: dict[int, float | None] = {}
    lines = []
    if material.is_empty:
        return dict.fromkeys(material.analysis.metrics), say("shortage.empty"), []
    limit = material.thresholds.capacity_overflow
    points = [(0.0, 100.0), (limit, 75.0), (max(0.2, 2 * limit), 0.0)]
    dropped = any(metrics.dropped_share > 0 for metrics in material.analysis.metrics.values())
    if not dropped:
        return dict.fromkeys(material.analysis.metrics), say("shortage.dropless"), []
    for index, metrics in material.analysis.metrics.items():
        is_enough = metrics.num_tokens >= material.thresholds.min_tokens
        scores[index] = interpolate(metrics.dropped_share, points) if is_enough else None
        before = before_of(material, index)
        lines.append(
            EvidenceLine(
                metric="dropped_share",
                now=known(metrics.dropped_share),
                lower=known(metrics.dropped_share_interval.lower),
                upper=known(metrics.dropped_share_interval.upper),
                baseline=None if before is None else known(before.dropped_share),
                rule=f"> {show(limit)}",
                sample_size=metrics.num_tokens * metrics.top_k,
                sample_unit="slots",
                layer_index=index,
            )
        )
    return scores, say("shortage.some_tokens", least=material.thresholds.min_tokens), lines


def rank_balance(material: Material, num_ranks: int, loads_of: Mapping[int, StepLoads]) -> Scored:
    """Return the score of the ranks, over all layers."""
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


def capture_quality(material: Material) -> Scored:
    """Return the score of the capture, over all layers."""
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
        score, why = min(score, CAP_WARNING), say("score.capture_lost")
    if failed:
        score, why = min(score, CAP_CRITICAL), say("score.capture_failed", checks=", ".join(c.name for c in failed))
    return {-1: score}, why, lines
