"""A PNG encoder for pictures of few colours: as SVG the cells of a large model would be megabytes."""

import base64
import struct
import zlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from moe_debugger.errors import InvalidInputError

__all__ = ["data_uri", "encode"]

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PALETTE_TYPE, _BITS = 3, 8


def encode(pixels: npt.NDArray[np.uint8], palette: Sequence[tuple[int, int, int, int]]) -> bytes:
    """Return a PNG (ISO/IEC 15948) of 8-bit palette indices.

    Args:
        pixels: [height, width] uint8, indices into `palette`.
        palette: red, green, blue and alpha of each colour, 0..255; at most 256.

    Raises:
        InvalidInputError: no pixels, or an index past the palette.
    """
    if pixels.ndim != 2 or not pixels.size or not 0 < len(palette) <= 256 or int(pixels.max()) >= len(palette):
        raise InvalidInputError(f"pixels of shape {pixels.shape} and {len(palette)} colours make no picture")
    height, width = pixels.shape
    header = struct.pack(">IIBBBBB", width, height, _BITS, _PALETTE_TYPE, 0, 0, 0)
    colours = b"".join(bytes(colour[:3]) for colour in palette)
    alphas = bytes(colour[3] for colour in palette)
    # Every line begins with its filter: 0, none.
    lines = np.zeros((height, width + 1), np.uint8)
    lines[:, 1:] = pixels
    parts = [(b"IHDR", header), (b"PLTE", colours), (b"tRNS", alphas)]
    parts += [(b"IDAT", zlib.compress(lines.tobytes(), 9)), (b"IEND", b"")]
    return _SIGNATURE + b"".join(_chunk(kind, body) for kind, body in parts)


def data_uri(pixels: npt.NDArray[np.uint8], palette: Sequence[tuple[int, int, int, int]]) -> str:
    """Return the picture as a URI that holds it."""
    return "data:image/png;base64," + base64.b64encode(encode(pixels, palette)).decode("ascii")


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
