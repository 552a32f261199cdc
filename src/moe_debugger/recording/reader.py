"""Reads recordings: the columns of a session without its model, and what is whole of one that is damaged."""

import copy
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from moe_debugger._counted import layer_shape
from moe_debugger._decisions import Decisions
from moe_debugger._layers import Layers
from moe_debugger._row_blocks import Layout, RowBlock, RowSource
from moe_debugger._row_groups import available_bytes, regroup
from moe_debugger.analysis import Analysis, RoutingState, Thresholds, finish
from moe_debugger.analysis.analyze import fold_decisions
from moe_debugger.capture import LayerInfo
from moe_debugger.capture_health import CaptureHealth
from moe_debugger.errors import InvalidInputError, RecordingError
from moe_debugger.recording import tables
from moe_debugger.recording.integrity import check_content, check_size, open_part, unlisted_files
from moe_debugger.recording.manifest import GroupManifest, Manifest, PartEntry, read_any_manifest
from moe_debugger.recording.probabilities import KEY, ProbabilitySums
from moe_debugger.training.series import SeriesTable
from moe_debugger.wire.codec import CountsColumns

if TYPE_CHECKING:
    from moe_debugger.query import QueryResult

__all__ = ["Recording", "ReplayBatch", "Verification", "open_recording"]

# A writer's row groups are far below; a file that says more would fill the memory.
_MAX_GROUP_ROWS = 4 * 1024 * 1024
_MAX_GROUP_BYTES = 512 * 1024 * 1024
# Rows that are folded together.
_FOLD_ROWS = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Verification:
    """What `Recording.verify` found.

    Attributes:
        num_parts: how many the manifest names; problems: one line for each that is not whole, and for foreign ones.
        num_rows: rows of the whole parts; num_rows_lost: those that the manifest says are in the others.
    """

    num_parts: int
    num_rows: int
    num_rows_lost: int
    problems: tuple[str, ...]

    @property
    def is_whole(self) -> bool:
        """True where every part is what was written, and nothing else is there."""
        return not self.problems


@dataclass(frozen=True, slots=True)
class ReplayBatch:
    """Rows that were captured together.

    Attributes:
        offset_s: how long after the first rows of the recording they were captured.
        source_id: of the process that captured them; empty where it was in no fleet.
    """

    offset_s: float
    decisions: Decisions
    source_id: str = ""


class Recording:
    """A recording that was opened; made by `open_recording`. Nothing of it is kept in memory between calls.

    Attributes:
        path: its folder.
        manifest: what is known of it.
    """

    def __init__(self, path: Path, manifest: Manifest, *, skips_damaged: bool) -> None:
        self.path = path
        self.manifest = manifest
        self._skips_damaged = skips_damaged
        self._problems: dict[str, str] = {}
        self._checked: set[str] = set()
        for entry in manifest.parts:
            with self._skipping(entry):
                check_size(path, entry)
        for name in unlisted_files(path, manifest):
            text = f"part {name} is foreign: the manifest does not name it"
            # What a crash may leave between a part and the manifest that names it.
            if manifest.is_finished and not skips_damaged:
                raise RecordingError(f"{text}; open_recording(..., damaged='skip') passes over it", part=name)
            self._problems[name] = text
        # Why nothing is known of the layers.
        self._lost_layers: RecordingError | None = None
        self._layers = Layers()
        self._layers = self._read_layers()

    @property
    def problems(self) -> tuple[str, ...]:
        """What was found not to be whole until now; `verify` looks at everything."""
        return tuple(self._problems.values())

    @property
    def is_whole(self) -> bool:
        """True where the recording was stopped in order, lost no rows, and nothing was found damaged until now."""
        return self.manifest.is_finished and not self._problems and not self.manifest.num_rows_not_written

    @property
    def num_rows_lost(self) -> int:
        """Rows, or sums, of the parts that were found not to be whole until now, as the manifest says them."""
        return sum(
            entry.num_rows
            for entry in self.manifest.parts
            if entry.kind in ("rows", "counts") and entry.path in self._problems
        )

    def layers(self) -> Layers:
        """Return what was known of each MoE layer when the last part was written.

        Raises:
            RecordingError: the part is damaged, and the manifest, of before version 1.2, has no copy of it.
        """
        if self._lost_layers is not None:
            raise RecordingError(str(self._lost_layers), part=self._lost_layers.part)
        return Layers(self._layers)

    def expert_owners(self) -> dict[int, tuple[int, ...]]:
        """Return the expert-parallel rank of each expert by layer index; only of layers whose experts are spread.

        Raises:
            RecordingError: the part is damaged.
        """
        kept = {entry.layer_index: tuple(entry.expert_parallel_ranks) for entry in self.manifest.layers}
        owners = {index: ranks for index, ranks in kept.items() if ranks}
        for entry in self._entries("layers"):
            for number, batch in self._batches(entry):
                with self._parsing(entry, number):
                    columns = batch.select(["layer_index", "expert_parallel_ranks"]).to_pydict()
                    pairs = zip(columns["layer_index"], columns["expert_parallel_ranks"], strict=True)
                    owners |= {index: tuple(ranks) for index, ranks in pairs if ranks}
        return owners

    def decisions(self, *, max_rows: int | None = None) -> Decisions:
        """Return all rows in the columns of `Session.decisions`; at level "counts" there are none.

        Args:
            max_rows: give the first rows alone, at most so many.

        Raises:
            RecordingError: a part is damaged.
            InvalidInputError: `max_rows` is negative, or the rows do not fit the machine's free memory.
        """
        if max_rows is not None and max_rows < 0:
            raise InvalidInputError(f"max_rows {max_rows}: expected 0 or more")
        layout = Layout(top_k=1)
        entries = self.whole_parts("rows")
        for entry in entries:
            layout = layout.join(_layout(entry))
        num_rows = sum(entry.num_rows for entry in entries)
        wanted = num_rows if max_rows is None else min(num_rows, max_rows)
        free, needed = available_bytes(), wanted * layout.row_bytes
        if free is not None and needed > free:
            raise InvalidInputError(
                f"decisions() of {wanted:,} rows needs about {needed / 1e9:.1f} GB, and the machine has "
                f"{free / 1e9:.1f} GB free; read them part by part with iter_decisions()"
            )
        return self._decisions(RowSource(_first(self._blocks(), wanted), layout, wanted))

    def iter_decisions(self, batch_rows: int = 65_536) -> Iterator[Decisions]:
        """Yield the rows in order, whole forwards each time; memory stays flat however many there are.

        Args:
            batch_rows: at most so many rows, but at least one forward.

        Raises:
            RecordingError: a part is damaged; not before the rows of the parts before it.
            InvalidInputError: `batch_rows` is below 1.
        """
        if batch_rows < 1:
            raise InvalidInputError(f"batch_rows {batch_rows}: expected 1 or more")
        return (self._decisions(group) for group in regroup(self._blocks(), batch_rows))

    def iter_counts(self) -> Iterator[CountsColumns]:
        """Yield the sums that were captured at level "counts", in order; at other levels there are none.

        Raises:
            RecordingError: a part is damaged.
        """
        for entry in self._entries("counts"):
            # A part ends between two of them.
            yield from tables.batch_to_counts(batch for _, batch in self._batches(entry))

    def state(self) -> RoutingState:
        """Return all rows and sums, folded: equal to `Session.state` where the session began with the recording.

        The rows are read part by part. The router's mean probabilities are those of the whole parts.

        Raises:
            RecordingError: a part is damaged, or does not fit the layers.
        """
        layers = self.layers()
        state = RoutingState.empty(layer_shape(info) for info in layers)
        for columns in self.iter_counts():
            try:
                state.fold_counts(columns)
            except InvalidInputError as error:
                raise RecordingError(f"the sums in counts/ do not fit the layers: {error}", part="counts") from error
        sizes = _sizes(layers)
        for rows in self.iter_decisions(_FOLD_ROWS):
            for columns_of_stack in _by_stack(rows):
                state = state.merge(fold_decisions(columns_of_stack, **sizes))
        self._add_probabilities(state)
        return state

    def _add_probabilities(self, state: RoutingState) -> None:
        """Add the router's probabilities of the parts whose rows are whole."""
        for probabilities in self._probabilities():
            try:
                probabilities.add_to(state)
            except ValueError as error:
                raise RecordingError(f"the rows do not fit the layers: {error}", part="rows") from error

    def series(self) -> SeriesTable:
        """Return the training series, up to the last that was written; empty where there are none.

        Raises:
            RecordingError: a part is damaged.
        """
        notes = self.manifest.series
        kept = ({}, 0) if notes is None else (notes.notes, notes.num_not_kept)
        read: list[SeriesTable] = []
        for entry in self._entries("series"):
            for number, batch in self._batches(entry):
                with self._parsing(entry, number):
                    read.append(tables.batch_to_series(batch, {}, 0))
        return tables.merge_series(read, *kept)

    def capture_health(self) -> CaptureHealth | None:
        """Return the capture's health at the end of the recording; None where it was not stopped in order."""
        health = self.manifest.capture_health
        return None if health is None else health.to_capture_health()

    def analyze(self, *, thresholds: Thresholds | None = None, baseline: RoutingState | None = None) -> Analysis:
        """Return metrics and findings of the rows, or of the sums where there are no rows.

        Raises:
            RecordingError: a part is damaged.
        """
        return finish(self.state(), thresholds=thresholds, baseline=baseline, health=self.capture_health())

    def query(self, text: str, *, tokenizer: Any = None) -> "QueryResult":
        """Return what a query finds in the recording; docs/query.md describes the language, which only reads.

        Args:
            text: such as "tokens where layer = 3 and expert = 5 limit 20".
            tokenizer: for the texts of tokens: of transformers, or `LoadedModel.tokenizer`.

        Raises:
            QueryError: the query has a fault; the error has the place.
            QueryCostError: it would read more than a query may.
            RecordingError: a part is damaged.
        """
        from moe_debugger.query.engine import run_query
        from moe_debugger.query.local import RecordingSource

        return run_query(text, RecordingSource(self, tokenizer))

    def replay(self, speed: float = math.inf, *, sleep: Callable[[float], None] = time.sleep) -> Iterator[ReplayBatch]:
        """Yield the rows as they were captured, waiting between them as the session did.

        Args:
            speed: 1 = as it was, 10 = ten times as fast, infinite = without waiting.
            sleep: waits for seconds.

        Raises:
            RecordingError: a part is damaged.
            InvalidInputError: `speed` is not above 0, or the recording has no rows (level "counts").
        """
        if not speed > 0:
            raise InvalidInputError(f"speed {speed}: expected more than 0; 1 is as it was, math.inf without waiting")
        if self.manifest.level == "counts":
            raise InvalidInputError('this recording has no rows to replay: it was made at level "counts"')
        return self._replay(speed, sleep)

    def _replay(self, speed: float, sleep: Callable[[float], None]) -> Iterator[ReplayBatch]:
        started, first = time.monotonic(), None
        for captured_at, blocks, source_id in self._captures():
            first = captured_at if first is None else first
            # The wall clock may have been set back.
            offset_s = max(0, captured_at - first) / 1e9
            wait_s = offset_s / speed - (time.monotonic() - started)
            if math.isfinite(speed) and wait_s > 0:
                sleep(wait_s)
            yield ReplayBatch(offset_s, self._decisions(blocks), source_id)

    def _captures(self) -> Iterator[tuple[int, list[RowBlock], str]]:
        """Yield the rows that were captured together, with their time and their source."""
        return ((time, blocks, self.manifest.source_id) for time, blocks in _together(self._timed_blocks()))

    def verify(self) -> Verification:
        """Read every part wholly, and return what is not as it was written; raises nothing for what is damaged."""
        found = copy.copy(self)
        found._skips_damaged, found._checked, found._problems = True, set(), {}
        lost = num_rows = 0
        for entry in self.manifest.parts:
            if entry.kind == "rows":
                read = sum(len(timed.block) for timed in found._timed_blocks_of(entry))
            else:
                read = sum(batch.num_rows for _, batch in found._batches(entry))
            is_whole = entry.path not in found._problems
            if entry.kind in ("rows", "counts"):
                num_rows, lost = num_rows + read * is_whole, lost + entry.num_rows * (not is_whole)
        for name in unlisted_files(self.path, self.manifest):
            found._problems[name] = f"part {name} is foreign: the manifest does not name it"
        return Verification(len(self.manifest.parts), num_rows, lost, found.problems)

    def __repr__(self) -> str:
        return f"<Recording {str(self.path)!r} of {self._summary()}>"

    def _summary(self) -> str:
        manifest, num_damaged = self.manifest, len(self.problems)
        what = f"{manifest.num_rows:,} rows at {len(self._layers)} MoE layers" if manifest.num_rows else manifest.level
        damage = f", {num_damaged} parts not whole" if num_damaged else ""
        return f"{manifest.model.name}: {what}, {manifest.status}{damage}"

    def _decisions(self, rows: RowSource | Sequence[RowBlock]) -> Decisions:
        return Decisions(rows, self._layers, rank=self.manifest.topology.global_rank)

    def _read_layers(self) -> Layers:
        entries = self._entries("layers")
        for entry in entries:
            for number, batch in self._batches(entry):
                with self._parsing(entry, number):
                    return Layers(tables.batch_to_layers(batch))
        if self.manifest.layers:
            return Layers(entry.to_info() for entry in self.manifest.layers)
        if entries:
            problem = self._problems.get(entries[0].path, f"part {entries[0].path} is empty")
            self._lost_layers = RecordingError(
                f"{problem}; a recording of format {self.manifest.format_version} has no other copy of its layers, so "
                "nothing can be said of them: take the file from another copy of the recording. decisions() gives the "
                "rows all the same",
                part=entries[0].path,
            )
        return Layers()

    def whole_parts(self, kind: str) -> list[PartEntry]:
        """Return the parts of a table, without those that are to be skipped, for which each is read once.

        Args:
            kind: "rows", "counts", "layers" or "series".

        Raises:
            RecordingError: the layout of one cannot be, and the recording was not opened with ``damaged="skip"``.
        """
        found = []
        for entry in self._entries(kind):
            if not self._skips_damaged:
                # Other damage raises when it is read.
                self._check_layout(entry)
                found.append(entry)
                continue
            with self._reader(entry) as reader:
                if reader is not None:
                    found.append(entry)
        return found

    def _entries(self, kind: str) -> list[PartEntry]:
        return [entry for entry in self.manifest.parts if entry.kind == kind]

    def _blocks(self) -> Iterator[RowBlock]:
        return (timed.block for timed in self._timed_blocks())

    def _timed_blocks(self) -> Iterator[tables.TimedBlock]:
        for entry in self._entries("rows"):
            yield from self._timed_blocks_of(entry)

    def _timed_blocks_of(self, entry: PartEntry) -> Iterator[tables.TimedBlock]:
        for number, batch in self._batches(entry):
            timed = None
            with self._parsing(entry, number):
                read = tables.batch_to_block(batch)
                if Layout.of([read.block]).join(_layout(entry)) != _layout(entry):
                    raise ValueError("its columns are not those that the manifest says")
                self._check_values({**read.block.tokens, **read.block.rows})
                timed = read
            if timed is None:
                return  # what comes after it is not to be trusted more
            if len(timed.block):
                yield timed

    def _check_values(self, rows: Mapping[str, Any]) -> None:
        """Check columns of rows, by name; see `tables.check_values`."""
        tables.check_values(rows, None if self._lost_layers is not None else self._layers)

    def _probabilities(self) -> Iterator[ProbabilitySums]:
        """Yield the sums of probabilities of the parts whose rows are whole."""
        for entry in self._entries("rows"):
            sums = ProbabilitySums()
            with self._reader(entry) as reader:
                if reader is None or entry.path in self._problems:
                    continue
                text = (reader.metadata.metadata or {}).get(KEY.encode(), b"[]")
                with self._parsing(entry, 0):
                    sums.add_json(text)
            yield sums

    def _batches(self, entry: PartEntry) -> Iterator[tuple[int, Any]]:
        """Yield the row groups of a part as record batches, with their numbers."""
        with self._reader(entry) as reader:
            if reader is None:
                return
            for number in range(reader.metadata.num_row_groups):
                batch = None
                with self._parsing(entry, number):
                    table = reader.read_row_group(number).combine_chunks()
                    batches = table.to_batches()
                    batch = batches[0] if len(batches) == 1 else None
                    if batch is None and table.num_rows:
                        raise ValueError("it is not one batch")
                if batch is not None:
                    yield number, batch

    @contextmanager
    def _reader(self, entry: PartEntry) -> Iterator[Any]:
        """Open a part that is whole; None where it is not and such parts are skipped."""
        import pyarrow.parquet as pq

        file = reader = None
        with self._skipping(entry):
            self._check_layout(entry)
            file = open_part(self.path, entry)
            try:
                if entry.path not in self._checked:
                    check_content(file, entry)
                    self._checked.add(entry.path)
                reader = _parquet(pq, file, entry)
            except BaseException:
                file.close()
                raise
        try:
            yield reader
        finally:
            if reader is not None:
                reader.close(force=True)
            if file is not None:
                file.close()

    def _check_layout(self, entry: PartEntry) -> None:
        """Check that a part's lists are no wider than its layers allow, before memory is taken for them."""
        infos = self._layers
        if entry.layout is None or not infos:
            return
        widest = max(info.num_experts + info.num_identity_experts for info in infos)
        if entry.layout.top_k > max(1, widest) or entry.layout.num_logits > widest:
            raise RecordingError(
                f"part {entry.path} has a layout of {entry.layout.top_k} slots and {entry.layout.num_logits} logits, "
                f"its layers have at most {widest} experts",
                part=entry.path,
            )

    @contextmanager
    def _skipping(self, entry: PartEntry) -> Iterator[None]:
        """Note what is wrong with a part and go on, where that was asked for."""
        try:
            yield
        except RecordingError as error:
            if not self._skips_damaged:
                raise
            self._problems[entry.path] = str(error).split("; open_recording", 1)[0]

    @contextmanager
    def _parsing(self, entry: PartEntry, number: int) -> Iterator[None]:
        """Name the part in errors of what is inside it."""
        with self._skipping(entry):
            try:
                yield
            except (ValueError, TypeError, KeyError, OverflowError, OSError, IndexError, NotImplementedError) as error:
                raise RecordingError(
                    f"part {entry.path} cannot be read at row group {number}: {error}", part=entry.path
                ) from error


def open_recording(
    path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], *, damaged: Literal["raise", "skip"] = "raise"
) -> Recording:
    """Open a recording; its parts are checked when they are first read.

    Args:
        path: the folder that `Session.record` was given, or that a fleet wrote; or several of one session, such as
            those of its ranks, to be read as one (see `join_recordings`).
        damaged: what to do with parts that are missing, truncated, changed or foreign: "raise", or "skip" them, read
            what is whole and say the others in `Recording.problems`.

    Returns:
        A `JoinedRecording` where several processes were recorded.

    Raises:
        RecordingError: there is no recording, its manifest is damaged, or, with "raise", a part has not its size or is
            foreign; the text names the part.
        UnsupportedFormatError: written by a newer major version.
        InvalidInputError: several folders that cannot be joined.
        DependencyMissingError: pyarrow is not installed.
    """
    # It is made of recordings.
    from moe_debugger.recording.joined import join_recordings, open_group

    if damaged not in ("raise", "skip"):
        raise InvalidInputError(f"damaged {damaged!r}: expected 'raise' or 'skip'")
    tables.require_pyarrow()
    if not isinstance(path, str | os.PathLike):
        return join_recordings([open_recording(each, damaged=damaged) for each in path])
    folder = Path(path).absolute()
    manifest = read_any_manifest(folder)
    if isinstance(manifest, GroupManifest):
        return open_group(folder, manifest, skips_damaged=damaged == "skip")
    return Recording(folder, manifest, skips_damaged=damaged == "skip")


def _parquet(pq: Any, file: Any, entry: PartEntry) -> Any:
    try:
        reader = pq.ParquetFile(file)
        metadata = reader.metadata
        groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    except Exception as error:  # pyarrow's own kinds of error are many
        raise RecordingError(f"part {entry.path} is no Parquet file: {error}", part=entry.path) from error
    if metadata.num_rows != entry.num_rows:
        raise RecordingError(
            f"part {entry.path} has {metadata.num_rows} rows, the manifest says {entry.num_rows}", part=entry.path
        )
    if any(group.num_rows > _MAX_GROUP_ROWS or group.total_byte_size > _MAX_GROUP_BYTES for group in groups):
        raise RecordingError(f"part {entry.path} has a row group that is larger than any of ours", part=entry.path)
    tables.check_columns(reader.schema_arrow, entry.kind, entry.path)
    return reader


def _by_stack(rows: Decisions) -> Iterator[Mapping[str, Any]]:
    """Yield the rows of each stack of layers: each has tokens of its own, which count by themselves."""
    stacks = sorted({info.stack for info in rows.layers.values()})
    if len(stacks) < 2:
        yield rows
        return
    for stack in stacks:
        indices = [index for index, info in rows.layers.items() if info.stack == stack]
        chosen = np.isin(rows.layer_index, indices)
        yield {name: column[chosen] for name, column in rows.items()}


def _sizes(layers: Sequence[LayerInfo]) -> dict[str, Any]:
    """Return what `fold_decisions` has to know of the layers."""
    known = {info.layer_index: info for info in layers}
    indices = range(max(known, default=-1) + 1)
    return {
        "num_experts": [known[i].num_experts if i in known else 1 for i in indices],
        "top_k": [max(1, known[i].top_k) if i in known else 1 for i in indices],
        "num_identity_experts": [known[i].num_identity_experts if i in known else 0 for i in indices],
    }


def _layout(entry: PartEntry) -> Layout:
    return Layout(top_k=1) if entry.layout is None else Layout(**entry.layout.model_dump())


def _first(blocks: Iterator[RowBlock], num_rows: int) -> Iterator[RowBlock]:
    for block in blocks:
        if num_rows <= 0:
            return
        part = block.slice(0, min(len(block), num_rows))
        num_rows -= len(part)
        yield part


def _together(timed: Iterator[tables.TimedBlock]) -> Iterator[tuple[int, list[RowBlock]]]:
    """Yield the rows that have the same time and stand together."""
    current: int | None = None
    blocks: list[RowBlock] = []
    for each in timed:
        times = each.captured_at
        edges = [0, *(np.flatnonzero(times[1:] != times[:-1]) + 1).tolist(), len(times)]
        for start, stop in pairwise(edges):
            if current is not None and int(times[start]) != current:
                yield current, blocks
                blocks = []
            current = int(times[start])
            blocks.append(each.block.slice(start, stop))
    if current is not None:
        yield current, blocks
