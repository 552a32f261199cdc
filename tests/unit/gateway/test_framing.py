"""gRPC-Web's bytes, against slow references and by properties."""

import base64
import gzip
import struct
import urllib.parse

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_debugger.errors import MoEDebuggerError
from moe_gateway.framing import (
    FrameError,
    FrameTooLargeError,
    UnsupportedEncodingError,
    decode_message,
    decode_metadata,
    decode_text,
    encode_frame,
    encode_metadata,
    encode_trailers,
    parse_timeout_s,
    split_frames,
    status_fields,
)


@given(st.lists(st.tuples(st.integers(0, 255), st.binary(max_size=200))))
def test_frames_come_back_as_they_were(frames: list[tuple[int, bytes]]) -> None:
    assert split_frames(b"".join(encode_frame(flag, payload) for flag, payload in frames)) == frames


@given(st.binary(max_size=100))
def test_any_body_is_frames_or_a_frame_error(body: bytes) -> None:
    try:
        frames = split_frames(body)
    except FrameError:
        return
    assert b"".join(struct.pack(">BI", flag, len(payload)) + payload for flag, payload in frames) == body


@given(st.lists(st.binary(max_size=50)))
def test_text_of_any_segments_is_their_bytes(parts: list[bytes]) -> None:
    assert decode_text(b"".join(base64.b64encode(part) for part in parts)) == b"".join(parts)


@given(st.binary(max_size=60))
def test_any_text_is_bytes_or_a_frame_error(body: bytes) -> None:
    try:
        data = decode_text(body)
    except FrameError:
        return
    # As many bytes as the reference finds, group of four by group of four.
    groups = [body[start : start + 4] for start in range(0, len(body), 4)]
    assert data == b"".join(base64.b64decode(group) for group in groups)


@pytest.mark.parametrize("body", [b"A", b"AAA", b"AA=A", b"A===", b"AA==\n", b"AA== ", b"AA-_", "AAÄ=".encode()])
def test_text_that_is_not_padded_base64_is_refused(body: bytes) -> None:
    with pytest.raises(FrameError):
        decode_text(body)


@given(st.binary(max_size=300), st.booleans())
def test_message_comes_back_plain_or_compressed(message: bytes, compressed: bool) -> None:
    payload = gzip.compress(message) if compressed else message
    assert decode_message(encode_frame(int(compressed), payload), "gzip" if compressed else "", 300) == message


@given(st.binary(max_size=80), st.sampled_from(["", "identity", "gzip", "br"]), st.integers(0, 2))
def test_any_message_is_read_or_refused_by_our_errors(payload: bytes, encoding: str, flag: int) -> None:
    try:
        message = decode_message(encode_frame(flag, payload), encoding, 64)
    except MoEDebuggerError:
        return
    assert len(message) <= 64


def test_limit_holds_for_the_decompressed_message_to_the_byte() -> None:
    assert decode_message(encode_frame(1, gzip.compress(bytes(1000))), "gzip", 1000) == bytes(1000)
    with pytest.raises(FrameTooLargeError, match="after decompression"):
        decode_message(encode_frame(1, gzip.compress(bytes(1001))), "gzip", 1000)
    with pytest.raises(FrameTooLargeError, match="1001 bytes"):
        decode_message(encode_frame(0, bytes(1001)), "", 1000)


def test_two_gzip_members_are_not_one_message() -> None:
    with pytest.raises(FrameError, match="exactly one gzip member"):
        decode_message(encode_frame(1, gzip.compress(b"a") + gzip.compress(b"b")), "gzip", 100)


def test_unknown_encoding_is_named() -> None:
    with pytest.raises(UnsupportedEncodingError, match="'br'"):
        decode_message(encode_frame(1, b"x"), "br", 100)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [("500m", 0.5), ("1S", 1), ("2M", 120), ("1H", 3600), ("0n", 0), ("99999999u", 99.999999), ("7n", 7e-9)],
)
def test_timeouts_are_read(value: str, seconds: float) -> None:
    assert parse_timeout_s(value) == pytest.approx(seconds)


@pytest.mark.parametrize("value", ["", "S", "1", "1s ", "123456789S", "-1S", "+1S", "1.5S", "1S\n", "٣S", "1h"])
def test_other_timeouts_are_refused(value: str) -> None:
    with pytest.raises(FrameError, match="grpc-timeout"):
        parse_timeout_s(value)


def test_metadata_keeps_the_applications_headers_alone() -> None:
    headers = [
        ("host", "x"),
        ("cookie", "secret"),
        ("grpc-timeout", "1S"),
        ("sec-fetch-site", "none"),
        ("authorization", "Bearer t"),
        ("accept-language", "de"),
        ("trace-bin", base64.b64encode(b"\x00\xff").decode().rstrip("=")),
    ]
    assert decode_metadata(headers) == [
        ("authorization", "Bearer t"),
        ("accept-language", "de"),
        ("trace-bin", b"\x00\xff"),
    ]


@pytest.mark.parametrize("header", [("x-a", "ü"), ("x-a", "a\x7f"), ("x-bin", "not base64!")])
def test_metadata_that_grpc_forbids_is_refused(header: tuple[str, str]) -> None:
    with pytest.raises(FrameError):
        decode_metadata([header])


@given(st.lists(st.tuples(st.text(max_size=12), st.one_of(st.text(max_size=20), st.binary(max_size=20)))))
def test_no_metadata_can_add_a_line_to_the_trailers(metadata: list[tuple[str, str | bytes]]) -> None:
    fields = encode_metadata(metadata)
    lines = encode_trailers(fields)[5:].decode("ascii").split("\r\n")
    assert len(lines) == len(fields) + 1
    assert all("\n" not in line and "\r" not in line and "\0" not in line for line in lines)


@given(st.binary(max_size=50))
def test_binary_metadata_comes_back(value: bytes) -> None:
    fields = encode_metadata([("details-bin", value)])
    assert decode_metadata(fields) == [("details-bin", value)]


@given(st.integers(1, 16), st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40))
def test_any_message_comes_back_from_the_status(code: int, message: str) -> None:
    fields = dict(status_fields(code, message, [("grpc-status", "0"), ("grpc-message", "spoofed")]))
    assert fields["grpc-status"] == str(code)
    assert fields["grpc-message"].isascii()
    assert urllib.parse.unquote(fields["grpc-message"]) == message
