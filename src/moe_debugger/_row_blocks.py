"""Blocks of captured rows, and how they become columns when they are read.

Glossary:
    row      one token at one MoE layer; a forward of T tokens at L layers has T * L rows, layer by layer.
    token    one token row of a forward; its columns (step, position, ...) are kept once for all layers.
    block    consecutive rows. A decode step of one token at 32 layers has over 200 arrays of a few bytes, whose
             headers weigh more than what they hold; packed with its neighbours it is a part of about 15 arrays.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_debugger.v1 import routing_pb2 as pb
from moe_debugger.wire.codec import NO_EXPERT

__all__ = [
    "COLUMNS",
    "FILLS",
    "NO_TOKEN",
    "ROUTER_COLUMNS",
    "ROW_DTYPES",
    "SLOT_COLUMNS",
    "TOKEN_DTYPES",
    "Array",
    "Layout",
    "RowBlock",
    "RowSource",
    "default_slots",
    "flatten",
]

# Every column, in the order of `Decisions.columns` and of the tables made of it; docs/decisions.md describes each.
COLUMNS = (
    "step", "forward_index", "phase", "request_id", "request_index", "position", "token_id", "is_padding",
    "layer_index", "module_name", "rank", "expert_ids", "gate_weights", "slot_status", "intended_expert_ids",
    "margin", "router_entropy", "router_logsumexp", "top1_probability", "logits",
)  # fmt: skip
# Token id of a row whose forward was given embeddings and no ids.
NO_TOKEN = -1
ROUTER_COLUMNS = ("margin", "router_entropy", "router_logsumexp", "top1_probability")
TOKEN_DTYPES: dict[str, npt.DTypeLike] = {
    "step": np.uint64,
    "forward_index": np.uint64,
    "phase": np.uint8,
    "request_index": np.uint32,
    "position": np.uint32,
    "token_id": np.int32,
    "is_padding": np.bool_,
}
ROW_DTYPES: dict[str, npt.DTypeLike] = {
    "layer_index": np.uint32,
    "expert_ids": np.int32,
    "gate_weights": np.float32,
    "slot_status": np.uint8,
    "intended_expert_ids": np.int32,
    **dict.fromkeys(ROUTER_COLUMNS, np.float32),
    "logits": np.float16,
}
_DTYPES = {**TOKEN_DTYPES, **ROW_DTYPES}
SLOT_COLUMNS = ("expert_ids", "gate_weights", "slot_status", "intended_expert_ids")
# What stands in a column where a layer, or a slot of it, has no such value.
FILLS: dict[str, float] = {
    "token_id": NO_TOKEN,
    "expert_ids": NO_EXPERT,
    "gate_weights": np.nan,
    "slot_status": pb.SLOT_STATUS_UNUSED,
    "intended_expert_ids": NO_EXPERT,
    **dict.fromkeys(ROUTER_COLUMNS, np.nan),
    "logits": np.nan,
}

Array = npt.NDArray[Any]


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
    tokens: dict[str, Array]
    rows: dict[str, Array]
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

    def token_column(self, name: str) -> Array:
        """Return a token column for each row, [n]."""
        column = self.tokens[name]
        return column if self.row_token is None else column[self.row_token]

    def fill(self, name: str, out: Array) -> None:
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
            column = default_slots(name, self.rows["expert_ids"])
        if column is None:
            out[:] = FILLS[name]
        elif out.ndim == 1:
            out[:] = column
        else:
            out[:, : column.shape[1]] = column
            out[:, column.shape[1] :] = FILLS[name]


@dataclass(frozen=True, slots=True)
class Layout:
    """Which columns a result has, and how wide those with several values a row are."""

    top_k: int
    num_logits: int = 0
    has_token_id: bool = False
    has_intended: bool = False

    @classmethod
    def of(cls, blocks: Sequence[RowBlock]) -> "Layout":
        """Return the layout that holds `blocks`."""
        return cls(
            top_k=max([1, *(block.rows["expert_ids"].shape[1] for block in blocks)]),
            num_logits=max([0, *(block.rows["logits"].shape[1] for block in blocks if "logits" in block.rows)]),
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
        return sum(_empty_column(name, 1, self).nbytes for name in self.names())

    def names(self) -> tuple[str, ...]:
        """Return the columns that rows have in this layout."""
        absent = {
            "token_id": not self.has_token_id,
            "intended_expert_ids": not self.has_intended,
            "logits": not self.num_logits,
        }
        return tuple(name for name in _DTYPES if not absent.get(name, False))


@dataclass(frozen=True, slots=True)
class RowSource:
    """Blocks that come one by one, with what has to be known before the first: their layout and number of rows."""

    blocks: Iterable[RowBlock]
    layout: Layout
    num_rows: int

    @classmethod
    def of(cls, blocks: Sequence[RowBlock]) -> "RowSource":
        """Return a source of blocks that are all there."""
        return cls(blocks, Layout.of(blocks), sum(len(block) for block in blocks))


def _empty_column(name: str, num_rows: int, layout: Layout) -> Array:
    """Return an uninitialised column of its documented dtype and shape."""
    width = layout.top_k if name in SLOT_COLUMNS else layout.num_logits if name == "logits" else None
    return np.empty(num_rows if width is None else (num_rows, width), _DTYPES[name])


def flatten(
    blocks: Iterable[RowBlock], layout: Layout, num_rows: int, names: dict[str, int] | None = None
) -> tuple[dict[str, Array], tuple[str, ...]]:
    """Return the columns of all rows, and the requests that `request_index` points to.

    Args:
        blocks: taken one by one, so that those of a file need not be in memory together.
        num_rows: rows of all blocks, or more.
        names: index of requests that have one already; those of `blocks` are added.
    """
    names = {} if names is None else names
    columns = {name: _empty_column(name, num_rows, layout) for name in layout.names()}
    start = 0
    for block in blocks:
        stop = start + len(block)
        for name, column in columns.items():
            block.fill(name, column[start:stop])
        index = columns["request_index"][start:stop]
        index[:] = _join_names(names, block.request_ids, index)[index]
        start = stop
    return {name: column[:start] for name, column in columns.items()}, tuple(names)


def _join_names(names: dict[str, int], more: Sequence[str], index: Array) -> npt.NDArray[np.uint32]:
    """Return the numbers of `more` in `names`, to which those in `index` are added by their first row."""
    first_row = np.full(len(more), len(index))
    # Of several values for one place the last is kept, so from the end on it is that of the first row.
    first_row[index[::-1]] = np.arange(len(index))[::-1]
    mapping = np.zeros(len(more), np.uint32)
    for place in (int(each) for each in np.argsort(first_row, kind="stable")):
        if first_row[place] < len(index):
            mapping[place] = names.setdefault(more[place], len(names))
    return mapping


def default_slots(name: str, expert_ids: Array) -> Array:
    """Return the slots of a layer that says nothing more than its ids: each id is routed, and was meant."""
    if name == "slot_status":
        statuses = np.array([pb.SLOT_STATUS_UNUSED, pb.SLOT_STATUS_ROUTED], dtype=np.uint8)
        return statuses[(expert_ids >= 0).view(np.uint8)]
    return expert_ids
