"""`Decisions`: every column of the captured routes, against rows written down one by one."""

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from routing_rows import DROPPED, IDENTITY, UNUSED, forward, layer_infos, rows_one_by_one

from moe_debugger import Decisions, DependencyMissingError
from moe_debugger._layers import Layers
from moe_debugger._row_blocks import COLUMNS
from moe_debugger._row_packing import pack
from moe_debugger.wire.codec import LayerColumns, RoutingColumns

_WIDE = {"expert_ids": -1, "gate_weights": np.nan, "slot_status": UNUSED, "intended_expert_ids": -1, "logits": np.nan}


def _assert_same(decisions: Decisions, batches: Sequence[RoutingColumns]) -> None:
    expected = list(rows_one_by_one(batches))
    assert len(decisions) == len(expected)
    for name in decisions:
        if name in ("request_index", "module_name", "rank"):
            continue
        column = decisions[name]
        if column.ndim == 2:
            wide = np.full(column.shape, _WIDE[name], np.float64)
            for row, values in enumerate(expected):
                if values[name] is not None:
                    wide[row, : len(values[name])] = values[name]
            np.testing.assert_array_equal(column.astype(np.float64), wide, err_msg=name)
        else:
            np.testing.assert_array_equal(column, np.array([values[name] for values in expected]), err_msg=name)


def test_all_columns_are_there_in_the_documented_order_with_their_dtypes() -> None:
    batch = forward(0, has_tokens=True, has_logits=True, shapes=((8, 2), (8, 2)))
    batch.layers[0].intended_expert_ids = batch.layers[0].expert_ids[:, ::-1].copy()
    decisions = Decisions([batch], layer_infos((8, 2), (8, 2)), rank=3)
    assert tuple(decisions) == tuple(decisions.columns()) == COLUMNS
    assert {name: (column.dtype.name, column.shape) for name, column in decisions.items()} == {
        "step": ("uint64", (12,)),
        "forward_index": ("uint64", (12,)),
        "phase": ("uint8", (12,)),
        "request_id": ("object", (12,)),
        "request_index": ("uint32", (12,)),
        "position": ("uint32", (12,)),
        "token_id": ("int32", (12,)),
        "is_padding": ("bool", (12,)),
        "layer_index": ("uint32", (12,)),
        "module_name": ("object", (12,)),
        "rank": ("uint32", (12,)),
        "expert_ids": ("int32", (12, 2)),
        "gate_weights": ("float32", (12, 2)),
        "slot_status": ("uint8", (12, 2)),
        "intended_expert_ids": ("int32", (12, 2)),
        "margin": ("float32", (12,)),
        "router_entropy": ("float32", (12,)),
        "router_logsumexp": ("float32", (12,)),
        "top1_probability": ("float32", (12,)),
        "logits": ("float16", (12, 8)),
    }
    assert decisions.rank.tolist() == [3] * 12
    assert decisions.module_name.tolist() == ["model.layers.0.mlp"] * 6 + ["model.layers.1.mlp"] * 6
    assert decisions["expert_ids"] is decisions.expert_ids
    assert decisions["request_id"] is decisions.request_id


def test_columns_that_no_layer_has_are_left_out() -> None:
    decisions = Decisions([forward(0)], layer_infos((8, 2), (8, 2)))
    assert set(COLUMNS) - set(decisions) == {"token_id", "intended_expert_ids", "logits"}
    assert all(getattr(decisions, name) is None for name in ("token_id", "intended_expert_ids", "logits"))
    for name in ("logits", "nothing", "layers"):
        with pytest.raises(KeyError):
            decisions[name]


def test_no_rows_give_empty_columns_of_the_same_shape() -> None:
    decisions = Decisions([], layer_infos((8, 2), (16, 4)))
    assert len(decisions) == 0
    assert decisions.expert_ids.shape == decisions.gate_weights.shape == (0, 4)
    assert (decisions.request_id.shape, decisions.module_name.shape) == ((0,), (0,))
    assert len(decisions.to_pandas()) == decisions.to_arrow().num_rows == 0
    assert "0 decisions" in str(decisions)


def test_layers_may_differ_in_experts_and_slots() -> None:
    shapes = ((8, 2), (64, 6), (4, 1))
    batches = [forward(index, shapes=shapes, has_logits=True) for index in range(3)]
    decisions = Decisions(batches, layer_infos(*shapes))
    _assert_same(decisions, batches)
    assert decisions.expert_ids.shape[1] == 6
    assert decisions.logits is not None
    assert decisions.logits.shape[1] == 64
    narrow = decisions.layer_index == 2
    assert (decisions.expert_ids[narrow, 1:] == -1).all()
    assert (decisions.slot_status[narrow, 1:] == UNUSED).all()
    assert np.isnan(decisions.gate_weights[narrow, 1:]).all()
    assert np.isnan(decisions.logits[narrow, 4:]).all()


def test_dropped_and_identity_slots_keep_their_status_and_lose_the_weight_that_nothing_had() -> None:
    batch = forward(0, shapes=((4, 2),), num_tokens=3)
    layer = batch.layers[0]
    layer.num_identity_experts = 2
    layer.expert_ids = np.array([[0, 5], [-1, 1], [-1, -1]], dtype=np.int32)
    layer.slot_status = np.array([[1, IDENTITY], [DROPPED, 1], [DROPPED, DROPPED]], dtype=np.uint8)
    layer.intended_expert_ids = np.array([[0, 5], [3, 1], [2, 0]], dtype=np.int32)
    layer.gate_weights = np.array([[0.5, 0.25], [0.0, 1.0], [0.0, 0.0]], dtype=np.float32)
    decisions = Decisions([batch], layer_infos((4, 2)))
    assert decisions.expert_ids.tolist() == [[0, 5], [-1, 1], [-1, -1]]
    assert decisions.slot_status.tolist() == [[1, 4], [2, 1], [2, 2]]
    assert decisions.intended_expert_ids is not None
    assert decisions.intended_expert_ids.tolist() == [[0, 5], [3, 1], [2, 0]]
    np.testing.assert_array_equal(decisions.gate_weights, [[0.5, 0.25], [np.nan, 1.0], [np.nan, np.nan]])
    assert layer.gate_weights[1, 0] == 0, "what the capture goes on to send is left as it was"


def test_intended_ids_equal_the_executed_ones_at_layers_that_make_no_difference() -> None:
    batch = forward(0, shapes=((8, 2), (8, 3)))
    batch.layers[0].intended_expert_ids = (batch.layers[0].expert_ids + 1) % 8
    decisions = Decisions([batch, forward(1, shapes=((8, 2), (8, 3)))], layer_infos((8, 2), (8, 3)))
    assert decisions.intended_expert_ids is not None
    differs = (decisions.intended_expert_ids != decisions.expert_ids).any(axis=1)
    assert differs.tolist() == ((decisions.layer_index == 0) & (decisions.forward_index == 0)).tolist()


def test_stacks_of_one_forward_stand_one_after_the_other_with_their_own_tokens() -> None:
    encoder = forward(0, shapes=((8, 1), (8, 1)), num_tokens=5)
    decoder = forward(0, shapes=((8, 2), (8, 2)), num_tokens=3, first_layer=2, seed=1)
    step = forward(1, shapes=((8, 2), (8, 2)), num_tokens=2, first_layer=2)
    decisions = Decisions([encoder, decoder, step], layer_infos((8, 1), (8, 1), (8, 2), (8, 2)))
    _assert_same(decisions, [encoder, decoder, step])
    assert decisions.layer_index.tolist() == [0] * 5 + [1] * 5 + [2] * 3 + [3] * 3 + [2] * 2 + [3] * 2
    assert decisions.forward_index.tolist() == [0] * 16 + [1] * 4


def test_a_layer_that_saw_some_tokens_has_rows_for_those_alone() -> None:
    batch = forward(0, num_tokens=6, has_tokens=True)
    seen = np.array([1, 4, 5], dtype=np.uint32)
    layer = batch.layers[1]
    assert layer.gate_weights is not None
    batch.layers[1] = LayerColumns(1, 8, layer.expert_ids[seen], layer.gate_weights[seen], row_index=seen)
    batches = [batch, forward(1, num_tokens=6, has_tokens=True)]
    decisions = Decisions(batches, layer_infos((8, 2), (8, 2)))
    _assert_same(decisions, batches)
    assert decisions.position[6:9].tolist() == [1, 4, 5]
    assert np.isnan(decisions.margin[6:9]).all()


def test_forwards_without_ids_have_token_minus_one_beside_those_with_ids() -> None:
    batches = [forward(0, has_tokens=True), forward(1)]
    decisions = Decisions(batches, layer_infos((8, 2), (8, 2)))
    assert decisions.token_id is not None
    _assert_same(decisions, batches)
    assert (decisions.token_id[decisions.forward_index == 1] == -1).all()


def test_requests_of_many_forwards_are_numbered_once() -> None:
    batches = [forward(index) for index in range(8)]
    decisions = Decisions([pack(batches[:3]), *batches[3:5], pack(batches[5:])], layer_infos((8, 2), (8, 2)))
    _assert_same(decisions, batches)
    assert list(decisions.request_ids) == list(dict.fromkeys(decisions.request_id))
    assert sorted(decisions.request_ids) == [f"request-{group}-{number}" for group in (0, 1) for number in (0, 1)]
    assert decisions.request_id.tolist() == [decisions.request_ids[index] for index in decisions.request_index]


def test_rows_of_no_request_have_an_empty_id_and_not_another_requests() -> None:
    nameless = forward(1)
    nameless.request_ids, nameless.request_index = [], np.zeros(6, np.uint32)
    decisions = Decisions([forward(0), nameless], layer_infos((8, 2), (8, 2)))
    assert set(decisions.request_id[decisions.forward_index == 1]) == {""}
    assert "" not in set(decisions.request_id[decisions.forward_index == 0])


# The last one's ids do not fit 16 bits.
_SHAPES: list[tuple[tuple[int, int], ...]] = [((8, 2),), ((8, 2), (4, 3)), ((300, 1), (40000, 2))]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 5), st.sampled_from(_SHAPES), st.booleans()), max_size=8), st.integers(1, 4))
def test_packing_any_forwards_in_any_groups_gives_the_same_rows(
    choices: list[tuple[int, tuple[tuple[int, int], ...], bool]], group: int
) -> None:
    batches = [
        forward(index, num_tokens=tokens, shapes=shapes, has_tokens=flag, has_statistics=not flag)
        for index, (tokens, shapes, flag) in enumerate(choices)
    ]
    blocks = [pack(batches[start : start + group]) for start in range(0, len(batches), group)]
    whole, grouped = Decisions(batches, ()), Decisions(blocks, ())
    _assert_same(whole, batches)
    assert list(whole) == list(grouped)
    for name in whole:
        np.testing.assert_array_equal(whole[name], grouped[name], err_msg=name)


def _full() -> Decisions:
    batches = [forward(index, has_tokens=True, has_logits=True, shapes=((8, 2), (6, 3))) for index in range(5)]
    return Decisions(batches, layer_infos((8, 2), (6, 3)), rank=1)


def test_pandas_holds_the_same_values_with_texts_as_categories() -> None:
    decisions = _full()
    frame = decisions.to_pandas()
    assert list(frame.columns) == list(decisions)
    assert frame["request_id"].dtype == "category"
    assert frame["module_name"].dtype == "category"
    for name in decisions:
        values = frame[name].tolist()
        if decisions[name].ndim == 2:
            np.testing.assert_array_equal(np.array(values), decisions[name], err_msg=name)
        else:
            np.testing.assert_array_equal(np.array(values), decisions[name], err_msg=name)
    one_per_slot = frame[["layer_index", "expert_ids"]].explode("expert_ids")
    assert len(one_per_slot) == len(decisions) * 3
    assert frame.groupby("module_name", observed=True).size().tolist() == [30, 30]


def test_pandas_works_without_pyarrow(monkeypatch: pytest.MonkeyPatch) -> None:
    decisions = _full()
    expected = decisions.to_pandas()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    frame = decisions.to_pandas()
    for name in ("expert_ids", "gate_weights", "logits", "request_id"):
        np.testing.assert_array_equal(np.array(frame[name].tolist()), np.array(expected[name].tolist()), err_msg=name)
    with pytest.raises(DependencyMissingError, match=r"moe-debugger\[pandas\]"):
        decisions.to_arrow()


def test_arrow_holds_the_same_values_with_texts_in_dictionaries() -> None:
    import pyarrow as pa

    decisions = _full()
    table = decisions.to_arrow()
    assert table.column_names == list(decisions)
    assert pa.types.is_dictionary(table.schema.field("request_id").type)
    assert pa.types.is_dictionary(table.schema.field("module_name").type)
    assert table.schema.field("expert_ids").type.list_size == 3
    for name in decisions:
        np.testing.assert_array_equal(np.array(table.column(name).to_pylist()), decisions[name], err_msg=name)


def test_texts_cost_a_reference_a_row() -> None:
    batches = [forward(index, num_tokens=500) for index in range(20)]
    decisions = Decisions(batches, layer_infos((8, 2), (8, 2)))
    assert decisions.request_id.nbytes == decisions.module_name.nbytes == 8 * len(decisions)
    assert len({id(name) for name in decisions.request_id}) == len(decisions.request_ids)
    frame = decisions.to_pandas()
    assert frame["request_id"].memory_usage(index=False, deep=True) < 3 * len(decisions)
    # Arrow's lists have their numbers and an offset, no object for each.
    assert frame["expert_ids"].memory_usage(index=False, deep=True) < 13 * len(decisions)


def test_analysis_takes_the_columns_as_they_are() -> None:
    from moe_debugger import analyze

    batches = [forward(index, num_tokens=50) for index in range(4)]
    analysis = analyze(Decisions(batches, layer_infos((8, 2), (8, 2))), num_experts=8, top_k=2)
    expected = np.zeros(8, int)
    for batch in batches:
        np.add.at(expected, batch.layers[0].expert_ids[~batch.is_padding], 1)
    assert analysis.metrics[0].num_assignments == int(expected.sum())


def test_layers_print_and_convert_with_every_field() -> None:
    infos = layer_infos((8, 2), (16, 4))
    layers = Layers(reversed(infos))
    assert layers == tuple(infos)
    names = {
        "layer_index", "module_name", "stack", "num_experts", "top_k", "num_shared_experts", "num_identity_experts",
        "scoring_function", "weight_meaning", "unavailable_reason", "site", "block_scale",
    }  # fmt: skip
    frame = layers.to_pandas()
    assert names <= set(frame.columns)
    assert names <= set(layers.to_dict()[0])
    assert frame["num_experts"].tolist() == [8, 16]
    text = str(layers)
    assert text.splitlines()[0] == "2 MoE layers"
    for value in ("model.layers.1.mlp", "16", "decoder", "mlp", "multiplies the expert's output"):
        assert value in text.splitlines()[-1]
    assert layers._repr_html_().count("<tr>") == 3


def test_only_existing_columns_are_iterated() -> None:
    decisions: Any = Decisions([forward(0)], layer_infos((8, 2), (8, 2)))
    assert dict(decisions).keys() == decisions.columns().keys() == decisions.to_dict().keys()
