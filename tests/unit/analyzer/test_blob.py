"""Redis values: round trip, damage, a newer version."""

import pytest

from moe_analyzer.blob import pack, unpack
from moe_debugger.errors import UnsupportedFormatError, WireFormatError


def test_pack_and_unpack_round_trip() -> None:
    assert unpack(pack({"a": 1}, [b"xy", b"", b"z"])) == ({"a": 1}, [b"xy", b"", b"z"])


def test_unpack_refuses_damage_and_a_newer_major() -> None:
    data = bytearray(pack({"a": 1}, [b"column"]))
    newer = bytes(data[:4]) + b"\x02" + bytes(data[5:])
    with pytest.raises(UnsupportedFormatError, match="upgrade"):
        unpack(newer)
    data[-1] ^= 1
    with pytest.raises(WireFormatError, match="checksum"):
        unpack(bytes(data))
    for size in (0, 3, 20):
        with pytest.raises(WireFormatError):
            unpack(bytes(data[:size]))
