"""A session's messages as files: a recording for each source, in one folder. No NATS, no SQL; one thread at a time.

What is written is exactly what was taken here: duplicates are passed over, and what cannot be written is counted by
reason. A source whose manifest has not come yet waits for it.
"""

import json
import math
import re
import shutil
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import structlog

from moe_analyzer.aggregate import POISON
from moe_analyzer.sequences import SequenceSet
from moe_debugger.capture import LayerInfo
from moe_debugger.capture_health import CaptureHealth, HealthCheck
from moe_debugger.errors import WireFormatError
from moe_debugger.publish.account import reason_name
from moe_debugger.recording.manifest import (
    GroupManifest,
    Health,
    Manifest,
    ModelIdentity,
    Topology,
    write_manifest,
)
from moe_debugger.recording.writer import Ending, Limits, RecordingWriter, make_folder
from moe_debugger.training.series import NO_INDEX, SeriesPoint, SeriesTable
from moe_debugger.v1 import routing_pb2 as pb
from moe_debugger.wire.codec import check_format_version, decode_batch, decode_counts
from moe_debugger.wire.ids import new_id

__all__ = ["BookStatistics", "RecordingBook"]

_log = structlog.get_logger()

# More sources than any session has; each costs a folder and an open file.
_MAX_SOURCES = 1024
# Messages of sources whose manifest has not come.
_MAX_WAITING_BYTES = 64 << 20
# Rows of all sources in memory, which are in no file yet.
_MAX_PENDING_BYTES = 64 << 20
_MAX_PROBLEMS = 16
_SHA256 = re.compile(r"\A[0-9a-f]{64}\Z")
# So long parts are so short; then as long as everywhere.
_YOUNG_S = 600.0
_YOUNG_PART_S = 5.0
_LEVELS = {
    pb.CAPTURE_LEVEL_COUNTS: "counts",
    pb.CAPTURE_LEVEL_ROUTES: "routes",
    pb.CAPTURE_LEVEL_ROUTES_TOKENS: "routes+tokens",
    pb.CAPTURE_LEVEL_FULL: "full",
}


@dataclass(frozen=True, slots=True)
class BookStatistics:
    """What a recording holds now.

    Attributes:
        num_rows: rows, or sums, that are in a file or on their way there.
        num_missing_messages: of sources, between the first and the last that came.
        num_decisions_dropped: by the sources, since their first message in the recording.
        not_written: rows that came and are in no file, by reason.
    """

    num_rows: int = 0
    size_bytes: int = 0
    num_sources: int = 0
    num_missing_messages: int = 0
    num_decisions_dropped: int = 0
    not_written: Mapping[str, int] = field(default_factory=dict)
    problems: tuple[str, ...] = ()
    has_failed: bool = False

    def not_written_json(self) -> str:
        """Return `not_written` as the catalogue keeps it."""
        return json.dumps({reason: number for reason, number in sorted(self.not_written.items()) if number})


class _Source:
    """What is known of one source since the recording began."""

    def __init__(self) -> None:
        self.writer: RecordingWriter | None = None
        self.num_experts: dict[int, int] = {}
        self.num_identity_experts: dict[int, int] = {}
        self.waiting: list[pb.SourceMessage] = []
        self.status = pb.SourceStatus()
        self.counters = pb.SourceCounters()
        self._before: dict[int, int] | None = None
        self._sequences = SequenceSet()
        self._first_sequence = 0

    def saw(self, sequence: int) -> bool:
        """Note a message; False where it came before."""
        if not self._sequences.add(sequence):
            return False
        self._first_sequence = min(self._first_sequence or sequence, sequence)
        return True

    @property
    def num_missing(self) -> int:
        """Sequences that are missing between the first and the last that came."""
        return max(0, self._sequences.num_missing - max(0, self._first_sequence - 1))

    def count(self, message: pb.SourceMessage, counters: pb.SourceCounters) -> None:
        """Take over cumulative counters; the first ones that come are where the recording begins."""
        if self._before is None:
            is_first_of_all = message.sequence == 1 or self._first_sequence == 1
            self._before = {} if is_first_of_all else {one.reason: one.num_decisions for one in counters.dropped}
        if counters.num_produced >= self.counters.num_produced:
            self.counters.CopyFrom(counters)

    def num_dropped(self) -> dict[str, int]:
        """Return the decisions that the source dropped since the recording began, by reason."""
        before = self._before or {}
        since = {one.reason: one.num_decisions - before.get(one.reason, 0) for one in self.counters.dropped}
        return {reason_name(reason): number for reason, number in since.items() if number > 0}

    def ending(self, num_points_dropped: int) -> Ending:
        """Return what is known at the end of the recording."""
        dropped = self.num_dropped()
        lost = {name: number for name, number in dropped.items() if name != "sampled_out"}
        health = CaptureHealth(
            self.counters.num_produced,
            lost,
            self.num_missing,
            tuple(self.status.problems),
            tuple(HealthCheck.from_proto(check) for check in self.status.checks),
        )
        return Ending(Health.of(health), SeriesTable([], num_not_kept=num_points_dropped), dropped)


class RecordingBook:
    """Writes one recording.

    Args:
        folder: is not there yet; its parent is.
        group: of a recording that begins.
        max_bytes: no rows are taken once the files have so much.
        min_free_bytes: nor while the disk has less than this.

    Raises:
        InvalidInputError: the folder cannot be made.
        OSError: the disk refuses the first file.
    """

    def __init__(
        self,
        folder: Path,
        group: GroupManifest,
        *,
        max_bytes: int,
        min_free_bytes: int = 0,
        limits: Limits | None = None,
    ) -> None:
        self.folder = make_folder(folder)
        (self.folder / "sources").mkdir(mode=0o700)
        self.group = group
        self._max_bytes = max_bytes
        self._min_free_bytes = min_free_bytes
        # Small parts at first: a crash loses less of a short recording, and someone watches the size grow.
        self._limits = limits or Limits(part_seconds=_YOUNG_PART_S)
        self._grows_old_at = time.monotonic() + _YOUNG_S if limits is None else math.inf
        self._sources: dict[str, _Source] = {}
        self._waiting_bytes = 0
        self._lost: Counter[str] = Counter()
        self._problems: list[str] = []
        self._is_disk_full = False
        write_manifest(self.folder, group)

    def take(self, source_id: str, payload: bytes) -> None:
        """Take a message of a source as it stands in the stream."""
        try:
            message = pb.SourceMessage.FromString(payload)
            check_format_version(message.format_version, "SourceMessage")
            if message.source_id != source_id or not message.sequence:
                raise WireFormatError(f"message {message.sequence} of {message.source_id!r} on {source_id}'s subject")
        except Exception as error:  # noqa: BLE001 - protobuf has errors of its own; bytes end no recording
            self._lost["invalid"] += 1
            self.note(f"a message of source {source_id} cannot be read ({type(error).__name__}: {error})")
            return
        if source_id not in self._sources and len(self._sources) >= _MAX_SOURCES:
            self._lost["max_sources"] += _num_rows(message)
            return
        source = self._sources.setdefault(source_id, _Source())
        if not source.saw(message.sequence):
            return
        if message.WhichOneof("payload") == "manifest":
            self.add_manifest(source_id, message.manifest)
        elif source.writer is None:
            self._wait(source, message, len(payload))
        else:
            self._write(source, source.writer, message)

    def unknown_sources(self) -> list[str]:
        """Return the sources whose manifest has not come."""
        return [source_id for source_id, source in self._sources.items() if source.writer is None]

    def add_manifest(self, source_id: str, manifest: pb.SourceManifest) -> None:
        """Take a source's description, which comes from the stream or from the catalogue, and what waited for it."""
        source = self._sources.setdefault(source_id, _Source())
        if source.writer is not None:
            return
        source.num_experts = {one.layer_index: one.num_experts for one in manifest.layers}
        source.num_identity_experts = {one.layer_index: one.num_identity_experts for one in manifest.layers}
        try:
            source.writer = self._writer(source_id, manifest)
        except Exception as error:  # noqa: BLE001 - a disk, or a manifest that fits no recording: the others go on
            self.note(f"source {source_id} cannot be recorded ({type(error).__name__}: {error})")
            self._give_up(source, "write_failed")
            del self._sources[source_id]
            return
        self._save(members=[*self.group.members, f"sources/{source_id}"])
        waiting, source.waiting = source.waiting, []
        for message in waiting:
            self._waiting_bytes -= message.ByteSize()
            self._write(source, source.writer, message)

    def _writer(self, source_id: str, manifest: pb.SourceManifest) -> RecordingWriter:
        layers = tuple(_layer(one) for one in manifest.layers if one.num_experts)
        owners = {one.layer_index: tuple(one.expert_parallel_ranks) for one in manifest.layers}
        return RecordingWriter(
            make_folder(self.folder / "sources" / source_id),
            _manifest(self.group, source_id, manifest),
            self._limits,
            lambda: layers,
            owners,
        )

    def _wait(self, source: _Source, message: pb.SourceMessage, size: int) -> None:
        if self._waiting_bytes + size > _MAX_WAITING_BYTES:
            self._lost["no_manifest"] += _num_rows(message)
            return
        source.waiting.append(message)
        self._waiting_bytes += size

    def _give_up(self, source: _Source, reason: str) -> None:
        self._lost[reason] += sum(_num_rows(message) for message in source.waiting)
        self._waiting_bytes -= sum(message.ByteSize() for message in source.waiting)
        source.waiting = []

    def _write(self, source: _Source, writer: RecordingWriter, message: pb.SourceMessage) -> None:
        kind = message.WhichOneof("payload")
        if kind == "status":
            source.count(message, message.status.counters)
            writer.add_series([_point(one) for one in message.status.series_points])
            source.status.CopyFrom(message.status)
            source.status.ClearField("series_points")
        elif kind == "goodbye":
            source.count(message, message.goodbye.counters)
        elif kind in ("batch", "counts"):
            source.count(message, message.batch.counters if kind == "batch" else message.counts.counters)
            reason = self._full_by()
            if reason is not None:
                writer.count_not_written(reason, _num_rows(message))
                return
            try:
                decode = (source.num_experts, source.num_identity_experts)
                writer.add(
                    [
                        decode_batch(message.batch, *decode)
                        if kind == "batch"
                        else decode_counts(message.counts, *decode)
                    ]
                )
            except POISON as error:
                writer.count_not_written("invalid", _num_rows(message))
                self.note(f"a message of source {message.source_id} does not fit its layers ({error})")
            if sum(one.writer.pending_bytes for one in self._sources.values() if one.writer) > _MAX_PENDING_BYTES:
                largest = max(self._writers(), key=lambda one: one.pending_bytes)
                largest.write_pending()

    def _writers(self) -> list[RecordingWriter]:
        return [source.writer for source in self._sources.values() if source.writer is not None]

    def _full_by(self) -> str | None:
        if self._is_disk_full:
            return "disk_full"
        return "max_bytes" if self._size_bytes() >= self._max_bytes else None

    def _size_bytes(self) -> int:
        return sum(writer.size_bytes for writer in self._writers())

    def tick(self) -> None:
        """End parts that are old enough, and look at the disk; once a second or so."""
        try:
            self._is_disk_full = shutil.disk_usage(self.folder).free < self._min_free_bytes
        except OSError as error:
            self.note(f"the disk cannot be asked for its room ({error.strerror or error})")
        if time.monotonic() >= self._grows_old_at:
            # A long recording must not be a folder of tiny files.
            self._grows_old_at = math.inf
            self._limits = Limits()
            for writer in self._writers():
                writer.limits = self._limits
        for source in self._sources.values():
            if source.writer is not None:
                self._note_gaps(source, source.writer)
                source.writer.tick()

    @staticmethod
    def _note_gaps(source: _Source, writer: RecordingWriter) -> None:
        writer.note(num_missing_messages=source.num_missing, num_decisions_dropped=source.num_dropped())

    def statistics(self) -> BookStatistics:
        """Return what is written and what is lost until now."""
        not_written = Counter(self._lost)
        problems = list(self._problems)
        for writer in self._writers():
            not_written.update(writer.num_not_written)
            problems += writer.manifest.problems
        return BookStatistics(
            num_rows=sum(writer.num_rows for writer in self._writers()),
            size_bytes=self._size_bytes(),
            num_sources=len(self._writers()),
            num_missing_messages=sum(source.num_missing for source in self._sources.values()),
            num_decisions_dropped=sum(sum(source.num_dropped().values()) for source in self._sources.values()),
            not_written=dict(not_written),
            problems=tuple(dict.fromkeys(problems)),
            has_failed=any(writer.has_failed for writer in self._writers()),
        )

    def finish(self, end_reason: str = "") -> BookStatistics:
        """Write what waits, and end the recording of every source."""
        for source in self._sources.values():
            if source.writer is None:
                self._give_up(source, "no_manifest")
                continue
            self._note_gaps(source, source.writer)
            source.writer.finish(source.ending(int(source.status.num_series_points_dropped)))
        has_failed = any(writer.has_failed for writer in self._writers())
        self._save(
            status="failed" if has_failed else "finished", end_reason=end_reason, ended_at_unix_ns=time.time_ns()
        )
        return self.statistics()

    def _save(self, **fields: object) -> None:
        """Write the manifest of the whole; a disk that refuses is said by the sources' own."""
        update = {**fields, "num_rows_not_written": dict(self._lost), "problems": list(self._problems)}
        self.group = self.group.model_copy(update=update)
        try:
            write_manifest(self.folder, self.group)
        except OSError as error:
            self.note(f"the manifest cannot be written ({error.strerror or error})")
            _log.warning("recording_manifest_not_written", folder=str(self.folder), error=str(error))

    def note(self, text: str) -> None:
        """Say in the manifest what went wrong."""
        if len(self._problems) < _MAX_PROBLEMS and text not in self._problems:
            self._problems.append(text[:1000])


def _num_rows(message: pb.SourceMessage) -> int:
    """Return the rows, or the sums, of a message."""
    if message.WhichOneof("payload") == "counts":
        return len(message.counts.layers)
    return sum(layer.num_rows for layer in message.batch.layers)


def _point(message: pb.SeriesPoint) -> SeriesPoint:
    layer_index = message.layer_index if message.HasField("layer_index") else NO_INDEX
    values = np.array(message.values, np.float64)
    return SeriesPoint(message.step, message.name, layer_index, message.is_per_expert, values)


def _layer(one: pb.LayerDescription) -> LayerInfo:
    return LayerInfo(
        layer_index=one.layer_index,
        model_layer_index=one.model_layer_index,
        module_name=one.module_name,
        stack=one.stack or "decoder",
        num_experts=one.num_experts,
        top_k=one.top_k,
        num_shared_experts=one.num_shared_experts,
        num_identity_experts=one.num_identity_experts,
        scoring_function=one.scoring_function,
        weight_meaning=one.weight_meaning,
        unavailable_reason=one.unavailable_reason,
        site="attention" if one.site == "attention" else "mlp",
    )


def _manifest(group: GroupManifest, source_id: str, source: pb.SourceManifest) -> Manifest:
    coordinates = source.coordinates
    names = set(Topology.model_fields) & {one.name for one in coordinates.DESCRIPTOR.fields}
    owners = [rank for layer in source.layers for rank in layer.expert_parallel_ranks]
    domains = {pb.STEP_DOMAIN_GLOBAL: "global", pb.STEP_DOMAIN_SOURCE: "source"}
    return Manifest.model_validate(
        {
            "recording_id": new_id(),
            "group_id": group.recording_id,
            "source_id": source_id,
            "step_domain": domains.get(source.step_domain, ""),
            "started_at_unix_ns": time.time_ns(),
            "session_name": group.session_name,
            "session_id": group.session_id,
            "level": _LEVELS.get(source.level, "routes"),
            "sampling_rate": min(1.0, max(0.0, source.sampling_rate)),
            "model": ModelIdentity(
                name=source.model_name[:4096],
                model_type=source.model_type[:4096],
                class_name=source.model_class_name[:4096],
                config_sha256=source.model_fingerprint if _SHA256.match(source.model_fingerprint) else None,
                versions=dict(source.versions),
            ),
            "topology": Topology(
                **{
                    **{name: getattr(coordinates, name) for name in names},
                    "world_size": max(1, coordinates.world_size),
                    "expert_parallel_size": 1 + max(owners, default=0),
                    "recording_rank": coordinates.replica_of_rank
                    if coordinates.HasField("replica_of_rank")
                    else coordinates.global_rank,
                }
            ),
        }
    )
