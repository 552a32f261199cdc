"""Experts in a ModuleDict that are called with a mask over experts and weights (Switch Transformers, NLLB-MoE).

Switch: mask [T, 1, E] one-hot, weights [T, 1]; a row of zeros was dropped by the expert's capacity.

NLLB-MoE: mask [T, E] and gates [T, E]. In transformers 5.23 its experts read the 0/1 mask as if it held expert ids: for
each column j of a row, expert ``mask[t, j]`` is applied with weight ``gates[t, j]``, so only experts 0 and 1 ever
compute. Which reading is executed is told by how many rows each expert module received, not by the version.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..routes import DROPPED, NO_EXPERT, ROUTED, UNUSED, Routes, routes_of_map
from ..sites import Arrays, LayerInfo, Tap
from .base import Model, Reading, first_int, positional_names, router_of

if TYPE_CHECKING:
    from torch import nn

__all__ = ["read_one_hot"]


def read_one_hot(model: Model, name: str, module: "nn.Module") -> Reading | None:
    """Read a ModuleDict or ModuleList with a forward of its own that takes (hidden, mask, weights)."""
    from torch import nn

    if not isinstance(module, nn.ModuleDict | nn.ModuleList) or type(module).forward is nn.Module.forward:
        return None
    names = positional_names(module)
    block_name, block = model.parent(name)
    router = router_of(block)
    dropout = float(getattr(module, "moe_token_dropout", 0) or 0)
    children = [child for key, child in module.named_children() if key.rpartition("_")[2].isdigit()]
    if names is None or len(names) < 3 or router is None or not children:
        return None

    def keep_router(args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> tuple[dict[str, Any], int]:
        logits = output[-1] if isinstance(output, tuple | list) and output else None
        if getattr(logits, "ndim", 0) < 2:
            return {}, 0
        assert logits is not None
        return {"logits": logits.detach().reshape(-1, logits.shape[-1]), "rows_of": [0] * len(children)}, 0

    def keep_inputs(args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> tuple[dict[str, Any], int] | None:
        mask = args[1] if len(args) > 1 else kwargs.get(names[1])
        weights = args[2] if len(args) > 2 else kwargs.get(names[2])
        if getattr(mask, "ndim", 0) not in (2, 3) or getattr(weights, "ndim", 0) != 2:
            return None
        assert mask is not None
        assert weights is not None
        # NLLB scales what its experts give outside of training, where dropout would have scaled it up.
        is_scaled = dropout > 0 and not module.training
        kept = {"mask": mask.detach(), "weights": weights.detach(), "is_scaled": int(is_scaled)}
        return kept, mask.shape[0]

    taps = [Tap(router, "after", keep_router, completes=False), Tap(module, "before", keep_inputs, completes=False)]
    taps += [Tap(child, "before", _keep_rows(index), completes=False) for index, child in enumerate(children)]
    taps.append(Tap(module, "after", lambda args, kwargs, output: ({}, 0), completes=True))
    is_top1 = _is_top1(router)

    def interpret(arrays: Arrays, info: LayerInfo) -> Routes:
        return _interpret(arrays, info, 1 - dropout if arrays.get("is_scaled") else 1.0)

    return Reading(
        module_name=block_name,
        experts=module,
        router=router,
        num_experts=first_int(module, ("num_experts",)) or len(children),
        top_k=1 if is_top1 else 2,
        taps=tuple(taps),
        interpret=interpret,
        adapter="one_hot",
        num_shared_experts=model.num_shared(block),
        scoring_function="softmax",
    )


def _is_top1(router: "nn.Module") -> bool:
    # A second choice needs a policy; a router without one has a single slot.
    return not hasattr(router, "second_expert_policy")


def _keep_rows(index: int) -> Any:
    def keep(args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> tuple[dict[str, Any], int]:
        hidden = args[0] if args else next(iter(kwargs.values()))
        return {f"rows_{index}": int(hidden.shape[0]) if hidden.ndim == 2 else int(hidden.shape[:-1].numel())}, 0

    return keep


def _interpret(arrays: Arrays, info: LayerInfo, scale: float) -> Routes:
    mask, weights = arrays["mask"], arrays["weights"].astype(np.float32, copy=False)
    logits = arrays.get("logits")
    if mask.ndim == 3:
        return _top1(mask[:, 0], weights, logits)
    received = np.array([arrays.get(f"rows_{index}", 0) for index in range(info.num_experts)])
    is_chosen = weights != 0
    intended, intended_weights = routes_of_map(weights, is_chosen, num_slots=max(2, info.top_k))
    routes = Routes(intended, intended_weights, logits=logits, selected=intended, selected_weights=intended_weights)
    if np.array_equal(received, (mask != 0).sum(axis=0)) and not _reads_mask_as_ids(mask, received):
        routes.slot_status = _status(intended, is_empty=DROPPED)
        routes.gate_weights = (intended_weights * scale).astype(np.float32)
        return routes
    if not _reads_mask_as_ids(mask, received):
        raise ValueError(
            f"the experts received {received.tolist()} rows, which fits neither reading of their mask: "
            f"{(mask != 0).sum(axis=0).tolist()} as one-hot"
        )
    ids, executed = _by_mask_values(mask, weights)
    routes.expert_ids, routes.gate_weights = ids, (executed * scale).astype(np.float32)
    routes.slot_status = _status(ids, is_empty=UNUSED)
    routes.intended_expert_ids = intended
    return routes


def _top1(mask: npt.NDArray[Any], weights: npt.NDArray[np.float32], logits: npt.NDArray[np.float32] | None) -> Routes:
    is_routed: npt.NDArray[np.bool_] = np.any(mask, axis=1, keepdims=True)
    ids = np.where(is_routed, mask.argmax(axis=1, keepdims=True), NO_EXPERT).astype(np.int32)
    chosen = ids if logits is None else logits.argmax(axis=1).astype(np.int32)[:, None]
    return Routes(
        expert_ids=ids,
        gate_weights=np.where(is_routed, weights, np.nan).astype(np.float32),
        slot_status=_status(ids, is_empty=DROPPED),
        # A dropped token still has the expert that it was meant for.
        intended_expert_ids=np.where(is_routed, ids, chosen).astype(np.int32),
        logits=logits,
        selected=np.where(is_routed, ids, chosen).astype(np.int32),
        selected_weights=weights,
    )


def _reads_mask_as_ids(mask: npt.NDArray[Any], received: npt.NDArray[Any]) -> bool:
    """Whether each expert received as many rows as there are entries of its id in the mask."""
    return np.array_equal(received, np.bincount(mask.reshape(-1).astype(np.int64), minlength=len(received)))


def _by_mask_values(
    mask: npt.NDArray[Any], weights: npt.NDArray[np.float32]
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    # Expert 1 is applied once for each 1 of the row, expert 0 once for each 0: their weights add up.
    is_one = mask != 0
    ones, zeros = np.where(is_one, weights, 0).sum(axis=1), np.where(is_one, 0, weights).sum(axis=1)
    ids = np.stack([is_one.any(axis=1), np.zeros(len(mask), bool)], axis=1).astype(np.int32)
    ids[:, 0] = np.where(is_one.any(axis=1), 1, NO_EXPERT)
    executed = np.stack([np.where(is_one.any(axis=1), ones, np.nan), zeros], axis=1)
    return ids, executed.astype(np.float32)


def _status(ids: npt.NDArray[np.int32], *, is_empty: int) -> npt.NDArray[np.uint8]:
    return np.where(ids >= 0, ROUTED, is_empty).astype(np.uint8)
