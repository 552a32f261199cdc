"""What an adapter said about one call of a layer, as maps over tokens and experts."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_debugger.capture import LayerInfo
from moe_debugger.capture.readers.base import Reading

__all__ = ["Claims", "read_claims"]


@dataclass(slots=True)
class Claims:
    """What the adapter said; T tokens, E experts.

    Attributes:
        used: [T, E] bool.
        weights: [T, E] float64, 0 where not used.
        num_empty_slots: slots of the adapter's rows that reach no expert.
        num_identity_slots: slots of identity experts.
        problems: what is wrong whatever the experts did.
    """

    used: npt.NDArray[np.bool_]
    weights: npt.NDArray[np.float64]
    num_empty_slots: int = 0
    num_identity_slots: int = 0
    problems: list[str] = field(default_factory=list)


def read_claims(reading: Reading, arrays: Mapping[str, npt.NDArray[Any]], num_tokens: int) -> Claims:
    """Return what the adapter said of `num_tokens` tokens, read exactly as the capture reads it."""
    num_experts, num_identity = reading.num_experts, reading.num_identity_experts
    width = num_experts + num_identity
    claims = Claims(np.zeros((num_tokens, num_experts), bool), np.zeros((num_tokens, num_experts)))
    claims.problems += _wrong_shapes(reading, arrays, width)
    if claims.problems:
        return claims
    try:
        routes = reading.interpret(arrays, _info(reading))
    except ValueError as error:
        claims.problems.append(f"what read() returned does not fit the layer's description: {error}")
        return claims
    ids, weights = routes.expert_ids, routes.gate_weights.astype(np.float64)
    rows = np.arange(len(ids)) if routes.row_index is None else routes.row_index.astype(np.int64)
    mask = arrays.get("row_mask")
    if (mask is None and len(ids) != num_tokens) or (mask is not None and len(mask) != num_tokens):
        claims.problems.append(
            f"read() returned {len(ids)} rows{'' if mask is None else f' and a row_mask of {len(mask)}'}, the layer "
            f"works on {num_tokens} tokens: one row for each token, padded ones included, or a row_mask [tokens] of "
            "those that there are"
        )
        return claims
    if ids.min(initial=0) < -1 or ids.max(initial=-1) >= width:
        claims.problems.append(
            f"read() returned expert ids {int(ids.min())} to {int(ids.max())}; the layer is described with ids 0 to "
            f"{width - 1}, and -1 where a slot reached no expert"
        )
        return claims
    is_expert = (ids >= 0) & (ids < num_experts)
    claims.num_empty_slots, claims.num_identity_slots = int((ids < 0).sum()), int((ids >= num_experts).sum())
    if not np.isfinite(weights[is_expert]).all():
        claims.problems.append("read() returned weights that are NaN or infinite for slots that reach an expert")
        return claims
    token = np.broadcast_to(rows[:, None], ids.shape)[is_expert]
    np.add.at(claims.weights, (token, ids[is_expert]), weights[is_expert])
    claims.used[token, ids[is_expert]] = True
    if int(claims.used.sum()) != int(is_expert.sum()):
        row = int(np.argmax([len(set(chosen := r[r >= 0])) < len(chosen) for r in ids]))
        claims.problems.append(f"read() returned one expert twice for a token: row {row} has ids {ids[row].tolist()}")
    return claims


def _wrong_shapes(reading: Reading, arrays: Mapping[str, npt.NDArray[Any]], width: int) -> list[str]:
    described = f"describe() says num_experts={reading.num_experts}"
    if reading.num_identity_experts:
        described += f", num_identity_experts={reading.num_identity_experts}"
    problems = [
        f"{described}, but read() returned a {name} of shape {arrays[name].shape}"
        for name in ("routing_map", "probabilities")
        if name in arrays and arrays[name].shape[-1] != width
    ]
    if "expert_ids" in arrays and arrays["expert_ids"].shape[1] != reading.top_k:
        problems.append(
            f"describe() says top_k={reading.top_k}, but read() returned {arrays['expert_ids'].shape[1]} slots per row"
        )
    if "logits" in arrays and (arrays["logits"].ndim != 2 or arrays["logits"].shape[1] < reading.num_experts):
        problems.append(f"{described}, but read() returned logits of shape {arrays['logits'].shape}")
    intended = arrays.get("intended_expert_ids")
    if intended is not None and intended.size and (intended.min() < -1 or intended.max() >= width):
        problems.append(f"intended_expert_ids are {int(intended.min())} to {int(intended.max())}; {described}")
    return problems


def _info(reading: Reading) -> LayerInfo:
    return LayerInfo(
        layer_index=0,
        model_layer_index=0,
        module_name=reading.module_name,
        stack="decoder",
        num_experts=reading.num_experts,
        top_k=reading.top_k,
        num_identity_experts=reading.num_identity_experts,
    )
