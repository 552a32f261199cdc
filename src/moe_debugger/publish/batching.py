"""Joins the columns of forwards into batches of a good size for the wire, or reduces them to counts."""

import zlib
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from moe_debugger.v1 import routing_pb2 as pb
from moe_debugger.wire.codec import MAX_MESSAGE_BYTES, LayerColumns, RoutingColumns, format_version

__all__ = ["MAX_DECISIONS", "columns_size_bytes", "count_batches", "join_and_split", "num_valid_decisions"]

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


def columns_size_bytes(columns: RoutingColumns) -> int:
    """Return the bytes of all arrays of `columns`."""
    size: int = sum(array.nbytes for name in _TOKEN_COLUMNS if (array := getattr(columns, name)) is not None)
    for layer in columns.layers:
        size += sum(array.nbytes for name in _LAYER_COLUMNS if (array := getattr(layer, name)) is not None)
        size += 0 if layer.probability_sum is None else layer.probability_sum.nbytes
    return size


def num_valid_decisions(columns: RoutingColumns) -> int:
    """Return the decisions of tokens that are no padding."""
    num_valid = int(np.count_nonzero(~columns.is_padding))
    return sum(
        num_valid if layer.row_index is None else int(np.count_nonzero(~columns.is_padding[layer.row_index]))
        for layer in columns.layers
    )


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
            yield joined
        else:
            for first in range(0, joined.num_tokens, limit):
                yield _rows(joined, first, first + limit)


def count_batches(items: Sequence[RoutingColumns], num_experts: dict[int, int]) -> Iterator[tuple[pb.CountsBatch, int]]:
    """Yield the sums of `items` for each phase that occurs, and the decisions that they hold.

    The checksum runs over ``expert_counts`` then ``probability_sum`` of each layer, in order.
    """
    phases = sorted({int(phase) for item in items for phase in np.unique(item.phase)})
    for phase in phases:
        counts = {index: np.zeros(experts, np.uint64) for index, experts in num_experts.items()}
        probabilities = {index: np.zeros(experts, np.float64) for index, experts in num_experts.items()}
        has_probabilities = dict.fromkeys(num_experts, True)
        tokens = dict.fromkeys(num_experts, 0)
        steps: list[int] = []
        for item in items:
            chosen = (item.phase == phase) & ~item.is_padding
            if not chosen.any():
                continue
            is_whole = bool((item.phase == phase).all())
            steps += [int(item.step[chosen].min()), int(item.step[chosen].max())]
            for layer in item.layers:
                index = layer.layer_index
                rows = chosen if layer.row_index is None else chosen[layer.row_index]
                ids = layer.expert_ids[rows]
                counts[index] += np.bincount(ids[ids >= 0], minlength=num_experts[index]).astype(np.uint64)
                tokens[index] += len(ids)
                if layer.probability_sum is None or not is_whole:
                    has_probabilities[index] = False
                else:
                    probabilities[index] += layer.probability_sum
        if not steps:
            continue
        batch = pb.CountsBatch(format_version=format_version(), first_step=min(steps), last_step=max(steps))
        batch.phase = pb.Phase.ValueType(phase)
        batch.captured_at_unix_ns = max(item.captured_at_unix_ns for item in items)
        for index, total in counts.items():
            entry = batch.layers.add(layer_index=index, num_tokens=tokens[index])
            entry.expert_counts = total.astype("<u8").tobytes()
            if has_probabilities[index]:
                entry.probability_sum = probabilities[index].astype("<f8").tobytes()
        crc = 0
        for entry in batch.layers:
            crc = zlib.crc32(entry.probability_sum, zlib.crc32(entry.expert_counts, crc))
        batch.crc32 = crc
        yield batch, sum(tokens.values())


def _max_rows(columns: RoutingColumns) -> int:
    row_bytes = _TOKEN_BYTES
    for layer in columns.layers:
        width, k = (1 if layer.num_experts <= 255 else 2), layer.expert_ids.shape[1]
        row_bytes += k * (width + 2 + 1) + 16
        row_bytes += 0 if layer.logits is None else 2 * layer.num_experts
        row_bytes += 0 if layer.intended_expert_ids is None else k * width
    by_size = (MAX_MESSAGE_BYTES - _ENVELOPE_BYTES) // row_bytes
    # Each row may be of a request of its own, whose id is on the wire once.
    return max(1, min(by_size, MAX_DECISIONS // max(1, len(columns.layers))))


def _signature(columns: RoutingColumns) -> tuple[object, ...] | None:
    """Which columns there are: only alike items can be joined. None where rows and layers are not in step."""
    if any(layer.row_index is not None or len(layer.expert_ids) != columns.num_tokens for layer in columns.layers):
        return None
    return (
        columns.token_id is None,
        *(
            (layer.layer_index, layer.expert_ids.shape[1], *(getattr(layer, name) is None for name in _LAYER_COLUMNS))
            for layer in columns.layers
        ),
        *(layer.probability_sum is None for layer in columns.layers),
    )


def _join(items: Sequence[RoutingColumns]) -> RoutingColumns:
    names: dict[str, int] = {}
    request_index: list[npt.NDArray[np.uint32]] = []
    for item in items:
        mapping = np.array([names.setdefault(name, len(names)) for name in item.request_ids] or [0], dtype=np.uint32)
        request_index.append(mapping[item.request_index])
    first = items[0]
    layers = []
    for place, layer in enumerate(first.layers):
        parts = [item.layers[place] for item in items]
        joined = LayerColumns(layer.layer_index, layer.num_experts, np.concatenate([part.expert_ids for part in parts]))
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
        part = LayerColumns(layer.layer_index, layer.num_experts, layer.expert_ids[start:end])
        for name in _LAYER_COLUMNS[1:]:
            column = getattr(layer, name)
            if column is not None:
                setattr(part, name, column[start:end])
        if layer.probability_sum is not None:
            part.probability_sum = _part_of_sum(columns, layer.probability_sum, start, end)
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


def _part_of_sum(
    columns: RoutingColumns, total: npt.NDArray[np.float64], start: int, end: int
) -> npt.NDArray[np.float64]:
    """Return a part's share of a sum over all valid rows: the parts' mean is the whole's, and they add up to it."""
    num_valid = int(np.count_nonzero(~columns.is_padding))
    share = int(np.count_nonzero(~columns.is_padding[start:end])) / num_valid if num_valid else 0.0
    return total * share
