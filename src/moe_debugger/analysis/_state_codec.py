"""`RoutingState` as bytes and back.

Layout, little-endian: ``b"MoRS"``, u8 major, u8 minor, u16 zero, u32 CRC-32 of all that follows, then the body: request
registers, phase counts, token classes, u32 number of layers, layers. Integer arrays are written in the narrowest
unsigned width that holds their maximum (one byte says which), so that a window's blocks cost one byte a cell.

Major 2 tells skipped, identity and unused slots apart and knows identity experts. Major 1 had one number for the three;
it is read as unused slots.
"""

import struct
import zlib

import numpy as np
import numpy.typing as npt

from moe_debugger.analysis.sketch import NUM_REGISTERS
from moe_debugger.analysis.state import (
    NUM_PHASES,
    NUM_TOKEN_CLASSES,
    FixedSum,
    LayerShape,
    LayerState,
    RoutingState,
    num_blocks,
)
from moe_debugger.errors import InvalidInputError, UnsupportedFormatError, WireFormatError

__all__ = ["STATE_FORMAT_MAJOR", "decode_state", "encode_state"]

STATE_FORMAT_MAJOR = 2
STATE_FORMAT_MINOR = 0
_MAGIC = b"MoRS"
_HEADER = struct.Struct("<4sBBHI")
_LAYER = struct.Struct("<IIII8QQQ")
_LAYER_1 = struct.Struct("<III6QQQ")
_SUMS = ("router_entropy", "top1_probability", "margin", "z_squared")
_WIDTHS = {1: "<u1", 2: "<u2", 4: "<u4", 8: "<u8"}
_NO_STEP = 2**64 - 1
_MAX_LAYERS = 4096


def encode_state(state: RoutingState) -> bytes:
    """Return `state` in the layout of this module."""
    parts = [state.request_registers.tobytes(), _pack(state.phase_tokens), _pack(state.token_classes)]
    parts.append(struct.pack("<I", len(state.layers)))
    for layer in state.layers.values():
        parts.extend(_encode_layer(layer))
    body = b"".join(parts)
    return _HEADER.pack(_MAGIC, STATE_FORMAT_MAJOR, STATE_FORMAT_MINOR, 0, zlib.crc32(body)) + body


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
        layer.num_probability_tokens,
        layer.num_fingerprints,
        _NO_STEP if layer.first_step is None else layer.first_step,
        _NO_STEP if layer.last_step is None else layer.last_step,
    )
    sums = [getattr(layer, name) for name in _SUMS]
    return [
        head,
        *(total.total.to_bytes(16, "little", signed=True) + struct.pack("<Q", total.num_values) for total in sums),
        layer.content_registers.tobytes(),
        _pack(layer.counts),
        _pack(layer.block_counts),
        _pack(layer.block_tokens),
        # Probabilities are not negative, so the narrow unsigned form holds them.
        _pack(layer.probability_sum.astype(np.uint64)),
    ]


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
    phases = reader.unsigned(NUM_PHASES, "phase counts")
    classes = reader.unsigned(NUM_TOKEN_CLASSES, "token classes")
    (num_layers,) = struct.unpack("<I", reader.take(4, "the number of layers"))
    if num_layers > _MAX_LAYERS:
        raise WireFormatError(f"routing state has {num_layers} layers, expected at most {_MAX_LAYERS}")
    layers = [_decode_layer(reader, major) for _ in range(num_layers)]
    reader.end()
    by_index = {layer.shape.layer_index: layer for layer in layers}
    if len(by_index) != num_layers:
        raise WireFormatError("routing state describes a layer twice")
    return RoutingState(by_index, requests, phases, classes)


def _decode_layer(reader: _Reader, major: int) -> LayerState:
    identity_experts = skipped = identity = 0
    if major == 1:
        index, experts, top_k, *numbers = _LAYER_1.unpack(reader.take(_LAYER_1.size, "a layer's head"))
        tokens, padding, dropped, unused, probability_tokens, fingerprints, first, last = numbers
    else:
        head = _LAYER.unpack(reader.take(_LAYER.size, "a layer's head"))
        index, experts, top_k, identity_experts, *numbers = head
        tokens, padding, dropped, unused, skipped, identity, probability_tokens, fingerprints, first, last = numbers
    try:
        shape = LayerShape(index, experts, top_k, identity_experts)
    except InvalidInputError as error:
        raise WireFormatError(f"routing state: {error}") from error
    what = f"layer {index}"
    sums = []
    for name in _SUMS:
        total = int.from_bytes(reader.take(16, f"{what}: {name}"), "little", signed=True)
        (num_values,) = struct.unpack("<Q", reader.take(8, f"{what}: {name}"))
        sums.append(FixedSum(total, num_values))
    blocks = num_blocks(experts)
    registers = reader.registers(f"{what}: fingerprints")
    counts = reader.unsigned(experts, f"{what}: counts")
    block_counts = reader.unsigned(blocks * experts, f"{what}: blocks").reshape(blocks, experts)
    block_tokens = reader.unsigned(blocks, f"{what}: block sizes")
    probability_sum = reader.unsigned(experts, f"{what}: probabilities").astype(np.int64)
    return LayerState(
        shape=shape,
        counts=counts,
        block_counts=block_counts,
        block_tokens=block_tokens,
        probability_sum=probability_sum,
        content_registers=registers,
        num_tokens=tokens,
        num_padding=padding,
        num_dropped_slots=dropped,
        num_unused_slots=unused,
        num_skipped_slots=skipped,
        num_identity_slots=identity,
        num_probability_tokens=probability_tokens,
        num_fingerprints=fingerprints,
        router_entropy=sums[0],
        top1_probability=sums[1],
        margin=sums[2],
        z_squared=sums[3],
        first_step=None if first == _NO_STEP else first,
        last_step=None if last == _NO_STEP else last,
    )
