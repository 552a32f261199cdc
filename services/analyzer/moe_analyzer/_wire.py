"""Our states as messages of session.proto."""

from collections.abc import Iterable, Sequence

import numpy as np

from moe_analyzer.aggregate import SourceState
from moe_analyzer.requests import MAIN_STACK, RequestEntry, RowChunk
from moe_debugger.analysis import LayerState, RoutingState, layer_metrics
from moe_debugger.v1 import routing_pb2 as routing
from moe_debugger.v1 import session_pb2 as pb

__all__ = ["account_message", "layer_snapshot", "roll_up", "routes_message", "source_message", "summary_message"]

_NO_EXPERT = 0xFFFF


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
    return pb.LayerSnapshot(
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
        expert_parallel_counts=_counts_by_rank(total.counts, description.expert_parallel_ranks),
    )


def _counts_by_rank(counts: np.ndarray[tuple[int, ...], np.dtype[np.uint64]], owners: Sequence[int]) -> list[int]:
    """Return the assignments of the experts of each expert-parallel rank; none where ranks do not own experts."""
    if len(owners) != len(counts):
        return []
    ranks = np.asarray(owners)
    return [int(counts[ranks == rank].sum()) for rank in range(int(ranks.max(initial=-1)) + 1)]


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
    """Return one request, whose parts may lie in several partitions."""
    return pb.RequestSummary(
        request_id=entries[0].request_id,
        num_tokens=sum(entry.num_tokens() for entry in entries),
        num_prefill_tokens=sum(entry.num_tokens(routing.PHASE_PREFILL) for entry in entries),
        num_decode_tokens=sum(entry.num_tokens(routing.PHASE_DECODE) for entry in entries),
        first_seen_at_unix_ns=min(entry.first_seen_ns for entry in entries),
        last_seen_at_unix_ns=max(entry.last_seen_ns for entry in entries),
        has_routes=any(entry.num_rows_kept for entry in entries),
    )


def routes_message(entries: list[RequestEntry], chunks: list[RowChunk]) -> pb.RequestRoutes:
    """Return all kept rows of one request, sorted by stack (the decoder first) and position."""
    stacks = sorted({chunk.stack for chunk in chunks}, key=lambda name: (name != MAIN_STACK, name))
    positions = [chunk.position for chunk in chunks]
    position = np.concatenate(positions) if positions else np.empty(0, np.uint32)
    stack = np.repeat(
        np.array([stacks.index(chunk.stack) for chunk in chunks], np.uint8),
        np.array([chunk.num_rows for chunk in chunks], np.intp),
    )
    order = np.lexsort((position, stack))
    routes = pb.RequestRoutes(
        summary=summary_message(entries),
        num_tokens=len(position),
        position=position[order].astype("<u4").tobytes(),
        num_rows_not_kept=sum(entry.num_rows_not_kept for entry in entries),
        stacks=stacks,
    )
    if len(stacks) > 1:
        routes.stack_index = stack[order].tobytes()
    if chunks:
        routes.phase = np.concatenate([chunk.phase for chunk in chunks])[order].astype("u1").tobytes()
        tokens = [chunk.token_id for chunk in chunks if chunk.token_id is not None]
        if len(tokens) == len(chunks):
            routes.token_id = np.concatenate(tokens)[order].astype("<u4").tobytes()
    for index in sorted({index for entry in entries for index in entry.counts}):
        load = sum((entry.counts[index] for entry in entries if index in entry.counts), np.uint64(0))
        routes.layers.append(_layer_routes(index, np.asarray(load), chunks, order))
    return routes


def _layer_routes(
    index: int,
    load: np.ndarray[tuple[int, ...], np.dtype[np.uint64]],
    chunks: list[RowChunk],
    order: np.ndarray[tuple[int, ...], np.dtype[np.intp]],
) -> pb.RequestLayerRoutes:
    message = pb.RequestLayerRoutes(
        layer_index=index, num_experts=len(load), expert_counts=load.astype("<u8").tobytes()
    )
    top_k = max((chunk.expert_ids[index].shape[1] for chunk in chunks if index in chunk.expert_ids), default=0)
    if not top_k:
        return message
    ids = [
        chunk.expert_ids[index]
        if index in chunk.expert_ids
        else np.full((chunk.num_rows, top_k), _NO_EXPERT, np.uint16)
        for chunk in chunks
    ]
    message.top_k = top_k
    message.expert_ids = np.concatenate(ids)[order].astype("<u2").tobytes()
    if all(index in chunk.gate_weights for chunk in chunks if index in chunk.expert_ids):
        weights = np.concatenate(
            [
                chunk.gate_weights[index]
                if index in chunk.gate_weights
                else np.zeros((chunk.num_rows, top_k), np.float16)
                for chunk in chunks
            ]
        )
        message.gate_weights = weights[order].astype("<f2").tobytes()
    return message
