"""Scores and weights, worked by hand."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_debugger.analysis.explanation.association import CAP, onset_score, rank_correlation
from moe_debugger.analysis.explanation.explain import weighted
from moe_debugger.analysis.explanation.model import Cause, Onset
from moe_debugger.analysis.explanation.settings import ObservedSettings, Setting
from moe_debugger.errors import InvalidInputError
from moe_debugger.v1 import session_pb2

from .conftest import series

ONSET = Onset(0, 120, 118, 121, "effective_experts", 8.0, 2.0, 30.0, "change_point")


def test_a_change_shortly_before_the_onset_scores_by_how_unlikely_that_is() -> None:
    # 8 steps before the earliest onset, an interval of 4 steps, 300 steps: p = 12 / 300.
    assert onset_score(110, ONSET, 300) == pytest.approx(-math.log(12 / 300))
    # Within the interval there is no lag; two changes had two chances.
    assert onset_score(119, ONSET, 300, num_changes=2) == pytest.approx(-math.log(8 / 300))


def test_what_comes_later_or_would_have_come_so_close_anyway_scores_nothing() -> None:
    assert onset_score(122, ONSET, 300) == 0
    assert onset_score(0, ONSET, 100) == 0
    assert onset_score(119, None, 300) == 0


def test_rank_correlation_is_spearmans_with_fewer_effective_pairs_where_neighbours_are_alike() -> None:
    x = np.array([1.0, 2, 3, 4, 5, 6, 7, 8])
    y = np.array([1.0, 3, 2, 4, 5, 6, 8, 7])
    found = rank_correlation(x, y)
    assert found is not None
    # 1 - 6 * (1 + 1 + 1 + 1) / (8 * 63)
    assert found.value == pytest.approx(1 - 24 / 504)
    # Lag-1 products over 42: ranks of x 26.25, of y 24.75. n (1 - ab) / (1 + ab).
    shared = (26.25 / 42) * (24.75 / 42)
    assert found.num_effective == pytest.approx(8 * (1 - shared) / (1 + shared))
    assert found.score == pytest.approx(-found.num_effective / 2 * math.log(1 - found.value**2))
    assert rank_correlation(x[:7], y[:7]) is None
    assert rank_correlation(x, np.ones(8)) is None


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=8, max_size=20))
def test_rank_correlation_agrees_with_plain_loops(pairs: list[tuple[int, int]]) -> None:
    found = rank_correlation(np.array([float(a) for a, _ in pairs]), np.array([float(b) for _, b in pairs]))
    columns = [[pair[i] for pair in pairs] for i in (0, 1)]
    if any(len(set(column)) == 1 for column in columns):
        assert found is None
        return
    ranks = [[sum(o < v for o in column) + (sum(o == v for o in column) - 1) / 2 for v in column] for column in columns]
    means = [sum(rank) / len(rank) for rank in ranks]
    a, b = ([r - m for r in rank] for rank, m in zip(ranks, means, strict=True))
    expected = sum(p * q for p, q in zip(a, b, strict=True)) / math.sqrt(sum(p * p for p in a) * sum(q * q for q in b))
    assert found is not None
    assert found.value == pytest.approx(expected)


def test_weights_sum_to_one_with_what_is_unexplained_and_no_single_cause_is_certain() -> None:
    causes, rest = weighted([Cause("b", {}, 0.05, "r"), Cause("a", {}, 50.0, "r"), Cause("c", {}, math.log(3), "r")])
    # Odds 19 and 2 against 1; a score below 0.1 is none.
    assert [one.code for one in causes] == ["a", "c"]
    assert [one.weight for one in causes] == pytest.approx([19 / 22, 2 / 22])
    assert rest == pytest.approx(1 / 22)
    assert weighted([]) == ((), 1.0)
    alone, rest = weighted([Cause("a", {}, CAP, "r")])
    assert alone[0].weight == pytest.approx(0.95)
    assert alone[0].is_association


def test_jumps_are_halvings_doublings_and_turns_of_sign_not_schedules() -> None:
    values = [0.1] * 6 + [0.05] * 6 + [-0.05] * 6 + [0.0] * 6
    jumps = series("x", values).jumps()
    assert [(one.step, one.before, one.after) for one in jumps] == [
        (6, 0.1, 0.05),
        (12, 0.05, -0.05),
        (18, -0.05, 0.0),
    ]
    assert series("x", [1e-3 * (step + 10) for step in range(100)]).jumps() == []


def test_a_spike_exceeds_the_ten_values_before_it_and_a_warm_up_is_none() -> None:
    assert series("lr", [1e-4 * (step + 1) for step in range(50)]).spikes(2.0) == []
    spikes = series("lr", [1.0] * 10 + [3.0] * 10).spikes(2.0)
    assert [(one.step, one.before, one.after) for one in spikes] == [(10, 1.0, 3.0)]


def test_settings_are_read_from_columns_and_from_messages() -> None:
    columns = {
        "step": [1, 1, 1, 2, 2, 2],
        "name": ["learning_rate", "g", "g", "learning_rate", "g", "g"],
        "layer_index": [-1, 0, 0, -1, 0, 0],
        "expert_id": [-1, 0, 1, -1, 0, 1],
        "value": [0.5, 1.0, 2.0, 0.25, 3.0, float("nan")],
    }
    found = ObservedSettings.from_columns(columns)
    lr, gradients = found.get("lr"), found.get("g", 0)
    assert lr is not None
    assert lr.finite()[1].tolist() == [0.5, 0.25]
    assert gradients is not None
    assert gradients.values.shape == (2, 2)
    assert found.names == ("g", "learning_rate", "lr")
    assert [one.name for one in found.model_settings()] == ["lr"]

    def message(rank: int, value: float) -> session_pb2.Series:
        return session_pb2.Series(
            source_id=f"s{rank}", global_rank=rank, name="lr", num_values=1,
            step=np.array([4], "<u8").tobytes(), value=np.array([value], "<f8").tobytes(),
        )  # fmt: skip

    of_fleet = ObservedSettings.from_messages([message(1, 9.0), message(0, 7.0)]).get("lr")
    assert of_fleet is not None
    assert (of_fleet.steps.tolist(), of_fleet.values.tolist()) == ([4], [[7.0]])


def test_a_series_of_nothing_but_nan_is_not_observed_and_wrong_columns_are_refused() -> None:
    assert not ObservedSettings([series("lr", [float("nan")] * 3)]).is_observed("lr")
    assert ObservedSettings.from_columns(
        {name: [] for name in ("step", "name", "layer_index", "expert_id", "value")}
    ).names == ()  # fmt: skip
    with pytest.raises(InvalidInputError, match="lack the columns"):
        ObservedSettings.from_columns({"step": []})
    with pytest.raises(InvalidInputError, match="values have shape"):
        ObservedSettings([Setting("x", -1, np.arange(3), np.zeros(3))])
