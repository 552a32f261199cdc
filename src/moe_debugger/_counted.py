"""What is counted of all routes, however few rows are kept: the state of the analysis, and sums of gate weights."""

from collections.abc import Iterable
from typing import Self

import numpy as np
import numpy.typing as npt

from moe_debugger._stats import ExpertRow
from moe_debugger.analysis import LayerShape, LayerState, RoutingState
from moe_debugger.capture import LayerInfo
from moe_debugger.wire.codec import CountsColumns, RoutingColumns

__all__ = ["CountedRoutes", "layer_shape"]


class CountedRoutes:
    """Counts of the routes of some layers; not thread-safe.

    Attributes:
        state: of the analysis.
    """

    def __init__(self, layers: Iterable[LayerInfo] = ()) -> None:
        self.state = RoutingState.empty(layer_shape(info) for info in layers)
        # By layer: [2, E] float64, number and sum of the gate weights that each expert came with.
        self._weights: dict[int, npt.NDArray[np.float64]] = {}

    def fold(self, columns: RoutingColumns | CountsColumns) -> None:
        """Count columns."""
        if isinstance(columns, CountsColumns):
            self.state.fold_counts(columns)
            return
        self.state.fold(columns)
        for layer in columns.layers:
            if layer.gate_weights is None:
                continue
            valid = ~columns.is_padding if layer.row_index is None else ~columns.is_padding[layer.row_index]
            ids, weights = layer.expert_ids[valid].reshape(-1), layer.gate_weights[valid].reshape(-1)
            # Slots that reached no expert, and identity experts, have no weight in the table.
            is_routed = (ids >= 0) & (ids < layer.num_experts)
            ids, weights = ids[is_routed], weights[is_routed].astype(np.float64)
            sums = self._weights.setdefault(layer.layer_index, np.zeros((2, layer.num_experts)))
            sums[0] += np.bincount(ids, minlength=layer.num_experts)
            sums[1] += np.bincount(ids, weights, minlength=layer.num_experts)

    def copy(self) -> Self:
        """Return a copy that shares nothing with this one."""
        copied = type(self)()
        copied.state = self.state.copy()
        copied._weights = {index: sums.copy() for index, sums in self._weights.items()}
        return copied

    def layer(self, info: LayerInfo) -> LayerState:
        """Return the state of a layer; an empty one where nothing came."""
        return self.state.layers.get(info.layer_index) or LayerState.empty(layer_shape(info))

    def expert_rows(self, info: LayerInfo, owners: tuple[int, ...] = ()) -> list[ExpertRow]:
        """Return the load of every expert of a layer.

        Args:
            owners: [E] the rank that computes each expert; empty where every rank computes all.
        """
        layer = self.layer(info)
        total, counts = layer.num_assignments, layer.counts.astype(np.float64)
        shares = counts / total if total else np.full(len(counts), np.nan)
        nothing = np.zeros((2, info.num_experts))
        number, sums = self._weights.get(info.layer_index, nothing)
        means = np.divide(sums, number, out=np.full(len(counts), np.nan), where=number > 0)
        probability = layer.mean_probability
        return [
            ExpertRow(
                layer_index=info.layer_index,
                expert_id=expert,
                num_assignments=int(counts[expert]),
                share=float(shares[expert]),
                load_ratio=float(shares[expert]) * info.num_experts,
                mean_gate_weight=float(means[expert]),
                mean_probability=float(probability[expert]),
                expert_parallel_rank=owners[expert] if owners else None,
            )
            for expert in range(info.num_experts)
        ]


def layer_shape(info: LayerInfo) -> LayerShape:
    """Return a layer's shape as the analysis knows it."""
    # k as the experts were called with it: not every config says it.
    return LayerShape(info.layer_index, info.num_experts, max(1, info.top_k), info.num_identity_experts)
