"""A plan: candidate placements, fitted on the first steps of a window and judged on the others."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from moe_debugger._tables import html_table, text_table
from moe_debugger.errors import InvalidInputError
from moe_debugger.planning.evaluation import MIN_STEPS, Verdict, WindowResult, evaluate, judge
from moe_debugger.planning.loads import Floats, check_counts
from moe_debugger.planning.migration import (
    Migration,
    align_placement,
    fitted_gain,
    keep_layers_without_gain,
    migration,
)
from moe_debugger.planning.packing import eplb_placement, greedy_placement, hierarchical_placement
from moe_debugger.planning.placement import Placement, check_whole, contiguous_placement
from moe_debugger.planning.rank_metrics import expected_active_experts

__all__ = ["Candidate", "PlacementPlan", "plan_placement"]

FORMAT, FORMAT_VERSION = "moe-debugger-placement-plan", 1
# Fitting on fewer steps is fitting to their noise.
MIN_FIT_STEPS = 16
_HEADERS = ("strategy", "verdict", "gain", "from", "to", "imbalance now", "planned", "slots/rank", "moved", "why")


@dataclass(frozen=True, slots=True, eq=False)
class Candidate:
    """One placement and what it would do.

    Attributes:
        placement: ranks are numbered so that few experts move.
        fitted_gain: gain on the fitting window, where it was chosen: too good to be believed.
        held_out: the later steps of the same workload.
        others: other workloads.
        migration: what it takes.
        verdict, reason: what all this says.
        gain_s: seconds that a step is shorter by at least, where the time of an assignment is known.
        break_even_steps: steps after which the time for receiving weights is earned back; None where times are not
            known or nothing is gained.
    """

    placement: Placement
    fitted_gain: float
    held_out: WindowResult
    others: tuple[WindowResult, ...]
    migration: Migration
    verdict: Verdict
    reason: str
    gain_s: float | None
    break_even_steps: float | None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values; what is not known is None."""
        return {
            "placement": self.placement.to_dict(),
            "verdict": self.verdict.value,
            "reason": self.reason,
            "fitted_gain": None if math.isnan(self.fitted_gain) else self.fitted_gain,
            "held_out": self.held_out.to_dict(),
            "other_workloads": [other.to_dict() for other in self.others],
            "migration": asdict(self.migration),
            "gain_s": self.gain_s,
            "break_even_steps": self.break_even_steps,
        }


@dataclass(frozen=True, slots=True, eq=False)
class PlacementPlan:
    """All candidates and the one to take, if any.

    Attributes:
        current: the placement that they are compared with.
        candidates: in the order greedy, eplb, hierarchical, as far as they apply.
        recommended: of those that help, the one whose gain is at least highest; None: leave things as they are.
        num_fit_steps: steps with load that candidates were fitted to.
        tokens_per_step: mean over held-out steps of the assignments of a layer / top_k.
        expected_active_experts: distinct experts per rank and layer that so many tokens reach under uniform routing
            without copies.
        notes: what to know before applying anything.
    """

    current: Placement
    candidates: tuple[Candidate, ...]
    recommended: Candidate | None
    num_fit_steps: int
    tokens_per_step: float
    expected_active_experts: float
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values in the form that docs/planning.md describes."""
        chosen = None if self.recommended is None else self.candidates.index(self.recommended)
        return {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "recommended": chosen,
            "current": self.current.to_dict(),
            "num_fit_steps": self.num_fit_steps,
            "tokens_per_step": None if math.isnan(self.tokens_per_step) else self.tokens_per_step,
            "expected_active_experts_per_rank": (
                None if math.isnan(self.expected_active_experts) else self.expected_active_experts
            ),
            "candidates": [candidate.to_dict() for candidate in self.candidates],
            "notes": list(self.notes),
        }

    def to_json(self) -> str:
        """Return `to_dict` as JSON, without NaN."""
        return json.dumps(self.to_dict(), allow_nan=False)

    def _table(self) -> list[list[object]]:
        return [
            [
                candidate.placement.strategy,
                candidate.verdict.value,
                candidate.held_out.gain.gain,
                candidate.held_out.gain.lower,
                candidate.held_out.gain.upper,
                candidate.held_out.current.imbalance,
                candidate.held_out.planned.imbalance,
                candidate.placement.slots_per_rank,
                candidate.migration.num_experts_moved,
                candidate.reason,
            ]
            for candidate in self.candidates
        ]

    @property
    def _title(self) -> str:
        what = "change nothing" if self.recommended is None else f"use {self.recommended.placement.strategy}"
        return f"Placement on {self.current.num_ranks} ranks: {what}"

    def __str__(self) -> str:
        return "\n".join([self._title, text_table(_HEADERS, self._table()), *self.notes])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return html_table(self._title, _HEADERS, self._table())


def plan_placement(
    loads: Any,
    *,
    top_k: int,
    num_ranks: int,
    num_nodes: int = 1,
    num_groups: int = 1,
    num_redundant: int | None = None,
    current: Placement | None = None,
    other_workloads: Mapping[str, Any] | None = None,
    held_out_share: float = 0.5,
    min_gain: float = 0.01,
    confidence: float = 0.95,
    expert_bytes: int | None = None,
    seconds_per_assignment: float | None = None,
    link_bytes_per_s: float | None = None,
    seed: int = 0,
) -> PlacementPlan:
    """Try placements of the experts, and say what each would do on steps that it was not fitted to.

    The first steps are for fitting, the last for judging. Intervals hold for all candidates and windows together
    (Bonferroni), so that taking the best of them needs no further correction.

    Args:
        loads: [num_steps, num_layers, num_experts] in the order of the steps, or `loads_from_decisions(...)`.
        top_k: experts per token.
        num_groups: groups of experts of group-limited routing, for the hierarchical placement.
        num_redundant: spare slots over all ranks, per layer, for copies; at most a copy of every expert on every rank;
            without it as many as `current` has.
        current: what runs now; without it the contiguous placement, in as many slots as there are experts where ranks
            divide them, else in all slots.
        other_workloads: by name, loads in the same form, on which the placements are judged too.
        held_out_share: share of the steps that is held out.
        min_gain: least gain that counts, as a share of the bound on step time.
        confidence: of all intervals together.
        expert_bytes: weights of one expert of one layer.
        seconds_per_assignment: time of one assignment in an expert, for gains in seconds.
        link_bytes_per_s: what a rank receives weights with.
        seed: of the dealing of assignments to copies.

    Raises:
        InvalidInputError: a value is out of range, or loads, placement and topology do not fit each other.
    """
    counts = check_counts(loads)
    counts = counts[counts.sum(axis=(1, 2)) > 0]
    layers, experts = counts.shape[1:]
    if num_redundant is None:
        num_redundant = 0 if current is None else current.num_slots - current.num_experts
    for name, value in (("num_ranks", num_ranks), ("num_nodes", num_nodes), ("num_groups", num_groups)):
        check_whole(name, value, 1)
    _check_options(top_k, experts, num_redundant, held_out_share, min_gain, confidence)
    for name, rate in (("seconds_per_assignment", seconds_per_assignment), ("link_bytes_per_s", link_bytes_per_s)):
        if rate is not None and not (isinstance(rate, int | float | np.number) and 0 < rate < math.inf):
            raise InvalidInputError(f"{name} {rate!r}: expected a number, more than 0")
    num_slots = experts + num_redundant
    if num_slots > experts * num_ranks:
        raise InvalidInputError(
            f"num_redundant {num_redundant:,}: with {experts * (num_ranks - 1):,} each of the {num_ranks:,} ranks "
            f"holds all {experts:,} experts, and more copies change nothing; give fewer"
        )
    if current is None:
        own_slots = experts if experts % num_ranks == 0 else num_slots
        current = contiguous_placement(layers, experts, num_ranks, num_slots=own_slots, num_nodes=num_nodes)
    if (current.num_ranks, current.num_nodes) != (num_ranks, num_nodes):
        raise InvalidInputError(
            f"the current placement is on {current.num_ranks} ranks and {current.num_nodes} nodes, but num_ranks is "
            f"{num_ranks} and num_nodes {num_nodes}"
        )
    num_held_out = round(len(counts) * held_out_share)
    fit, held_out = counts[: len(counts) - num_held_out], counts[len(counts) - num_held_out :]
    windows = {name: check_counts(other, name) for name, other in (other_workloads or {}).items()}
    placements = _candidates(fit.sum(axis=0), current, num_slots, num_groups)
    # Two-sided at 1 - alpha / m each: all hold together with probability `confidence` at least.
    each = 1 - (1 - confidence) / (len(placements) * (1 + len(windows)))
    candidates = []
    for raw in placements:
        placement = keep_layers_without_gain(align_placement(raw, current), current, fit) if len(fit) else raw
        result = evaluate("held-out", held_out, current, placement, confidence=each, seed=seed)
        others = tuple(
            evaluate(name, other, current, placement, confidence=each, seed=seed) for name, other in windows.items()
        )
        gained = fitted_gain(current, placement, fit)
        verdict, reason = judge(result, others, fitted_gain=gained, min_gain=min_gain)
        if verdict is Verdict.WOULD_NOT_HELP and result.current.waste_share > min_gain:
            reason += _too_heavy(held_out.sum(axis=0), placement)
        if len(fit) < MIN_FIT_STEPS:
            verdict, reason = Verdict.NOT_ENOUGH_STEPS, f"{len(fit)} steps to fit to; it takes {MIN_FIT_STEPS} or more"
        cost = migration(current, placement, expert_bytes=expert_bytes)
        gain_s, break_even = _payback(result, cost, seconds_per_assignment, link_bytes_per_s)
        candidates.append(Candidate(placement, gained, result, others, cost, verdict, reason, gain_s, break_even))
    helping = [candidate for candidate in candidates if candidate.verdict is Verdict.HELPS]
    tokens = float(held_out.sum(axis=2).mean()) / top_k if held_out.size else float("nan")
    expected = float("nan") if math.isnan(tokens) else expected_active_experts(experts, top_k, tokens) / num_ranks
    return PlacementPlan(
        current=current,
        candidates=tuple(candidates),
        recommended=max(helping, key=lambda candidate: candidate.held_out.gain.lower, default=None),
        num_fit_steps=len(fit),
        tokens_per_step=tokens,
        expected_active_experts=expected,
        notes=(*_notes(candidates), *_groups_note(experts, num_nodes, num_groups)),
    )


def _candidates(weights: Floats, current: Placement, num_slots: int, num_groups: int) -> list[Placement]:
    experts, ranks, nodes = weights.shape[1], current.num_ranks, current.num_nodes
    makers: list[Callable[[], Placement]] = []
    if experts % ranks == 0 and current.num_slots == experts:
        makers.append(lambda: greedy_placement(weights, ranks, num_nodes=nodes))
    if num_slots > experts:
        makers.append(lambda: eplb_placement(weights, ranks, num_slots=num_slots, num_nodes=nodes))
    if nodes > 1 and _groups_fit(experts, nodes, num_groups):
        makers.append(
            lambda: hierarchical_placement(weights, ranks, num_slots=num_slots, num_nodes=nodes, num_groups=num_groups)
        )
    if not makers:
        raise InvalidInputError(
            f"{experts} experts on {ranks} ranks without spare slots: nothing to try; give num_redundant"
        )
    return [make() for make in makers]


def _groups_fit(experts: int, nodes: int, num_groups: int) -> bool:
    return num_groups % nodes == 0 and experts % num_groups == 0


def _groups_note(experts: int, nodes: int, num_groups: int) -> tuple[str, ...]:
    # One group is what routing without groups has.
    if nodes == 1 or num_groups == 1 or _groups_fit(experts, nodes, num_groups):
        return ()
    return (
        f"hierarchical was not tried: {num_groups} groups do not divide {experts} experts evenly, or not onto {nodes} "
        "nodes",
    )


def _too_heavy(loads: Floats, placement: Placement) -> str:
    """Name the heaviest of the experts that alone exceed a rank's fair share and have one copy; "" without one.

    Args:
        loads: [num_layers, num_experts] sums over the window.
    """
    fair = loads.sum(axis=1, keepdims=True) / placement.num_ranks
    ratio = np.divide(loads, fair, out=np.zeros_like(loads), where=fair > 0) * (placement.num_copies == 1)
    layer, expert = (int(i) for i in np.unravel_index(ratio.argmax(), ratio.shape))
    if ratio[layer, expert] <= 1:
        return ""
    return (
        f"; expert {expert} of layer {layer} alone is given {ratio[layer, expert]:.2f}x a rank's fair share, so that "
        "only copies of it can even it out (num_redundant)"
    )


def _check_options(
    top_k: int, num_experts: int, num_redundant: int, held_out_share: float, min_gain: float, confidence: float
) -> None:
    check_whole("top_k", top_k, 1)
    if top_k > num_experts:
        raise InvalidInputError(f"top_k {top_k}: expected 1 to {num_experts}, the number of experts")
    check_whole("num_redundant", num_redundant, 0)
    if not 0 < held_out_share < 1:
        raise InvalidInputError(f"held_out_share {held_out_share}: expected more than 0 and less than 1")
    if not 0 <= min_gain < 1:
        raise InvalidInputError(f"min_gain {min_gain}: expected 0 or more and less than 1")
    if not 0 < confidence < 1:
        raise InvalidInputError(f"confidence {confidence}: expected more than 0 and less than 1")


def _payback(
    result: WindowResult, cost: Migration, seconds_per_assignment: float | None, link_bytes_per_s: float | None
) -> tuple[float | None, float | None]:
    if seconds_per_assignment is None or math.isnan(result.gain.gain):
        return None, None
    gain_s = (result.current.step_bound - result.planned.step_bound) * seconds_per_assignment
    if link_bytes_per_s is None or cost.max_bytes_received is None or gain_s <= 0:
        return gain_s, None
    return gain_s, cost.max_bytes_received / link_bytes_per_s / gain_s


def _notes(candidates: list[Candidate]) -> tuple[str, ...]:
    notes = [
        "gains are of the lower bound on the time in experts (time in proportion to the busiest rank's assignments); "
        "dispatch, combine and everything else of a step are not in it"
    ]
    others = candidates[0].others
    if not others:
        notes.append("judged on one workload only: on another the gain may be none, or a loss")
    short = [other.window for other in others if math.isnan(other.gain.lower)]
    if short:
        notes.append(
            f"too few steps of {', '.join(short)} to tell whether it is harmed ({MIN_STEPS} or more are needed)"
        )
    for candidate in candidates:
        before, after = candidate.held_out.current_active_experts, candidate.held_out.planned_active_experts
        if after > before * 1.02:
            notes.append(
                f"{candidate.placement.strategy}: the busiest rank reads {after:.1f} experts a layer and step instead "
                f"of {before:.1f}; where decode is bound by memory that costs time"
            )
        if candidate.placement.num_doubled_slots:
            notes.append(
                f"{candidate.placement.strategy}: {candidate.placement.num_doubled_slots} slots repeat an expert of "
                "their own rank; they keep a layer as it is and use memory only"
            )
    return tuple(notes)
