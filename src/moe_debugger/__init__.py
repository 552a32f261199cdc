"""The explainable Mixture-of-Experts debugger.

    from moe_debugger import MoEDebugger

    with MoEDebugger(model) as debugger:
        model.generate(**inputs)
        print(debugger.get_routing_stats())

Names are imported when they are first used: ``import moe_debugger`` needs no torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_debugger._debugger import MoEDebugger
    from moe_debugger._decisions import Decisions
    from moe_debugger._expert_similarity import expert_similarity
    from moe_debugger._layers import Layers
    from moe_debugger._rank_load import RankLoad
    from moe_debugger._rows import RowStatistics
    from moe_debugger._session import Profile, Session
    from moe_debugger._stats import ExpertMetrics, LayerRoutingStats, PerformanceMetrics, RoutingStats
    from moe_debugger.adapter_check import AdapterCheck, LayerCheck, check_adapter
    from moe_debugger.analysis import Analysis, Finding, Thresholds, analyze
    from moe_debugger.analysis.explanation import Explanation, explain, explain_recording
    from moe_debugger.capture import (
        Adapter,
        Call,
        LayerInfo,
        LayerShape,
        Routing,
        detach,
        register_adapter,
        unregister_adapter,
    )
    from moe_debugger.capture_health import CaptureHealth, HealthCheck
    from moe_debugger.errors import (
        AlreadyAttachedError,
        ConfigError,
        DependencyMissingError,
        FleetError,
        InvalidInputError,
        ModelNotSupportedError,
        MoEDebuggerError,
        QueryCostError,
        QueryError,
        RecordingError,
        SessionClosedError,
        UnsupportedFormatError,
        WireFormatError,
    )
    from moe_debugger.models import LoadedModel, load_model
    from moe_debugger.parallel import ParallelCoordinates
    from moe_debugger.query import QueryResult
    from moe_debugger.recording import JoinedRecording, Recorder, Recording, join_recordings, open_recording
    from moe_debugger.reporting import Diff, Report, diff, report
    from moe_debugger.source import PublishedRoutes, Source, SourceAccount, open_source
    from moe_debugger.wire.ids import new_id

__all__ = [
    "Adapter",
    "AdapterCheck",
    "AlreadyAttachedError",
    "Analysis",
    "Call",
    "CaptureHealth",
    "ConfigError",
    "Decisions",
    "DependencyMissingError",
    "Diff",
    "ExpertMetrics",
    "Explanation",
    "Finding",
    "FleetError",
    "HealthCheck",
    "InvalidInputError",
    "JoinedRecording",
    "LayerCheck",
    "LayerInfo",
    "LayerRoutingStats",
    "LayerShape",
    "Layers",
    "LoadedModel",
    "MoEDebugger",
    "MoEDebuggerError",
    "ModelNotSupportedError",
    "ParallelCoordinates",
    "PerformanceMetrics",
    "Profile",
    "PublishedRoutes",
    "QueryCostError",
    "QueryError",
    "QueryResult",
    "RankLoad",
    "Recorder",
    "Recording",
    "RecordingError",
    "Report",
    "Routing",
    "RoutingStats",
    "RowStatistics",
    "Session",
    "SessionClosedError",
    "Source",
    "SourceAccount",
    "Thresholds",
    "UnsupportedFormatError",
    "WireFormatError",
    "analyze",
    "check_adapter",
    "detach",
    "diff",
    "expert_similarity",
    "explain",
    "explain_recording",
    "join_recordings",
    "load_model",
    "new_id",
    "open_recording",
    "open_source",
    "register_adapter",
    "report",
    "unregister_adapter",
]

_MODULES = {
    "moe_debugger._debugger": ("MoEDebugger",),
    "moe_debugger._decisions": ("Decisions",),
    "moe_debugger._expert_similarity": ("expert_similarity",),
    "moe_debugger._rank_load": ("RankLoad",),
    "moe_debugger._layers": ("Layers",),
    "moe_debugger._rows": ("RowStatistics",),
    "moe_debugger._session": ("Profile", "Session"),
    "moe_debugger._stats": ("ExpertMetrics", "LayerRoutingStats", "PerformanceMetrics", "RoutingStats"),
    "moe_debugger.adapter_check": ("AdapterCheck", "LayerCheck", "check_adapter"),
    "moe_debugger.analysis": ("Analysis", "Finding", "Thresholds", "analyze"),
    "moe_debugger.analysis.explanation": ("Explanation", "explain", "explain_recording"),
    "moe_debugger.capture": (
        "Adapter",
        "Call",
        "LayerInfo",
        "LayerShape",
        "Routing",
        "detach",
        "register_adapter",
        "unregister_adapter",
    ),
    "moe_debugger.capture_health": ("CaptureHealth", "HealthCheck"),
    "moe_debugger.errors": (
        "AlreadyAttachedError",
        "ConfigError",
        "DependencyMissingError",
        "FleetError",
        "InvalidInputError",
        "MoEDebuggerError",
        "QueryCostError",
        "QueryError",
        "RecordingError",
        "ModelNotSupportedError",
        "SessionClosedError",
        "UnsupportedFormatError",
        "WireFormatError",
    ),
    "moe_debugger.models": ("LoadedModel", "load_model"),
    "moe_debugger.parallel": ("ParallelCoordinates",),
    "moe_debugger.query": ("QueryResult",),
    "moe_debugger.recording": ("JoinedRecording", "Recorder", "Recording", "join_recordings", "open_recording"),
    "moe_debugger.reporting": ("Diff", "Report", "diff", "report"),
    "moe_debugger.source": ("PublishedRoutes", "Source", "SourceAccount", "open_source"),
    "moe_debugger.wire.ids": ("new_id",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'moe_debugger' has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
