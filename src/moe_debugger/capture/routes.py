"""What one MoE layer did with its rows, as numpy arrays: the common form that every reader gives."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["DROPPED", "IDENTITY", "NO_EXPERT", "ROUTED", "SKIPPED", "UNUSED", "Routes", "routes_of_map"]

NO_EXPERT = -1
# The numbers of moe_debugger.v1.SlotStatus.
ROUTED, DROPPED, SKIPPED, IDENTITY, UNUSED = 1, 2, 3, 4, 5


@dataclass(slots=True)
class Routes:
    """Routes of n rows with k slots.

    Attributes:
        expert_ids: [n, k] int32 that the experts executed; -1 where a slot reached none.
        gate_weights: [n, k] float32 as applied; NaN where a slot reached no expert.
        slot_status: [n, k] uint8 of `SlotStatus`; None = all routed.
        intended_expert_ids: [n, k] int32 that the router chose, where that may differ from what was executed.
        row_index: [n] uint32 rows of the forward that this layer saw; None = all of them, in order.
        logits: [n, C] float32 of the router, before any bias; C may exceed E (skip class, identity experts).
        selected: [n, k] int32 columns of the logits that the router selected; None = `expert_ids`.
        selected_weights: [n, k] float32 weights of `selected`; None = `gate_weights`.
        weights_reason: why all gate weights are NaN, "" where they are known.
    """

    expert_ids: npt.NDArray[np.int32]
    gate_weights: npt.NDArray[np.float32]
    slot_status: npt.NDArray[np.uint8] | None = None
    intended_expert_ids: npt.NDArray[np.int32] | None = None
    row_index: npt.NDArray[np.uint32] | None = None
    logits: npt.NDArray[np.float32] | None = None
    selected: npt.NDArray[np.int32] | None = None
    selected_weights: npt.NDArray[np.float32] | None = None
    weights_reason: str = ""


def routes_of_map(
    weights: npt.NDArray[np.float32], is_chosen: npt.NDArray[np.bool_], *, num_slots: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """Return ids [n, num_slots] and weights [n, num_slots] of a dense map [n, E], by falling weight.

    Rows with fewer chosen experts end in -1 and NaN.

    Raises:
        ValueError: a row has more than `num_slots` chosen experts.
    """
    counts = is_chosen.sum(axis=1)
    if len(counts) and int(counts.max()) > num_slots:
        raise ValueError(f"a row of the routing map has {int(counts.max())} experts, the layer has {num_slots} slots")
    order = np.argsort(np.where(is_chosen, -weights, np.inf), axis=1, kind="stable")[:, :num_slots]
    used = np.arange(num_slots) < counts[:, None]
    ids = np.where(used, order, NO_EXPERT).astype(np.int32)
    picked = np.take_along_axis(weights, order, axis=1)
    return ids, np.where(used, picked, np.nan).astype(np.float32)
