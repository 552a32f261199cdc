"""The captured routes as columns: one row per token and MoE layer, in the order of the forward."""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from moe_debugger._tables import html_table, text_table, to_data_frame
from moe_debugger.capture.discovery import LayerInfo
from moe_debugger.errors import DependencyMissingError
from moe_debugger.publish.batching import columns_size_bytes
from moe_debugger.wire.codec import NO_EXPERT, LayerColumns, RoutingColumns

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Decisions", "RowStore"]

_ROUTER_COLUMNS = ("margin", "router_entropy", "router_logsumexp", "top1_probability")
_COLUMNS = (
    "step", "forward_index", "phase", "request_id", "request_index", "position", "token_id", "is_padding",
    "layer_index", "module_name", "rank", "expert_ids", "gate_weights", "slot_status", *_ROUTER_COLUMNS, "logits",
)  # fmt: skip
_NUM_SHOWN = 20


class Decisions(Mapping[str, npt.NDArray[Any]]):
    """Routing decisions as numpy columns; n rows, k = the largest top-k of the model.

    Columns are attributes and items: ``decisions.expert_ids is decisions["expert_ids"]``. As for a data frame,
    iterating gives the names of the columns and ``len`` the number of rows.

    Attributes:
        step, forward_index: [n] uint64.
        phase: [n] uint8 of `moe_debugger.v1.Phase` (1 prefill, 2 decode, 3 train, 4 eval).
        request_ids: the distinct requests; request_index: [n] uint32 into them.
        position: [n] uint32, position in the request; 0 for padding.
        token_id: [n] uint32, or None where the level holds no tokens.
        is_padding: [n] bool.
        layer_index: [n] uint32, index among the MoE layers.
        module_names: by layer index.
        rank: [n] uint32, global rank of the capturing process.
        expert_ids: [n, k] int32, -1 where a slot reached no expert (or the layer has fewer slots).
        gate_weights: [n, k] float16 as applied, NaN where a slot reached no expert.
        slot_status: [n, k] uint8 of `SlotStatus` (1 routed, 5 unused).
        margin: [n] float32, K-th minus (K+1)-th selection score. In logits for plain softmax routers, in selection
            scores where a bias or groups take part; NaN where recomputing does not give the captured ids.
        router_entropy, router_logsumexp, top1_probability: [n] float32, nats; NaN where the router has no such thing.
        logits: [n, E] float16 at level "full", else None.
    """

    def __init__(self, batches: Sequence[RoutingColumns], layers: Sequence[LayerInfo], rank: int = 0) -> None:
        self.layers = {info.layer_index: info for info in layers}
        self.module_names = {info.layer_index: info.module_name for info in layers}
        names: dict[str, int] = {}
        self._k = max(
            [info.top_k for info in layers] + [x.expert_ids.shape[1] for b in batches for x in b.layers] + [1]
        )
        experts = max((info.num_experts for info in layers), default=0)
        has_tokens = bool(batches) and all(batch.token_id is not None for batch in batches)
        has_logits = any(layer.logits is not None for batch in batches for layer in batch.layers)
        blocks = [(batch, layer) for batch in batches for layer in batch.layers]
        requests = {id(b): np.array([names.setdefault(x, len(names)) for x in b.request_ids] or [0]) for b in batches}

        def tokens(name: str, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
            return _concatenate([getattr(batch, name)[_rows(layer)] for batch, layer in blocks], dtype)

        self.step: npt.NDArray[np.uint64] = tokens("step", np.uint64)
        self.forward_index: npt.NDArray[np.uint64] = tokens("forward_index", np.uint64)
        self.phase: npt.NDArray[np.uint8] = tokens("phase", np.uint8)
        self.position: npt.NDArray[np.uint32] = tokens("position", np.uint32)
        self.is_padding: npt.NDArray[np.bool_] = tokens("is_padding", np.bool_)
        self.token_id: npt.NDArray[np.uint32] | None = tokens("token_id", np.uint32) if has_tokens else None
        self.request_index: npt.NDArray[np.uint32] = _concatenate(
            [requests[id(batch)][batch.request_index[_rows(layer)]] for batch, layer in blocks], np.uint32
        )
        self.request_ids: tuple[str, ...] = tuple(names)
        self.layer_index: npt.NDArray[np.uint32] = _concatenate(
            [np.full(len(layer.expert_ids), layer.layer_index) for _, layer in blocks], np.uint32
        )
        self.rank: npt.NDArray[np.uint32] = np.full(len(self.layer_index), rank, np.uint32)
        slots = [self._slots(layer) for _, layer in blocks]
        self.expert_ids: npt.NDArray[np.int32] = _concatenate([ids for ids, _, _ in slots], np.int32, self._k)
        self.gate_weights: npt.NDArray[np.float16] = _concatenate([w for _, w, _ in slots], np.float16, self._k)
        self.slot_status: npt.NDArray[np.uint8] = _concatenate([status for _, _, status in slots], np.uint8, self._k)
        self.margin, self.router_entropy, self.router_logsumexp, self.top1_probability = (
            _concatenate([_or_nan(getattr(layer, name), len(layer.expert_ids)) for _, layer in blocks], np.float32)
            for name in _ROUTER_COLUMNS
        )
        self.logits: npt.NDArray[np.float16] | None = None
        if has_logits:
            self.logits = _concatenate(
                [
                    _wide(np.full((len(x.expert_ids), 0), np.nan) if x.logits is None else x.logits, experts, np.nan)
                    for _, x in blocks
                ],
                np.float16,
                experts,
            )

    def __len__(self) -> int:
        return len(self.layer_index)

    def __iter__(self) -> Iterator[str]:
        return (name for name in _COLUMNS if getattr(self, name) is not None)

    def __getitem__(self, name: str) -> npt.NDArray[Any]:
        column: npt.NDArray[Any] | None = getattr(self, name) if name in _COLUMNS else None
        if column is None:
            raise KeyError(name)
        return column

    __hash__ = None  # type: ignore[assignment]  # holds arrays

    @property
    def request_id(self) -> npt.NDArray[np.str_]:
        """[n] request id of each row."""
        return np.array(self.request_ids or ("",), dtype=np.str_)[self.request_index]

    @property
    def module_name(self) -> npt.NDArray[np.str_]:
        """[n] name of each row's module."""
        count = max(self.module_names, default=-1) + 1
        return np.array([self.module_names.get(i, "") for i in range(count)] or [""], dtype=np.str_)[self.layer_index]

    def columns(self) -> dict[str, npt.NDArray[Any]]:
        """Return all columns by name, in the documented order; those that were not captured are left out."""
        return {name: self[name] for name in self}

    def to_dict(self) -> dict[str, list[Any]]:
        """Return all columns as lists."""
        return {name: column.tolist() for name, column in self.columns().items()}

    def to_pandas(self) -> "pd.DataFrame":
        """Return a DataFrame; columns with several values a row hold lists.

        Raises:
            DependencyMissingError: pandas is not installed.
        """
        columns = self.columns()
        return to_data_frame(
            {name: column if column.ndim == 1 else column.tolist() for name, column in columns.items()}
        )

    def to_arrow(self) -> Any:
        """Return a pyarrow Table; columns with several values a row are fixed-size lists.

        Raises:
            DependencyMissingError: pyarrow is not installed.
        """
        try:
            import pyarrow as pa
        except ImportError as error:
            raise DependencyMissingError(
                "to_arrow() needs pyarrow, which is not installed; run: pip install pyarrow"
            ) from error
        return pa.table(
            {
                name: pa.array(column)
                if column.ndim == 1
                else pa.FixedSizeListArray.from_arrays(pa.array(column.reshape(-1)), column.shape[1])
                for name, column in self.columns().items()
            }
        )

    def _head(self) -> tuple[list[str], list[list[object]]]:
        headers = ["step", "request", "position", "layer", "experts", "weights", "margin"]
        rows: list[list[object]] = []
        for row in range(min(len(self), _NUM_SHOWN)):
            used = self.expert_ids[row] >= 0
            rows.append(
                [
                    int(self.step[row]),
                    self.request_ids[self.request_index[row]] if self.request_ids else "",
                    "padding" if self.is_padding[row] else str(int(self.position[row])),
                    int(self.layer_index[row]),
                    " ".join(str(expert) for expert in self.expert_ids[row][used]),
                    " ".join(f"{weight:.3f}" for weight in self.gate_weights[row][used].astype(float)),
                    float(self.margin[row]),
                ]
            )
        return headers, rows

    @property
    def _title(self) -> str:
        shown = f", the first {_NUM_SHOWN}" if len(self) > _NUM_SHOWN else ""
        return f"{len(self):,} decisions at {len(self.layers)} MoE layers{shown}"

    def __str__(self) -> str:
        return f"{self._title}\n{text_table(*self._head())}"

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return html_table(self._title, *self._head())

    def _slots(self, layer: LayerColumns) -> tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]:
        from moe_debugger.v1 import routing_pb2 as pb

        ids = _wide(layer.expert_ids, self._k, NO_EXPERT)
        weights = np.full(layer.expert_ids.shape, np.nan) if layer.gate_weights is None else layer.gate_weights
        status = (
            np.full(layer.expert_ids.shape, pb.SLOT_STATUS_ROUTED) if layer.slot_status is None else layer.slot_status
        )
        return ids, _wide(weights, self._k, np.nan), _wide(status, self._k, pb.SLOT_STATUS_UNUSED)


class RowStore:
    """Keeps the newest columns within a bound of bytes; what is pushed out is counted."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.num_not_kept = 0
        self._batches: deque[tuple[RoutingColumns, int]] = deque()
        self._used_bytes = 0

    def add(self, columns: RoutingColumns) -> None:
        """Keep `columns`, and drop the oldest ones that no longer fit."""
        size = columns_size_bytes(columns)
        self._batches.append((columns, size))
        self._used_bytes += size
        while self._used_bytes > self.limit_bytes and self._batches:
            oldest, oldest_size = self._batches.popleft()
            self._used_bytes -= oldest_size
            self.num_not_kept += oldest.num_decisions

    def clear(self) -> None:
        """Forget all rows."""
        self._batches.clear()
        self._used_bytes = 0

    @property
    def used_bytes(self) -> int:
        """Bytes of the kept columns."""
        return self._used_bytes

    @property
    def num_kept(self) -> int:
        """Decisions that are kept."""
        return sum(columns.num_decisions for columns, _ in self._batches)

    def batches(self) -> list[RoutingColumns]:
        """Return the kept columns, oldest first."""
        return [columns for columns, _ in self._batches]

    def __iter__(self) -> Iterator[RoutingColumns]:
        return iter(self.batches())


def _rows(layer: LayerColumns) -> Any:
    return slice(None) if layer.row_index is None else layer.row_index


def _wide(values: npt.NDArray[Any], width: int, fill: float) -> npt.NDArray[Any]:
    if values.shape[1] == width:
        return values
    wide = np.full((len(values), width), fill, values.dtype)
    wide[:, : values.shape[1]] = values
    return wide


def _or_nan(column: npt.NDArray[np.float32] | None, num_rows: int) -> npt.NDArray[np.float32]:
    return np.full(num_rows, np.nan, np.float32) if column is None else column


def _concatenate(parts: list[npt.NDArray[Any]], dtype: npt.DTypeLike, width: int | None = None) -> npt.NDArray[Any]:
    if not parts:
        return np.zeros((0,) if width is None else (0, width), dtype)
    return np.concatenate(parts).astype(dtype, copy=False)
