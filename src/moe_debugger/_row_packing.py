"""Packs what the capture gives, with an array per layer and column, into blocks of rows."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from moe_debugger._row_blocks import (
    FILLS,
    NO_TOKEN,
    ROW_DTYPES,
    SLOT_COLUMNS,
    TOKEN_DTYPES,
    Array,
    RowBlock,
    default_slots,
)
from moe_debugger.wire.codec import RoutingColumns

__all__ = ["pack"]


def pack(batches: Sequence[RoutingColumns]) -> RowBlock:
    """Return the rows of `batches` as one block, in their order.

    Raises:
        ValueError: the columns of a forward do not fit each other.
    """
    names: dict[str, int] = {}
    tokens: dict[str, Array] = {}
    for name, dtype in TOKEN_DTYPES.items():
        if name == "request_index":
            parts = [_request_index(batch, names) for batch in batches]
        elif name != "token_id":
            parts = [getattr(batch, name) for batch in batches]
        elif all(batch.token_id is None for batch in batches):
            continue
        else:
            parts = [np.full(x.num_tokens, NO_TOKEN) if x.token_id is None else x.token_id for x in batches]
        tokens[name] = _concatenate(parts, dtype)
    first_token = np.cumsum([0, *(batch.num_tokens for batch in batches)])
    pieces = [(int(first), batch, layer) for first, batch in zip(first_token, batches, strict=False)
              for layer in batch.layers]  # fmt: skip
    layers = [layer for _, _, layer in pieces]
    lengths = np.array([len(layer.expert_ids) for layer in layers], dtype=np.int64)
    first_row = np.cumsum(lengths) - lengths
    offsets = np.array([first for first, _, _ in pieces], dtype=np.int64) - first_row
    row_token = (np.arange(int(lengths.sum())) + np.repeat(offsets, lengths)).astype(np.uint32)
    for (first, _, layer), row in zip(pieces, first_row, strict=True):
        if layer.row_index is not None:
            row_token[row : row + len(layer.row_index)] = layer.row_index + np.uint32(first)
    rows: dict[str, Array] = {
        "layer_index": np.repeat(np.array([layer.layer_index for layer in layers], dtype=np.uint32), lengths)
    }
    for name in ROW_DTYPES:
        if name == "layer_index":
            continue
        values: list[Array | None] = [getattr(layer, name) for layer in layers]
        if name not in ("expert_ids", "gate_weights") and all(value is None for value in values):
            continue
        shapes = [layer.expert_ids for layer in layers]
        rows[name] = _concatenate_rows(name, [_or_default(name, *pair) for pair in zip(values, shapes, strict=True)])
        if rows[name].shape[0] != len(row_token):
            raise ValueError(f"{name} has {rows[name].shape[0]} rows, the ids have {len(row_token)}")
    # The capture may leave a weight where nothing was applied.
    unreached = rows["expert_ids"] < 0
    if unreached.any():
        rows["gate_weights"][unreached] = np.nan
    for name in ("expert_ids", "intended_expert_ids"):
        if name in rows and int(rows[name].max(initial=0)) <= np.iinfo(np.int16).max:
            rows[name] = rows[name].astype(np.int16)
    return RowBlock(tuple(names), tokens, rows, row_token)


def _request_index(batch: RoutingColumns, names: dict[str, int]) -> Array:
    mapping = np.array([names.setdefault(x, len(names)) for x in batch.request_ids or ("",)], dtype=np.uint32)
    return mapping[batch.request_index]


def _or_default(name: str, value: Array | None, expert_ids: Array) -> Array:
    if value is not None:
        return value
    if name in ("slot_status", "intended_expert_ids"):
        return default_slots(name, expert_ids)
    if name == "logits":
        return np.empty((len(expert_ids), 0), np.float16)
    return np.full(expert_ids.shape if name == "gate_weights" else len(expert_ids), FILLS[name], ROW_DTYPES[name])


def _concatenate(parts: Sequence[Array], dtype: npt.DTypeLike) -> Array:
    return np.concatenate(parts, dtype=dtype, casting="unsafe") if parts else np.empty(0, dtype)


def _concatenate_rows(name: str, parts: list[Array]) -> Array:
    widths = {part.shape[1] for part in parts if part.ndim == 2}
    if len(widths) > 1:
        wide = np.full((sum(len(part) for part in parts), max(widths)), FILLS[name], ROW_DTYPES[name])
        start = 0
        for part in parts:
            wide[start : start + len(part), : part.shape[1]] = part
            start += len(part)
        return wide
    if not parts:
        return np.empty((0, 1) if name in SLOT_COLUMNS else 0, ROW_DTYPES[name])
    return _concatenate(parts, ROW_DTYPES[name])
