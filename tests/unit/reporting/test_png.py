"""The encoder against a decoder written down here, and what it refuses."""

import base64
import struct
import zlib

import numpy as np
import numpy.typing as npt
import pytest

from moe_debugger.errors import InvalidInputError
from moe_debugger.reporting.png import data_uri, encode


def _decoded(data: bytes) -> tuple[npt.NDArray[np.uint8], list[tuple[int, ...]]]:
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    at, chunks = 8, {}
    while at < len(data):
        (size,) = struct.unpack(">I", data[at : at + 4])
        kind, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + size]
        assert struct.unpack(">I", data[at + 8 + size : at + 12 + size])[0] == zlib.crc32(kind + body)
        chunks[kind] = body
        at += 12 + size
    assert list(chunks) == [b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"]
    width, height, bits, colour, *rest = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
    assert (bits, colour, rest) == (8, 3, [0, 0, 0])
    lines = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, width + 1)
    assert not lines[:, 0].any()
    palette = np.frombuffer(chunks[b"PLTE"], np.uint8).reshape(-1, 3).tolist()
    return lines[:, 1:], [(*colours, alpha) for colours, alpha in zip(palette, chunks[b"tRNS"], strict=True)]


def test_what_goes_in_comes_out() -> None:
    pixels = np.random.default_rng(3).integers(0, 5, (7, 11)).astype(np.uint8)
    palette = [(index, 2 * index, 255 - index, 255 if index else 0) for index in range(5)]
    found, colours = _decoded(encode(pixels, palette))
    np.testing.assert_array_equal(found, pixels)
    assert colours == palette
    uri = data_uri(pixels, palette)
    assert uri.startswith("data:image/png;base64,")
    assert base64.b64decode(uri.split(",", 1)[1]) == encode(pixels, palette)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (4,)])
def test_no_pixels_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidInputError, match="make no picture"):
        encode(np.zeros(shape, np.uint8), [(0, 0, 0, 0)])


def test_an_index_past_the_palette_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="1 colours"):
        encode(np.ones((1, 1), np.uint8), [(0, 0, 0, 0)])
