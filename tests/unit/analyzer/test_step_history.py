"""The history of steps as fields: what is written again, and that it reads back as it was."""

import numpy as np
import pytest

from moe_analyzer.step_history import INDEX_FIELD, StepHistory, chunk_fields, read_history, without_history
from moe_debugger.analysis.state import LayerShape, RoutingState
from moe_debugger.errors import WireFormatError
from moe_debugger.wire.codec import LayerColumns, RoutingColumns

SHAPES = [LayerShape(0, 8, 2), LayerShape(3, 8, 2)]


def batch(seed: int, first_step: int, num_steps: int) -> RoutingState:
    rng = np.random.default_rng(seed)
    num = num_steps * 4
    state = RoutingState.empty(SHAPES)
    state.fold(
        RoutingColumns(
            step=np.repeat(np.arange(first_step, first_step + num_steps, dtype=np.uint64), 4),
            forward_index=np.zeros(num, np.uint64),
            request_ids=["a"],
            request_index=np.zeros(num, np.uint32),
            position=np.arange(num, dtype=np.uint32),
            phase=np.full(num, 2, np.uint8),
            is_padding=np.zeros(num, bool),
            layers=[LayerColumns(i, 8, rng.integers(0, 8, (num, 2)).astype(np.int32)) for i in (0, 3)],
        )
    )
    return state


def test_fields_read_back_as_the_state_that_they_were_written_from() -> None:
    history, totals = StepHistory(), RoutingState({})
    stored: dict[str, bytes] = {}
    # 13,600 steps: the buckets widen twice, and the chunks of the narrow ones go.
    for number in range(17):
        delta = batch(number, 800 * number, 800)
        totals = totals.merge(delta)
        for name, value in history.take_writes(totals, delta).items():
            if value is None:
                del stored[name]
            else:
                stored[name] = value
        assert sorted(stored) == sorted([INDEX_FIELD, *chunk_fields(stored[INDEX_FIELD])])
        again = RoutingState.from_bytes(without_history(totals).to_bytes())
        assert again.layers[0].load_series is None
        StepHistory().load(stored, again)
        assert again == totals
    series = totals.layers[3].load_series
    assert series is not None
    assert series.width == 4


def test_a_flush_writes_only_what_it_changed() -> None:
    history, totals = StepHistory(), batch(0, 0, 400)
    history.take_writes(totals, totals)
    delta = batch(1, 390, 5)
    # Buckets 390 to 394 are in chunk 24; the sample holds 64 of 400 steps, perhaps one of these, and all 1024 tokens.
    writes = history.take_writes(totals.merge(delta), delta)
    assert {name for name in writes if name != "steps:samples"} == {INDEX_FIELD, "steps:24"}
    assert history.take_writes(totals.merge(delta), RoutingState({})) == {}


def test_a_missing_chunk_is_said() -> None:
    totals = batch(0, 0, 400)
    stored = {name: value for name, value in StepHistory().take_writes(totals, totals).items() if value is not None}
    del stored["steps:7"]
    with pytest.raises(WireFormatError, match="steps:7"):
        read_history(stored)
