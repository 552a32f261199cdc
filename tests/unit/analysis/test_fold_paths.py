"""Rows in runs and rows in no order are folded in two ways, with one result."""

from typing import Any

import numpy as np
import pytest

from moe_debugger.analysis import _folding, fold_decisions


def rows(num_experts: int, *, num_layers: int = 3) -> dict[str, Any]:
    """Return forwards of 3 requests each, with padding, unused slots and requests without a name."""
    rng = np.random.default_rng(num_experts)
    forwards, length = 6, 150
    tokens = forwards * 3 * length
    n = tokens * num_layers
    ids = np.argsort(rng.random((n, num_experts)), axis=1)[:, :2].astype(np.int32)
    ids[rng.random((n, 2)) < 0.03] = -1
    token = np.concatenate([np.tile(np.arange(f * 450, (f + 1) * 450), num_layers) for f in range(forwards)])
    forward = (token // 450).astype(np.uint64)
    return {
        "layer_index": np.tile(np.repeat(np.arange(num_layers), 450), forwards),
        "expert_ids": ids,
        "request_id": [f"request {t // length % 5}" if t // length % 7 else "" for t in token],
        "step": forward,
        "forward_index": forward,
        "phase": np.full(n, 1, np.uint8),
        "position": (token % length).astype(np.uint32),
        "is_padding": rng.random(n) < 0.02,
        "slot_status": np.where(ids < 0, 5, 1).astype(np.uint8),
        "token_id": (token * 7 % 90).astype(np.int32),
        "margin": rng.random(n).astype(np.float32),
        "workload": ["a" if t % 2 else "b" for t in token],
    }


@pytest.mark.parametrize("num_experts", [4, 32])
def test_rows_in_runs_and_shuffled_rows_have_the_same_state(num_experts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    row_by_row = []
    slow = _folding._fold_load_by_row

    def watched(*args: Any) -> None:
        row_by_row.append(1)
        slow(*args)

    monkeypatch.setattr(_folding, "_fold_load_by_row", watched)
    columns = rows(num_experts)
    in_runs = fold_decisions(columns, num_experts=num_experts, top_k=2)
    assert not row_by_row
    order = np.random.default_rng(0).permutation(len(columns["layer_index"]))
    shuffled = fold_decisions(
        {name: np.asarray(column)[order] for name, column in columns.items()}, num_experts=num_experts, top_k=2
    )
    assert row_by_row
    assert shuffled == in_runs
    assert in_runs.layers[1].num_unused_slots > 0
    assert in_runs.layers[1].counts.sum() == in_runs.layers[1].block_counts.sum()


def test_unknown_requests_of_decoding_are_counted_and_in_no_block() -> None:
    columns = rows(4)
    columns["phase"] = np.full(len(columns["phase"]), 2, np.uint8)
    layer = fold_decisions(columns, num_experts=4, top_k=2).layers[0]
    named = [bool(name) for name in columns["request_id"]]
    is_mine = np.asarray(named) & (columns["layer_index"] == 0) & ~columns["is_padding"]
    assert layer.block_tokens.sum() == is_mine.sum() < layer.num_tokens
    assert layer.block_counts.sum() == (columns["expert_ids"][is_mine] >= 0).sum()
    assert layer.counts.sum() > layer.block_counts.sum()
