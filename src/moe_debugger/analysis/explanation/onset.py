"""Where a finding began and how it spread: change points of the layers' loads, and when they crossed its rule."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moe_debugger.analysis.explanation.change_points import Change, find_change
from moe_debugger.analysis.explanation.history import COLLAPSES, LayerHistory, Limit, is_of_single_steps
from moe_debugger.analysis.explanation.model import Onset
from moe_debugger.analysis.findings import Finding, FindingKind

__all__ = ["Course", "course_of"]

Floats = npt.NDArray[np.float64]

_NAN = float("nan")
_RISES = (FindingKind.HOT_EXPERT, FindingKind.CAPACITY_OVERFLOW, FindingKind.RANK_STRAGGLER)
_SHARES = (FindingKind.HOT_EXPERT, FindingKind.COLD_EXPERT, FindingKind.DEAD_EXPERT)
# Kinds whose rule is not one of loads over steps.
_WITHOUT = (FindingKind.CAPTURE_UNHEALTHY, FindingKind.DUPLICATE_EXPERTS, FindingKind.LOW_CONFIDENCE)


@dataclass(frozen=True, slots=True)
class Course:
    """How a finding came about, as far as loads over steps tell.

    Attributes:
        own: onset in the finding's own layer; None = no change was found there.
        first: the earliest onset of all layers that changed or crossed; what causes must come before. None where a
            layer of the spread was beyond the limit from the first step seen, so that it began before.
        spread: (layer, first step at which it crossed the rule), in order.
        change: the best change of the finding's layer, significant or not; None = none could be fitted.
        num_buckets: buckets of the finding's layer.
    """

    own: Onset | None
    first: Onset | None
    spread: tuple[tuple[int, int], ...]
    change: Change | None
    num_buckets: int


def course_of(finding: Finding, histories: Mapping[int, LayerHistory]) -> Course:
    """Return how `finding` came about."""
    # A layer without a step that holds enough tokens tells nothing.
    histories = {index: history for index, history in histories.items() if len(history.steps)}
    if finding.kind in _WITHOUT or not histories:
        return Course(None, None, (), None, 0)
    own_index = finding.layer_index
    own = histories.get(own_index) if own_index is not None else None
    reference = own or next(iter(histories.values()))
    limit = Limit.of(finding, reference.num_experts)
    # Of each layer that crossed: the bucket since which it was within the limit, and that of the crossing.
    places: dict[int, tuple[int, int]] = {}
    if limit is not None:
        for index, history in histories.items():
            place = limit.last_crossing(history, is_own_layer=index == own_index)
            # Experts of other layers that were always beyond it have nothing to do with this one.
            is_other_expert = limit.expert_id is not None and index != own_index
            if place is not None and (place[1] or not is_other_expert):
                places[index] = place
    crossings = {index: int(histories[index].steps[bucket]) for index, (_, bucket) in places.items()}
    looked_at = {*crossings, *([own_index] if own is not None and own_index is not None else [])}
    if limit is None and finding.kind in COLLAPSES:
        # A warning has no limit to cross: layers that fell significantly take its place.
        looked_at = set(histories)
    changes = {
        index: _change(finding, histories[index], places.get(index, (0, 0))[0], is_own_layer=index == own_index)
        for index in sorted(looked_at)
    }
    onsets = {}
    for index, (change, start) in changes.items():
        onset = _onset(finding, histories[index], change, start, places.get(index))
        if onset is not None:
            onsets[index] = onset
    if limit is None and finding.kind in COLLAPSES:
        crossings = {index: onset.step for index, onset in onsets.items()}
    first = min(onsets.values(), key=lambda one: (one.step, one.layer_index), default=None)
    if first is not None and any(
        bucket == 0 and crossings[index] <= first.step for index, (_, bucket) in places.items()
    ):
        first = None
    return Course(
        own=onsets.get(own_index) if own_index is not None else None,
        first=first,
        spread=tuple(sorted(crossings.items(), key=lambda item: (item[1], item[0]))),
        change=changes[own_index][0] if own_index is not None and own_index in changes else None,
        num_buckets=len(reference.steps) if own is not None else 0,
    )


def _signal(finding: Finding, history: LayerHistory, *, is_own_layer: bool) -> tuple[str, Floats, int]:
    """Return metric, values per bucket and the direction in which the fault shows."""
    if finding.kind in _SHARES:
        ratios, expert = history.load_ratio, finding.expert_id
        is_hot = finding.kind is FindingKind.HOT_EXPERT
        if is_own_layer and expert is not None and expert < history.num_experts:
            return "load_ratio", ratios[:, expert], 1 if is_hot else -1
        return ("load_ratio", ratios.max(axis=1), 1) if is_hot else ("load_ratio", ratios.min(axis=1), -1)
    if finding.kind in _RISES:
        return "max_over_mean", history.load_ratio.max(axis=1), 1
    if is_of_single_steps(finding):
        return "max_over_mean", history.load_ratio.max(axis=1), 1
    # Logarithm: halving counts the same from 60 to 30 as from 6 to 3.
    return "effective_experts", np.log(history.effective_experts), -1


def _change(finding: Finding, history: LayerHistory, since: int, *, is_own_layer: bool) -> tuple[Change | None, int]:
    """Return the best change of a layer's signal from bucket `since` on, and the first bucket that was looked at."""
    metric, values, direction = _signal(finding, history, is_own_layer=is_own_layer)
    if metric == "effective_experts" and since <= history.fall[1]:
        return history.fall
    return find_change(values[since:], direction=direction), since


def _onset(
    finding: Finding, history: LayerHistory, change: Change | None, start: int, place: tuple[int, int] | None
) -> Onset | None:
    if place is not None and place[1] == 0:
        # Beyond the limit from the first bucket on: it began before anything was seen.
        return None
    metric, _, _ = _signal(finding, history, is_own_layer=history.layer_index == finding.layer_index)
    # A layer that had crossed before it changed further began with the crossing.
    if change is not None and change.is_significant and (place is None or start + change.first_onset <= place[1]):
        back = math.exp if metric == "effective_experts" else float
        onset = start + change.onset if place is None else min(start + change.onset, place[1])
        return Onset(
            layer_index=history.layer_index,
            step=int(history.steps[onset]),
            first_step=int(history.steps[start + change.first_onset]),
            last_step=history.bucket_end(start + change.last_onset),
            metric=metric,
            before=back(change.before),
            after=back(change.after),
            score=change.log_likelihood_ratio - change.penalty,
            rule="change_point",
        )
    if place is None:
        return None
    # It began somewhere before it crossed.
    since, crossed_at = (int(history.steps[bucket]) for bucket in place)
    return Onset(history.layer_index, crossed_at, since, crossed_at, metric, _NAN, _NAN, 0.0, "first_crossing")
