"""What every reader of rows asks of their columns: their form, a layer's sizes, and blocks where rows name no requests.

Columns come from anywhere (a session, a recording, pandas, an engine), so nothing is cast before it is known to fit: a
cast would wrap, cut or stretch numbers into other ones that look right.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_debugger.analysis._row_runs import run_starts
from moe_debugger.errors import InvalidInputError

__all__ = ["checked_columns", "neighbour_blocks", "size_of_layer", "whole_numbers"]

# Rows without requests are taken in runs of this many: a block of neighbours stands for a request.
_ROWS_PER_BLOCK = 64
_MIN_ROWS_PER_BLOCK = 8

_Array = npt.NDArray[Any]
# Columns of whole numbers: their dtype, and the least and the highest value.
_WHOLE: dict[str, tuple[str, int, int]] = {
    "layer_index": ("<i8", 0, 2**31 - 1),
    "expert_ids": ("<i4", -1, 65_534),
    "intended_expert_ids": ("<i4", -1, 65_534),
    "slot_status": ("u1", 0, 255),
    "step": ("<u8", 0, 2**64 - 1),
    "forward_index": ("<u8", 0, 2**64 - 1),
    "phase": ("u1", 0, 255),
    "position": ("<u4", 0, 2**32 - 1),
    "token_id": ("<i8", -1, 2**32 - 1),
    "rank": ("<i8", -(2**31), 2**31 - 1),
}
_REAL = {"gate_weights", "margin", "router_entropy", "router_logsumexp", "top1_probability"}
_OF_SLOTS = {"expert_ids", "intended_expert_ids", "slot_status", "gate_weights"}


def checked_columns(decisions: Any, used: Collection[str], *, required: Sequence[str] = ()) -> dict[str, _Array]:
    """Return the columns of `decisions` that are used and not None, as arrays of their dtype with one row each.

    Args:
        decisions: a mapping of columns, or a table of them (pandas, polars, pyarrow).
        used: names of columns. Any that is not one of `session.decisions()` names rows by text or number, as it is.
        required: those that have to be there besides `layer_index` and `expert_ids`.

    Raises:
        InvalidInputError: a required column is missing, or a column is of another length or shape, or holds what it
            cannot (fractions, text, numbers out of range).
    """
    columns = _as_mapping(decisions)
    needed = ("layer_index", "expert_ids", *required)
    missing = [name for name in needed if columns.get(name) is None]
    if missing:
        raise InvalidInputError(f"decisions has no column {missing}; it has {sorted(map(str, columns))}")
    names = [name for name in dict.fromkeys((*needed, *used)) if columns.get(name) is not None]
    found = {name: _as_array(columns[name], name) for name in names}
    num_rows = len(found["layer_index"])
    wrong = {name: len(column) for name, column in found.items() if len(column) != num_rows}
    if wrong:
        raise InvalidInputError(f"columns have other lengths than layer_index ({num_rows} rows): {wrong}")
    if not num_rows and found["expert_ids"].ndim != 2:
        found["expert_ids"] = np.empty((0, 1), np.int32)
    for name, column in found.items():
        _check_shape(name, column, found["expert_ids"])
        found[name] = _checked(name, column)
    return found


def _as_mapping(decisions: Any) -> Mapping[str, Any]:
    if isinstance(decisions, Mapping):
        return decisions
    # pyarrow has column_names; columns are names in pandas and polars.
    names = getattr(decisions, "column_names", None)
    names = getattr(decisions, "columns", None) if names is None else names
    if names is None or not hasattr(decisions, "__getitem__"):
        raise InvalidInputError(
            f"got {type(decisions).__name__}: this needs rows, columns as `session.decisions()` gives them; counts and "
            "folded states do not say which token or request a choice belongs to"
        )
    return {str(name): decisions[name] for name in names}


def _as_array(column: Any, name: str) -> _Array:
    is_of_numbers = name in _WHOLE or name in _REAL or name == "is_padding"
    try:
        # Names in lists stay what they are: as one array of texts NaN were a name, and all as wide as the longest.
        array = np.asarray(column, None if is_of_numbers or not isinstance(column, list | tuple) else object)
        is_nested = array.dtype.kind == "O" and is_of_numbers
        # A column of lists, or of numbers as objects.
        array = np.array(array.tolist()) if is_nested else array
    except ValueError as error:
        raise InvalidInputError(
            f"column {name} is ragged, its rows have other lengths ({error}); give [n, k], -1 where there is no expert"
        ) from error
    if not array.ndim:
        raise InvalidInputError(f"column {name} is the single value {column!r}, expected one for each row")
    return array


def _check_shape(name: str, column: _Array, ids: _Array) -> None:
    expected: tuple[int, ...] = ids.shape if name in _OF_SLOTS and name != "expert_ids" else (len(ids),)
    if name == "expert_ids":
        if column.ndim != 2 and len(column):
            raise InvalidInputError(f"expert_ids has shape {column.shape}, expected [n, k], one id for each slot")
    elif column.shape != expected and len(ids):
        what = "as expert_ids" if name in _OF_SLOTS else "one value for each row"
        raise InvalidInputError(f"column {name} has shape {column.shape}, expected {expected}, {what}")


def _checked(name: str, column: _Array) -> _Array:
    if name == "expert_ids" and column.dtype == np.int32:
        # The usual case. Each layer has a range of its own, which its reader checks.
        return column
    if name in _WHOLE:
        dtype, low, high = _WHOLE[name]
        if name == "token_id" and column.dtype.kind in "iu":
            # Its readers take any integers: no copy of them here.
            dtype = column.dtype.str
        return whole_numbers(column, f"column {name}", dtype, low=low, high=high)
    if name == "is_padding" and column.dtype.kind != "b":
        return whole_numbers(column, "column is_padding", "u1", low=0, high=1).astype(np.bool_)
    if name in _REAL and column.dtype.kind not in "fiu" and len(column):
        raise InvalidInputError(f"column {name} holds {column.dtype}, expected real numbers, NaN where unknown")
    return column


def whole_numbers(
    values: npt.ArrayLike, name: str, dtype: str, *, low: int | None = None, high: int | None = None
) -> _Array:
    """Return `values` as `dtype`, an integer type, if each is a whole number from `low` to `high`.

    Args:
        values: numbers, of any dtype.
        name: what to call them.
        dtype: an integer type.
        low, high: None = what the type holds.

    Raises:
        InvalidInputError: they are no numbers, or one of them is a fraction, NaN or out of range.
    """
    array = np.asarray(values)
    limits = np.iinfo(dtype)
    low, high = limits.min if low is None else low, limits.max if high is None else high
    if array.dtype == limits.dtype and low <= limits.min and limits.max <= high:
        return array
    if not array.size:
        return array.astype(dtype)
    if array.dtype.kind not in "iuf":
        raise InvalidInputError(f"{name} holds {array.dtype}, expected whole numbers")
    is_bad = None
    if array.dtype.kind == "f":
        # NaN is no whole number either; floats hold only the smaller ones exactly.
        is_bad = ~((array == np.floor(array)) & (np.abs(array) <= 2.0 ** np.finfo(array.dtype).nmant))
    if is_bad is None or not is_bad.any():
        if low <= int(array.min()) and int(array.max()) <= high:
            return array.astype(dtype, copy=False)
        is_bad = (array < low) | (array > high)
    place = tuple(int(at) for at in np.argwhere(is_bad)[0])
    raise InvalidInputError(f"{name} is {array[place]} in row {place[0]}, expected whole numbers from {low} to {high}")


def size_of_layer(value: int | Sequence[int], layer_index: int, name: str) -> int:
    """Return a layer's size, of one for all layers or of one per layer index.

    Raises:
        InvalidInputError: `value` is no whole number and no sequence of them, or has no entry for the layer.
    """
    size: Any = value
    if isinstance(value, Sequence | np.ndarray) and not isinstance(value, str) and np.ndim(value):
        if not 0 <= layer_index < len(value):
            raise InvalidInputError(f"{name} has {len(value)} entries, but the rows have layer {layer_index}")
        size = value[layer_index]
    if isinstance(size, int | np.integer):
        return int(size)
    raise InvalidInputError(f"{name} is {value!r}, expected a whole number, or one for each layer index")


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
