"""What the pictures show, as numbers; `svg.py` draws them. Each has a table that says the same.

All are per layer. Where something was not captured a picture says so instead of being empty.
"""

from collections.abc import Mapping

import numpy as np

from moe_debugger.reporting.content import Cell, Heatmap, HeatmapRow, Line, Lines, Picture, Table, known, picture, say
from moe_debugger.reporting.load_scores import collapse_limit
from moe_debugger.reporting.material import Material
from moe_debugger.reporting.row_pictures import coactivation, drops, tokens, transitions
from moe_debugger.reporting.step_series import effective_over_steps

__all__ = ["pictures"]

_NUM_NAMED = 6
_MAX_LORENZ_POINTS = 33
# At k = 1 this leaves a perfectly balanced layer at 0.97 E at least.
_TOKENS_PER_EXPERT = 16
# A table of every expert of every layer is read by nobody beyond this; JSON has them all.
_MAX_FULL_CELLS = 512


def pictures(material: Material, token_texts: Mapping[int, str] | None = None) -> list[Picture]:
    """Return all pictures in the order in which they are shown.

    Args:
        material: what was recorded.
        token_texts: text of a token by its id; ids stand alone without it.
    """
    return [
        _load(material),
        _over_steps(material),
        _lorenz(material),
        coactivation(material),
        transitions(material),
        drops(material),
        tokens(material, token_texts or {}),
    ]


def _load(material: Material) -> Picture:
    rows, table = [], []
    for index, metrics in material.analysis.metrics.items():
        ratios = np.asarray(metrics.share, np.float64) * metrics.num_experts
        rows.append(
            HeatmapRow(
                layer_index=index,
                num_experts=metrics.num_experts,
                top_k=metrics.top_k,
                values=[known(round(float(ratio), 4)) for ratio in ratios],
            )
        )
        table.append((index, metrics, ratios))
    if not any(metrics.num_assignments for _, metrics, _ in table):
        return picture("load", say("missing.no_load"))
    cells: list[list[Cell]]
    if sum(len(ratios) for _, _, ratios in table) <= _MAX_FULL_CELLS:
        columns = ["layer", *(f"E{e}" for e in range(max(len(ratios) for _, _, ratios in table)))]
        width = len(columns) - 1
        cells = [[i, *(known(r) for r in ratios), *([None] * (width - len(ratios)))] for i, _, ratios in table]
        note = None
    else:
        columns = ["layer", "experts", "most loaded", "× fair", "least loaded", "× fair", "unused", "assignments"]
        cells = []
        for index, metrics, ratios in table:
            if not metrics.num_assignments:
                continue
            most, least = int(ratios.argmax()), int(ratios.argmin())
            cells.append([
                index, metrics.num_experts, f"E{most}", float(ratios[most]), f"E{least}", float(ratios[least]),
                metrics.num_unused, metrics.num_assignments,
            ])  # fmt: skip
        note = say("note.all_in_json")
    return picture("load", data=Heatmap(rows=rows), table=Table(columns=columns, rows=cells, note=note))


def _over_steps(material: Material) -> Picture:
    series = {}
    for index, steps in material.steps.items():
        experts = steps.counts.shape[1]
        # Few tokens read low, whatever the router does.
        steps = steps.at_least(_TOKENS_PER_EXPERT * experts)
        if len(steps.first_steps) >= 2 and experts > 1:
            series[index] = (steps, effective_over_steps(steps.counts) / experts)
    if not series:
        return picture("over_steps", say("missing.no_steps"))
    lowest = {index: float(np.nanmin(values)) for index, (_, values) in series.items()}
    named = sorted(lowest, key=lambda index: (lowest[index], index))[:_NUM_NAMED]
    lines = [
        Line(
            name=f"layer {index}",
            x=[float(step) for step in steps.first_steps],
            y=[known(round(float(value), 4)) for value in values],
            is_named=index in named,
        )
        for index, (steps, values) in series.items()
    ]
    some = next(iter(series))
    info = material.layers[some]
    guides = [
        (material.thresholds.load_balance, "skew begins"),
        (collapse_limit(info.num_experts, max(1, info.top_k), material.thresholds) / info.num_experts, "collapse"),
    ]
    rows: list[list[Cell]] = [
        [
            index,
            int(steps.first_steps[0]),
            steps.last_step,
            len(steps.first_steps),
            int(np.median(steps.num_tokens)),
            float(values[0]),
            lowest[index],
            int(steps.first_steps[int(np.nanargmin(values))]),
            float(values[-1]),
        ]
        for index, (steps, values) in series.items()
    ]
    columns = ["layer", "from step", "to step", "points", "tokens each", "first", "lowest", "at step", "last"]
    data = Lines(x_title="step", y_title="effective experts / E", lines=lines, guides=guides)
    return picture("over_steps", data=data, table=Table(columns=columns, rows=rows))


def _lorenz(material: Material) -> Picture:
    known_metrics = {i: m for i, m in material.analysis.metrics.items() if m.num_assignments and m.num_experts > 1}
    if not known_metrics:
        return picture("lorenz", say("missing.no_load"))
    named = sorted(known_metrics, key=lambda index: (-known_metrics[index].gini, index))[:_NUM_NAMED]
    lines, rows = [], []
    for index, metrics in known_metrics.items():
        shares = np.sort(np.asarray(metrics.share))
        curve = np.r_[0.0, np.cumsum(shares)]
        at = np.unique(np.linspace(0, len(shares), min(_MAX_LORENZ_POINTS, len(shares) + 1)).round().astype(int))
        lines.append(
            Line(
                name=f"layer {index}",
                x=[round(float(x), 4) for x in at / len(shares)],
                y=[round(float(y), 4) for y in curve[at]],
                is_named=index in named,
            )
        )
        tenth = max(1, round(len(shares) / 10))
        rows.append([
            index, metrics.gini, metrics.effective_experts, metrics.num_experts, float(shares[-tenth:].sum()), tenth,
            metrics.num_assignments,
        ])  # fmt: skip
    lines.append(Line(name="even", x=[0.0, 1.0], y=[0.0, 1.0]))
    columns = ["layer", "Gini", "effective experts", "E", "share of the most loaded", "of them", "assignments"]
    data = Lines(x_title="share of experts, least loaded first", y_title="share of load", lines=lines)
    return picture("lorenz", data=data, table=Table(columns=columns, rows=rows))
