"""Why a finding, and what to do: onset, ranked causes (associations), what was not observed, concrete changes."""

from moe_debugger.analysis.explanation.change_points import Change, find_change
from moe_debugger.analysis.explanation.context import PlacementOptions, WorkloadMix
from moe_debugger.analysis.explanation.explain import explain
from moe_debugger.analysis.explanation.history import LayerHistory, histories_from_decisions, histories_from_state
from moe_debugger.analysis.explanation.model import Cause, Explanation, Missing, Onset, Remedy, RowsLink
from moe_debugger.analysis.explanation.settings import ObservedSettings, Setting
from moe_debugger.analysis.explanation.texts import explanation_text
from moe_debugger.analysis.explanation.whole import explain_analysis, explain_recording
from moe_debugger.analysis.explanation.wire import explanation_from_proto, explanation_to_proto

__all__ = [
    "Cause",
    "Change",
    "Explanation",
    "LayerHistory",
    "Missing",
    "ObservedSettings",
    "Onset",
    "PlacementOptions",
    "Remedy",
    "RowsLink",
    "Setting",
    "WorkloadMix",
    "explain",
    "explain_analysis",
    "explain_recording",
    "explanation_from_proto",
    "explanation_text",
    "explanation_to_proto",
    "find_change",
    "histories_from_decisions",
    "histories_from_state",
]
