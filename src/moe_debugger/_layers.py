"""The MoE layers of a model as a table."""

from collections.abc import Iterable
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

from moe_debugger._tables import html_table, text_table, to_data_frame
from moe_debugger.capture import LayerInfo

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Layers"]

_SHOWN = {
    "layer_index": "layer",
    "module_name": "module",
    "stack": "stack",
    "site": "site",
    "num_experts": "experts",
    "top_k": "top-k",
    "num_shared_experts": "shared",
    "num_identity_experts": "identity",
    "scoring_function": "scoring",
    "block_scale": "scale",
    "weight_meaning": "weights",
    "unavailable_reason": "router statistics",
}


class Layers(tuple[LayerInfo, ...]):
    """What is known of each MoE layer, in the order of `layer_index`; prints as a table.

    A tuple of `LayerInfo`, whose docstring describes the fields; `unavailable_reason` says why a layer's router
    statistics are NaN.
    """

    __slots__ = ()

    def __new__(cls, infos: Iterable[LayerInfo] = ()) -> "Layers":
        """Return the layers sorted by their index."""
        return super().__new__(cls, sorted(infos, key=lambda info: info.layer_index))

    def to_dict(self) -> list[dict[str, Any]]:
        """Return the fields of each layer as plain values."""
        return [asdict(info) for info in self]

    def to_pandas(self) -> "pd.DataFrame":
        """Return one row per layer and one column per field.

        Raises:
            DependencyMissingError: pandas is not installed.
        """
        names = [field.name for field in fields(LayerInfo)]
        return to_data_frame({name: [getattr(info, name) for info in self] for name in names})

    def _rows(self) -> list[list[object]]:
        rows: list[list[object]] = []
        for info in self:
            row: list[object] = [getattr(info, name) for name in _SHOWN]
            # The last column answers "are they there": a reason where they are not.
            row[-1] = row[-1] or "yes"
            rows.append(row)
        return rows

    @property
    def _title(self) -> str:
        return f"{len(self)} MoE layer{'' if len(self) == 1 else 's'}"

    def __str__(self) -> str:
        return f"{self._title}\n{text_table(list(_SHOWN.values()), self._rows())}"

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return html_table(self._title, list(_SHOWN.values()), self._rows())
