"""What is kept of single requests: exact counts for the newest ones, rows within a byte budget. Pure.

A request's tokens are counted at every layer; its rows (position, experts, weights) are kept in chunks, so that a flush
writes only the chunk that grows. Where the budget is spent, the rows of the request that was silent longest go first.

Stacks (an encoder, a decoder) route tokens of their own, at positions of their own: their rows lie in chunks of their
own, and a request has as many tokens as one layer of its decoder saw, not the sum over stacks.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_analyzer.blob import pack, unpack
from moe_debugger.analysis.state import NUM_PHASES
from moe_debugger.wire.codec import RoutingColumns
from moe_debugger.wire.slots import SlotClasses

__all__ = ["MAIN_STACK", "RequestBook", "RequestEntry", "RowChunk", "counts_field", "decode_counts", "rows_field"]

# A chunk that has reached this many rows is never written again.
_CHUNK_ROWS = 256
_MAX_ROWS_PER_REQUEST = 65_536

# The stack whose tokens are a request's tokens.
MAIN_STACK = "decoder"
# A manifest that names no stack means the decoder.
_MAIN_NAMES = (MAIN_STACK, "", None)

_U64 = npt.NDArray[np.uint64]


def rows_field(request_id: str, chunk: int) -> str:
    """Return the hash field of a chunk of rows."""
    return f"{request_id}:{chunk}"


def counts_field(request_id: str) -> str:
    """Return the hash field of a request's counts per layer and expert."""
    return f"{request_id}:counts"


@dataclass(slots=True)
class RowChunk:
    """Rows of one request in the order in which they came; layers by index, [n, k] each."""

    position: npt.NDArray[np.uint32]
    phase: npt.NDArray[np.uint8]
    token_id: npt.NDArray[np.uint32] | None
    expert_ids: dict[int, npt.NDArray[np.uint16]]
    gate_weights: dict[int, npt.NDArray[np.float16]]
    stack: str = MAIN_STACK
    # None of what was stored before steps were.
    step: npt.NDArray[np.uint64] | None = None

    @property
    def num_rows(self) -> int:
        """Rows in this chunk."""
        return len(self.position)

    @property
    def size_bytes(self) -> int:
        """About what it takes in Redis."""
        columns: list[npt.NDArray[Any]] = [self.position, self.phase]
        columns += [*self.expert_ids.values(), *self.gate_weights.values()]
        columns += [column for column in (self.token_id, self.step) if column is not None]
        return sum(column.nbytes for column in columns)

    def fits(self, other: "RowChunk") -> bool:
        """Return whether both have the same columns."""
        return (
            self.stack == other.stack
            and self.expert_ids.keys() == other.expert_ids.keys()
            and self.gate_weights.keys() == other.gate_weights.keys()
            and (self.token_id is None) == (other.token_id is None)
            and (self.step is None) == (other.step is None)
            and all(ids.shape[1] == other.expert_ids[index].shape[1] for index, ids in self.expert_ids.items())
        )

    def plus(self, other: "RowChunk") -> "RowChunk":
        """Return both, one after the other."""
        return RowChunk(
            np.concatenate([self.position, other.position]),
            np.concatenate([self.phase, other.phase]),
            None
            if self.token_id is None or other.token_id is None
            else np.concatenate([self.token_id, other.token_id]),
            {index: np.concatenate([ids, other.expert_ids[index]]) for index, ids in self.expert_ids.items()},
            {index: np.concatenate([w, other.gate_weights[index]]) for index, w in self.gate_weights.items()},
            self.stack,
            None if self.step is None or other.step is None else np.concatenate([self.step, other.step]),
        )

    def encode(self) -> bytes:
        """Return the chunk as a Redis value."""
        header = {
            "kind": "rows",
            "n": self.num_rows,
            "stack": self.stack,
            "token_id": self.token_id is not None,
            "step": self.step is not None,
            "ids": [[index, ids.shape[1]] for index, ids in self.expert_ids.items()],
            "weights": [[index, weights.shape[1]] for index, weights in self.gate_weights.items()],
        }
        columns = [self.position.astype("<u4").tobytes(), self.phase.astype("u1").tobytes()]
        if self.token_id is not None:
            columns.append(self.token_id.astype("<u4").tobytes())
        if self.step is not None:
            columns.append(self.step.astype("<u8").tobytes())
        columns.extend(ids.astype("<u2").tobytes() for ids in self.expert_ids.values())
        columns.extend(weights.astype("<f2").tobytes() for weights in self.gate_weights.values())
        return pack(header, columns)

    @classmethod
    def decode(cls, data: bytes) -> "RowChunk":
        """Return the chunk that `encode` gave."""
        header, columns = unpack(data)
        n, rest = header["n"], iter(columns[2:])
        token_id = np.frombuffer(next(rest), "<u4") if header["token_id"] else None
        step = np.frombuffer(next(rest), "<u8") if header.get("step") else None
        return cls(
            np.frombuffer(columns[0], "<u4"),
            np.frombuffer(columns[1], "u1"),
            token_id,
            {index: np.frombuffer(next(rest), "<u2").reshape(n, k) for index, k in header["ids"]},
            {index: np.frombuffer(next(rest), "<f2").reshape(n, k) for index, k in header["weights"]},
            header.get("stack", MAIN_STACK),  # what was stored before there were stacks
            step,
        )


@dataclass(slots=True)
class RequestEntry:
    """One request: its tokens by layer and phase, its load, and what is kept of its rows.

    Attributes:
        side_layers: the layers in `tokens` that belong to another stack than the decoder.
    """

    request_id: str
    first_seen_ns: int
    last_seen_ns: int
    tokens: dict[int, _U64] = field(default_factory=dict)
    counts: dict[int, _U64] = field(default_factory=dict)
    num_rows_kept: int = 0
    num_rows_not_kept: int = 0
    num_chunks: int = 0
    rows_bytes: int = 0
    open_chunk: RowChunk | None = None
    side_layers: set[int] = field(default_factory=set)

    def encode_summary(self) -> bytes:
        """Return what a list of requests shows."""
        return pack(
            {
                "kind": "request",
                "first": self.first_seen_ns,
                "last": self.last_seen_ns,
                "kept": self.num_rows_kept,
                "not_kept": self.num_rows_not_kept,
                "chunks": self.num_chunks,
                "rows_bytes": self.rows_bytes,
                "layers": list(self.tokens),
                "side": sorted(self.side_layers),
            },
            [tokens.astype("<u8").tobytes() for tokens in self.tokens.values()],
        )

    @classmethod
    def decode_summary(cls, request_id: str, data: bytes) -> "RequestEntry":
        """Return an entry without counts."""
        header, columns = unpack(data)
        return cls(
            request_id,
            header["first"],
            header["last"],
            {i: np.frombuffer(c, "<u8").astype(np.uint64) for i, c in zip(header["layers"], columns, strict=True)},
            num_rows_kept=header["kept"],
            num_rows_not_kept=header["not_kept"],
            num_chunks=header["chunks"],
            rows_bytes=header["rows_bytes"],
            side_layers=set(header.get("side", ())),
        )

    def encode_counts(self) -> bytes:
        """Return the load per layer and expert."""
        return pack(
            {"kind": "request_counts", "layers": list(self.counts)},
            [counts.astype("<u8").tobytes() for counts in self.counts.values()],
        )

    def num_tokens(self, phase: int | None = None) -> int:
        """Valid tokens of the decoder's layer that saw most, of one phase or of all.

        Where the decoder saw none, of any layer.
        """
        main = [tokens for index, tokens in self.tokens.items() if index not in self.side_layers]
        for layers in (main, list(self.tokens.values())):
            if any(tokens.any() for tokens in layers):
                return max(int(tokens.sum() if phase is None else tokens[phase]) for tokens in layers)
        return 0


def decode_counts(data: bytes) -> dict[int, _U64]:
    """Return [E] counts by layer index."""
    header, columns = unpack(data)
    return {i: np.frombuffer(c, "<u8").astype(np.uint64) for i, c in zip(header["layers"], columns, strict=True)}


class RequestBook:
    """The requests of one session in one partition."""

    def __init__(self, *, max_requests: int, rows_budget_bytes: int) -> None:
        self.entries: dict[str, RequestEntry] = {}
        self.num_forgotten = 0
        self._max_requests = max_requests
        self._rows_budget = rows_budget_bytes
        self._rows_bytes = 0
        self._dirty: set[str] = set()
        self._row_writes: dict[str, bytes | None] = {}
        self._forgotten: list[str] = []
        self._counts_deletes: list[str] = []

    def load(self, entries: list[RequestEntry]) -> None:
        """Take over stored entries; their rows stay where they are."""
        for entry in sorted(entries, key=lambda one: one.last_seen_ns):
            self.entries[entry.request_id] = entry
            self._rows_bytes += entry.rows_bytes

    def add(self, columns: RoutingColumns, stored_ns: int, stacks: Mapping[int, str] | None = None) -> bool:
        """Count a batch's rows for their requests; return whether a new request came.

        Args:
            columns: rows of one stack.
            stored_ns: the broker's time.
            stacks: the stack of each layer index; a layer that is not in it belongs to the decoder.
        """
        named = np.array([bool(name) for name in columns.request_ids], np.bool_)
        if not named.any():
            return False
        valid = ~columns.is_padding & named[columns.request_index]
        present = np.unique(columns.request_index[valid])
        is_new = False
        for index in present.tolist():
            name = columns.request_ids[index]
            entry = self.entries.pop(name, None)
            if entry is None:
                entry = RequestEntry(name, stored_ns, stored_ns)
                is_new = True
            # Re-inserted at the end: the dict's order is the order of the last sign of life.
            self.entries[name] = entry
            entry.last_seen_ns = max(entry.last_seen_ns, stored_ns)
            self._dirty.add(name)
        side = {one.layer_index for one in columns.layers if (stacks or {}).get(one.layer_index) not in _MAIN_NAMES}
        first = columns.layers[0].layer_index if columns.layers else -1
        self._count(columns, valid, present, side if stacks else set())
        self._keep_rows(columns, valid, present, (stacks or {}).get(first) or MAIN_STACK)
        while len(self.entries) > self._max_requests:
            self._forget(next(iter(self.entries)))
        return is_new

    def _count(
        self,
        columns: RoutingColumns,
        valid: npt.NDArray[np.bool_],
        present: npt.NDArray[np.uint32],
        side_layers: set[int],
    ) -> None:
        num_requests = len(columns.request_ids)
        for layer in columns.layers:
            rows: Any = slice(None) if layer.row_index is None else layer.row_index
            keep = valid[rows]
            request = columns.request_index[rows][keep].astype(np.intp)
            phase = np.minimum(columns.phase[rows][keep], NUM_PHASES - 1).astype(np.intp)
            tokens = np.bincount(request * NUM_PHASES + phase, minlength=num_requests * NUM_PHASES)
            tokens = tokens.reshape(num_requests, NUM_PHASES).astype(np.uint64)
            ids = layer.expert_ids[keep]
            status = None if layer.slot_status is None else layer.slot_status[keep]
            is_load = SlotClasses.of(ids, status, layer.num_experts).is_load
            cells = (request[:, None] * layer.num_experts + ids)[is_load]
            load = np.bincount(cells, minlength=num_requests * layer.num_experts)
            load = load.reshape(num_requests, layer.num_experts).astype(np.uint64)
            for index in present.tolist():
                entry = self.entries[columns.request_ids[index]]
                entry.side_layers.update(side_layers)
                if layer.layer_index in entry.tokens:
                    entry.tokens[layer.layer_index] = entry.tokens[layer.layer_index] + tokens[index]
                else:
                    entry.tokens[layer.layer_index] = tokens[index].copy()
                if layer.layer_index in entry.counts:
                    entry.counts[layer.layer_index] = entry.counts[layer.layer_index] + load[index]
                else:
                    entry.counts[layer.layer_index] = load[index].copy()

    def _keep_rows(
        self, columns: RoutingColumns, valid: npt.NDArray[np.bool_], present: npt.NDArray[np.uint32], stack: str
    ) -> None:
        layers = _full_layers(columns)
        for index in present.tolist():
            rows = np.flatnonzero(valid & (columns.request_index == index))
            entry = self.entries[columns.request_ids[index]]
            room = min(_MAX_ROWS_PER_REQUEST - entry.num_rows_kept, len(rows)) if self._rows_budget else 0
            entry.num_rows_not_kept += len(rows) - room
            rows = rows[:room]
            if not room:
                continue
            chunk = RowChunk(
                columns.position[rows].astype(np.uint32),
                columns.phase[rows],
                None if columns.token_id is None else columns.token_id[rows],
                {layer: ids[rows] for layer, (ids, _) in layers.items()},
                {layer: weights[rows] for layer, (_, weights) in layers.items() if weights is not None},
                stack,
                columns.step[rows].astype(np.uint64),
            )
            self._append(entry, chunk)
        for name in list(self.entries):
            if self._rows_bytes <= self._rows_budget:
                break
            self._drop_rows(self.entries[name])

    def _append(self, entry: RequestEntry, chunk: RowChunk) -> None:
        entry.num_rows_kept += chunk.num_rows
        entry.rows_bytes += chunk.size_bytes
        self._rows_bytes += chunk.size_bytes
        if entry.open_chunk is not None and entry.open_chunk.fits(chunk):
            entry.open_chunk = entry.open_chunk.plus(chunk)
        else:
            self._seal(entry)
            entry.open_chunk = chunk
            entry.num_chunks += 1
        if entry.open_chunk.num_rows >= _CHUNK_ROWS:
            self._seal(entry)

    def _seal(self, entry: RequestEntry) -> None:
        if entry.open_chunk is not None:
            self._row_writes[rows_field(entry.request_id, entry.num_chunks - 1)] = entry.open_chunk.encode()
            entry.open_chunk = None

    def _drop_rows(self, entry: RequestEntry) -> None:
        for chunk in range(entry.num_chunks):
            self._row_writes[rows_field(entry.request_id, chunk)] = None
        self._rows_bytes -= entry.rows_bytes
        entry.num_rows_not_kept += entry.num_rows_kept
        entry.num_rows_kept = entry.num_chunks = entry.rows_bytes = 0
        entry.open_chunk = None
        self._dirty.add(entry.request_id)

    def _forget(self, name: str) -> None:
        entry = self.entries[name]
        self._drop_rows(entry)
        del self.entries[name]
        self._dirty.discard(name)
        self._forgotten.append(name)
        self.num_forgotten += 1

    def needs_counts(self, request_ids: list[str]) -> list[str]:
        """Return those requests whose counts are stored but not loaded; load them with `set_counts` before `add`."""
        return [
            name
            for name in request_ids
            if (entry := self.entries.get(name)) is not None and entry.tokens and not entry.counts
        ]

    def set_counts(self, request_id: str, counts: dict[int, _U64]) -> None:
        """Take over a request's stored counts."""
        self.entries[request_id].counts = counts

    def take_writes(self) -> tuple[dict[str, bytes | None], dict[str, bytes | None]]:
        """Return the changed fields of the summaries and of the rows since the last call; None deletes a field."""
        summaries: dict[str, bytes | None] = dict.fromkeys(self._forgotten)
        rows = self._row_writes
        rows.update({counts_field(name): None for name in self._forgotten})
        for name in self._dirty:
            entry = self.entries[name]
            summaries[name] = entry.encode_summary()
            rows[counts_field(name)] = entry.encode_counts()
            if entry.open_chunk is not None:
                rows[rows_field(name, entry.num_chunks - 1)] = entry.open_chunk.encode()
        self._dirty, self._row_writes, self._forgotten = set(), {}, []
        return summaries, rows


def _full_layers(
    columns: RoutingColumns,
) -> dict[int, tuple[npt.NDArray[np.uint16], npt.NDArray[np.float16] | None]]:
    """Ids and weights of each layer for all token rows; 65535 where the layer did not see the row."""
    full: dict[int, tuple[npt.NDArray[np.uint16], npt.NDArray[np.float16] | None]] = {}
    for layer in columns.layers:
        # As they were on the wire, where float32 began as float16.
        weights = None if layer.gate_weights is None else layer.gate_weights.astype(np.float16)
        ids = layer.expert_ids.astype(np.uint16)
        if layer.row_index is not None:
            k = ids.shape[1]
            all_ids = np.full((columns.num_tokens, k), 0xFFFF, np.uint16)
            all_ids[layer.row_index] = ids
            ids = all_ids
            if weights is not None:
                all_weights = np.zeros((columns.num_tokens, k), np.float16)
                all_weights[layer.row_index] = weights
                weights = all_weights
        full[layer.layer_index] = (ids, weights)
    return full
