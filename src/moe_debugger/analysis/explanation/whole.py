"""Explains all findings of an analysis at once, from a state and what else there is."""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from moe_debugger.analysis.explanation.context import PlacementOptions
from moe_debugger.analysis.explanation.explain import explain
from moe_debugger.analysis.explanation.history import (
    LayerHistory,
    histories_from_decisions,
    histories_from_state,
)
from moe_debugger.analysis.explanation.settings import ObservedSettings
from moe_debugger.analysis.state import RoutingState
from moe_debugger.v1 import routing_pb2 as pb

if TYPE_CHECKING:
    from moe_debugger.analysis.analyze import Analysis

__all__ = ["explain_analysis", "explain_recording"]

Floats = npt.NDArray[np.float64]

# The most severe come first; a page full of hot experts needs no plan for each of hundreds.
_MAX_FINDINGS = 64


class _Recording(Protocol):
    """What `explain_recording` reads of a recording."""

    def analyze(self) -> "Analysis": ...
    def state(self) -> RoutingState: ...
    def decisions(self) -> Mapping[str, Any]: ...
    def series(self) -> Mapping[str, Any]: ...
    def layers(self) -> Any: ...


def explain_analysis(
    analysis: "Analysis",
    *,
    state: RoutingState,
    settings: ObservedSettings | None = None,
    rows: Mapping[str, Any] | None = None,
    placement: PlacementOptions | None = None,
    is_training: bool | None = None,
    max_findings: int = _MAX_FINDINGS,
) -> "Analysis":
    """Return `analysis` with an explanation on each of its first `max_findings` findings.

    Args:
        state: where the loads over steps come from: the state that was analysed, or one of more steps.
        settings: series of the training.
        rows: columns of `decisions()`, where they are kept; loads over steps come from them where `state` has none.
        placement: ranks of the experts.
        is_training: None = where more than half of the tokens were training tokens.
    """
    histories = histories_from_state(state)
    if not histories and rows is not None:
        histories = _histories_from_rows(rows, [(one.layer_index, one.num_experts) for one in state.shapes])
    tokens = state.phase_tokens
    given: dict[str, Any] = {
        "histories": histories,
        "settings": settings,
        "is_training": 2 * int(tokens[pb.PHASE_TRAIN]) > int(tokens.sum()) if is_training is None else is_training,
        "top_k": {shape.layer_index: shape.top_k for shape in state.shapes},
        "rows": rows,
        "step_loads": _step_loads(state, rows),
        "placement": placement,
    }
    findings = [
        replace(finding, explanation=explain(finding, **given)) if place < max_findings else finding
        for place, finding in enumerate(analysis.findings)
    ]
    return replace(analysis, findings=tuple(findings))


def explain_recording(recording: _Recording, *, placement: PlacementOptions | None = None) -> "Analysis":
    """Return the analysis of a recording with an explanation on each finding.

    Args:
        recording: what `moe_debugger.open_recording` returns.
    """
    from moe_debugger.analysis.analyze import fold_decisions

    analysis, settings = recording.analyze(), ObservedSettings.from_columns(recording.series())
    rows = recording.decisions()
    if not len(rows["layer_index"]):
        return explain_analysis(analysis, state=recording.state(), settings=settings, placement=placement)
    infos = {info.layer_index: info for info in recording.layers()}
    indices = range(max(infos, default=-1) + 1)
    state = fold_decisions(
        rows,
        num_experts=[infos[i].num_experts if i in infos else 1 for i in indices],
        top_k=[max(1, infos[i].top_k) if i in infos else 1 for i in indices],
        num_identity_experts=[infos[i].num_identity_experts if i in infos else 0 for i in indices],
    )
    return explain_analysis(analysis, state=state, settings=settings, rows=rows, placement=placement)


def _histories_from_rows(rows: Mapping[str, Any], shapes: list[tuple[int, int]]) -> dict[int, LayerHistory]:
    for column in ("step", "forward_index"):
        if rows.get(column) is not None and len(np.unique(np.asarray(rows[column]))) > 1:
            return histories_from_decisions(rows, shapes, step_column=column)
    return {}


def _step_loads(state: RoutingState, rows: Mapping[str, Any] | None) -> dict[int, Floats]:
    """Return the loads of single steps of each layer, in order, from where most of them are.

    Rows have every forward; a history of buckets of one step has every step; else there is the sample that the state
    keeps, of which those count that all layers kept.
    """
    found = _sampled_steps(state)
    for index, layer in state.layers.items():
        series = layer.load_series
        has_more = series is not None and len(series.first_steps) > len(found.get(index, ()))
        if series is not None and series.width == 1 and series.has_one_clock and has_more:
            found[index] = series.counts.astype(np.float64)
    if rows is not None and rows.get("forward_index") is not None:
        shapes = [(one.layer_index, one.num_experts) for one in state.shapes]
        for index, history in histories_from_decisions(_main_phase(rows), shapes, step_column="forward_index").items():
            if len(history.raw_counts) > len(found.get(index, ())):
                found[index] = history.raw_counts
    return found


def _main_phase(rows: Mapping[str, Any]) -> dict[str, Any]:
    """Return the columns that loads need, of the phase with most forwards: prefill and decode are planned apart."""
    names = ("layer_index", "expert_ids", "forward_index", "is_padding", "slot_status")
    columns = {name: np.asarray(rows[name]) for name in names if rows.get(name) is not None}
    if rows.get("phase") is None:
        return columns
    phase = np.asarray(rows["phase"])
    forwards = {one: len(np.unique(columns["forward_index"][phase == one])) for one in np.unique(phase).tolist()}
    chosen = phase == max(forwards, key=forwards.__getitem__, default=0)
    return {name: column[chosen] for name, column in columns.items()}


def _sampled_steps(state: RoutingState) -> dict[int, Floats]:
    samples = {}
    for index, layer in state.layers.items():
        sample = layer.step_sample
        if sample is not None and len(sample.steps):
            samples[index] = sample
    if not samples:
        return {}
    common = set.intersection(*(set(sample.steps.tolist()) for sample in samples.values()))
    found: dict[int, Floats] = {}
    for index, sample in samples.items():
        kept = np.array([step in common for step in sample.steps.tolist()], np.bool_)
        order = np.argsort(sample.steps[kept], kind="stable")
        found[index] = sample.counts[kept][order].astype(np.float64)
    return found
