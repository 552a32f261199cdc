"""`RoutingState` as bytes and back.

Layout, little-endian: ``b"MoRS"``, u8 major, u8 minor, u16 zero, u32 CRC-32 of all that follows, then the body: request
registers, u32 number of sampled requests, their hashes, u32 number of layers, layers. Integer arrays are written in the
narrowest unsigned width that holds their maximum (one byte says which), so that a window's blocks cost one byte a cell.
Kinds of tokens (phases, token classes, workloads) stand behind a byte that is 0 where they are those of the layer
before, as they mostly are.

Major 6 keeps a sample of requests, so that their number is exact below 256, and means by groups of requests. Older sums
are read as those of unknown requests, and dropped slots as of no group. Major 5 gives each layer its kinds of tokens.
Up to major 4 one table of phases and of token classes stood for all layers, and is read as that of each; workloads were
counted without their requests, and are read as none.
Major 4 adds the sum of squares of the tokens' routed slots, and keeps means in multiples of 2**-40 instead of 2**-20;
older states get the sum of squares of equal tokens. Major 3 added blocks of positions, workloads, and the history: the
series over steps and the samples of steps and tokens, each layer's behind a byte that says whether it is there. Major 2
told skipped, identity and unused slots apart and knew identity experts. Major 1 had one number for the three; it is
read as unused slots. States of the first two are read as states without a history.
"""

import struct
import zlib
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from moe_debugger.analysis.fixed_sums import FRACTION_BITS, NUM_GROUPS, UNKNOWN_GROUP, FixedSums
from moe_debugger.analysis.layer_state import even_squares
from moe_debugger.analysis.sketch import NUM_REGISTERS
from moe_debugger.analysis.state import (
    NUM_PHASES,
    NUM_TOKEN_CLASSES,
    REQUEST_SAMPLE,
    LayerShape,
    LayerState,
    RoutingState,
    num_blocks,
)
from moe_debugger.analysis.step_loads import LoadSeries, StepSample, sample_capacity, series_capacity
from moe_debugger.analysis.token_sample import SAMPLE_TOKENS, TokenSample
from moe_debugger.analysis.workloads import SAMPLE_REQUESTS, WorkloadSample
from moe_debugger.errors import InvalidInputError, UnsupportedFormatError, WireFormatError

__all__ = ["STATE_FORMAT_MAJOR", "decode_state", "encode_state"]

STATE_FORMAT_MAJOR = 6
STATE_FORMAT_MINOR = 0
_MAGIC = b"MoRS"
_HEADER = struct.Struct("<4sBBHI")
_LAYER = struct.Struct("<IIII9QQQ")
_LAYER_2 = struct.Struct("<IIII8QQQ")
_LAYER_1 = struct.Struct("<III6QQQ")
_SERIES = struct.Struct("<BIQQQQ")
# Sums by groups of requests.
_SUMS = ("router_entropy", "top1_probability", "margin", "z_squared", "dropped")
_MAX_SUM = 1 << 62
_WIDTHS = {1: "<u1", 2: "<u2", 4: "<u4", 8: "<u8"}
# Up to major 3 means were multiples of 2**-20.
_COARSE_BITS = 20
_NO_STEP = 2**64 - 1
_MAX_LAYERS = 4096
# Up to major 4.
_NUM_WORKLOAD_CLASSES = 64


def encode_state(state: RoutingState) -> bytes:
    """Return `state` in the layout of this module."""
    sample = state.request_sample
    parts = [state.request_registers.tobytes(), struct.pack("<I", len(sample)), _pack(sample)]
    parts.append(struct.pack("<I", len(state.layers)))
    before = b""
    for layer in state.layers.values():
        kinds = _encode_kinds(layer)
        parts += [*_encode_layer(layer), b"\0" if kinds == before else b"\1" + kinds]
        before = kinds
    body = b"".join(parts)
    return _HEADER.pack(_MAGIC, STATE_FORMAT_MAJOR, STATE_FORMAT_MINOR, 0, zlib.crc32(body)) + body


def _encode_kinds(layer: LayerState) -> bytes:
    workloads = layer.workloads
    columns = (workloads.requests, workloads.positions, workloads.labels, workloads.num_tokens)
    tables = (layer.phase_tokens, layer.token_classes, *columns)
    return struct.pack("<I", len(workloads.requests)) + b"".join(map(_pack, tables))


def _encode_layer(layer: LayerState) -> list[bytes]:
    shape = layer.shape
    head = _LAYER.pack(
        shape.layer_index,
        shape.num_experts,
        shape.top_k,
        shape.num_identity_experts,
        layer.num_tokens,
        layer.num_padding,
        layer.num_dropped_slots,
        layer.num_unused_slots,
        layer.num_skipped_slots,
        layer.num_identity_slots,
        layer.squared_loads,
        layer.num_probability_tokens,
        layer.num_fingerprints,
        _NO_STEP if layer.first_step is None else layer.first_step,
        _NO_STEP if layer.last_step is None else layer.last_step,
    )
    return [
        head,
        *(part for name in _SUMS for part in _encode_sums(getattr(layer, name))),
        layer.content_registers.tobytes(),
        _pack(layer.counts),
        _pack(layer.block_counts),
        _pack(layer.block_tokens),
        # Probabilities are not negative, so the narrow unsigned form holds them.
        _pack(layer.probability_sum.astype(np.uint64)),
        *([b"\0"] if layer.position_counts is None else [b"\1", _pack(layer.position_counts)]),
        *_encode_series(layer.load_series),
        *_encode_steps(layer.step_sample),
        *_encode_tokens(layer.token_sample),
    ]


def _encode_sums(sums: FixedSums) -> list[bytes]:
    if not sums.num_values:
        return [b"\0"]
    # The sign goes last, so that small numbers stay narrow.
    wholes = (sums.wholes << 1) ^ (sums.wholes >> 63)
    return [b"\1", *(_pack(part.view(np.uint64)) for part in (wholes, sums.fractions, sums.counts))]


def _encode_series(series: LoadSeries | None) -> list[bytes]:
    if series is None:
        return [b"\0"]
    head = _SERIES.pack(
        series.shift,
        len(series.buckets),
        _NO_STEP if series.first is None else series.first,
        _NO_STEP if series.last is None else series.last,
        series.low_source,
        series.high_source,
    )
    # Buckets follow one another mostly: differences fit one byte.
    steps = np.diff(series.buckets, prepend=np.uint64(0)) if len(series.buckets) else series.buckets
    return [b"\1", head, _pack(steps), _pack(series.num_tokens), _pack(series.counts)]


def _encode_steps(sample: StepSample | None) -> list[bytes]:
    if sample is None:
        return [b"\0"]
    parts = (sample.hashes, sample.steps, sample.num_tokens, sample.counts)
    return [b"\1", struct.pack("<I", len(sample.steps)), *(_pack(part) for part in parts)]


def _encode_tokens(sample: TokenSample | None) -> list[bytes]:
    if sample is None:
        return [b"\0"]
    ids = (sample.expert_ids + 1).astype(np.uint64)
    return [b"\1", struct.pack("<I", len(sample.keys)), _pack(sample.keys), _pack(ids)]


def _pack(values: npt.NDArray[np.uint64]) -> bytes:
    largest = int(values.max()) if values.size else 0
    width = next(width for width in _WIDTHS if largest < 1 << 8 * width)
    return bytes([width]) + values.astype(_WIDTHS[width]).tobytes()


class _Reader:
    """Takes typed pieces off the front of a buffer, and says what was cut."""

    def __init__(self, data: bytes) -> None:
        self._data = memoryview(data)
        self._at = 0

    def take(self, size: int, what: str) -> memoryview:
        piece = self._data[self._at : self._at + size]
        if len(piece) != size:
            raise WireFormatError(f"routing state ends within {what}: {len(piece)} of {size} bytes are there")
        self._at += size
        return piece

    def unsigned(self, size: int, what: str) -> npt.NDArray[np.uint64]:
        width = self.take(1, what)[0]
        if width not in _WIDTHS:
            raise WireFormatError(f"routing state: {what} has element width {width}, expected one of {list(_WIDTHS)}")
        return np.frombuffer(self.take(size * width, what), _WIDTHS[width]).astype(np.uint64)

    def count(self, largest: int, what: str) -> int:
        (number,) = struct.unpack("<I", self.take(4, what))
        if number > largest:
            raise WireFormatError(f"routing state: {number} {what}, expected at most {largest}")
        return int(number)

    def is_there(self, what: str) -> bool:
        return self.take(1, what)[0] != 0

    def registers(self, what: str) -> npt.NDArray[np.uint8]:
        return np.frombuffer(self.take(NUM_REGISTERS, what), np.uint8).copy()

    def end(self) -> None:
        if self._at != len(self._data):
            raise WireFormatError(f"routing state has {len(self._data) - self._at} bytes after its end")


def decode_state(data: bytes) -> RoutingState:
    """Return the state in `data`.

    Raises:
        WireFormatError: the bytes are damaged or cut.
        UnsupportedFormatError: written by a newer major version.
    """
    if len(data) < _HEADER.size:
        raise WireFormatError(f"routing state has {len(data)} bytes, fewer than its header of {_HEADER.size}")
    magic, major, minor, _, crc = _HEADER.unpack_from(data)
    if magic != _MAGIC:
        raise WireFormatError(f"routing state begins with {magic!r}, expected {_MAGIC!r}")
    if major > STATE_FORMAT_MAJOR:
        raise UnsupportedFormatError(
            f"routing state has format version {major}.{minor}, this program reads up to major {STATE_FORMAT_MAJOR}; "
            "upgrade the analyzer"
        )
    if major == 0:
        raise WireFormatError(f"routing state has no version; expected major {STATE_FORMAT_MAJOR}")
    body = bytes(data[_HEADER.size :])
    if zlib.crc32(body) != crc:
        raise WireFormatError(f"routing state: checksum {zlib.crc32(body):#010x}, expected {crc:#010x}")
    reader = _Reader(body)
    requests = reader.registers("the request counter")
    sample = None
    if major >= 6:
        sample = reader.unsigned(reader.count(REQUEST_SAMPLE, "sampled requests"), "sampled requests")
    kinds = None
    if major < 5:
        kinds = _Kinds.read(reader, with_workloads=False)
        if major >= 3:
            reader.unsigned(_NUM_WORKLOAD_CLASSES, "workloads")
    (num_layers,) = struct.unpack("<I", reader.take(4, "the number of layers"))
    if num_layers > _MAX_LAYERS:
        raise WireFormatError(f"routing state has {num_layers} layers, expected at most {_MAX_LAYERS}")
    layers = []
    for _ in range(num_layers):
        layer = _decode_layer(reader, major)
        if major >= 5 and reader.is_there("kinds of tokens"):
            kinds = _Kinds.read(reader, with_workloads=True)
        if kinds is None:
            raise WireFormatError("routing state: the first layer has the kinds of tokens of the layer before")
        kinds.give(layer)
        layers.append(layer)
    reader.end()
    by_index = {layer.shape.layer_index: layer for layer in layers}
    if len(by_index) != num_layers:
        raise WireFormatError("routing state describes a layer twice")
    return RoutingState(by_index, requests, sample)


@dataclass(frozen=True, slots=True)
class _Kinds:
    """Kinds of tokens of one layer or several."""

    phase_tokens: npt.NDArray[np.uint64]
    token_classes: npt.NDArray[np.uint64]
    workloads: WorkloadSample

    @classmethod
    def read(cls, reader: _Reader, *, with_workloads: bool) -> "_Kinds":
        num = reader.count(SAMPLE_REQUESTS, "sampled requests") if with_workloads else 0
        phases = reader.unsigned(NUM_PHASES, "phase counts")
        classes = reader.unsigned(NUM_TOKEN_CLASSES, "token classes")
        if not with_workloads:
            return cls(phases, classes, WorkloadSample.empty())
        return cls(phases, classes, WorkloadSample(*(reader.unsigned(num, "sampled requests") for _ in range(4))))

    def give(self, layer: LayerState) -> None:
        """Set the layer's own copy of them."""
        layer.phase_tokens, layer.token_classes = self.phase_tokens.copy(), self.token_classes.copy()
        layer.workloads = replace(self.workloads)


def _decode_layer(reader: _Reader, major: int) -> LayerState:
    identity_experts = skipped = identity = 0
    squared_loads: int | None = None
    if major == 1:
        index, experts, top_k, *numbers = _LAYER_1.unpack(reader.take(_LAYER_1.size, "a layer's head"))
        tokens, padding, dropped, unused, probability_tokens, fingerprints, first, last = numbers
    elif major < 4:
        head = _LAYER_2.unpack(reader.take(_LAYER_2.size, "a layer's head"))
        index, experts, top_k, identity_experts, *numbers = head
        tokens, padding, dropped, unused, skipped, identity, probability_tokens, fingerprints, first, last = numbers
    else:
        head = _LAYER.unpack(reader.take(_LAYER.size, "a layer's head"))
        index, experts, top_k, identity_experts, *numbers = head
        tokens, padding, dropped, unused, skipped, identity, squared_loads, *numbers = numbers
        probability_tokens, fingerprints, first, last = numbers
    try:
        shape = LayerShape(index, experts, top_k, identity_experts)
    except InvalidInputError as error:
        raise WireFormatError(f"routing state: {error}") from error
    what = f"layer {index}"
    names = _SUMS if major >= 6 else _SUMS[:-1]
    sums = {name: _decode_sums(reader, major, f"{what}: {name}") for name in names}
    blocks = num_blocks(experts)
    registers = reader.registers(f"{what}: fingerprints")
    counts = reader.unsigned(experts, f"{what}: counts")
    block_counts = reader.unsigned(blocks * experts, f"{what}: blocks").reshape(blocks, experts)
    block_tokens = reader.unsigned(blocks, f"{what}: block sizes")
    probability_sum = reader.unsigned(experts, f"{what}: probabilities").astype(np.int64)
    has_more = major >= 3
    position_counts = None
    if has_more and reader.is_there(f"{what}: blocks of positions"):
        cells = reader.unsigned(blocks * experts, f"{what}: blocks of positions")
        position_counts = cells.reshape(blocks, experts)
    return LayerState(
        shape=shape,
        counts=counts,
        block_counts=block_counts,
        block_tokens=block_tokens,
        position_counts=position_counts,
        probability_sum=probability_sum,
        content_registers=registers,
        num_tokens=tokens,
        num_padding=padding,
        num_dropped_slots=dropped,
        num_unused_slots=unused,
        num_skipped_slots=skipped,
        num_identity_slots=identity,
        squared_loads=even_squares(int(counts.sum()), tokens) if squared_loads is None else squared_loads,
        num_probability_tokens=probability_tokens,
        num_fingerprints=fingerprints,
        router_entropy=sums["router_entropy"],
        top1_probability=sums["top1_probability"],
        margin=sums["margin"],
        z_squared=sums["z_squared"],
        dropped=sums.get("dropped", FixedSums()),
        first_step=None if first == _NO_STEP else first,
        last_step=None if last == _NO_STEP else last,
        load_series=_decode_series(reader, experts, what) if has_more else None,
        step_sample=_decode_steps(reader, experts, what) if has_more else None,
        token_sample=_decode_tokens(reader, top_k, what) if has_more else None,
    )


def _decode_sums(reader: _Reader, major: int, what: str) -> FixedSums:
    sums = FixedSums()
    if major < 6:
        total = int.from_bytes(reader.take(16, what), "little", signed=True)
        (num_values,) = struct.unpack("<Q", reader.take(8, what))
        if major < 4:
            total <<= _COARSE_BITS
        whole, fraction = divmod(total, 1 << FRACTION_BITS)
        if max(abs(whole), num_values) >= _MAX_SUM:
            raise WireFormatError(f"routing state: {what} is {whole} of {num_values} values, expected less than 2**62")
        sums.add_sums(whole, fraction, num_values, UNKNOWN_GROUP)
    elif reader.is_there(what):
        wholes, fractions, counts = (reader.unsigned(NUM_GROUPS + 1, what) for _ in range(3))
        if fractions.max() >> np.uint64(FRACTION_BITS) or counts.max() >= _MAX_SUM:
            raise WireFormatError(f"routing state: {what} has fractions or sample sizes out of range")
        signs = -(wholes & np.uint64(1)).astype(np.int64)
        sums = FixedSums(
            (wholes >> np.uint64(1)).astype(np.int64) ^ signs, fractions.astype(np.int64), counts.astype(np.int64)
        )
    return sums


def _decode_series(reader: _Reader, experts: int, what: str) -> LoadSeries | None:
    what = f"{what}: series"
    if not reader.is_there(what):
        return None
    shift, num, first, last, low, high = _SERIES.unpack(reader.take(_SERIES.size, what))
    if num > series_capacity(experts) or shift > 63:
        raise WireFormatError(f"routing state: {what} has {num} buckets of 2**{shift} steps")
    buckets = np.cumsum(reader.unsigned(num, what), dtype=np.uint64)
    num_tokens = reader.unsigned(num, what)
    counts = reader.unsigned(num * experts, what).reshape(num, experts)
    return LoadSeries(
        shift,
        buckets,
        counts,
        num_tokens,
        None if first == _NO_STEP else first,
        None if last == _NO_STEP else last,
        low,
        high,
    )


def _decode_steps(reader: _Reader, experts: int, what: str) -> StepSample | None:
    what = f"{what}: sampled steps"
    if not reader.is_there(what):
        return None
    num = reader.count(sample_capacity(experts), what)
    hashes, steps, num_tokens = (reader.unsigned(num, what) for _ in range(3))
    return StepSample(hashes, steps, reader.unsigned(num * experts, what).reshape(num, experts), num_tokens)


def _decode_tokens(reader: _Reader, top_k: int, what: str) -> TokenSample | None:
    what = f"{what}: sampled tokens"
    if not reader.is_there(what):
        return None
    num = reader.count(SAMPLE_TOKENS, what)
    keys = reader.unsigned(num, what)
    ids = reader.unsigned(num * top_k, what).astype(np.int32).reshape(num, top_k) - 1
    return TokenSample(keys, ids)
