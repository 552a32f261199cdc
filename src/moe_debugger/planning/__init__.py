"""Load balance of expert-parallel ranks: how uneven it is, and what another placement of the experts would change.

    loads = loads_from_decisions(session.decisions(), num_experts=64, phase="decode")
    plan = plan_placement(loads, top_k=8, num_ranks=8, num_redundant=8)
    print(plan)  # also where the answer is: change nothing

docs/planning.md says how to read it, docs/metrics.md defines the numbers.
"""

from moe_debugger.planning.evaluation import GainInterval, Verdict, WindowResult, evaluate, gain_interval, judge
from moe_debugger.planning.loads import StepLoads, loads_from_decisions
from moe_debugger.planning.migration import Migration, align_placement, keep_layers_without_gain, migration
from moe_debugger.planning.packing import (
    copies_by_load,
    eplb_placement,
    greedy_placement,
    hierarchical_placement,
    pack_evenly,
)
from moe_debugger.planning.placement import Placement, contiguous_placement
from moe_debugger.planning.plan import Candidate, PlacementPlan, plan_placement
from moe_debugger.planning.rank_metrics import (
    RankMetrics,
    active_experts,
    critical_load,
    expected_active_experts,
    mean_load,
    rank_loads,
    rank_metrics,
)

__all__ = [
    "Candidate",
    "GainInterval",
    "Migration",
    "Placement",
    "PlacementPlan",
    "RankMetrics",
    "StepLoads",
    "Verdict",
    "WindowResult",
    "active_experts",
    "align_placement",
    "contiguous_placement",
    "copies_by_load",
    "critical_load",
    "eplb_placement",
    "evaluate",
    "expected_active_experts",
    "gain_interval",
    "greedy_placement",
    "hierarchical_placement",
    "judge",
    "keep_layers_without_gain",
    "loads_from_decisions",
    "mean_load",
    "migration",
    "pack_evenly",
    "plan_placement",
    "rank_loads",
    "rank_metrics",
]
