"""Loads per step: what each expert of each MoE layer was given in each step of a window.

A step is what the ranks do together: they wait for each other at every MoE layer of it. One forward of the model is one
step; the rows of data-parallel ranks with the same step number add up.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_debugger.analysis._columns import checked_columns, whole_numbers
from moe_debugger.errors import InvalidInputError
from moe_debugger.wire.slots import SlotClasses

__all__ = ["Floats", "StepLoads", "check_counts", "loads_from_decisions"]

Floats = npt.NDArray[np.float64]
_PHASES = {"prefill": 1, "decode": 2, "train": 3, "eval": 4}


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
    try:
        array = np.asarray(counts.counts if isinstance(counts, StepLoads) else counts)
    except ValueError as error:
        raise InvalidInputError(
            f"{name}: rows of different lengths; expected [num_steps, num_layers, num_experts]"
        ) from error
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
        columns: `layer_index`, `expert_ids` and the step column, of equal length, as for `analyze`; `is_padding`,
            `slot_status` and `phase` are used where present.
        num_experts: routed experts of every layer. Layers of different widths need a plan of their own each.
        num_layers: MoE layers of the model; without it, up to the last that has rows.
        step_column: what tells steps apart. `step` joins the forwards of one training step, whose ranks still wait for
            each other at every forward: it hides imbalance.
        phase: "prefill", "decode", "train" or "eval": only rows of that phase. Prefill and decode have steps of very
            different sizes; plan for one of them.

    Raises:
        InvalidInputError: a column is missing or of another length or shape, or a value is out of range.
    """
    if not isinstance(num_experts, int | np.integer) or num_experts < 1:
        raise InvalidInputError(f"num_experts {num_experts!r}: expected a whole number, 1 or more")
    if phase is not None and phase not in _PHASES:
        raise InvalidInputError(f"phase {phase!r}: expected one of {', '.join(_PHASES)}")
    required = [step_column] if phase is None else [step_column, "phase"]
    found = checked_columns(columns, ("is_padding", "slot_status"), required=required)
    ids, layers = found["expert_ids"], found["layer_index"]
    if ids.min(initial=-1) < -1:
        raise InvalidInputError(f"expert_ids reach down to {ids.min()}, expected 0 and more, or -1 for no expert")
    last = int(layers.max(initial=-1))
    depth = last + 1 if num_layers is None else num_layers
    if last >= depth:
        raise InvalidInputError(f"layer_index reaches {last}, but num_layers is {depth}")
    steps = whole_numbers(found[step_column], f"column {step_column}", "<u8")
    # The same slots as in the metrics: whatever has no status was routed.
    is_load = SlotClasses.of(ids, found.get("slot_status"), num_experts).is_load
    if "is_padding" in found:
        is_load &= ~found["is_padding"][:, None]
    if phase is not None:
        is_load &= (found["phase"] == _PHASES[phase])[:, None]
    has_load = is_load.any(axis=1)
    names, step_index = np.unique(steps[has_load], return_inverse=True)
    place = (step_index.reshape(-1) * depth + layers[has_load]) * num_experts
    key = (place[:, None] + ids[has_load])[is_load[has_load]]
    counts = np.bincount(key, minlength=len(names) * depth * num_experts).reshape(len(names), depth, num_experts)
    return StepLoads(counts.astype(np.float64), names)
