"""The audit: 0 to 100 for each category, from numbers with enough behind them, or the reason why there is no score.

A category has the score of its lowest layer: layers are never averaged, because four opposite collapses average to
"even". The anchors are those of the rules: a score is below 75 exactly where a rule's line is crossed, so that score
and findings cannot contradict each other. docs/report.md has all formulas.

Example: E = 8, k = 2 and 5.6 effective experts (0.7 E, where skew begins) is 75; 3 (where a router has collapsed) is
25; 4.3, halfway between, is 50.
"""

from collections.abc import Callable, Mapping, Sequence

from moe_debugger.analysis import Finding, Severity
from moe_debugger.planning import StepLoads
from moe_debugger.reporting.content import Category, EvidenceLine, Text, say
from moe_debugger.reporting.load_scores import expert_use, load_balance, stability
from moe_debugger.reporting.material import Material
from moe_debugger.reporting.quality_scores import capacity, capture_quality, rank_balance, router_confidence
from moe_debugger.reporting.scoring import CAP_CRITICAL, CAP_WARNING, Scored

__all__ = ["WEIGHTS", "audit", "overall_score"]

# Least weight of the categories that have a score, of the 13 there are, for an overall one.
_MIN_WEIGHT = 5

WEIGHTS = {
    "load_balance": 3,
    "expert_use": 2,
    "router_confidence": 1,
    "capacity": 1,
    "rank_balance": 2,
    "capture_quality": 2,
    "stability": 2,
}


def overall_score(categories: Sequence[Category], findings: Sequence[Finding]) -> tuple[float | None, Text]:
    """Return the weighted mean of the categories that have a score, and what bounds it."""
    scored = [(category.weight, category.score) for category in categories if category.score is not None]
    weight = sum(each for each, _ in scored)
    if weight < _MIN_WEIGHT:
        names = ", ".join(category.title.text for category in categories if category.score is not None)
        return None, say("overall.too_little", scored=names or "none")
    mean = sum(each * score for each, score in scored) / weight
    worst = max((finding.severity for finding in findings), key=lambda severity: severity.rank, default=None)
    cap = {Severity.CRITICAL: CAP_CRITICAL, Severity.WARNING: CAP_WARNING}.get(worst or Severity.INFO, 100.0)
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
    parts: dict[str, Callable[[], Scored]] = {
        "load_balance": lambda: load_balance(material),
        "expert_use": lambda: expert_use(material),
        "router_confidence": lambda: router_confidence(material),
        "capacity": lambda: capacity(material),
        "rank_balance": lambda: rank_balance(material, num_ranks, loads_of),
        "capture_quality": lambda: capture_quality(material),
        "stability": lambda: stability(material),
    }
    return [_category(key, *parts[key]()) for key in WEIGHTS]


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
        weight=WEIGHTS[key],
        layer_index=None if worst is None or worst < 0 else worst,
        layer_scores=layer_scores if worst is None or worst >= 0 else {},
        evidence=lines,
    )
