"""The rules that turn metrics into findings.

What a rule may claim depends on what the rows can show:

* Routers specialise, so on one kind of text a healthy layer uses few experts. Skew, hot, cold and dead experts are
  therefore `info` on one workload; they become `warning` where the rows are representative: at least two workloads, a
  baseline that shows the change, or training, whose data are the workload that the router is balanced on.
* Collapse is stricter than skew (barely more experts than one token uses, over many different requests), so it is
  `critical` on one workload too, but only on evidence of diversity: enough requests, and enough different text in them.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from moe_debugger.analysis.findings import EvidenceRow, Finding, FindingKind, Severity, Thresholds
from moe_debugger.analysis.intervals import benjamini_hochberg, share_tests
from moe_debugger.analysis.metrics import LayerMetrics, effective_experts
from moe_debugger.analysis.state import LayerState, RoutingState
from moe_debugger.capture_health import CaptureHealth
from moe_debugger.v1 import routing_pb2 as pb

__all__ = ["CaptureHealth", "Look", "all_findings", "num_different_requests"]

# Simultaneous level of the dead-expert bound over all layers and experts (research: a = 1 %).
_DEAD_LEVEL = 0.01
# A layer that had this part of today's effective experts or less in the baseline has not changed.
_UNCHANGED = 0.8
# Routers go by the token first of all: with fewer kinds of them than this (digits are ten), even a healthy one has
# little to tell apart. Code, prose, tables and sums have 14 to 25 by bytes, and more by words.
_MIN_TOKEN_KINDS = 12.0


@dataclass(frozen=True, slots=True)
class Look:
    """Everything that the rules of one call may look at."""

    state: RoutingState
    metrics: dict[int, LayerMetrics]
    thresholds: Thresholds
    baseline: dict[int, LayerMetrics]
    num_workloads: int
    num_different: float | None
    health: CaptureHealth | None

    @property
    def is_training(self) -> bool:
        """True where more than half of the tokens were training tokens."""
        tokens = self.state.phase_tokens
        return int(tokens[pb.PHASE_TRAIN]) * 2 > int(tokens.sum())

    @property
    def is_representative(self) -> bool:
        """True where skew is a property of the router rather than of one kind of text."""
        return self.num_workloads >= 2 or self.is_training

    def shortage(self, layer: LayerState, metrics: LayerMetrics) -> str:
        """Return what is missing for any claim about `layer`, or an empty text."""
        limits = self.thresholds
        if layer.num_tokens < limits.min_tokens:
            return f"{layer.num_tokens} tokens of at least {limits.min_tokens}"
        if self.state.num_requests < limits.min_requests:
            return f"{self.state.num_requests} requests of at least {limits.min_requests}"
        # Half of the minimum allows for shared beginnings, and for what the fingerprints cannot tell apart.
        needed = limits.min_requests / 2
        if self.num_different is not None and self.num_different < needed:
            return f"text of about {self.num_different:.0f} different requests of at least {needed:.0f}"
        kinds, needed = self._token_kinds(), min(1.5 * layer.shape.num_experts, _MIN_TOKEN_KINDS)
        if kinds is not None and kinds < needed:
            return f"text of about {kinds:.0f} kinds of tokens of at least {needed:.0f}"
        if math.isnan(metrics.effective_experts_interval.upper):
            return "tokens per request too uneven, or rows without requests"
        return ""

    def _token_kinds(self) -> float | None:
        """Effective number of kinds of tokens (exp of the entropy of token classes), None where not captured."""
        classes = self.state.token_classes
        return effective_experts(classes) if classes.any() else None


def num_different_requests(state: RoutingState) -> float | None:
    """Return how many requests' worth of different text the rows hold, None where that cannot be told.

    Repeated text repeats its fingerprints; the number of different ones over the mean length of a request is how many
    different requests there really were. Repetition is a property of the text, so the layer that tells most tokens
    apart answers for all: a collapsed router may tell few apart.
    """
    answers = []
    for layer in state.layers.values():
        if layer.num_fingerprints:
            length = max(layer.num_fingerprints / max(state.num_requests, 1), 1.0)
            answers.append(layer.num_distinct_fingerprints / length)
    return max(answers, default=None)


def all_findings(look: Look) -> list[Finding]:
    """Return what the rules find, most severe first, then by layer and expert."""
    found = [*_capture_unhealthy(look)]
    collapsed: set[int] = set()
    for index, layer in look.state.layers.items():
        metrics = look.metrics[index]
        for finding in _collapse(look, layer, metrics):
            found.append(finding)
            # The effects of a collapse are not findings of their own.
            if finding.kind is FindingKind.ROUTER_COLLAPSE:
                collapsed.add(index)
    open_layers = [index for index in look.state.layers if index not in collapsed]
    for index in open_layers:
        layer, metrics = look.state.layers[index], look.metrics[index]
        found += _load_imbalance(look, layer, metrics)
        found += _dead(look, layer, metrics)
    dead = {(f.layer_index, f.expert_id) for f in found if f.kind is FindingKind.DEAD_EXPERT}
    found += _hot_and_cold(look, open_layers, dead)
    found = [f for f in found if not _is_explained_by_hot_experts(look, f, found)]
    for index, layer in look.state.layers.items():
        found += _low_confidence(look, layer, look.metrics[index])
        found += _capacity(look, layer, look.metrics[index])
    return sorted(found, key=lambda f: (-f.severity.rank, f.layer_index or 0, f.expert_id or 0, f.kind))


def _number(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


def _collapse(look: Look, layer: LayerState, metrics: LayerMetrics) -> Iterator[Finding]:
    limits, shape = look.thresholds, layer.shape
    if shape.top_k >= shape.num_experts or not layer.num_assignments:
        return
    before = look.baseline.get(shape.layer_index)
    baseline = before.effective_experts if before and before.num_tokens >= limits.min_tokens else None
    if baseline is not None:
        limit = limits.collapse_baseline_ratio * baseline
    else:
        # With few experts 1.5 k can reach E, where even perfect balance would lie below it.
        limit = min(
            max(limits.collapse_top_k_factor * shape.top_k, limits.collapse_share * shape.num_experts),
            0.75 * shape.num_experts,
        )
    interval = metrics.effective_experts_interval
    missing = look.shortage(layer, metrics)
    evidence = (
        EvidenceRow(
            "effective_experts", metrics.effective_experts, f"< {_number(limit)}", baseline, layer.num_tokens, "experts"
        ),
        EvidenceRow(
            "effective_experts_upper", interval.upper, f"< {_number(limit)}", None, metrics.num_blocks, "experts"
        ),
        EvidenceRow("num_requests", look.state.num_requests, f">= {limits.min_requests}", unit="requests"),
        EvidenceRow("max_over_mean", metrics.max_over_mean, sample_size=layer.num_tokens),
        EvidenceRow("design_effect", metrics.design_effect, sample_size=metrics.num_blocks),
    )
    args = {
        "layer": str(shape.layer_index),
        "effective": _number(metrics.effective_experts),
        "experts": str(shape.num_experts),
        "limit": _number(limit),
        "upper": _number(interval.upper),
        "topK": str(shape.top_k),
        "requests": str(look.state.num_requests),
        "hottest": str(metrics.hottest_expert),
        "baseline": "" if baseline is None else _number(baseline),
    }
    if not missing and interval.upper < limit:
        code = "router_collapse" if baseline is None else "router_collapse_from_baseline"
        yield Finding(
            FindingKind.ROUTER_COLLAPSE,
            Severity.CRITICAL,
            code,
            shape.layer_index,
            since_step=layer.first_step,
            args=args,
            evidence=evidence,
            statistic=interval.upper,
        )
    elif missing and metrics.effective_experts < limit and layer.num_assignments >= 10 * limit:
        yield Finding(
            FindingKind.LOAD_IMBALANCE,
            Severity.INFO,
            "insufficient_evidence",
            shape.layer_index,
            since_step=layer.first_step,
            args={**args, "missing": missing},
            evidence=evidence,
            statistic=metrics.effective_experts,
        )


def _load_imbalance(look: Look, layer: LayerState, metrics: LayerMetrics) -> Iterator[Finding]:
    shape = layer.shape
    limit = look.thresholds.load_balance * shape.num_experts
    upper = metrics.effective_experts_interval.upper
    # A token that uses all experts of a small layer cannot be skewed below k effective experts.
    if look.shortage(layer, metrics) or not upper < limit or shape.top_k >= limit:
        return
    before = look.baseline.get(shape.layer_index)
    is_new = before is not None and metrics.effective_experts < _UNCHANGED * before.effective_experts
    is_warning = is_new or (before is None and look.is_representative)
    yield Finding(
        FindingKind.LOAD_IMBALANCE,
        Severity.WARNING if is_warning else Severity.INFO,
        "load_imbalance" if is_warning else "load_imbalance_one_workload",
        shape.layer_index,
        since_step=layer.first_step,
        args={
            "layer": str(shape.layer_index),
            "effective": _number(metrics.effective_experts),
            "experts": str(shape.num_experts),
            "limit": _number(limit),
            "hottest": str(metrics.hottest_expert),
            "ratio": _number(metrics.max_over_mean),
        },
        evidence=(
            EvidenceRow(
                "effective_experts",
                metrics.effective_experts,
                f"< {_number(limit)}",
                before.effective_experts if before else None,
                layer.num_tokens,
                "experts",
            ),
            EvidenceRow("effective_experts_upper", upper, f"< {_number(limit)}", None, metrics.num_blocks, "experts"),
            EvidenceRow("max_over_mean", metrics.max_over_mean, sample_size=layer.num_tokens),
            EvidenceRow("design_effect", metrics.design_effect, sample_size=metrics.num_blocks),
        ),
        statistic=upper,
    )


def _is_explained_by_hot_experts(look: Look, finding: Finding, found: list[Finding]) -> bool:
    """Whether a layer's skew is gone without its hot experts, which are findings already."""
    index = finding.layer_index
    if finding.kind is not FindingKind.LOAD_IMBALANCE or index is None:
        return False
    is_hot = np.zeros(look.state.layers[index].shape.num_experts, np.bool_)
    for other in found:
        if other.kind is FindingKind.HOT_EXPERT and other.layer_index == index and other.expert_id is not None:
            is_hot[other.expert_id] = True
    rest = look.state.layers[index].counts[~is_hot]
    return bool(is_hot.any()) and effective_experts(rest) >= look.thresholds.load_balance * rest.size


def _dead(look: Look, layer: LayerState, metrics: LayerMetrics) -> Iterator[Finding]:
    shape, limits = layer.shape, look.thresholds
    if look.shortage(layer, metrics) or math.isnan(metrics.effective_tokens):
        return
    num_tests = sum(shape.num_experts for shape in look.state.shapes)
    # With no hit in n independent tokens the share is below this at the level, over all experts at once.
    bound = 1 - (_DEAD_LEVEL / num_tests) ** (1 / metrics.effective_tokens)
    limit = limits.dead_expert * shape.top_k / shape.num_experts
    if bound >= limit:
        return
    for expert in np.flatnonzero(layer.counts == 0).tolist():
        before = look.baseline.get(shape.layer_index)
        was_used = before is not None and before.share[expert] * shape.num_experts > limits.cold_expert
        is_warning = was_used or (before is None and look.is_representative)
        yield Finding(
            FindingKind.DEAD_EXPERT,
            Severity.WARNING if is_warning else Severity.INFO,
            "dead_expert",
            shape.layer_index,
            expert,
            layer.first_step,
            {
                "layer": str(shape.layer_index),
                "expert": str(expert),
                "tokens": str(layer.num_tokens),
                "effectiveTokens": _number(metrics.effective_tokens),
                "requests": str(look.state.num_requests),
            },
            (
                EvidenceRow("num_assignments", 0, "= 0", None, layer.num_tokens, "assignments"),
                EvidenceRow("share_upper", bound, f"< {limit:.3g}", None, int(metrics.effective_tokens), "per token"),
                EvidenceRow("design_effect", metrics.design_effect, sample_size=metrics.num_blocks),
            ),
            bound,
        )


def _hot_and_cold(look: Look, layers: list[int], dead: set[tuple[int | None, int | None]]) -> Iterator[Finding]:
    limits = look.thresholds
    tested = []
    for index in layers:
        layer = look.state.layers[index]
        if look.shortage(layer, look.metrics[index]):
            continue
        tests = share_tests(layer, hot=limits.hot_expert, cold=limits.cold_expert)
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
    floor = look.thresholds.hot_expert if is_hot else look.thresholds.cold_expert
    ratio = metrics.share[expert] * metrics.num_experts
    baseline = before.share[expert] * before.num_experts if before else None
    is_new = baseline is not None and (baseline < floor if is_hot else baseline > floor)
    is_warning = is_new or (baseline is None and look.is_representative)
    rule = f"{'>' if is_hot else '<'} {_number(floor)}"
    return Finding(
        kind,
        Severity.WARNING if is_warning else Severity.INFO,
        kind.value,
        index,
        expert,
        layer.first_step,
        {
            "layer": str(index),
            "expert": str(expert),
            "ratio": _number(ratio),
            "floor": _number(floor),
            "percent": _number(100 * metrics.share[expert]),
            "requests": str(look.state.num_requests),
        },
        (
            EvidenceRow("load_ratio", ratio, rule, baseline, layer.num_tokens, "x fair share"),
            EvidenceRow("p_value", p_value, "Benjamini-Hochberg", None, metrics.num_blocks),
            EvidenceRow("design_effect", metrics.design_effect, sample_size=metrics.num_blocks),
            EvidenceRow("effective_tokens", metrics.effective_tokens, unit="tokens"),
        ),
        ratio,
    )


def _low_confidence(look: Look, layer: LayerState, metrics: LayerMetrics) -> Iterator[Finding]:
    # The router's probabilities are over identity experts, too.
    limits, experts = look.thresholds, layer.shape.num_ids
    if experts < 2 or metrics.num_token_entropy < limits.min_tokens or look.shortage(layer, metrics):
        return
    confidence = 1 - metrics.mean_token_entropy / math.log(experts)
    if confidence >= limits.routing_confidence:
        return
    yield Finding(
        FindingKind.LOW_CONFIDENCE,
        # Every router begins undecided, and unfamiliar text leaves a good one undecided.
        Severity.WARNING if look.num_workloads >= 2 and not look.is_training else Severity.INFO,
        "low_confidence",
        layer.shape.layer_index,
        since_step=layer.first_step,
        args={
            "layer": str(layer.shape.layer_index),
            "confidence": _number(100 * confidence),
            "limit": _number(100 * limits.routing_confidence),
        },
        evidence=(
            EvidenceRow(
                "routing_confidence",
                confidence,
                f"< {_number(limits.routing_confidence)}",
                None,
                metrics.num_token_entropy,
            ),
            EvidenceRow(
                "mean_token_entropy", metrics.mean_token_entropy, sample_size=metrics.num_token_entropy, unit="nats"
            ),
        ),
        statistic=confidence,
    )


def _capacity(look: Look, layer: LayerState, metrics: LayerMetrics) -> Iterator[Finding]:
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
            "percent": _number(100 * metrics.dropped_share),
            "dropped": str(layer.num_dropped_slots),
            "limit": _number(100 * limit),
        },
        evidence=(
            EvidenceRow(
                "dropped_share",
                metrics.dropped_share,
                f"> {_number(limit)}",
                None,
                layer.num_tokens * layer.shape.top_k,
                "of slots",
            ),
        ),
        statistic=metrics.dropped_share,
    )


def _capture_unhealthy(look: Look) -> Iterator[Finding]:
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
