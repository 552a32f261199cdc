"""The foldable state against a loop over rows, and its algebra."""

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_rows import Case, cases

from moe_debugger.analysis._row_runs import run_starts
from moe_debugger.analysis._state_codec import STATE_FORMAT_MAJOR
from moe_debugger.analysis.analyze import fold_decisions
from moe_debugger.analysis.fixed_sums import NUM_GROUPS, UNKNOWN_GROUP, FixedSums, RowGroups
from moe_debugger.analysis.sketch import NUM_REGISTERS, distinct_estimate, hash_strings, observe
from moe_debugger.analysis.state import LayerShape, RoutingState, merge_all, num_blocks
from moe_debugger.analysis.workloads import SAMPLE_REQUESTS
from moe_debugger.errors import InvalidInputError, UnsupportedFormatError, WireFormatError
from moe_debugger.wire.codec import CountsColumns, LayerColumns, LayerCountColumns, RoutingColumns

MakeColumns = Callable[..., RoutingColumns]
SHAPES = [LayerShape(0, 8, 2), LayerShape(1, 8, 2)]


def folded(*batches: RoutingColumns) -> RoutingState:
    state = RoutingState.empty(SHAPES)
    for batch in batches:
        state.fold(batch)
    return state


def rows_of(columns: RoutingColumns, keep: np.ndarray) -> RoutingColumns:
    """Return the token rows where `keep` holds, with their layers' rows."""
    new_index = np.cumsum(keep) - 1
    layers = []
    for layer in columns.layers:
        rows = np.arange(columns.num_tokens) if layer.row_index is None else layer.row_index
        mine = keep[rows]
        values = {
            name: getattr(layer, name)[mine]
            for name in ("expert_ids", "gate_weights", "slot_status", "margin", "router_entropy", "router_logsumexp")
        }
        layers.append(
            LayerColumns(
                layer_index=layer.layer_index,
                num_experts=layer.num_experts,
                row_index=new_index[rows[mine]].astype(np.uint32),
                top1_probability=layer.top1_probability[mine] if layer.top1_probability is not None else None,
                **values,
            )
        )
    return RoutingColumns(
        step=columns.step[keep],
        forward_index=columns.forward_index[keep],
        request_ids=columns.request_ids,
        request_index=columns.request_index[keep],
        position=columns.position[keep],
        phase=columns.phase[keep],
        is_padding=columns.is_padding[keep],
        token_id=None if columns.token_id is None else columns.token_id[keep],
        layers=layers,
    )


def test_fold_counts_the_worked_example_of_the_module() -> None:
    columns = RoutingColumns(
        step=np.array([3, 3, 4], np.uint64),
        forward_index=np.zeros(3, np.uint64),
        request_ids=["a"],
        request_index=np.zeros(3, np.uint32),
        position=np.arange(3, dtype=np.uint32),
        phase=np.ones(3, np.uint8),
        is_padding=np.array([False, False, True]),
        layers=[LayerColumns(0, 4, np.array([[0, 1], [0, 2], [3, 3]], np.int32))],
    )
    state = RoutingState.empty([LayerShape(0, 4, 2)])
    state.fold(columns)
    layer = state.layers[0]
    assert layer.counts.tolist() == [2, 1, 1, 0]
    assert (layer.num_tokens, layer.num_padding, layer.first_step, layer.last_step) == (2, 1, 3, 3)
    assert layer.block_counts.sum(axis=0).tolist() == [2, 1, 1, 0]
    assert (state.num_requests, layer.num_occupied_blocks) == (1, 1)


@pytest.mark.parametrize("seed", range(5))
def test_fold_equals_a_loop_over_rows(make_columns: MakeColumns, seed: int) -> None:
    columns = make_columns(np.random.default_rng(seed), num_tokens=200)
    state = folded(columns)
    for layer in columns.layers:
        rows = range(columns.num_tokens) if layer.row_index is None else layer.row_index.tolist()
        counts: Counter[int] = Counter()
        tokens = padding = dropped = skipped = unused = squares = 0
        margins = []
        assert layer.slot_status is not None
        assert layer.margin is not None
        for at, row in enumerate(rows):
            if columns.is_padding[row]:
                padding += 1
                continue
            tokens += 1
            if np.isfinite(layer.margin[at]):
                margins.append(float(layer.margin[at]))
            before = counts.total()
            for expert, status in zip(layer.expert_ids[at].tolist(), layer.slot_status[at].tolist(), strict=True):
                if status == 2:
                    dropped += 1
                elif expert >= 0 and status in (0, 1):
                    counts[expert] += 1
                elif status == 3:
                    skipped += 1
                else:
                    unused += 1
            squares += (counts.total() - before) ** 2
        got = state.layers[layer.layer_index]
        assert got.counts.tolist() == [counts[expert] for expert in range(8)]
        assert (got.num_tokens, got.num_padding) == (tokens, padding)
        assert (got.num_dropped_slots, got.num_skipped_slots, got.num_unused_slots) == (dropped, skipped, unused)
        assert got.num_assignments + dropped + skipped + unused == tokens * 2
        assert got.squared_loads == squares
        assert got.margin.num_values == len(margins)
        assert got.margin.mean == pytest.approx(np.mean(margins), abs=1e-12)


def runs(group: npt.NDArray[np.intp]) -> RowGroups:
    starts = run_starts(group)
    return RowGroups(starts, group[starts])


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.full(200_000, 8000.0**2), 8000.0**2),
        (np.full(3_000_000, 2.0**32), 2.0**32),
        (np.array([3e-7, 3e-7, 3e-7]), 3e-7),
        (np.array([-(2.0**31) - 0.25, 2.0**31 + 0.75]), 0.25),
        (np.array([float.fromhex("-0x1.68004p-36"), 2.0**31]), 2.0**30),
    ],
    ids=["z-loss of large logits", "many of the largest values", "near 0", "both signs", "near 0 beside the largest"],
)
def test_sums_of_statistics_are_exact(values: npt.NDArray[np.float64], expected: float) -> None:
    rng = np.random.default_rng(0)
    whole, parts, merged = FixedSums(), FixedSums(), FixedSums()
    group = np.sort(rng.integers(0, NUM_GROUPS, len(values)))
    whole.add(values, runs(group))
    for rows in np.array_split(rng.permutation(len(values)), 7):
        parts.add(values[rows], runs(group[rows]))
        part = FixedSums()
        part.add(values[rows], runs(group[rows]))
        merged = part.plus(merged)
    for sums in (parts, merged):
        for name in ("wholes", "fractions", "counts"):
            assert getattr(sums, name).tolist() == getattr(whole, name).tolist()
    assert whole.mean == pytest.approx(expected, rel=1e-5, abs=1e-12)
    assert whole.num_values == len(values)
    totals, sizes = whole.by_group()
    known = np.bincount(group)
    assert sizes.tolist() == known[known > 0].tolist()
    by_hand = [math.fsum(values[group == number]) for number in np.flatnonzero(known)]
    assert totals == pytest.approx(by_hand, rel=1e-12, abs=1e-6)


def test_values_that_are_no_statistics_are_in_no_mean_and_no_sample_size() -> None:
    total = FixedSums()
    values = np.array([1.0, math.nan, math.inf, -math.inf, 3e38, 2.0], np.float32)
    total.add(values, runs(np.array([4, 4, 4, 4, UNKNOWN_GROUP, UNKNOWN_GROUP])))
    assert (total.num_values, total.mean) == (2, 1.5)
    # That of unknown requests is in no group.
    assert [part.tolist() for part in total.by_group()] == [[1.0], [1.0]]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), num_parts=st.integers(1, 4))
def test_state_is_the_same_for_any_split_and_order(make_columns: MakeColumns, seed: int, num_parts: int) -> None:
    rng = np.random.default_rng(seed)
    columns = make_columns(rng)
    part = rng.integers(0, num_parts, columns.num_tokens)
    pieces = [rows_of(columns, part == index) for index in range(num_parts)]
    whole = folded(columns)
    assert folded(*pieces[::-1]) == whole
    merged = RoutingState({})
    for index in rng.permutation(num_parts):
        merged = merged.merge(folded(pieces[index]))
    assert merged == whole


@settings(max_examples=20, deadline=None)
@given(seeds=st.tuples(*[st.integers(0, 2**32 - 1)] * 3))
def test_merge_is_associative_and_commutative(make_columns: MakeColumns, seeds: tuple[int, int, int]) -> None:
    a, b, c = (folded(make_columns(np.random.default_rng(seed))) for seed in seeds)
    assert a.merge(b).merge(c) == a.merge(b.merge(c))
    assert a.merge(b) == b.merge(a)
    assert a.merge(RoutingState({})) == a


OPTIONAL = (
    "step",
    "forward_index",
    "phase",
    "is_padding",
    "token_id",
    "workload",
    "gate_weights",
    "slot_status",
    "margin",
    "router_entropy",
    "router_logsumexp",
    "top1_probability",
)


@settings(max_examples=40, deadline=None)
@given(case=cases(), names=st.sets(st.sampled_from(OPTIONAL)), seed=st.integers(0, 2**32 - 1))
def test_decisions_have_one_state_for_any_split_order_and_tree_of_merges(
    case: Case, names: set[str], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    n, width = case.columns["expert_ids"].shape
    columns = {name: case.columns[name] for name in ("layer_index", "expert_ids", "request_id", "position")}
    drawn = {
        "step": rng.integers(0, 3, n),
        "workload": rng.choice(np.array(["code", "prose", "", None, math.nan], object), n),
        "gate_weights": rng.random((n, width)),
        # Negative ones below what is kept, and more than fits into one 64-bit sum.
        "margin": rng.choice([-1e-10, 0.3, math.nan, 2.0**41], n) * rng.random(n),
        **{name: rng.normal(0, 3, n) for name in ("router_entropy", "router_logsumexp", "top1_probability")},
    }
    columns |= {name: drawn[name] if name in drawn else case.columns[name] for name in names}
    whole = fold_decisions(columns, **case.sizes)
    order, num_parts = rng.permutation(n), int(rng.integers(1, 6))
    part = rng.integers(0, num_parts, n)
    # Whoever folds a part knows the model's layers, not only those of the part.
    states = [
        fold_decisions({name: column[order[part == at]] for name, column in columns.items()}, **case.sizes)
        for at in range(num_parts)
    ]
    while len(states) > 1:
        at = int(rng.integers(len(states) - 1))
        states[at : at + 2] = [states[at + 1].merge(states[at])]
    assert states[0] == whole
    assert states[0].phase_tokens.sum() <= n


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_counts_have_one_state_for_any_order_and_split_by_layer(seed: int) -> None:
    rng = np.random.default_rng(seed)
    whole, parts = RoutingState.empty(SHAPES), []
    for step in range(5):
        layers = [
            LayerCountColumns(index, 8, 0, int(counts.sum() + 1) // 2 + 1, int(rng.integers(3)), counts)
            for index in (0, 1)
            for counts in [rng.integers(0, 9, 8).astype(np.uint64)]
        ]
        phase = int(rng.integers(5))
        whole.fold_counts(CountsColumns(step, step, phase, 0, layers))
        for layer in layers:
            parts.append(RoutingState.empty(SHAPES))
            parts[-1].fold_counts(CountsColumns(step, step, phase, 0, [layer]))
    assert merge_all([parts[at] for at in rng.permutation(len(parts))]) == whole


WORKLOADS: dict[str, tuple[list[Any], int]] = {
    "no labels": ([None], 0),
    "missing labels are no workload": (["a", None, math.nan, ""], 1),
    "missing labels of a table": ([math.nan, 1.0, 2.0, 2.0], 2),
    "forty labels": ([f"label {at % 40}" for at in range(400)], 40),
    "four texts of another label are single texts": (["a"] * 36 + ["b"] * 4, 1),
    "eight requests of another label": (["a"] * 36 + ["b"] * 8, 2),
}


@pytest.mark.parametrize(("labels", "expected"), WORKLOADS.values(), ids=WORKLOADS)
def test_workloads_are_labels_with_requests_of_their_own(labels: list[Any], expected: int) -> None:
    length = 64
    label = np.resize(np.array(labels, object), max(len(labels), 40))
    request = np.repeat(np.arange(len(label)), length)
    columns = {
        "layer_index": np.zeros(len(request), int),
        "expert_ids": np.zeros((len(request), 1), int),
        "request_id": request,
        "workload": label[request],
    }
    assert fold_decisions(columns, num_experts=2, top_k=1).num_workloads() == expected
    listed = {name: column.tolist() for name, column in columns.items()}
    assert fold_decisions(listed, num_experts=2, top_k=1).num_workloads() == expected
    # Under labels that alternate within requests a request is of its first one.
    columns["workload"] = np.where(np.arange(len(request)) % 2, "odd", "even")
    assert fold_decisions(columns, num_experts=2, top_k=1).num_workloads() == 1


def test_workloads_are_those_of_the_layer_that_has_seen_most() -> None:
    request = np.repeat(np.arange(40), 64)
    columns = {
        "layer_index": request // 20,
        "expert_ids": np.zeros((len(request), 1), int),
        "request_id": request,
        "workload": request // 20,
    }
    assert fold_decisions(columns, num_experts=2, top_k=1).num_workloads() == 1


def test_sampled_workloads_are_bounded_and_the_same_for_any_split() -> None:
    rng = np.random.default_rng(0)
    request = rng.permutation(np.repeat(np.arange(3000), 3))
    columns = {
        "layer_index": np.zeros(9000, int),
        "expert_ids": np.zeros((9000, 1), int),
        "request_id": request,
        "position": np.arange(9000),
        "workload": request % 7,
    }
    whole = fold_decisions(columns, num_experts=2, top_k=1)
    parts = [{name: column[at::4] for name, column in columns.items()} for at in range(4)]
    assert merge_all([fold_decisions(part, num_experts=2, top_k=1) for part in parts]) == whole
    assert len(whole.layers[0].workloads.requests) == SAMPLE_REQUESTS
    assert whole.layers[0].workloads.num_tokens.tolist() == [3] * SAMPLE_REQUESTS
    assert whole.num_workloads() == 7


@pytest.mark.parametrize("has_weights", [True, False])
def test_a_token_id_of_minus_one_was_not_captured(has_weights: bool) -> None:
    rng = np.random.default_rng(0)
    columns = {
        "layer_index": np.zeros(200, int),
        "expert_ids": rng.integers(0, 8, (200, 1)),
        "request_id": np.repeat(["a", "b"], 100),
        "position": np.tile(np.arange(100), 2),
    }
    if has_weights:
        columns["gate_weights"] = rng.random((200, 1))
    without = fold_decisions(columns, num_experts=8, top_k=1)
    assert fold_decisions(columns | {"token_id": np.full(200, -1)}, num_experts=8, top_k=1) == without
    # Row by row: the others count as they do alone.
    token = np.where(np.arange(200) < 50, -1, np.arange(200))
    mixed = fold_decisions(columns | {"token_id": token}, num_experts=8, top_k=1)
    rows = [{name: column[at] for name, column in columns.items()} for at in (slice(50), slice(50, None))]
    rows[1]["token_id"] = token[50:]
    assert merge_all([fold_decisions(part, num_experts=8, top_k=1) for part in rows]) == mixed
    assert (mixed.token_classes.sum(), mixed.layers[0].num_fingerprints) == (150, 200 if has_weights else 150)


def test_merge_leaves_its_parts_alone_when_the_result_is_folded_into(make_columns: MakeColumns) -> None:
    columns = make_columns(np.random.default_rng(0))
    part = folded(columns)
    before = part.to_bytes()
    merged = part.merge(RoutingState({}))
    merged.fold(columns)
    assert part.to_bytes() == before


def test_merge_joins_the_layers_of_pipeline_stages() -> None:
    first, second = RoutingState.empty([LayerShape(0, 8, 2)]), RoutingState.empty([LayerShape(5, 4, 1)])
    assert [shape.layer_index for shape in second.merge(first).shapes] == [0, 5]


def test_merge_refuses_layers_of_different_models() -> None:
    with pytest.raises(InvalidInputError, match="different models"):
        RoutingState.empty([LayerShape(0, 8, 2)]).merge(RoutingState.empty([LayerShape(0, 16, 2)]))


def test_rows_without_a_drop_give_one_state_alone_or_beside_dropped_ones() -> None:
    rng = np.random.default_rng(0)
    rows = {
        "layer_index": np.zeros(400, int),
        "expert_ids": rng.permuted(np.tile(np.arange(8), (400, 1)), axis=1)[:, :2],
        "request_id": np.repeat([f"request {number}" for number in range(40)], 10),
        "slot_status": np.ones((400, 2), int),
    }
    rows["slot_status"][200:, 1] = np.where(rng.random(200) < 0.3, 2, 1)
    rows["expert_ids"][rows["slot_status"] == 2] = -1
    whole, *parts = (
        fold_decisions({name: values[part] for name, values in rows.items()}, num_experts=8, top_k=2)
        for part in (slice(None), slice(200), slice(200, None))
    )
    assert whole.layers[0].dropped.num_values == 400
    assert whole.layers[0].dropped.mean == pytest.approx((rows["slot_status"] == 2).sum() / 400)
    assert parts[0].layers[0].dropped.num_values == 200
    assert merge_all(parts) == whole


def test_bytes_round_trip(make_columns: MakeColumns) -> None:
    state = folded(make_columns(np.random.default_rng(3), num_tokens=500))
    again = RoutingState.from_bytes(state.to_bytes())
    assert again == state
    assert again.layers[0].margin.mean == state.layers[0].margin.mean
    assert again.phase_tokens.tolist() == state.phase_tokens.tolist()
    assert again.token_classes.tolist() == state.token_classes.tolist()
    assert RoutingState.from_bytes(RoutingState({}).to_bytes()) == RoutingState({})


def test_damaged_bytes_are_a_wire_format_error(make_columns: MakeColumns) -> None:
    data = folded(make_columns(np.random.default_rng(3))).to_bytes()
    rng = np.random.default_rng(0)
    for size in [0, 1, 11, 12, *rng.integers(12, len(data), 40).tolist()]:
        with pytest.raises(WireFormatError):
            RoutingState.from_bytes(data[:size])
    for at in rng.integers(0, len(data), 200).tolist():
        damaged = bytearray(data)
        damaged[at] ^= 1 << int(rng.integers(8))
        if at in (5, 6, 7):  # the minor version and the reserved bytes do not have to be known
            continue
        with pytest.raises(WireFormatError):
            RoutingState.from_bytes(bytes(damaged))
    with pytest.raises(UnsupportedFormatError, match="upgrade"):
        RoutingState.from_bytes(data[:4] + bytes([STATE_FORMAT_MAJOR + 1]) + data[5:])


def test_unnamed_training_rows_form_blocks_by_forward_and_unnamed_decode_rows_none() -> None:
    def batch(phase: int, step: int) -> RoutingColumns:
        ids = np.zeros((4, 1), np.int32)
        return RoutingColumns(
            step=np.full(4, step, np.uint64),
            forward_index=np.full(4, step, np.uint64),
            request_ids=[""],
            request_index=np.zeros(4, np.uint32),
            position=np.arange(4, dtype=np.uint32),
            phase=np.full(4, phase, np.uint8),
            is_padding=np.zeros(4, bool),
            layers=[LayerColumns(0, 2, ids)],
        )

    training, decoding = RoutingState.empty([LayerShape(0, 2, 1)]), RoutingState.empty([LayerShape(0, 2, 1)])
    for step in range(10):
        training.fold(batch(3, step))
        decoding.fold(batch(2, step))
    assert training.num_requests == 10
    assert int(training.layers[0].block_tokens.sum()) == 40
    assert (decoding.num_requests, decoding.layers[0].num_occupied_blocks) == (0, 0)
    assert decoding.layers[0].counts.tolist() == [40, 0]


def test_a_name_that_comes_again_in_training_is_another_sequence_and_in_generation_the_same() -> None:
    for phase, expected in ((3, 30), (2, 1)):
        state = RoutingState.empty([LayerShape(0, 2, 1)])
        for step in range(30):
            state.fold(
                RoutingColumns(
                    step=np.full(2, step, np.uint64),
                    forward_index=np.full(2, step, np.uint64),
                    request_ids=["row 0"],
                    request_index=np.zeros(2, np.uint32),
                    position=np.arange(2, dtype=np.uint32),
                    phase=np.full(2, phase, np.uint8),
                    is_padding=np.zeros(2, bool),
                    layers=[LayerColumns(0, 2, np.zeros((2, 1), np.int32))],
                )
            )
        assert state.num_requests == expected


def test_requests_are_counted_exactly_where_there_are_few() -> None:
    def state_of(names: list[str]) -> RoutingState:
        columns = {
            "layer_index": np.zeros(len(names), int),
            "expert_ids": np.zeros((len(names), 1), int),
            "request_id": names,
        }
        return fold_decisions(columns, num_experts=2, top_k=1)

    names = [f"request {index}" for index in range(400)]
    for number in (1, 19, 20, 21, 100, 255):
        assert state_of(names[:number] * 2).num_requests == number
        merged = state_of(names[: number // 2 + 1]).merge(state_of(names[number // 3 : number]))
        assert merged.num_requests == number
        assert merged.request_sample.tolist() == state_of(names[:number]).request_sample.tolist()
    many = state_of(names)
    assert many.num_requests == pytest.approx(400, rel=0.1)
    # What an older version has seen is in the registers alone.
    older = RoutingState(state_of(names[:30]).layers, state_of(names[:30]).request_registers)
    assert older.merge(state_of(names[20:50])).num_requests == pytest.approx(50, abs=6)


def sums(layer_index: int, counts: list[int], num_tokens: int, **values: Any) -> LayerCountColumns:
    return LayerCountColumns(
        layer_index, 4, 0, num_tokens, values.pop("num_padding", 0), np.array(counts, np.uint64), **values
    )


def test_fold_counts_adds_load_without_blocks() -> None:
    state = RoutingState.empty([LayerShape(0, 4, 2), LayerShape(1, 4, 2)])
    dropped = sums(0, [3, 1, 2, 0], 5, num_padding=7, dropped_slots=1, identity_slots=1, skipped_slots=1)
    # A layer that saw fewer rows than the other, as an encoder's may.
    state.fold_counts(CountsColumns(5, 6, 3, 0, [dropped, sums(1, [1, 1, 0, 0], 1)]))
    layer = state.layers[0]
    assert layer.counts.tolist() == [3, 1, 2, 0]
    assert (layer.num_tokens, layer.num_padding, layer.num_dropped_slots) == (5, 7, 1)
    assert (layer.num_identity_slots, layer.num_skipped_slots, layer.num_unused_slots) == (1, 1, 1)
    assert (layer.first_step, layer.last_step, layer.num_occupied_blocks) == (5, 6, 0)
    # Sums do not tell single tokens: six routed slots of five tokens are 2, 1, 1, 1, 1.
    assert layer.squared_loads == 8
    assert (state.layers[1].num_tokens, state.phase_tokens.tolist()) == (1, [0, 0, 0, 5, 0])
    before = state.to_bytes()
    for wrong, text in (
        (sums(0, [1, 2], 2), "shape"),
        (sums(9, [1, 1, 0, 0], 1), "not among"),
        (sums(0, [3, 0, 0, 0], 1), "account for 3 slots, 1 tokens with top-2 have 2"),
    ):
        with pytest.raises(InvalidInputError, match=text):
            state.fold_counts(CountsColumns(0, 0, 3, 0, [sums(1, [1, 1, 0, 0], 1), wrong]))
    assert state.to_bytes() == before, "nothing of a batch that does not fit is added"


def test_identity_experts_are_counted_apart_and_are_no_load() -> None:
    shape = LayerShape(0, 4, 2, num_identity_experts=2)
    ids = np.array([[0, 4], [5, 1], [2, -1], [3, -1]], np.int32)
    status = np.array([[1, 4], [4, 1], [1, 2], [1, 3]], np.uint8)
    columns = RoutingColumns(
        step=np.zeros(4, np.uint64),
        forward_index=np.zeros(4, np.uint64),
        request_ids=["a"],
        request_index=np.zeros(4, np.uint32),
        position=np.arange(4, dtype=np.uint32),
        phase=np.ones(4, np.uint8),
        is_padding=np.zeros(4, bool),
        layers=[LayerColumns(0, 4, ids, slot_status=status, num_identity_experts=2)],
    )
    state = RoutingState.empty([shape])
    state.fold(columns)
    layer = RoutingState.from_bytes(state.to_bytes()).layers[0]
    assert layer.shape == shape
    assert layer.counts.tolist() == [1, 1, 1, 1]
    assert (layer.num_identity_slots, layer.num_dropped_slots, layer.num_skipped_slots) == (2, 1, 1)
    assert layer.num_unused_slots == 0
    columns.layers[0].expert_ids[0, 1] = 6
    with pytest.raises(InvalidInputError, match="expected 0 to 5"):
        state.fold(columns)


def test_layers_that_see_other_rows_count_their_own() -> None:
    """An encoder's rows and a decoder's come as columns of their own, with other numbers of rows."""
    state = RoutingState.empty([LayerShape(0, 4, 1), LayerShape(1, 4, 1)])
    for layer_index, num_rows in ((0, 7), (1, 3)):
        state.fold(
            RoutingColumns(
                step=np.zeros(num_rows, np.uint64),
                forward_index=np.zeros(num_rows, np.uint64),
                request_ids=["a"],
                request_index=np.zeros(num_rows, np.uint32),
                position=np.arange(num_rows, dtype=np.uint32),
                phase=np.ones(num_rows, np.uint8),
                is_padding=np.arange(num_rows) == 0,
                layers=[LayerColumns(layer_index, 4, np.zeros((num_rows, 1), np.int32))],
            )
        )
    assert [(layer.num_tokens, layer.num_padding) for layer in state.layers.values()] == [(6, 1), (2, 1)]
    assert [layer.num_assignments for layer in state.layers.values()] == [6, 2]
    assert state.num_requests == 1


def test_fold_refuses_rows_that_do_not_fit_and_adds_nothing(make_columns: MakeColumns) -> None:
    state = folded()
    before = state.to_bytes()
    for layer in (
        LayerColumns(7, 8, np.zeros((3, 2), np.int32)),
        LayerColumns(0, 8, np.full((3, 2), 8, np.int32)),
        LayerColumns(0, 8, np.zeros((3, 1), np.int32)),
        LayerColumns(0, 8, np.zeros((2, 2), np.int32)),
        LayerColumns(0, 8, np.zeros((2, 2), np.int32), row_index=np.array([0, 3], np.uint32)),
    ):
        columns = make_columns(np.random.default_rng(0), num_tokens=3)
        columns.layers = [columns.layers[0], layer]
        with pytest.raises(InvalidInputError, match=f"layer {layer.layer_index}"):
            state.fold(columns)
    assert state.to_bytes() == before


@pytest.mark.parametrize("true_number", [0, 1, 20, 64, 500, 5_000, 200_000])
def test_distinct_counter_is_right_within_its_error_and_counts_repeats_once(true_number: int) -> None:
    registers = np.zeros(NUM_REGISTERS, np.uint8)
    hashes = hash_strings([f"request-{index}" for index in range(true_number)])
    for _ in range(2):
        observe(registers, hashes)
    assert distinct_estimate(registers) == pytest.approx(true_number, rel=0.2, abs=1)


def test_hash_does_not_depend_on_the_other_strings_of_its_batch() -> None:
    assert hash_strings(["a", "a much longer name"])[0] == hash_strings(["a"])[0]
    beginning = "session/" * 40
    names = [beginning + end for end in ("a", "b", "a" * 1000, "a" * 100_000)] + ["short", "x" * 128, "x" * 129]
    assert len(set(hash_strings(names).tolist())) == len(names)
    assert hash_strings(names).tolist() == [int(hash_strings([name])[0]) for name in names]
    # Of any process and any build: states hold them.
    assert int(hash_strings(["request-1"])[0]) == 15228573225766156266
    assert hash_strings(["", "é", "日本語"]).tolist() == [int(hash_strings([x])[0]) for x in ["", "é", "日本語"]]


def test_memory_of_a_layer_is_bounded_whatever_its_width() -> None:
    assert all(num_blocks(experts) * experts <= 65_536 for experts in (1, 8, 64, 128, 256, 1024, 4096))
    assert (num_blocks(8), num_blocks(256)) == (64, 16)
