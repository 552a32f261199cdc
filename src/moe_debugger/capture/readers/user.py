"""Layers that a user's adapter knows."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from moe_debugger.errors import ModelNotSupportedError

from ..adapter import Adapter, Call, LayerShape, Routing
from ..routes import DROPPED, IDENTITY, NO_EXPERT, ROUTED, SKIPPED, UNUSED, Routes, routes_of_map
from ..sites import Arrays, LayerInfo, Tap
from .base import Model, Reading, is_ids_and_weights

if TYPE_CHECKING:
    from torch import nn

__all__ = ["read_by_adapter"]

_EMPTY = {"dropped": DROPPED, "skipped": SKIPPED, "unused": UNUSED}
_TENSORS = ("expert_ids", "gate_weights", "probabilities", "routing_map", "logits", "intended_expert_ids", "row_mask")


def read_by_adapter(adapter: Adapter, model: Model, name: str, module: "nn.Module") -> Reading | None:
    """Read `module` by `adapter`, where it matches.

    Raises:
        ModelNotSupportedError: the adapter raised, or described the layer wrongly.
    """
    try:
        if not adapter.matches(name, module):
            return None
        shape = adapter.describe(module)
        hooked = adapter.hooked(module)
        router, experts = adapter.router(module), adapter.experts(module)
    except Exception as error:
        raise ModelNotSupportedError(
            f"adapter {adapter.name!r} failed at module {name!r} ({type(module).__name__}): "
            f"{type(error).__name__}: {error}"
        ) from error
    if not isinstance(shape, LayerShape) or shape.num_experts < 1 or not 1 <= shape.top_k <= shape.num_experts:
        raise ModelNotSupportedError(
            f"adapter {adapter.name!r} describes module {name!r} as {shape!r}; expected a LayerShape with "
            "num_experts >= 1 and 1 <= top_k <= num_experts"
        )
    return Reading(
        module_name=name,
        experts=experts,
        router=router,
        num_experts=shape.num_experts,
        top_k=shape.top_k,
        taps=(Tap(hooked, adapter.moment, _keep(adapter, hooked)),),
        interpret=_interpret(shape),
        adapter=adapter.name,
        num_shared_experts=shape.num_shared_experts,
        num_identity_experts=shape.num_identity_experts,
        scoring_function=shape.scoring_function,
        weight_meaning=shape.weight_meaning,
        is_row_wise=True,
        site=shape.site,
        block_scale=shape.block_scale,
    )


def _keep(adapter: Adapter, hooked: "nn.Module") -> Any:
    def keep(args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> tuple[dict[str, Any], int]:
        routing = adapter.read(Call(hooked, args, kwargs, output))
        if not isinstance(routing, Routing):
            raise TypeError(f"adapter {adapter.name!r}: read() returned {type(routing).__name__}, expected a Routing")
        kept = {name: tensor.detach() for name in _TENSORS if (tensor := getattr(routing, name)) is not None}
        if "routing_map" in kept:
            if kept["routing_map"].ndim != 2 or "probabilities" not in kept:
                raise ValueError(f"adapter {adapter.name!r}: a dense routing needs probabilities and map, both [n, E]")
            return kept, kept["routing_map"].shape[0]
        if not is_ids_and_weights(kept.get("expert_ids"), kept.get("gate_weights")):
            raise ValueError(
                f"adapter {adapter.name!r}: expected integer expert_ids and floating gate_weights of one shape [n, k], "
                f"got {_shapes(kept)}"
            )
        return kept, kept["expert_ids"].shape[0]

    return keep


def _interpret(shape: LayerShape) -> Any:
    empty = _EMPTY[shape.empty_slot]

    def interpret(arrays: Arrays, info: LayerInfo) -> Routes:
        if "routing_map" in arrays:
            chosen = arrays["routing_map"].astype(bool)
            probabilities = arrays["probabilities"].astype(np.float32, copy=False)
            ids, weights = _slots(probabilities, chosen, arrays.get("intended_expert_ids"), shape.top_k)
        else:
            ids = arrays["expert_ids"].astype(np.int32)
            weights = np.where(ids < 0, np.nan, arrays["gate_weights"]).astype(np.float32)
        intended, selected_weights = arrays.get("intended_expert_ids"), None
        if intended is not None:
            intended = intended.astype(np.int32)
            ids, weights, selected_weights = _in_slots_of(intended, ids, weights)
        routes = Routes(ids, weights, intended_expert_ids=intended, selected=intended, logits=arrays.get("logits"))
        routes.selected_weights = selected_weights
        status = np.where(ids < 0, empty, np.where(ids >= shape.num_experts, IDENTITY, ROUTED)).astype(np.uint8)
        if (status != ROUTED).any():
            routes.slot_status = status
        mask = arrays.get("row_mask")
        if mask is not None:
            if int(mask.sum()) != len(ids):
                raise ValueError(f"the adapter's row_mask has {int(mask.sum())} rows, its routing has {len(ids)}")
            if len(mask) != len(ids):
                routes.row_index = np.flatnonzero(mask).astype(np.uint32)
        return routes

    return interpret


def _in_slots_of(
    intended: npt.NDArray[np.int32], ids: npt.NDArray[np.int32], weights: npt.NDArray[np.float32]
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Put each executed expert into the slot in which it was intended, where all of the executed ones were.

    Returns:
        ids, their weights, and the weights of the intended ids (NaN where they are not known).
    """
    if intended.shape != ids.shape:
        raise ValueError(f"the adapter's intended_expert_ids are {intended.shape}, its expert_ids {ids.shape}")
    is_same = (intended[:, :, None] == ids[:, None, :]) & (ids >= 0)[:, None, :]
    if int(is_same.sum()) != int((ids >= 0).sum()):
        return ids, weights, np.full_like(weights, np.nan)
    placed = np.where(is_same.any(axis=2), intended, NO_EXPERT).astype(np.int32)
    picked = np.take_along_axis(weights, is_same.argmax(axis=2), axis=1)
    picked = np.where(placed >= 0, picked, np.nan).astype(np.float32)
    return placed, picked, picked


def _slots(probabilities: Any, chosen: Any, intended: Any, top_k: int) -> tuple[Any, Any]:
    """Return ids and weights of a dense map; slot by slot of the intended choice, where that is known and covers it."""
    if intended is not None:
        wanted = np.maximum(intended, 0).astype(np.int64)
        is_kept = np.take_along_axis(chosen, wanted, axis=1) & (intended >= 0)
        if np.array_equal(is_kept.sum(axis=1), chosen.sum(axis=1)):
            weights = np.take_along_axis(probabilities, wanted, axis=1)
            return (
                np.where(is_kept, intended, NO_EXPERT).astype(np.int32),
                np.where(is_kept, weights, np.nan).astype(np.float32),
            )
    return routes_of_map(probabilities, chosen, num_slots=top_k)


def _shapes(kept: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {tuple(tensor.shape)} {tensor.dtype}" for name, tensor in kept.items()) or "nothing"
