"""Training series: values by step, name and, where they have one, layer and expert. Pure numpy."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from moe_debugger._tables import ColumnTable, html_table, text_table, to_data_frame
from moe_debugger.v1 import routing_pb2 as pb

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["NO_INDEX", "SERIES_NAMES", "SeriesPoint", "SeriesStore", "SeriesTable"]

# Layer or expert of a value that belongs to none.
NO_INDEX = -1
# Names with a fixed meaning (docs/training.md); a caller may record others beside them.
SERIES_NAMES = (
    "loss",
    "balance_loss",
    "balance_coef",
    "lr",
    "grad_norm",
    "router_gradient_norm",
    "router_weight_norm",
    "expert_gradient_norm",
    "selection_bias_min",
    "selection_bias_max",
)
_COLUMNS = ("step", "name", "layer_index", "expert_id", "value")
_NUM_SHOWN = 20
# What a point costs in memory beside its values.
_POINT_BYTES = 200


@dataclass(frozen=True, slots=True)
class SeriesPoint:
    """The value of one series at one step, or its values for all experts of a layer.

    Attributes:
        layer_index: index among the MoE layers; `NO_INDEX` for a series of the whole model.
        is_per_expert: True where `values` has one entry for each expert.
        values: [1] or [num_experts] float64; NaN where there was nothing to read.
    """

    step: int
    name: str
    layer_index: int
    is_per_expert: bool
    values: npt.NDArray[np.float64]

    def to_message(self) -> pb.SeriesPoint:
        """Return the point as it goes to the fleet."""
        return pb.SeriesPoint(
            step=self.step,
            name=self.name,
            layer_index=None if self.layer_index == NO_INDEX else self.layer_index,
            values=self.values.tolist(),
            is_per_expert=self.is_per_expert,
        )


class SeriesTable(ColumnTable):
    """Series as numpy columns; n rows, ordered by step, then as they were recorded.

    Columns are attributes and items, as of `Decisions`.

    Attributes:
        step: [n] int64, the training step.
        name: [n] str.
        layer_index: [n] int32, index among the MoE layers; -1 = of the whole model.
        expert_id: [n] int32; -1 = not of one expert.
        value: [n] float64; NaN where there was nothing to read, see `notes`.
        notes: why values are NaN, by reason: at how many steps.
        num_not_kept: points that were pushed out by newer ones.
    """

    _columns = _COLUMNS

    def __init__(
        self, points: list[SeriesPoint], *, notes: Mapping[str, int] | None = None, num_not_kept: int = 0
    ) -> None:
        sizes = [len(point.values) for point in points]
        self.step: npt.NDArray[np.int64] = np.repeat(np.array([point.step for point in points], np.int64), sizes)
        self.name: npt.NDArray[np.str_] = np.repeat(np.array([point.name for point in points], np.str_), sizes)
        self.layer_index: npt.NDArray[np.int32] = np.repeat(
            np.array([point.layer_index for point in points], np.int32), sizes
        )
        experts = [np.arange(len(one.values)) if one.is_per_expert else np.full(1, NO_INDEX) for one in points]
        self.expert_id: npt.NDArray[np.int32] = np.concatenate([np.zeros(0), *experts]).astype(np.int32)
        self.value: npt.NDArray[np.float64] = np.concatenate([np.zeros(0), *(point.values for point in points)])
        self.notes: dict[str, int] = dict(notes or {})
        self.num_not_kept = num_not_kept

    def names(self) -> tuple[str, ...]:
        """Return the names of the series in it, sorted."""
        return tuple(sorted({str(name) for name in self.name}))

    def select(self, name: str, *, layer_index: int | None = None, expert_id: int | None = None) -> "SeriesTable":
        """Return the rows of one series, of one layer or of one expert of every layer where asked for."""
        rows = self.name == name
        if layer_index is not None:
            rows &= self.layer_index == layer_index
        if expert_id is not None:
            rows &= self.expert_id == expert_id
        selected = SeriesTable([], notes=self.notes, num_not_kept=self.num_not_kept)
        selected.step, selected.name, selected.value = self.step[rows], self.name[rows], self.value[rows]
        selected.layer_index, selected.expert_id = self.layer_index[rows], self.expert_id[rows]
        return selected

    def to_pandas(self) -> "pd.DataFrame":
        """Return a DataFrame.

        Raises:
            DependencyMissingError: pandas is not installed.
        """
        return to_data_frame(dict(self))

    def _head(self) -> tuple[list[str], list[list[object]]]:
        rows: list[list[object]] = [
            [
                int(self.step[row]),
                str(self.name[row]),
                "" if self.layer_index[row] < 0 else str(int(self.layer_index[row])),
                "" if self.expert_id[row] < 0 else str(int(self.expert_id[row])),
                float(self.value[row]),
            ]
            for row in range(min(len(self), _NUM_SHOWN))
        ]
        return ["step", "name", "layer", "expert", "value"], rows

    @property
    def _title(self) -> str:
        shown = f", the first {_NUM_SHOWN}" if len(self) > _NUM_SHOWN else ""
        return f"{len(self):,} values of {len(self.names())} series{shown}"

    def __str__(self) -> str:
        notes = "".join(f"\nNaN at {number} steps: {reason}" for reason, number in self.notes.items())
        return f"{self._title}\n{text_table(*self._head())}{notes}"

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return html_table(self._title, *self._head())


class SeriesStore:
    """Keeps the newest steps' points within a bound of bytes; a point that comes again replaces the one before."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.num_not_kept = 0
        self._steps: dict[int, dict[tuple[str, int], SeriesPoint]] = {}
        self._used_bytes = 0

    def add(self, point: SeriesPoint) -> None:
        """Keep a point, and drop the oldest steps that no longer fit; never the newest one."""
        points = self._steps.setdefault(point.step, {})
        key = (point.name, point.layer_index)
        replaced = points.get(key)
        self._used_bytes += _size(point) - (0 if replaced is None else _size(replaced))
        points[key] = point
        while self._used_bytes > self.limit_bytes and len(self._steps) > 1:
            dropped = self._steps.pop(min(self._steps))
            self.num_not_kept += len(dropped)
            self._used_bytes -= sum(_size(one) for one in dropped.values())

    @property
    def used_bytes(self) -> int:
        """Bytes of the kept points, about."""
        return self._used_bytes

    def points(self) -> list[SeriesPoint]:
        """Return the kept points by step, then as they were recorded."""
        return [point for step in sorted(self._steps) for point in self._steps[step].values()]


def _size(point: SeriesPoint) -> int:
    return _POINT_BYTES + point.values.nbytes
