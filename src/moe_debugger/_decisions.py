"""The captured routes as columns: one row per token and MoE layer, in the order of the forward."""

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from moe_debugger._row_blocks import COLUMNS, Layout, RowBlock, RowSource, flatten
from moe_debugger._row_files import arrow_column, arrow_texts
from moe_debugger._row_packing import pack
from moe_debugger._tables import html_table, text_table, to_data_frame
from moe_debugger.capture import LayerInfo
from moe_debugger.errors import DependencyMissingError
from moe_debugger.wire.codec import RoutingColumns

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Decisions"]

_NUM_SHOWN = 20
_MAX_LIST_OFFSET = 2**31 - 1


class Decisions(Mapping[str, npt.NDArray[Any]]):
    """Routing decisions as numpy columns; n rows, k = the largest top-k of the model.

    Rows stand forward after forward, within a forward layer by layer, and within a layer in the order of the batch.
    Columns are attributes and items: ``decisions.expert_ids is decisions["expert_ids"]``. As for a data frame,
    iterating gives the names of the columns and ``len`` the number of rows. docs/decisions.md says more of each.

    Attributes:
        step, forward_index: [n] uint64.
        phase: [n] uint8 of `moe_debugger.v1.Phase` (1 prefill, 2 decode, 3 train, 4 eval).
        request_ids: the distinct requests; request_index: [n] uint32 into them.
        position: [n] uint32, position in the request; 0 for padding.
        token_id: [n] int32, -1 where a forward was given no ids; None where the level holds no tokens.
        is_padding: [n] bool.
        layer_index: [n] uint32, index among the MoE layers.
        module_names: by layer index.
        layers: what is known of each layer, by layer index.
        rank: [n] uint32, global rank of the capturing process.
        expert_ids: [n, k] int32, -1 where a slot reached no expert (or the layer has fewer slots). A layer's identity
            experts have the ids that follow those of its routed experts.
        gate_weights: [n, k] float32 as applied, NaN where a slot reached no expert.
        slot_status: [n, k] uint8 of `SlotStatus` (1 routed, 2 dropped, 3 skipped, 4 identity, 5 unused).
        intended_expert_ids: [n, k] int32, what the router chose; equal to `expert_ids` at layers that make no
            difference, None where no layer does.
        margin: [n] float32, K-th minus (K+1)-th selection score. In logits for plain softmax routers, in selection
            scores where a bias or groups take part; NaN where recomputing does not give the captured ids.
        router_entropy, router_logsumexp, top1_probability: [n] float32, nats; NaN where the router has no such thing.
        logits: [n, E] float16 at level "full", NaN past a layer's own; else None.

    Args:
        rows: in order, as the capture gives them, as blocks of them, or where to take the blocks from.
        layers: what is known of the model's layers.
        rank: global rank of the process that captured the rows.
    """

    def __init__(
        self, rows: RowSource | Sequence[RoutingColumns | RowBlock], layers: Sequence[LayerInfo], rank: int = 0
    ) -> None:
        self.layers = {info.layer_index: info for info in layers}
        self.module_names = {info.layer_index: info.module_name for info in layers}
        source = rows if isinstance(rows, RowSource) else RowSource.of(_as_blocks(rows))
        experts = max((info.num_experts for info in layers), default=0)
        layout = source.layout.join(
            Layout(
                top_k=max((info.top_k for info in layers), default=1),
                num_logits=experts if source.layout.num_logits else 0,
            )
        )
        columns, self.request_ids = flatten(source.blocks, layout, source.num_rows)
        self.step: npt.NDArray[np.uint64] = columns["step"]
        self.forward_index: npt.NDArray[np.uint64] = columns["forward_index"]
        self.phase: npt.NDArray[np.uint8] = columns["phase"]
        self.request_index: npt.NDArray[np.uint32] = columns["request_index"]
        self.position: npt.NDArray[np.uint32] = columns["position"]
        self.token_id: npt.NDArray[np.int32] | None = columns.get("token_id")
        self.is_padding: npt.NDArray[np.bool_] = columns["is_padding"]
        self.layer_index: npt.NDArray[np.uint32] = columns["layer_index"]
        self.rank: npt.NDArray[np.uint32] = np.full(len(self.layer_index), rank, np.uint32)
        self.expert_ids: npt.NDArray[np.int32] = columns["expert_ids"]
        self.gate_weights: npt.NDArray[np.float32] = columns["gate_weights"]
        self.slot_status: npt.NDArray[np.uint8] = columns["slot_status"]
        self.intended_expert_ids: npt.NDArray[np.int32] | None = columns.get("intended_expert_ids")
        self.margin: npt.NDArray[np.float32] = columns["margin"]
        self.router_entropy: npt.NDArray[np.float32] = columns["router_entropy"]
        self.router_logsumexp: npt.NDArray[np.float32] = columns["router_logsumexp"]
        self.top1_probability: npt.NDArray[np.float32] = columns["top1_probability"]
        self.logits: npt.NDArray[np.float16] | None = columns.get("logits")

    def __len__(self) -> int:
        return len(self.layer_index)

    def __iter__(self) -> Iterator[str]:
        absent = [name for name in ("token_id", "intended_expert_ids", "logits") if getattr(self, name) is None]
        return (name for name in COLUMNS if name not in absent)

    def __getitem__(self, name: str) -> npt.NDArray[Any]:
        column: npt.NDArray[Any] | None = getattr(self, name) if name in COLUMNS else None
        if column is None:
            raise KeyError(name)
        return column

    __hash__ = None  # type: ignore[assignment]  # holds arrays

    @cached_property
    def request_id(self) -> npt.NDArray[np.object_]:
        """[n] request id of each row: references to the few texts of `request_ids`, 8 bytes a row."""
        return np.array(self.request_ids or ("",), dtype=object)[self.request_index]

    @cached_property
    def module_name(self) -> npt.NDArray[np.object_]:
        """[n] name of each row's module: references to the few texts of `module_names`, 8 bytes a row."""
        return np.array(self._names_by_index(), dtype=object)[self.layer_index]

    def columns(self) -> dict[str, npt.NDArray[Any]]:
        """Return all columns by name, in the documented order; those that were not captured are left out."""
        return {name: self[name] for name in self}

    def to_dict(self) -> dict[str, list[Any]]:
        """Return all columns as lists."""
        return {name: column.tolist() for name, column in self.columns().items()}

    def to_pandas(self) -> "pd.DataFrame":
        """Return a DataFrame; texts are categories, and columns with several values a row hold lists.

        The lists are kept in Arrow's memory where pyarrow is installed; else they are Python lists, which take about
        ten times as much.

        Raises:
            DependencyMissingError: pandas is not installed.
        """
        try:
            import pandas as pd
        except ImportError:
            return to_data_frame({})  # which says what to install
        columns: dict[str, Any] = {}
        for name in self:
            if name == "request_id":
                columns[name] = pd.Categorical.from_codes(
                    self.request_index.astype(np.int32), categories=pd.Index(self.request_ids)
                )
            elif name == "module_name":
                names = self._names_by_index()
                categories = list(dict.fromkeys(names))
                codes = np.array([categories.index(each) for each in names], dtype=np.int32)
                columns[name] = pd.Categorical.from_codes(codes[self.layer_index], categories=pd.Index(categories))
            else:
                columns[name] = self[name] if self[name].ndim == 1 else _pandas_lists(self[name])
        return to_data_frame(columns)

    def to_arrow(self) -> Any:
        """Return a pyarrow Table; texts are dictionary-encoded, several values a row are fixed-size lists.

        Raises:
            DependencyMissingError: pyarrow is not installed.
        """
        try:
            import pyarrow as pa
        except ImportError as error:
            raise DependencyMissingError(
                "to_arrow() needs pyarrow, which is not installed; run: pip install 'moe-debugger[pandas]'"
            ) from error
        texts = {
            "request_id": (self.request_index, self.request_ids),
            "module_name": (self.layer_index, self._names_by_index()),
        }
        return pa.table(
            {name: arrow_texts(*texts[name]) if name in texts else arrow_column(self[name]) for name in self}
        )

    def _names_by_index(self) -> list[str]:
        highest = max([0, *self.module_names, int(self.layer_index.max(initial=0))])
        return [self.module_names.get(index, "") for index in range(highest + 1)]

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


def _as_blocks(rows: Sequence[RoutingColumns | RowBlock]) -> list[RowBlock]:
    """Return blocks, with neighbours that are not packed yet in one."""
    blocks: list[RowBlock] = []
    loose: list[RoutingColumns] = []
    for item in rows:
        if isinstance(item, RoutingColumns):
            loose.append(item)
            continue
        if loose:
            blocks.append(pack(loose))
            loose = []
        blocks.append(item)
    return [*blocks, pack(loose)] if loose else blocks


def _pandas_lists(column: npt.NDArray[Any]) -> Any:
    """Return [n, k] values as a pandas column of lists."""
    import pandas as pd

    try:
        import pyarrow as pa
    except ImportError:
        return column.tolist()
    num_rows, width = column.shape
    # Lists of any length, because pandas explodes those and not Arrow's fixed-size ones.
    is_large = num_rows * width > _MAX_LIST_OFFSET
    offsets = np.arange(num_rows + 1, dtype=np.int64 if is_large else np.int32) * width
    lists = pa.LargeListArray if is_large else pa.ListArray
    return pd.arrays.ArrowExtensionArray(lists.from_arrays(pa.array(offsets), pa.array(column.reshape(-1))))
