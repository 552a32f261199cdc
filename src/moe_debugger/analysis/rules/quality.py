"""Rules about single tokens and about the capture itself: undecided routers, dropped slots, what was not seen."""

from collections.abc import Iterator

from moe_debugger.analysis.findings import EvidenceRow, Finding, FindingKind, Severity
from moe_debugger.analysis.rules.look import Look, formatted

__all__ = ["capacity_overflow", "capture_unhealthy", "low_confidence"]


def low_confidence(look: Look, layer_index: int) -> Iterator[Finding]:
    """Find a router whose probabilities hardly differ from even ones."""
    metrics, limits = look.metrics[layer_index], look.thresholds
    if (
        metrics.num_token_entropy < limits.min_tokens
        or look.shortage(layer_index)
        or not look.is_undecided(layer_index)
    ):
        return
    confidence = look.routing_confidence(layer_index)
    yield Finding(
        FindingKind.LOW_CONFIDENCE,
        # Every router begins undecided, and unfamiliar text leaves a good one undecided.
        Severity.WARNING if look.num_workloads >= 2 and not look.is_training else Severity.INFO,
        "low_confidence",
        layer_index,
        since_step=look.state.layers[layer_index].first_step,
        args={
            "layer": str(layer_index),
            "confidence": formatted(100 * confidence),
            "limit": formatted(100 * limits.routing_confidence),
        },
        evidence=(
            EvidenceRow(
                "routing_confidence",
                confidence,
                f"< {formatted(limits.routing_confidence)}",
                None,
                metrics.num_token_entropy,
            ),
            EvidenceRow(
                "mean_token_entropy", metrics.mean_token_entropy, sample_size=metrics.num_token_entropy, unit="nats"
            ),
        ),
        statistic=confidence,
    )


def capacity_overflow(look: Look, layer_index: int) -> Iterator[Finding]:
    """Find a layer that drops slots because experts are full."""
    layer, metrics = look.state.layers[layer_index], look.metrics[layer_index]
    limit = look.thresholds.capacity_overflow
    if layer.num_tokens < look.thresholds.min_tokens or not metrics.dropped_share > limit:
        return
    yield Finding(
        FindingKind.CAPACITY_OVERFLOW,
        Severity.WARNING,
        "capacity_overflow",
        layer.shape.layer_index,
        since_step=layer.first_step,
        args={
            "layer": str(layer.shape.layer_index),
            "percent": formatted(100 * metrics.dropped_share),
            "dropped": str(layer.num_dropped_slots),
            "limit": formatted(100 * limit),
        },
        evidence=(
            EvidenceRow(
                "dropped_share",
                metrics.dropped_share,
                f"> {formatted(limit)}",
                None,
                layer.num_tokens * layer.shape.top_k,
                "of slots",
            ),
        ),
        statistic=metrics.dropped_share,
    )


def capture_unhealthy(look: Look) -> Iterator[Finding]:
    """Find that the capture is not all that it should be."""
    health = look.health
    if health is None:
        return
    dropped = {reason: count for reason, count in (health.dropped or {}).items() if count}
    total = sum(dropped.values())
    if health.is_healthy:
        return
    reasons = [f"{count} decisions dropped ({reason})" for reason, count in sorted(dropped.items())]
    if health.num_missing_messages:
        reasons.append(f"{health.num_missing_messages} messages missing")
    # Drops have their own words above, and overhead loses nothing.
    failed = [check for check in health.failed if check.name not in ("drops", "overhead")]
    reasons += [f"{check.name}: {check.example}" for check in failed]
    reasons += health.problems
    yield Finding(
        FindingKind.CAPTURE_UNHEALTHY,
        Severity.WARNING,
        "capture_unhealthy",
        args={"reasons": "; ".join(reasons)},
        evidence=(
            EvidenceRow("dropped_decisions", total, "= 0", None, health.num_produced, "decisions"),
            EvidenceRow("missing_messages", health.num_missing_messages, "= 0", unit="messages"),
            *(
                EvidenceRow(f"capture_{check.name}", check.num_violations, "= 0", None, check.num_checked, check.unit)
                for check in failed
            ),
        ),
        statistic=float(total),
    )
