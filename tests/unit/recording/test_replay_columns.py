"""From rows back to the columns of the wire: nothing is lost on the way."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recorded_rows import INFOS, assert_equal, record
from routing_rows import forward, layer_infos

from moe_debugger import Decisions, InvalidInputError, open_recording
from moe_debugger.capture import LayerInfo
from moe_debugger.recording.columns import decisions_to_columns
from moe_debugger.recording.republish import _points, replay_to_fleet
from moe_debugger.training.series import NO_INDEX, SeriesPoint, SeriesTable
from moe_debugger.wire.codec import decode_batch, encode_batch


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_rows_become_columns_that_become_the_same_rows(data: st.DataObject) -> None:
    options: dict[str, Any] = {
        "has_tokens": data.draw(st.booleans()),
        "has_logits": data.draw(st.booleans()),
        "has_statistics": data.draw(st.booleans()),
    }
    batches = [
        forward(index, num_tokens=data.draw(st.integers(1, 6)), **options)
        for index in range(data.draw(st.integers(1, 5)))
    ]
    rows = Decisions(batches, INFOS)
    columns = decisions_to_columns(rows, 7)
    assert {each.captured_at_unix_ns for each in columns} == {7}
    assert_equal(Decisions(columns, INFOS), rows)
    # And over the wire, whose weights are float16.
    sent = [decode_batch(encode_batch(each), {0: 8, 1: 8}) for each in columns]
    back = Decisions(sent, INFOS)
    for name in ("step", "forward_index", "position", "is_padding", "layer_index", "expert_ids", "slot_status"):
        np.testing.assert_array_equal(back[name], rows[name], err_msg=name)
    assert back.request_id.tolist() == rows.request_id.tolist()


def test_slots_without_an_expert_and_layers_that_saw_fewer_tokens_stay_so() -> None:
    batches = [forward(index, shapes=((8, 3), (4, 1))) for index in range(3)]
    for batch in batches:
        part = batch.layers[1]
        part.row_index = np.array([0, 2, 5], np.uint32)
        for name in ("expert_ids", "gate_weights", "margin", "router_entropy", "router_logsumexp", "top1_probability"):
            setattr(part, name, getattr(part, name)[[0, 2, 5]])
        batch.layers[0].expert_ids = np.where([[True, False, True]], batch.layers[0].expert_ids, -1).astype(np.int32)
        batch.layers[0].slot_status = np.tile(np.array([1, 2, 1], np.uint8), (6, 1))
        batch.layers[0].intended_expert_ids = np.maximum(batch.layers[0].expert_ids, 0)
    infos = layer_infos((8, 3), (4, 1))
    rows = Decisions(batches, infos)
    columns = decisions_to_columns(rows)
    assert len(columns) == 2
    assert_equal(Decisions(columns, infos), rows)


def test_stacks_are_never_put_together() -> None:
    infos = [
        LayerInfo(0, 0, "encoder.0", "encoder", 8, 2),
        LayerInfo(1, 0, "decoder.0", "decoder", 8, 2),
        LayerInfo(2, 1, "decoder.1", "decoder", 8, 2),
    ]
    rows = Decisions([forward(0, shapes=((8, 2), (8, 2), (8, 2)))], infos)
    columns = decisions_to_columns(rows)
    assert [[layer.layer_index for layer in each.layers] for each in columns] == [[0], [1, 2]]


def test_points_of_all_experts_are_one_point() -> None:
    made = [
        SeriesPoint(1, "loss", NO_INDEX, False, np.array([0.5])),
        SeriesPoint(1, "expert_gradient_norm", 0, True, np.array([1.0, 2.0, 3.0])),
        SeriesPoint(1, "expert_gradient_norm", 1, True, np.array([4.0, 5.0])),
        SeriesPoint(2, "router_weight_norm", 1, False, np.array([9.0])),
    ]
    assert _points(SeriesTable(made)) == [each.to_message() for each in made]


@pytest.mark.parametrize("speed", [0, -1, float("nan")])
def test_a_speed_that_is_none_is_refused(tmp_path: Path, speed: float) -> None:
    record(tmp_path / "rec", num_forwards=1)
    with pytest.raises(InvalidInputError, match="speed"):
        replay_to_fleet(open_recording(tmp_path / "rec"), "nats://127.0.0.1:1", speed=speed)
