"""A running profile as training series: what the fleet and its page see of it, some numbers every few seconds."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from moe_debugger.training.series import NO_INDEX, SeriesPoint

from .bottlenecks import BottleneckKind
from .cost_model import CostModel, MergedCost
from .report import LayerProfile
from .roofline import Peak

if TYPE_CHECKING:
    from .profiler import LayerProfiler

__all__ = ["SERIES_PREFIX", "LiveProfile"]

Floats = npt.NDArray[np.float64]
# Series of this prefix are drawn by the page's Performance panel, and by no other.
SERIES_PREFIX = "profile_"
_INTERVAL_S = 5.0
# The newest forwards that a summary looks at: bottlenecks need more than what came since the last one.
_WINDOW = 256
# Bottlenecks of this kind have a number for each expert.
_BY_EXPERT = f"bottleneck_{BottleneckKind.SLOW_EXPERT.value}"
# Of the time, for summaries.
_MAX_SHARE = 0.01


class LiveProfile:
    """Makes series points of what was timed.

    Args:
        profiler: that runs.
        layer_numbers, expert_owners: as of `LayerProfile`.
        peak: for the roofline.
        interval_s: least time between two summaries.
        clock: seconds; for tests.
    """

    def __init__(
        self,
        profiler: "LayerProfiler",
        *,
        layer_numbers: Mapping[int, int],
        expert_owners: Mapping[int, Sequence[int]],
        peak: Peak | None = None,
        interval_s: float = _INTERVAL_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._profiler = profiler
        self._numbers, self._owners, self._peak = layer_numbers, expert_owners, peak
        self._interval_s, self._clock = interval_s, clock
        self._next_s = 0.0
        self._num_seen = 0
        # Numbers of bottlenecks that were said, and how many values each has, so that one that is gone is taken back.
        self._said: dict[tuple[str, int], int] = {}

    def points(self) -> list[SeriesPoint]:
        """Return the points of the newest forwards; none before the interval is over, or without a new forward."""
        now_s = self._clock()
        if now_s < self._next_s:
            return []
        self._next_s = now_s + self._interval_s
        self._profiler.settle()
        store = self._profiler.store
        if store.num_added == self._num_seen:
            return []
        self._num_seen = store.num_added
        started_ns = time.perf_counter_ns()
        profile = LayerProfile(
            self._profiler,
            layer_numbers=self._numbers,
            expert_owners=self._owners,
            peak=self._peak,
            records=store.records(newest=_WINDOW),
        )
        step = profile.records[-1].step
        points = [*self._model_points(profile, step), *_layer_points(profile, step), *self._bottlenecks(profile, step)]
        # Many experts take long to look at: no more than a part of the time goes into it, and it is part of the cost.
        took_ns = time.perf_counter_ns() - started_ns
        self._profiler.spent(took_ns)
        self._next_s = now_s + max(self._interval_s, took_ns / 1e9 / _MAX_SHARE)
        return points

    def _model_points(self, profile: LayerProfile, step: int) -> list[SeriesPoint]:
        values = {
            "forward_ms": profile.forward_median_ms,
            "num_forwards": float(profile.num_forwards),
            "overhead_share": profile.overhead.share,
            "num_dropped": float(profile.overhead.num_dropped + profile.overhead.num_given_up),
            "step_experts": profile.roofline.median("distinct_experts"),
            "step_bytes": profile.roofline.median("active_bytes"),
            "intensity": profile.roofline.median("intensity"),
            "gflops": profile.roofline.median("gflops"),
            "gbps": profile.roofline.median("gbps"),
        }
        if self._peak is not None:
            values |= {"peak_gflops": self._peak.gflops, "peak_gbps": self._peak.gbps}
        return [_point(step, name, NO_INDEX, value) for name, value in values.items() if math.isfinite(value)]

    def _bottlenecks(self, profile: LayerProfile, step: int) -> list[SeriesPoint]:
        widths = {each.times.layer_index: each.calls.num_experts for each in profile.summaries}
        found: dict[tuple[str, int], Floats] = {}
        for each in profile.bottlenecks:
            layer = NO_INDEX if each.layer_index is None else each.layer_index
            numbers = {"": each.statistic, "_low": each.lower_bound, "_calls": float(each.num_calls)}
            for ending, number in numbers.items():
                key = (f"bottleneck_{each.kind.value}{ending}", layer)
                # Of one kind and layer there is one, but for experts: theirs are a row, NaN for those not slow.
                values = found.setdefault(key, np.full(1 if each.expert_id is None else widths[layer], np.nan))
                values[each.expert_id or 0] = number
        gone = {key: np.full(width, np.nan) for key, width in self._said.items() if key not in found}
        self._said = {key: len(values) for key, values in found.items()}
        return [
            SeriesPoint(step, SERIES_PREFIX + name, layer, name.startswith(_BY_EXPERT), values)
            for (name, layer), values in (found | gone).items()
        ]


def _layer_points(profile: LayerProfile, step: int) -> list[SeriesPoint]:
    points = []
    for layer in profile.layers:
        if not layer.num_calls:
            continue
        index = layer.layer_index
        values = {"layer_ms": layer.median_ms, "layer_p95_ms": layer.p95_ms, "layer_share": layer.share_of_forward}
        values |= {f"{name}_ms": part.median_ms for name, part in layer.parts.items()}
        roofline = layer.roofline
        values |= {
            f"layer_{name}": roofline.median(name) for name in ("distinct_experts", "intensity", "gflops", "gbps")
        }
        values |= {"layer_calls": float(layer.num_calls)} | _estimate_values(layer.model)
        points += [_point(step, name, index, value) for name, value in values.items() if math.isfinite(value)]
        if layer.experts:
            kind = "expert_ms_estimated" if layer.experts[0].is_estimated else "expert_ms"
            by_expert = np.full(max(each.expert_id for each in layer.experts) + 1, np.nan)
            for each in layer.experts:
                by_expert[each.expert_id] = each.median_ms
            points.append(SeriesPoint(step, SERIES_PREFIX + kind, index, True, by_expert))
    return points


def _estimate_values(model: CostModel) -> dict[str, float]:
    """Return how far the estimates of a layer can be trusted; numbers, since a series has no words."""
    if not model.is_fitted:
        return {}
    worst = model.worst
    unknown = [size.max_rows for size in model.sizes if not size.num_held_out]
    return {
        "estimate_error": model.held_out_error,
        "estimate_fitted": float(model.num_fitted),
        "estimate_held_out": float(model.num_held_out),
        "estimate_worst": math.nan if worst is None else worst.error,
        "estimate_worst_rows": math.nan if worst is None else float(worst.max_rows),
        # 0 = none.
        "estimate_unknown_rows": float(max(unknown, default=0)),
        "estimate_merged": float(tuple(MergedCost).index(model.merged)),
    }


def _point(step: int, name: str, layer: int, value: float) -> SeriesPoint:
    return SeriesPoint(step, SERIES_PREFIX + name, layer, False, np.array([value]))
