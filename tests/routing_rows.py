"""Random columns as the capture makes them, and the rows that they mean, written down one by one."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from moe_debugger import LayerInfo
from moe_debugger.wire.codec import LayerColumns, RoutingColumns

__all__ = ["forward", "layer_infos", "rows_one_by_one"]

ROUTED, DROPPED, IDENTITY, UNUSED = 1, 2, 4, 5


def layer_infos(*shapes: tuple[int, int]) -> list[LayerInfo]:
    """Return layers of (num_experts, top_k)."""
    return [
        LayerInfo(index, index, f"model.layers.{index}.mlp", "decoder", experts, k)
        for index, (experts, k) in enumerate(shapes)
    ]


def forward(
    index: int,
    *,
    num_tokens: int = 6,
    shapes: Sequence[tuple[int, int]] = ((8, 2), (8, 2)),
    num_requests: int = 2,
    has_tokens: bool = False,
    has_logits: bool = False,
    has_statistics: bool = True,
    first_layer: int = 0,
    seed: int = 0,
) -> RoutingColumns:
    """Return one forward whose layers all saw all tokens."""
    rng = np.random.default_rng([seed, index])
    layers = []
    for number, (experts, k) in enumerate(shapes, first_layer):
        ids = rng.random((num_tokens, experts)).argsort(axis=1)[:, :k].astype(np.int32)
        layer = LayerColumns(number, experts, ids, rng.random((num_tokens, k), dtype=np.float32))
        if has_statistics:
            for name in ("margin", "router_entropy", "router_logsumexp", "top1_probability"):
                setattr(layer, name, rng.random(num_tokens, dtype=np.float32))
        if has_logits:
            layer.logits = rng.standard_normal((num_tokens, experts)).astype(np.float16)
        layers.append(layer)
    return RoutingColumns(
        step=np.full(num_tokens, index // 2, np.uint64),
        forward_index=np.full(num_tokens, index, np.uint64),
        request_ids=[f"request-{index // 4}-{number}" for number in range(num_requests)],
        request_index=rng.integers(0, num_requests, num_tokens).astype(np.uint32),
        position=np.arange(num_tokens, dtype=np.uint32),
        phase=np.full(num_tokens, 1 + index % 2, np.uint8),
        is_padding=rng.random(num_tokens) < 0.2,
        token_id=rng.integers(0, 1000, num_tokens).astype(np.uint32) if has_tokens else None,
        layers=layers,
    )


def rows_one_by_one(batches: Sequence[RoutingColumns]) -> Iterator[dict[str, Any]]:
    """Yield each row by plain indexing: forward after forward, layer by layer, token by token."""
    for batch in batches:
        for layer in batch.layers:
            for row in range(len(layer.expert_ids)):
                token = row if layer.row_index is None else int(layer.row_index[row])
                ids = layer.expert_ids[row].tolist()
                weights = layer.gate_weights
                status = layer.slot_status
                intended = layer.intended_expert_ids
                yield {
                    "step": int(batch.step[token]),
                    "forward_index": int(batch.forward_index[token]),
                    "phase": int(batch.phase[token]),
                    "request_id": batch.request_ids[batch.request_index[token]] if batch.request_ids else "",
                    "position": int(batch.position[token]),
                    "token_id": -1 if batch.token_id is None else int(batch.token_id[token]),
                    "is_padding": bool(batch.is_padding[token]),
                    "layer_index": layer.layer_index,
                    "expert_ids": ids,
                    "gate_weights": [np.nan] * len(ids) if weights is None else weights[row].tolist(),
                    "slot_status": [ROUTED if each >= 0 else UNUSED for each in ids]
                    if status is None
                    else status[row].tolist(),
                    "intended_expert_ids": ids if intended is None else intended[row].tolist(),
                    "logits": None if layer.logits is None else layer.logits[row].tolist(),
                    **{
                        name: np.nan if (column := getattr(layer, name)) is None else float(column[row])
                        for name in ("margin", "router_entropy", "router_logsumexp", "top1_probability")
                    },
                }
