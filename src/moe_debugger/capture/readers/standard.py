"""The contract of transformers 5: experts are called with (hidden [T, H], expert ids [T, k], weights [T, k])."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ..routes import IDENTITY, NO_EXPERT, ROUTED, SKIPPED, Routes
from ..sites import Arrays, LayerInfo, Tap
from .base import (
    SHARED_NAMES,
    Model,
    Reading,
    detached,
    first_int,
    first_of,
    is_ids_and_weights,
    keep_logits,
    num_fused_experts,
    positional_names,
    router_of,
)

if TYPE_CHECKING:
    from torch import nn

__all__ = ["read_standard"]

# A block whose router chooses among pools by the kind of token (ERNIE-VL): pool name -> value of the mask.
_POOLS = {"text_moe": False, "vision_moe": True}
_POOL_MASK = "moe_mm_token_type_ids"


def read_standard(model: Model, name: str, module: "nn.Module") -> Reading | None:
    """Read a fused experts module by its inputs, and its router by its first output."""
    names = positional_names(module)
    if names is not None and len(names) < 3:
        return None
    num_experts = num_fused_experts(module)
    if num_experts is None:
        return None
    block_name, block = model.parent(name)
    router = router_of(block)
    num_identity = first_int(module, ("zero_expert_num", "num_zero_experts")) or 0
    if num_identity:
        num_experts = first_int(module, ("num_routed_experts", "n_routed_experts")) or num_experts
    taps = [Tap(module, "before", _keep_inputs(names), may_wait=True)]
    if router is not None:
        taps.insert(0, Tap(router, "after", keep_logits, completes=False, may_wait=True))
    scale = getattr(router, "per_expert_scale", None)
    top_k = model.top_k(router, block)
    reason = _no_statistics(router)
    pool = _pool_tap(model, block_name)
    if pool is not None:
        taps.insert(0, pool)
    return Reading(
        module_name=block_name,
        experts=module,
        router=router,
        num_experts=num_experts,
        top_k=top_k,
        taps=tuple(taps),
        interpret=_interpret if scale is None else _scaled(scale),
        adapter="standard",
        num_shared_experts=model.num_shared(block),
        num_identity_experts=num_identity,
        scoring_function="unknown" if reason else _scoring(router, model.config),
        unavailable_reason=reason,
        block_scale=_block_scale(block, router, num_experts, top_k),
        pool="" if pool is None else block_name.rpartition(".")[0],
        is_row_wise=pool is None,
        reduces="ids",
    )


def _keep_inputs(names: tuple[str, ...] | None) -> Any:
    ids_name, weights_name = (names[1], names[2]) if names is not None else ("", "")

    def keep(args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> tuple[dict[str, Any], int] | None:
        ids = args[1] if len(args) > 1 else kwargs.get(ids_name)
        weights = args[2] if len(args) > 2 else kwargs.get(weights_name)
        if not is_ids_and_weights(ids, weights):
            return None
        assert ids is not None
        assert weights is not None
        return {"expert_ids": ids, "gate_weights": detached(weights)}, ids.shape[0]

    return keep


def _pool_tap(model: Model, block_name: str) -> Tap | None:
    outer_name, _, pool = block_name.rpartition(".")
    outer = model.modules.get(outer_name)
    if pool not in _POOLS or outer is None or _POOL_MASK not in (positional_names(outer) or ()):
        return None
    position = (positional_names(outer) or ()).index(_POOL_MASK)
    wants = _POOLS[pool]

    def keep(args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> tuple[dict[str, Any], int]:
        kinds = args[position] if len(args) > position else kwargs.get(_POOL_MASK)
        if kinds is None:
            return {}, 0
        is_vision = kinds.detach().reshape(-1).bool()
        return {"row_mask": is_vision if wants else ~is_vision}, 0

    return Tap(outer, "before", keep, completes=False)


def _scoring(router: "nn.Module | None", config: Any) -> str:
    if router is None:
        return "unknown"
    declared = str(first_of((router, config), ("scoring_func", "score_function", "scoring_function")) or "")
    if declared in ("softmax", "sigmoid"):
        return declared
    if declared == "sqrtsoftplus":
        return "sqrt_softplus"
    return "sigmoid" if hasattr(router, "e_score_correction_bias") else "softmax"


def _has_shared(block: "nn.Module") -> bool:
    return any(getattr(block, name, None) is not None for name in SHARED_NAMES)


def _no_statistics(router: "nn.Module | None") -> str:
    if router is None:
        return "the layer has no module named gate or router, so no logits are seen"
    if hasattr(router, "router_jitter_noise") and hasattr(router, "input_jitter_noise"):
        return (
            "sparsemixer weighs each choice against the logits close to it: there is no one distribution over experts"
        )
    return ""


def _block_scale(block: "nn.Module", router: "nn.Module | None", num_experts: int, top_k: int) -> float:
    # Where the router scales, the weights hold the factor already; where only the block has it, it follows the experts.
    value = getattr(block, "routed_scaling_factor", None)
    if router is not None and not hasattr(router, "routed_scaling_factor") and isinstance(value, int | float):
        return float(value)
    # Cohere may average what the routed and the shared experts give.
    if getattr(block, "shared_expert_combination_strategy", "") == "average" and _has_shared(block):
        return 0.5
    # OpenAI's privacy filter divides the weights by k before the experts, and multiplies by k after them.
    return float(top_k) if getattr(block, "num_experts", num_experts) == top_k != num_experts else 1.0


def _interpret(arrays: Arrays, info: LayerInfo) -> Routes:
    ids = arrays["expert_ids"].astype(np.int32)
    weights = arrays["gate_weights"].astype(np.float32, copy=False)
    logits = arrays.get("logits")
    if logits is not None and len(logits) != len(ids):
        logits = None
    routes = Routes(expert_ids=ids, gate_weights=weights, logits=logits, row_index=_row_index(arrays, len(ids)))
    if info.num_identity_experts:
        is_identity = ids >= info.num_experts
        if is_identity.any():
            routes.slot_status = np.where(is_identity, IDENTITY, ROUTED).astype(np.uint8)
    elif logits is not None and logits.shape[1] == info.num_experts + 1 and ids.shape[1] == 1:
        # One class more than experts, and one slot: the last class skips the experts (ZAYA), which the library writes
        # as expert 0 with weight 0.
        is_skipped = weights == 0
        if is_skipped.any():
            routes.slot_status = np.where(is_skipped, SKIPPED, ROUTED).astype(np.uint8)
            routes.selected = np.where(is_skipped, info.num_experts, ids).astype(np.int32)
            routes.expert_ids = np.where(is_skipped, NO_EXPERT, ids).astype(np.int32)
            routes.gate_weights = np.where(is_skipped, np.nan, weights).astype(np.float32)
    return routes


def _scaled(scale: Any) -> Any:
    """Read a router that multiplies each weight by a factor of its expert (Gemma 4): the logits know nothing of it."""

    def interpret(arrays: Arrays, info: LayerInfo) -> Routes:
        routes = _interpret(arrays, info)
        factors = scale.detach().float().cpu().numpy().reshape(-1)
        routes.selected_weights = routes.gate_weights / factors[np.maximum(routes.expert_ids, 0)]
        return routes

    return interpret


def _row_index(arrays: Arrays, num_rows: int) -> Any:
    mask = arrays.get("row_mask")
    # Without a token of the other kind the block hands all rows to one pool.
    if mask is None or len(mask) == num_rows:
        return None
    return np.flatnonzero(mask).astype(np.uint32)
