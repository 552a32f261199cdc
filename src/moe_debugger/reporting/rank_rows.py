"""Loads per step of a report's rows, for what ranks wait for: the last steps, as many as fit."""

from typing import TYPE_CHECKING

import numpy as np

from moe_debugger.planning import StepLoads, loads_from_decisions

if TYPE_CHECKING:
    from moe_debugger.reporting.material import Material

__all__ = ["loads_by_width"]

# Cells of [steps, layers, experts] in float64: 160 MB.
_MAX_CELLS = 20_000_000


def loads_by_width(material: "Material") -> dict[int, StepLoads]:
    """Return, by number of experts, the loads per step of the layers that have so many; the newest steps, at most
    20 million cells."""
    rows = material.rows
    if rows is None:
        return {}
    widths: dict[int, list[int]] = {}
    for index, info in material.layers.items():
        widths.setdefault(info.num_experts, []).append(index)
    layer_index, step = np.asarray(rows["layer_index"]), np.asarray(rows["step"])
    steps = np.unique(step)
    result = {}
    for experts, indices in sorted(widths.items()):
        most = max(1, _MAX_CELLS // (len(indices) * experts))
        first = steps[-most] if len(steps) > most else steps[0] if len(steps) else 0
        own = np.flatnonzero(np.isin(layer_index, indices) & (step >= first))
        place = np.zeros(max(indices) + 1, np.int64)
        place[indices] = np.arange(len(indices))
        columns = {name: np.asarray(rows[name])[own] for name in ("expert_ids", "step", "slot_status", "is_padding")}
        columns["layer_index"] = place[layer_index[own]]
        if len(own):
            result[experts] = loads_from_decisions(
                columns, num_experts=experts, num_layers=len(indices), step_column="step"
            )
    return result
