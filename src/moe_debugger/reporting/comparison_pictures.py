"""The pictures of a comparison, by layer."""

from collections.abc import Sequence

import numpy as np

from moe_debugger.reporting.content import Cell, Heatmap, HeatmapRow, Line, Lines, Picture, Table, known, say
from moe_debugger.reporting.layer_diff import LayerDiff
from moe_debugger.reporting.material import Material

__all__ = ["comparison_pictures"]

_HOT = 3.0


def comparison_pictures(layers: Sequence[LayerDiff], a: Material, b: Material) -> list[Picture]:
    """Return the pictures; those that have nothing to show say so."""
    x = [float(layer.layer_index) for layer in layers]
    return [_drift(layers, x), _overlap(layers, x), _change(layers, a, b)]


def _drift(layers: Sequence[LayerDiff], x: list[float]) -> Picture:
    title, caption = say("picture.drift"), say("caption.drift")
    across, floor = [layer.across_bits for layer in layers], [layer.noise_floor_bits for layer in layers]
    numbers = [value for value in (*across, *floor) if value is not None]
    if not numbers:
        return Picture(key="drift", title=title, caption=caption, why_not=say("missing.not_compared"))
    lines = [Line(name="across", x=x, y=across, is_named=True), Line(name="noise floor", x=x, y=floor, is_named=True)]
    data = Lines(x_title="layer", y_title="JS, bits", lines=lines, y_max=max(1.15 * max(numbers), 1e-6))
    return Picture(key="drift", title=title, caption=caption, data=data)


def _overlap(layers: Sequence[LayerDiff], x: list[float]) -> Picture:
    title, caption = say("picture.overlap"), say("caption.overlap")
    overlap = [layer.overlap for layer in layers]
    if all(value is None for value in overlap):
        return Picture(key="overlap", title=title, caption=caption, why_not=say("missing.not_compared"))
    chance = [layer.chance_overlap for layer in layers]
    lines = [Line(name="overlap", x=x, y=overlap, is_named=True), Line(name="chance", x=x, y=chance, is_named=True)]
    data = Lines(x_title="layer", y_title="overlap", lines=lines, y_max=1.05)
    return Picture(key="overlap", title=title, caption=caption, data=data)


def _change(layers: Sequence[LayerDiff], a: Material, b: Material) -> Picture:
    rows: list[HeatmapRow] = []
    table: list[list[Cell]] = []
    for layer in layers:
        share_a, share_b = (np.asarray(each.analysis.metrics[layer.layer_index].share) for each in (a, b))
        with np.errstate(invalid="ignore", divide="ignore"):
            ratio = np.where(share_a > 0, share_b / share_a, np.where(share_b > 0, 2.0**_HOT, np.nan))
        rows.append(
            HeatmapRow(
                layer_index=layer.layer_index,
                num_experts=layer.num_experts,
                top_k=layer.top_k,
                values=[known(round(float(value), 4)) for value in ratio],
            )
        )
        table += [
            [layer.layer_index, f"E{change.expert_id}", change.share_a, change.share_b] for change in layer.changes
        ]
    title, caption = say("picture.change"), say("caption.change")
    if not rows:
        return Picture(key="change", title=title, caption=caption, why_not=say("missing.not_compared"))
    data = Heatmap(rows=rows, hot=_HOT, value_name="times its share in the first")
    columns = ["layer", "expert", "share in the first", "share in the second"]
    return Picture(key="change", title=title, caption=caption, data=data, table=Table(columns=columns, rows=table))
