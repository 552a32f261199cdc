"""Joining and splitting keeps every row, whatever the sizes."""

import numpy as np
import numpy.typing as npt
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_debugger.publish.batching import join_and_split
from moe_debugger.v1 import routing_pb2 as pb
from moe_debugger.wire.codec import LayerColumns, RoutingColumns, decode_batch, encode_batch
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
                random.random((num_tokens, 4)).astype(np.float16),
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
