"""Tables of the subjects that are no token rows, from what sessions, recordings and the fleet hold."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_debugger.analysis import LayerMetrics, RoutingState, layer_metrics
from moe_debugger.analysis.metrics import expert_share
from moe_debugger.messages import render_finding
from moe_debugger.query.columns import KINDS, SEVERITIES, STATES
from moe_debugger.query.rows import LayerFacts
from moe_debugger.query.table import Column, Labels
from moe_debugger.v1 import session_pb2 as pb

__all__ = [
    "Table",
    "expert_table",
    "finding_table",
    "layer_table",
    "metrics_table",
    "request_table",
    "series_table",
    "texts",
]

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """All rows of a subject."""

    columns: Mapping[str, Column]
    num_rows: int


def texts(values: Sequence[str]) -> Column:
    """Return a column of texts; the empty one is missing."""
    names = list(dict.fromkeys(values))
    places = {name: place for place, name in enumerate(names)}
    codes = np.array([places[value] for value in values], np.int64)
    return Column(codes, np.array([not value for value in values], np.bool_), Labels(names))


def _integers(values: Sequence[int | None]) -> Column:
    missing = np.array([value is None for value in values], np.bool_)
    return Column(np.array([0 if value is None else value for value in values], np.int64), missing)


def _numbers(values: Sequence[float]) -> Column:
    return Column(np.array(values, np.float64))


def expert_table(
    layers: Sequence[LayerFacts],
    counts: Mapping[int, Array],
    *,
    weight_sums: Mapping[int, Array] | None = None,
    mean_probability: Mapping[int, Array] | None = None,
) -> Table:
    """Return the rows of `experts`.

    Args:
        counts: [E] assignments, by layer index; a layer without any has a row for each expert all the same.
        weight_sums: [E] sums of gate weights, mean_probability: [E], by layer index.
    """
    parts: dict[str, list[Array]] = {
        name: [] for name in ("layer", "expert", "assignments", "share", "load", "weight", "probability", "rank")
    }
    names: list[str] = []
    for layer in layers:
        size = layer.num_experts
        own = np.asarray(counts.get(layer.layer_index, np.zeros(size)), np.int64)
        share = expert_share(own)
        nan = np.full(size, np.nan)
        parts["layer"].append(np.full(size, layer.layer_index, np.int64))
        parts["expert"].append(np.arange(size))
        parts["assignments"].append(own)
        parts["share"].append(share)
        parts["load"].append(share * size)
        sums = (weight_sums or {}).get(layer.layer_index)
        with np.errstate(divide="ignore", invalid="ignore"):
            parts["weight"].append(nan if sums is None else np.where(own > 0, sums / own, np.nan))
        parts["probability"].append(np.asarray((mean_probability or {}).get(layer.layer_index, nan), np.float64))
        parts["rank"].append(np.array(layer.owners if len(layer.owners) == size else [-1] * size, np.int64))
        names += [layer.module] * size
    joined = {name: np.concatenate(arrays) if arrays else np.zeros(0) for name, arrays in parts.items()}
    return Table(
        {
            "layer": Column(joined["layer"]),
            "expert": Column(joined["expert"]),
            "assignments": Column(joined["assignments"]),
            "share": Column(joined["share"]),
            "load": Column(joined["load"]),
            "mean_gate_weight": Column(joined["weight"]),
            "mean_probability": Column(joined["probability"]),
            "rank": Column(joined["rank"], joined["rank"] < 0),
            "module": texts(names),
        },
        len(joined["layer"]),
    )


def layer_table(layers: Sequence[LayerFacts], state: RoutingState) -> Table:
    """Return the rows of `layers`; layers that routed nothing have no metrics."""
    metrics = {index: layer_metrics(layer) for index, layer in state.layers.items()}
    return metrics_table(layers, metrics)


# Columns of `layers` that are fields of `LayerMetrics`, which docs/metrics.md defines.
_METRICS = {
    "effective_experts": "effective_experts",
    "load_entropy": "load_entropy",
    "normalised_load_entropy": "normalised_load_entropy",
    "max_load": "max_over_mean",
    "cv": "cv",
    "gini": "gini",
    "jain": "jain",
    "confidence": "mean_confidence",
    "token_entropy": "mean_token_entropy",
    "margin": "mean_margin",
    "z_loss": "router_z_loss",
    "balancing_loss": "switch_balancing_loss",
    "dropped_share": "dropped_share",
}


def metrics_table(layers: Sequence[LayerFacts], metrics: Mapping[int, LayerMetrics]) -> Table:
    """Return the rows of `layers`, given their metrics by layer index."""
    found = [metrics.get(layer.layer_index) for layer in layers]
    columns = {
        "layer": Column(np.array([layer.layer_index for layer in layers], np.int64)),
        "module": texts([layer.module for layer in layers]),
        "stack": texts([layer.stack for layer in layers]),
        "num_experts": Column(np.array([layer.num_experts for layer in layers], np.int64)),
        "top_k": Column(np.array([layer.top_k for layer in layers], np.int64)),
        "tokens": Column(np.array([0 if each is None else each.num_tokens for each in found], np.int64)),
        "assignments": Column(np.array([0 if each is None else each.num_assignments for each in found], np.int64)),
        "hottest_expert": _integers(
            [None if each is None or each.hottest_expert < 0 else each.hottest_expert for each in found]
        ),
        "unused_experts": _integers(
            [layer.num_experts if each is None else each.num_unused for layer, each in zip(layers, found, strict=True)]
        ),
    }
    for name, metric in _METRICS.items():
        columns[name] = _numbers([float("nan") if each is None else getattr(each, metric) for each in found])
    return Table(columns, len(layers))


def request_table(
    request_ids: Sequence[str],
    tokens: Array,
    steps: Array | None = None,
    *,
    seen: Array | None = None,
    has_routes: Array | None = None,
) -> Table:
    """Return the rows of `requests`.

    Args:
        tokens: [n, 3] all, prefill and decode.
        steps: [n, 2] first and last, -1 = not known.
        seen: [n, 2] Unix seconds.
        has_routes: [n] bool; None = of all.
    """
    n = len(request_ids)
    steps = np.full((n, 2), -1) if steps is None else steps
    seen = np.full((n, 2), np.nan) if seen is None else seen
    return Table(
        {
            "request": texts(request_ids),
            "tokens": Column(tokens[:, 0]),
            "prefill_tokens": Column(tokens[:, 1]),
            "decode_tokens": Column(tokens[:, 2]),
            "first_step": Column(steps[:, 0], steps[:, 0] < 0),
            "last_step": Column(steps[:, 1], steps[:, 1] < 0),
            "first_seen": Column(seen[:, 0]),
            "last_seen": Column(seen[:, 1]),
            "has_routes": Column(np.ones(n, np.bool_) if has_routes is None else has_routes),
        },
        n,
    )


def finding_table(findings: Sequence[pb.Finding], now_ns: int = 0) -> Table:
    """Return the rows of `findings`; times and occurrences are missing where a finding has none.

    Args:
        now_ns: Unix time, for what is silenced.
    """

    def optional(name: str) -> Column:
        values = [int(getattr(each, name)) if each.HasField(name) else None for each in findings]  # type: ignore[arg-type]
        return _integers(values)

    def seen(name: str) -> Column:
        return _numbers([getattr(each, name) / 1e9 or float("nan") for each in findings])

    severity = np.array([each.severity for each in findings], np.int64)
    kind = np.array([each.kind if each.kind < len(KINDS) else 0 for each in findings], np.int64)
    return Table(
        {
            "severity": Column(severity, labels=Labels(SEVERITIES, is_ordered=True)),
            "kind": Column(kind, labels=Labels(KINDS)),
            "layer": optional("layer_index"),
            "expert": optional("expert_id"),
            "since_step": optional("since_step"),
            "statistic": _numbers([each.statistic for each in findings]),
            "summary": texts([render_finding(each.code, each.args) for each in findings]),
            "state": Column(
                np.array([min(each.state, len(STATES) - 1) for each in findings], np.int64), labels=Labels(STATES)
            ),
            "is_acknowledged": Column(np.array([each.acknowledged_at_unix_ns > 0 for each in findings], np.bool_)),
            "is_silenced": Column(np.array([each.silenced_until_unix_ns > now_ns for each in findings], np.bool_)),
            "rule": texts([each.rule_id for each in findings]),
            "code": texts([each.code for each in findings]),
            "occurrences": _integers([each.num_occurrences or None for each in findings]),
            "first_seen": seen("first_seen_at_unix_ns"),
            "last_seen": seen("last_seen_at_unix_ns"),
        },
        len(findings),
    )


def series_table(
    step: Array,
    name: Sequence[str],
    layer: Array,
    expert: Array,
    value: Array,
    *,
    rank: Array | None = None,
    source: Sequence[str] | None = None,
) -> Table:
    """Return the rows of `series`; a layer or expert of -1 is none."""
    n = len(step)
    return Table(
        {
            "step": Column(np.asarray(step)),
            "name": texts(name),
            "layer": Column(layer, layer < 0),
            "expert": Column(expert, expert < 0),
            "value": Column(np.asarray(value, np.float64)),
            "rank": Column(np.zeros(n, np.int64), np.ones(n, np.bool_)) if rank is None else Column(rank),
            "source": texts([""] * n if source is None else source),
        },
        n,
    )
