"""Loads per step: what each expert of each MoE layer was given in each step of a window.

A step is what the ranks do together: they wait for each other at every MoE layer of it. One forward of the model is one
step; the rows of data-parallel ranks with the same step number add up.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_debugger.errors import InvalidInputError

__all__ = ["Floats", "StepLoads", "check_counts", "loads_from_decisions"]

Floats = npt.NDArray[np.float64]
_PHASES = {"prefill": 1, "decode": 2, "train": 3, "eval": 4}
_ROUTED = 1


@dataclass(frozen=True, slots=True, eq=False)
class StepLoads:
    """Loads per step, in the order of the steps.

    Attributes:
        counts: [num_steps, num_layers, num_experts] float64, assignments of valid tokens to each expert.
        steps: [num_steps] uint64, the number of each step, ascending. Steps without any valid token are left out.
    """

    counts: Floats
    steps: npt.NDArray[np.uint64]


def check_counts(counts: Any, name: str = "loads") -> Floats:
    """Return `counts` as [num_steps, num_layers, num_experts] float64.

    Raises:
        InvalidInputError: another shape, no step, layer or expert, or a value that is negative or not finite.
    """
    array = np.asarray(counts.counts if isinstance(counts, StepLoads) else counts)
    if array.dtype.kind not in "uif" or array.ndim != 3:
        raise InvalidInputError(
            f"{name}: {array.ndim} dimensions of {array.dtype}, expected numbers [num_steps, num_layers, num_experts]"
        )
    if not all(array.shape[1:]):
        raise InvalidInputError(f"{name}: shape {array.shape}, expected at least one layer and one expert")
    result: Floats = array.astype(np.float64)
    bad = ~(np.isfinite(result) & (result >= 0))
    if bad.any():
        place = tuple(int(i) for i in np.argwhere(bad)[0])
        raise InvalidInputError(
            f"{name}: {result[place]} at step, layer, expert {place}; expected a finite number, 0 or more"
        )
    return result


def loads_from_decisions(
    columns: Mapping[str, Any],
    *,
    num_experts: int,
    num_layers: int | None = None,
    step_column: str = "forward_index",
    phase: str | None = None,
) -> StepLoads:
    """Return the loads per step of rows in the form of `session.decisions()`.

    Only routed slots of valid tokens count: padding, dropped, skipped and unused slots and identity experts
    (ids from `num_experts` on) are no load. Give the rows of recording ranks only: those of replicas would count twice.

    Args:
        columns: `layer_index`, `expert_ids` and the step column, of equal length; `is_padding`, `slot_status` and
            `phase` are used where present.
        num_experts: routed experts of every layer. Layers of different widths need a plan of their own each.
        num_layers: MoE layers of the model; without it, up to the last that has rows.
        step_column: what tells steps apart. `step` joins the forwards of one training step, whose ranks still wait for
            each other at every forward: it hides imbalance.
        phase: "prefill", "decode", "train" or "eval": only rows of that phase. Prefill and decode have steps of very
            different sizes; plan for one of them.

    Raises:
        InvalidInputError: a column is missing or of another length or shape, or a value is out of range.
    """
    missing = [name for name in ("layer_index", "expert_ids", step_column) if name not in columns]
    if phase is not None and "phase" not in columns:
        missing.append("phase")
    if missing:
        raise InvalidInputError(f"columns lack {', '.join(missing)}; give session.decisions(), or the same columns")
    if num_experts < 1:
        raise InvalidInputError(f"num_experts {num_experts}: expected 1 or more")
    ids = np.asarray(columns["expert_ids"])
    layers = np.asarray(columns["layer_index"]).astype(np.int64)
    if ids.ndim != 2 or len(ids) != len(layers):
        raise InvalidInputError(f"expert_ids: shape {ids.shape}, expected [{len(layers)}, k]")
    last = int(layers.max(initial=-1))
    depth = last + 1 if num_layers is None else num_layers
    if last >= depth or layers.min(initial=0) < 0:
        raise InvalidInputError(f"layer_index reaches {last}, but num_layers is {depth}")
    steps = np.asarray(columns[step_column]).astype(np.uint64)
    if len(steps) != len(layers):
        raise InvalidInputError(f"{step_column}: {len(steps)} rows, expected {len(layers)}")
    is_load = _is_load(columns, ids, num_experts, phase)
    has_load = is_load.any(axis=1)
    names, step_index = np.unique(steps[has_load], return_inverse=True)
    place = (step_index.reshape(-1) * depth + layers[has_load]) * num_experts
    key = (place[:, None] + ids[has_load])[is_load[has_load]]
    counts = np.bincount(key, minlength=len(names) * depth * num_experts).reshape(len(names), depth, num_experts)
    return StepLoads(counts.astype(np.float64), names)


def _is_load(
    columns: Mapping[str, Any], ids: npt.NDArray[Any], num_experts: int, phase: str | None
) -> npt.NDArray[np.bool_]:
    """Return [n, k] which slots are load."""
    is_load: npt.NDArray[np.bool_] = (ids >= 0) & (ids < num_experts)
    if "slot_status" in columns:
        is_load &= np.asarray(columns["slot_status"]) == _ROUTED
    if "is_padding" in columns:
        is_load &= ~np.asarray(columns["is_padding"]).astype(np.bool_)[:, None]
    if phase is not None:
        if phase not in _PHASES:
            raise InvalidInputError(f"phase {phase!r}: expected one of {', '.join(_PHASES)}")
        is_load &= (np.asarray(columns["phase"]) == _PHASES[phase])[:, None]
    return is_load
