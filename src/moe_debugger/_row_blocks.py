"""Blocks of captured rows: many forwards packed into a few arrays, and flattened into columns when they are read.

Glossary:
    row      one token at one MoE layer; a forward of T tokens at L layers has T * L rows, layer by layer.
    token    one token row of a forward; its columns (step, position, ...) are kept once for all layers.
    block    consecutive rows. A decode step of one token at 32 layers has over 200 arrays of a few bytes, whose
             headers weigh more than what they hold; packed with its neighbours it is a part of about 15 arrays.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_debugger.v1 import routing_pb2 as pb
from moe_debugger.wire.codec import NO_EXPERT, RoutingColumns

__all__ = ["COLUMNS", "NO_TOKEN", "ROUTER_COLUMNS", "Layout", "RowBlock", "empty_column", "flatten", "pack"]

# Every column, in the order of `Decisions.columns` and of the tables made of it; docs/decisions.md describes each.
COLUMNS = (
    "step", "forward_index", "phase", "request_id", "request_index", "position", "token_id", "is_padding",
    "layer_index", "module_name", "rank", "expert_ids", "gate_weights", "slot_status", "intended_expert_ids",
    "margin", "router_entropy", "router_logsumexp", "top1_probability", "logits",
)  # fmt: skip
# Token id of a row whose forward was given embeddings and no ids.
NO_TOKEN = -1
ROUTER_COLUMNS = ("margin", "router_entropy", "router_logsumexp", "top1_probability")
_TOKEN_DTYPES: dict[str, npt.DTypeLike] = {
    "step": np.uint64,
    "forward_index": np.uint64,
    "phase": np.uint8,
    "request_index": np.uint32,
    "position": np.uint32,
    "token_id": np.int32,
    "is_padding": np.bool_,
}
_ROW_DTYPES: dict[str, npt.DTypeLike] = {
    "layer_index": np.uint32,
    "expert_ids": np.int32,
    "gate_weights": np.float32,
    "slot_status": np.uint8,
    "intended_expert_ids": np.int32,
    **dict.fromkeys(ROUTER_COLUMNS, np.float32),
    "logits": np.float16,
}
_DTYPES = {**_TOKEN_DTYPES, **_ROW_DTYPES}
_SLOT_COLUMNS = ("expert_ids", "gate_weights", "slot_status", "intended_expert_ids")
# What stands in a column where a layer, or a slot of it, has no such value.
_FILLS: dict[str, float] = {
    "token_id": NO_TOKEN,
    "expert_ids": NO_EXPERT,
    "gate_weights": np.nan,
    "slot_status": pb.SLOT_STATUS_UNUSED,
    "intended_expert_ids": NO_EXPERT,
    **dict.fromkeys(ROUTER_COLUMNS, np.nan),
    "logits": np.nan,
}

_Array = npt.NDArray[Any]


@dataclass(slots=True)
class RowBlock:
    """Consecutive rows; n rows of N tokens, k slots.

    Attributes:
        request_ids: the distinct requests, in the order of their first row.
        tokens: [N] columns by name; `token_id` is absent where no forward was given ids.
        rows: [n], [n, k] or [n, E] columns by name; absent where no layer of the block has them.
        row_token: [n] uint32 token of each row; None = row i is token i.
    """

    request_ids: Sequence[str]
    tokens: dict[str, _Array]
    rows: dict[str, _Array]
    row_token: npt.NDArray[np.uint32] | None = None

    def __len__(self) -> int:
        return len(self.rows["layer_index"])

    @property
    def size_bytes(self) -> int:
        """Bytes of the arrays and the names."""
        size = sum(array.nbytes for columns in (self.tokens, self.rows) for array in columns.values())
        size += 0 if self.row_token is None else self.row_token.nbytes
        return size + sum(len(name) + 64 for name in self.request_ids)

    def slice(self, start: int, stop: int) -> "RowBlock":
        """Return the rows from `start` to before `stop`, without copying them."""
        rows = {name: column[start:stop] for name, column in self.rows.items()}
        if self.row_token is None:
            return RowBlock(self.request_ids, {name: column[start:stop] for name, column in self.tokens.items()}, rows)
        return RowBlock(self.request_ids, self.tokens, rows, self.row_token[start:stop])

    def slices(self, max_rows: int) -> Iterator["RowBlock"]:
        """Yield the block in parts of at most `max_rows` rows."""
        for start in range(0, len(self), max_rows):
            yield self.slice(start, start + max_rows)

    def token_column(self, name: str) -> _Array:
        """Return a token column for each row, [n]."""
        column = self.tokens[name]
        return column if self.row_token is None else column[self.row_token]

    def fill(self, name: str, out: _Array) -> None:
        """Write a column into `out`, [n] or [n, width of the column in the result]."""
        column = self.tokens.get(name)
        if column is not None:
            if self.row_token is None:
                out[:] = column
            else:
                # "clip" only because "raise" goes through a buffer; every index is in range.
                np.take(column, self.row_token, out=out, mode="clip")
            return
        column = self.rows.get(name)
        if column is None and name in ("slot_status", "intended_expert_ids"):
            column = _default_slots(name, self.rows["expert_ids"])
        if column is None:
            out[:] = _FILLS[name]
        elif out.ndim == 1:
            out[:] = column
        else:
            out[:, : column.shape[1]] = column
            out[:, column.shape[1] :] = _FILLS[name]


@dataclass(frozen=True, slots=True)
class Layout:
    """Which columns a result has, and how wide those with several values a row are."""

    top_k: int
    num_logits: int = 0
    has_token_id: bool = False
    has_intended: bool = False

    @classmethod
    def of(cls, blocks: Sequence[RowBlock], *, top_k: int = 1, num_logits: int = 0) -> "Layout":
        """Return the layout that holds `blocks`: at least `top_k` slots, and `num_logits` where there are logits."""
        logits = [block.rows["logits"].shape[1] for block in blocks if "logits" in block.rows]
        return cls(
            top_k=max([top_k, *(block.rows["expert_ids"].shape[1] for block in blocks)]),
            num_logits=max([num_logits, *logits]) if logits else 0,
            has_token_id=any("token_id" in block.tokens for block in blocks),
            has_intended=any("intended_expert_ids" in block.rows for block in blocks),
        )

    def join(self, other: "Layout") -> "Layout":
        """Return the layout that holds what both hold."""
        return Layout(
            top_k=max(self.top_k, other.top_k),
            num_logits=max(self.num_logits, other.num_logits),
            has_token_id=self.has_token_id or other.has_token_id,
            has_intended=self.has_intended or other.has_intended,
        )

    @property
    def row_bytes(self) -> int:
        """Bytes that one row takes in the result."""
        return sum(empty_column(name, 1, self).nbytes for name in self.names())

    def names(self) -> tuple[str, ...]:
        """Return the columns that rows have in this layout."""
        absent = {
            "token_id": not self.has_token_id,
            "intended_expert_ids": not self.has_intended,
            "logits": not self.num_logits,
        }
        return tuple(name for name in _DTYPES if not absent.get(name, False))


def empty_column(name: str, num_rows: int, layout: Layout) -> _Array:
    """Return an uninitialised column of its documented dtype and shape."""
    width = layout.top_k if name in _SLOT_COLUMNS else layout.num_logits if name == "logits" else None
    return np.empty(num_rows if width is None else (num_rows, width), _DTYPES[name])


def flatten(
    blocks: Sequence[RowBlock], layout: Layout, names: dict[str, int] | None = None
) -> tuple[dict[str, _Array], tuple[str, ...]]:
    """Return the columns of all rows, and the requests that `request_index` points to.

    Args:
        names: index of requests that have one already; those of `blocks` are added.
    """
    names = {} if names is None else names
    num_rows = sum(len(block) for block in blocks)
    columns = {name: empty_column(name, num_rows, layout) for name in layout.names()}
    start = 0
    for block in blocks:
        stop = start + len(block)
        for name, column in columns.items():
            block.fill(name, column[start:stop])
        index = columns["request_index"][start:stop]
        index[:] = _join_names(names, block.request_ids, index)[index]
        start = stop
    return columns, tuple(names)


def pack(batches: Sequence[RoutingColumns]) -> RowBlock:
    """Return the rows of `batches` as one block, in their order."""
    names: dict[str, int] = {}
    tokens: dict[str, _Array] = {}
    for name, dtype in _TOKEN_DTYPES.items():
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
    rows: dict[str, _Array] = {
        "layer_index": np.repeat(np.array([layer.layer_index for layer in layers], dtype=np.uint32), lengths)
    }
    for name in _ROW_DTYPES:
        if name == "layer_index":
            continue
        values: list[_Array | None] = [getattr(layer, name) for layer in layers]
        if name not in ("expert_ids", "gate_weights") and all(value is None for value in values):
            continue
        shapes = [layer.expert_ids for layer in layers]
        rows[name] = _concatenate_rows(name, [_or_default(name, *pair) for pair in zip(values, shapes, strict=True)])
    # The capture may leave a weight where nothing was applied.
    unreached = rows["expert_ids"] < 0
    if unreached.any():
        rows["gate_weights"][unreached] = np.nan
    for name in ("expert_ids", "intended_expert_ids"):
        if name in rows and int(rows[name].max(initial=0)) <= np.iinfo(np.int16).max:
            rows[name] = rows[name].astype(np.int16)
    return RowBlock(tuple(names), tokens, rows, row_token)


def _request_index(batch: RoutingColumns, names: dict[str, int]) -> _Array:
    mapping = np.array([names.setdefault(x, len(names)) for x in batch.request_ids or ("",)], dtype=np.uint32)
    return mapping[batch.request_index]


def _join_names(names: dict[str, int], more: Sequence[str], index: _Array) -> npt.NDArray[np.uint32]:
    """Return what each of `more` is called in `names`, to which those that `index` uses are added."""
    is_used = np.zeros(len(more), bool)
    is_used[index] = True
    mapping = np.zeros(len(more), np.uint32)
    for place in np.flatnonzero(is_used).tolist():
        mapping[place] = names.setdefault(more[place], len(names))
    return mapping


def _default_slots(name: str, expert_ids: _Array) -> _Array:
    """Return the slots of a layer that says nothing more than its ids: each id is routed, and was meant."""
    if name == "slot_status":
        statuses = np.array([pb.SLOT_STATUS_UNUSED, pb.SLOT_STATUS_ROUTED], dtype=np.uint8)
        return statuses[(expert_ids >= 0).view(np.uint8)]
    return expert_ids


def _or_default(name: str, value: _Array | None, expert_ids: _Array) -> _Array:
    if value is not None:
        return value
    if name in ("slot_status", "intended_expert_ids"):
        return _default_slots(name, expert_ids)
    if name == "logits":
        return np.empty((len(expert_ids), 0), np.float16)
    return np.full(expert_ids.shape if name == "gate_weights" else len(expert_ids), _FILLS[name], _DTYPES[name])


def _concatenate(parts: Sequence[_Array], dtype: npt.DTypeLike) -> _Array:
    return np.concatenate(parts, dtype=dtype, casting="unsafe") if parts else np.empty(0, dtype)


def _concatenate_rows(name: str, parts: list[_Array]) -> _Array:
    widths = {part.shape[1] for part in parts if part.ndim == 2}
    if len(widths) > 1:
        wide = np.full((sum(len(part) for part in parts), max(widths)), _FILLS[name], _DTYPES[name])
        start = 0
        for part in parts:
            wide[start : start + len(part), : part.shape[1]] = part
            start += len(part)
        return wide
    if not parts:
        return np.empty((0, 1) if name in _SLOT_COLUMNS else 0, _DTYPES[name])
    return _concatenate(parts, _DTYPES[name])
