"""Where the experts stand: the plan for the finding's layer, as a cause of waiting ranks and as a change to apply."""

import json
from collections.abc import Iterator

import numpy as np

from moe_debugger.analysis.explanation.association import CAP
from moe_debugger.analysis.explanation.context import Context, Floats, PlacementOptions, cause, number
from moe_debugger.analysis.explanation.model import Cause, Remedy
from moe_debugger.analysis.findings import EvidenceRow, FindingKind
from moe_debugger.errors import InvalidInputError
from moe_debugger.planning import Candidate, Placement, PlacementPlan, contiguous_placement, plan_placement

__all__ = ["PLACEMENT_KINDS", "placement_causes", "placement_remedies"]

PLACEMENT_KINDS = (FindingKind.LOAD_IMBALANCE, FindingKind.HOT_EXPERT, FindingKind.RANK_STRAGGLER)
# Of both plans together, as `plan_placement` takes it for one.
_CONFIDENCE = 0.975


def placement_causes(context: Context) -> Iterator[Cause]:
    """placement.gain: another placement is proved to shorten the steps, on steps that it was not fitted to."""
    if context.finding.kind is not FindingKind.RANK_STRAGGLER:
        return
    best = _best(_plans(context))
    if best is None:
        return
    gain = best.held_out.gain
    row = EvidenceRow(
        "rank_imbalance", best.held_out.current.imbalance, "max / mean over ranks", best.held_out.planned.imbalance,
        best.held_out.current.num_steps, "baseline = planned",
    )  # fmt: skip
    yield cause(
        "placement_uneven", "placement.gain", CAP, evidence=(row,), strategy=best.placement.strategy,
        gain=number(100 * gain.gain), lower=number(100 * gain.lower), upper=number(100 * gain.upper),
        layer=_layer_text(context),
    )  # fmt: skip


def placement_remedies(context: Context) -> Iterator[Remedy]:
    """Yield the placement to apply, or that none would help; nothing where loads or ranks are not known."""
    if context.finding.kind not in PLACEMENT_KINDS:
        return
    plans = _plans(context)
    if not plans:
        return
    best = _best(plans)
    code = "apply_placement" if best is not None else "keep_placement"
    shown = best or max(
        (candidate for plan in plans for candidate in plan.candidates), key=lambda one: _or_less(one.held_out.gain.gain)
    )
    gain = shown.held_out.gain
    is_known = bool(np.isfinite(gain.gain) and np.isfinite(gain.lower))
    yield Remedy(
        code,
        {
            "layer": _layer_text(context),
            "strategy": shown.placement.strategy,
            "ranks": str(shown.placement.num_ranks),
            "verdict": shown.verdict.value,
            "reason": shown.reason,
            "gain": number(100 * gain.gain),
            "lower": number(100 * gain.lower),
            "upper": number(100 * gain.upper),
            "moved": str(shown.migration.num_experts_moved),
            "steps": str(shown.held_out.current.num_steps),
        },
        change=_as_json(shown.placement, context.finding.layer_index) if best is not None else "",
        language="json" if best is not None else "",
        effect="step_bound" if is_known else "not_predicted",
        effect_value=gain.gain if is_known else None,
        effect_lower=gain.lower if is_known else None,
        effect_upper=gain.upper if is_known else None,
        cause="placement_uneven" if context.finding.kind is FindingKind.RANK_STRAGGLER else "",
    )


def _or_less(gain: float) -> float:
    return gain if np.isfinite(gain) else -np.inf


def _layer_text(context: Context) -> str:
    return "" if context.finding.layer_index is None else str(context.finding.layer_index)


def _as_json(placement: Placement, layer_index: int | None) -> str:
    values = placement.to_dict()
    return json.dumps(values if layer_index is None else {"layer_index": layer_index, **values})


def _best(plans: list[PlacementPlan]) -> Candidate | None:
    helping = [plan.recommended for plan in plans if plan.recommended is not None]
    return max(helping, key=lambda one: one.held_out.gain.lower, default=None)


def _plans(context: Context) -> list[PlacementPlan]:
    if "plans" not in context.cache:
        context.cache["plans"] = _make_plans(context)
    plans: list[PlacementPlan] = context.cache["plans"]
    return plans


def _make_plans(context: Context) -> list[PlacementPlan]:
    """Return a plan without spare slots, and one with a spare slot on each rank, as far as they apply."""
    options, index = context.placement, context.finding.layer_index
    if options is None or options.num_ranks < 2 or not context.step_loads:
        return []
    layers = [index] if index is not None and index in context.step_loads else sorted(context.step_loads)
    loads = [context.step_loads[layer] for layer in layers]
    if len({one.shape for one in loads}) != 1:
        return []
    counts: Floats = np.stack(loads, axis=1)
    experts = counts.shape[2]
    top_k = min(experts, context.top_k.get(layers[0], 1))
    plans = []
    for spare in (0, options.num_ranks - experts % options.num_ranks):
        if spare == 0 and experts % options.num_ranks:
            continue
        try:
            plans.append(
                plan_placement(
                    counts,
                    top_k=top_k,
                    num_ranks=options.num_ranks,
                    num_nodes=options.num_nodes,
                    num_redundant=spare,
                    current=_current(options, layers, experts),
                    other_workloads={
                        name: other[:, None] for name, other in options.other_workloads.items() if len(layers) == 1
                    },
                    confidence=_CONFIDENCE,
                )
            )
        except InvalidInputError:
            # Layer widths, nodes and slots that no placement fits: there is nothing to propose.
            continue
    return plans


def _current(options: PlacementOptions, layers: list[int], num_experts: int) -> Placement | None:
    """Return the placement that runs; None = as `plan_placement` assumes, contiguous."""
    rows = []
    for layer in layers:
        owners = np.asarray(options.owners.get(layer, ()), np.int64)
        if len(owners) != num_experts or num_experts % options.num_ranks:
            return None
        order = np.argsort(owners, kind="stable")
        if (np.bincount(owners, minlength=options.num_ranks) != num_experts // options.num_ranks).any():
            return None
        rows.append(order)
    table = np.stack(rows)
    plain = contiguous_placement(len(layers), num_experts, options.num_ranks, num_nodes=options.num_nodes)
    if (table == plain.physical_to_logical).all():
        return plain
    return Placement("current", num_experts, options.num_ranks, table, options.num_nodes)
