"""The router's probabilities of the rows of a part, summed by layer: rows do not hold them.

They are in the metadata of the part's Parquet file, so they are read, or lost, with its rows. Each number is a multiple
of 2**-20 and exact, as `RoutingState` has it, so what is added up of whole parts equals what the session added up.
"""

import json
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from moe_debugger.analysis import RoutingState
from moe_debugger.analysis.layer_state import FIXED_POINT, MAX_ABSOLUTE
from moe_debugger.wire.codec import RoutingColumns

__all__ = ["KEY", "ProbabilitySums"]

KEY = "moe_debugger.router_probabilities"
_MAX_BYTES = 64 * 1024 * 1024


class ProbabilitySums:
    """Sums of the router's probabilities by layer."""

    def __init__(self) -> None:
        # By layer: number of tokens, and [E] int64 sums in fixed point.
        self._sums: dict[int, tuple[int, npt.NDArray[np.int64]]] = {}

    def fold(self, batches: Iterable[RoutingColumns]) -> None:
        """Add what captured columns carry; layers whose router has no probabilities carry none."""
        for columns in batches:
            for layer in columns.layers:
                sums = layer.probability_sum
                valid = ~columns.is_padding if layer.row_index is None else ~columns.is_padding[layer.row_index]
                num_tokens = int(np.count_nonzero(valid))
                if sums is None or not num_tokens or sums.shape != (layer.num_experts,) or not np.isfinite(sums).all():
                    continue
                fixed = np.rint(np.clip(sums, 0, MAX_ABSOLUTE) * FIXED_POINT).astype(np.int64)
                self._add(layer.layer_index, num_tokens, fixed)

    def _add(self, layer_index: int, num_tokens: int, fixed: npt.NDArray[np.int64]) -> None:
        number, before = self._sums.get(layer_index, (0, np.zeros_like(fixed)))
        self._sums[layer_index] = number + num_tokens, before + fixed

    def to_json(self) -> str:
        """Return the layers as JSON: `layer_index`, `num_tokens` and `probability_sum`, a number for each expert."""
        return json.dumps(
            [
                {"layer_index": index, "num_tokens": number, "probability_sum": (fixed / FIXED_POINT).tolist()}
                for index, (number, fixed) in sorted(self._sums.items())
            ],
            separators=(",", ":"),
        )

    def add_json(self, text: bytes) -> None:
        """Add the sums of a part.

        Raises:
            ValueError, KeyError, TypeError, OverflowError: it is not what `to_json` returns.
        """
        if len(text) > _MAX_BYTES:
            raise ValueError(f"its sums of probabilities take more than {_MAX_BYTES} bytes, no recording's do")
        for each in json.loads(text):
            sums, number = np.array(each["probability_sum"], np.float64), each["num_tokens"]
            known = self._sums.get(each["layer_index"])
            if known is not None and known[1].shape != sums.shape:
                raise ValueError(f"layer {each['layer_index']} has sums of {len(sums)} experts")
            is_number = isinstance(number, int) and 0 < number < 2**40
            if sums.ndim != 1 or not is_number or not (np.isfinite(sums) & (sums >= 0) & (sums < 2**42)).all():
                raise ValueError(f"the sums of probabilities of layer {str(each['layer_index'])[:20]} are out of range")
            self._add(int(each["layer_index"]), number, np.rint(sums * FIXED_POINT).astype(np.int64))

    def add_to(self, state: RoutingState) -> None:
        """Add the sums to a state of the rows.

        Raises:
            ValueError: they do not fit its layers.
        """
        for index, (number, fixed) in self._sums.items():
            layer = state.layers.get(index)
            if layer is None or layer.probability_sum.shape != fixed.shape:
                raise ValueError(f"layer {index} has sums of probabilities of {len(fixed)} experts, which it has not")
            layer.probability_sum = layer.probability_sum + fixed
            layer.num_probability_tokens += number
