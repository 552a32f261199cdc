"""The bounded history of a session's training series in one partition. Pure: no Redis, no clock.

Points lie in chunks, one Redis field each, so that a flush writes only the newest: those of the whole model and of
layers in chunks of kind "scalars", those with a value for each expert in chunks of kind "experts". Each kind has half
of the budget, so that the many values of experts never push out the curve of the loss.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from moe_analyzer.blob import pack, unpack
from moe_debugger.errors import WireFormatError
from moe_debugger.v1 import routing_pb2 as routing
from moe_debugger.v1 import session_pb2 as pb

__all__ = ["INDEX_FIELD", "SeriesHistory", "StoredPoint", "chunk_fields", "read_chunk", "series_messages"]

# The id of a point's source, and the point.
StoredPoint = tuple[str, routing.SeriesPoint]

INDEX_FIELD = "series:index"
_PREFIX = "series:"
_KINDS = ("scalars", "experts")
# A chunk is written again with each flush until it is this large.
_CHUNK_BYTES = 64 << 10
_MAX_NAME_BYTES = 256
# Largest step of a point: what int64 holds.
_MAX_STEP = 2**63
# Values of one answer, 32 MB; beyond it each series gets fewer points.
_MAX_VALUES = 4 << 20


@dataclass(slots=True)
class _Chain:
    """The chunks of one kind: their sizes by number, and the points of the newest."""

    sizes: dict[int, int] = field(default_factory=dict)
    counts: dict[int, int] = field(default_factory=dict)
    newest: list[tuple[str, bytes]] = field(default_factory=list)

    @property
    def number(self) -> int:
        return max(self.sizes, default=0)

    @property
    def size_bytes(self) -> int:
        return sum(self.sizes.values())


class SeriesHistory:
    """Takes the points of statuses and gives the fields to write.

    Args:
        budget_bytes: bound on all chunks; the oldest go first.
    """

    def __init__(self, budget_bytes: int) -> None:
        self.num_not_kept = 0
        self._budget_bytes = budget_bytes
        self._chains = {kind: _Chain() for kind in _KINDS}
        self._dirty: set[str] = set()
        self._closed: dict[str, bytes] = {}
        self._deleted: list[str] = []

    def load(self, state: Mapping[str, bytes]) -> None:
        """Take over what was stored."""
        data = state.get(INDEX_FIELD)
        if data is None:
            return
        header, _ = unpack(data)
        self.num_not_kept = header["not_kept"]
        for kind, chunks in header["chunks"].items():
            chain = self._chains[kind] = _Chain(
                {number: size for number, size, _ in chunks}, {number: count for number, _, count in chunks}
            )
            newest = state.get(_field(kind, chain.number)) if chunks else None
            if newest is not None:
                chain.newest = list(_unpack_points(newest))

    def add(self, source_id: str, points: Iterable[routing.SeriesPoint]) -> None:
        """Take in the points of a source.

        Raises:
            WireFormatError: a point has no such form; none of them is taken.
        """
        checked = list(points)
        for point in checked:
            _check(point)
        for point in checked:
            kind = _KINDS[point.is_per_expert]
            chain, payload = self._chains[kind], point.SerializeToString()
            number = chain.number
            if chain.sizes.get(number, 0) + len(payload) > _CHUNK_BYTES and chain.newest:
                self._closed[_field(kind, number)] = _pack_points(chain.newest)
                number += 1
                chain.newest = []
            chain.newest.append((source_id, payload))
            chain.sizes[number] = chain.sizes.get(number, 0) + len(payload) + len(source_id)
            chain.counts[number] = len(chain.newest)
            self._dirty.add(kind)
            while chain.size_bytes > self._budget_bytes // len(_KINDS) and len(chain.sizes) > 1:
                oldest = min(chain.sizes)
                del chain.sizes[oldest]
                self.num_not_kept += chain.counts.pop(oldest)
                self._deleted.append(_field(kind, oldest))

    def take_writes(self) -> dict[str, bytes | None]:
        """Return the fields that changed since the last call; None deletes one."""
        if not self._dirty:
            return {}
        writes: dict[str, bytes | None] = dict(self._closed)
        for kind in self._dirty:
            chain = self._chains[kind]
            writes[_field(kind, chain.number)] = _pack_points(chain.newest)
        writes |= dict.fromkeys(self._deleted)
        chunks = {
            kind: [[number, size, chain.counts[number]] for number, size in sorted(chain.sizes.items())]
            for kind, chain in self._chains.items()
        }
        writes[INDEX_FIELD] = pack({"kind": "series_index", "not_kept": self.num_not_kept, "chunks": chunks})
        self._closed, self._deleted, self._dirty = {}, [], set()
        return writes


def chunk_fields(index: bytes, *, with_experts: bool) -> tuple[list[str], int]:
    """Return the fields of the chunks that an index names, oldest first, and how many points are kept no longer."""
    header, _ = unpack(index)
    kinds = _KINDS if with_experts else _KINDS[:1]
    fields = [_field(kind, number) for kind in kinds for number, _, _ in header["chunks"].get(kind, [])]
    return fields, header["not_kept"]


def read_chunk(data: bytes) -> list[StoredPoint]:
    """Return the points of a chunk, oldest first."""
    return [(source_id, routing.SeriesPoint.FromString(payload)) for source_id, payload in _unpack_points(data)]


def series_messages(
    points: Iterable[StoredPoint], ranks: Mapping[str, int], names: Iterable[str], max_points: int
) -> list[pb.Series]:
    """Return the points as series, ordered by rank, source, name and layer; of a step that came twice the later."""
    wanted = set(names)
    found: dict[tuple[int, str, str, int, bool], dict[int, routing.SeriesPoint]] = {}
    for source_id, point in points:
        if point.name in wanted or not (wanted or point.is_per_expert):
            layer = point.layer_index if point.HasField("layer_index") else -1
            key = (ranks.get(source_id, 0), source_id, point.name, layer, point.is_per_expert)
            found.setdefault(key, {})[point.step] = point
    widths = {key: len(steps[max(steps)].values) for key, steps in found.items()}
    limit = max(1, min(max_points, _MAX_VALUES // max(1, sum(widths.values()))))
    messages = []
    for (rank, source_id, name, layer, is_per_expert), steps in sorted(found.items()):
        width = widths[rank, source_id, name, layer, is_per_expert]
        newest = [steps[step] for step in sorted(steps) if len(steps[step].values) == width][-limit:]
        messages.append(
            pb.Series(
                source_id=source_id,
                global_rank=rank,
                name=name,
                layer_index=layer if layer >= 0 else None,
                num_values=width,
                is_per_expert=is_per_expert,
                step=np.array([point.step for point in newest], "<u8").tobytes(),
                value=np.array([point.values for point in newest], "<f8").tobytes(),
            )
        )
    return messages


def _check(point: routing.SeriesPoint) -> None:
    if not 0 < len(point.name.encode()) <= _MAX_NAME_BYTES:
        raise WireFormatError(f"series {point.name[:40]!r}: expected a name of 1 to {_MAX_NAME_BYTES} bytes")
    if point.step >= _MAX_STEP:
        raise WireFormatError(f"series {point.name!r}: step {point.step} is not below 2^63")
    if point.is_per_expert and not point.HasField("layer_index"):
        raise WireFormatError(f"series {point.name!r} has values by expert, but no layer")
    if not point.values or (len(point.values) > 1 and not point.is_per_expert):
        raise WireFormatError(f"series {point.name!r} has {len(point.values)} values at step {point.step}, expected 1")


def _field(kind: str, number: int) -> str:
    return f"{_PREFIX}{kind}:{number}"


def _pack_points(points: list[tuple[str, bytes]]) -> bytes:
    sources = list(dict.fromkeys(source_id for source_id, _ in points))
    places = {source_id: place for place, source_id in enumerate(sources)}
    header = {"kind": "series", "sources": sources, "source": [places[source_id] for source_id, _ in points]}
    return pack(header, [payload for _, payload in points])


def _unpack_points(data: bytes) -> Iterator[tuple[str, bytes]]:
    header, payloads = unpack(data)
    for place, payload in zip(header["source"], payloads, strict=True):
        yield header["sources"][place], payload
