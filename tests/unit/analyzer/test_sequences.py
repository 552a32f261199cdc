"""SequenceSet against a plain set."""

from hypothesis import given
from hypothesis import strategies as st

from moe_analyzer.sequences import SequenceSet


@given(st.lists(st.integers(1, 60)))
def test_sequence_set_equals_a_set_for_any_order_with_duplicates(sequences: list[int]) -> None:
    ours, plain = SequenceSet(), set[int]()
    for sequence in sequences:
        assert ours.add(sequence) == (sequence not in plain)
        plain.add(sequence)
    ours = SequenceSet.from_json(ours.to_json())
    assert all((one in ours) == (one in plain) for one in range(1, 62))
    assert ours.last == max(plain, default=0)
    assert ours.num_missing == ours.last - len(plain)


def test_sequence_set_stays_bounded_and_keeps_counting_what_is_missing() -> None:
    ours = SequenceSet()
    for sequence in range(1, 6001, 2):
        ours.add(sequence)
    assert len(ours.to_json()["ranges"]) <= 1024  # type: ignore[arg-type]
    assert ours.last == 5999
    assert ours.num_missing == 2999
