"""The rows of one recording, checked and ordered: what comparisons of rows start from.

Words:
    document    what a row's text belongs to: a request, or a document of a workload that several requests were made of.
    unit        what may be exchanged or dealt into halves as a whole: the document; in training the document of one
                step, because the names of a batch's rows come again in every step with other text.
    choice      any id of a row, of routed and of identity experts. load is the routed ones alone (`SlotClasses`).

Example: rows of layers [1, 0, 0] with requests ["b", "b", None], the second of them padding, are two rows: layer 0 of
no document (-1), then layer 1 of document 0, "b"; `row` is [2, 0].
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_debugger.analysis._columns import checked_columns, size_of_layer
from moe_debugger.analysis.state import LayerShape
from moe_debugger.errors import InvalidInputError
from moe_debugger.v1 import routing_pb2 as pb
from moe_debugger.wire.slots import SlotClasses

__all__ = ["RowSet", "comparable_layers"]

_Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class RowSet:
    """Valid rows (no padding), layer after layer, within a layer in the order given; n rows, K = the largest top-k.

    Attributes:
        shapes: E, k and Z by layer index, of the layers that have valid rows.
        padded_shapes: the same of the layers all of whose rows are padding.
        bounds: by layer index, the slice of that layer's rows.
        num_padding: by layer index, padded rows, part of nothing else.
        row: [n] int64, index into the columns that were given.
        expert_ids: [n, K] int32, -1 where a slot reached no expert.
        is_load: [n, K] bool, slots that reached a routed expert.
        documents: names, sorted; document: [n] int64 into them, -1 where a row has none.
        units: names, sorted by document; unit: [n] int64 into them, -1 where a row has no document.
        position, token_id: [n] int64; token_id is -1 where unknown; None where the column is missing.
        margin: [n] float64, NaN where unknown; None where the column is missing.
        workloads: labels, sorted; workload: [n] int64 into them, -1 = no label; None where the column is missing.
    """

    shapes: dict[int, LayerShape]
    padded_shapes: dict[int, LayerShape]
    bounds: dict[int, slice]
    num_padding: dict[int, int]
    row: _Ints
    expert_ids: npt.NDArray[np.int32]
    is_load: npt.NDArray[np.bool_]
    documents: tuple[str, ...]
    document: _Ints
    units: tuple[str, ...]
    unit: _Ints
    position: _Ints | None
    token_id: _Ints | None
    margin: npt.NDArray[np.float64] | None
    workloads: tuple[str, ...]
    workload: _Ints | None

    @classmethod
    def of(
        cls,
        decisions: Mapping[str, Any],
        *,
        num_experts: int | Sequence[int],
        top_k: int | Sequence[int],
        num_identity_experts: int | Sequence[int] = 0,
        document_column: str = "request_id",
    ) -> "RowSet":
        """Return the checked rows of `decisions`; O(n log n).

        Args:
            decisions: columns of equal length, one row per token and MoE layer, as `session.decisions()` gives them.
                Required: `layer_index`, `expert_ids`. Used where present: the document column, `position`, `token_id`,
                `is_padding`, `slot_status`, `margin`, `workload`, `phase` and `step`. To compare what routers chose
                where a token was dropped, give `intended_expert_ids` under the name `expert_ids`.
            num_experts: E, or one per layer index.
            top_k: k, or one per layer index.
            num_identity_experts: Z, or one per layer index.
            document_column: the column that names each row's document. Two recordings of the same text have the same
                names where ids were given by `debugger.requests([...])`; otherwise add a column that has.

        Raises:
            InvalidInputError: no rows were given, a column is missing or of another length, or ids are out of range.
        """
        columns = checked_columns(decisions, (*_COLUMNS, document_column))
        layer_index = columns["layer_index"]
        is_valid = ~columns["is_padding"] if "is_padding" in columns else None
        row = np.arange(len(layer_index)) if is_valid is None else np.flatnonzero(is_valid)
        row = row[np.argsort(layer_index[row], kind="stable")]
        present, num_rows = np.unique(layer_index, return_counts=True)
        starts, ends = (np.searchsorted(layer_index[row], present, side=side) for side in ("left", "right"))
        bounds = {int(i): slice(int(a), int(b)) for i, a, b in zip(present, starts, ends, strict=True)}
        num_padding = {int(i): int(n - (b - a)) for i, n, a, b in zip(present, num_rows, starts, ends, strict=True)}
        sizes = {"num_experts": num_experts, "top_k": top_k, "num_identity_experts": num_identity_experts}
        shapes = {i: LayerShape(i, *(size_of_layer(size, i, name) for name, size in sizes.items())) for i in bounds}
        padded = {i: shape for i, shape in shapes.items() if bounds[i].stop == bounds[i].start}
        for i in padded:
            del shapes[i], bounds[i]
        ids = columns["expert_ids"][row]
        status = columns["slot_status"][row] if "slot_status" in columns else None
        is_load = np.zeros(ids.shape, np.bool_)
        for i, bound in bounds.items():
            _check_ids(ids[bound], shapes[i])
            of_layer = None if status is None else status[bound]
            is_load[bound] = SlotClasses.of(ids[bound], of_layer, shapes[i].num_experts).is_load

        none = np.full(len(row), -1, np.int64)
        document, documents = _codes(columns[document_column], row) if document_column in columns else (none, ())
        unit, units = document, documents
        if document_column == "request_id" and {"phase", "step"} <= columns.keys():
            is_train = columns["phase"][row] == pb.PHASE_TRAIN
            unit, units = _units(document, documents, columns["step"][row], is_train)
        workload, workloads = _codes(columns["workload"], row) if "workload" in columns else (None, ())

        def optional(name: str, dtype: type[np.generic]) -> npt.NDArray[Any] | None:
            return columns[name][row].astype(dtype) if name in columns else None

        return cls(
            shapes=shapes,
            padded_shapes=padded,
            bounds=bounds,
            num_padding=num_padding,
            row=row,
            expert_ids=ids,
            is_load=is_load,
            documents=documents,
            document=document,
            units=units,
            unit=unit,
            position=optional("position", np.int64),
            token_id=optional("token_id", np.int64),
            margin=optional("margin", np.float64),
            workloads=workloads,
            workload=workload,
        )

    def unit_loads(self, layer_index: int) -> npt.NDArray[np.float64]:
        """Return c[u, e], the load of each expert by unit, [units, E]; rows without a document are left out.

        Whole numbers in float64, so that sums over units are exact in any order.
        """
        bound = self.bounds[layer_index]
        experts = self.shapes[layer_index].num_experts
        is_counted = self.is_load[bound] & (self.unit[bound] >= 0)[:, None]
        cells = (self.unit[bound][:, None] * experts + self.expert_ids[bound])[is_counted]
        table = np.bincount(cells, minlength=len(self.units) * experts).astype(np.float64)
        return table.reshape(len(self.units), experts)

    def num_without_document(self) -> int:
        """Return how many rows have no document: they can be neither matched nor exchanged."""
        return int(np.count_nonzero(self.document < 0))


def comparable_layers(a: RowSet, b: RowSet, layers: Sequence[int] | None = None) -> list[int]:
    """Return the layers to compare, ascending.

    Args:
        a: rows of one recording.
        b: rows of the other.
        layers: the layers that are meant; None = all, which both must have.

    Raises:
        InvalidInputError: the sets have other layers, or a layer differs in E, k or Z: expert 3 of one model is no
            other model's expert 3.
    """
    for rows in (a, b):
        if not isinstance(rows, RowSet):
            raise InvalidInputError(
                f"got {type(rows).__name__}: this needs rows, `RowSet.of(decisions, ...)`; counts and folded states "
                "do not say which token or request a choice belongs to"
            )
    wanted = sorted(set(layers)) if layers is not None else sorted(a.shapes.keys() | b.shapes.keys())
    missing_a, missing_b = [i for i in wanted if i not in a.shapes], [i for i in wanted if i not in b.shapes]
    if missing_a or missing_b:
        raise InvalidInputError(
            f"not comparable: the first has no rows of layers {missing_a}, the second none of {missing_b}; name the "
            "layers to compare (layers=[...]) if both are recordings of one model"
        )
    if not wanted:
        raise InvalidInputError("not comparable: there are no rows")
    other = [f"{a.shapes[i]} against {b.shapes[i]}" for i in wanted if a.shapes[i] != b.shapes[i]]
    if other:
        raise InvalidInputError(f"not comparable, these are different models: {'; '.join(other[:3])}")
    return wanted


_COLUMNS = (
    "is_padding",
    "margin",
    "phase",
    "position",
    "slot_status",
    "step",
    "token_id",
    "workload",
)


def _check_ids(ids: npt.NDArray[np.int32], shape: LayerShape) -> None:
    where = f"layer {shape.layer_index}: "
    if ids.min(initial=0) < -1 or ids.max(initial=-1) >= shape.num_ids:
        raise InvalidInputError(
            f"{where}expert ids reach from {ids.min()} to {ids.max()}, expected 0 to {shape.num_ids - 1}, or -1 for no "
            "expert"
        )
    if ids.shape[1] < shape.top_k or (ids[:, shape.top_k :] >= 0).any():
        raise InvalidInputError(f"{where}expert_ids has {ids.shape[1]} columns, expected top_k = {shape.top_k}")


def _codes(column: npt.NDArray[Any], row: _Ints) -> tuple[_Ints, tuple[str, ...]]:
    """Return each row's index into the sorted names that occur, -1 for None, NaN and ""."""
    values = column[row]
    # Neighbours mostly share their name: naming one row of each run is much less than naming all.
    firsts = np.flatnonzero(np.r_[True, values[1:] != values[:-1]][: len(values)])
    texts = ["" if name is None or name != name else str(name) for name in values[firsts].tolist()]
    names = tuple(sorted(set(texts) - {""}))
    index = {"": -1} | {name: i for i, name in enumerate(names)}
    of_run = np.fromiter((index[text] for text in texts), np.int64, len(texts))
    return np.repeat(of_run, np.diff(np.r_[firsts, len(values)])), names


def _units(
    document: _Ints, documents: tuple[str, ...], step: npt.NDArray[Any], is_train: npt.NDArray[np.bool_]
) -> tuple[_Ints, tuple[str, ...]]:
    if not is_train.any():
        return document, documents
    steps, step_code = np.unique(step, return_inverse=True)
    keys = document * (len(steps) + 1) + np.where(is_train, step_code + 1, 0)
    is_known = document >= 0
    unique, code = np.unique(keys[is_known], return_inverse=True)
    unit = np.full(len(document), -1, np.int64)
    unit[is_known] = code
    parts = [divmod(key, len(steps) + 1) for key in unique.tolist()]
    return unit, tuple(f"{documents[d]} @ step {steps[s - 1]}" if s else documents[d] for d, s in parts)
