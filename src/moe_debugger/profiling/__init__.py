"""Where the time of a model's MoE layers goes: router, dispatch, experts, combine and wait, by layer and expert.

    with MoEDebugger(model, profiling=True) as debugger:
        model.generate(**inputs)
        print(debugger.layer_profile())

Off by default. docs/profiling.md says what is measured, what is estimated, and what it costs.

Reading order: `places` and `placing` (what is timed), `hooks` and `profiler` (how), `spans` (from marks to times), then
`cost_model`, `roofline`, `bottlenecks` (what they say), `report` (what comes back).
"""

from .bottlenecks import BottleneckKind, ProfileBottleneck, ProfileRules, find_bottlenecks, imbalance_cost, lower_median
from .cost_model import CostModel, MergedCost, SizeError, estimate_experts, fit_cost_model
from .layers import ExpertTime, LayerTimes, PartTime
from .peak import measure_peak
from .profiler import LayerProfiler, refuse_compiled
from .report import LayerProfile, ProfileOverhead
from .roofline import Peak, Roofline, RooflinePoints, roofline_of
from .table import ProfileTable

__all__ = [
    "BottleneckKind",
    "CostModel",
    "ExpertTime",
    "LayerProfile",
    "LayerProfiler",
    "LayerTimes",
    "MergedCost",
    "PartTime",
    "Peak",
    "ProfileBottleneck",
    "ProfileOverhead",
    "ProfileRules",
    "ProfileTable",
    "Roofline",
    "RooflinePoints",
    "SizeError",
    "estimate_experts",
    "find_bottlenecks",
    "fit_cost_model",
    "imbalance_cost",
    "lower_median",
    "measure_peak",
    "refuse_compiled",
    "roofline_of",
]
