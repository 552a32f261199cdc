"""The Parquet tables of a recording: their columns, and how captured columns become record batches and back.

docs/recordings.md describes each column. pyarrow is imported where it is used, since it is optional.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from moe_debugger._row_blocks import Layout, RowBlock, flatten
from moe_debugger._row_files import arrow_texts
from moe_debugger.capture import LayerInfo
from moe_debugger.errors import DependencyMissingError, RecordingError
from moe_debugger.recording.manifest import LayerEntry, check_layers
from moe_debugger.training.series import SeriesTable
from moe_debugger.v1 import routing_pb2 as pb
from moe_debugger.wire.codec import CountsColumns, LayerCountColumns

__all__ = [
    "CAPTURED_AT",
    "TimedBlock",
    "batch_to_block",
    "batch_to_counts",
    "batch_to_layers",
    "batch_to_series",
    "block_to_batch",
    "check_columns",
    "check_values",
    "counts_to_batch",
    "dictionary_columns",
    "layers_to_batch",
    "merge_series",
    "require_pyarrow",
    "schema_of",
    "series_to_batch",
]

# The file's own column: when a row was captured. All others are those of `Decisions`, without `request_index`.
CAPTURED_AT = "captured_at_unix_ns"
# Older ones cannot add metadata to a file that is being written.
_MIN_PYARROW = (17, 0, 0)

Array = npt.NDArray[Any]

# "[x]" is a list of x; "text" is dictionary-encoded in memory.
_COLUMNS: dict[str, dict[str, str]] = {
    "rows": {
        "step": "uint64",
        "forward_index": "uint64",
        CAPTURED_AT: "int64",
        "phase": "uint8",
        "request_id": "text",
        "position": "uint32",
        "token_id": "int32",
        "is_padding": "bool",
        "layer_index": "uint32",
        "module_name": "text",
        "rank": "uint32",
        "expert_ids": "[int32]",
        "gate_weights": "[float32]",
        "slot_status": "[uint8]",
        "intended_expert_ids": "[int32]",
        "margin": "float32",
        "router_entropy": "float32",
        "router_logsumexp": "float32",
        "top1_probability": "float32",
        # Parquet's half floats are young; every float16 is a float32.
        "logits": "[float32]",
        "source_id": "text",
    },
    "counts": {
        "batch": "uint64",
        "first_step": "uint64",
        "last_step": "uint64",
        CAPTURED_AT: "int64",
        "phase": "uint8",
        "rank": "uint32",
        "layer_index": "uint32",
        "num_experts": "uint32",
        "num_identity_experts": "uint32",
        "num_tokens": "uint64",
        "num_padding": "uint64",
        "identity_slots": "uint64",
        "skipped_slots": "uint64",
        "dropped_slots": "uint64",
        "unused_slots": "uint64",
        "bad_slots": "uint64",
        "expert_counts": "[uint64]",
        "probability_sum": "[float64]",
        "source_id": "text",
    },
    "layers": {
        "layer_index": "uint32",
        "model_layer_index": "uint32",
        "module_name": "text",
        "stack": "text",
        "num_experts": "uint32",
        "top_k": "uint32",
        "num_shared_experts": "uint32",
        "num_identity_experts": "uint32",
        "scoring_function": "text",
        "weight_meaning": "text",
        "unavailable_reason": "text",
        "site": "text",
        "block_scale": "float64",
        "adapter": "text",
        "expert_parallel_ranks": "[int32]",
    },
    "series": {"step": "int64", "name": "text", "layer_index": "int32", "expert_id": "int32", "value": "float64"},
}
# Came with version 1.1: files that were written before do not have them.
_ADDED = {"rows": ("source_id",), "counts": ("source_id",)}
# Null in every row of a row group where nothing of the kind was captured.
_NULLABLE = {"rows": ("token_id", "intended_expert_ids", "logits"), "counts": ("probability_sum",)}
_TOKEN_COLUMNS = ("step", "forward_index", "phase", "position", "token_id", "is_padding")
_ROW_COLUMNS = (
    "layer_index", "expert_ids", "gate_weights", "slot_status", "intended_expert_ids", "margin", "router_entropy",
    "router_logsumexp", "top1_probability", "logits",
)  # fmt: skip
_COUNTS_OF_LAYER = (
    "layer_index", "num_experts", "num_identity_experts", "num_tokens", "num_padding", "identity_slots",
    "skipped_slots", "dropped_slots", "unused_slots", "bad_slots",
)  # fmt: skip
# Far beyond any training; sums of some of them still are numbers of 64 bits.
_MAX_STEP = 2**53
_NUM_SLOT_STATUSES = len(pb.SlotStatus.keys())


def require_pyarrow() -> None:
    """Check that recordings can be written and read here.

    Raises:
        DependencyMissingError: pyarrow is missing or too old.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet
    except ImportError as error:
        raise DependencyMissingError(
            "recordings are Parquet files and need pyarrow, which is not installed; "
            "run: pip install 'moe-debugger[pandas]'"
        ) from error
    version = tuple(int(each) for each in pa.__version__.split(".")[:3] if each.isdigit())
    if version < _MIN_PYARROW:
        raise DependencyMissingError(
            f"recordings need pyarrow 17 or newer, and {pa.__version__} is installed; run: pip install -U pyarrow"
        )


def schema_of(kind: str) -> Any:
    """Return the Arrow schema of a table: "rows", "counts", "layers" or "series"."""
    import pyarrow as pa

    def arrow_type(name: str) -> Any:
        if name.startswith("["):
            return pa.list_(arrow_type(name[1:-1]))
        if name == "text":
            return pa.dictionary(pa.int32(), pa.string())
        return pa.bool_() if name == "bool" else getattr(pa, name)()

    return pa.schema([(name, arrow_type(each)) for name, each in _COLUMNS[kind].items()])


def dictionary_columns(kind: str) -> list[str]:
    """Return the columns with few distinct values, by their names inside Parquet."""
    floats = ("[float32]", "float32", "[float64]", "float64")
    named = _COLUMNS[kind].items()
    return [f"{name}.list.element" if each[0] == "[" else name for name, each in named
            if each not in (*floats, "bool")]  # fmt: skip


@dataclass(slots=True)
class TimedBlock:
    """Rows that were read, with when they were captured, [n] int64 nanoseconds of Unix time."""

    block: RowBlock
    captured_at: npt.NDArray[np.int64]


def _batch(kind: str, columns: Mapping[str, Any]) -> Any:
    import pyarrow as pa

    schema = schema_of(kind)
    size = next(len(column) for column in columns.values() if column is not None)
    arrays = []
    for field in schema:
        column = columns.get(field.name)
        if column is None:
            arrays.append(pa.nulls(size, field.type))
        elif isinstance(column, np.ndarray):
            arrays.append(_lists(column) if column.ndim == 2 else pa.array(column, field.type))
        else:
            arrays.append(column)
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def _lists(column: Array) -> Any:
    import pyarrow as pa

    num_rows, width = column.shape
    offsets = np.arange(num_rows + 1, dtype=np.int32) * width
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.ascontiguousarray(column).reshape(-1)))


def _texts(values: Sequence[str]) -> Any:
    names = list(dict.fromkeys(values))
    places = {name: place for place, name in enumerate(names)}
    return arrow_texts(np.array([places[value] for value in values], np.int32), names)


def block_to_batch(
    block: RowBlock,
    captured_at: Mapping[int, int],
    module_names: Mapping[int, str],
    rank: int,
    source_id: str = "",
) -> Any:
    """Return rows as a record batch.

    Args:
        block: few enough rows for one row group.
        captured_at: Unix time in nanoseconds by forward index.
        module_names: by layer index.
        rank: global rank of the process that captured the rows.
        source_id: its id in its fleet.
    """
    columns, request_ids = flatten([block], Layout.of([block]), len(block))
    forwards, place = np.unique(columns["forward_index"], return_inverse=True)
    times = np.array([captured_at.get(int(forward), 0) for forward in forwards], np.int64)
    highest = max([0, *module_names, int(columns["layer_index"].max(initial=0))])
    names = [module_names.get(index, "") for index in range(highest + 1)]
    values: dict[str, Any] = dict(columns)
    if "logits" in values:
        values["logits"] = values["logits"].astype(np.float32)
    values[CAPTURED_AT] = times[place]
    values["request_id"] = arrow_texts(columns["request_index"], request_ids or ("",))
    values["module_name"] = arrow_texts(columns["layer_index"], names)
    values["rank"] = np.full(len(block), rank, np.uint32)
    values["source_id"] = arrow_texts(np.zeros(len(block), np.int32), (source_id,))
    return _batch("rows", values)


def batch_to_block(batch: Any) -> TimedBlock:
    """Return the rows of a record batch of one row group.

    Raises:
        ValueError: the lists of a column differ in length, or a value is missing.
    """
    request_ids = batch.column("request_id")
    tokens = {name: _numpy(batch, name) for name in _TOKEN_COLUMNS}
    tokens["request_index"] = _values(request_ids.indices, "request_id").astype(np.uint32)
    rows = {name: _numpy(batch, name) for name in _ROW_COLUMNS}
    logits = rows["logits"]
    if logits is not None:
        rows["logits"] = logits.astype(np.float16)
    widths = {column.shape[1] for name, column in rows.items() if column is not None and name in _SLOTS}
    if len(widths) > 1:
        raise ValueError(f"the slots of a row differ in number: {sorted(widths)}")
    return TimedBlock(
        RowBlock(
            request_ids.dictionary.to_pylist(),
            {name: column for name, column in tokens.items() if column is not None},
            {name: column for name, column in rows.items() if column is not None},
        ),
        _values(batch.column(CAPTURED_AT), CAPTURED_AT),
    )


_SLOTS = ("expert_ids", "gate_weights", "slot_status", "intended_expert_ids")


def check_values(rows: Mapping[str, Array], layers: Sequence[LayerInfo] | None) -> None:
    """Check the values of rows that nothing else would refuse.

    Args:
        rows: columns by name; those that are not there are not checked.
        layers: all that there are; None = not known.

    Raises:
        ValueError: rows are of a layer or an expert that is not there, or a slot has a status, or a row a step, that
            does not exist.
    """
    status = rows.get("slot_status")
    if status is not None and status.size and int(status.max()) >= _NUM_SLOT_STATUSES:
        raise ValueError(f"slot_status is {int(status.max())}, which is no status")
    for name in ("step", "forward_index"):
        column = rows.get(name)
        if column is not None and len(column) and int(column.max()) > _MAX_STEP:
            raise ValueError(f"{name} is {int(column.max())}, more than any run has")
    index, ids = rows.get("layer_index"), rows.get("expert_ids")
    if layers is None or index is None or not len(index):
        return
    # [layers] experts of each, 0 where there is no such layer.
    num_ids = np.zeros(1 + max((info.layer_index for info in layers), default=0), np.int64)
    for info in layers:
        num_ids[info.layer_index] = info.num_experts + info.num_identity_experts
    if int(index.max()) >= len(num_ids) or not num_ids[index].all():
        known = set(np.flatnonzero(num_ids).tolist())
        unknown = min(set(np.unique(index).tolist()) - known)
        raise ValueError(f"it has rows of layer {unknown}, which is not among the layers {sorted(known)[:8]}")
    if ids is not None and (int(ids.min()) < -1 or (ids.max(axis=1) >= num_ids[index]).any()):
        raise ValueError(f"expert ids reach from {int(ids.min())} to {int(ids.max())}, which its layers do not have")


def _numpy(batch: Any, name: str) -> Array | None:
    """Return a column of numbers or of lists of equal length; None where all of it is null."""
    column = batch.column(name)
    is_nullable = name in _NULLABLE["rows"] or name in _NULLABLE["counts"]
    if is_nullable and len(column) and column.null_count == len(column):
        return None
    return column_values(column, name)


def column_values(column: Any, name: str) -> Array:
    """Return an Arrow column of numbers, [n], or of lists of equal length, [n, k].

    Raises:
        ValueError: a row has no value, or the lists differ in length.
    """
    if not hasattr(column, "offsets"):
        return _values(column, name)
    if column.null_count:
        raise ValueError(f"{name} has {column.null_count} rows without a value")
    lengths = np.diff(column.offsets.to_numpy())
    if len(lengths) and (lengths != lengths[0]).any():
        raise ValueError(f"the lists of {name} differ in length")
    values = _values(column.flatten(), name)
    return values.reshape(len(column), int(lengths[0]) if len(lengths) else 1)


def _values(column: Any, name: str) -> Array:
    if column.null_count:
        raise ValueError(f"{name} has {column.null_count} rows without a value")
    values: Array = column.to_numpy(zero_copy_only=False)
    return values


def counts_to_batch(counts: Sequence[CountsColumns], first_batch: int, rank: int, source_id: str = "") -> Any:
    """Return sums as a record batch, one row for each of them and layer.

    Args:
        counts: in order.
        first_batch: number of the first of them in the recording.
        rank: global rank of the process that captured them.
        source_id: its id in its fleet.
    """
    pairs = [(first_batch + place, each, layer) for place, each in enumerate(counts) for layer in each.layers]
    layers = [layer for _, _, layer in pairs]
    values: dict[str, Any] = {
        "batch": np.array([number for number, _, _ in pairs], np.uint64),
        CAPTURED_AT: np.array([each.captured_at_unix_ns for _, each, _ in pairs], np.int64),
        "rank": np.full(len(pairs), rank, np.uint32),
        "source_id": arrow_texts(np.zeros(len(pairs), np.int32), (source_id,)),
    }
    for name in ("first_step", "last_step", "phase"):
        values[name] = np.array([getattr(each, name) for _, each, _ in pairs], _COLUMNS["counts"][name])
    for name in _COUNTS_OF_LAYER:
        values[name] = np.array([getattr(layer, name) for layer in layers], _COLUMNS["counts"][name])
    values["expert_counts"] = _ragged([np.asarray(layer.expert_counts, np.uint64) for layer in layers], np.uint64)
    values["probability_sum"] = _ragged([layer.probability_sum for layer in layers], np.float64)
    return _batch("counts", values)


def _ragged(values: Sequence[Array | None], dtype: npt.DTypeLike) -> Any:
    import pyarrow as pa

    lengths = [0 if each is None else len(each) for each in values]
    flat = np.concatenate([np.empty(0, dtype), *(each for each in values if each is not None)]).astype(dtype)
    offsets = pa.array(np.cumsum([0, *lengths]).astype(np.int32))
    mask = np.array([each is None for each in values])
    return pa.ListArray.from_arrays(offsets, pa.array(flat), mask=pa.array(mask))


def batch_to_counts(batches: Iterable[Any]) -> Iterator[CountsColumns]:
    """Yield the sums of record batches as they were captured; those of one batch may be in two of them."""
    current: tuple[int, CountsColumns] | None = None
    for batch in batches:
        for row in batch.to_pylist():
            layer = LayerCountColumns(
                **{name: row[name] for name in _COUNTS_OF_LAYER},
                expert_counts=np.array(row["expert_counts"], np.uint64),
                probability_sum=None
                if row["probability_sum"] is None
                else np.array(row["probability_sum"], np.float64),
            )
            if current is None or current[0] != row["batch"]:
                if current is not None:
                    yield current[1]
                names = ("first_step", "last_step", "phase", CAPTURED_AT)
                current = row["batch"], CountsColumns(*(row[name] for name in names))
            current[1].layers.append(layer)
    if current is not None:
        yield current[1]


def layers_to_batch(layers: Sequence[LayerInfo], owners: Mapping[int, Sequence[int]]) -> Any:
    """Return the table of layers, with the expert-parallel rank of each expert where there are several."""
    values: dict[str, Any] = {}
    for name, kind in _COLUMNS["layers"].items():
        if name == "expert_parallel_ranks":
            ranks = [np.asarray(owners.get(each.layer_index, ()), np.int32) for each in layers]
            values[name] = _ragged(ranks, np.int32)
        elif kind == "text":
            values[name] = _texts([str(getattr(each, name)) for each in layers])
        else:
            values[name] = np.array([getattr(each, name) for each in layers], kind)
    return _batch("layers", values)


def batch_to_layers(batch: Any) -> tuple[LayerInfo, ...]:
    """Return the layers of a record batch.

    Raises:
        ValueError: a value is missing or out of range.
    """
    rows = batch.select([field.name for field in fields(LayerInfo)]).to_pylist()
    try:
        layers = [LayerEntry.model_validate(row).to_info() for row in rows]
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{first['loc'][0]}={str(first['input'])[:80]!r}: {first['msg']}") from error
    check_layers(layers)
    return tuple(layers)


def series_to_batch(series: SeriesTable) -> Any:
    """Return the table of training series."""
    values: dict[str, Any] = dict(series)
    values["name"] = _texts([str(name) for name in series.name])
    return _batch("series", values)


def batch_to_series(batch: Any, notes: Mapping[str, int], num_not_kept: int) -> SeriesTable:
    """Return the training series of a record batch.

    Raises:
        ValueError: a value is missing.
    """
    table = SeriesTable([], notes=notes, num_not_kept=num_not_kept)
    table.step, table.layer_index = _values(batch.column("step"), "step"), _values(batch.column("layer_index"), "layer")
    table.expert_id, table.value = _values(batch.column("expert_id"), "expert"), _values(batch.column("value"), "value")
    names = batch.column("name")
    table.name = np.array(names.dictionary.to_pylist() or [""], np.str_)[_values(names.indices, "name")]
    return table


def merge_series(tables: Sequence[SeriesTable], notes: Mapping[str, int], num_not_kept: int) -> SeriesTable:
    """Return the points of tables that were written one after another.

    A point of the same step, series, layer and expert that comes later replaces the one before.
    """
    merged = SeriesTable([], notes=notes, num_not_kept=num_not_kept)
    if not any(len(table) for table in tables):
        return merged
    columns = {name: np.concatenate([table[name] for table in tables if len(table)]) for name in merged}
    _names, codes = np.unique(columns["name"], return_inverse=True)
    keys = np.stack([columns["step"], codes, columns["layer_index"], columns["expert_id"]], axis=1).astype(np.int64)
    _, first, place = np.unique(keys, axis=0, return_index=True, return_inverse=True)
    last = np.zeros(len(first), np.int64)
    last[place.reshape(-1)] = np.arange(len(keys))
    # By step, then as they were first recorded.
    order = np.lexsort((first, columns["step"][last]))
    for name in merged:
        setattr(merged, name, columns[name][last[order]])
    return merged


def check_columns(schema: Any, kind: str, part: str) -> None:
    """Check that a file has the columns of its table.

    Raises:
        RecordingError: it has others.
    """
    expected = schema_of(kind)
    for name in _ADDED.get(kind, ()):
        if name not in schema.names:
            expected = expected.remove(expected.get_field_index(name))
    if not schema.remove_metadata().equals(expected):
        different = sorted(set(schema.names) ^ set(expected.names)) or [
            name for name in expected.names if schema.field(name).type != expected.field(name).type
        ]
        raise RecordingError(f"part {part} does not have the columns of {kind}; they differ in {different}", part=part)
