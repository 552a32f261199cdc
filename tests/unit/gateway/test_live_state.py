"""LiveState: a snapshot with deltas, by a hand-worked example and against a slow reference."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_debugger.v1 import control_pb2, routing_pb2, session_pb2
from moe_gateway.live_state import Applied, LiveState

SIZES = (3, 2)


def _snapshot(counts: list[list[int]]) -> session_pb2.SessionSnapshot:
    return session_pb2.SessionSnapshot(
        last_step=5,
        layers=[
            session_pb2.LayerSnapshot(
                description=routing_pb2.LayerDescription(layer_index=10 + row, num_experts=len(values)),
                num_tokens=sum(values),
                expert_counts=np.array(values, "<u8").tobytes(),
            )
            for row, values in enumerate(counts)
        ],
    )


def _delta(partition: int, flush: int, counts: dict[int, list[int]], last_step: int = 0) -> control_pb2.LiveDelta:
    layers = [
        control_pb2.LayerDelta(
            layer_index=layer, num_tokens=sum(values), expert_counts=np.array(values, "<u4").tobytes()
        )
        for layer, values in counts.items()
    ]
    return control_pb2.LiveDelta(partition=partition, flush=flush, layers=layers, last_step=last_step)


def _shown(state: LiveState) -> tuple[int, list[int], list[int]]:
    frame = state.to_frame()
    return (
        frame.sequence,
        np.frombuffer(frame.expert_counts, "<u8").tolist(),
        np.frombuffer(frame.num_tokens, "<u8").tolist(),
    )


def test_deltas_advance_the_counts_by_partition() -> None:
    state = LiveState(_snapshot([[1, 2, 3], [4, 5]]), {3: 7})
    assert state.apply(_delta(3, 8, {10: [0, 0, 2]}, last_step=9)) is Applied.DONE
    assert state.apply(_delta(5, 1, {11: [1, 0]})) is Applied.DONE
    assert _shown(state) == (9, [1, 2, 5, 5, 5], [8, 10])
    assert state.last_step == 9
    snapshot = state.to_snapshot()
    assert (snapshot.sequence, snapshot.layers[0].num_tokens) == (9, 8)
    assert np.frombuffer(snapshot.layers[0].expert_counts, "<u8").tolist() == [1, 2, 5]
    assert all(layer.expert_counts == b"" for layer in state.to_snapshot(with_counts=False).layers)


@pytest.mark.parametrize(
    ("delta", "expected"),
    [
        (_delta(3, 7, {10: [9, 9, 9]}), Applied.OLD),
        (_delta(3, 2, {10: [9, 9, 9]}), Applied.OLD),
        (_delta(3, 9, {10: [9, 9, 9]}), Applied.HOLE),
        (_delta(4, 2, {10: [9, 9, 9]}), Applied.HOLE),
        (_delta(3, 8, {10: [9, 9, 9], 99: [1]}), Applied.HOLE),
        (_delta(3, 8, {11: [1, 1], 10: [9, 9]}), Applied.HOLE),
    ],
    ids=["repeated", "older", "one is missing", "new partition not from its start", "unknown layer", "other width"],
)
def test_delta_that_does_not_follow_changes_nothing(delta: control_pb2.LiveDelta, expected: Applied) -> None:
    state = LiveState(_snapshot([[1, 2, 3], [4, 5]]), {3: 7})
    before = _shown(state)
    assert state.apply(delta) is expected
    assert _shown(state) == before


def test_snapshot_that_contradicts_itself_is_refused() -> None:
    snapshot = _snapshot([[1, 2, 3]])
    snapshot.layers[0].expert_counts = bytes(8)
    with pytest.raises(ValueError, match="1 counts for 3 experts"):
        LiveState(snapshot, {})


@given(st.lists(st.tuples(st.integers(0, 2), st.lists(st.integers(0, 9), min_size=5, max_size=5))), st.randoms())
def test_any_order_and_repetition_never_overcounts(flushes: list[tuple[int, list[int]]], random: object) -> None:
    """Whatever arrives, the state equals the sum of an unbroken prefix of each partition."""
    numbers = dict.fromkeys(range(3), 0)
    deltas = []
    for partition, values in flushes:
        numbers[partition] += 1
        deltas.append((partition, numbers[partition], values))
    arriving = deltas * 2
    random.shuffle(arriving)  # type: ignore[attr-defined]
    state = LiveState(_snapshot([[0, 0, 0], [0, 0]]), {})
    applied = set()
    for partition, flush, values in arriving:
        delta = _delta(partition, flush, {10: values[:3], 11: values[3:]})
        if state.apply(delta) is Applied.DONE:
            applied.add((partition, flush))
    expected = np.zeros(5, int)
    for partition, flush, values in deltas:
        if (partition, flush) in applied:
            assert all((partition, earlier) in applied for earlier in range(1, flush))
            expected += values
    assert _shown(state)[:2] == (len(applied), expected.tolist())
