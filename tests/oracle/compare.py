"""Compares captured decisions with what the causal oracle saw."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from oracle.causal import SiteCall
from oracle.subset import Part

from moe_debugger import Decisions
from moe_debugger.v1 import routing_pb2 as pb

__all__ = ["Comparison", "compare", "sites_of_layers"]

_Rows = npt.NDArray[Any]
_EMPTY = (pb.SLOT_STATUS_DROPPED, pb.SLOT_STATUS_SKIPPED, pb.SLOT_STATUS_UNUSED)
_MAX_PROBLEMS = 8


@dataclass
class Comparison:
    """How far the capture is from what the experts computed.

    Attributes:
        num_rows: rows compared, a token at a layer each, padded ones included.
        num_slots: slots that name an expert, an identity expert included.
        num_wrong_ids: experts that computed for a token and are not in its row, or are in it and did not.
        max_weight_error: largest difference of a weight, relative to it.
        max_weight_excess: the same as a multiple of what rounding allows; above 1 is wrong.
        num_unseen_slots: slots with a weight of exactly 0, which no oracle that looks at outputs can see.
        num_rows_without_expert: rows for which no expert computed.
        num_identity_rows: rows to which identity experts gave something.
        max_unexplained: see `SiteCall`; above rounding, the oracle itself is not to be believed.
        max_replay_excess: the replay's error as a multiple of what rounding allows; above 1 likewise.
        problems: what is wrong, in words: at most a few.
    """

    num_rows: int = 0
    num_slots: int = 0
    num_wrong_ids: int = 0
    max_weight_error: float = 0.0
    max_weight_excess: float = 0.0
    num_unseen_slots: int = 0
    num_rows_without_expert: int = 0
    num_identity_rows: int = 0
    max_unexplained: float = 0.0
    max_replay_excess: float = 0.0
    problems: list[str] = field(default_factory=list)

    @property
    def is_exact(self) -> bool:
        """Whether ids and weights are those of the oracle, and there were rows to compare."""
        return not self.problems and not self.num_wrong_ids and self.max_weight_excess <= 1 and self.num_rows > 0

    def add_problem(self, text: str) -> None:
        """Note `text`, unless there are many already."""
        if len(self.problems) < _MAX_PROBLEMS:
            self.problems.append(text)

    def summary(self) -> str:
        """Return all of it on a few lines, for a failed test."""
        numbers = (
            f"{self.num_rows} rows, {self.num_slots} slots, {self.num_wrong_ids} wrong ids, weights within "
            f"{self.max_weight_error:.2e} ({self.max_weight_excess:.2f} of what rounding allows), "
            f"{self.num_unseen_slots} unseen slots, {self.num_rows_without_expert} rows without expert"
        )
        return "\n".join([numbers, *self.problems])


def sites_of_layers(module_names: Mapping[int, str], sites: Iterable[str]) -> dict[int, str]:
    """Return the oracle's site for each captured layer: the module of its name, or the only child of it that is one.

    A layer without a site, and a site that two layers share, are left out.
    """
    sites = list(sites)
    found: dict[int, str] = {}
    for layer_index, name in module_names.items():
        inside = [site for site in sites if site == name] or [site for site in sites if site.rpartition(".")[0] == name]
        if len(inside) == 1 and inside[0] not in found.values():
            found[layer_index] = inside[0]
    return found


def compare(
    decisions: Decisions | Part, calls: Mapping[str, Sequence[SiteCall]], *, weight_rounding: float
) -> Comparison:
    """Compare all rows of `decisions` with the oracle's `calls`, layer by layer and row by row.

    Args:
        decisions: of the forwards during which the oracle was open, and of no other.
        calls: `Oracle.calls`.
        weight_rounding: relative, what the capture may round of a weight.
    """
    result = Comparison()
    sites = sites_of_layers(decisions.module_names, calls)
    for layer_index, name in decisions.module_names.items():
        if layer_index not in sites:
            result.add_problem(f"layer {layer_index} ({name}) has no experts that the oracle knows")
    for site in calls:
        if site not in sites.values():
            result.add_problem(f"the experts of {site} are not captured")
    for layer_index, site in sites.items():
        _compare_layer(result, decisions, layer_index, calls[site], weight_rounding)
    return result


def _compare_layer(
    result: Comparison, decisions: Decisions | Part, layer_index: int, calls: Sequence[SiteCall], weight_rounding: float
) -> None:
    where = f"layer {layer_index} ({decisions.module_names[layer_index]})"
    info = decisions.layers[layer_index]
    mine = decisions.layer_index == layer_index
    num_rows = sum(len(call.used) for call in calls)
    if int(mine.sum()) != num_rows:
        result.add_problem(f"{where}: {int(mine.sum())} rows captured, the experts saw {num_rows}")
        return
    if not num_rows:
        return
    used = np.concatenate([call.used for call in calls])
    weights = np.concatenate([call.weights for call in calls])
    identity = np.concatenate([call.identity_weights for call in calls])
    num_experts = used.shape[1]
    if info.num_experts != num_experts:
        result.add_problem(f"{where}: num_experts is {info.num_experts}, there are {num_experts}")
        return
    ids = decisions.expert_ids[mine].astype(np.int64)
    given = np.nan_to_num(decisions.gate_weights[mine].astype(np.float64))
    status = decisions.slot_status[mine]
    routed, is_identity = status == pb.SLOT_STATUS_ROUTED, status == pb.SLOT_STATUS_IDENTITY
    _check_slots(result, where, ids, status, num_experts, info.num_identity_experts)

    captured, captured_weights = _by_expert(ids, given, routed & (ids >= 0) & (ids < num_experts), num_experts)
    # At a weight of exactly 0 an expert's output moves nothing.
    unseen = captured & ~used & (captured_weights == 0)
    wrong = (captured != used) & ~unseen
    if wrong.any():
        row = int(np.flatnonzero(wrong.any(-1))[0])
        result.add_problem(
            f"{where}: {int(wrong.sum())} wrong ids in {int(wrong.any(-1).sum())} of {num_rows} rows; row {row}: "
            f"captured {ids[row].tolist()}, computed {np.flatnonzero(used[row]).tolist()}"
        )
    both = captured & used
    rounding = weight_rounding + max(call.tolerance for call in calls)
    error = np.abs(captured_weights - weights)[both] / np.abs(weights[both])
    identity_given = (given * is_identity).sum(-1)
    # The hidden state's own share is told from what silenced experts leave, to the same rounding.
    identity_error = np.abs(identity_given - identity) / np.maximum(np.abs(identity), 1e-3)
    worst = max(error.max(initial=0.0), identity_error.max(initial=0.0))
    if worst > rounding:
        is_off = (np.abs(captured_weights - weights) * both > rounding * np.abs(weights)).any(-1)
        row = int((is_off | (identity_error > rounding)).argmax())
        result.add_problem(
            f"{where}: weights differ by up to {worst:.2e}; row {row}: captured {given[row].tolist()} for "
            f"{ids[row].tolist()}, applied {weights[row][used[row]].tolist()} for "
            f"{np.flatnonzero(used[row]).tolist()}, identity {identity[row]:.6f}"
        )
    result.num_rows += num_rows
    result.num_slots += int((routed | is_identity).sum())
    result.num_wrong_ids += int(wrong.sum())
    result.max_weight_error = max(result.max_weight_error, float(worst))
    result.max_weight_excess = max(result.max_weight_excess, float(worst / rounding))
    result.num_unseen_slots += int((unseen[np.arange(num_rows)[:, None], ids.clip(0, num_experts - 1)] & routed).sum())
    result.num_rows_without_expert += int((~used.any(-1)).sum())
    result.num_identity_rows += int((identity != 0).sum())
    result.max_unexplained = max(result.max_unexplained, max(call.unexplained for call in calls))
    excess = [call.replay_error / call.replay_tolerance for call in calls]
    result.max_replay_excess = max(result.max_replay_excess, *excess)


def _check_slots(
    result: Comparison, where: str, ids: _Rows, status: _Rows, num_experts: int, num_identity_experts: int
) -> None:
    """Note slots whose id does not fit their status."""
    empty = np.isin(status, _EMPTY)
    checks = (
        (empty & (ids != -1), "is empty but names an expert"),
        ((status == pb.SLOT_STATUS_ROUTED) & ((ids < 0) | (ids >= num_experts)), "is routed to no such expert"),
        (
            (status == pb.SLOT_STATUS_IDENTITY) & ((ids < num_experts) | (ids >= num_experts + num_identity_experts)),
            "is of an identity expert whose id is another's",
        ),
        (status == pb.SLOT_STATUS_UNSPECIFIED, "has no status"),
    )
    for is_wrong, text in checks:
        if is_wrong.any():
            row, slot = (int(index[0]) for index in np.nonzero(is_wrong))
            result.add_problem(
                f"{where}: {int(is_wrong.sum())} slots: row {row}, slot {slot} {text} "
                f"(status {int(status[row, slot])}, id {int(ids[row, slot])})"
            )


def _by_expert(ids: _Rows, weights: _Rows, valid: _Rows, num_experts: int) -> tuple[_Rows, _Rows]:
    """Return which experts each row names [n, E], and the sum of its weights for each [n, E]."""
    named = np.zeros((len(ids), num_experts), dtype=bool)
    summed = np.zeros((len(ids), num_experts))
    rows, slots = np.nonzero(valid)
    named[rows, ids[rows, slots]] = True
    np.add.at(summed, (rows, ids[rows, slots]), weights[rows, slots])
    return named, summed
