"""One layer's times in summary: parts, experts, the cost model and the roofline. Pure numpy."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .cost_model import CostModel, estimate_experts, fit_cost_model, relative_error
from .places import LayerPlan, Layout
from .roofline import Peak, Roofline, RooflinePoints, roofline_of
from .spans import BlockCalls

__all__ = ["PARTS", "ExpertTime", "LayerSummary", "LayerTimes", "PartTime", "summarise_layer", "whole_roofline"]

# The parts of a block that a summary has, in the order of a forward.
PARTS = ("router", "dispatch", "experts", "shared", "combine", "wait", "rest")
_NO_CALL = "not called"


@dataclass(frozen=True, slots=True)
class PartTime:
    """The time of one part over the calls of its block.

    Attributes:
        median_ms, p95_ms: NaN where there is no number.
        share: of the blocks' time, by the sums over all calls.
        reason: why there is no number; empty where there is.
    """

    median_ms: float = float("nan")
    p95_ms: float = float("nan")
    share: float = float("nan")
    reason: str = ""


@dataclass(frozen=True, slots=True)
class ExpertTime:
    """The time of one expert over the calls in which it had rows.

    Attributes:
        num_calls: calls in which it had rows.
        mean_rows: rows in such a call.
        median_ms: of such a call.
        share: of all experts' time of the layer.
        is_estimated: True where the cost model says it.
    """

    expert_id: int
    num_calls: int
    mean_rows: float
    median_ms: float
    share: float
    is_estimated: bool


@dataclass(frozen=True, slots=True)
class LayerTimes:
    """The times of one layer.

    Attributes:
        layer_index, module_name, layout: which layer, and how it runs its experts.
        num_calls: calls of its block.
        median_ms, p95_ms: of its block.
        share_of_forward: of the forwards' time, by sums.
        parts: by name, see `PARTS`.
        experts: of each expert that had rows; empty where nothing is known.
        expert_reason: why there are none, or why they are estimates.
        model: of the experts' cost; also where experts are measured, to say how far estimates can be trusted.
        estimate_error: median relative error of estimated against measured single experts, where both are there.
        roofline: of the experts.
    """

    layer_index: int
    module_name: str
    layout: Layout
    num_calls: int
    median_ms: float
    p95_ms: float
    share_of_forward: float
    parts: Mapping[str, PartTime]
    experts: tuple[ExpertTime, ...]
    expert_reason: str
    model: CostModel
    estimate_error: float
    roofline: Roofline

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain values."""
        return {
            "layer_index": self.layer_index,
            "module_name": self.module_name,
            "layout": self.layout,
            "num_calls": self.num_calls,
            "median_ms": self.median_ms,
            "p95_ms": self.p95_ms,
            "share_of_forward": self.share_of_forward,
            "parts": {name: asdict(part) for name, part in self.parts.items()},
            "experts": [asdict(expert) for expert in self.experts],
            "expert_reason": self.expert_reason,
            "model": asdict(self.model) | {"note": self.model.note},
            "estimate_error": self.estimate_error,
            "roofline": self.roofline.to_dict(),
        }


@dataclass(frozen=True, slots=True)
class LayerSummary:
    """A layer's times, and the estimates by call that tables and exports show.

    Attributes:
        estimates: [b, E] nanoseconds; None where experts are measured, or nothing could be fitted.
    """

    times: LayerTimes
    calls: BlockCalls
    estimates: npt.NDArray[np.float64] | None


def summarise_layer(
    plan: LayerPlan,
    layer_index: int,
    calls: BlockCalls,
    *,
    forward_ns: float,
    steps: npt.NDArray[np.int64],
    forward_indices: npt.NDArray[np.int64],
    wait_reason: str,
    peak: Peak | None,
) -> LayerSummary:
    """Summarise one layer.

    Args:
        plan: how it was timed.
        layer_index: in the whole model.
        calls: of its block.
        forward_ns: time of all forwards together.
        steps, forward_indices: [b] of the calls.
        wait_reason: why there are no times of waiting; empty where there are.
        peak: for the roofline.
    """
    computed = calls.block - calls.router if plan.layout == "whole" else calls.experts
    model = CostModel(reason=plan.reasons.get("distinct_experts", "the rows of each expert are not known"))
    estimates, error = None, float("nan")
    if calls.expert_rows is not None:
        rows = calls.expert_rows
        model = fit_cost_model(rows.sum(axis=1), (rows > 0).sum(axis=1), computed)
        said = estimate_experts(model, rows) if model.is_fitted else None
        if calls.expert_times is None:
            estimates = said
        elif said is not None:
            error = relative_error(said, calls.expert_times)
    reasons = dict(plan.reasons) | ({"wait": wait_reason} if wait_reason else {})
    block_total = float(calls.block.sum())
    by_expert = calls.expert_times if calls.expert_times is not None else estimates
    is_estimated = calls.expert_times is None
    roofline = Roofline(
        layer_index,
        roofline_of(**_roofline_input(plan, calls, steps, forward_indices)),
        peak,
        _no_roofline(plan, calls),
    )
    times = LayerTimes(
        layer_index=layer_index,
        module_name=plan.info.module_name,
        layout=plan.layout,
        num_calls=len(calls),
        median_ms=_quantile_ms(calls.block, 50),
        p95_ms=_quantile_ms(calls.block, 95),
        share_of_forward=block_total / forward_ns if forward_ns > 0 else math.nan,
        parts={name: _part(getattr(calls, name), block_total, reasons.get(name, "")) for name in PARTS},
        experts=() if by_expert is None else _experts(by_expert, calls.expert_rows, is_estimated=is_estimated),
        expert_reason=_expert_reason(plan, model, by_expert is not None, len(calls)),
        model=model,
        estimate_error=error,
        roofline=roofline,
    )
    return LayerSummary(times, calls, estimates)


def _part(values: npt.NDArray[np.float64], block_total: float, reason: str) -> PartTime:
    if reason or not np.isfinite(values).any():
        return PartTime(reason=reason or _NO_CALL)
    share = float(np.nansum(values)) / block_total if block_total > 0 else math.nan
    return PartTime(_quantile_ms(values, 50), _quantile_ms(values, 95), share)


def _quantile_ms(values: npt.NDArray[np.float64], percent: float) -> float:
    known = values[np.isfinite(values)]
    return float(np.percentile(known, percent)) / 1e6 if len(known) else math.nan


def _experts(
    times: npt.NDArray[np.float64], rows: npt.NDArray[np.int64] | None, *, is_estimated: bool
) -> tuple[ExpertTime, ...]:
    assert rows is not None
    total = float(times.sum())
    found = []
    for expert in range(times.shape[1]):
        active = rows[:, expert] > 0
        if active.any():
            found.append(
                ExpertTime(
                    expert_id=expert,
                    num_calls=int(active.sum()),
                    mean_rows=float(rows[active, expert].mean()),
                    median_ms=float(np.median(times[active, expert])) / 1e6,
                    share=float(times[:, expert].sum()) / total if total > 0 else math.nan,
                    is_estimated=is_estimated,
                )
            )
    return tuple(found)


def _expert_reason(plan: LayerPlan, model: CostModel, is_known: bool, num_calls: int) -> str:
    if plan.layout == "modules":
        return ""
    if not num_calls:
        return _NO_CALL
    why = plan.reasons.get("expert", "")
    return why if is_known else f"{why.removesuffix(': estimated')}, and cannot be estimated: {model.reason}"


def _no_roofline(plan: LayerPlan, calls: BlockCalls) -> str:
    if plan.layout == "whole":
        return plan.reasons["experts"]
    if calls.expert_rows is None:
        return plan.reasons.get("distinct_experts", "the rows of each expert are not known") if len(calls) else _NO_CALL
    return "" if math.isfinite(plan.expert_bytes) else "the experts' weights are not laid out as one matrix per expert"


def _roofline_input(
    plan: LayerPlan, calls: BlockCalls, steps: npt.NDArray[np.int64], forward_indices: npt.NDArray[np.int64]
) -> dict[str, Any]:
    is_known = not _no_roofline(plan, calls)
    chosen = slice(None) if is_known else slice(0)
    rows = np.zeros((0, 1)) if calls.expert_rows is None else calls.expert_rows
    return {
        "step": steps[chosen],
        "record": calls.record[chosen],
        "forward_index": forward_indices[chosen],
        "expert_rows": rows[chosen],
        "seconds": calls.experts[chosen] / 1e9,
        "expert_bytes": plan.expert_bytes,
        "flops_per_row": plan.flops_per_row,
    }


def whole_roofline(layers: Sequence[Roofline], peak: Peak | None) -> Roofline:
    """Return the roofline of whole steps: the sums over the layers of each forward that has all of them."""
    known = [each.points for each in layers if len(each.points)]
    if not known:
        reasons = [each.reason for each in layers if each.reason]
        nothing: dict[str, Any] = dict.fromkeys(("step", "record", "forward_index", "seconds"), ())
        empty = roofline_of(**nothing, expert_rows=np.zeros((0, 1)), expert_bytes=0, flops_per_row=0)
        return Roofline(-1, empty, peak, reasons[0] if reasons else _NO_CALL)
    # By their position: numbers are the caller's, and forwards of two runs may have the same.
    records, first = np.unique(known[0].record, return_index=True)
    steps, forwards = known[0].step[first], known[0].forward_index[first]
    is_whole = np.ones(len(records), bool)
    totals = {name: np.zeros(len(records)) for name in ("distinct_experts", "active_bytes", "flops", "seconds")}
    for points in known:
        is_whole &= np.isin(records, points.record)
        at = np.minimum(np.searchsorted(records, points.record), len(records) - 1)
        inside = records[at] == points.record
        for name, total in totals.items():
            np.add.at(total, at[inside], getattr(points, name)[inside])
    whole = {name: total[is_whole] for name, total in totals.items()}
    points = RooflinePoints(steps[is_whole], records[is_whole], forwards[is_whole], **whole)
    return Roofline(-1, points, peak)
