"""gRPC-Web's bytes: frames, base64 text, timeouts, status trailers, metadata. Pure functions, no I/O.

Glossary:
    frame     one flag byte, four bytes of big-endian length, then that many bytes. Flag 0 is a message, 1 a compressed
              message, 0x80 the trailers, which end a response.
    text mode the same bytes in base64 (`application/grpc-web-text`); each flush is encoded by itself, padding and all,
              so a body is several base64 segments in a row.
"""

import base64
import binascii
import re
import struct
import urllib.parse
import zlib
from collections.abc import Iterable, Sequence

from moe_debugger.errors import InvalidInputError, MoEDebuggerError

__all__ = [
    "FLAG_COMPRESSED",
    "FLAG_TRAILERS",
    "FrameError",
    "FrameTooLargeError",
    "UnsupportedEncodingError",
    "decode_message",
    "decode_metadata",
    "decode_text",
    "encode_frame",
    "encode_message_text",
    "encode_metadata",
    "encode_trailers",
    "parse_timeout_s",
    "split_frames",
    "status_fields",
]

FLAG_COMPRESSED = 0x01
FLAG_TRAILERS = 0x80
HEADER_BYTES = 5

_HEADER = struct.Struct(">BI")
_SEGMENT = re.compile(rb"[A-Za-z0-9+/]+={0,2}")
_TIMEOUT = re.compile(r"\A([0-9]{1,8})([HMSmun])\Z")
_TIMEOUT_UNITS_S = {"H": 3600.0, "M": 60.0, "S": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9}
_METADATA_NAME = re.compile(r"\A[0-9a-z_.-]{1,128}\Z")
_ASCII_VALUE = re.compile(r"\A[\x20-\x7e]*\Z")
# HTTP's and gRPC's own headers are not the application's metadata; Cookie and Origin are the browser's business.
_NOT_METADATA = frozenset(
    (
        *("accept", "accept-encoding", "connection", "content-length", "content-type", "cookie", "expect", "host"),
        *("keep-alive", "origin", "referer", "te", "trailer", "transfer-encoding", "upgrade", "x-grpc-web"),
    )
)


class FrameError(InvalidInputError):
    """The body is not a gRPC-Web message."""


class FrameTooLargeError(MoEDebuggerError):
    """A message is larger than the limit, before or after decompression."""


class UnsupportedEncodingError(MoEDebuggerError):
    """A message is compressed in a way that is not offered."""


def encode_frame(flag: int, payload: bytes) -> bytes:
    """Return one frame."""
    return _HEADER.pack(flag, len(payload)) + payload


def split_frames(body: bytes) -> list[tuple[int, bytes]]:
    """Return the (flag, payload) of all frames in `body`.

    Raises:
        FrameError: the body ends within a frame.
    """
    frames = []
    start = 0
    while start < len(body):
        if len(body) - start < HEADER_BYTES:
            raise FrameError(f"the body ends {len(body) - start} bytes into a frame's 5-byte header")
        flag, length = _HEADER.unpack_from(body, start)
        start += HEADER_BYTES
        if length > len(body) - start:
            raise FrameError(f"a frame announces {length} bytes, the body has {len(body) - start} left")
        frames.append((flag, body[start : start + length]))
        start += length
    return frames


def decode_text(body: bytes) -> bytes:
    """Return the bytes behind one or more base64 segments.

    Raises:
        FrameError: something in it is not base64, or not padded.
    """
    parts = []
    start = 0
    while start < len(body):
        segment = _SEGMENT.match(body, start)
        if segment is None or len(segment[0]) % 4:
            raise FrameError(f"the body is not padded base64 at byte {start}")
        try:
            parts.append(base64.b64decode(segment[0]))
        except binascii.Error as error:
            raise FrameError(f"the body is not base64 at byte {start}: {error}") from None
        start = segment.end()
    return b"".join(parts)


def encode_message_text(data: bytes) -> bytes:
    """Return `data` as one base64 segment."""
    return base64.b64encode(data)


def decode_message(body: bytes, encoding: str, max_bytes: int) -> bytes:
    """Return the one message of a unary or server-streaming request.

    Args:
        encoding: the header `grpc-encoding`; empty where it is absent.
        max_bytes: limit of the message after decompression; it holds while decompressing too.

    Raises:
        FrameError: not exactly one message, or it is broken.
        FrameTooLargeError: it is larger than `max_bytes`.
        UnsupportedEncodingError: it is compressed by something else than gzip.
    """
    frames = split_frames(body)
    if len(frames) != 1:
        raise FrameError(f"the body holds {len(frames)} frames, expected exactly one message")
    flag, payload = frames[0]
    if flag == 0:
        if len(payload) > max_bytes:
            raise FrameTooLargeError(f"the message has {len(payload)} bytes, at most {max_bytes} are accepted")
        return payload
    if flag != FLAG_COMPRESSED:
        raise FrameError(f"the frame's flag is {flag:#04x}, expected 0x00 (a message) or 0x01 (compressed)")
    if encoding == "gzip":
        return _gunzip(payload, max_bytes)
    if encoding in ("", "identity"):
        raise FrameError("a frame is marked as compressed, but no grpc-encoding is given")
    raise UnsupportedEncodingError(f"grpc-encoding {encoding[:32]!r} is not supported; use gzip or identity")


def _gunzip(payload: bytes, max_bytes: int) -> bytes:
    # 31 = gzip's header and 32 KiB window. One byte more than allowed tells "full" from "too large".
    decompressor = zlib.decompressobj(wbits=31)
    try:
        message = decompressor.decompress(payload, max_bytes + 1)
    except zlib.error as error:
        raise FrameError(f"the message is not gzip: {error}") from None
    if len(message) > max_bytes:
        raise FrameTooLargeError(f"the message has more than {max_bytes} bytes after decompression, the most accepted")
    if not decompressor.eof or decompressor.unused_data:
        raise FrameError("the message is not exactly one gzip member")
    return message


def parse_timeout_s(value: str) -> float:
    """Return the seconds of a `grpc-timeout` header such as "500m".

    Raises:
        FrameError: it is not one.
    """
    match = _TIMEOUT.match(value)
    if match is None:
        raise FrameError(f"grpc-timeout {value[:32]!r} is not 1 to 8 digits and one of H, M, S, m, u, n")
    return int(match[1]) * _TIMEOUT_UNITS_S[match[2]]


def decode_metadata(headers: Iterable[tuple[str, str]]) -> list[tuple[str, str | bytes]]:
    """Return the application's metadata among HTTP headers: no transport headers, `-bin` values decoded.

    Raises:
        FrameError: a `-bin` value is not base64, or a value has characters that gRPC forbids.
    """
    metadata: list[tuple[str, str | bytes]] = []
    for name, value in headers:
        if name in _NOT_METADATA or name.startswith(("grpc-", "sec-", "proxy-", ":")) or not _METADATA_NAME.match(name):
            continue
        if name.endswith("-bin"):
            metadata += [(name, _decode_binary(name, part.strip())) for part in value.split(",")]
        elif _ASCII_VALUE.match(value):
            metadata.append((name, value))
        else:
            raise FrameError(f"metadata {name} has characters outside printable ASCII; use a name ending in -bin")
    return metadata


def _decode_binary(name: str, value: str) -> bytes:
    try:
        # Padding may be left out in gRPC.
        return base64.b64decode(value + "=" * (-len(value) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise FrameError(f"metadata {name} is not base64") from None


def encode_metadata(metadata: Iterable[Sequence[str | bytes]]) -> list[tuple[str, str]]:
    """Return metadata as header fields. What could end a line or a name is left out, never passed on."""
    fields = []
    for name, value in metadata:
        key = name.decode("ascii", "replace") if isinstance(name, bytes) else name
        key = key.lower()
        if not _METADATA_NAME.match(key):
            continue
        if key.endswith("-bin"):
            raw = value.encode() if isinstance(value, str) else bytes(value)
            fields.append((key, base64.b64encode(raw).decode("ascii").rstrip("=")))
        else:
            text = value.decode("ascii", "replace") if isinstance(value, bytes) else value
            if _ASCII_VALUE.match(text):
                fields.append((key, text))
    return fields


def status_fields(code: int, message: str, metadata: Iterable[Sequence[str | bytes]]) -> list[tuple[str, str]]:
    """Return a status as fields: for a trailers-only response's headers, or for the trailers frame."""
    fields = [("grpc-status", str(code))]
    if message:
        # gRPC percent-encodes UTF-8 outside printable ASCII, and the percent sign itself.
        safe = "".join(chr(c) for c in range(0x20, 0x7F) if chr(c) != "%")
        fields.append(("grpc-message", urllib.parse.quote(message, safe=safe)))
    fields += [f for f in encode_metadata(metadata) if f[0] not in ("grpc-status", "grpc-message")]
    return fields


def encode_trailers(fields: Iterable[tuple[str, str]]) -> bytes:
    """Return the trailers frame."""
    return encode_frame(FLAG_TRAILERS, "".join(f"{name}: {value}\r\n" for name, value in fields).encode("ascii"))
