"""Recorded rows as the columns that a source captured: the way back from a table to the wire."""

import numpy as np
import numpy.typing as npt

from moe_debugger._decisions import Decisions
from moe_debugger._row_blocks import NO_TOKEN, ROUTER_COLUMNS, default_slots
from moe_debugger.capture import LayerInfo
from moe_debugger.wire.codec import LayerColumns, RoutingColumns

__all__ = ["decisions_to_columns"]

_TOKEN_COLUMNS = ("forward_index", "step", "request_index", "position", "phase", "is_padding")

Rows = npt.NDArray[np.intp]


def decisions_to_columns(decisions: Decisions, captured_at_unix_ns: int = 0) -> list[RoutingColumns]:
    """Return whole forwards as captured columns; their `Decisions` are the rows again.

    Layers of one stack that saw the same tokens in the same order stand in one result, others in one of their own. What
    the rows do not hold (`probability_sum`) is None.

    Args:
        decisions: all rows of their forwards, in order.
        captured_at_unix_ns: of all of them.
    """
    groups: list[tuple[str, Rows, list[tuple[LayerInfo, Rows]]]] = []
    tokens = [decisions[name] for name in _TOKEN_COLUMNS]
    if decisions.token_id is not None:
        tokens.append(decisions.token_id)
    order = np.argsort(decisions.layer_index, kind="stable")
    found, starts = np.unique(decisions.layer_index[order], return_index=True)
    for index, rows in zip(found.tolist(), np.split(order, starts[1:]), strict=True):
        info = decisions.layers[index]
        for stack, first, layers in groups:
            is_same = stack == info.stack and len(first) == len(rows)
            if is_same and all(np.array_equal(column[first], column[rows]) for column in tokens):
                layers.append((info, rows))
                break
        else:
            groups.append((info.stack, rows, [(info, rows)]))
    return [_columns(decisions, first, layers, captured_at_unix_ns) for _, first, layers in groups]


def _columns(
    decisions: Decisions, rows: Rows, layers: list[tuple[LayerInfo, Rows]], captured_at_unix_ns: int
) -> RoutingColumns:
    used, request_index = np.unique(decisions.request_index[rows], return_inverse=True)
    token_id = None if decisions.token_id is None else decisions.token_id[rows]
    if token_id is not None and (token_id == NO_TOKEN).all():
        token_id = None
    return RoutingColumns(
        step=decisions.step[rows],
        forward_index=decisions.forward_index[rows],
        request_ids=[decisions.request_ids[index] for index in used.tolist()] if decisions.request_ids else [""],
        request_index=request_index.astype(np.uint32),
        position=decisions.position[rows],
        phase=decisions.phase[rows],
        is_padding=decisions.is_padding[rows],
        # -1 is the all-ones id on the wire, and -1 again when it is read as a table.
        token_id=None if token_id is None else token_id.astype(np.uint32),
        layers=[_layer(decisions, info, chosen) for info, chosen in layers],
        captured_at_unix_ns=captured_at_unix_ns,
    )


def _layer(decisions: Decisions, info: LayerInfo, rows: Rows) -> LayerColumns:
    width = min(info.top_k or decisions.expert_ids.shape[1], decisions.expert_ids.shape[1])
    ids = np.ascontiguousarray(decisions.expert_ids[rows, :width])
    weights = decisions.gate_weights[rows, :width]
    status = decisions.slot_status[rows, :width]
    layer = LayerColumns(
        layer_index=info.layer_index,
        num_experts=info.num_experts,
        num_identity_experts=info.num_identity_experts,
        expert_ids=ids,
        gate_weights=None if np.isnan(weights).all() else weights,
        slot_status=None if np.array_equal(status, default_slots("slot_status", ids)) else status,
    )
    if decisions.intended_expert_ids is not None:
        intended = decisions.intended_expert_ids[rows, :width]
        layer.intended_expert_ids = None if np.array_equal(intended, ids) else np.ascontiguousarray(intended)
    for name in ROUTER_COLUMNS:
        column = decisions[name][rows]
        setattr(layer, name, None if np.isnan(column).all() else column)
    if decisions.logits is not None:
        logits = decisions.logits[rows, : info.num_experts]
        layer.logits = None if np.isnan(logits).all() else np.ascontiguousarray(logits)
    return layer
