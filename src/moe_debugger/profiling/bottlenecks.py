"""What makes a model's MoE layers slow: rules with an effect floor, judged by an interval, never by one number. Pure.

A bottleneck is reported where the lower bound of a median lies beyond the floor. Times of neighbouring forwards hang
together (the machine's mood, growing caches), so the bound is not taken over forwards: they are cut into up to 20
contiguous blocks, and the bound is that order statistic of the blocks' medians which lies below the true median with
the stated confidence. All rules of one report share an error of 5 % (Bonferroni).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_debugger.analysis import EvidenceRow, Severity

from .cost_model import expert_call_model
from .roofline import Roofline

__all__ = [
    "BottleneckKind",
    "LayerTimesInput",
    "ProfileBottleneck",
    "ProfileRules",
    "find_bottlenecks",
    "imbalance_cost",
    "lower_median",
]

Floats = npt.NDArray[np.float64]
_BLOCKS = 20
_ERROR = 0.05


class BottleneckKind(StrEnum):
    """The closed set of bottlenecks."""

    SLOW_LAYER = "slow_layer"
    SLOW_EXPERT = "slow_expert"
    EXPERT_IMBALANCE = "expert_imbalance"
    ROUTER_SHARE = "router_share"
    GLUE_SHARE = "glue_share"
    WAIT_SHARE = "wait_share"
    MEMORY_BOUND = "memory_bound"
    COMPUTE_BOUND = "compute_bound"
    BELOW_ROOF = "below_roof"


@dataclass(frozen=True, slots=True)
class ProfileRules:
    """Effect floors; docs/profiling.md gives the reasons.

    Attributes:
        slow_layer: a layer's block takes more than so many times the median of the other layers.
        slow_expert: an expert takes more than so many times what the other experts of its layer would for its rows.
        imbalance: share of the slowest rank's time that the others stand still.
        router_share, glue_share, wait_share: part of the block; glue is what is neither router, experts nor wait.
        roof_share: of what is attainable at a step's intensity; from there on the experts are bound by reading weights
            or by computing, and below it by neither.
        min_calls: fewer give no bottleneck.
    """

    slow_layer: float = 2.0
    slow_expert: float = 2.0
    imbalance: float = 0.2
    router_share: float = 0.25
    glue_share: float = 0.5
    wait_share: float = 0.25
    roof_share: float = 0.5
    min_calls: int = 20


@dataclass(frozen=True, slots=True)
class ProfileBottleneck:
    """One bottleneck, in the shape of a finding.

    Attributes:
        statistic: the median that the rule judged.
        lower_bound: below which it does not lie, with the confidence of docs/profiling.md.
        num_calls: calls, or forwards, that it is the median of.
        is_estimated: whether it rests on estimated times.
        since_step: first step of the calls looked at.
    """

    kind: BottleneckKind
    severity: Severity
    layer_index: int | None
    expert_id: int | None
    since_step: int | None
    statistic: float
    lower_bound: float
    num_calls: int = 0
    is_estimated: bool = False
    args: dict[str, str] = field(default_factory=dict)
    evidence: tuple[EvidenceRow, ...] = ()

    @property
    def code(self) -> str:
        """Key of its words in the message catalogue."""
        return f"profile_{self.kind.value}"

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain values."""
        return {"code": self.code, **asdict(self)}


@dataclass(frozen=True, slots=True)
class LayerTimesInput:
    """What the rules read of one layer: c calls of its block.

    Attributes:
        record: [c] which forward.
        block, router, glue, wait: [c] nanoseconds, NaN where unknown.
        expert_times: [c, E] nanoseconds of each expert, 0 where it had nothing; None where they are not measured.
        expert_rows: [c, E].
        rank_times: [c, R] nanoseconds of each expert-parallel rank's experts; None where there is no such thing.
        num_experts, first_step: of the layer.
        is_estimated: whether `rank_times` are.
    """

    record: npt.NDArray[np.int64]
    block: Floats
    router: Floats
    glue: Floats
    wait: Floats
    num_experts: int
    first_step: int | None = None
    expert_times: Floats | None = None
    expert_rows: npt.NDArray[np.int64] | None = None
    rank_times: Floats | None = None
    is_estimated: bool = False


def lower_median(values: npt.ArrayLike, error: float = _ERROR) -> tuple[float, float]:
    """Return the median of a series, and a lower bound that exceeds the true median with probability `error` at most.

    Args:
        values: [n] in time; NaN is left out. Cut into min(20, n) contiguous blocks.

    Returns:
        (median, bound); the bound is -inf where there are too few blocks for such an error.
    """
    series = np.asarray(values, np.float64)
    series = series[np.isfinite(series)]
    if not len(series):
        return float("nan"), float("-inf")
    medians = np.sort([np.median(block) for block in np.array_split(series, min(_BLOCKS, len(series)))])
    n, below, rank = len(medians), 0.0, 0
    # P(k-th smallest > median) = P(fewer than k of n lie below it).
    while rank < n:
        below += math.comb(n, rank) * 0.5**n
        if below > error:
            break
        rank += 1
    return float(np.median(series)), float(medians[rank - 1]) if rank else float("-inf")


def imbalance_cost(rank_times: npt.ArrayLike) -> float:
    """Return the share of the critical path that ranks stand still: 1 - sum of means / sum of per-step maxima.

    Args:
        rank_times: [c, R] time of each rank in each call. The maxima are taken before the sum: each call waits for its
            own slowest rank.
    """
    times = np.asarray(rank_times, np.float64)
    slowest = float(times.max(axis=1).sum()) if times.size else 0.0
    return 1.0 - float(times.mean(axis=1).sum()) / slowest if slowest > 0 else float("nan")


def find_bottlenecks(
    layers: Mapping[int, LayerTimesInput],
    rooflines: Sequence[Roofline] = (),
    rules: ProfileRules = ProfileRules(),
) -> tuple[ProfileBottleneck, ...]:
    """Return the bottlenecks, the strongest first, relative to their floors."""
    num_tests = sum(4 + (1 if each.rank_times is not None else 0) for each in layers.values())
    num_tests += sum(each.num_experts for each in layers.values() if each.expert_times is not None)
    # Each side of the ridge, and each side of the floor below the roof.
    num_tests += 4
    judge = _Judge(rules, _ERROR / max(1, num_tests))
    found: list[tuple[float, ProfileBottleneck]] = []
    for layer, ratios in _layer_ratios(layers).items():
        found += judge.ratio(BottleneckKind.SLOW_LAYER, rules.slow_layer, layer, layers[layer], ratios)
    for layer, own in layers.items():
        for kind, part, floor in (
            (BottleneckKind.ROUTER_SHARE, own.router, rules.router_share),
            (BottleneckKind.GLUE_SHARE, own.glue, rules.glue_share),
            (BottleneckKind.WAIT_SHARE, own.wait, rules.wait_share),
        ):
            found += judge.ratio(kind, floor, layer, own, part / np.where(own.block > 0, own.block, np.nan))
        found += _slow_experts(judge, layer, own)
        if own.rank_times is not None:
            cost = 1 - own.rank_times.mean(axis=1) / np.maximum(own.rank_times.max(axis=1), 1e-9)
            found += judge.ratio(BottleneckKind.EXPERT_IMBALANCE, rules.imbalance, layer, own, cost)
    found.sort(key=lambda each: -each[0])
    return tuple(each for _, each in found) + tuple(judge.whole_step(rooflines))


class _Judge:
    def __init__(self, rules: ProfileRules, error: float) -> None:
        self.rules = rules
        self._error = error

    def ratio(
        self,
        kind: BottleneckKind,
        floor: float,
        layer: int,
        own: LayerTimesInput,
        values: Floats,
        expert: int | None = None,
    ) -> list[tuple[float, ProfileBottleneck]]:
        """Return the bottleneck that a series of ratios or shares shows, if any."""
        num_calls = int(np.isfinite(values).sum())
        if num_calls < self.rules.min_calls:
            return []
        middle, low = lower_median(values, self._error)
        if low <= floor:
            return []
        unit = "x" if kind in (BottleneckKind.SLOW_LAYER, BottleneckKind.SLOW_EXPERT) else "share"
        place = {"layer": str(layer)} | ({} if expert is None else {"expert": str(expert)})
        bottleneck = ProfileBottleneck(
            kind=kind,
            severity=Severity.WARNING,
            layer_index=layer,
            expert_id=expert,
            since_step=own.first_step,
            statistic=middle,
            lower_bound=low,
            num_calls=num_calls,
            is_estimated=own.is_estimated and kind is BottleneckKind.EXPERT_IMBALANCE,
            args={**place, "value": _shown(middle, unit), "low": _shown(low, unit), "floor": _shown(floor, unit)},
            evidence=(
                EvidenceRow(f"profile_{kind.value}", middle, f"> {floor:g}", None, num_calls, unit),
                EvidenceRow(f"profile_{kind.value}_low", low, f"> {floor:g}", None, num_calls, unit),
            ),
        )
        return [(low / floor, bottleneck)]

    def whole_step(self, rooflines: Sequence[Roofline]) -> list[ProfileBottleneck]:
        """Return what limits the experts of the whole model: reading weights, computing, or neither of the two.

        Nothing where an interval reaches over the floor or over the ridge.
        """
        whole = next((each for each in rooflines if each.layer_index < 0), None)
        if whole is None or whole.peak is None or len(whole.points) < self.rules.min_calls:
            return []
        floor, ridge = self.rules.roof_share, whole.peak.ridge
        share, low, high = _interval(whole.shares, self._error)
        intensity, least, most = _interval(whole.points.intensity, self._error)
        if high < floor:
            kind, statistic, bound = BottleneckKind.BELOW_ROOF, 1 - share, 1 - high
        elif low >= floor and (most < ridge or least > ridge):
            kind = BottleneckKind.MEMORY_BOUND if most < ridge else BottleneckKind.COMPUTE_BOUND
            statistic, bound = share, low
        else:
            return []
        rule = f"< {floor:g}" if kind is BottleneckKind.BELOW_ROOF else f">= {floor:g}"
        edge = high if kind is BottleneckKind.BELOW_ROOF else low
        num_calls = len(whole.points)
        return [
            ProfileBottleneck(
                kind=kind,
                severity=Severity.INFO,
                layer_index=None,
                expert_id=None,
                since_step=int(whole.points.step[0]),
                statistic=statistic,
                lower_bound=bound,
                num_calls=num_calls,
                args={
                    "value": f"{intensity:.2g}",
                    "ridge": f"{ridge:.2g}",
                    "experts": f"{whole.median('distinct_experts'):.0f}",
                    "share": _shown(share, "share"),
                    "bound": _shown(edge, "share"),
                    "floor": _shown(floor, "share"),
                },
                evidence=(
                    EvidenceRow("profile_roof_share", share, rule, None, num_calls, "share"),
                    EvidenceRow("profile_roof_share_bound", edge, rule, None, num_calls, "share"),
                    EvidenceRow("profile_intensity", intensity, "", ridge, num_calls, "FLOP/byte"),
                ),
            )
        ]


def _interval(values: Floats, error: float) -> tuple[float, float, float]:
    """Return the median, and a lower and an upper bound of it, each with that error."""
    middle, low = lower_median(values, error)
    # An upper bound is a lower bound of what is turned round.
    return middle, low, -lower_median(-values, error)[1]


def _shown(value: float, unit: str) -> str:
    if unit == "x":
        return f"{value:.1f}x"
    return f"{value:.2%}" if abs(value) < 0.01 else f"{value:.1%}" if abs(value) < 0.1 else f"{value:.0%}"


def _layer_ratios(layers: Mapping[int, LayerTimesInput]) -> dict[int, Floats]:
    """Return for each layer, by forward, its block's time over the median of the other layers'."""
    if len(layers) < 2:
        return {}
    num_records = max((int(own.record.max(initial=-1)) for own in layers.values()), default=-1) + 1
    times = np.full((num_records, len(layers)), np.nan)
    for column, own in enumerate(layers.values()):
        total = np.bincount(own.record, own.block, minlength=num_records)
        called = np.bincount(own.record, minlength=num_records) > 0
        times[called, column] = total[called]
    whole = times[np.isfinite(times).all(axis=1)]
    if not len(whole):
        return {}
    return {
        layer: whole[:, column] / np.median(np.delete(whole, column, axis=1), axis=1)
        for column, layer in enumerate(layers)
    }


def _slow_experts(judge: _Judge, layer: int, own: LayerTimesInput) -> list[tuple[float, ProfileBottleneck]]:
    if own.expert_times is None or own.expert_rows is None or own.num_experts < 2:
        return []
    found = []
    is_called = own.expert_rows > 0
    for expert in range(own.num_experts):
        called = is_called[:, expert]
        if called.sum() < judge.rules.min_calls:
            continue
        others = is_called.copy()
        others[:, expert] = False
        # Judged by what the others take: a slow expert must not raise its own measure.
        fitted = expert_call_model(own.expert_rows[others], own.expert_times[others])
        if fitted is None:
            continue
        said = fitted[0] + fitted[1] * own.expert_rows[called, expert]
        values = own.expert_times[called, expert] / np.maximum(said, 1e-9)
        found += judge.ratio(BottleneckKind.SLOW_EXPERT, judge.rules.slow_expert, layer, own, values, expert)
    return found
