"""The public door: `analyze` for rows, `finish` for a folded state. ``analyze(rows)`` is ``finish(fold(rows))``."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from moe_debugger.analysis._columns import checked_columns, neighbour_blocks, size_of_layer
from moe_debugger.analysis._row_runs import RowsOf, rows_of_each
from moe_debugger.analysis.early_warning import WarningReport
from moe_debugger.analysis.findings import Finding, Severity, Thresholds
from moe_debugger.analysis.metrics import LayerMetrics
from moe_debugger.analysis.plugins import detector_view, installed_findings
from moe_debugger.analysis.rules import CaptureHealth, all_findings, look_at, watch_steps
from moe_debugger.analysis.sketch import hash_strings
from moe_debugger.analysis.state import LayerShape, RoutingState
from moe_debugger.errors import InvalidInputError
from moe_debugger.wire.codec import LayerColumns, RoutingColumns

if TYPE_CHECKING:
    from moe_debugger.analysis.explanation import Explanation

__all__ = ["Analysis", "analyze", "finish", "fold_decisions"]

# Measured by tests/slow/test_false_alarms.py, which tests both on every run; docs/metrics.md has the table.
FALSE_ALARM_RATE = 0.05
FALSE_ALARMS_PER_1000_WINDOWS = 10.0
_RATE_NOTE = (
    "at most 0.05 of calls on healthy data have any finding above info (all layers and rules together), and at most 10 "
    "of 1,000 windows of a live session, looked at one after another, open one: measured on simulated healthy routers "
    "(independent tokens, documents with design effects to 10, sticky routing, natural skew inside the floors) and on "
    "the demo model; data unlike these may behave otherwise"
)


@dataclass(frozen=True, slots=True)
class Analysis:
    """What was found.

    Attributes:
        metrics: of each layer, by layer index.
        findings: most severe first.
        num_requests: about how many different requests the rows came from.
        early_warning: where each layer stands with the early warning of collapse ("learning", "watching", "warned"),
            and its stated run length; None where the rows hold no steps of a training.
        false_alarm_rate: stated rate of any finding above `info` in one call on healthy data.
        false_alarms_per_1000_windows: stated number of windows of a healthy live session that open a finding above
            `info`, under repeated looks, for all layers together.
        false_alarm_note: on what they were measured, and which plug-ins' findings they leave out.
        problems: what was wrong with detectors of others (docs/detectors.md), one sentence each.
    """

    metrics: dict[int, LayerMetrics]
    findings: tuple[Finding, ...]
    num_requests: int
    early_warning: WarningReport | None = None
    false_alarm_rate: float = FALSE_ALARM_RATE
    false_alarms_per_1000_windows: float = FALSE_ALARMS_PER_1000_WINDOWS
    false_alarm_note: str = _RATE_NOTE
    problems: tuple[str, ...] = ()

    @property
    def worst(self) -> Severity | None:
        """The highest severity found, None without a finding."""
        return max((finding.severity for finding in self.findings), key=lambda severity: severity.rank, default=None)

    def explain(self, finding: Finding, **observed: Any) -> "Explanation":
        """Return where `finding` began, what goes with it and what to do, by what was observed.

        Args:
            observed: as of `moe_debugger.analysis.explanation.explain`: histories, settings, rows, placement...

        Raises:
            InvalidInputError: the finding is none of this analysis.
        """
        from moe_debugger.analysis.explanation import explain

        if finding not in self.findings:
            raise InvalidInputError(f"finding {finding.rule_id!r} is none of this analysis; take one of its findings")
        return explain(finding, **observed)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values."""
        return {
            "metrics": {index: metrics.to_dict() for index, metrics in self.metrics.items()},
            "findings": [finding.to_dict() for finding in self.findings],
            "num_requests": self.num_requests,
            "early_warning": None if self.early_warning is None else asdict(self.early_warning),
            "false_alarm_rate": self.false_alarm_rate,
            "false_alarms_per_1000_windows": self.false_alarms_per_1000_windows,
            "false_alarm_note": self.false_alarm_note,
            "problems": list(self.problems),
        }


def finish(
    state: RoutingState,
    *,
    thresholds: Thresholds | None = None,
    baseline: RoutingState | None = None,
    num_workloads: int = 1,
    health: CaptureHealth | None = None,
    expert_ranks: Mapping[int, npt.ArrayLike] | None = None,
) -> Analysis:
    """Return the metrics and findings of `state`.

    Args:
        state: folded rows.
        thresholds: None = the defaults.
        baseline: rows of the same model on the same workload while it was healthy (for training: earlier steps). Do
            not give one from other text: a router uses other experts for it, and that would read as a change.
        num_workloads: how many clearly different kinds of text the rows hold, if more is known than their labels tell.
        health: what is known of the capture.
        expert_ranks: [E] rank that holds each expert, by layer index, where experts are spread over ranks.

    Raises:
        InvalidInputError: the baseline is of another model, or `expert_ranks` of other layers.
    """
    if baseline is not None:
        _check_baseline(state, baseline)
    look = look_at(
        state,
        thresholds=thresholds or Thresholds(),
        baseline=baseline,
        num_workloads=num_workloads,
        health=health,
        expert_ranks=_ranks(state, expert_ranks or {}),
    )
    warnings = watch_steps(look)
    plugins = installed_findings(
        lambda: detector_view(
            state,
            look.metrics,
            thresholds=look.thresholds,
            baseline=look.baseline,
            num_workloads=look.num_workloads,
            health=health,
        )
    )
    findings = sorted((*all_findings(look, warnings), *plugins.findings), key=lambda finding: -finding.severity.rank)
    return Analysis(
        metrics=look.metrics,
        findings=tuple(findings),
        num_requests=state.num_requests,
        early_warning=warnings,
        false_alarm_note="; ".join(note for note in (_RATE_NOTE, plugins.note) if note),
        problems=plugins.problems,
    )


def _check_baseline(state: RoutingState, baseline: RoutingState) -> None:
    for index, layer in baseline.layers.items():
        if index in state.layers and state.layers[index].shape != layer.shape:
            raise InvalidInputError(
                f"layer {index}: the baseline has {layer.shape}, the rows {state.layers[index].shape}; "
                "a baseline must come from the same model"
            )


def _ranks(state: RoutingState, expert_ranks: Mapping[int, npt.ArrayLike]) -> dict[int, npt.NDArray[np.int64]]:
    ranks = {index: np.asarray(of_layer, np.int64) for index, of_layer in expert_ranks.items()}
    for index, of_layer in ranks.items():
        expected = (state.layers[index].shape.num_experts,) if index in state.layers else None
        if of_layer.shape != expected or of_layer.min(initial=0) < 0:
            raise InvalidInputError(
                f"expert_ranks of layer {index} has shape {of_layer.shape}, expected {expected}: a rank from 0 on for "
                "each expert of a layer that the rows have"
            )
    return ranks


def analyze(
    decisions: Mapping[str, Any],
    *,
    num_experts: int | Sequence[int],
    top_k: int | Sequence[int],
    num_identity_experts: int | Sequence[int] = 0,
    thresholds: Thresholds | None = None,
    baseline: Mapping[str, Any] | RoutingState | None = None,
    health: CaptureHealth | None = None,
    expert_ranks: Mapping[int, npt.ArrayLike] | None = None,
) -> Analysis:
    """Return the metrics and findings of captured decisions.

    Args:
        decisions: columns of equal length, one row per token and MoE layer, as `session.decisions()` gives them, or a
            table of them (pandas, polars, pyarrow; of the slots, columns of lists of k).
            Required: `layer_index`, `expert_ids` ([n, k], -1 where a slot reached no expert). Used where present:
            `request_id`, `step`, `forward_index`, `phase`, `position`, `is_padding`, `token_id`, `gate_weights`,
            `slot_status`, `margin`, `router_entropy`, `router_logsumexp`, `top1_probability`, and `workload`, a label
            of the kind of text. Rows without `request_id` are taken in blocks of up to 64 neighbours of one step, rows
            without `position` in the order in which they stand.
        num_experts: E, or one per layer index.
        top_k: k, or one per layer index.
        num_identity_experts: Z, experts that compute nothing, with the ids from E on; or one per layer index.
        thresholds: None = the defaults.
        baseline: healthy rows of the same model and workload, as columns or as a state.
        health: what is known of the capture.
        expert_ranks: [E] rank that holds each expert, by layer index, where experts are spread over ranks.

    Raises:
        InvalidInputError: a column is missing, or of another length or shape, or holds what it cannot: fractions, text,
            ids and other numbers out of range.
    """
    sizes: dict[str, Any] = {"num_experts": num_experts, "top_k": top_k, "num_identity_experts": num_identity_experts}
    state = fold_decisions(decisions, **sizes)
    if baseline is not None and not isinstance(baseline, RoutingState):
        baseline = fold_decisions(baseline, **sizes)
    return finish(state, thresholds=thresholds, baseline=baseline, health=health, expert_ranks=expert_ranks)


def fold_decisions(
    decisions: Mapping[str, Any],
    *,
    num_experts: int | Sequence[int],
    top_k: int | Sequence[int],
    num_identity_experts: int | Sequence[int] = 0,
) -> RoutingState:
    """Return the state of captured decisions; see `analyze` for the columns.

    Where rows have `request_id` and `position`, the merge of the states of parts is the state of the whole, for any
    split and order of the rows. Without them their place among the rows of the call takes their place: fold such rows
    in one call, in order.
    """
    columns = checked_columns(decisions, _USED)
    layer_index, ids = columns.pop("layer_index"), columns.pop("expert_ids")
    n = len(layer_index)
    if "step" not in columns and "forward_index" in columns:
        # What a step without a number is (docs/decisions.md).
        columns["step"] = columns["forward_index"]
    rows_of_layer = rows_of_each(layer_index)
    shapes = [
        LayerShape(
            i,
            size_of_layer(num_experts, i, "num_experts"),
            size_of_layer(top_k, i, "top_k"),
            size_of_layer(num_identity_experts, i, "num_identity_experts"),
        )
        for i in rows_of_layer
    ]
    state = RoutingState.empty(shapes)
    requests, request_index = _names(columns.pop("request_id", None), n)
    labels, label_index = _names(columns.pop("workload", None), n)
    label_hashes = None if labels is None else _label_hashes(labels)
    for shape in shapes:
        rows = rows_of_layer[shape.layer_index]
        part = _layer_columns(shape, rows, ids, columns, requests, request_index)
        workloads = None if label_hashes is None else label_hashes[rows.of(label_index)]
        state.fold(part, workloads=workloads)
    if requests is None and n:
        state.mark_unnamed()
    if "step" not in columns:
        for layer in state.layers.values():
            layer.first_step = layer.last_step = None
    return state


_ROW_COLUMNS: dict[str, tuple[str, int]] = {
    "step": ("<u8", 0),
    "forward_index": ("<u8", 0),
    "phase": ("u1", 0),
    "is_padding": ("?", 0),
}
_LAYER_COLUMNS = {
    "gate_weights": "<f4",
    "slot_status": "u1",
    "margin": "<f4",
    "router_entropy": "<f4",
    "router_logsumexp": "<f4",
    "top1_probability": "<f4",
}
_USED = {"expert_ids", "request_id", "workload", "position", "token_id", *_ROW_COLUMNS, *_LAYER_COLUMNS}


def _label_hashes(labels: list[str]) -> npt.NDArray[np.uint64]:
    """Return a hash of each label that is not 0, and 0 for ""."""
    return np.where([bool(label) for label in labels], hash_strings(labels) | np.uint64(1), np.uint64(0))


def _names(column: npt.NDArray[Any] | None, num_rows: int) -> tuple[list[str] | None, npt.NDArray[np.uint32]]:
    """Return the distinct names of a column, "" for None and NaN, and each row's index; None without the column."""
    if column is None:
        return None, np.zeros(num_rows, np.uint32)
    # Neighbours mostly share their request: sorting one row of each run is much less than sorting all.
    is_first = np.r_[True, column[1:] != column[:-1]][:num_rows]
    firsts = column[is_first]
    if firsts.dtype.kind == "O":
        # Texts, with None where a row has no name: a look-up for each run is much less than sorting texts.
        listed = firsts.tolist()
        places = {name: place for place, name in enumerate(dict.fromkeys(listed))}
        found: list[Any] = list(places)
        run_index = np.fromiter(map(places.__getitem__, listed), np.int64, len(listed))
    else:
        distinct, run_index = np.unique(firsts, return_inverse=True)
        found = distinct.tolist()
    index = np.repeat(run_index, np.diff(np.r_[np.flatnonzero(is_first), num_rows]))
    # NaN, the missing value of tables, is not equal to itself.
    return ["" if name is None or name != name else str(name) for name in found], index.astype(np.uint32)


def _layer_columns(
    shape: LayerShape,
    rows: RowsOf,
    ids: npt.NDArray[np.int32],
    columns: Mapping[str, npt.NDArray[Any]],
    requests: list[str] | None,
    request_index: npt.NDArray[np.uint32],
) -> RoutingColumns:
    n, k = len(rows), shape.top_k
    ids = rows.of(ids)
    if ids.shape[1] < k or (ids[:, k:] >= 0).any():
        raise InvalidInputError(
            f"layer {shape.layer_index}: expert_ids has {ids.shape[1]} columns, expected top_k = {k}"
        )
    if requests is None:
        steps = rows.of(columns["step"]) if "step" in columns else None
        blocks = neighbour_blocks(n, steps)
        names, index = [f"rows {block}" for block in range(int(blocks.max(initial=-1)) + 1)], blocks.astype(np.uint32)
    else:
        names, index = requests, rows.of(request_index)

    def column_of(name: str) -> npt.NDArray[Any]:
        return rows.of(columns[name])

    row_values: dict[str, Any] = {
        name: column_of(name).astype(dtype, copy=False) if name in columns else np.full(n, default, dtype)
        for name, (dtype, default) in _ROW_COLUMNS.items()
    }
    layer = LayerColumns(
        shape.layer_index,
        shape.num_experts,
        np.ascontiguousarray(ids[:, :k]),
        num_identity_experts=shape.num_identity_experts,
    )
    for name, dtype in _LAYER_COLUMNS.items():
        if name in columns:
            values = column_of(name).astype(dtype, copy=False)
            setattr(layer, name, np.ascontiguousarray(values[:, :k]) if values.ndim == 2 else values)
    position = column_of("position") if "position" in columns else _running_index(index)
    token_id = column_of("token_id").astype(np.uint32, copy=False) if "token_id" in columns else None
    return RoutingColumns(
        **row_values,
        request_ids=names,
        request_index=index,
        position=position.astype(np.uint32, copy=False),
        token_id=token_id,
        layers=[layer],
    )


def _running_index(groups: npt.NDArray[np.uint32]) -> npt.NDArray[np.int64]:
    """Return for each row how many rows of its group came before it."""
    order = np.argsort(groups, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(groups[order]) > 0])
    lengths = np.diff(np.r_[starts, len(groups)])
    running = np.empty(len(groups), np.int64)
    running[order] = np.arange(len(groups)) - np.repeat(starts, lengths)
    return running
