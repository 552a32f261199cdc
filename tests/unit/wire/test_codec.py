"""The columnar codec: round trips, and a clear error for whatever does not fit."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_debugger.errors import UnsupportedFormatError, WireFormatError
from moe_debugger.v1 import routing_pb2 as pb
from moe_debugger.wire.codec import LayerColumns, RoutingColumns, decode_batch, encode_batch


def make_columns(num_tokens: int = 3, num_experts: int = 8, top_k: int = 2, seed: int = 0) -> RoutingColumns:
    rng = np.random.default_rng(seed)
    ids = np.argsort(rng.random((num_tokens, num_experts)), axis=1)[:, :top_k].astype(np.int32)
    return RoutingColumns(
        step=np.arange(num_tokens, dtype=np.uint64) + np.uint64(7),
        forward_index=np.full(num_tokens, 2**40, np.uint64),
        request_ids=["01jdabcdefghjkmnpqrstvwxyz", "01jdabcdefghjkmnpqrstvwxy0"],
        request_index=(np.arange(num_tokens) % 2).astype(np.uint32),
        position=np.arange(num_tokens, dtype=np.uint32),
        phase=np.full(num_tokens, pb.PHASE_DECODE, np.uint8),
        is_padding=np.arange(num_tokens) % 3 == 0,
        token_id=np.arange(num_tokens, dtype=np.uint32),
        layers=[
            LayerColumns(
                layer_index=0,
                num_experts=num_experts,
                expert_ids=ids,
                gate_weights=rng.random((num_tokens, top_k)).astype(np.float16),
                margin=np.full(num_tokens, np.nan, np.float32),
                router_entropy=rng.random(num_tokens).astype(np.float32),
                probability_sum=rng.random(num_experts),
            )
        ],
        captured_at_unix_ns=1,
    )


@given(
    num_tokens=st.integers(0, 40),
    num_experts=st.sampled_from([2, 8, 64, 255, 256, 257, 4096]),
    top_k=st.integers(1, 2),
    seed=st.integers(0, 9),
)
def test_a_batch_reads_back_as_it_was_written(num_tokens: int, num_experts: int, top_k: int, seed: int) -> None:
    columns = make_columns(num_tokens, num_experts, top_k, seed)
    message = pb.RoutingBatch.FromString(encode_batch(columns).SerializeToString())
    read = decode_batch(message, {0: num_experts})
    for name in ("step", "forward_index", "request_index", "position", "phase", "is_padding"):
        np.testing.assert_array_equal(getattr(read, name), getattr(columns, name), err_msg=name)
    assert read.request_ids == columns.request_ids
    for name in ("expert_ids", "gate_weights", "margin", "router_entropy", "probability_sum"):
        wanted = getattr(columns.layers[0], name)
        if num_tokens or name == "probability_sum":
            np.testing.assert_array_equal(getattr(read.layers[0], name), wanted, err_msg=name)
    assert read.layers[0].slot_status is None


def test_ids_take_one_byte_up_to_255_experts_and_two_above() -> None:
    assert encode_batch(make_columns(num_experts=255)).layers[0].expert_id_width == 1
    assert encode_batch(make_columns(num_experts=256)).layers[0].expert_id_width == 2


@pytest.mark.parametrize("num_experts", [8, 300])
def test_a_slot_without_expert_reads_back_as_minus_one(num_experts: int) -> None:
    columns = make_columns(num_experts=num_experts)
    columns.layers[0].expert_ids[1, 1] = -1
    read = decode_batch(encode_batch(columns), {0: num_experts})
    assert read.layers[0].expert_ids[1].tolist() == [columns.layers[0].expert_ids[1, 0], -1]


def test_a_flipped_bit_is_refused_by_the_checksum() -> None:
    message = encode_batch(make_columns())
    message.layers[0].expert_ids = bytes([message.layers[0].expert_ids[0] ^ 1]) + message.layers[0].expert_ids[1:]
    with pytest.raises(WireFormatError, match="checksum"):
        decode_batch(message, {0: 8})


def test_a_newer_major_is_refused_and_a_newer_minor_is_read() -> None:
    message = encode_batch(make_columns())
    message.format_version.minor = 99
    decode_batch(message, {0: 8})
    message.format_version.major = 2
    with pytest.raises(UnsupportedFormatError, match=r"2\.99.*upgrade"):
        decode_batch(message, {0: 8})


def test_a_layer_that_the_manifest_does_not_have_is_refused() -> None:
    with pytest.raises(WireFormatError, match="layer 0 is not in the source's manifest"):
        decode_batch(encode_batch(make_columns()), {1: 8})


def test_an_expert_past_the_layers_last_is_refused() -> None:
    columns = make_columns(num_experts=8)
    columns.layers[0].expert_ids[0, 0] = 7
    columns.layers[0].probability_sum = None
    with pytest.raises(WireFormatError, match="expert 7 of a layer with 4 experts"):
        decode_batch(encode_batch(columns), {0: 4})


def test_a_short_column_names_its_length_and_what_was_expected() -> None:
    columns = make_columns(num_tokens=3)
    columns.position = columns.position[:2]
    message = encode_batch(columns)
    message.num_tokens = 3
    with pytest.raises(WireFormatError, match=r"step_offset has 12 bytes|position has 8 bytes, expected 12"):
        decode_batch(message, {0: 8})


def test_a_request_index_past_the_ids_is_refused() -> None:
    columns = make_columns()
    columns.request_ids = ["01jdabcdefghjkmnpqrstvwxyz"]
    with pytest.raises(WireFormatError, match="request_index goes past the 1 request ids"):
        decode_batch(encode_batch(columns), {0: 8})
