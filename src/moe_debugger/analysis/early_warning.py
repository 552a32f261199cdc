"""Early warning of a router's collapse: which layers are losing experts, since when, at which stated false alarm rate.

A collapse is a slide. By the time that a layer's long-run load proves it (`router_collapse`), most experts are idle.
The chart of `moe_debugger.analysis.collapse_chart` watches each layer's effective experts step by step instead, and
warns while they fall. It is for training, where every step draws from one mix of data: in serving, another kind of text
moves the load by more than a collapse does in its first steps.

The rate at which it warns of nothing was measured, not assumed (docs/early-warning.md): on autocorrelated noise and on
that of small counts, with baselines from 100 steps, a page warns falsely less than once in `PAGE_RUN_LENGTH` steps,
however many layers it has. Loads of a few slots are noise that no chart can be sure of: neighbouring steps are summed
until a point holds `min_slots` of them.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from moe_debugger.analysis.collapse_chart import Alarm, ChartResult, ChartSettings, run_chart
from moe_debugger.analysis.findings import EvidenceRow, Finding, FindingKind, Severity
from moe_debugger.errors import InvalidInputError

__all__ = [
    "PAGE_RUN_LENGTH",
    "LayerSeries",
    "LayerWarning",
    "WarningReport",
    "WarningStatus",
    "collapse_warnings",
    "min_slots",
    "warning_findings",
]

# In-control run length of a whole page, in steps, as measured in docs/early-warning.md: on AR(1) noise by the statistic
# alone, on loads of few slots with the effect floor. A deeper floor only makes alarms rarer.
PAGE_RUN_LENGTH = 1e5
# The entropy of fewer slots scatters too far, and further down than up: measured in docs/early-warning.md.
_MIN_SLOTS = 64
_MIN_SLOTS_PER_EXPERT = 4

_Floats = npt.NDArray[np.float64]
_Rows = npt.NDArray[np.intp]


def min_slots(num_experts: int) -> int:
    """Return how many slots (tokens x k) a point must hold to be judged: 96 of 8 experts, 1,088 of 256."""
    return _MIN_SLOTS + _MIN_SLOTS_PER_EXPERT * num_experts


class WarningStatus(StrEnum):
    """What is known of a layer: nothing yet, no fall, a fall, or that the question makes no sense."""

    LEARNING = "learning"
    WATCHING = "watching"
    WARNED = "warned"
    NOT_APPLICABLE = "not_applicable"


@dataclass(frozen=True, slots=True)
class LayerSeries:
    """What one layer did over the steps, as points of a step or of some neighbouring ones, in ascending order.

    Attributes:
        first_steps, last_steps: [n] uint64, the first and the last step of each point; missing ones are gaps.
        log_effective: [n] float64, ln of the effective experts (the load entropy in nats); NaN where there is no load.
        num_tokens: [n], what each point was counted over.
        num_experts: E; 0 = not known.
        max_over_mean, router_entropy: [n] float64, shown as evidence where given. Neither decides anything.

    Raises:
        InvalidInputError: lengths differ, or steps do not ascend.
    """

    first_steps: npt.NDArray[np.uint64]
    last_steps: npt.NDArray[np.uint64]
    log_effective: _Floats
    num_tokens: npt.NDArray[np.integer] | _Floats
    num_experts: int = 0
    max_over_mean: _Floats | None = None
    router_entropy: _Floats | None = None

    def __post_init__(self) -> None:
        columns = (self.last_steps, self.log_effective, self.num_tokens, self.max_over_mean, self.router_entropy)
        lengths = {len(self.first_steps), *(len(column) for column in columns if column is not None)}
        if len(lengths) > 1:
            raise InvalidInputError(f"a layer's series has columns of {sorted(lengths)} points; give equal lengths")
        if (self.last_steps < self.first_steps).any() or (self.first_steps[1:] <= self.last_steps[:-1]).any():
            raise InvalidInputError("points of a layer's series overlap; give steps that ascend, in points 1 or wider")

    @classmethod
    def from_loads(
        cls,
        first_steps: npt.NDArray[np.uint64],
        counts: npt.NDArray[np.integer],
        num_tokens: npt.NDArray[np.integer],
        *,
        width: int = 1,
        router_entropy: _Floats | None = None,
    ) -> Self:
        """Return the series of loads, neighbouring ones summed until a point holds `min_slots`.

        Slots that are too few for a point at the end are left out until more come.

        Args:
            first_steps: [n], the first step of each row of `counts`, ascending.
            counts: [n, E], load per expert.
            num_tokens: [n], valid tokens.
            width: steps that a row holds.
            router_entropy: [n], nats a token.

        The entropy of each point is corrected for its size by (E - 1) / (2 N) nats (Miller 1955), at most to ln E.

        Raises:
            InvalidInputError: lengths differ, or steps are not `width` apart at least.
        """
        steps, table, tokens = np.asarray(first_steps, np.uint64), np.asarray(counts), np.asarray(num_tokens)
        lengths = {len(steps), len(table), len(tokens), *(() if router_entropy is None else (len(router_entropy),))}
        if len(lengths) > 1 or width < 1:
            raise InvalidInputError(
                f"a layer's loads have columns of {sorted(lengths)} rows, {width} steps a row; give equal lengths, and "
                "1 step a row at least"
            )
        experts = table.shape[1]
        kept, starts, ends = _pooled(table.sum(axis=1), min_slots(experts))
        table = _sums(table[kept], starts).astype(np.float64)
        size = table.sum(axis=1)
        share = table / size[:, None]
        entropy = -(share * np.log(share, where=share > 0, out=np.zeros_like(share))).sum(axis=1)
        corrected = np.minimum(entropy + (experts - 1) / (2 * size), math.log(max(experts, 1)))
        if router_entropy is not None:
            weight = np.where(np.isfinite(router_entropy), tokens, 0)[kept]
            total = _sums(weight, starts)
            summed = _sums(weight * np.nan_to_num(router_entropy[kept]), starts)
            router_entropy = np.divide(summed, total, out=np.full(len(starts), np.nan), where=total > 0)
        return cls(
            first_steps=steps[kept][starts],
            last_steps=steps[kept][ends] + np.uint64(width - 1),
            log_effective=corrected,
            num_tokens=_sums(tokens[kept], starts),
            num_experts=experts,
            max_over_mean=table.max(axis=1, initial=0) * experts / size,
            router_entropy=router_entropy,
        )


def _pooled(slots: npt.NDArray[np.integer], enough: int) -> tuple[_Rows, _Rows, _Rows]:
    """Return the rows with load that make up whole points, and where among them each point starts and ends."""
    kept = np.flatnonzero(slots)
    starts, ends, held = [0], [], 0
    for row, number in enumerate(slots[kept].tolist()):
        held += number
        if held >= enough:
            ends.append(row)
            starts.append(row + 1)
            held = 0
    return kept[: starts[-1]], np.array(starts[:-1], np.intp), np.array(ends, np.intp)


def _sums(values: npt.NDArray[Any], starts: _Rows) -> npt.NDArray[Any]:
    """Return the sums of `values` from each start to the next."""
    return np.add.reduceat(values, starts) if len(starts) else values[:0]


@dataclass(frozen=True, slots=True)
class LayerWarning:
    """What the chart says about one layer.

    Attributes:
        statistic: the chart's sum: at the alarm where the layer is warned of, else now. NaN while learning.
        threshold: what `statistic` must pass; it grows with the number of layers and with phi. NaN while learning.
        baseline: effective experts of the baseline, at the alarm or now; None while learning.
        effective_experts: geometric mean of the two points up to the alarm, or the newest point; None without one.
        since_step: estimate of the first step of the fall; None where not warned.
        warned_at_step: last step of the point that raised the alarm; None where not warned.
        autocorrelation, noise: of the baseline: phi (raised, see the chart) and the innovations' scale in ln experts.
        num_points: points with load that were given.
        is_fast: whether it is warned of by the size of a fast fall, which `statistic` and `threshold` then tell in
            standard deviations.
        earlier: (warned_at_step, recovered_at_step) of alarms that the layer recovered from.
        evidence: further rows (max/mean, router entropy) before and now, where the series has them.
    """

    layer_index: int
    status: WarningStatus
    num_experts: int
    num_points: int = 0
    statistic: float = float("nan")
    threshold: float = float("nan")
    baseline: float | None = None
    effective_experts: float | None = None
    since_step: int | None = None
    warned_at_step: int | None = None
    autocorrelation: float | None = None
    noise: float | None = None
    is_fast: bool = False
    earlier: tuple[tuple[int, int], ...] = ()
    evidence: tuple[EvidenceRow, ...] = ()


@dataclass(frozen=True, slots=True)
class WarningReport:
    """All layers of one page.

    Attributes:
        layers: by layer index.
        in_control_run_length: steps between false warnings of the whole page, at least; None with settings other than
            those that were measured.
    """

    layers: dict[int, LayerWarning]
    in_control_run_length: float | None

    @property
    def warned(self) -> tuple[int, ...]:
        """The layers that are warned of, in order."""
        return tuple(sorted(i for i, layer in self.layers.items() if layer.status is WarningStatus.WARNED))

    def false_alarms_per_1000_windows(self, window_steps: int) -> float | None:
        """Return at most how many windows of a thousand raise a false warning anywhere on the page."""
        return None if self.in_control_run_length is None else 1000 * window_steps / self.in_control_run_length


def collapse_warnings(series: Mapping[int, LayerSeries], *, settings: ChartSettings | None = None) -> WarningReport:
    """Return which layers are losing experts.

    What it says at a step depends on nothing later: with more points of the same width, an alarm stays where it was. So
    looking again and again does not raise the error rate.

    Args:
        series: of each layer. Layers are charted one by one and never pooled.
        settings: None = those whose run length is stated.
    """
    chosen = settings or ChartSettings()
    groups: dict[tuple[bytes, bytes], list[int]] = {}
    columns: dict[int, tuple[_Floats, _Floats, _Floats, _Rows]] = {}
    report: dict[int, LayerWarning] = {}
    for index, layer in sorted(series.items()):
        if layer.num_experts == 1:
            report[index] = LayerWarning(index, WarningStatus.NOT_APPLICABLE, 1)
            continue
        kept = np.flatnonzero(np.isfinite(layer.log_effective))
        steps = layer.first_steps[kept].astype(np.float64)
        tokens = np.asarray(layer.num_tokens, np.float64)[kept]
        columns[index] = (layer.log_effective[kept], steps, tokens, kept)
        groups.setdefault((steps.tobytes(), tokens.tobytes()), []).append(index)
    for members in groups.values():
        _, steps, tokens, _ = columns[members[0]]
        values = np.stack([columns[index][0] for index in members], axis=1)
        result = run_chart(values, steps, tokens, chosen, num_series=len(columns))
        for position, index in enumerate(members):
            kept = columns[index][3]
            report[index] = _layer_warning(index, series[index], kept, result, position)
    is_measured = chosen == ChartSettings(min_fall=max(chosen.min_fall, ChartSettings().min_fall))
    return WarningReport(dict(sorted(report.items())), PAGE_RUN_LENGTH if is_measured else None)


def _layer_warning(
    index: int,
    series: LayerSeries,
    kept: _Rows,
    result: ChartResult,
    position: int,
) -> LayerWarning:
    first, last = series.first_steps[kept], series.last_steps[kept]
    earlier = tuple(
        (int(last[alarm.index]), int(last[alarm.recovered]))
        for alarm in result.alarms
        if alarm.series == position and alarm.recovered is not None
    )
    alarm, noise = result.open_alarm(position), result.noise
    if alarm is not None:
        return LayerWarning(
            index,
            WarningStatus.WARNED,
            series.num_experts,
            num_points=len(kept),
            statistic=alarm.statistic,
            threshold=alarm.threshold,
            baseline=math.exp(alarm.level),
            effective_experts=math.exp(alarm.value),
            since_step=int(first[alarm.since]),
            warned_at_step=int(last[alarm.index]),
            autocorrelation=alarm.phi,
            noise=alarm.scale,
            is_fast=alarm.is_fast,
            earlier=earlier,
            evidence=_further_evidence(series, kept, alarm),
        )
    newest = math.exp(float(series.log_effective[kept[-1]])) if len(kept) else None
    if result.is_learning or noise is None:
        return LayerWarning(
            index,
            WarningStatus.LEARNING,
            series.num_experts,
            num_points=len(kept),
            effective_experts=newest,
            earlier=earlier,
        )
    return LayerWarning(
        index,
        WarningStatus.WATCHING,
        series.num_experts,
        num_points=len(kept),
        statistic=float(result.statistic[position]),
        threshold=float(result.threshold[position]),
        baseline=math.exp(float(noise.level[position])),
        effective_experts=newest,
        autocorrelation=float(noise.phi[position]),
        noise=float(noise.scale[position]),
        earlier=earlier,
    )


def _further_evidence(series: LayerSeries, kept: _Rows, alarm: Alarm) -> tuple[EvidenceRow, ...]:
    """Return max/mean and router entropy of the two points up to the alarm, and of up to 100 before the fall."""
    rows = []
    now = kept[max(alarm.index - 1, 0) : alarm.index + 1]
    before = kept[max(alarm.since - 100, 0) : alarm.since]
    for metric, column, unit in (
        ("max_over_mean", series.max_over_mean, ""),
        ("mean_token_entropy", series.router_entropy, "nats"),
    ):
        if column is not None and np.isfinite(column[now]).any() and np.isfinite(column[before]).any():
            sample = int(np.asarray(series.num_tokens, np.float64)[now].sum())
            rows.append(
                EvidenceRow(
                    metric,
                    float(np.nanmedian(column[now])),
                    baseline=float(np.nanmedian(column[before])),
                    sample_size=sample,
                    unit=unit,
                )
            )
    return tuple(rows)


def warning_findings(report: WarningReport) -> list[Finding]:
    """Return a `collapse_warning` for each layer that is warned of."""
    return [_finding(report.layers[index], report.in_control_run_length) for index in report.warned]


def _finding(layer: LayerWarning, run_length: float | None) -> Finding:
    assert layer.baseline is not None
    assert layer.effective_experts is not None
    fall = 1 - layer.effective_experts / layer.baseline
    rule = f"> {layer.threshold:.3g}"
    evidence = [
        EvidenceRow("fall_in_deviations", layer.statistic, rule, sample_size=layer.num_points)
        if layer.is_fast
        else EvidenceRow("collapse_statistic", layer.statistic, rule, sample_size=layer.num_points),
        EvidenceRow(
            "effective_experts", layer.effective_experts, baseline=layer.baseline, sample_size=2, unit="experts"
        ),
        EvidenceRow("effective_experts_fall", 100 * fall, unit="%"),
        *layer.evidence,
    ]
    if run_length is not None:
        evidence.append(EvidenceRow("in_control_run_length", run_length, unit="steps"))
    return Finding(
        FindingKind.COLLAPSE_WARNING,
        Severity.WARNING,
        "collapse_warning",
        layer.layer_index,
        since_step=layer.since_step,
        args={
            "layer": str(layer.layer_index),
            "since": str(layer.since_step),
            "warned": str(layer.warned_at_step),
            "effective": f"{layer.effective_experts:.3g}",
            "baseline": f"{layer.baseline:.3g}",
            "experts": str(layer.num_experts) if layer.num_experts else "",
            "percent": f"{100 * fall:.0f}",
            "runLength": "not stated" if run_length is None else f"{run_length:,.0f}",
        },
        evidence=tuple(evidence),
        statistic=layer.statistic,
    )
