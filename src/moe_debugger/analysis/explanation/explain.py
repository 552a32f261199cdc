"""`explain`: from a finding and what was observed to an explanation.

Weights. Each rule gives a score s in nats. Its odds against "none of them" are ``exp(min(s, ln 20)) - 1``; weight =
odds / (1 + sum of all odds), and `unexplained` has the rest. Scores of 0 get nothing, one cause alone at most 19/20,
two equally strong ones just under a half each. Ranking is by score, which is not capped.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_debugger.analysis.explanation.association import CAP
from moe_debugger.analysis.explanation.balancing_rules import balancing_causes
from moe_debugger.analysis.explanation.context import Context, PlacementOptions, WorkloadMix
from moe_debugger.analysis.explanation.data_rules import data_causes
from moe_debugger.analysis.explanation.history import LayerHistory
from moe_debugger.analysis.explanation.model import Cause, Explanation, RowsLink
from moe_debugger.analysis.explanation.onset import course_of
from moe_debugger.analysis.explanation.placement_rules import placement_causes
from moe_debugger.analysis.explanation.remedies import missing_of, remedies_of
from moe_debugger.analysis.explanation.settings import ObservedSettings
from moe_debugger.analysis.explanation.training_rules import training_causes
from moe_debugger.analysis.findings import Finding, FindingKind

__all__ = ["explain", "weighted"]

Floats = npt.NDArray[np.float64]

# Below this a cause says less than the dice.
_MIN_SCORE = 0.1
_NO_ROWS = (FindingKind.CAPTURE_UNHEALTHY, FindingKind.RANK_STRAGGLER)


def explain(
    finding: Finding,
    *,
    histories: Mapping[int, LayerHistory] | None = None,
    settings: ObservedSettings | None = None,
    is_training: bool = True,
    top_k: Mapping[int, int] | None = None,
    mix: WorkloadMix | None = None,
    rows: Mapping[str, Any] | None = None,
    step_loads: Mapping[int, Floats] | None = None,
    placement: PlacementOptions | None = None,
) -> Explanation:
    """Return where `finding` began, what goes with it and what to do; docs/explanations.md has every rule.

    Args:
        histories: loads over steps of every layer, `histories_from_state(state)`.
        settings: series of the training, `ObservedSettings.from_columns(session.series())`. A cause names nothing that
            is not in them.
        is_training: False = inference: no setting of a training is asked for.
        top_k: of each layer.
        mix: what the text of each step was made of; from `rows` where it is not given.
        rows: columns of `decisions()`, for dominating tokens and requests, and capacity.
        step_loads: [s, E] loads of single steps by layer, in order, for planning.
        placement: the ranks that the experts stand on.

    Raises:
        InvalidInputError: something given does not have the form that it says.
    """
    context = Context(
        finding=finding,
        histories=histories or {},
        course=course_of(finding, histories or {}),
        settings=settings or ObservedSettings(),
        is_training=is_training,
        top_k=top_k or {},
        mix=WorkloadMix.from_decisions(rows) if mix is None and rows is not None else mix,
        rows=rows,
        step_loads=step_loads or {},
        placement=placement,
    )
    found: list[Cause] = []
    if finding.kind is not FindingKind.CAPTURE_UNHEALTHY:
        for rules in (balancing_causes, training_causes, data_causes, placement_causes):
            found += rules(context)
    causes, unexplained = weighted(found)
    missing = missing_of(context)
    return Explanation(
        rule_id=finding.rule_id,
        started_at=context.course.first,
        spread=context.course.spread,
        causes=causes,
        unexplained=unexplained,
        missing=missing,
        remedies=tuple(remedies_of(context, causes, missing)),
        rows=_rows(finding, _rows_since(context)),
    )


def weighted(causes: list[Cause]) -> tuple[tuple[Cause, ...], float]:
    """Return the causes by score with their weights, and what is left for none of them; see the module's text."""
    ranked = sorted((one for one in causes if one.score >= _MIN_SCORE), key=lambda one: (-one.score, one.code))
    odds = [math.exp(min(one.score, CAP)) - 1 for one in ranked]
    whole = 1 + sum(odds)
    return tuple(replace(one, weight=part / whole) for one, part in zip(ranked, odds, strict=True)), 1 / whole


def _rows_since(context: Context) -> int | None:
    """Return the first step whose rows are behind the finding, None = all: it was so from the first step seen."""
    return context.finding.since_step if context.since is None and not context.course.spread else context.since


def _rows(finding: Finding, since: int | None) -> RowsLink | None:
    if finding.layer_index is None or finding.kind in _NO_ROWS:
        return None
    values = {"layer_index": finding.layer_index}
    text = f"tokens where layer = {finding.layer_index}"
    if finding.kind is FindingKind.DEAD_EXPERT:
        # It has no rows of its own.
        return RowsLink(f"experts where layer = {finding.layer_index} order by load asc", values)
    if finding.expert_id is not None:
        values["expert_id"] = finding.expert_id
        text += f" and expert = {finding.expert_id}"
    if since:
        values["first_step"] = since
        text += f" and step >= {since}"
    if finding.expert_id is None:
        place = f" and step >= {since}" if since else ""
        text = f"experts where layer = {finding.layer_index}{place} order by load desc"
    return RowsLink(text, values)
