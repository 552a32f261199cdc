"""Joins the columns of forwards into batches of a good size for the wire, or reduces them to sums."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_debugger.wire.codec import (
    MAX_MESSAGE_BYTES,
    CountsColumns,
    LayerColumns,
    LayerCountColumns,
    RoutingColumns,
)
from moe_debugger.wire.slots import SlotClasses

__all__ = [
    "MAX_DECISIONS",
    "columns_size_bytes",
    "join_and_split",
    "join_counts",
    "reduce_to_counts",
    "split_counts",
]

# Between 1k and 16k decisions a message costs least per decision; beyond, it only makes the reader wait.
MAX_DECISIONS = 16_384
# Head room for the message around the columns: ids of requests, counters, tags and lengths.
_ENVELOPE_BYTES = 32 * 1024
_TOKEN_BYTES = 22
_TOKEN_COLUMNS = ("step", "forward_index", "request_index", "position", "phase", "is_padding", "token_id")
_LAYER_COLUMNS = (
    "expert_ids",
    "gate_weights",
    "slot_status",
    "intended_expert_ids",
    "margin",
    "router_entropy",
    "router_logsumexp",
    "top1_probability",
    "logits",
)


def columns_size_bytes(columns: RoutingColumns | CountsColumns) -> int:
    """Return the bytes of all arrays of `columns`."""
    if isinstance(columns, CountsColumns):
        return sum(
            layer.expert_counts.nbytes + (0 if layer.probability_sum is None else layer.probability_sum.nbytes)
            for layer in columns.layers
        )
    size: int = sum(array.nbytes for name in _TOKEN_COLUMNS if (array := getattr(columns, name)) is not None)
    for layer in columns.layers:
        size += sum(array.nbytes for name in _LAYER_COLUMNS if (array := getattr(layer, name)) is not None)
        size += 0 if layer.row_index is None else layer.row_index.nbytes
        size += 0 if layer.probability_sum is None else layer.probability_sum.nbytes
    return size


def join_and_split(items: Sequence[RoutingColumns]) -> Iterator[RoutingColumns]:
    """Yield the rows of `items` in order, in batches that fit one message each."""
    start = 0
    while start < len(items):
        end, num_rows, limit = start + 1, items[start].num_tokens, _max_rows(items[start])
        signature = _signature(items[start])
        while (
            end < len(items)
            and signature is not None
            and _signature(items[end]) == signature
            and num_rows + items[end].num_tokens <= limit
        ):
            num_rows += items[end].num_tokens
            end += 1
        joined = items[start] if end == start + 1 else _join(items[start:end])
        start = end
        if signature is None or joined.num_tokens <= limit:
            yield joined  # what is not in step is refused by the reader; it cannot be cut
        else:
            for first in range(0, joined.num_tokens, limit):
                yield _rows(joined, first, first + limit)


def reduce_to_counts(columns: RoutingColumns) -> list[CountsColumns]:
    """Return the sums of `columns`, one for each phase that occurs among its rows.

    Slots count as in `moe_debugger.analysis.state`: load is what was routed, padding is none. A sum of probabilities
    belongs to all valid rows of a layer, so rows of several phases leave none.
    """
    result = []
    for phase in np.unique(columns.phase).tolist():
        of_phase = columns.phase == phase
        layers = [_sums(columns, layer, of_phase) for layer in columns.layers]
        steps = columns.step[of_phase]
        result.append(CountsColumns(int(steps.min()), int(steps.max()), phase, columns.captured_at_unix_ns, layers))
    return result


def _sums(columns: RoutingColumns, layer: LayerColumns, of_phase: npt.NDArray[np.bool_]) -> LayerCountColumns:
    chosen, padding = of_phase, columns.is_padding
    if layer.row_index is not None:
        chosen, padding = chosen[layer.row_index], padding[layer.row_index]
    valid = chosen & ~padding
    ids = layer.expert_ids[valid]
    status = None if layer.slot_status is None else layer.slot_status[valid]
    slots = SlotClasses.of(ids, status, layer.num_experts)
    return LayerCountColumns(
        layer_index=layer.layer_index,
        num_experts=layer.num_experts,
        num_identity_experts=layer.num_identity_experts,
        num_tokens=len(ids),
        num_padding=int(np.count_nonzero(chosen & padding)),
        expert_counts=np.bincount(ids[slots.is_load], minlength=layer.num_experts).astype(np.uint64),
        identity_slots=slots.num_identity,
        skipped_slots=slots.num_skipped,
        dropped_slots=slots.num_dropped,
        unused_slots=slots.num_unused,
        probability_sum=layer.probability_sum if bool((chosen | padding).all()) else None,
    )


def join_counts(items: Iterable[CountsColumns]) -> list[CountsColumns]:
    """Return the sums of `items`, one for each phase and set of layers, in the order in which these came first."""
    joined: dict[tuple[object, ...], CountsColumns] = {}
    for item in items:
        # Sums without probabilities must not dilute those that have them, so such items are not joined.
        key = (item.phase, *((layer.layer_index, layer.probability_sum is None) for layer in item.layers))
        before = joined.get(key)
        joined[key] = item if before is None else _add(before, item)
    return list(joined.values())


def split_counts(columns: CountsColumns) -> Iterator[CountsColumns]:
    """Yield `columns` in parts that fit one message each: some of the layers in each."""
    layers: list[LayerCountColumns] = []
    size = 0
    for layer in columns.layers:
        layer_bytes = layer.num_experts * (8 if layer.probability_sum is None else 16) + 64
        if layers and size + layer_bytes > MAX_MESSAGE_BYTES - _ENVELOPE_BYTES:
            yield replace(columns, layers=layers)
            layers, size = [], 0
        layers.append(layer)
        size += layer_bytes
    yield replace(columns, layers=layers)


def _add(one: CountsColumns, other: CountsColumns) -> CountsColumns:
    return CountsColumns(
        first_step=min(one.first_step, other.first_step),
        last_step=max(one.last_step, other.last_step),
        phase=one.phase,
        captured_at_unix_ns=max(one.captured_at_unix_ns, other.captured_at_unix_ns),
        layers=[
            LayerCountColumns(
                layer_index=a.layer_index,
                num_experts=a.num_experts,
                num_identity_experts=a.num_identity_experts,
                num_tokens=a.num_tokens + b.num_tokens,
                num_padding=a.num_padding + b.num_padding,
                expert_counts=a.expert_counts + b.expert_counts,
                identity_slots=a.identity_slots + b.identity_slots,
                skipped_slots=a.skipped_slots + b.skipped_slots,
                dropped_slots=a.dropped_slots + b.dropped_slots,
                unused_slots=a.unused_slots + b.unused_slots,
                probability_sum=(
                    None
                    if a.probability_sum is None or b.probability_sum is None
                    else a.probability_sum + b.probability_sum
                ),
            )
            for a, b in zip(one.layers, other.layers, strict=True)
        ],
    )


def _max_rows(columns: RoutingColumns) -> int:
    row_bytes = _TOKEN_BYTES
    for layer in columns.layers:
        experts = layer.num_experts + layer.num_identity_experts
        width, k = (1 if experts <= 255 else 2), layer.expert_ids.shape[1]
        row_bytes += k * (width + 2 + 1) + 16
        row_bytes += 0 if layer.logits is None else 2 * layer.num_experts
        row_bytes += 0 if layer.intended_expert_ids is None else k * width
    by_size = (MAX_MESSAGE_BYTES - _ENVELOPE_BYTES) // row_bytes
    # Each row may be of a request of its own, whose id is on the wire once.
    return max(1, min(by_size, MAX_DECISIONS // max(1, len(columns.layers))))


def _signature(columns: RoutingColumns) -> tuple[object, ...] | None:
    """Which columns there are: only alike items can be joined. None where rows and layers are not in step."""
    if any(
        len(layer.expert_ids) != (columns.num_tokens if layer.row_index is None else len(layer.row_index))
        for layer in columns.layers
    ):
        return None
    return (
        columns.token_id is None,
        *(
            (layer.layer_index, layer.expert_ids.shape[1], *(getattr(layer, name) is None for name in _LAYER_COLUMNS))
            for layer in columns.layers
        ),
        *((layer.probability_sum is None, layer.row_index is None) for layer in columns.layers),
    )


def _join(items: Sequence[RoutingColumns]) -> RoutingColumns:
    names: dict[str, int] = {}
    request_index: list[npt.NDArray[np.uint32]] = []
    for item in items:
        mapping = np.array([names.setdefault(name, len(names)) for name in item.request_ids] or [0], dtype=np.uint32)
        request_index.append(mapping[item.request_index])
    first = items[0]
    starts = np.cumsum([0, *(item.num_tokens for item in items[:-1])])
    layers = []
    for place, layer in enumerate(first.layers):
        parts = [item.layers[place] for item in items]
        joined = LayerColumns(
            layer.layer_index,
            layer.num_experts,
            np.concatenate([part.expert_ids for part in parts]),
            num_identity_experts=layer.num_identity_experts,
        )
        if layer.row_index is not None:
            joined.row_index = np.concatenate(
                [
                    part.row_index + start
                    for part, start in zip(parts, starts, strict=True)
                    if part.row_index is not None
                ]
            ).astype(np.uint32)
        for name in _LAYER_COLUMNS[1:]:
            if getattr(layer, name) is not None:
                setattr(joined, name, np.concatenate([getattr(part, name) for part in parts]))
        if layer.probability_sum is not None:
            sums = [part.probability_sum for part in parts if part.probability_sum is not None]
            joined.probability_sum = np.sum(np.stack(sums), axis=0)
        layers.append(joined)
    return RoutingColumns(
        step=np.concatenate([item.step for item in items]),
        forward_index=np.concatenate([item.forward_index for item in items]),
        request_ids=list(names),
        request_index=np.concatenate(request_index),
        position=np.concatenate([item.position for item in items]),
        phase=np.concatenate([item.phase for item in items]),
        is_padding=np.concatenate([item.is_padding for item in items]),
        token_id=(
            None
            if first.token_id is None
            else np.concatenate([item.token_id for item in items if item.token_id is not None])
        ),
        layers=layers,
        captured_at_unix_ns=items[-1].captured_at_unix_ns,
    )


def _rows(columns: RoutingColumns, start: int, end: int) -> RoutingColumns:
    """Return some rows, with the request ids that they use."""
    used, request_index = np.unique(columns.request_index[start:end], return_inverse=True)
    layers = []
    for layer in columns.layers:
        chosen: Any = slice(start, end)
        row_index = None
        if layer.row_index is not None:
            chosen = (layer.row_index >= start) & (layer.row_index < end)
            row_index = (layer.row_index[chosen] - np.uint32(start)).astype(np.uint32)
        part = LayerColumns(
            layer.layer_index,
            layer.num_experts,
            layer.expert_ids[chosen],
            row_index=row_index,
            num_identity_experts=layer.num_identity_experts,
        )
        for name in _LAYER_COLUMNS[1:]:
            column = getattr(layer, name)
            if column is not None:
                setattr(part, name, column[chosen])
        if layer.probability_sum is not None:
            part.probability_sum = _part_of_sum(columns, layer, chosen)
        layers.append(part)
    return RoutingColumns(
        step=columns.step[start:end],
        forward_index=columns.forward_index[start:end],
        request_ids=[columns.request_ids[index] for index in used] if columns.request_ids else [],
        request_index=request_index.astype(np.uint32),
        position=columns.position[start:end],
        phase=columns.phase[start:end],
        is_padding=columns.is_padding[start:end],
        token_id=None if columns.token_id is None else columns.token_id[start:end],
        layers=layers,
        captured_at_unix_ns=columns.captured_at_unix_ns,
    )


def _part_of_sum(columns: RoutingColumns, layer: LayerColumns, chosen: Any) -> npt.NDArray[np.float64]:
    """Return a part's share of a sum over all valid rows: the parts' mean is the whole's, and they add up to it."""
    assert layer.probability_sum is not None
    valid = ~columns.is_padding if layer.row_index is None else ~columns.is_padding[layer.row_index]
    num_valid = int(np.count_nonzero(valid))
    share = int(np.count_nonzero(valid[chosen])) / num_valid if num_valid else 0.0
    return layer.probability_sum * share
