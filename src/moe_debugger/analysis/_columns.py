"""What every reader of rows asks of their columns: a layer's sizes, and blocks where rows name no requests."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from moe_debugger.analysis._row_runs import run_starts
from moe_debugger.errors import InvalidInputError

__all__ = ["neighbour_blocks", "size_of_layer"]

# Rows without requests are taken in runs of this many: a block of neighbours stands for a request.
_ROWS_PER_BLOCK = 64
_MIN_ROWS_PER_BLOCK = 8


def size_of_layer(value: int | Sequence[int], layer_index: int, name: str) -> int:
    """Return a layer's size, of one for all layers or of one per layer index.

    Raises:
        InvalidInputError: `value` has no entry for the layer.
    """
    if isinstance(value, int | np.integer):
        return int(value)
    if not 0 <= layer_index < len(value):
        raise InvalidInputError(f"{name} has {len(value)} entries, but the rows have layer {layer_index}")
    return int(value[layer_index])


def neighbour_blocks(num_rows: int, steps: npt.NDArray[np.generic] | None) -> npt.NDArray[np.intp]:
    """Return the block of each row of a layer where rows name no requests: neighbours of one step, [n] from 0 on."""
    if steps is None or not num_rows:
        return np.arange(num_rows) // _ROWS_PER_BLOCK
    # Several blocks a step where there is room: else nothing tells what steps share from what requests do.
    starts = run_starts(steps)
    lengths = np.diff(starts, append=num_rows)
    size = int(np.clip(np.median(lengths) // 4, _MIN_ROWS_PER_BLOCK, _ROWS_PER_BLOCK))
    offset = np.arange(num_rows) - np.repeat(starts, lengths)
    first = np.cumsum(np.r_[0, -(-lengths // size)[:-1]])
    return np.repeat(first, lengths) + offset // size
