"""The metrics of token rows on rows as a session gives them."""

from collections.abc import Callable

import numpy as np
import pytest

from moe_debugger import Decisions
from moe_debugger.analysis import capacity_drops, expert_coactivation, layer_transitions, routing_locality
from moe_debugger.capture import LayerInfo
from moe_debugger.wire.codec import RoutingColumns


def _session(columns: RoutingColumns, stacks: tuple[str, str] = ("decoder", "decoder")) -> Decisions:
    layers = [
        LayerInfo(
            layer_index=index,
            model_layer_index=index,
            module_name=f"layers.{index}",
            stack=stack,
            num_experts=8,
            top_k=2,
        )
        for index, stack in enumerate(stacks)
    ]
    return Decisions([columns], layers)


def test_rows_of_a_session_are_taken_as_they_are(make_columns: Callable[..., RoutingColumns]) -> None:
    columns = make_columns(np.random.default_rng(1), num_tokens=400)
    rows = _session(columns)
    valid = ~rows.is_padding & (rows.layer_index == 0)
    assert expert_coactivation(rows, num_experts=8, top_k=2)[0].num_tokens == valid.sum()
    pair = layer_transitions(rows, num_experts=8, top_k=2)[0, 1]
    # The second layer has no row of some tokens.
    seen = np.zeros(400, bool)
    seen[columns.layers[1].row_index] = True
    assert pair.num_tokens == (seen & ~columns.is_padding).sum()
    assert pair.num_unmatched == (~seen & ~columns.is_padding).sum()
    assert routing_locality(rows, num_experts=8, top_k=2)[0].num_tokens == valid.sum()
    drops = capacity_drops(rows, num_experts=8, top_k=2)[0]
    is_dropped = rows.slot_status[valid] == 2
    assert drops.dropped_share == pytest.approx(is_dropped.sum() / (2 * valid.sum()))


def test_an_encoder_and_a_decoder_have_no_transitions(make_columns: Callable[..., RoutingColumns]) -> None:
    rows = _session(make_columns(np.random.default_rng(2)), ("encoder", "decoder"))
    assert layer_transitions(rows, num_experts=8, top_k=2) == {}
