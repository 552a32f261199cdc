"""Our states as messages of session.proto."""

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from moe_analyzer.aggregate import SourceState
from moe_analyzer.requests import MAIN_STACK, RequestEntry, RowChunk
from moe_debugger.analysis import LayerState, RoutingState, layer_metrics
from moe_debugger.analysis.step_loads import StepSample
from moe_debugger.planning import rank_metrics
from moe_debugger.v1 import routing_pb2 as routing
from moe_debugger.v1 import session_pb2 as pb

__all__ = ["account_message", "layer_snapshot", "roll_up", "routes_message", "source_message", "summary_message"]

_NO_EXPERT = 0xFFFF
# A row's key: 8 bits of stack, 32 of position, and these for rows of one position.
_OCCURRENCE_BITS = 24


def layer_snapshot(
    description: routing.LayerDescription | None, total: LayerState, recent: LayerState | None
) -> pb.LayerSnapshot:
    """Return one layer's load, whole and recent."""
    shape = total.shape
    recent = LayerState.empty(shape) if recent is None else recent
    metrics = layer_metrics(recent)
    if description is None:
        description = routing.LayerDescription(
            layer_index=shape.layer_index, num_experts=shape.num_experts, top_k=shape.top_k
        )
    snapshot = pb.LayerSnapshot(
        description=description,
        num_tokens=total.num_tokens,
        expert_counts=total.counts.astype("<u8").tobytes(),
        recent_num_tokens=recent.num_tokens,
        recent_expert_counts=recent.counts.astype("<u8").tobytes(),
        load_entropy=metrics.load_entropy,
        effective_experts=metrics.effective_experts,
        hottest_expert=max(0, metrics.hottest_expert),
        hottest_load_ratio=metrics.max_over_mean,
        num_unused_experts=metrics.num_unused,
        mean_router_entropy=metrics.mean_token_entropy,
        mean_top1_probability=metrics.mean_confidence,
        num_padding_tokens=total.num_padding,
        num_dropped_slots=total.num_dropped_slots,
        num_identity_slots=total.num_identity_slots,
        num_skipped_slots=total.num_skipped_slots,
        num_unused_slots=total.num_unused_slots,
        mean_probability=total.mean_probability.astype("<f4").tobytes() if total.num_probability_tokens else b"",
    )
    owners = description.expert_parallel_ranks
    # Empty or of another size: ranks do not own experts.
    if owners and len(owners) == shape.num_experts:
        ranks = np.asarray(owners, np.int64)[:, None] == np.arange(max(owners) + 1)
        snapshot.expert_parallel_counts.extend((total.counts @ ranks).astype(np.uint64).tolist())
        _add_rank_steps(snapshot, total.step_sample, ranks)
    return snapshot


def _add_rank_steps(snapshot: pb.LayerSnapshot, sample: StepSample | None, ranks: npt.NDArray[np.bool_]) -> None:
    """Add how uneven the ranks are in single steps; `ranks` [E, R] says which expert stands on which."""
    if sample is None:
        return
    balance = rank_metrics((sample.counts.astype(np.float64) @ ranks)[:, None, :])
    snapshot.num_rank_steps = int(balance.num_layer_steps[0])
    if snapshot.num_rank_steps:
        snapshot.rank_step_imbalance = float(balance.layer_imbalance[0])
        snapshot.rank_waste_share = balance.waste_share


def source_message(source: SourceState, *, is_live: bool) -> pb.Source:
    """Return one source's account."""
    manifest, status = source.manifest or routing.SourceManifest(), source.status
    return pb.Source(
        source_id=source.source_id,
        kind=manifest.kind,
        host_name=manifest.host_name,
        process_id=manifest.process_id,
        started_at_unix_ns=manifest.started_at_unix_ns,
        last_seen_at_unix_ns=source.last_seen_ns,
        is_live=is_live,
        said_goodbye=source.said_goodbye,
        level=manifest.level,
        sampling_rate=manifest.sampling_rate,
        last_sequence=source.sequences.last,
        last_step=source.last_step,
        counters=source.counters,
        num_counted=source.num_counted,
        num_missing_messages=source.sequences.num_missing,
        hook_time_share=status.hook_time_share,
        is_healthy=status.is_healthy,
        problems=status.problems,
        series=dict(status.series),
        checks=status.checks,
        tail_unknown_bytes=0 if is_live or source.said_goodbye else status.buffer_limit_bytes,
        coordinates=manifest.coordinates,
    )


def account_message(
    sources: Iterable[SourceState], num_dead_lettered: int, live: set[str], *, num_lost_stream_messages: int
) -> pb.Account:
    """Return where the decisions of all sources went.

    A live source's decisions are in flight until they are counted; one that has ended has what it said last.
    """
    account = pb.Account(num_dead_lettered=num_dead_lettered, num_lost_stream_messages=num_lost_stream_messages)
    dropped: dict[routing.DropReason.ValueType, int] = {}
    for source in sources:
        counters = source.counters
        num_dropped = 0
        for one in counters.dropped:
            dropped[one.reason] = dropped.get(one.reason, 0) + one.num_decisions
            num_dropped += one.num_decisions
        account.num_produced += counters.num_produced
        account.num_counted += source.num_counted
        account.num_late += source.num_late
        account.num_missing_messages += source.sequences.num_missing
        if source.source_id in live:
            account.num_in_flight += max(0, counters.num_produced - source.num_counted - source.num_late - num_dropped)
        else:
            account.num_in_flight += counters.num_in_flight
    for reason, number in sorted(dropped.items()):
        account.dropped.add(reason=reason, num_decisions=number)
    return account


def roll_up(start_s: int, duration_s: int, state: RoutingState, layers: list[int]) -> pb.RollUp:
    """Return one point of a session's history."""
    metrics = {index: layer_metrics(layer) for index, layer in state.layers.items()}
    nan = float("nan")
    entropy = [metrics[index].load_entropy if index in metrics else nan for index in layers]
    effective = [metrics[index].effective_experts if index in metrics else nan for index in layers]
    return pb.RollUp(
        start_unix_ns=start_s * 1_000_000_000,
        duration_s=duration_s,
        num_tokens=state.num_tokens,
        load_entropy=np.array(entropy, "<f4").tobytes(),
        effective_experts=np.array(effective, "<f4").tobytes(),
        first_step=state.first_step or 0,
        last_step=state.last_step or 0,
    )


def summary_message(entries: list[RequestEntry]) -> pb.RequestSummary:
    """Return one request, whose parts may lie in several partitions.

    Stages of a pipeline route the same tokens at other layers: tokens add up by layer, never over layers.
    """
    whole = RequestEntry(entries[0].request_id, 0, 0)
    for entry in entries:
        whole.side_layers |= entry.side_layers
        for index, tokens in entry.tokens.items():
            whole.tokens[index] = whole.tokens[index] + tokens if index in whole.tokens else tokens
    return pb.RequestSummary(
        request_id=whole.request_id,
        num_tokens=whole.num_tokens(),
        num_prefill_tokens=whole.num_tokens(routing.PHASE_PREFILL),
        num_decode_tokens=whole.num_tokens(routing.PHASE_DECODE),
        first_seen_at_unix_ns=min(entry.first_seen_ns for entry in entries),
        last_seen_at_unix_ns=max(entry.last_seen_ns for entry in entries),
        has_routes=any(entry.num_rows_kept for entry in entries),
    )


def routes_message(entries: list[RequestEntry], chunks: list[RowChunk]) -> pb.RequestRoutes:
    """Return all kept rows of one request, sorted by stack (the decoder first) and position.

    Rows of one token that hold other layers (a pipeline's stages) become one row.
    """
    stacks = sorted({chunk.stack for chunk in chunks}, key=lambda name: (name != MAIN_STACK, name))
    groups: dict[tuple[str, tuple[int, ...]], list[RowChunk]] = {}
    for chunk in chunks:
        groups.setdefault((chunk.stack, tuple(sorted(chunk.expert_ids))), []).append(chunk)
    keys = [_row_keys(stacks.index(stack), parts) for (stack, _), parts in groups.items()]
    rows, place = np.unique(np.concatenate(keys) if keys else np.empty(0, np.uint64), return_inverse=True)
    ordered = [chunk for parts in groups.values() for chunk in parts]
    ends = np.cumsum([chunk.num_rows for chunk in ordered], dtype=np.intp)
    places = np.split(place, ends[:-1]) if ordered else []
    routes = pb.RequestRoutes(
        summary=summary_message(entries),
        num_tokens=len(rows),
        position=((rows >> np.uint64(_OCCURRENCE_BITS)) & np.uint64(0xFFFFFFFF)).astype("<u4").tobytes(),
        num_rows_not_kept=sum(entry.num_rows_not_kept for entry in entries),
        stacks=stacks,
    )
    if len(stacks) > 1:
        routes.stack_index = (rows >> np.uint64(_OCCURRENCE_BITS + 32)).astype("u1").tobytes()
    if ordered:
        phase, token_id = np.zeros(len(rows), np.uint8), np.zeros(len(rows), "<u4")
        for chunk, at in zip(ordered, places, strict=True):
            phase[at] = chunk.phase
            if chunk.token_id is not None:
                token_id[at] = chunk.token_id
        routes.phase = phase.tobytes()
        if all(chunk.token_id is not None for chunk in ordered):
            routes.token_id = token_id.tobytes()
    for index in sorted({index for entry in entries for index in entry.counts}):
        load = sum((entry.counts[index] for entry in entries if index in entry.counts), np.uint64(0))
        parts = [(chunk, at) for chunk, at in zip(ordered, places, strict=True) if index in chunk.expert_ids]
        routes.layers.append(_layer_routes(index, np.asarray(load), parts, len(rows)))
    return routes


def _row_keys(stack: int, chunks: list[RowChunk]) -> npt.NDArray[np.uint64]:
    """Return a key for each row: stack, position, and how many rows of that position came before (beams have several).

    Chunks that hold other layers of the same rows get the same keys.
    """
    position = np.concatenate([chunk.position for chunk in chunks])
    order = np.argsort(position, kind="stable")
    in_order = position[order]
    is_first = np.r_[True, in_order[1:] != in_order[:-1]]
    starts = np.flatnonzero(is_first)
    occurrence = np.empty(len(position), np.uint64)
    occurrence[order] = np.arange(len(position)) - np.repeat(starts, np.diff(np.r_[starts, len(position)]))
    key = (np.uint64(stack) << np.uint64(32)) | position.astype(np.uint64)
    return (key << np.uint64(_OCCURRENCE_BITS)) | occurrence


def _layer_routes(
    index: int,
    load: npt.NDArray[np.uint64],
    parts: list[tuple[RowChunk, npt.NDArray[np.intp]]],
    num_rows: int,
) -> pb.RequestLayerRoutes:
    message = pb.RequestLayerRoutes(
        layer_index=index, num_experts=len(load), expert_counts=load.astype("<u8").tobytes()
    )
    top_k = max((chunk.expert_ids[index].shape[1] for chunk, _ in parts), default=0)
    if not top_k:
        return message
    ids = np.full((num_rows, top_k), _NO_EXPERT, "<u2")
    weights = np.zeros((num_rows, top_k), "<f2")
    for chunk, at in parts:
        ids[at] = chunk.expert_ids[index]
        if index in chunk.gate_weights:
            weights[at] = chunk.gate_weights[index]
    message.top_k = top_k
    message.expert_ids = ids.tobytes()
    if all(index in chunk.gate_weights for chunk, _ in parts):
        message.gate_weights = weights.tobytes()
    return message
