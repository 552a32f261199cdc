"""Causes in what was routed: another mix of text, one token or one request that dominates, full experts, habit."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_debugger.analysis.explanation.association import CAP, onset_score
from moe_debugger.analysis.explanation.change_points import find_change
from moe_debugger.analysis.explanation.context import Context, Floats, WorkloadMix, began, cause, number
from moe_debugger.analysis.explanation.history import LayerHistory, Limit
from moe_debugger.analysis.explanation.model import Cause
from moe_debugger.analysis.findings import EvidenceRow, FindingKind

__all__ = ["capacity_factor_needed", "data_causes"]

_MIN_MIX_STEPS = 16
_MIX_BUCKETS = 128
_MIN_ROWS = 100
# Any request of a dozen takes a part of what is there with it; below this part of the distance to the limit it is none.
_MIN_EXPLAINED = 0.25
# Buckets without a change that it takes to call a skew constant.
_MIN_CONSTANT = 16
_CONSTANT_KINDS = (FindingKind.HOT_EXPERT, FindingKind.COLD_EXPERT, FindingKind.DEAD_EXPERT, FindingKind.LOAD_IMBALANCE)
_ROUTED, _DROPPED = 1, 2


def data_causes(context: Context) -> Iterator[Cause]:
    """Yield what the text and its rows show."""
    yield from _mix(context)
    yield from _dominance(context, "token_id", "one_token_dominates", "rows.token")
    yield from _dominance(context, "request_id", "one_request_dominates", "rows.request")
    yield from _constant(context)
    yield from _capacity(context)


def _mix(context: Context) -> Iterator[Cause]:
    """data.mix: the distance of each step's mix from that of the steps before the onset rises before the onset."""
    mix, onset = context.mix, context.onset
    if mix is None or onset is None:
        return
    mix = _bucketed(mix)
    before = mix.steps < onset.first_step
    if len(mix.steps) < _MIN_MIX_STEPS or before.sum() < _MIN_MIX_STEPS // 4 or before.all():
        return
    reference = mix.counts[before].sum(axis=0)
    distance = np.array([_jensen_shannon(row, reference) for row in mix.counts])
    change = find_change(distance, direction=1)
    if change is None or not change.is_significant:
        return
    at = int(mix.steps[change.onset])
    span = int(mix.steps[-1] - mix.steps[0]) + 1
    score = onset_score(at, onset, max(span, context.num_steps()))
    if score <= 0:
        return
    share, was = mix.counts[change.onset :].sum(axis=0), mix.counts[: change.onset].sum(axis=0)
    share, was = share / share.sum(), was / was.sum()
    kind = int((share - was).argmax())
    when = began(at, onset)
    row = EvidenceRow("workload_mix_divergence", change.after, f"rises {when}", change.before, len(mix.steps), "bits")
    yield cause(
        "data_changed", "data.mix", score, evidence=(row,), step=str(at), when=when, kind=mix.names[kind],
        before=number(100 * float(was[kind])), now=number(100 * float(share[kind])),
    )  # fmt: skip


def _bucketed(mix: WorkloadMix) -> WorkloadMix:
    width = max(1, -(-len(mix.steps) // _MIX_BUCKETS))
    starts = np.arange(0, len(mix.steps), width)
    return WorkloadMix(mix.steps[starts], np.add.reduceat(mix.counts, starts, axis=0), mix.names)


def _jensen_shannon(a: Floats, b: Floats) -> float:
    """Return the Jensen-Shannon divergence of two counts in bits, 0..1."""
    p, q = a / max(1.0, a.sum()), b / max(1.0, b.sum())
    m = (p + q) / 2
    parts = [float((x[x > 0] * np.log2(x[x > 0] / m[x > 0])).sum()) for x in (p, q)]
    return max(0.0, sum(parts) / 2)


def _dominance(context: Context, column: str, code: str, rule: str) -> Iterator[Cause]:
    """rows.token, rows.request: how far the finding goes away without the commonest token (request) of its rows."""
    rows, index = context.rows, context.finding.layer_index
    history = None if index is None else context.histories.get(index)
    if rows is None or index is None or rows.get(column) is None:
        return
    num_experts = history.num_experts if history is not None else int(np.asarray(rows["expert_ids"]).max(initial=0)) + 1
    limit = Limit.of(context.finding, num_experts)
    if limit is None or limit.value <= 0 or (limit.metric == "load_ratio" and not limit.is_upper):
        return
    chosen = _valid_rows(rows, index)
    ids, labels = np.asarray(rows["expert_ids"])[chosen], np.asarray(rows[column])[chosen]
    if labels.dtype.kind == "O":
        labels = labels.astype(np.str_)
    expert = context.finding.expert_id
    behind = labels if expert is None else labels[(ids == expert).any(axis=1)]
    if len(ids) < _MIN_ROWS or not len(behind):
        return
    names, counts = np.unique(behind, return_counts=True)
    top = int(counts.argmax())
    if str(names[top]) in ("", "None") or counts.sum() == counts[top] == len(ids):
        # Rows without a request, or all there is: nothing that could be left out.
        return
    with_all = _value(limit, index, ids, num_experts)
    without = _value(limit, index, ids[labels != names[top]], num_experts)
    if with_all is None or without is None:
        return
    gap, moved = limit.value - with_all, without - with_all
    # Both have the sign of "towards the limit" where removing helps.
    if gap == 0 or moved / gap <= 0:
        return
    explained = min(1.0, moved / gap)
    if explained < _MIN_EXPLAINED:
        return
    scale = num_experts if limit.metric == "effective_experts" else 1
    row = EvidenceRow(
        limit.metric,
        with_all * scale,
        f"{'<=' if limit.is_upper else '>='} {number(limit.value * scale)} without it",
        without * scale,
        len(ids),
        "baseline = without it",
    )
    yield cause(
        code, rule, CAP * explained, evidence=(row,), layer=str(index), name=str(names[top]),
        share=number(100 * float(counts[top]) / len(behind)), now=number(with_all * scale),
        without=number(without * scale), percent=number(100 * explained),
    )  # fmt: skip


def _valid_rows(rows: Mapping[str, Any], layer_index: int) -> npt.NDArray[np.bool_]:
    chosen: npt.NDArray[np.bool_] = np.asarray(rows["layer_index"]) == layer_index
    if rows.get("is_padding") is not None:
        chosen &= ~np.asarray(rows["is_padding"]).astype(np.bool_)
    return chosen


def _value(limit: Limit, layer_index: int, ids: npt.NDArray[Any], num_experts: int) -> float | None:
    used = ids[(ids >= 0) & (ids < num_experts)]
    counts = np.bincount(used, minlength=num_experts)[None, :]
    history = LayerHistory(layer_index, [0], counts)
    return float(limit.values(history, is_own_layer=True)[0]) if len(history.steps) else None


def _constant(context: Context) -> Iterator[Cause]:
    """specialisation.constant: over all steps seen nothing changed, so it is how this router treats this text."""
    course = context.course
    if context.finding.kind not in _CONSTANT_KINDS or context.is_training or course.num_buckets < _MIN_CONSTANT:
        return
    change = course.change
    if course.own is not None or (change is not None and change.is_significant):
        return
    evidence = 0.0 if change is None else change.log_likelihood_ratio
    penalty = CAP if change is None else change.penalty
    row = EvidenceRow(
        "change_point_evidence", evidence, f"< {number(penalty)}, the penalty", None, course.num_buckets, "nats"
    )
    yield cause(
        "constant_specialisation", "specialisation.constant", min(CAP, penalty - evidence), evidence=(row,),
        layer=str(context.finding.layer_index), buckets=str(course.num_buckets),
    )  # fmt: skip


def _capacity(context: Context) -> Iterator[Cause]:
    """capacity.uneven: slots are dropped where the busiest expert is asked for more than its share."""
    index = context.finding.layer_index
    if context.finding.kind is not FindingKind.CAPACITY_OVERFLOW or index is None or index not in context.histories:
        return
    counts = context.histories[index].counts.sum(axis=0)
    ratio = float(counts.max() * counts.size / max(1.0, counts.sum()))
    row = EvidenceRow("max_over_mean", ratio, "1 = even load", None, int(counts.sum()), "x fair share")
    yield cause(
        "load_exceeds_capacity", "capacity.uneven", min(CAP, float(np.log(max(ratio, 1.0)) * CAP)), evidence=(row,),
        layer=str(index), expert=str(int(counts.argmax())), ratio=number(ratio),
    )  # fmt: skip


def capacity_factor_needed(rows: Mapping[str, Any], layer_index: int, num_experts: int, limit: float) -> float | None:
    """Return the least capacity factor (to 0.01) that drops at most `limit` of the slots of these rows.

    Demand counts routed slots by `expert_ids` and dropped ones by `intended_expert_ids`, per forward; capacity is
    cf * T * k / E of each forward, without rounding up.

    Returns:
        None where the rows do not say what dropped slots wanted.
    """
    names = ("intended_expert_ids", "slot_status", "forward_index")
    if any(rows.get(name) is None for name in names):
        return None
    chosen = _valid_rows(rows, layer_index)
    ids, status = np.asarray(rows["expert_ids"])[chosen], np.asarray(rows["slot_status"])[chosen]
    wanted = np.where(status == _DROPPED, np.asarray(rows["intended_expert_ids"])[chosen], ids)
    used = (wanted >= 0) & (wanted < num_experts) & ((status == _ROUTED) | (status == _DROPPED))
    if not len(ids) or not used.any():
        return None
    _, forward = np.unique(np.asarray(rows["forward_index"])[chosen], return_inverse=True)
    cells = (forward[:, None] * num_experts + np.where(used, wanted, 0))[used]
    demand = np.bincount(cells, minlength=(int(forward.max()) + 1) * num_experts).reshape(-1, num_experts)
    fair = np.bincount(forward) * ids.shape[1] / num_experts
    slots = ids.shape[1] * len(ids)
    low, high = 0, int(np.ceil(100 * float((demand / fair[:, None]).max())))
    while low < high:
        middle = (low + high) // 2
        overflow = np.maximum(0.0, demand - middle / 100 * fair[:, None]).sum()
        low, high = (low, middle) if overflow <= limit * slots + 1e-9 else (middle + 1, high)
    return high / 100
