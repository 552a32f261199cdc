"""Routing of known truth: routers whose preferences we choose."""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from moe_debugger.wire.codec import LayerColumns, RoutingColumns

Columns = dict[str, Any]


def top_k_ids(scores: npt.NDArray[np.float64], top_k: int) -> npt.NDArray[np.int32]:
    """Return the ids of the k highest scores of each row, best first."""
    return np.argsort(-scores, axis=1)[:, :top_k].astype(np.int32)


def _decisions(
    rng: np.random.Generator,
    *,
    num_experts: int = 8,
    top_k: int = 2,
    num_tokens: int = 4096,
    num_layers: int = 4,
    num_requests: int | None = None,
    topic_strength: float = 0.0,
    skew: float = 0.0,
) -> Columns:
    """Return decisions whose router adds Gumbel noise to a fixed preference and to one of the request (its topic)."""
    requests = num_requests or max(1, num_tokens // 64)
    request = np.sort(rng.integers(0, requests, num_tokens))
    ids = []
    for _ in range(num_layers):
        preference = rng.normal(0, skew, num_experts) + rng.normal(0, topic_strength, (requests, num_experts))[request]
        ids.append(top_k_ids(preference + rng.gumbel(size=(num_tokens, num_experts)), top_k))
    return {
        "layer_index": np.repeat(np.arange(num_layers), num_tokens),
        "expert_ids": np.concatenate(ids),
        "request_id": [f"request {index}" for index in np.tile(request, num_layers)],
    }


def _columns(rng: np.random.Generator, *, num_tokens: int = 40, num_layers: int = 2, top_k: int = 2) -> RoutingColumns:
    """Return a batch with every kind of column: padding, dropped slots, missing experts, NaN, rows that layers skip."""
    requests = [f"request {index}" for index in range(5)] + [""]
    layers = []
    for layer in range(num_layers):
        rows = np.flatnonzero(rng.random(num_tokens) < 0.8).astype(np.uint32) if layer % 2 else None
        n = num_tokens if rows is None else len(rows)
        ids = top_k_ids(rng.random((n, 8)), top_k)
        ids[rng.random((n, top_k)) < 0.05] = -1
        margin = rng.random(n).astype(np.float32)
        margin[rng.random(n) < 0.2] = np.nan
        layers.append(
            LayerColumns(
                layer_index=layer,
                num_experts=8,
                expert_ids=ids,
                row_index=rows,
                gate_weights=rng.random((n, top_k)).astype(np.float16).astype(np.float32),
                slot_status=rng.choice(np.array([0, 1, 1, 1, 2, 3], np.uint8), (n, top_k)),
                margin=margin,
                router_entropy=rng.random(n).astype(np.float32),
                router_logsumexp=rng.normal(0, 3, n).astype(np.float32),
                top1_probability=rng.random(n).astype(np.float32),
            )
        )
    return RoutingColumns(
        step=rng.integers(0, 4, num_tokens).astype(np.uint64),
        forward_index=rng.integers(0, 4, num_tokens).astype(np.uint64),
        request_ids=requests,
        request_index=rng.integers(0, len(requests), num_tokens).astype(np.uint32),
        position=np.arange(num_tokens, dtype=np.uint32),
        phase=rng.integers(0, 5, num_tokens).astype(np.uint8),
        is_padding=rng.random(num_tokens) < 0.3,
        token_id=rng.integers(0, 256, num_tokens).astype(np.uint32),
        layers=layers,
    )


@pytest.fixture(scope="session")
def simulate() -> Callable[..., Columns]:
    return _decisions


@pytest.fixture(scope="session")
def make_columns() -> Callable[..., RoutingColumns]:
    return _columns
