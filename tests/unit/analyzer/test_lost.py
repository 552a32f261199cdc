"""What may have left the stream: an upper bound, counted once over all partitions, only for sessions it can concern."""

from hypothesis import given
from hypothesis import strategies as st

from moe_analyzer.lost import LostRange, add_lost, decode_lost, encode_lost, num_lost

spans = st.tuples(st.integers(1, 3000), st.integers(0, 40)).map(lambda one: (one[0], one[0] + one[1]))


def lost(first: int, last: int, *, stream: str = "s", after_ns: int = 0, noticed_ns: int = 100) -> LostRange:
    return LostRange(stream, first, last, after_ns, noticed_ns)


def test_overlapping_ranges_of_two_partitions_count_once() -> None:
    assert num_lost([lost(5, 10), lost(8, 12), lost(6, 7)], opened_ns=0) == 8
    assert num_lost([lost(5, 10), lost(5, 10, stream="anew")], opened_ns=0) == 12
    assert num_lost([], opened_ns=0) == 0


def test_a_range_concerns_only_sessions_of_its_time() -> None:
    gap = [lost(1, 10, after_ns=50, noticed_ns=100)]
    assert num_lost(gap, opened_ns=101) == 0  # opened after it was noticed
    assert num_lost(gap, opened_ns=100) == 10
    assert num_lost(gap, opened_ns=10, closed_ns=49) == 0  # closed before it began
    assert num_lost(gap, opened_ns=10, closed_ns=50) == 10


@given(st.lists(spans, max_size=80))
def test_the_ranges_are_bounded_and_never_below_the_truth(found: list[tuple[int, int]]) -> None:
    kept: tuple[LostRange, ...] = ()
    for number, (first, last) in enumerate(found):
        kept = add_lost(kept, lost(first, last, after_ns=number, noticed_ns=100 + number))
    assert len(kept) <= 32
    truth = {sequence for first, last in found for sequence in range(first, last + 1)}
    covered = {sequence for one in kept for sequence in range(one.first, one.last + 1)}
    assert truth <= covered
    assert num_lost(kept, opened_ns=0) == len(covered)
    if len(set(found)) <= 32:
        assert truth == covered
    assert decode_lost(encode_lost(kept).encode()) == kept


def test_a_state_without_ranges_has_lost_nothing() -> None:
    assert decode_lost(None) == ()
