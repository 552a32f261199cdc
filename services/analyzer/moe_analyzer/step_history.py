"""A session's loads over steps in one partition, as Redis fields. Pure: no Redis, no clock.

The history is large, and a flush changes little of it: the newest buckets of the series, and seldom a sampled step or
token. So it stands beside the head in fields of its own, and only those that changed are written: the series in chunks
of 16 buckets, and one field of samples.
"""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from moe_analyzer.blob import pack, unpack
from moe_debugger.analysis.state import RoutingState
from moe_debugger.analysis.step_loads import LoadSeries, StepSample
from moe_debugger.analysis.token_sample import TokenSample
from moe_debugger.errors import WireFormatError

__all__ = ["INDEX_FIELD", "StepHistory", "chunk_fields", "read_history", "without_history"]

INDEX_FIELD = "steps:index"
_SAMPLES_FIELD = "steps:samples"
_CHUNK_BUCKETS = 16
_TYPES = ("<u1", "<u2", "<u4", "<u8")
_U64 = npt.NDArray[np.uint64]


def without_history(state: RoutingState) -> RoutingState:
    """Return `state` as it is kept in the head: without series and samples; its arrays are shared."""
    layers = {
        index: replace(layer, load_series=None, step_sample=None, token_sample=None)
        for index, layer in state.layers.items()
    }
    return RoutingState(layers, state.request_registers, state.request_sample)


class StepHistory:
    """Says which fields to write after the totals have changed."""

    def __init__(self) -> None:
        self._shifts: dict[int, int] = {}
        self._chunks: set[int] = set()
        self._samples: bytes | None = None

    def load(self, state: Mapping[str, bytes], totals: RoutingState) -> None:
        """Take over what was stored, into the layers of `totals`."""
        if INDEX_FIELD not in state:
            return
        for index, layer in read_history(state).items():
            if index in totals.layers:
                mine = totals.layers[index]
                mine.load_series, mine.step_sample, mine.token_sample = layer
        self._shifts = _shifts(totals)
        self._chunks = _chunks_of(totals)
        self._samples = state.get(_SAMPLES_FIELD)

    def take_writes(self, totals: RoutingState, delta: RoutingState) -> dict[str, bytes | None]:
        """Return the fields that differ from those written before; None deletes one.

        Args:
            totals: all rows so far.
            delta: the rows that came since the last call.
        """
        writes: dict[str, bytes | None] = {}
        shifts, chunks = _shifts(totals), _chunks_of(totals)
        touched = _touched(totals, delta) if shifts == self._shifts else chunks
        for chunk in sorted(touched):
            writes[_chunk_field(chunk)] = _pack_chunk(totals, chunk)
        for chunk in self._chunks - chunks:
            writes[_chunk_field(chunk)] = None
        samples = _pack_samples(totals)
        if samples != self._samples:
            writes[_SAMPLES_FIELD] = samples
        if writes:
            writes[INDEX_FIELD] = _pack_index(totals, chunks)
        self._shifts, self._chunks, self._samples = shifts, chunks, samples
        return writes


def chunk_fields(index: bytes) -> list[str]:
    """Return the fields that the index names."""
    header, _ = unpack(index)
    return [_SAMPLES_FIELD, *(_chunk_field(chunk) for chunk in header["chunks"])]


def read_history(state: Mapping[str, bytes]) -> dict[int, tuple[LoadSeries, StepSample, TokenSample]]:
    """Return series and samples by layer, of the fields that `StepHistory` gave.

    Raises:
        WireFormatError: a field that the index names is missing or damaged.
    """
    header, _ = unpack(state[INDEX_FIELD])
    missing = [name for name in chunk_fields(state[INDEX_FIELD]) if name not in state]
    if missing:
        raise WireFormatError(f"history of steps: fields {missing} are missing")
    parts: dict[int, list[tuple[_U64, _U64, _U64]]] = {}
    for chunk in header["chunks"]:
        layers, columns = unpack(state[_chunk_field(chunk)])
        for at, (index, num, types) in enumerate(layers["layers"]):
            arrays = [_read(columns[3 * at + part], types[part]) for part in range(3)]
            parts.setdefault(index, []).append((arrays[0], arrays[1], arrays[2].reshape(num, -1)))
    samples, columns = unpack(state[_SAMPLES_FIELD])
    result = {}
    for at, (index, experts, top_k, types) in enumerate(samples["layers"]):
        hashes, steps, tokens, counts, keys, ids = (
            _read(columns[6 * at + part], types[part]) for part in range(len(types))
        )
        shift, *ends = header["layers"][str(index)]
        found = parts.get(index, [])
        series = LoadSeries.empty(experts)
        if found:
            buckets, num_tokens, loads = (np.concatenate(columns_of) for columns_of in zip(*found, strict=True))
            series = LoadSeries(shift, buckets, loads, num_tokens, *ends)
        result[index] = (
            series,
            StepSample(hashes, steps, counts.reshape(-1, experts), tokens),
            TokenSample(keys, ids.astype(np.int32).reshape(-1, top_k) - 1),
        )
    return result


def _chunk_field(chunk: int) -> str:
    return f"steps:{chunk}"


def _shifts(state: RoutingState) -> dict[int, int]:
    return {i: layer.load_series.shift for i, layer in state.layers.items() if layer.load_series is not None}


def _chunks_of(state: RoutingState) -> set[int]:
    chunks: set[int] = set()
    for layer in state.layers.values():
        if layer.load_series is not None:
            chunks.update(np.unique(layer.load_series.buckets // np.uint64(_CHUNK_BUCKETS)).tolist())
    return chunks


def _touched(totals: RoutingState, delta: RoutingState) -> set[int]:
    chunks: set[int] = set()
    for index, layer in delta.layers.items():
        mine, new = totals.layers[index].load_series, layer.load_series
        if mine is not None and new is not None:
            coarse = new.buckets >> np.uint64(mine.shift - new.shift)
            chunks.update(np.unique(coarse // np.uint64(_CHUNK_BUCKETS)).tolist())
    return chunks


def _pack_chunk(totals: RoutingState, chunk: int) -> bytes:
    layers: list[list[object]] = []
    columns: list[bytes] = []
    for index, layer in totals.layers.items():
        series = layer.load_series
        if series is None:
            continue
        low, high = np.searchsorted(series.buckets, np.array([chunk, chunk + 1], np.uint64) * np.uint64(_CHUNK_BUCKETS))
        if low == high:
            continue
        types = _append(columns, series.buckets[low:high], series.num_tokens[low:high], series.counts[low:high])
        layers.append([index, int(high - low), types])
    return pack({"kind": "steps", "layers": layers}, columns)


def _pack_samples(totals: RoutingState) -> bytes:
    layers: list[list[object]] = []
    columns: list[bytes] = []
    for index, layer in totals.layers.items():
        steps, tokens = layer.step_sample, layer.token_sample
        if steps is None or tokens is None:
            continue
        ids = (tokens.expert_ids + 1).astype(np.uint64)
        types = _append(columns, steps.hashes, steps.steps, steps.num_tokens, steps.counts, tokens.keys, ids)
        layers.append([index, layer.shape.num_experts, layer.shape.top_k, types])
    return pack({"kind": "samples", "layers": layers}, columns)


def _pack_index(totals: RoutingState, chunks: set[int]) -> bytes:
    layers = {
        str(index): [series.shift, series.first, series.last, series.low_source, series.high_source]
        for index, layer in totals.layers.items()
        if (series := layer.load_series) is not None
    }
    return pack({"kind": "steps_index", "chunks": sorted(chunks), "layers": layers})


def _append(columns: list[bytes], *arrays: _U64) -> list[int]:
    """Add each array in the narrowest type that holds it, and return the numbers of the types."""
    types = [_narrow(array) for array in arrays]
    columns += [array.astype(_TYPES[kind]).tobytes() for array, kind in zip(arrays, types, strict=True)]
    return types


def _narrow(array: _U64) -> int:
    largest = int(array.max()) if array.size else 0
    return next(kind for kind in range(len(_TYPES)) if largest < 1 << 8 * (1 << kind))


def _read(column: bytes, kind: int) -> _U64:
    return np.frombuffer(column, _TYPES[kind]).astype(np.uint64)
