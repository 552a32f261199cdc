"""What all scores have in common: lines through points, the evidence that a number takes, and bounds by findings."""

import math
from collections.abc import Sequence
from itertools import pairwise

from moe_debugger.analysis import LayerMetrics
from moe_debugger.reporting.content import EvidenceLine, Text, say
from moe_debugger.reporting.material import Material

__all__ = ["CAP_CRITICAL", "CAP_WARNING", "Points", "Scored", "before_of", "interpolate", "shortage"]

# A warning keeps a score below "good", a critical finding below "fair".
CAP_WARNING, CAP_CRITICAL = 74.0, 49.0

Points = Sequence[tuple[float, float]]
# Scores by layer (-1 = over all layers), why there are none, and the evidence.
Scored = tuple[dict[int, float | None], Text | None, list[EvidenceLine]]


def interpolate(value: float, points: Points) -> float:
    """Return the height at `value` of the line through `points` (ascending), level outside of them."""
    if value <= points[0][0]:
        return points[0][1]
    for (x0, y0), (x1, y1) in pairwise(points):
        if value < x1:
            return y0 + (y1 - y0) * (value - x0) / (x1 - x0)
    return points[-1][1]


def shortage(material: Material, metrics: LayerMetrics) -> Text | None:
    """Return what is missing for a score of a layer's load, by the limits of the rules."""
    limits = material.thresholds
    if material.is_empty:
        return say("shortage.empty")
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


def before_of(material: Material, index: int) -> LayerMetrics | None:
    """Return the baseline's metrics of a layer, None without one."""
    return None if material.baseline is None else material.baseline.metrics.get(index)
