"""The rules that turn metrics into findings.

What a rule may claim depends on what the rows can show:

* Routers specialise, so on one kind of text a healthy layer uses few experts. Skew is therefore at most `warning`, and
  worded as skew: a matter of placement, not a fault of the router.
* Collapse is stricter than skew (barely more experts than one token uses, over much different text), so it is
  `critical` on one workload too, but only on evidence of diversity.
* Where there are fewer than 20 different requests, variances come from stretches of positions. They say nothing of what
  requests have in common, so load findings from them are `info`.
"""

from moe_debugger.analysis.early_warning import WarningReport, warning_findings
from moe_debugger.analysis.findings import Finding, FindingKind
from moe_debugger.analysis.rules.change import drift
from moe_debugger.analysis.rules.load import (
    collapse,
    dead_experts,
    hot_and_cold_experts,
    is_explained_by_hot_experts,
    load_imbalance,
)
from moe_debugger.analysis.rules.look import Look, look_at, num_different_requests
from moe_debugger.analysis.rules.pairs import duplicate_experts
from moe_debugger.analysis.rules.quality import capacity_overflow, capture_unhealthy, low_confidence
from moe_debugger.analysis.rules.ranks import rank_stragglers
from moe_debugger.analysis.rules.steps import collapse_over_steps, step_imbalance, watch_steps
from moe_debugger.capture_health import CaptureHealth

__all__ = ["CaptureHealth", "Look", "all_findings", "look_at", "num_different_requests", "watch_steps"]


def all_findings(look: Look, warnings: WarningReport | None = None) -> list[Finding]:
    """Return what the rules find, most severe first, then by layer and expert.

    Args:
        warnings: what `watch_steps` gave.
    """
    found = [*capture_unhealthy(look)]
    collapsed: set[int] = set()
    for index in look.state.layers:
        for finding in collapse(look, index) or collapse_over_steps(look, index):
            found.append(finding)
            # The effects of a collapse are not findings of their own.
            if finding.kind is FindingKind.ROUTER_COLLAPSE:
                collapsed.add(index)
    if warnings is not None:
        found += warning_findings(warnings)
    open_layers = [index for index in look.state.layers if index not in collapsed]
    for index in open_layers:
        found += load_imbalance(look, index) or step_imbalance(look, index)
        found += dead_experts(look, index)
    dead = {(f.layer_index, f.expert_id) for f in found if f.kind is FindingKind.DEAD_EXPERT}
    found += hot_and_cold_experts(look, open_layers, dead)
    found = [f for f in found if not is_explained_by_hot_experts(look, f, found)]
    found += rank_stragglers(look, open_layers)
    for index in open_layers:
        found += drift(look, index)
        found += duplicate_experts(look, index)
    for index in look.state.layers:
        found += low_confidence(look, index)
        found += capacity_overflow(look, index)
    return sorted(found, key=lambda f: (-f.severity.rank, f.layer_index or 0, f.expert_id or 0, f.kind))
