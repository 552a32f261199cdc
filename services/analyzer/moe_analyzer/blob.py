"""Our Redis values: a format version, a small JSON header and binary columns.

Layout: ``b"MOEB"``, u8 major, u8 minor, u16 0, u32 header length, u32 CRC-32 of all that follows, the JSON header, the
columns one after another. The header's ``sizes`` gives each column's length.
"""

import json
import struct
import zlib
from typing import Any

from moe_debugger.errors import UnsupportedFormatError, WireFormatError

__all__ = ["pack", "unpack"]

_MAGIC = b"MOEB"
_MAJOR, _MINOR = 1, 0
_HEAD = struct.Struct("<4sBBHII")


def pack(header: dict[str, Any], columns: list[bytes] | None = None) -> bytes:
    """Return `header` and `columns` as one value."""
    columns = columns or []
    text = json.dumps({**header, "sizes": [len(column) for column in columns]}, separators=(",", ":")).encode()
    body = b"".join((text, *columns))
    return _HEAD.pack(_MAGIC, _MAJOR, _MINOR, 0, len(text), zlib.crc32(body)) + body


def unpack(data: bytes) -> tuple[dict[str, Any], list[bytes]]:
    """Return the header and the columns of a value.

    Raises:
        WireFormatError: it is damaged, or not one of ours.
        UnsupportedFormatError: a newer program wrote it.
    """
    if len(data) < _HEAD.size:
        raise WireFormatError(f"Redis value of {len(data)} bytes is shorter than its head of {_HEAD.size}")
    magic, major, minor, _, length, checksum = _HEAD.unpack_from(data)
    if magic != _MAGIC:
        raise WireFormatError(f"Redis value begins with {magic!r}, expected {_MAGIC!r}")
    if major > _MAJOR:
        raise UnsupportedFormatError(
            f"Redis value has format version {major}.{minor}, this program reads up to major {_MAJOR}; "
            "upgrade the analyzer"
        )
    body = data[_HEAD.size :]
    if zlib.crc32(body) != checksum:
        raise WireFormatError(f"Redis value: checksum {zlib.crc32(body):#010x}, expected {checksum:#010x}")
    header: dict[str, Any] = json.loads(body[:length])
    columns, at = [], length
    for size in header.pop("sizes"):
        columns.append(body[at : at + size])
        at += size
    return header, columns
