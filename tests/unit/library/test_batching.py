"""Joining and splitting keeps every row, whatever the sizes."""

import numpy as np
import numpy.typing as npt
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_debugger.analysis.state import LayerShape, RoutingState
from moe_debugger.publish.batching import join_and_split, join_counts, reduce_to_counts, split_counts
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
from moe_debugger.wire.ids import new_id

_REQUESTS = [new_id() for _ in range(6)]
NUM_EXPERTS = 300


def _item(forward: int, num_tokens: int, requests: list[int], has_tokens: bool) -> RoutingColumns:
    random = np.random.default_rng(forward)
    return RoutingColumns(
        step=np.full(num_tokens, forward, np.uint64),
        forward_index=np.full(num_tokens, forward, np.uint64),
        request_ids=[_REQUESTS[i] for i in requests],
        request_index=random.integers(0, len(requests), num_tokens).astype(np.uint32),
        position=np.arange(num_tokens, dtype=np.uint32),
        phase=np.full(num_tokens, pb.PHASE_PREFILL, np.uint8),
        is_padding=random.random(num_tokens) < 0.2,
        token_id=random.integers(0, 99, num_tokens).astype(np.uint32) if has_tokens else None,
        layers=[
            LayerColumns(
                i,
                NUM_EXPERTS,
                random.integers(0, NUM_EXPERTS, (num_tokens, 4)).astype(np.int32),
                random.random((num_tokens, 4)).astype(np.float16).astype(np.float32),
                margin=random.random(num_tokens).astype(np.float32),
                probability_sum=random.random(NUM_EXPERTS),
            )
            for i in range(3)
        ],
    )


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(1, 9000), st.lists(st.integers(0, 5), min_size=1, max_size=4, unique=True), st.booleans()
        ),
        min_size=1,
        max_size=8,
    )
)
def test_every_row_arrives_once_in_order(sizes: list[tuple[int, list[int], bool]]) -> None:
    items = [_item(forward, *size) for forward, size in enumerate(sizes)]
    parts = []
    for part in join_and_split(items):
        batch = encode_batch(part)
        assert batch.ByteSize() < 480 * 1024
        parts.append(decode_batch(batch, dict.fromkeys(range(3), NUM_EXPERTS)))
    for name in ("step", "forward_index", "position", "is_padding"):
        expected = np.concatenate([getattr(item, name) for item in items])
        assert np.array_equal(np.concatenate([getattr(part, name) for part in parts]), expected)
    requests = [part.request_ids[index] for part in parts for index in part.request_index]
    assert requests == [item.request_ids[index] for item in items for index in item.request_index]
    for place in range(3):
        for name in ("expert_ids", "gate_weights", "margin"):
            expected = np.concatenate([getattr(item.layers[place], name) for item in items])
            assert np.array_equal(np.concatenate([getattr(part.layers[place], name) for part in parts]), expected)
        sums = [part.layers[place].probability_sum for part in parts]
        # A part without a valid token carries no share; with any valid token in an item its whole sum arrives.
        if all((~item.is_padding).any() for item in items):
            whole = [item.layers[place].probability_sum for item in items]
            np.testing.assert_allclose(_total(sums), _total(whole))
    tokens = [part.token_id for part in parts if part.token_id is not None]
    given_tokens = [item.token_id for item in items if item.token_id is not None]
    if given_tokens:
        assert np.array_equal(np.concatenate(tokens), np.concatenate(given_tokens))


def _total(sums: list[npt.NDArray[np.float64] | None]) -> npt.NDArray[np.float64]:
    total: npt.NDArray[np.float64] = np.sum(np.stack([x for x in sums if x is not None]), axis=0)
    return total


def _subset(forward: int, num_tokens: int) -> RoutingColumns:
    """Columns whose second layer saw every third row."""
    item = _item(forward, num_tokens, [0, 1], True)
    layer = item.layers[1]
    assert layer.gate_weights is not None
    rows = np.arange(forward % 3, num_tokens, 3, dtype=np.uint32)
    item.layers[1] = LayerColumns(
        1, NUM_EXPERTS, layer.expert_ids[rows], layer.gate_weights[rows], row_index=rows, num_identity_experts=2
    )
    return item


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 9000), min_size=1, max_size=6))
def test_rows_that_a_layer_did_not_see_stay_unseen_over_joins_and_splits(sizes: list[int]) -> None:
    items = [_subset(forward, size) for forward, size in enumerate(sizes)]
    expected = [
        (item.forward_index[0], int(row), ids.tolist())
        for item in items
        for row, ids in zip(item.layers[1].row_index, item.layers[1].expert_ids, strict=True)  # type: ignore[arg-type]
    ]
    found = []
    for part in join_and_split(items):
        batch = encode_batch(part)
        assert batch.ByteSize() < 480 * 1024
        read = decode_batch(batch, dict.fromkeys(range(3), NUM_EXPERTS), {1: 2})
        layer = read.layers[1]
        assert layer.num_identity_experts == 2
        rows = layer.row_index
        assert rows is not None
        found += [
            (read.forward_index[row], int(read.position[row]), ids.tolist())
            for row, ids in zip(rows, layer.expert_ids, strict=True)
        ]
    assert found == expected
    if sum(sizes) < 1000:
        assert len(list(join_and_split(items))) == 1, "small forwards share a message, subsets or not"


def _with_slots(num_tokens: int, phases: list[int]) -> RoutingColumns:
    item = _item(1, num_tokens, [0], False)
    random = np.random.default_rng(5)
    item.phase = random.choice(np.array(phases, np.uint8), num_tokens)
    for layer in item.layers:
        layer.num_identity_experts = 2
        layer.slot_status = random.choice(np.array([1, 1, 1, 2, 3, 4, 5], np.uint8), layer.expert_ids.shape)
        layer.expert_ids = np.where(layer.slot_status == 4, NUM_EXPERTS + 1, layer.expert_ids)
        layer.expert_ids = np.where(np.isin(layer.slot_status, [2, 3, 5]), -1, layer.expert_ids).astype(np.int32)
    return item


def test_sums_and_rows_fold_into_the_same_state() -> None:
    shapes = [LayerShape(index, NUM_EXPERTS, 4, 2) for index in range(3)]
    items = [_with_slots(200, [pb.PHASE_PREFILL, pb.PHASE_DECODE]), _with_slots(90, [pb.PHASE_DECODE])]
    by_rows, by_sums = RoutingState.empty(shapes), RoutingState.empty(shapes)
    for item in items:
        by_rows.fold(item)
    sums = [sums for item in items for sums in reduce_to_counts(item)]
    joined = join_counts(sums)
    for part in joined:
        experts = dict.fromkeys(range(3), NUM_EXPERTS)
        by_sums.fold_counts(decode_counts(encode_counts(part), experts, dict.fromkeys(range(3), 2)))
    for index, wanted in by_rows.layers.items():
        got = by_sums.layers[index]
        assert got.counts.tolist() == wanted.counts.tolist()
        for name in ("tokens", "padding", "dropped_slots", "skipped_slots", "identity_slots", "unused_slots"):
            assert getattr(got, f"num_{name}") == getattr(wanted, f"num_{name}"), name
    assert by_sums.phase_tokens.tolist() == by_rows.phase_tokens.tolist()
    # Only the second item is of one phase, so only its sum of probabilities can be told apart.
    assert by_sums.layers[0].num_probability_tokens == int((~items[1].is_padding).sum())
    assert {part.phase for part in joined} == {pb.PHASE_PREFILL, pb.PHASE_DECODE}


def test_sums_of_very_many_layers_are_split_below_the_message_limit() -> None:
    layers = [
        LayerCountColumns(i, 512, 0, 1, 0, np.ones(512, np.uint64), probability_sum=np.ones(512)) for i in range(100)
    ]
    parts = list(split_counts(CountsColumns(0, 0, pb.PHASE_DECODE, 0, layers)))
    assert [layer.layer_index for part in parts for layer in part.layers] == list(range(100))
    assert len(parts) == 2
    assert max(encode_counts(part).ByteSize() for part in parts) < 500 * 1024
