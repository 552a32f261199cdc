"""Writes the parts of a recording, one after another, on whichever thread calls it.

A part is written under a name with a dot, and gets its own name when it is whole; then the manifest is replaced. What a
crash leaves is thus a manifest and the whole parts that it names, and at most one file that readers pass over.
"""

import contextlib
import hashlib
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from moe_debugger._row_blocks import Layout, RowBlock
from moe_debugger._row_packing import pack
from moe_debugger.capture import LayerInfo
from moe_debugger.errors import InvalidInputError
from moe_debugger.publish.batching import columns_size_bytes
from moe_debugger.recording import tables
from moe_debugger.recording.manifest import (
    MAX_PARTS,
    Health,
    LayerEntry,
    Manifest,
    PartEntry,
    SeriesNotes,
    write_manifest,
)
from moe_debugger.recording.probabilities import KEY, ProbabilitySums
from moe_debugger.training.series import SeriesPoint, SeriesTable
from moe_debugger.wire.codec import CountsColumns, RoutingColumns

__all__ = ["Ending", "Limits", "RecordingWriter", "make_folder"]

# Bounds of one row group: what is in memory as columns at once.
_GROUP_ROWS = 65_536
_GROUP_BYTES = 16 * 1024 * 1024
# Requests that are told apart exactly, some 100 bytes each.
_MAX_REQUESTS = 1_000_000
_MAX_PROBLEMS = 16
# The open part, layers old and new, series.
_OTHER_PARTS = 4
# Series are many small parts in a long recording; so many of them in a row, each below this size, become one.
_SMALL_PARTS = 16
_SMALL_BYTES = 4 * 1024 * 1024
# Points that wait for their part.
_MAX_POINTS = 65_536
_COMPRESSION = "zstd"


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of a recording and of its parts.

    Attributes:
        part_bytes, part_rows, part_seconds: a part ends when it has so much, or is so old; a crash loses the part that
            is open. It may pass the bytes and rows by a row group.
        max_bytes: the recording takes no more rows once its parts have so much; None = no bound.
    """

    part_bytes: int = 64 * 1024 * 1024
    part_rows: int = 16 * 1024 * 1024
    part_seconds: float = 30.0
    max_bytes: int | None = None

    def __post_init__(self) -> None:
        for name in ("part_bytes", "part_rows", "part_seconds"):
            if not getattr(self, name) > 0:
                raise InvalidInputError(f"{name} {getattr(self, name)}: expected more than 0")
        if self.max_bytes is not None and self.max_bytes < 0:
            raise InvalidInputError(f"max_bytes {self.max_bytes}: expected 0 or more, or None")


@dataclass(slots=True)
class Ending:
    """What is known of a session when its recording ends.

    Attributes:
        series: all points that `RecordingWriter.add_series` did not get, and the notes of all.
    """

    health: Health | None = None
    series: SeriesTable | None = None
    num_decisions_dropped: dict[str, int] = field(default_factory=dict)


def make_folder(path: str | os.PathLike[str]) -> Path:
    """Make the folder of a new recording, which this user alone can read, and return its absolute path.

    Raises:
        InvalidInputError: it is there with something in it, or is no folder, or its parent is not there.
    """
    folder = Path(path).absolute()
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        if folder.is_symlink() or not folder.is_dir():
            raise InvalidInputError(f"{folder} is no folder; give a new folder for the recording") from None
        if any(folder.iterdir()):
            raise InvalidInputError(
                f"{folder} is not empty, and nothing in it is overwritten; give a new folder for the recording"
            ) from None
    except OSError as error:
        raise InvalidInputError(
            f"the folder {folder} cannot be made: {error.strerror or error}; its parent must be there"
        ) from error
    return folder


class _HashingFile:
    """A new file that is written from its beginning to its end, with the SHA-256 of all that was written."""

    def __init__(self, path: Path) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
        self._file: BinaryIO = os.fdopen(os.open(path, flags, 0o600), "wb")
        self._digest = hashlib.sha256()
        self.size_bytes = 0

    def write(self, data: Any) -> int:
        """Write bytes."""
        self._digest.update(data)
        num_bytes = self._file.write(data)
        self.size_bytes += num_bytes
        return num_bytes

    def tell(self) -> int:
        """Return how much was written."""
        return self.size_bytes

    def flush(self) -> None:
        """Hand what was written to the system."""
        self._file.flush()

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._file.closed

    def readable(self) -> bool:
        """Return False."""
        return False

    def writable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return False."""
        return False

    def close(self) -> None:
        """Put the file on the disk."""
        if not self._file.closed:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()

    def discard(self) -> None:
        """Close it without a word."""
        with contextlib.suppress(OSError):
            self._file.close()

    def hexdigest(self) -> str:
        """Return the SHA-256 of what was written."""
        return self._digest.hexdigest()


class _OpenPart:
    """A Parquet file that is being written."""

    def __init__(self, folder: Path, path: str, kind: str, recording_id: str) -> None:
        import pyarrow.parquet as pq

        self.path = path
        self.kind = kind
        self.num_rows = 0
        self.ranges: dict[str, int] = {}
        self.layout: Layout | None = None
        self.probabilities = ProbabilitySums()
        self._target = folder / path
        self._pending = self._target.with_name(f".{self._target.name}.open")
        self._pending.parent.mkdir(mode=0o700, exist_ok=True)
        self._file = _HashingFile(self._pending)
        schema = tables.schema_of(kind).with_metadata({"moe_debugger.recording_id": recording_id})
        # Its annotation knows no list of columns.
        dictionaries: Any = tables.dictionary_columns(kind)
        try:
            self._writer = pq.ParquetWriter(self._file, schema, compression=_COMPRESSION, use_dictionary=dictionaries)
        except BaseException:
            self._file.discard()
            self._pending.unlink(missing_ok=True)
            raise

    @property
    def size_bytes(self) -> int:
        return self._file.size_bytes

    def write(self, batch: Any, ranges: Mapping[str, int], layout: Layout | None = None) -> None:
        """Write a batch as one row group; `ranges` are its `first_…` and `last_…`."""
        import pyarrow as pa

        self._writer.write_table(pa.Table.from_batches([batch]), row_group_size=max(1, batch.num_rows))
        self.num_rows += batch.num_rows
        if layout is not None:
            self.layout = layout if self.layout is None else self.layout.join(layout)
        for name, value in ranges.items():
            choose = min if name.startswith("first_") else max
            self.ranges[name] = choose(self.ranges.get(name, value), value)

    def finish(self) -> PartEntry:
        """Give the file its name, and return its entry."""
        if self.kind == "rows":
            self._writer.add_key_value_metadata({KEY: self.probabilities.to_json()})
        self._writer.close()
        self._file.close()
        os.replace(self._pending, self._target)
        return PartEntry.model_validate(
            {
                "path": self.path,
                "kind": self.kind,
                "num_rows": self.num_rows,
                "size_bytes": self._file.size_bytes,
                "sha256": self._file.hexdigest(),
                **self.ranges,
                "layout": None if self.layout is None else asdict(self.layout),
            }
        )

    def discard(self) -> None:
        """Remove what there is."""
        with contextlib.suppress(Exception):
            self._writer.close()
        self._file.discard()
        with contextlib.suppress(OSError):
            self._pending.unlink(missing_ok=True)


class RecordingWriter:
    """Writes what it is given; one thread at a time. Whatever the disk does, nothing here raises but `__init__`.

    Attributes:
        limits: of its parts from now on.

    Args:
        folder: empty, as `make_folder` returns it.
        manifest: of a recording that begins.
        limits: of its parts.
        layers: what is known of the layers now; called with each part.
        owners: expert-parallel ranks of each layer's experts.

    Raises:
        OSError: the disk refuses the first files.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        limits: Limits,
        layers: Callable[[], Sequence[LayerInfo]],
        owners: Mapping[int, Sequence[int]],
    ) -> None:
        self.folder = folder
        self.manifest = manifest
        self.limits = limits
        self._layers = layers
        self._owners = owners
        self._rank = manifest.topology.global_rank
        self._parts: list[PartEntry] = []
        self._open: _OpenPart | None = None
        self._pending: list[RoutingColumns] = []
        self._pending_counts: list[CountsColumns] = []
        self._pending_rows = self._pending_bytes = 0
        # When the oldest row came that is in no whole part.
        self._oldest_at: float | None = None
        self._num_batches = 0
        self._numbers: Counter[str] = Counter()
        self._size_bytes = 0
        self._not_written: Counter[str] = Counter()
        self._problems: list[str] = []
        self._requests: set[int] = set()
        self._is_exact = True
        self._known_layers: tuple[LayerInfo, ...] = ()
        self._points: list[SeriesPoint] = []
        self._points_since = 0.0
        self._num_points_lost = 0
        self._status = "recording"
        self._write_layers()
        self._save()

    @property
    def has_failed(self) -> bool:
        """Whether the disk refused, so that no more rows are written."""
        return self._status == "failed"

    def add(self, parts: Sequence[RoutingColumns | CountsColumns]) -> None:
        """Take what was captured together."""
        rows = [each for each in parts if isinstance(each, RoutingColumns)]
        counts = [each for each in parts if isinstance(each, CountsColumns)]
        num_rows = sum(each.num_decisions for each in rows) + sum(len(each.layers) for each in counts)
        if self.has_failed:
            self.count_not_written("write_failed", num_rows)
            return
        reason = self._full_by()
        if reason is not None:
            self.count_not_written(reason, num_rows)
            return
        if self._oldest_at is None and num_rows:
            self._oldest_at = time.monotonic()
        self._pending += rows
        self._pending_counts += counts
        self._pending_rows += num_rows
        self._pending_bytes += sum(columns_size_bytes(each) for each in parts)
        if self._pending_rows >= _GROUP_ROWS or self._pending_bytes >= _GROUP_BYTES:
            self._guarded(self._write_and_cut)

    def add_series(self, points: Sequence[SeriesPoint]) -> None:
        """Take points of training series; one of the same step, name and layer that comes later replaces it."""
        if self.has_failed:
            self._num_points_lost += len(points)
            return
        if not self._points:
            self._points_since = time.monotonic()
        self._points += points
        if len(self._points) >= _MAX_POINTS:
            self._guarded(self._write_series)

    def note(self, **fields: Any) -> None:
        """Set fields of the manifest; it is written with the next part."""
        self.manifest = self.manifest.model_copy(update=fields)

    def tick(self) -> None:
        """End the part where the oldest of its rows, or of the points that wait, are old enough."""
        now, seconds = time.monotonic(), self.limits.part_seconds
        if self._oldest_at is not None and now - self._oldest_at >= seconds:
            self.end_part()
        elif self._points and now - self._points_since >= seconds and not self.has_failed:
            self._guarded(self._write_series)

    @property
    def size_bytes(self) -> int:
        """Bytes of the parts, whole and open."""
        return self._size_bytes + (0 if self._open is None else self._open.size_bytes)

    @property
    def pending_bytes(self) -> int:
        """Bytes of the rows in memory, which are in no file."""
        return self._pending_bytes

    @property
    def num_not_written(self) -> dict[str, int]:
        """Rows that are in no part, by reason, until now."""
        return dict(self._not_written)

    @property
    def num_rows(self) -> int:
        """Rows, or sums, that were taken and are in a part, or on their way there."""
        whole = sum(each.num_rows for each in self._parts if each.kind in ("rows", "counts"))
        return whole + (0 if self._open is None else self._open.num_rows) + self._pending_rows

    def write_pending(self) -> None:
        """Write the rows that are in memory as a row group, however small."""
        if not self.has_failed:
            self._guarded(self._write_and_cut)

    def end_part(self) -> None:
        """Write what waits, and end the open part."""
        if not self.has_failed:
            self._guarded(self._end_part)

    def count_not_written(self, reason: str, num_rows: int) -> None:
        """Count rows that are in no part; the manifest says them."""
        if num_rows:
            self._not_written[reason] += num_rows

    def finish(self, ending: Ending) -> None:
        """Write what waits, the series and the last manifest."""
        if not self.has_failed:
            self._guarded(lambda: self._end(ending))
        if self.has_failed:
            # Where there is room for a manifest there may be none for a part.
            with contextlib.suppress(OSError, ValueError):
                self.manifest = self._at_end(ending)
                self._save()

    def _end(self, ending: Ending) -> None:
        self._end_part()
        self._write_layers()
        self._write_series()
        if ending.series is not None and len(ending.series):
            self._append_series(ending.series)
        self.manifest = self._at_end(ending)
        self._status = "finished"
        self._save()

    def _at_end(self, ending: Ending) -> Manifest:
        series = ending.series
        notes = None
        if series is not None:
            texts = {text[:1000]: number for text, number in series.notes.items()}
            notes = SeriesNotes(notes=texts, num_not_kept=series.num_not_kept + self._num_points_lost)
        elif self._num_points_lost:
            notes = SeriesNotes(num_not_kept=self._num_points_lost)
        return self.manifest.model_copy(
            update={
                "capture_health": ending.health,
                "num_decisions_dropped": dict(ending.num_decisions_dropped),
                "series": notes,
                "ended_at_unix_ns": time.time_ns(),
            }
        )

    def _full_by(self) -> str | None:
        """Return which bound the recording has reached."""
        if self.limits.max_bytes is not None and self.size_bytes >= self.limits.max_bytes:
            return "max_bytes"
        return "max_parts" if len(self._parts) >= MAX_PARTS - _OTHER_PARTS else None

    def _guarded(self, write: Callable[[], None]) -> None:
        try:
            write()
        except Exception as error:  # noqa: BLE001 - whatever the disk does, the model and the capture go on
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        self._problems.append(f"the recording could not be written ({type(error).__name__}: {reason})"[:1000])
        self._status = "failed"
        lost = self._pending_rows
        if self._open is not None:
            lost += self._open.num_rows
            self._open.discard()
            self._open = None
        self.count_not_written("write_failed", lost)
        self._forget_pending()
        self._num_points_lost += len(self._points)
        self._points = []
        self._oldest_at = None
        with contextlib.suppress(OSError, ValueError):
            self._save()

    def _forget_pending(self) -> None:
        self._pending, self._pending_counts = [], []
        self._pending_rows = self._pending_bytes = 0

    def _write_pending(self) -> None:
        if self._pending:
            self._write_rows(self._pending)
        if self._pending_counts:
            self._write_counts(self._pending_counts)
        self._forget_pending()

    def _write_and_cut(self) -> None:
        self._write_pending()
        part = self._open
        if part is not None and (part.size_bytes >= self.limits.part_bytes or part.num_rows >= self.limits.part_rows):
            self._end_part()

    def _write_rows(self, pending: list[RoutingColumns]) -> None:
        block, pending = self._pack(pending)
        if block is None:
            return
        captured_at = {
            int(forward): each.captured_at_unix_ns for each in pending for forward in set(each.forward_index.tolist())
        }
        names = {info.layer_index: info.module_name for info in self._layers()}
        layout = Layout.of([block])
        group_rows = max(1, min(_GROUP_ROWS, _GROUP_BYTES // layout.row_bytes))
        for part in block.slices(group_rows):
            step, forward = part.token_column("step"), part.token_column("forward_index")
            ranges = {
                "first_step": int(step.min()),
                "last_step": int(step.max()),
                "first_forward_index": int(forward.min()),
                "last_forward_index": int(forward.max()),
            }
            batch = tables.block_to_batch(part, captured_at, names, self._rank, self.manifest.source_id)
            self._part("rows").write(batch, ranges, layout)
            # Not before they were written: what is counted twice after an error would be worse.
            self._pending_rows -= len(part)
        if len(block):
            self._part("rows").probabilities.fold(pending)
        used = np.unique(block.tokens["request_index"]) if block.request_ids else ()
        self._see_requests([block.request_ids[int(index)] for index in used])

    def _pack(self, pending: list[RoutingColumns]) -> tuple[RowBlock | None, list[RoutingColumns]]:
        """Return the rows as a block, and the columns that are in it: those that do not fit each other are not."""
        try:
            block = pack(pending)
            tables.check_values({**block.tokens, **block.rows}, self._layers())
            return block, pending
        except Exception as error:  # noqa: BLE001 - one bad forward must not end the recording of all others
            if len(pending) == 1:
                num_rows = pending[0].num_decisions
                self.count_not_written("invalid", num_rows)
                self._pending_rows -= num_rows
                if len(self._problems) < _MAX_PROBLEMS:
                    text = f"rows of a forward could not be recorded ({type(error).__name__}: {error})"
                    self._problems.append(text[:1000])
                return None, []
        good = [columns for columns in pending if self._pack([columns])[0] is not None]
        return (pack(good), good) if good else (None, [])

    def _write_counts(self, pending: list[CountsColumns]) -> None:
        ranges = {
            "first_step": min(each.first_step for each in pending),
            "last_step": max(each.last_step for each in pending),
        }
        batch = tables.counts_to_batch(pending, self._num_batches, self._rank, self.manifest.source_id)
        self._part("counts").write(batch, ranges)
        self._num_batches += len(pending)
        self._pending_rows -= batch.num_rows

    def _see_requests(self, names: Sequence[str]) -> None:
        # A digest of 8 bytes takes less than the name; of a million, two share one once in 37 million.
        digests = (hashlib.blake2b(name.encode(), digest_size=8).digest() for name in names if name)
        self._requests.update(int.from_bytes(digest, "little") for digest in digests)
        if len(self._requests) > _MAX_REQUESTS:
            self._is_exact = False
            while len(self._requests) > _MAX_REQUESTS:
                self._requests.pop()

    def _part(self, kind: str) -> _OpenPart:
        if self._open is not None and self._open.kind != kind:
            self._close_part()
        if self._open is None:
            number = self._numbers[kind]
            self._numbers[kind] += 1
            self._open = _OpenPart(self.folder, f"{kind}/part-{number:08d}.parquet", kind, self.manifest.recording_id)
        return self._open

    def _end_part(self) -> None:
        self._write_pending()
        if self._points:
            self._write_series()
        self._close_part()

    def _write_series(self) -> None:
        points, self._points = self._points, []
        if points:
            self._append_series(SeriesTable(points))

    def _append_series(self, series: SeriesTable) -> None:
        """Write points as a part of their own, in place of a run of small ones before it where there are many."""
        run: list[PartEntry] = []
        for entry in reversed([each for each in self._parts if each.kind == "series"]):
            if entry.size_bytes >= _SMALL_BYTES:
                break
            run.insert(0, entry)
        if len(run) < _SMALL_PARTS - 1:
            run = []
        else:
            before = [self._read_series(entry) for entry in run]
            series = tables.merge_series([*before, series], {}, 0)
        entry = self._whole_part("series", tables.series_to_batch(series))
        self._parts = [*(each for each in self._parts if each not in run), entry]
        self._save()
        for each in run:
            (self.folder / each.path).unlink(missing_ok=True)

    def _read_series(self, entry: PartEntry) -> SeriesTable:
        import pyarrow.parquet as pq

        batches = pq.read_table(self.folder / entry.path).combine_chunks().to_batches()
        return tables.merge_series([tables.batch_to_series(batch, {}, 0) for batch in batches], {}, 0)

    def _close_part(self) -> None:
        part = self._open
        if part is None:
            self._oldest_at = None
            return
        entry = part.finish()
        self._open = None
        self._oldest_at = time.monotonic() if self._pending_rows else None
        self._parts.append(entry)
        self._size_bytes += entry.size_bytes
        self._write_layers()
        self._save()

    def _write_layers(self) -> None:
        layers = tuple(self._layers())
        if layers != self._known_layers:
            self._write_table("layers", tables.layers_to_batch(layers, self._owners))
            self._known_layers = layers

    def _write_table(self, kind: str, batch: Any) -> None:
        """Write a table that is one file, in place of the one before; the older goes once no manifest names it."""
        entry = self._whole_part(kind, batch)
        older = [each for each in self._parts if each.kind == kind]
        self._parts = [*(each for each in self._parts if each.kind != kind), entry]
        if older:
            self._save()
            for each in older:
                (self.folder / each.path).unlink(missing_ok=True)

    def _whole_part(self, kind: str, batch: Any) -> PartEntry:
        """Write a part that is one batch, and return its entry."""
        part = _OpenPart(self.folder, f"{kind}-{self._numbers[kind]:08d}.parquet", kind, self.manifest.recording_id)
        self._numbers[kind] += 1
        try:
            part.write(batch, {})
            return part.finish()
        except BaseException:
            part.discard()
            raise

    def _save(self) -> None:
        rows = [each for each in self._parts if each.kind == "rows"]
        steps = [each for each in self._parts if each.first_step is not None and each.last_step is not None]
        self.manifest = Manifest.model_validate(
            {
                **self.manifest.to_dict(),
                "status": self._status,
                "num_rows": sum(each.num_rows for each in rows),
                "num_requests": len(self._requests),
                "is_num_requests_exact": self._is_exact,
                "first_step": min((each.first_step for each in steps if each.first_step is not None), default=None),
                "last_step": max((each.last_step for each in steps if each.last_step is not None), default=None),
                "num_rows_not_written": dict(self._not_written),
                "problems": self._problems,
                "layers": [
                    LayerEntry.of(info, self._owners.get(info.layer_index, ())).model_dump()
                    for info in self._known_layers
                ],
                "parts": [each.model_dump() for each in self._parts],
            }
        )
        write_manifest(self.folder, self.manifest)
