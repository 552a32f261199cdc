"""Keeps the captured rows: the newest in memory, older ones in files, the oldest counted and dropped."""

import os
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import structlog

from moe_debugger._row_blocks import Layout, RowBlock, RowSource
from moe_debugger._row_files import PrivateFolder, read_rows, write_rows
from moe_debugger._row_packing import cut, pack
from moe_debugger.publish.batching import columns_size_bytes
from moe_debugger.wire.codec import RoutingColumns

__all__ = ["RowStatistics", "RowStore"]

# A block is a small part of the bound, so that what is pushed out is never much more than what has to go.
_BLOCK_BYTES = 4 * 1024 * 1024
_BLOCKS_PER_BOUND = 32
_FILE_BYTES = 16 * 1024 * 1024
_FILES_PER_BOUND = 8
# Headers of the arrays and objects of a forward and of each of its layers: tracemalloc shows 990 and 885 bytes with
# 6 arrays a layer.
_FORWARD_OVERHEAD_BYTES = 1000
_LAYER_OVERHEAD_BYTES = 1000

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class RowStatistics:
    """Where the rows of a session are; one row is one token at one MoE layer.

    Attributes:
        num_kept: rows that `decisions` and `iter_decisions` give.
        num_on_disk: those of them that are in files.
        num_not_kept: rows that were dropped for want of room; the counts hold them.
        memory_bytes, max_rows_bytes: of the rows in memory, and its bound.
        disk_bytes, max_disk_bytes: of the files, and its bound.
        num_files: files that there are now.
        folder: where they are, None before the first.
    """

    num_kept: int
    num_on_disk: int
    num_not_kept: int
    memory_bytes: int
    max_rows_bytes: int
    disk_bytes: int
    max_disk_bytes: int
    num_files: int
    folder: Path | None


@dataclass(slots=True)
class _RowFile:
    path: Path
    num_rows: int
    size_bytes: int
    last_forward_index: int
    is_dropped: bool = False


@dataclass(frozen=True, slots=True)
class _Snapshot:
    files: list[_RowFile]
    blocks: list[RowBlock]
    layout: Layout
    num_rows: int


class RowStore:
    """Keeps rows within a bound of memory and a bound of disk.

    One thread adds; others may read at any time. Nothing here raises into the thread that adds: rows that can be kept
    nowhere are counted in `num_not_kept`, and `problems` says why.

    Args:
        max_rows_bytes: bound on the rows in memory, 0 = keep none at all; a small part more is in use while some of
            them move to a file.
        max_disk_bytes: bound on the files; 0 = no files. It is passed by at most one file, for as long as it takes to
            remove the oldest.
        rows_dir: folder in which the private folder of the files is made; None = the system's temporary directory.
        module_names: names for the files, by layer index.
        rank: global rank of this process.
    """

    def __init__(
        self,
        max_rows_bytes: int,
        *,
        max_disk_bytes: int = 0,
        rows_dir: str | os.PathLike[str] | None = None,
        module_names: Mapping[int, str] | None = None,
        rank: int = 0,
    ) -> None:
        self.max_rows_bytes = max_rows_bytes
        self.max_disk_bytes = max_disk_bytes
        self._module_names = dict(module_names or {})
        self._rank = rank
        self._block_bytes = min(_BLOCK_BYTES, max_rows_bytes // _BLOCKS_PER_BOUND)
        self._file_bytes = min(_FILE_BYTES, max_rows_bytes // _FILES_PER_BOUND, max_disk_bytes // _FILES_PER_BOUND)
        self._folder = PrivateFolder(rows_dir)
        self._file_numbers = count()
        # The lock is held for bookkeeping alone, never while rows are packed, written or read.
        self._lock = threading.Lock()
        self._files: deque[_RowFile] = deque()
        self._blocks: deque[RowBlock] = deque()
        self._pending: list[RoutingColumns] = []
        self._block_bytes_used = 0
        self._pending_bytes = 0
        self._num_in_memory = 0
        self._num_on_disk = 0
        self._disk_bytes = 0
        self._num_not_kept = 0
        self._layout = Layout(top_k=1)
        self._problems: dict[str, int] = {}
        self._is_closed = False

    def add(self, *parts: RoutingColumns) -> None:
        """Keep columns; older rows make room where there is none. Parts of the same forwards are given together."""
        parts = tuple(columns for columns in parts if columns.num_decisions)
        if not parts:
            return
        num_rows = sum(columns.num_decisions for columns in parts)
        if not self.max_rows_bytes:
            with self._lock:
                self._num_not_kept += num_rows
            return
        size = sum(
            columns_size_bytes(columns) + _FORWARD_OVERHEAD_BYTES + _LAYER_OVERHEAD_BYTES * len(columns.layers)
            for columns in parts
        )
        with self._lock:
            if self._is_closed:
                self._num_not_kept += num_rows
                return
            self._pending += parts
            self._pending_bytes += size
            self._num_in_memory += num_rows
        if self._pending_bytes >= self._block_bytes:
            self._pack_pending()
        while self._used_bytes > self.max_rows_bytes:
            if not self._blocks:
                self._pack_pending()
            self._push_out_oldest()

    @property
    def problems(self) -> dict[str, int]:
        """Why rows were not kept though there were bounds to keep them in, with how often."""
        with self._lock:
            return dict(self._problems)

    def statistics(self) -> RowStatistics:
        """Return where the rows are."""
        with self._lock:
            return RowStatistics(
                num_kept=self._num_in_memory + self._num_on_disk,
                num_on_disk=self._num_on_disk,
                num_not_kept=self._num_not_kept,
                memory_bytes=self._used_bytes,
                max_rows_bytes=self.max_rows_bytes,
                disk_bytes=self._disk_bytes,
                max_disk_bytes=self.max_disk_bytes,
                num_files=len(self._files),
                folder=self._folder.path,
            )

    def source(self, *, max_rows: int | None = None, first_forward_index: int = 0) -> RowSource:
        """Return the rows that are kept now, to be read block by block.

        Args:
            max_rows: the newest rows alone, at most so many.
            first_forward_index: leaves out the rows of earlier forwards.
        """
        snapshot = self._snapshot(first_forward_index)
        skip_rows = 0 if max_rows is None else max(0, snapshot.num_rows - max_rows)
        blocks = self._later_blocks(snapshot, skip_rows, first_forward_index)
        return RowSource(blocks, snapshot.layout, snapshot.num_rows - skip_rows)

    def blocks(self) -> Iterator[RowBlock]:
        """Yield the rows that are kept now, oldest first; files are read one record batch at a time.

        Files that are dropped while this runs are passed over, as if it had been called later.
        """
        return self._later_blocks(self._snapshot(), 0, 0)

    def _snapshot(self, first_forward_index: int = 0) -> "_Snapshot":
        with self._lock:
            files = [file for file in self._files if file.last_forward_index >= first_forward_index]
            blocks, pending, layout = list(self._blocks), list(self._pending), self._layout
        if pending:
            packed, _ = self._pack(pending)
            blocks += [] if packed is None else [packed]
            layout = layout.join(Layout.of(blocks[-1:]))
        num_rows = sum(file.num_rows for file in files) + sum(len(block) for block in blocks)
        return _Snapshot(files, blocks, layout, num_rows)

    def _later_blocks(self, snapshot: "_Snapshot", skip_rows: int, first_forward_index: int) -> Iterator[RowBlock]:
        for file in snapshot.files:
            if skip_rows >= file.num_rows:
                skip_rows -= file.num_rows
                continue
            for block in self._read(file):
                part = _later(block.slice(skip_rows, len(block)), first_forward_index)
                skip_rows = max(0, skip_rows - len(block))
                if len(part):
                    yield part
        for block in snapshot.blocks:
            part = _later(block.slice(skip_rows, len(block)), first_forward_index)
            skip_rows = max(0, skip_rows - len(block))
            if len(part):
                yield part

    def close(self) -> None:
        """Forget all rows and remove their files; again does nothing."""
        with self._lock:
            self._is_closed = True
            self._files.clear()
            self._blocks.clear()
            self._pending.clear()
            self._block_bytes_used = self._pending_bytes = self._disk_bytes = 0
            self._num_in_memory = self._num_on_disk = 0
        self._folder.remove()

    @property
    def _used_bytes(self) -> int:
        return self._block_bytes_used + self._pending_bytes

    def _pack_pending(self) -> None:
        pending = self._pending
        if not pending:
            return
        block, num_bad = self._pack(pending)
        # Forwards that came together may be more than a block holds.
        blocks = [] if block is None else list(cut(block, max(1, self._block_bytes)))
        with self._lock:
            if self._is_closed:
                return
            self._pending = []
            self._pending_bytes = 0
            self._num_in_memory -= num_bad
            self._num_not_kept += num_bad
            for each in blocks:
                self._layout = self._layout.join(Layout.of([each]))
                self._blocks.append(each)
                self._block_bytes_used += each.size_bytes

    def _pack(self, pending: Sequence[RoutingColumns]) -> tuple[RowBlock | None, int]:
        """Return a block of the forwards that can be packed, and the rows of those that cannot."""
        try:
            return pack(pending), 0
        except Exception as error:  # noqa: BLE001 - one bad forward must not end the rows of all others
            if len(pending) == 1:
                self._problem(f"rows of a forward could not be kept ({type(error).__name__}: {error})")
                return None, pending[0].num_decisions
        good = [columns for columns in pending if self._pack([columns])[0] is not None]
        num_bad = sum(columns.num_decisions for columns in pending) - sum(columns.num_decisions for columns in good)
        return (self._pack(good)[0] if good else None), num_bad

    def _push_out_oldest(self) -> None:
        """Move the oldest blocks to a file, or drop them where there can be none."""
        chosen: list[RowBlock] = []
        size = 0
        with self._lock:
            blocks = list(self._blocks)
        for block in blocks:
            chosen.append(block)
            size += block.size_bytes
            if size >= self._file_bytes and self._used_bytes - size <= self.max_rows_bytes:
                break
        if not chosen:
            return
        num_rows = sum(len(block) for block in chosen)
        file = self._write(chosen, num_rows) if self.max_disk_bytes else None
        dropped: list[_RowFile] = []
        with self._lock:
            is_closed = self._is_closed
            if not is_closed:
                for _ in chosen:
                    self._blocks.popleft()
                self._block_bytes_used -= size
                self._num_in_memory -= num_rows
                self._num_not_kept += num_rows if file is None else 0
                if file is not None:
                    self._files.append(file)
                    self._disk_bytes += file.size_bytes
                    self._num_on_disk += num_rows
                while self._disk_bytes > self.max_disk_bytes:
                    dropped.append(self._files.popleft())
                    self._forget(dropped[-1])
        if is_closed:
            # It was closed while the file was written.
            self._folder.remove()
        for oldest in dropped:
            oldest.path.unlink(missing_ok=True)

    def _forget(self, file: _RowFile) -> None:
        file.is_dropped = True
        self._disk_bytes -= file.size_bytes
        self._num_on_disk -= file.num_rows
        self._num_not_kept += file.num_rows

    def _write(self, blocks: Sequence[RowBlock], num_rows: int) -> _RowFile | None:
        try:
            path = self._folder.ensure() / f"rows-{next(self._file_numbers):08d}.arrow"
            write_rows(path, blocks, self._module_names, self._rank)
            last = max(int(block.tokens["forward_index"].max()) for block in blocks)
            return _RowFile(path, num_rows, path.stat().st_size, last)
        except ImportError:
            self._problem(
                "rows past max_rows_bytes are not kept: to put them into files needs pyarrow; "
                "run: pip install 'moe-debugger[pandas]'"
            )
        except Exception as error:  # noqa: BLE001 - whatever the disk does, the model and the counts go on
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            self._problem(
                f"rows past max_rows_bytes are not kept: no file could be written ({type(error).__name__}: {reason}); "
                "free the disk, or name another one with rows_dir"
            )
        return None

    def _read(self, file: _RowFile) -> Iterator[RowBlock]:
        try:
            yield from read_rows(file.path)
        except OSError as error:
            with self._lock:
                if file.is_dropped or self._is_closed:
                    return
                # Not ours to undo: a cleaner of temporary files, or a broken disk.
                self._files.remove(file)
                self._forget(file)
            self._problem(f"a file of rows could not be read again ({type(error).__name__}); its rows are lost")

    def _problem(self, text: str) -> None:
        with self._lock:
            if self._is_closed:
                return
            is_new = text not in self._problems
            if is_new and len(self._problems) >= 16:
                return
            self._problems[text] = self._problems.get(text, 0) + 1
        if is_new:
            _log.warning("rows_not_kept", reason=text)


def _later(block: RowBlock, first_forward_index: int) -> RowBlock:
    """Return the rows of `block` from a forward on; forwards are in order."""
    if not first_forward_index or not len(block):
        return block
    is_later = block.token_column("forward_index") >= first_forward_index
    return block.slice(len(block) if not is_later.any() else int(is_later.argmax()), len(block))
