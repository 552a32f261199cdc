"""Packs what the capture gives, with an array per layer and column, into blocks of rows."""

import itertools
from collections.abc import Iterator, Sequence

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

__all__ = ["cut", "pack"]


def pack(batches: Sequence[RoutingColumns]) -> RowBlock:
    """Return the rows of `batches` as one block: forward after forward, and within a forward in their order.

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
    forward_index = tokens["forward_index"][row_token]
    if len(forward_index) and (forward_index[1:] < forward_index[:-1]).any():
        # A batch of several forwards holds all of them layer by layer.
        order = np.argsort(forward_index, kind="stable")
        rows, row_token = {name: column[order] for name, column in rows.items()}, row_token[order]
    return RowBlock(tuple(names), tokens, rows, row_token)


def cut(block: RowBlock, max_bytes: int) -> Iterator[RowBlock]:
    """Yield a block that `pack` made in parts of about `max_bytes`: whole forwards, and at least one in each."""
    num_parts = block.size_bytes // max_bytes
    forward_index = block.token_column("forward_index")
    starts = np.flatnonzero(forward_index[1:] != forward_index[:-1]) + 1
    if num_parts <= 1 or not len(starts):
        yield block
        return
    wanted = np.arange(1, num_parts) * (len(block) / num_parts)
    places = np.minimum(np.searchsorted(starts, wanted), len(starts) - 1)
    edges = [0, *np.unique(starts[places]).tolist(), len(block)]
    for first, last in itertools.pairwise(edges):
        yield _copy(block, first, last)


def _copy(block: RowBlock, first: int, last: int) -> RowBlock:
    """Return some rows of a block with their tokens and requests, as arrays of their own."""
    assert block.row_token is not None
    used, row_token = np.unique(block.row_token[first:last], return_inverse=True)
    tokens = {name: column[used] for name, column in block.tokens.items()}
    requests, request_index = np.unique(tokens["request_index"], return_inverse=True)
    tokens["request_index"] = request_index.astype(np.uint32)
    rows = {name: column[first:last].copy() for name, column in block.rows.items()}
    names = [block.request_ids[int(index)] for index in requests]
    return RowBlock(names, tokens, rows, row_token.astype(np.uint32))


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
