"""Loads over steps, in at most 96 buckets of equally many steps for each layer: bounded however long the run was."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from moe_debugger.wire.codec import CountsColumns
from moe_debugger.wire.slots import SlotClasses

if TYPE_CHECKING:
    from moe_debugger.capture import LayerInfo

__all__ = ["MAX_BUCKETS", "LayerSteps", "StepCounter", "effective_over_steps"]

MAX_BUCKETS = 96


@dataclass(frozen=True, slots=True, eq=False)
class LayerSteps:
    """Loads of one layer over its steps.

    Attributes:
        width: steps per bucket.
        first_steps: [n] int64, first step of each bucket that has tokens, ascending.
        counts: [n, E] int64, load of each expert.
        num_tokens: [n] int64, valid tokens.
    """

    width: int
    first_steps: npt.NDArray[np.int64]
    counts: npt.NDArray[np.int64]
    num_tokens: npt.NDArray[np.int64]


def effective_over_steps(counts: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Return exp of the load entropy of each row of [n, E]; NaN for a row without load."""
    c = counts.astype(np.float64)
    total = c.sum(axis=1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        p = c / total
        terms = np.where(p > 0, p * np.log(p), 0.0)
    return np.where(total[:, 0] > 0, np.exp(-terms.sum(axis=1)), np.nan)


class StepCounter:
    """Adds up loads by bucket of steps.

    Args:
        layers: by layer index.
        first, last: the range of steps.
    """

    def __init__(self, layers: Mapping[int, "LayerInfo"], first: int, last: int) -> None:
        self._layers = layers
        self._first = first
        self._width = max(1, -(-(last - first + 1) // MAX_BUCKETS))
        self._buckets = (last - first) // self._width + 1
        self._counts = {i: np.zeros((self._buckets, info.num_experts), np.int64) for i, info in layers.items()}
        self._tokens = {i: np.zeros(self._buckets, np.int64) for i in layers}

    def _bucket(self, step: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        # A manifest that names other steps than its rows have must not lead outside.
        return np.clip((step - self._first) // self._width, 0, self._buckets - 1)

    def add_rows(self, rows: Mapping[str, Any]) -> None:
        """Add the valid rows of columns in the form of `session.decisions()`."""
        layer_index = np.asarray(rows["layer_index"])
        is_valid = ~np.asarray(rows["is_padding"], np.bool_)
        bucket = self._bucket(np.asarray(rows["step"]).astype(np.int64))
        ids, status = np.asarray(rows["expert_ids"]), np.asarray(rows["slot_status"])
        for index, info in self._layers.items():
            own = np.flatnonzero((layer_index == index) & is_valid)
            is_load = SlotClasses.of(ids[own], status[own], info.num_experts).is_load
            cells = (bucket[own][:, None] * info.num_experts + ids[own])[is_load]
            table = np.bincount(cells, minlength=self._buckets * info.num_experts)
            self._counts[index] += table.reshape(self._buckets, info.num_experts)
            self._tokens[index] += np.bincount(bucket[own], minlength=self._buckets)

    def add_counts(self, columns: CountsColumns) -> None:
        """Add sums; those of several steps go to the first one's bucket."""
        bucket = int(self._bucket(np.array([columns.first_step], np.int64))[0])
        for layer in columns.layers:
            if layer.layer_index in self._layers:
                self._counts[layer.layer_index][bucket] += layer.expert_counts.astype(np.int64)
                self._tokens[layer.layer_index][bucket] += layer.num_tokens

    def layers(self) -> dict[int, LayerSteps]:
        """Return the loads of each layer; buckets without tokens are left out."""
        result = {}
        for index, counts in self._counts.items():
            has_tokens = np.flatnonzero(self._tokens[index] > 0)
            result[index] = LayerSteps(
                self._width, self._first + has_tokens * self._width, counts[has_tokens], self._tokens[index][has_tokens]
            )
        return result
