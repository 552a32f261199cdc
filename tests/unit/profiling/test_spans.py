"""From marks to times, by hand and against plain loops."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_debugger.profiling.places import Layout, Part
from moe_debugger.profiling.spans import Places, Spans, block_calls, spans_of
from moe_debugger.profiling.store import ForwardRecord, RecordStore

# forward, block, router, experts, shared, wait, expert 0, expert 1 of layer 0; block of layer 1
_PARTS = [Part.FORWARD, Part.BLOCK, Part.ROUTER, Part.EXPERTS, Part.SHARED, Part.WAIT, Part.EXPERT, Part.EXPERT]
PLACES = Places(
    np.array([-1, *[0] * 7, 1], np.int32),
    np.array([*_PARTS, Part.BLOCK], np.int32),
    np.array([*[-1] * 6, 0, 1, -1], np.int32),
)
F, B, R, X, S, W, E0, E1, B1 = range(9)


def record(
    *marks: tuple[int, bool, int] | tuple[int, bool, int, int],
    index: int = 0,
    counts: list[tuple[int, list[int]]] | None = None,
) -> ForwardRecord:
    """Return a record of (place, is end, offset[, rows])."""
    given_counts = counts or []
    return ForwardRecord(
        forward_index=index,
        step=index,
        lane=0,
        start_ns=10_000 * index,
        codes=np.array([2 * each[0] + each[1] for each in marks], np.int32),
        offsets=np.array([each[2] for each in marks], np.int64),
        rows=np.array([each[3] if len(each) > 3 else 0 for each in marks], np.int32),
        count_layers=np.array([layer for layer, _ in given_counts], np.int32),
        counts=np.array([row for _, row in given_counts] or np.zeros((0, 0)), np.int32),
        own_ns=0,
    )


def test_a_fused_block_is_router_experts_shared_wait_and_a_rest() -> None:
    one = record(
        (F, False, 0),
        (B, False, 10, 6),
        (R, False, 12, 6), (R, True, 30),
        (S, False, 31), (S, True, 41),
        (X, False, 50, 6), (W, False, 60), (W, True, 65), (X, True, 90),
        (W, False, 92), (W, True, 95),
        (B, True, 100),
        (F, True, 120),
        counts=[(0, [5, 7])],
    )  # fmt: skip
    spans = spans_of([one], PLACES)
    calls = block_calls(spans, [one], 0, "fused", 2)
    assert calls.block.tolist() == [90]
    assert calls.router.tolist() == [18]
    assert calls.experts.tolist() == [40]
    assert calls.shared.tolist() == [10]
    assert calls.wait.tolist() == [8]
    # 90 - 18 - 10 - 40 - 3: the wait inside of the experts is theirs already.
    assert calls.rest.tolist() == [19]
    assert np.isnan(calls.dispatch).all()
    assert np.isnan(calls.combine).all()
    assert calls.rows.tolist() == [6]
    assert calls.expert_rows is not None
    assert calls.expert_rows.tolist() == [[5, 7]]
    assert calls.expert_times is None


def test_experts_that_are_modules_have_dispatch_before_and_combine_after_them() -> None:
    one = record(
        (F, False, 0),
        (B, False, 0, 4),
        (R, False, 5), (R, True, 15),
        (E0, False, 25, 3), (E0, True, 45),
        (E1, False, 50, 1), (E1, True, 60),
        (S, False, 62), (S, True, 70),
        (B, True, 100),
        (F, True, 100),
    )  # fmt: skip
    calls = block_calls(spans_of([one], PLACES), [one], 0, "modules", 2)
    assert calls.experts.tolist() == [30]
    assert calls.dispatch.tolist() == [10]
    assert calls.combine.tolist() == [100 - 60 - 8]
    # What is left: 5 before the router, and 5 between the experts, which is both dispatch and combine.
    assert calls.rest.tolist() == [10]
    assert calls.expert_times is not None
    assert calls.expert_rows is not None
    assert calls.expert_times.tolist() == [[20, 10]]
    assert calls.expert_rows.tolist() == [[3, 1]]
    assert calls.dispatch_start.tolist() == [15]
    assert calls.combine_start.tolist() == [60]


_LIST = [
    (B, False, 0), (R, False, 5), (R, True, 15), (S, False, 18), (W, False, 19), (W, True, 21), (S, True, 22),
    (E0, False, 25), (E0, True, 45), (E1, False, 50), (E1, True, 60), (W, False, 62), (W, True, 70), (B, True, 100),
]  # fmt: skip
_CALLED_LIST = [
    (B, False, 0), (R, False, 5), (R, True, 15), (X, False, 20), (E0, False, 25), (E0, True, 45), (X, True, 60),
    (B, True, 100),
]  # fmt: skip
_DENSE = [(B, False, 2), (R, False, 2), (R, True, 9), (X, False, 20), (X, True, 80), (B, True, 85)]


@pytest.mark.parametrize(
    ("marks", "layout", "expected"),
    [
        pytest.param(
            _LIST,
            "modules",
            {"rest": [(0, 5), (45, 50)], "dispatch": [(15, 18), (22, 25)], "combine": [(60, 62), (70, 100)]},
            id="list",
        ),
        pytest.param(
            _CALLED_LIST,
            "modules",
            {"rest": [(0, 5)], "dispatch": [(15, 20), (20, 25)], "combine": [(45, 60), (60, 100)]},
            id="a list that is called",
        ),
        pytest.param(_DENSE, "dense", {"dispatch": [(9, 20)], "combine": [(80, 85)]}, id="dense"),
        pytest.param(_DENSE, "fused", {"rest": [(9, 20), (80, 85)]}, id="fused"),
    ],
)
def test_what_lies_between_the_parts_are_stretches_that_overlap_nothing(
    marks: list[tuple[int, bool, int]], layout: Layout, expected: dict[str, list[tuple[int, int]]]
) -> None:
    # The same block twice in a forward, and once in the next.
    twice = [*marks, *((place, is_end, at + 200) for place, is_end, at in marks)]
    records = [record((F, False, 0), *calls, (F, True, 500), counts=[(0, [1, 1])] * 2) for calls in (twice, marks)]
    spans = spans_of(records, PLACES)
    calls = block_calls(spans, records, 0, layout, 2)
    gaps = calls.gaps
    found: dict[tuple[int, str], list[tuple[int, int]]] = {}
    for call, part, start, duration in zip(
        *(each.tolist() for each in (gaps.call, gaps.part, gaps.start, gaps.duration)), strict=True
    ):
        found.setdefault((call, Part(part).label), []).append((start, start + duration))
    assert found == {
        (call, part): [(low + 200 * (call == 1), high + 200 * (call == 1)) for low, high in own]
        for call in range(3)
        for part, own in expected.items()
    }
    for part in (Part.DISPATCH, Part.COMBINE, Part.REST):
        sums = np.bincount(gaps.call[gaps.part == part], gaps.duration[gaps.part == part], minlength=3)
        np.testing.assert_array_equal(sums, np.nan_to_num(getattr(calls, part.label)))


def test_dense_experts_compute_every_row_with_every_expert() -> None:
    one = record((F, False, 0), (B, False, 0, 4), (X, False, 3, 8), (X, True, 9), (B, True, 10), (F, True, 10))
    calls = block_calls(spans_of([one], PLACES), [one], 0, "dense", 2)
    assert calls.expert_rows is not None
    assert calls.expert_rows.tolist() == [[4, 4]]


def test_a_block_that_is_called_twice_keeps_its_parts_apart() -> None:
    marks = [(F, False, 0)]
    for at in (0, 100):
        marks += [(B, False, at), (R, False, at + 1), (R, True, at + 4 + at // 50), (B, True, at + 50)]
    one = record(*marks, (F, True, 200), counts=[(0, [1, 0]), (1, [9, 9]), (0, [0, 2])])
    calls = block_calls(spans_of([one], PLACES), [one], 0, "fused", 2)
    assert calls.call.tolist() == [0, 1]
    assert calls.router.tolist() == [3, 5]
    assert calls.expert_rows is not None
    assert calls.expert_rows.tolist() == [[1, 0], [0, 2]]


def test_marks_without_a_partner_are_counted_and_take_nothing_else_along() -> None:
    one = record((F, False, 0), (B, False, 1), (R, False, 2), (B, True, 9), (F, True, 10))
    spans = spans_of([one], PLACES)
    assert spans.num_unmatched == 1
    assert sorted(spans.part.tolist()) == [Part.FORWARD, Part.BLOCK]


def test_nothing_gives_nothing() -> None:
    spans = spans_of([], PLACES)
    assert len(spans) == 0
    assert len(block_calls(spans, [], 0, "fused", 2)) == 0


Interval = tuple[int, int, int]


@st.composite
def nested(draw: st.DrawFn) -> list[list[tuple[int, bool, int]]]:
    """Return forwards of random blocks of two layers; the first layer's have random parts, which may nest waits."""
    forwards = []
    for _ in range(draw(st.integers(1, 3))):
        at, marks = 0, [(F, False, 0)]
        for _ in range(draw(st.integers(0, 3))):
            block = draw(st.sampled_from([B, B1]))
            at += draw(st.integers(0, 5))
            marks.append((block, False, at))
            for part in draw(st.lists(st.sampled_from([R, X, S, W]), max_size=4)) if block == B else []:
                at += draw(st.integers(0, 5))
                marks.append((part, False, at))
                if part == X and draw(st.booleans()):
                    at += draw(st.integers(0, 3))
                    marks.append((W, False, at))
                    at += draw(st.integers(0, 3))
                    marks.append((W, True, at))
                at += draw(st.integers(0, 5))
                marks.append((part, True, at))
            at += draw(st.integers(0, 5))
            marks.append((block, True, at))
        marks.append((F, True, at + 1))
        forwards.append(marks)
    return forwards


def _slow(marks: list[tuple[int, bool, int]]) -> list[dict[str, int]]:
    """Return the times of each block of layer 0 by walking along the marks, instant by instant."""
    calls: list[dict[str, int]] = []
    open_at: dict[int, list[int]] = {}
    busy: list[Interval] = []
    for place, is_end, at in marks:
        if not is_end:
            open_at.setdefault(place, []).append(at)
            if place == B:
                busy = []
                calls.append({"router": 0, "experts": 0, "shared": 0, "wait": 0})
            continue
        begun = open_at[place].pop()
        name = {R: "router", X: "experts", S: "shared", W: "wait"}.get(place)
        if name is not None and B in open_at and open_at[B]:
            calls[-1][name] += at - begun
            busy.append((begun, at, place))
        if place == B:
            covered = {instant for low, high, _ in busy for instant in range(low, high)}
            calls[-1] |= {"block": at - begun, "rest": at - begun - len(covered)}
    return calls


@settings(max_examples=60, deadline=None)
@given(nested())
def test_times_agree_with_a_walk_along_the_marks(forwards: list[list[tuple[int, bool, int]]]) -> None:
    records = [record(*marks, index=index) for index, marks in enumerate(forwards)]
    spans: Spans = spans_of(records, PLACES)
    assert spans.num_unmatched == 0
    calls = block_calls(spans, records, 0, "fused", 2)
    expected = [call for marks in forwards for call in _slow(marks)]
    assert len(calls) == len(expected)
    for name in ("block", "router", "experts", "shared", "wait", "rest"):
        assert getattr(calls, name).tolist() == [call[name] for call in expected], name


def test_the_store_keeps_the_newest_within_its_bound_and_counts_the_others() -> None:
    one = record((F, False, 0), (F, True, 1))
    store = RecordStore(3 * one.num_bytes)
    for index in range(10):
        store.add(record((F, False, 0), (F, True, 1), index=index))
    assert [each.forward_index for each in store.records()] == [7, 8, 9]
    assert store.num_dropped == 7
    assert store.used_bytes <= store.limit_bytes
    assert [each.forward_index for each in store.records(after=8)] == [8, 9]
    assert [each.forward_index for each in store.records(after=2, newest=1)] == [9]


@pytest.mark.parametrize("layout", ["fused", "modules", "dense", "whole"])
def test_a_layer_that_was_never_called_has_no_calls(layout: str) -> None:
    one = record((F, False, 0), (F, True, 5))
    calls = block_calls(spans_of([one], PLACES), [one], 0, layout, 2)  # type: ignore[arg-type]
    assert len(calls) == 0
