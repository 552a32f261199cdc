"""How rows and sums are added to the state of a layer: columnar, a few passes over the assignments of a batch."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moe_debugger.analysis._row_runs import load_of_runs, run_starts, sums_by_group
from moe_debugger.analysis.fixed_sums import NUM_GROUPS, RowGroups
from moe_debugger.analysis.layer_state import (
    FIXED_POINT,
    MAX_ABSOLUTE,
    NUM_PHASES,
    NUM_TOKEN_CLASSES,
    LayerState,
    even_squares,
)
from moe_debugger.analysis.sketch import combine, hash_strings, mix, observe
from moe_debugger.errors import InvalidInputError
from moe_debugger.v1 import routing_pb2 as pb
from moe_debugger.wire.codec import CountsColumns, LayerColumns, LayerCountColumns, RoutingColumns
from moe_debugger.wire.slots import SlotClasses

__all__ = ["POSITIONS_PER_BLOCK", "Batch", "check_rows", "check_sums", "fold_layer", "fold_sums", "row_blocks"]

# Positions of a request that are one block where there are too few requests.
POSITIONS_PER_BLOCK = 64
# From here on a token id is none: -1 (not captured) as 32 unsigned bits.
_NO_TOKEN_ID = 1 << 31

_U64 = npt.NDArray[np.uint64]


def check_rows(layers: Mapping[int, LayerState], layer: LayerColumns, num_tokens: int) -> None:
    """Raise InvalidInputError where a layer's rows do not fit the state's shapes."""
    state = layers.get(layer.layer_index)
    if state is None:
        raise InvalidInputError(f"layer {layer.layer_index} is not among the layers {sorted(layers)} of this state")
    where = f"layer {layer.layer_index}: "
    ids, shape = layer.expert_ids, state.shape
    if ids.ndim != 2 or (len(ids) and ids.shape[1] != shape.top_k):
        raise InvalidInputError(f"{where}expert_ids has shape {ids.shape}, expected (n, {shape.top_k})")
    if ids.size and not -1 <= int(ids.min()) <= int(ids.max()) < shape.num_ids:
        raise InvalidInputError(
            f"{where}expert ids reach from {int(ids.min())} to {int(ids.max())}, expected 0 to "
            f"{shape.num_ids - 1}, or -1 for no expert"
        )
    rows = len(ids)
    if layer.row_index is None:
        if rows != num_tokens:
            raise InvalidInputError(f"{where}{rows} rows without row_index in a batch of {num_tokens} tokens")
    elif len(layer.row_index) != rows or (rows and int(layer.row_index.max()) >= num_tokens):
        raise InvalidInputError(f"{where}row_index does not fit {rows} rows of a batch of {num_tokens} tokens")


def check_sums(layers: Mapping[int, LayerState], layer: LayerCountColumns) -> None:
    """Raise InvalidInputError where a layer's sums do not fit the state's shapes."""
    index = layer.layer_index
    state = layers.get(index)
    if state is None:
        raise InvalidInputError(f"layer {index} is not among the layers {sorted(layers)} of this state")
    shape = (state.shape.num_experts,)
    for name in ("expert_counts", "probability_sum"):
        column = getattr(layer, name)
        if column is not None and np.shape(column) != shape:
            raise InvalidInputError(f"layer {index}: {name} has shape {np.shape(column)}, expected {shape}")
    num_slots = layer.num_tokens * state.shape.top_k
    if _num_accounted(layer) > num_slots:
        raise InvalidInputError(
            f"layer {index}: the sums account for {_num_accounted(layer)} slots, {layer.num_tokens} tokens with "
            f"top-{state.shape.top_k} have {num_slots}"
        )


def row_blocks(columns: RoutingColumns) -> tuple[_U64, npt.NDArray[np.bool_]]:
    """Hash of what each row belongs to (request; in training sequence and step), and whether that is known.

    Rows whose request has no name belong to their forward pass, except in decoding, where one forward holds single
    tokens of requests that go on: their block is unknown.
    """
    n = columns.num_tokens
    if not n:
        return np.zeros(0, np.uint64), np.zeros(0, np.bool_)
    phase = columns.phase
    names = columns.request_ids or [""]
    index = columns.request_index if columns.request_ids else np.zeros(n, np.uint32)
    is_named = np.array([bool(name) for name in names])[index]
    hashes = hash_strings(names)[index]
    is_train = phase == pb.PHASE_TRAIN
    if is_train.any():
        # Names of rows ("row 3 of the batch") come again in every step with other text.
        hashes = np.where(is_train, combine(hashes, columns.step.reshape(-1, 1)), hashes)
    if is_named.all():
        return hashes, is_named
    forwards = combine(mix(np.ones(n, np.uint64)), np.column_stack([columns.step, columns.forward_index]))
    is_whole_forward = is_train | (phase == pb.PHASE_EVAL) | (phase == pb.PHASE_PREFILL)
    return np.where(is_named, hashes, forwards), is_named | is_whole_forward


@dataclass(frozen=True, slots=True)
class Batch:
    """The rows of a batch with the hashes that all its layers need.

    Attributes:
        blocks: [n] uint64, hash of what the row's block is made of: its request.
        known: [n] bool, whether that is known.
        stretches: [n] uint64, number of the row's stretch of positions within its request.
        keys: [n] uint64, hash of the token itself: its request and position, and its id where captured.
        phases: [n] uint8, phase; those that are not known yet count as the last one.
        has_token_id: [n] bool, whether the token's id was captured; None = of no row.
        classes: [n] intp, hashed class of the token id, 256 where not captured; None likewise.
        workloads: [n] uint64, hash of the label of the row's workload, 0 = none; None = no row has one.
    """

    columns: RoutingColumns
    blocks: _U64
    known: npt.NDArray[np.bool_]
    stretches: _U64
    keys: _U64
    step_source: int
    phases: npt.NDArray[np.uint8]
    has_token_id: npt.NDArray[np.bool_] | None
    classes: npt.NDArray[np.intp] | None
    workloads: _U64 | None

    @classmethod
    def of(
        cls,
        columns: RoutingColumns,
        hashes: _U64,
        known: npt.NDArray[np.bool_],
        step_source: int,
        workloads: _U64 | None = None,
    ) -> "Batch":
        """Return the batch with its hashes; see `row_blocks`."""
        position = columns.position.astype(np.uint64)
        keys = hashes ^ mix(position)
        has_token_id = classes = None
        if columns.token_id is not None:
            has_token_id = columns.token_id < _NO_TOKEN_ID
            token = mix(columns.token_id.astype(np.uint64))
            classes = (token % np.uint64(NUM_TOKEN_CLASSES)).astype(np.intp)
            classes[~has_token_id] = NUM_TOKEN_CLASSES
            # Names come again with other text.
            keys += token * has_token_id
        return cls(
            columns,
            blocks=hashes,
            known=known,
            stretches=position // np.uint64(POSITIONS_PER_BLOCK),
            keys=mix(keys),
            step_source=step_source,
            phases=np.minimum(columns.phase, np.uint8(NUM_PHASES - 1)),
            has_token_id=has_token_id,
            classes=classes,
            workloads=workloads,
        )


def fold_layer(state: LayerState, layer: LayerColumns, batch: Batch) -> None:
    """Add the rows of one layer, in place."""
    columns = batch.columns
    rows = slice(None) if layer.row_index is None else layer.row_index
    padding = columns.is_padding[rows]
    num_padding = int(padding.sum())
    state.num_padding += num_padding
    if num_padding == len(padding):
        return
    valid = slice(None) if not num_padding else ~padding
    steps = columns.step[rows][valid]
    state.see_steps(int(steps.min()), int(steps.max()))
    state.num_tokens += len(steps)
    _fold_kinds(state, batch, rows, valid)
    ids = layer.expert_ids[valid]
    status = None if layer.slot_status is None else layer.slot_status[valid]
    slots = SlotClasses.of(ids, status, state.shape.num_experts)
    state.num_dropped_slots += slots.num_dropped
    state.num_skipped_slots += slots.num_skipped
    state.num_identity_slots += slots.num_identity
    state.num_unused_slots += slots.num_unused
    is_load = None if slots.num_load == slots.is_load.size else slots.is_load
    state.squared_loads += len(ids) * ids.shape[1] ** 2 if is_load is None else _squared_loads(is_load)
    known, blocks = batch.known[rows][valid], batch.blocks[rows][valid]
    _fold_load(state, ids, is_load, steps, blocks, batch.stretches[rows][valid], known, batch.step_source)
    if state.token_sample is not None:
        state.token_sample.fold(batch.keys[rows][valid], ids, slots.is_load)
    _fold_means(state, layer, valid, status, slots.num_dropped, blocks, known)
    if layer.probability_sum is not None:
        _add_probabilities(state, layer.probability_sum, len(steps))
    _fold_content(state, layer, ids, valid, batch, rows)


def _fold_kinds(
    state: LayerState,
    batch: Batch,
    rows: slice | npt.NDArray[np.uint32],
    valid: npt.NDArray[np.bool_] | slice,
) -> None:
    """Add what kinds of tokens the valid rows are: phase, token id, workload."""
    state.phase_tokens += np.bincount(batch.phases[rows][valid], minlength=NUM_PHASES).astype(np.uint64)
    if batch.classes is not None:
        classes = np.bincount(batch.classes[rows][valid], minlength=NUM_TOKEN_CLASSES + 1)
        state.token_classes += classes[:NUM_TOKEN_CLASSES].astype(np.uint64)
    if batch.workloads is not None:
        labels = batch.workloads[rows][valid]
        is_labelled = (labels > 0) & batch.known[rows][valid]
        positions = batch.columns.position[rows][valid][is_labelled].astype(np.uint64)
        state.workloads.fold(batch.blocks[rows][valid][is_labelled], positions, labels[is_labelled])


def _squared_loads(is_load: npt.NDArray[np.bool_]) -> int:
    """Return the sum over rows of the square of their number of slots that are load."""
    routed = np.zeros(len(is_load), np.intp)
    # Column by column: sums over short rows are slow.
    for slot in is_load.T:
        routed += slot
    tokens = np.bincount(routed)
    return int(tokens @ np.square(np.arange(len(tokens))))


def _fold_load(
    state: LayerState,
    ids: npt.NDArray[np.int32],
    is_load: npt.NDArray[np.bool_] | None,
    steps: _U64,
    blocks: _U64,
    stretches: _U64,
    known: npt.NDArray[np.bool_],
    step_source: int,
) -> None:
    """Add the load of valid rows to every table of the layer; `is_load` None = all slots."""
    starts = run_starts(blocks, stretches, steps, known)
    if not _pays(starts, ids, state.shape.num_experts):
        _fold_load_by_row(state, ids, is_load, steps, blocks, stretches, known, step_source)
        return
    # Long runs, as texts that are read in one go have them: each slot is looked at once for all tables.
    table = load_of_runs(ids, is_load, starts, state.shape.num_experts)
    tokens = np.diff(starts, append=len(ids)).astype(np.uint64)
    steps, blocks, stretches, known = steps[starts], blocks[starts], stretches[starts], known[starts]
    if state.position_counts is not None:
        num = len(state.position_counts)
        block = _block_numbers(mix(blocks + stretches), known, num)
        state.position_counts += sums_by_group(table, block, num + 1)[:num]
    # What is left does not ask for positions, so whole requests are runs.
    starts = run_starts(blocks, steps, known)
    table, tokens = np.add.reduceat(table, starts, axis=0), np.add.reduceat(tokens, starts)
    num, block = len(state.block_tokens), _block_numbers(blocks[starts], known[starts], len(state.block_tokens))
    state.counts += table.sum(axis=0)
    state.block_counts += sums_by_group(table, block, num + 1)[:num]
    state.block_tokens += sums_by_group(tokens, block, num + 1)[:num]
    if state.load_series is not None:
        state.load_series.fold_runs(steps[starts], table, tokens, step_source)
    if state.step_sample is not None:
        state.step_sample.fold_runs(steps[starts], table, tokens, step_source)


def _fold_load_by_row(
    state: LayerState,
    ids: npt.NDArray[np.int32],
    is_load: npt.NDArray[np.bool_] | None,
    steps: _U64,
    blocks: _U64,
    stretches: _U64,
    known: npt.NDArray[np.bool_],
    step_source: int,
) -> None:
    """The same for rows of which no two neighbours agree, as in decoding."""
    experts = state.shape.num_experts

    def sums(block: npt.NDArray[np.intp], num: int) -> _U64:
        cells = block[:, None] * experts + ids
        flat = cells.ravel() if is_load is None else cells[is_load]
        return np.bincount(flat, minlength=(num + 1) * experts).astype(np.uint64).reshape(num + 1, experts)

    num, block = len(state.block_tokens), _block_numbers(blocks, known, len(state.block_tokens))
    table = sums(block, num)
    state.counts += table.sum(axis=0)
    state.block_counts += table[:num]
    state.block_tokens += np.bincount(block, minlength=num + 1)[:num].astype(np.uint64)
    if state.position_counts is not None:
        num = len(state.position_counts)
        state.position_counts += sums(_block_numbers(mix(blocks + stretches), known, num), num)[:num]
    histories = [history for history in (state.load_series, state.step_sample) if history is not None]
    starts = run_starts(steps)
    if histories and _pays(starts, ids, experts):
        table = load_of_runs(ids, is_load, starts, experts)
        tokens = np.diff(starts, append=len(ids)).astype(np.uint64)
        for history in histories:
            history.fold_runs(steps[starts], table, tokens, step_source)
    else:
        every = np.ones(ids.shape, np.bool_) if is_load is None else is_load
        for history in histories:
            history.fold(steps, ids, every, step_source)


def _pays(starts: npt.NDArray[np.intp], ids: npt.NDArray[np.int32], num_experts: int) -> bool:
    """Return whether a table of runs is worth it: not larger than the slots, and runs are no single rows."""
    return len(starts) * num_experts <= 2 * ids.size and 4 * len(starts) <= len(ids)


def _block_numbers(hashes: _U64, known: npt.NDArray[np.bool_], num: int) -> npt.NDArray[np.intp]:
    """Return each row's block; rows of unknown requests go to one more, which is dropped after counting."""
    return np.where(known, (hashes >> np.uint64(32)) % np.uint64(num), np.uint64(num)).astype(np.intp)


def _fold_means(
    state: LayerState,
    layer: LayerColumns,
    valid: npt.NDArray[np.bool_] | slice,
    status: npt.NDArray[np.uint8] | None,
    num_dropped: int,
    blocks: _U64,
    known: npt.NDArray[np.bool_],
) -> None:
    """Add what is a mean over the valid rows, by groups of requests."""
    columns = [
        (state.router_entropy, layer.router_entropy),
        (state.top1_probability, layer.top1_probability),
        (state.margin, layer.margin),
    ]
    if layer.router_logsumexp is None and status is None and all(column is None for _, column in columns):
        return
    starts = run_starts(blocks, known)
    groups = RowGroups(starts, _block_numbers(blocks[starts], known[starts], NUM_GROUPS))
    for sums, column in columns:
        if column is not None:
            sums.add(column[valid], groups)
    if layer.router_logsumexp is not None:
        state.z_squared.add(np.square(layer.router_logsumexp[valid].astype(np.float64)), groups)
    if status is not None and num_dropped:
        state.dropped.add(np.count_nonzero(status == pb.SLOT_STATUS_DROPPED, axis=1), groups)
    elif status is not None:
        # Mostly so; counting slots row by row would take a sixth of the whole fold.
        state.dropped.add_sums(0, 0, np.diff(starts, append=len(blocks)), groups.numbers)


def _fold_content(
    state: LayerState,
    layer: LayerColumns,
    ids: npt.NDArray[np.int32],
    valid: npt.NDArray[np.bool_] | slice,
    batch: Batch,
    rows: slice | npt.NDArray[np.uint32],
) -> None:
    """Add the fingerprints of rows that weights or token ids tell apart."""
    columns = batch.columns
    if layer.gate_weights is None and batch.has_token_id is None:
        return
    fingerprint = combine(mix(columns.position[rows][valid].astype(np.uint64)), ids.astype(np.uint32))
    if layer.gate_weights is not None:
        # As on the wire, so that a notebook and an analyzer tell the same tokens apart.
        with np.errstate(over="ignore"):
            weights = np.ascontiguousarray(layer.gate_weights[valid], np.float16).view(np.uint16)
        fingerprint = combine(fingerprint, weights)
    is_told = None
    if columns.token_id is not None and batch.has_token_id is not None:
        has_token_id = batch.has_token_id[rows][valid]
        with_token = combine(fingerprint, columns.token_id[rows][valid].reshape(-1, 1))
        fingerprint = np.where(has_token_id, with_token, fingerprint)
        is_told = has_token_id if layer.gate_weights is None else None
    if layer.router_entropy is not None:
        with np.errstate(over="ignore"):
            entropy = layer.router_entropy[valid].astype(np.float16).view(np.uint16)
        fingerprint = combine(fingerprint, entropy.reshape(-1, 1))
    if is_told is not None:
        fingerprint = fingerprint[is_told]
    observe(state.content_registers, fingerprint)
    state.num_fingerprints += len(fingerprint)


def _add_probabilities(state: LayerState, sums: npt.NDArray[np.float64], num_tokens: int) -> None:
    if sums.shape != state.counts.shape:
        raise InvalidInputError(
            f"layer {state.shape.layer_index}: probability_sum has shape {sums.shape}, expected {state.counts.shape}"
        )
    if not np.isfinite(sums).all():
        return
    state.probability_sum += np.rint(np.clip(sums, 0, MAX_ABSOLUTE) * FIXED_POINT).astype(np.int64)
    state.num_probability_tokens += num_tokens


def fold_sums(state: LayerState, layer: LayerCountColumns, columns: CountsColumns, step_source: int) -> None:
    """Add the sums of one layer, in place."""
    if layer.probability_sum is not None:
        _add_probabilities(state, np.asarray(layer.probability_sum, np.float64), layer.num_tokens)
    counts = np.asarray(layer.expert_counts, np.uint64)
    state.counts += counts
    state.squared_loads += even_squares(int(counts.sum()), layer.num_tokens)
    state.num_padding += layer.num_padding
    state.num_tokens += layer.num_tokens
    state.phase_tokens[min(columns.phase, NUM_PHASES - 1)] += np.uint64(layer.num_tokens)
    state.num_dropped_slots += layer.dropped_slots
    state.num_skipped_slots += layer.skipped_slots
    state.num_identity_slots += layer.identity_slots
    state.num_unused_slots += layer.num_tokens * state.shape.top_k - _num_accounted(layer)
    if layer.num_tokens:
        state.see_steps(columns.first_step, columns.last_step)
        sums = (columns.last_step, counts, layer.num_tokens, step_source)
        if state.load_series is not None:
            state.load_series.add_sums(*sums)
        if state.step_sample is not None and columns.first_step == columns.last_step:
            state.step_sample.add_sums(*sums)


def _num_accounted(layer: LayerCountColumns) -> int:
    """Slots that the sums name; the rest was unused."""
    return (
        int(np.sum(layer.expert_counts, dtype=np.uint64))
        + layer.identity_slots
        + layer.skipped_slots
        + layer.dropped_slots
    )
