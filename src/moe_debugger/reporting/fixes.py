"""What to do, by predicted gain: placements tried on steps that they were not fitted to, then findings' remedies."""

from collections.abc import Mapping, Sequence

from moe_debugger.errors import InvalidInputError
from moe_debugger.messages import render
from moe_debugger.planning import Candidate, PlacementPlan, StepLoads, Verdict, plan_placement
from moe_debugger.reporting.content import FindingEntry, Fix, RemedyEntry, Text, known, say, show
from moe_debugger.reporting.material import Material

__all__ = ["fixes"]

_RANK = {"critical": 0, "warning": 1, "info": 2}


def fixes(
    material: Material,
    entries: Sequence[FindingEntry],
    *,
    num_ranks: int,
    num_redundant: int,
    loads_of: Mapping[int, StepLoads],
) -> list[Fix]:
    """Return what to do, highest predicted gain first, then by severity; what would not help comes last."""
    found = [*_placements(material, num_ranks, num_redundant, loads_of), *_remedies(entries)]
    return sorted(found, key=lambda fix: (not fix.is_worth_it, fix.gain is None, -(fix.gain or 0), _RANK[fix.severity]))


def _remedies(entries: Sequence[FindingEntry]) -> list[Fix]:
    """Return one fix for each change, or remedy in words where a finding was not explained, with all its places."""
    grouped: dict[tuple[str, str, str], list[tuple[FindingEntry, RemedyEntry | None]]] = {}
    for entry in entries:
        explained = entry.explanation.remedies if entry.explanation is not None else []
        for remedy in explained:
            # A placement is tried for each layer by itself.
            own = entry.rule_id if remedy.gain is not None else ""
            grouped.setdefault((remedy.text, remedy.change, own), []).append((entry, remedy))
        # A remedy of a plug-in knows more than those of its kind.
        if entry.remedy and (entry.plugin or not explained):
            grouped.setdefault((entry.remedy, "", ""), []).append((entry, None))
    return [_fix(text, members) for (text, _, _), members in grouped.items()]


def _fix(text: str, members: Sequence[tuple[FindingEntry, RemedyEntry | None]]) -> Fix:
    entries, remedy = [entry for entry, _ in members], members[0][1]
    kinds = dict.fromkeys(entry.kind.replace("_", " ") for entry in entries)
    places = dict.fromkeys(
        (f"layer {each.layer_index}" if each.layer_index is not None else "")
        + (f" expert {each.expert_id}" if each.expert_id is not None else "")
        for each in entries
    )
    predicted = remedy is not None and remedy.gain is not None
    return Fix(
        title=entries[0].title if len(entries) == 1 else f"{', '.join(kinds)} ({len(entries)})",
        detail=text,
        severity=min((each.severity for each in entries), key=_RANK.__getitem__),
        gain=remedy.gain if remedy is not None else None,
        gain_lower=remedy.gain_lower if remedy is not None else None,
        gain_upper=remedy.gain_upper if remedy is not None else None,
        gain_note=say("gain.effect", effect=remedy.effect)
        if remedy is not None and predicted
        else _not_predicted(remedy),
        places=[place for place in places if place],
        change=remedy.change or None if remedy is not None else None,
    )


def _not_predicted(remedy: RemedyEntry | None) -> Text:
    known_effect = "" if remedy is None or remedy.effect == render("effect.not_predicted", {}) else remedy.effect
    return say("gain.other_effect", effect=known_effect) if known_effect else say("gain.not_predicted")


def _placements(material: Material, num_ranks: int, num_redundant: int, loads_of: Mapping[int, StepLoads]) -> list[Fix]:
    if num_ranks < 2:
        return []
    result = []
    for experts, loads in loads_of.items():
        top_k = min(max(1, i.top_k) for i in material.layers.values() if i.num_experts == experts)
        try:
            plan = plan_placement(loads, top_k=top_k, num_ranks=num_ranks, num_redundant=num_redundant)
        except InvalidInputError as error:
            result.append(_untried(experts, num_ranks, str(error)))
            continue
        result += [_placement(plan, candidate, experts, num_ranks) for candidate in plan.candidates]
    return result


def _untried(experts: int, num_ranks: int, reason: str) -> Fix:
    return Fix(
        title=f"Placement of {experts} experts on {num_ranks} ranks",
        detail=reason,
        severity="info",
        gain_note=say("gain.not_tried"),
        is_worth_it=False,
        verdict="not tried",
    )


def _placement(plan: PlacementPlan, candidate: Candidate, experts: int, num_ranks: int) -> Fix:
    gain = candidate.held_out.gain
    helps = candidate.verdict is Verdict.HELPS
    is_chosen = helps and candidate is plan.recommended
    moved = candidate.migration.num_experts_moved
    return Fix(
        title=f"Placement {candidate.placement.strategy} of {experts} experts on {num_ranks} ranks",
        detail=f"{candidate.reason}; {show(moved)} experts would move",
        severity="warning" if is_chosen else "info",
        # A gain that was not shown is none to order by.
        gain=known(gain.gain) if helps else None,
        gain_lower=known(gain.lower),
        gain_upper=known(gain.upper),
        gain_note=say(
            "gain.placement" if helps else "gain.placement_not",
            gain=100 * gain.gain,
            lower=100 * gain.lower,
            upper=100 * gain.upper,
            steps=candidate.held_out.current.num_steps,
        ),
        change=candidate.placement.to_dict() if is_chosen else None,
        is_worth_it=helps,
        verdict=candidate.verdict.value.replace("_", " "),
    )
