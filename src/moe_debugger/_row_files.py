"""Rows in Arrow IPC files with the documented columns, in a private folder that goes with the process."""

import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_debugger._row_blocks import COLUMNS, ROUTER_COLUMNS, Layout, RowBlock, flatten

__all__ = ["PrivateFolder", "arrow_column", "arrow_texts", "read_rows", "write_rows"]

# Bounds of one record batch: what is in memory at once while a file is written or read.
_BATCH_ROWS = 65_536
_BATCH_BYTES = 8 * 1024 * 1024
_ROW_COLUMNS = (
    "layer_index", "expert_ids", "gate_weights", "slot_status", "intended_expert_ids", *ROUTER_COLUMNS, "logits",
)  # fmt: skip
_TOKEN_COLUMNS = ("step", "forward_index", "phase", "request_index", "position", "token_id", "is_padding")


class PrivateFolder:
    """A folder that only this user can read, made when it is first needed and removed with the process at the latest.

    Args:
        parent: where to make it; None = the system's temporary directory.
    """

    def __init__(self, parent: str | os.PathLike[str] | None = None) -> None:
        self._parent = parent
        self._path: Path | None = None
        self._process_id = 0

    @property
    def path(self) -> Path | None:
        """The folder, None before it is needed."""
        return self._path

    def ensure(self) -> Path:
        """Return the folder, and make it where it is not there yet.

        Raises:
            OSError: it cannot be made.
        """
        if self._path is None:
            # mkdtemp makes it with mode 0700.
            self._path = Path(tempfile.mkdtemp(prefix="moe-debugger-rows-", dir=self._parent))
            # Runs when this object is collected, and else at the interpreter's exit.
            self._process_id = os.getpid()
            weakref.finalize(self, _remove, self._path, self._process_id)
        return self._path

    def remove(self) -> None:
        """Remove the folder with all that is in it; again removes what was written meanwhile."""
        if self._path is not None:
            _remove(self._path, self._process_id)


def _remove(path: Path, process_id: int) -> None:
    # A forked child (a data loader's worker) inherits this, and must leave its parent's files alone.
    if os.getpid() == process_id:
        shutil.rmtree(path, ignore_errors=True)


def arrow_column(column: npt.NDArray[Any]) -> Any:
    """Return [n] or [n, width] numbers as a pyarrow array; the latter as fixed-size lists."""
    import pyarrow as pa

    if column.ndim == 1:
        return pa.array(column)
    return pa.FixedSizeListArray.from_arrays(pa.array(column.reshape(-1)), column.shape[1])


def arrow_texts(codes: npt.NDArray[Any], texts: Sequence[str]) -> Any:
    """Return texts by their codes, as a dictionary-encoded pyarrow array."""
    import pyarrow as pa

    return pa.DictionaryArray.from_arrays(pa.array(codes.astype(np.int32)), pa.array(list(texts), pa.string()))


def write_rows(path: Path, blocks: Sequence[RowBlock], module_names: Mapping[int, str], rank: int) -> None:
    """Write `blocks` to a new file, readable by its owner alone; a file that cannot be finished is removed.

    Raises:
        ImportError: pyarrow is not installed.
        OSError: the disk is full, or the folder is gone.
    """
    import pyarrow as pa

    layout = Layout.of(blocks)
    batch_rows = max(1, min(_BATCH_ROWS, _BATCH_BYTES // layout.row_bytes))
    # The file's dictionaries are written once, so they hold all names before the first batch.
    names: dict[str, int] = {}
    for block in blocks:
        for name in block.request_ids:
            names.setdefault(name, len(names))
    codec = "lz4" if pa.Codec.is_available("lz4") else None
    options = pa.ipc.IpcWriteOptions(compression=codec)
    highest = max([0, *module_names, *(int(block.rows["layer_index"].max(initial=0)) for block in blocks)])
    modules = [module_names.get(index, "") for index in range(highest + 1)]
    writer: Any = None
    try:
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            for block in blocks:
                for part in block.slices(batch_rows):
                    columns, _ = flatten([part], layout, len(part), names)
                    arrays = _arrow_arrays(columns, tuple(names), modules, rank)
                    batch = pa.RecordBatch.from_arrays(list(arrays.values()), names=list(arrays))
                    if writer is None:
                        writer = pa.ipc.new_file(file, batch.schema, options=options)
                    writer.write_batch(batch)
            if writer is not None:
                writer.close()
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def _arrow_arrays(
    columns: dict[str, npt.NDArray[Any]], request_ids: Sequence[str], module_names: Sequence[str], rank: int
) -> dict[str, Any]:
    num_rows = len(columns["layer_index"])
    arrays: dict[str, Any] = {}
    for name in COLUMNS:
        if name == "request_id":
            arrays[name] = arrow_texts(columns["request_index"], request_ids)
        elif name == "module_name":
            arrays[name] = arrow_texts(columns["layer_index"], module_names)
        elif name == "rank":
            arrays[name] = arrow_column(np.full(num_rows, rank, np.uint32))
        elif name in columns:
            arrays[name] = arrow_column(columns[name])
    return arrays


def read_rows(path: Path) -> Iterator[RowBlock]:
    """Yield the blocks of a file that `write_rows` wrote, one record batch at a time.

    Raises:
        OSError: the file is gone or cannot be read.
    """
    import pyarrow as pa

    with open(path, "rb") as file, pa.ipc.open_file(file) as reader:
        present = set(reader.schema.names)
        for index in range(reader.num_record_batches):
            batch = reader.get_batch(index)
            yield RowBlock(
                request_ids=batch.column("request_id").dictionary.to_pylist(),
                tokens={name: _numpy(batch.column(name)) for name in _TOKEN_COLUMNS if name in present},
                rows={name: _numpy(batch.column(name)) for name in _ROW_COLUMNS if name in present},
            )


def _numpy(array: Any) -> npt.NDArray[Any]:
    width = getattr(array.type, "list_size", None)
    values: npt.NDArray[Any] = (array if width is None else array.flatten()).to_numpy(zero_copy_only=False)
    return values if width is None else values.reshape(len(array), width)
