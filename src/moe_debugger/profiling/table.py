"""`ProfileTable`: every time that was measured or estimated, as numpy columns."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from moe_debugger._tables import ColumnTable, html_table, text_table, to_data_frame

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["ProfileTable"]

_COLUMNS = (
    "step",
    "forward_index",
    "layer_index",
    "part",
    "expert_id",
    "start_ns",
    "duration_ns",
    "num_tokens",
    "is_estimated",
)
_TYPES: dict[str, Any] = {"layer_index": np.int32, "expert_id": np.int32, "part": np.str_, "is_estimated": np.bool_}
_NUM_SHOWN = 20


class ProfileTable(ColumnTable):
    """Times as numpy columns, n rows by forward, layer and begin.

    Columns are attributes and items, as of `Decisions`.

    Attributes:
        step, forward_index: [n] int64, as in `session.decisions()`.
        layer_index: [n] int32, index among the MoE layers; -1 = the whole forward.
        part: [n] str: forward, block, router, experts, expert, shared, wait, dispatch, combine or rest.
        expert_id: [n] int32; -1 where the part is not one expert.
        start_ns: [n] int64, Unix time, by the host's clock at the begin of the forward and its device's clock from
            there on; -1 for what is no stretch of time of its own (rest, estimates).
        duration_ns: [n] int64.
        num_tokens: [n] int64, rows that the part was given, padding included; for an expert those routed to it, for
            experts the sum of those; 0 where it is none or not known, as for a whole forward.
        is_estimated: [n] bool; True where no clock saw it and the cost model says it.
        num_forwards_dropped: forwards that were timed and made room for newer ones, or were given up.
        num_estimates_left_out: estimated rows of older forwards that are not in the table.
    """

    _columns = _COLUMNS

    step: npt.NDArray[np.int64]
    forward_index: npt.NDArray[np.int64]
    layer_index: npt.NDArray[np.int32]
    part: npt.NDArray[np.str_]
    expert_id: npt.NDArray[np.int32]
    start_ns: npt.NDArray[np.int64]
    duration_ns: npt.NDArray[np.int64]
    num_tokens: npt.NDArray[np.int64]
    is_estimated: npt.NDArray[np.bool_]

    def __init__(
        self,
        columns: Mapping[str, npt.NDArray[Any]],
        *,
        num_forwards_dropped: int = 0,
        num_estimates_left_out: int = 0,
    ) -> None:
        for name in _COLUMNS:
            setattr(self, name, np.asarray(columns[name], _TYPES.get(name, np.int64)))
        self.num_forwards_dropped = num_forwards_dropped
        self.num_estimates_left_out = num_estimates_left_out

    def select(self, part: str, *, layer_index: int | None = None, expert_id: int | None = None) -> "ProfileTable":
        """Return the rows of one part, of one layer or expert where asked for."""
        rows = self.part == part
        if layer_index is not None:
            rows &= self.layer_index == layer_index
        if expert_id is not None:
            rows &= self.expert_id == expert_id
        return ProfileTable(
            {name: self[name][rows] for name in _COLUMNS},
            num_forwards_dropped=self.num_forwards_dropped,
            num_estimates_left_out=self.num_estimates_left_out,
        )

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
                "" if self.layer_index[row] < 0 else str(int(self.layer_index[row])),
                str(self.part[row]) + (" (estimated)" if self.is_estimated[row] else ""),
                "" if self.expert_id[row] < 0 else str(int(self.expert_id[row])),
                float(self.duration_ns[row]) / 1e3,
                int(self.num_tokens[row]) or float("nan"),
            ]
            for row in range(min(len(self), _NUM_SHOWN))
        ]
        return ["step", "layer", "part", "expert", "µs", "tokens"], rows

    @property
    def _title(self) -> str:
        shown = f", the first {_NUM_SHOWN}" if len(self) > _NUM_SHOWN else ""
        dropped = f"; {self.num_forwards_dropped:,} forwards are not kept" if self.num_forwards_dropped else ""
        return f"{len(self):,} times{shown}{dropped}"

    def __str__(self) -> str:
        return f"{self._title}\n{text_table(*self._head())}"

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return html_table(self._title, *self._head())
