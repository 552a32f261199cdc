"""Where it began and how it spread, from loads over steps of known truth."""

from dataclasses import replace

import numpy as np
import pytest

from moe_debugger.analysis import EvidenceRow, Finding, FindingKind, LayerShape, RoutingState, Severity
from moe_debugger.analysis.explanation import (
    LayerHistory,
    explain,
    explanation_text,
    histories_from_decisions,
    histories_from_state,
)
from moe_debugger.errors import InvalidInputError
from moe_debugger.v1 import routing_pb2 as pb
from moe_debugger.wire.codec import CountsColumns, LayerCountColumns

from .conftest import collapse, collapsing_counts, history


def test_effective_experts_and_load_ratio_are_those_of_the_formula() -> None:
    one = LayerHistory(0, [0, 1], [[50, 50, 0, 0], [25, 25, 25, 25]])
    assert one.effective_experts == pytest.approx([2.0, 4.0])
    assert one.load_ratio[0] == pytest.approx([2.0, 2.0, 0.0, 0.0])


def test_steps_are_joined_until_each_expert_could_have_ten_assignments() -> None:
    # 4 experts need 40: three steps of 15; the seventh step is left over and joins the last bucket.
    one = LayerHistory(0, range(10, 17), [[15, 0, 0, 0]] * 7)
    assert one.steps.tolist() == [10, 13]
    assert one.counts[:, 0].tolist() == [45, 60]
    assert (one.bucket_end(0), one.bucket_end(1), one.num_steps) == (12, 16, 7)


def test_a_layer_with_too_little_load_has_no_bucket() -> None:
    assert not len(LayerHistory(0, [0, 1], [[1, 0], [0, 1]]).steps)


def test_long_runs_are_joined_to_a_bounded_number_of_buckets() -> None:
    one = LayerHistory(0, np.arange(1000), np.full((1000, 2), 100))
    assert len(one.steps) <= 160
    assert one.counts.sum() == 200_000


@pytest.mark.parametrize(
    ("steps", "counts", "text"),
    [([0, 0], [[1], [1]], "do not ascend"), ([0], [[1], [1]], "do not fit"), ([0], [1], "do not fit")],
)
def test_wrong_histories_are_refused(steps: list[int], counts: object, text: str) -> None:
    with pytest.raises(InvalidInputError, match=text):
        LayerHistory(0, steps, counts)  # type: ignore[arg-type]


def test_the_first_layer_and_the_order_of_the_others_are_found() -> None:
    histories = {0: history(0, 90), 1: history(1, 70), 2: history(2, None), 3: history(3, 80)}
    found = explain(collapse(0), histories=histories)
    assert found.started_at is not None
    assert found.started_at.layer_index == 1
    # In the first step 5 % of the load moved, which is less than its noise.
    assert found.started_at.first_step - 1 <= 70 <= found.started_at.last_step
    assert found.started_at.before == pytest.approx(8, rel=0.02)
    assert found.started_at.after == pytest.approx(2, rel=0.1)
    assert [layer for layer, _ in found.spread] == [1, 3, 0]
    assert all(70 < step < 115 for _, step in found.spread)


def test_a_router_that_begins_uneven_and_evens_out_has_not_collapsed_in_its_warm_up() -> None:
    counts = collapsing_counts(150, 100)
    counts[:30] = collapsing_counts(60, 0, length=1)[:30]
    found = explain(collapse(), histories={0: LayerHistory(0, np.arange(150), counts)})
    assert found.started_at is not None
    assert found.started_at.first_step <= 100 <= found.started_at.last_step + 1
    assert found.spread[0][1] > 100


def test_an_expert_that_becomes_hot_has_its_onset_and_no_other_layer_is_blamed() -> None:
    counts = collapsing_counts(120, None)
    counts[60:, 5] *= 8
    finding = Finding(
        FindingKind.HOT_EXPERT, Severity.WARNING, "hot_expert", 1, 5, evidence=(EvidenceRow("load_ratio", 4, "> 3"),)
    )
    found = explain(finding, histories={0: history(0, None, num_steps=120), 1: LayerHistory(1, np.arange(120), counts)})
    assert found.started_at is not None
    assert (found.started_at.step, found.started_at.metric) == (60, "load_ratio")
    assert found.spread == ((1, 60),)
    assert found.rows is not None
    assert found.rows.query == "tokens where layer = 1 and expert = 5 and step >= 60"
    assert found.rows.to_python() == (
        "(rows.layer_index == 1) & (rows.expert_ids == 5).any(axis=1) & (rows.step >= 60)"
    )


def test_without_loads_over_steps_nothing_is_claimed_about_the_beginning() -> None:
    found = explain(collapse())
    assert found.started_at is None
    assert found.spread == ()
    assert "load history" in [one.name for one in found.missing]


def test_names_in_an_explanation_do_not_reach_the_terminal() -> None:
    found = explain(collapse())
    named = replace(found, missing=(replace(found.missing[0], name="loss\x1b[2J\u202e"),))
    lines = explanation_text(named)
    assert all(line.isprintable() for line in lines)
    assert "loss [2J" in "".join(lines)


def test_a_skew_that_never_changed_has_no_beginning() -> None:
    found = explain(collapse(), histories={0: history(0, 0, length=1)})
    assert found.started_at is None
    assert found.spread == ((0, 0),)


def test_no_later_layer_is_named_as_the_beginning_where_another_was_beyond_the_limit_all_along() -> None:
    finding = replace(collapse(0), since_step=80)
    found = explain(finding, histories={0: history(0, 70), 1: history(1, 0, length=1)})
    assert found.started_at is None
    assert found.spread[0] == (1, 0)
    assert found.spread[1][0] == 0
    assert explanation_text(found)[0] == (
        "Layer 1 was beyond the limit from the first step seen, 0: when it began is not known."
    )
    assert found.rows is not None
    assert found.rows.query == "experts where layer = 0 order by load desc"


def test_an_expert_that_was_always_hot_elsewhere_does_not_hide_when_another_became_so() -> None:
    counts = np.stack([collapsing_counts(120, None), collapsing_counts(120, None)])
    counts[0, :, 3] *= 8
    counts[1, 60:, 5] *= 8
    finding = Finding(FindingKind.HOT_EXPERT, Severity.WARNING, "hot_expert", 1, 5)
    found = explain(finding, histories={layer: LayerHistory(layer, np.arange(120), counts[layer]) for layer in (0, 1)})
    assert found.started_at is not None
    assert found.started_at.step == 60
    assert found.spread == ((1, 60),)


def test_a_dip_that_recovered_is_not_the_beginning() -> None:
    counts = np.stack([collapsing_counts(150, onset, seed=layer) for layer, onset in enumerate((90, None, 110))])
    counts[:, 10:18] = collapsing_counts(8, 0, length=1)
    found = explain(
        collapse(), histories={layer: LayerHistory(layer, np.arange(150), counts[layer]) for layer in range(3)}
    )
    assert found.started_at is not None
    assert found.started_at.layer_index == 0
    assert 80 < found.started_at.first_step <= 91
    assert found.started_at.before == pytest.approx(8, rel=0.02)
    assert [layer for layer, _ in found.spread] == [0, 2]
    assert 90 < found.spread[0][1] < 110 < found.spread[1][1]


def test_a_second_fall_beyond_the_limit_is_not_the_beginning() -> None:
    layer = LayerHistory(0, np.arange(150), collapsing_counts(150, 40, length=1))
    layer.counts[40:100] = np.random.default_rng(0).multinomial(4000, [0.4, 0.4, 0.2, 0, 0, 0, 0, 0], 60)
    layer.counts[100:] = [4000, 0, 0, 0, 0, 0, 0, 0]
    found = explain(collapse(), histories={0: layer})
    assert found.started_at is not None
    assert (found.started_at.step, found.spread) == (40, ((0, 40),))


def test_histories_come_from_the_state_and_from_rows_alike() -> None:
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 4, (600, 1))
    steps = np.repeat(np.arange(6), 100)
    state = RoutingState.empty([LayerShape(0, 4, 1)])
    for step in range(6):
        load = np.bincount(ids[steps == step, 0], minlength=4).astype(np.uint64)
        state.fold_counts(CountsColumns(step, step, pb.PHASE_TRAIN, 100, [LayerCountColumns(0, 4, 0, 100, 0, load)]))
    from_state = histories_from_state(state)[0]
    from_rows = histories_from_decisions(
        {"layer_index": np.zeros(600, int), "expert_ids": ids, "step": steps}, [(0, 4), (7, 4)]
    )
    assert set(from_rows) == {0}
    assert from_state.steps.tolist() == from_rows[0].steps.tolist() == list(range(6))
    assert (from_state.counts == from_rows[0].counts).all()


def test_a_warning_without_a_limit_spreads_over_the_layers_that_fell() -> None:
    warning = Finding(FindingKind.COLLAPSE_WARNING, Severity.WARNING, "collapse_warning", 0)
    found = explain(warning, histories={0: history(0, 90), 1: history(1, 70), 2: history(2, None)})
    assert [layer for layer, _ in found.spread] == [1, 0]
    assert found.started_at is not None
    assert found.started_at.layer_index == 1


def test_an_expert_that_is_hot_in_turn_shows_in_the_busiest_expert_of_each_step() -> None:
    counts = np.full((80, 8), 500.0)
    for step in range(40, 80):
        counts[step, step % 8] = 4000
    finding = Finding(
        FindingKind.LOAD_IMBALANCE, Severity.WARNING, "load_imbalance_steps", 0,
        evidence=(EvidenceRow("max_over_mean_batch", 4, ""), EvidenceRow("max_over_mean_batch_lower", 4, "> 1.5")),
    )  # fmt: skip
    found = explain(finding, histories={0: LayerHistory(0, np.arange(80), counts)})
    assert found.started_at is not None
    assert (found.started_at.step, found.started_at.metric) == (40, "max_over_mean")
    assert found.spread == ((0, 40),)
