"""Metrics, findings and the foldable state behind them: the same in a notebook, an analyzer and a replay."""

from moe_debugger.analysis.analyze import Analysis, analyze, finish, fold_decisions
from moe_debugger.analysis.findings import (
    EvidenceRow,
    Finding,
    FindingKind,
    Severity,
    Thresholds,
    finding_from_proto,
    finding_to_proto,
    findings_to_proto,
)
from moe_debugger.analysis.metrics import LayerMetrics, layer_metrics
from moe_debugger.analysis.rules import CaptureHealth
from moe_debugger.analysis.state import LayerShape, LayerState, RoutingState, merge_all

__all__ = [
    "Analysis",
    "CaptureHealth",
    "EvidenceRow",
    "Finding",
    "FindingKind",
    "LayerMetrics",
    "LayerShape",
    "LayerState",
    "RoutingState",
    "Severity",
    "Thresholds",
    "analyze",
    "finding_from_proto",
    "finding_to_proto",
    "findings_to_proto",
    "finish",
    "fold_decisions",
    "layer_metrics",
    "merge_all",
]
