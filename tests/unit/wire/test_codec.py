"""The columnar codec: round trips, and a clear error for whatever does not fit."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_debugger.errors import UnsupportedFormatError, WireFormatError
from moe_debugger.v1 import routing_pb2 as pb
from moe_debugger.wire.codec import (
    CountsColumns,
    LayerColumns,
    LayerCountColumns,
    RoutingColumns,
    decode_batch,
    decode_counts,
    encode_batch,
    encode_counts,
)


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
                # Values that float16 holds, so that they come back as they were.
                gate_weights=rng.random((num_tokens, top_k)).astype(np.float16).astype(np.float32),
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


def test_gate_weights_are_float32_here_and_float16_on_the_wire() -> None:
    columns = make_columns(num_tokens=2)
    columns.layers[0].gate_weights = np.array([[1 / 3, 2 / 3], [70_000, 1]], np.float32)
    message = encode_batch(columns)
    assert len(message.layers[0].gate_weights) == 2 * 2 * 2
    weights = decode_batch(message, {0: 8}).layers[0].gate_weights
    assert weights is not None
    assert weights.dtype == np.float32
    assert weights[0].tolist() == pytest.approx([1 / 3, 2 / 3], rel=2**-11)
    assert weights[1].tolist() == [np.inf, 1], "what float16 cannot hold is not clipped to a value that looks true"


@pytest.mark.parametrize(("num_experts", "num_identity", "width"), [(8, 4, 1), (250, 5, 1), (250, 6, 2), (512, 256, 2)])
def test_identity_experts_have_the_ids_after_the_routed_ones(num_experts: int, num_identity: int, width: int) -> None:
    columns = make_columns(num_experts=num_experts)
    layer = columns.layers[0]
    layer.num_identity_experts = num_identity
    layer.expert_ids[0] = [num_experts + num_identity - 1, num_experts]
    message = encode_batch(columns)
    assert message.layers[0].expert_id_width == width
    read = decode_batch(message, {0: num_experts}, {0: num_identity}).layers[0]
    np.testing.assert_array_equal(read.expert_ids, layer.expert_ids)
    assert (read.num_experts, read.num_identity_experts) == (num_experts, num_identity)
    with pytest.raises(WireFormatError, match=f"expert {num_experts + num_identity - 1} of a layer"):
        decode_batch(message, {0: num_experts})


def test_a_slot_that_reached_no_expert_has_no_id_on_the_wire() -> None:
    columns = make_columns(num_tokens=1)
    columns.layers[0].expert_ids = np.array([[3, 5]], np.int32)
    columns.layers[0].slot_status = np.array([[pb.SLOT_STATUS_ROUTED, pb.SLOT_STATUS_DROPPED]], np.uint8)
    read = decode_batch(encode_batch(columns), {0: 8}).layers[0]
    assert read.expert_ids.tolist() == [[3, -1]]
    assert columns.layers[0].expert_ids.tolist() == [[3, 5]], "the caller's columns stay as they are"


def test_a_layer_that_saw_no_row_reads_back() -> None:
    columns = make_columns(num_tokens=3)
    columns.layers[0] = LayerColumns(0, 8, np.zeros((0, 2), np.int32), row_index=np.zeros(0, np.uint32))
    read = decode_batch(encode_batch(columns), {0: 8}).layers[0]
    assert read.expert_ids.shape == (0, 2)
    assert read.row_index is not None
    assert read.row_index.tolist() == []


def make_counts() -> CountsColumns:
    counts = np.array([3, 0, 1, 0], np.uint64)
    return CountsColumns(
        first_step=2**40,
        last_step=2**40 + 3,
        phase=pb.PHASE_TRAIN,
        captured_at_unix_ns=9,
        layers=[
            LayerCountColumns(0, 4, 2, 5, 1, counts, 3, 2, 1, np.array([2.0, 1.0, 1.0, 1.0])),
            LayerCountColumns(3, 2, 0, 0, 0, np.zeros(2, np.uint64)),
        ],
    )


def test_counts_read_back_as_they_were_written() -> None:
    wanted = make_counts()
    message = pb.CountsBatch.FromString(encode_counts(wanted).SerializeToString())
    read = decode_counts(message, {0: 4, 3: 2}, {0: 2})
    for name in ("first_step", "last_step", "phase", "captured_at_unix_ns", "num_tokens", "num_decisions"):
        assert getattr(read, name) == getattr(wanted, name), name
    for layer, expected in zip(read.layers, wanted.layers, strict=True):
        for name in LayerCountColumns.__slots__:
            np.testing.assert_array_equal(getattr(layer, name), getattr(expected, name), err_msg=name)


def test_counts_that_do_not_fit_are_refused_with_the_reason() -> None:
    message = encode_counts(make_counts())
    with pytest.raises(WireFormatError, match="layer 3 is not in the source's manifest"):
        decode_counts(message, {0: 4})
    with pytest.raises(WireFormatError, match="expert_counts has 32 bytes, expected 64"):
        decode_counts(message, {0: 8, 3: 2})
    message.layers[0].expert_counts = bytes(32)
    with pytest.raises(WireFormatError, match="checksum"):
        decode_counts(message, {0: 4, 3: 2})


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
