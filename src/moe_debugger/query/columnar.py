"""Reads single columns of a recording's row groups, and passes over the groups that cannot have what is asked for."""

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from moe_debugger.query.rows import RowBatch

if TYPE_CHECKING:
    from moe_debugger.recording import Recording
    from moe_debugger.recording.manifest import PartEntry

__all__ = ["read_columns"]

Array = npt.NDArray[Any]
_BOUNDED = ("layer_index", "step")


def read_columns(
    recording: "Recording",
    entry: "PartEntry",
    raw: frozenset[str],
    may_have: Callable[[Mapping[str, tuple[int, int]]], bool],
) -> Iterator[RowBatch]:
    """Yield the row groups of a part.

    Args:
        raw: captured columns; `request_index` stands for the file's `request_id`. Those that the part does not have
            are left out.
        may_have: whether a group can have rows that are wanted, given the least and the greatest value of its
            `layer_index` and `step`, as the file's statistics say them.

    Raises:
        RecordingError: the part is damaged.
    """
    names = sorted("request_id" if name == "request_index" else name for name in raw)
    with recording._reader(entry) as reader:  # its checks of the part are those of every other reader
        if reader is None:
            return
        for number in range(reader.metadata.num_row_groups):
            if not may_have(_bounds(reader.metadata.row_group(number))):
                continue
            batch = None
            with recording._parsing(entry, number):
                read = _batch(reader.read_row_group(number, columns=names, use_threads=False), raw)
                recording._check_values(read.raw)
                batch = read
            if batch is not None and len(batch):
                yield batch


def _bounds(group: Any) -> dict[str, tuple[int, int]]:
    found: dict[str, tuple[int, int]] = {}
    for number in range(group.num_columns):
        column = group.column(number)
        if column.path_in_schema in _BOUNDED:
            statistics = column.statistics
            if statistics is not None and statistics.has_min_max:
                found[column.path_in_schema] = int(statistics.min), int(statistics.max)
    return found


def _batch(table: Any, raw: frozenset[str]) -> RowBatch:
    columns: dict[str, Array] = {}
    request_ids: list[str] = []
    from moe_debugger.recording.tables import column_values

    for name in raw:
        column = table.column("request_id" if name == "request_index" else name).combine_chunks()
        if name == "request_index":
            column = column.dictionary_encode() if not hasattr(column, "dictionary") else column
            request_ids = column.dictionary.to_pylist()
            columns[name] = column_values(column.indices, name)
        elif column.null_count == len(column) and len(column):
            continue
        else:
            columns[name] = column_values(column, name)
    return RowBatch(columns, request_ids)
