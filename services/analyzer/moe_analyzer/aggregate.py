"""What is known of one session in one partition, and how a message changes it. Pure: no NATS, no Redis, no clock.

Rows are folded once, into the state of the broker's second in which they were stored. A flush merges these seconds into
the whole session and into the roll-ups of 1, 10 and 60 seconds, and tells readers the same sums as its delta.
"""

import time
import zlib
from dataclasses import dataclass, field

from moe_analyzer.blob import pack, unpack
from moe_analyzer.requests import RequestBook, RequestEntry
from moe_analyzer.sequences import SequenceSet
from moe_analyzer.series import SeriesHistory
from moe_analyzer.step_history import StepHistory, without_history
from moe_debugger.analysis.state import LayerShape, RoutingState
from moe_debugger.errors import InvalidInputError, WireFormatError
from moe_debugger.v1 import routing_pb2 as pb
from moe_debugger.wire.codec import check_format_version, decode_batch, decode_counts

__all__ = [
    "POISON",
    "RESOLUTIONS_S",
    "Limits",
    "PartHead",
    "SessionPart",
    "SessionWrites",
    "SourceState",
    "rollup_field",
]

RESOLUTIONS_S = (1, 10, 60)
# Roll-ups of each resolution that are kept: two minutes, twenty minutes, twelve hours.
_NUM_KEPT = {1: 120, 10: 120, 60: 720}
# Batches that came before their source's manifest wait, up to this much per session and partition.
_WAITING_BUDGET_BYTES = 8 << 20
_NS = 1_000_000_000
# What a message that no analyzer can use raises; everything else is our trouble and not the message's.
POISON = (WireFormatError, InvalidInputError)


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of what is kept of one session in one partition."""

    max_requests: int = 2000
    rows_budget_bytes: int = 32 << 20
    series_budget_bytes: int = 8 << 20


@dataclass(slots=True)
class SourceState:
    """One source: its description, its account, and which of its messages were seen."""

    source_id: str
    sequences: SequenceSet = field(default_factory=SequenceSet)
    manifest: pb.SourceManifest | None = None
    status: pb.SourceStatus = field(default_factory=pb.SourceStatus)
    counters: pb.SourceCounters = field(default_factory=pb.SourceCounters)
    num_counted: int = 0
    num_late: int = 0
    last_step: int = 0
    last_seen_ns: int = 0
    said_goodbye: bool = False

    @property
    def step_source(self) -> int:
        """Key of the clock that counts this source's steps: 0 where they are global."""
        is_global = self.manifest is not None and self.manifest.step_domain == pb.STEP_DOMAIN_GLOBAL
        return 0 if is_global else zlib.crc32(self.source_id.encode()) + 1

    @property
    def num_experts(self) -> dict[int, int]:
        """E of each layer of the manifest."""
        return {} if self.manifest is None else {one.layer_index: one.num_experts for one in self.manifest.layers}

    @property
    def num_identity_experts(self) -> dict[int, int]:
        """Z of each layer of the manifest."""
        if self.manifest is None:
            return {}
        return {one.layer_index: one.num_identity_experts for one in self.manifest.layers}

    @property
    def stacks(self) -> dict[int, str]:
        """The stack ("decoder", "encoder"...) of each layer of the manifest."""
        return {} if self.manifest is None else {one.layer_index: one.stack for one in self.manifest.layers}

    def encode(self) -> bytes:
        """Return the source as a Redis value."""
        return pack(
            {
                "kind": "source",
                "sequences": self.sequences.to_json(),
                "has_manifest": self.manifest is not None,
                "counted": self.num_counted,
                "late": self.num_late,
                "last_step": self.last_step,
                "last_seen": self.last_seen_ns,
                "goodbye": self.said_goodbye,
            },
            [
                b"" if self.manifest is None else self.manifest.SerializeToString(),
                self.status.SerializeToString(),
                self.counters.SerializeToString(),
            ],
        )

    @classmethod
    def decode(cls, source_id: str, data: bytes) -> "SourceState":
        """Return the source that `encode` gave."""
        header, (manifest, status, counters) = unpack(data)
        return cls(
            source_id,
            SequenceSet.from_json(header["sequences"]),
            pb.SourceManifest.FromString(manifest) if header["has_manifest"] else None,
            pb.SourceStatus.FromString(status),
            pb.SourceCounters.FromString(counters),
            header["counted"],
            header["late"],
            header["last_step"],
            header["last_seen"],
            header["goodbye"],
        )


@dataclass(slots=True)
class PartHead:
    """The small part of a session's state that every flush writes."""

    flush: int = 0
    newest_ns: int = 0
    newest_data_ns: int = 0
    num_late: int = 0
    num_dead_lettered: int = 0

    def encode(self, totals: RoutingState) -> bytes:
        """Return head and totals as a Redis value."""
        return pack(
            {
                "kind": "head",
                "flush": self.flush,
                "newest": self.newest_ns,
                "newest_data": self.newest_data_ns,
                "late": self.num_late,
                "dead": self.num_dead_lettered,
            },
            [without_history(totals).to_bytes()],
        )

    @classmethod
    def decode(cls, data: bytes) -> "tuple[PartHead, RoutingState]":
        """Return the head and the totals that `encode` gave."""
        header, (totals,) = unpack(data)
        head = cls(header["flush"], header["newest"], header["newest_data"], header["late"], header["dead"])
        return head, RoutingState.from_bytes(totals)


@dataclass(slots=True)
class SessionWrites:
    """Changed hash fields of a session (None deletes one), and what changed for those who watch."""

    state: dict[str, bytes | None]
    sources: dict[str, bytes | None]
    requests: dict[str, bytes | None]
    rows: dict[str, bytes | None]
    delta: RoutingState
    flush: int
    overview_changed: bool
    summary: bytes


def rollup_field(resolution_s: int, start_s: int) -> str:
    """Return the hash field of one roll-up."""
    return f"r{resolution_s}:{start_s}"


class SessionPart:
    """One session's part in one partition."""

    def __init__(self, session_id: str, limits: Limits) -> None:
        self.session_id = session_id
        self.head = PartHead()
        self.totals = RoutingState({})
        self.sources: dict[str, SourceState] = {}
        self.rollups: dict[int, dict[int, RoutingState]] = {resolution: {} for resolution in RESOLUTIONS_S}
        self.requests = RequestBook(max_requests=limits.max_requests, rows_budget_bytes=limits.rows_budget_bytes)
        self.series = SeriesHistory(limits.series_budget_bytes)
        self._steps = StepHistory()
        self.is_dirty = False
        # Batches that had waited for their manifest and then did not fit it: (source, payload, stored at, reason).
        self.rejected: list[tuple[str, bytes, int, str]] = []
        self._shapes: dict[int, LayerShape] = {}
        self._waiting: dict[str, dict[int, tuple[int, bytes]]] = {}
        self._waiting_bytes = 0
        self._pending: dict[int, RoutingState] = {}
        self._dirty_sources: set[str] = set()
        self._field_writes: dict[str, bytes | None] = {}
        self._overview_changed = False

    # -- loading ---------------------------------------------------------------------------------------------------

    def load(self, state: dict[str, bytes], sources: dict[str, bytes], requests: dict[str, bytes]) -> None:
        """Take over what was stored."""
        for name, data in state.items():
            kind, _, rest = name.partition(":")
            if name == "head":
                self.head, self.totals = PartHead.decode(data)
            elif kind == "wait":
                source_id, _, sequence = rest.partition(":")
                header, (payload,) = unpack(data)
                self._waiting.setdefault(source_id, {})[int(sequence)] = (header["stored"], payload)
                self._waiting_bytes += len(payload)
            elif kind in ("r1", "r10", "r60"):
                self.rollups[int(kind[1:])][int(rest)] = RoutingState.from_bytes(data)
        self.series.load(state)
        self._steps.load(state, self.totals)
        self._shapes = {shape.layer_index: shape for shape in self.totals.shapes}
        self.sources = {source_id: SourceState.decode(source_id, data) for source_id, data in sources.items()}
        for source in self.sources.values():
            if source.manifest is not None:
                self._shapes.update(_shapes(source.manifest))
        self.requests.load([RequestEntry.decode_summary(name, data) for name, data in requests.items()])

    # -- messages --------------------------------------------------------------------------------------------------

    def source(self, source_id: str) -> SourceState:
        """Return a source, made at its first message."""
        return self.sources.setdefault(source_id, SourceState(source_id))

    def is_duplicate(self, source_id: str, sequence: int) -> bool:
        """Return whether this message was seen before."""
        source = self.sources.get(source_id)
        return source is not None and sequence in source.sequences

    def apply(self, message: pb.SourceMessage, stored_ns: int, *, is_late: bool = False) -> None:
        """Take in a message that is not a duplicate.

        Raises:
            WireFormatError, InvalidInputError: nothing can be done with it; the text is the reason. Mark it with
                `reject`.
        """
        check_format_version(message.format_version, "SourceMessage")
        if message.sequence == 0:
            raise WireFormatError("SourceMessage has sequence 0; the first one is 1")
        kind = message.WhichOneof("payload")
        if kind is None:
            raise WireFormatError("SourceMessage has no payload that this program knows")
        source = self.source(message.source_id)
        if kind == "manifest":
            self.adopt_manifest(source, message.manifest)
        elif kind == "status":
            if not is_late:
                self.series.add(source.source_id, message.status.series_points)
            source.status.CopyFrom(message.status)
            source.status.ClearField("series_points")
            self._set_counters(source, message.status.counters)
            source.last_step = max(source.last_step, message.status.last_step)
            self._overview_changed = True
        elif kind == "goodbye":
            self._set_counters(source, message.goodbye.counters)
            source.said_goodbye = True
            self._overview_changed = True
        elif is_late:
            num_late = num_decisions(message)
            source.num_late += num_late
            self.head.num_late += num_late
            self._overview_changed = True
        elif source.manifest is None:
            self._wait(source, message, stored_ns)
        else:
            self._count(source, message, stored_ns)
        self._saw(source, message.sequence, stored_ns)
        if source.manifest is not None and message.source_id in self._waiting:
            self._count_waiting(source)

    def reject(self, source_id: str, sequence: int, stored_ns: int) -> None:
        """Account for a message of a known source that went to the dead letters."""
        self.head.num_dead_lettered += 1
        self._overview_changed = True
        self.is_dirty = True
        if sequence > 0:
            self._saw(self.source(source_id), sequence, stored_ns)

    def _saw(self, source: SourceState, sequence: int, stored_ns: int) -> None:
        source.sequences.add(sequence)
        source.last_seen_ns = max(source.last_seen_ns, stored_ns)
        self.head.newest_ns = max(self.head.newest_ns, stored_ns)
        self._dirty_sources.add(source.source_id)
        self.is_dirty = True

    def adopt_manifest(self, source: SourceState, manifest: pb.SourceManifest) -> None:
        """Take over a source's description.

        Raises:
            WireFormatError, InvalidInputError: it is of another session or model, or describes impossible layers.
        """
        check_format_version(manifest.format_version, "SourceManifest")
        if (manifest.source_id, manifest.session_id) != (source.source_id, self.session_id):
            raise WireFormatError(
                f"SourceManifest is of source {manifest.source_id!r} in session {manifest.session_id!r}, "
                f"its subject of {source.source_id!r} in {self.session_id!r}"
            )
        shapes = _shapes(manifest)
        for index, shape in shapes.items():
            known = self._shapes.get(index, shape)
            if known != shape:
                raise WireFormatError(f"layer {index} is {shape}, in this session it is {known}: another model")
        self._shapes.update(shapes)
        source.manifest = manifest
        self._dirty_sources.add(source.source_id)
        self._overview_changed = True

    @staticmethod
    def _set_counters(source: SourceState, counters: pb.SourceCounters) -> None:
        # Cumulative, so of two that came in the wrong order the larger is the newer.
        if counters.num_produced >= source.counters.num_produced:
            source.counters.CopyFrom(counters)

    def _wait(self, source: SourceState, message: pb.SourceMessage, stored_ns: int) -> None:
        payload = message.SerializeToString()
        if self._waiting_bytes + len(payload) > _WAITING_BUDGET_BYTES:
            raise WireFormatError(f"no manifest of source {source.source_id} came, and too many batches wait for it")
        self._waiting.setdefault(source.source_id, {})[message.sequence] = (stored_ns, payload)
        self._waiting_bytes += len(payload)
        name = f"wait:{source.source_id}:{message.sequence}"
        self._field_writes[name] = pack({"kind": "waiting", "stored": stored_ns}, [payload])

    def _count_waiting(self, source: SourceState) -> None:
        for sequence, (stored_ns, payload) in sorted(self._waiting.pop(source.source_id).items()):
            self._field_writes[f"wait:{source.source_id}:{sequence}"] = None
            self._waiting_bytes -= len(payload)
            try:
                self._count(source, pb.SourceMessage.FromString(payload), stored_ns)
            except POISON as error:
                self.head.num_dead_lettered += 1
                self.rejected.append((source.source_id, payload, stored_ns, str(error)))

    def _count(self, source: SourceState, message: pb.SourceMessage, stored_ns: int) -> None:
        second = stored_ns // _NS
        pending = self._pending.get(second)
        if pending is None:
            pending = RoutingState.empty(self._shapes.values())
        elif len(pending.layers) < len(self._shapes):
            pending = pending.merge(RoutingState.empty(self._shapes.values()))
        if message.WhichOneof("payload") == "batch":
            columns = decode_batch(message.batch, source.num_experts, source.num_identity_experts)
            pending.fold(columns, step_source=source.step_source)
            if self.requests.add(columns, stored_ns, source.stacks):
                self._overview_changed = True
            self._set_counters(source, message.batch.counters)
            if columns.num_tokens:
                source.last_step = max(source.last_step, int(columns.step.max()))
        else:
            sums = decode_counts(message.counts, source.num_experts, source.num_identity_experts)
            pending.fold_counts(sums, step_source=source.step_source)
            self._set_counters(source, message.counts.counters)
            source.last_step = max(source.last_step, message.counts.last_step)
        self._pending[second] = pending
        self.head.newest_data_ns = max(self.head.newest_data_ns, stored_ns)
        source.num_counted += num_decisions(message)
        self.is_dirty = True

    # -- flush -----------------------------------------------------------------------------------------------------

    def take_writes(self) -> SessionWrites:
        """Merge what is pending and return all changed fields since the last call."""
        # The first flush number is a time, so that a state that was lost and made anew still leads on.
        self.head.flush = self.head.flush + 1 if self.head.flush else time.time_ns() // 1_000_000
        writes, self._field_writes = self._field_writes, {}
        delta = RoutingState({})
        touched: set[tuple[int, int]] = set()
        for second, state in sorted(self._pending.items()):
            delta = delta.merge(state)
            small = state.without_history()
            for resolution, kept in self.rollups.items():
                start = second - second % resolution
                kept[start] = kept[start].merge(small) if start in kept else small
                touched.add((resolution, start))
        self._pending = {}
        self.totals = self.totals.merge(delta)
        for resolution, start in touched:
            writes[rollup_field(resolution, start)] = self.rollups[resolution][start].to_bytes()
        for resolution, kept in self.rollups.items():
            newest = max(kept, default=0)
            for start in [one for one in kept if one <= newest - _NUM_KEPT[resolution] * resolution]:
                del kept[start]
                writes[rollup_field(resolution, start)] = None
        sources: dict[str, bytes | None] = {one: self.sources[one].encode() for one in self._dirty_sources}
        writes["head"] = self.head.encode(self.totals)
        writes |= self.series.take_writes()
        writes |= self._steps.take_writes(self.totals, delta)
        requests, rows = self.requests.take_writes()
        result = SessionWrites(
            writes, sources, requests, rows, delta, self.head.flush, self._overview_changed, self._summary()
        )
        self._dirty_sources, self._overview_changed, self.is_dirty = set(), False, False
        return result

    def _summary(self) -> bytes:
        """What a list of sessions needs."""
        sources = [[source.last_seen_ns, source.said_goodbye] for source in self.sources.values()]
        return pack({"kind": "summary", "newest": self.head.newest_ns, "sources": sources})


def _shapes(manifest: pb.SourceManifest) -> dict[int, LayerShape]:
    shapes: dict[int, LayerShape] = {}
    for layer in manifest.layers:
        # `unavailable_reason` is about a router's statistics: such a layer has routes like any other.
        if not layer.num_experts:
            continue
        if layer.layer_index in shapes:
            raise WireFormatError(f"SourceManifest describes layer {layer.layer_index} twice")
        shapes[layer.layer_index] = LayerShape(
            layer.layer_index, layer.num_experts, layer.top_k, layer.num_identity_experts
        )
    return shapes


def num_decisions(message: pb.SourceMessage) -> int:
    """Return the decisions in a batch or counts message, padded rows included."""
    if message.WhichOneof("payload") == "batch":
        return sum(layer.num_rows for layer in message.batch.layers)
    return sum(layer.num_tokens for layer in message.counts.layers)
