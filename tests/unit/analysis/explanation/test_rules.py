"""Each rule against a hand-worked case, and against one in which it must say nothing."""

import math
from typing import Any

import numpy as np
import pytest

from moe_debugger.analysis import EvidenceRow, Finding, FindingKind, Severity
from moe_debugger.analysis.explanation import (
    Cause,
    Explanation,
    LayerHistory,
    ObservedSettings,
    Setting,
    WorkloadMix,
    explain,
)
from moe_debugger.messages import catalogue

from .conftest import collapse, history, observed, series

ONSET = 90
CAP = math.log(20)


def explained(settings: ObservedSettings | None = None, **given: Any) -> Explanation:
    """Explain a collapse of layer 0 that begins at step 90 of 150."""
    histories = given.pop("histories", {0: history(0, ONSET, length=6), 1: history(1, None)})
    found = explain(given.pop("finding", collapse()), histories=histories, settings=settings, **given)
    for cause in found.causes:
        assert f"cause.{cause.code}" in catalogue()
    for remedy in found.remedies:
        assert f"remedy.{remedy.code}" in catalogue()
        assert f"effect.{remedy.effect}" in catalogue()
    for missing in found.missing:
        assert f"missing.{missing.code}" in catalogue()
    return found


def only(found: Explanation) -> Cause:
    assert len(found.causes) == 1, [one.code for one in found.causes]
    return found.causes[0]


def jump(before: float, after: float, at: int = 88) -> list[float]:
    return [before] * at + [after] * (150 - at)


def test_a_coefficient_of_zero_all_along_is_an_absent_term() -> None:
    found = explained(observed(balance_coef=[0.0] * 150))
    cause = only(found)
    assert (cause.code, cause.rule) == ("balancing_absent", "balance.absent")
    assert cause.score == pytest.approx(CAP)
    assert cause.evidence[0].rule == "= 0"
    assert found.remedies[0].change.startswith("router_aux_loss_coef: 0.01  # observed as balance_coef: 0")


def test_a_coefficient_that_became_zero_before_the_onset_scores_by_its_closeness_too() -> None:
    found = explained(observed(balance_coef=jump(0.02, 0.0)))
    cause = only(found)
    onset = found.started_at
    assert onset is not None
    chance = (onset.first_step - 88 + onset.last_step - onset.first_step + 1) / 150
    assert cause.code == "balancing_turned_off"
    assert cause.score == pytest.approx(CAP - math.log(chance))
    assert found.remedies[0].change.startswith("router_aux_loss_coef: 0.02 ")


def test_a_negative_coefficient_is_a_wrong_sign_whenever_it_was_set() -> None:
    found = explained(observed(balance_coef=[-0.01] * 150))
    assert only(found).code == "balancing_sign_wrong"
    assert only(found).score == pytest.approx(CAP)
    assert "router_aux_loss_coef: 0.01 " in found.remedies[1].change
    assert only(explained(observed(balance_coef=jump(0.01, -0.01)))).code == "balancing_sign_turned"


def test_a_coefficient_that_was_lowered_before_the_onset_goes_with_it_and_one_after_does_not() -> None:
    cause = only(explained(observed(balance_coef=jump(0.02, 0.001))))
    assert (cause.code, cause.rule) == ("balancing_reduced", "onset.jump")
    assert (cause.args["before"], cause.args["now"], cause.args["step"]) == ("0.02", "0.001", "88")
    assert explained(observed(balance_coef=jump(0.02, 0.001, at=120))).causes == ()
    assert explained(observed(balance_coef=[0.02] * 150)).causes == ()
    assert explained(observed(balance_coef=jump(0.001, 0.02))).causes == ()


def test_a_balancing_loss_that_never_moves_does_not_see_the_load() -> None:
    cause = only(explained(observed(balance_loss=[1.0] * 150)))
    assert (cause.code, cause.rule) == ("balancing_does_not_see_load", "balance.flat")
    assert cause.score == pytest.approx(CAP)
    # With a coefficient there is a term, whatever it is called.
    assert explained(observed(balance_loss=[1.0] * 150, balance_coef=[0.02] * 150)).causes == ()


def test_a_balancing_loss_that_falls_with_the_experts_in_use_is_inverted() -> None:
    layer = history(0, ONSET, length=30)
    right = 8 / layer.effective_experts
    found = explained(observed(balance_loss=-right), histories={0: layer})
    assert (only(found).code, only(found).rule) == ("balancing_loss_inverted", "balance.sign.correlation")
    assert only(found).evidence[0].value == pytest.approx(1.0)
    assert found.remedies[0].cause == "balancing_loss_inverted"


def test_a_loss_that_rises_under_a_positive_coefficient_is_not_effective_and_weighs_little() -> None:
    layer = history(0, ONSET, length=30)
    settings = observed(balance_loss=8 / layer.effective_experts, balance_coef=[0.01] * 150)
    cause = only(explained(settings, histories={0: layer}))
    assert (cause.code, cause.rule) == ("balancing_not_effective", "balance.rising")
    assert cause.score == pytest.approx(math.log(2))
    # Odds 1 against 1.
    assert cause.weight == pytest.approx(0.5)


def test_a_term_of_a_millionth_of_the_loss_is_too_weak() -> None:
    settings = observed(
        balance_coef=[1e-6] * 150, balance_loss=[2.0 + 1e-3 * (n % 2) for n in range(150)], loss=[2.0] * 150
    )
    found = explained(settings)
    cause = next(one for one in found.causes if one.rule == "balance.weak")
    # 1e-6 * 2 / 2 is a hundredth of 1e-4.
    assert cause.score == pytest.approx(math.log(100), rel=1e-3)
    change = next(one.change for one in found.remedies if one.cause == "balancing_too_weak")
    assert change.startswith("router_aux_loss_coef: 0.004 ")
    strong = Finding(FindingKind.LOW_CONFIDENCE, Severity.WARNING, "low_confidence", 0)
    settings = observed(balance_coef=[1.0] * 150, balance_loss=[1.8] * 150, loss=[2.0] * 150)
    cause = only(explained(settings, finding=strong))
    # A share of 0.9 is three times the limit of 0.3: ln 6.
    assert cause.rule == "balance.strong"
    assert cause.score == pytest.approx(math.log(6))


def test_selection_biases_that_spread_as_the_load_narrows_go_the_wrong_way() -> None:
    layer = history(0, ONSET, length=30)
    spread = 8 / layer.effective_experts
    wrong = ObservedSettings([series("selection_bias_min", -spread, 0), series("selection_bias_max", spread, 0)])
    found = explained(wrong, histories={0: layer})
    assert (only(found).code, only(found).rule) == ("selection_bias_wrong_way", "bias.wrong_way")
    assert only(found).evidence[0].value == pytest.approx(-1)
    assert "torch.sign(load.mean() - load)" in found.remedies[0].change
    right = ObservedSettings([series("selection_bias_min", spread, 0), series("selection_bias_max", -spread, 0)])
    assert explained(right, histories={0: layer}).causes == ()


def test_selection_biases_are_looked_at_around_the_onset_and_stand_in_for_a_balancing_loss() -> None:
    # For 100 steps the biases spread while they even out the load; then they turn and spread on.
    layer = history(0, 100, length=30)
    warm_up = np.linspace(0, 1, 100)
    rng = np.random.default_rng(0)
    for step in range(100):
        uneven = 0.08 * (1 - warm_up[step])
        layer.counts[step] = rng.multinomial(4000, [1 / 8 + uneven, *[1 / 8 - uneven / 7] * 7])
    spread = np.r_[0.3 * warm_up, 0.3 + 0.02 * np.arange(150 - 100)]
    biases = [series("selection_bias_min", -spread, 0), series("selection_bias_max", spread, 0)]
    found = explained(ObservedSettings(biases), histories={0: layer})
    assert (only(found).code, found.status) == ("selection_bias_wrong_way", "ranked")
    assert [one.name for one in found.missing] == ["lr", "router_gradient_norm"]
    unused = [series(f"selection_bias_{end}", np.zeros(150), 0) for end in ("min", "max")]
    assert "balance_loss" in [one.name for one in explained(ObservedSettings(unused), histories={0: layer}).missing]


def test_a_learning_rate_that_trebles_before_the_onset_goes_with_it_and_a_warm_up_does_not() -> None:
    found = explained(observed(lr=jump(1e-3, 3e-3, at=85)))
    assert (only(found).code, only(found).rule) == ("learning_rate_spike", "lr.spike")
    assert found.remedies[0].change == "learning_rate: 0.001  # observed: 0.003 at step 85"
    assert explained(observed(lr=[1e-3 * min(1, (n + 1) / 89) for n in range(150)])).causes == ()
    assert explained(observed(lr=jump(1e-3, 3e-3, at=130))).causes == ()


def test_a_gradient_norm_that_spikes_before_the_onset_goes_with_it() -> None:
    values = [1.0] * 150
    values[86] = 9.0
    found = explained(observed(grad_norm=values))
    assert (only(found).code, only(found).rule) == ("gradient_spike", "gradient.spike")
    assert "clip_grad_norm_(model.parameters(), 1)" in found.remedies[0].change


def test_a_router_without_gradient_beside_others_that_have_one_is_named() -> None:
    none = ObservedSettings(
        [series("router_gradient_norm", [0.0] * 150, 0), series("router_gradient_norm", [1.0] * 150, 1)]
    )
    assert only(explained(none)).rule == "gradient.router.none"
    assert only(explained(none)).score == pytest.approx(CAP)
    alone = ObservedSettings([series("router_gradient_norm", [0.0] * 150, 0)])
    assert explained(alone).causes == ()
    unread = ObservedSettings([series("router_gradient_norm", [float("nan")] * 150, 0)])
    assert explained(unread).causes == ()
    assert "router_gradient_norm" in [one.name for one in explained(unread).missing]


def test_a_router_gradient_that_falls_to_a_hundredth_before_the_onset_vanished() -> None:
    found = explained(ObservedSettings([series("router_gradient_norm", jump(1.0, 0.01), 0)]))
    assert (only(found).code, only(found).rule) == ("router_gradient_vanished", "gradient.router.vanished")
    assert explained(ObservedSettings([series("router_gradient_norm", jump(1.0, 0.01, at=120), 0)])).causes == ()


def test_an_expert_with_tokens_and_no_gradient_is_frozen() -> None:
    gradients = np.ones((150, 8))
    gradients[:, 2] = 0
    finding = Finding(FindingKind.COLD_EXPERT, Severity.WARNING, "cold_expert", 1, 2)
    found = explained(
        ObservedSettings([Setting("expert_gradient_norm", 1, np.arange(150), gradients)]), finding=finding
    )
    assert (only(found).code, only(found).rule) == ("expert_gets_no_gradient", "gradient.expert.none")
    assert only(found).args["expert"] == "2"


def test_any_other_setting_that_jumped_before_the_onset_is_named_but_not_what_is_measured() -> None:
    cause = only(explained(observed(router_temperature=jump(1.0, 3.0))))
    assert (cause.code, cause.rule, cause.setting) == ("setting_changed", "onset.jump", "router_temperature")
    noise = np.random.default_rng(0).exponential(1, 150)
    assert explained(observed(tokens_lost=noise)).causes == ()
    assert explained(observed(eval_loss=jump(1.0, 3.0))).causes == ()
    # A measure of the load jumps with the collapse, but moves all the time.
    measured = np.array(jump(1.0, 3.0)) + np.random.default_rng(0).normal(0, 0.03, 150)
    assert explained(observed(max_violation=measured)).causes == ()
    assert (
        explained(ObservedSettings([Setting("max_violation", -1, np.arange(70, 150), measured[70:, None])])).causes
        == ()
    )
    schedule = np.array(jump(1.0, 3.0)) * np.linspace(1, 0.8, 150)
    assert only(explained(observed(router_temperature=schedule))).code == "setting_changed"


@pytest.mark.parametrize(("at", "when"), [(80, "before it began"), (90, "as it began")])
def test_before_is_said_only_of_what_lies_before_the_interval_of_the_onset(at: int, when: str) -> None:
    settings = observed(
        router_temperature=jump(1.0, 3.0, at), lr=jump(1e-3, 3e-3, at), balance_coef=jump(0.02, 0.001, at)
    )
    found = explained(settings)
    onset = found.started_at
    assert onset is not None
    assert 80 < onset.first_step <= 90 <= onset.last_step
    assert {one.code: one.args["when"] for one in found.causes} == dict.fromkeys(
        ("setting_changed", "learning_rate_spike", "balancing_reduced"), when
    )


def test_another_mix_of_text_before_the_onset_goes_with_it() -> None:
    counts = np.tile([50.0, 50.0], (150, 1))
    counts[88:] = [95.0, 5.0]
    mix = WorkloadMix(np.arange(150), counts, ("code", "prose"))
    found = explained(mix=mix)
    assert (only(found).code, only(found).rule) == ("data_changed", "data.mix")
    assert (only(found).args["kind"], only(found).args["before"], only(found).args["now"]) == ("code", "50", "95")
    assert "step >= 88" in found.remedies[0].change
    assert explained(mix=WorkloadMix(np.arange(150), np.tile([50.0, 50.0], (150, 1)), ("code", "prose"))).causes == ()


def hot(expert: int = 0) -> Finding:
    return Finding(
        FindingKind.HOT_EXPERT,
        Severity.WARNING,
        "hot_expert",
        0,
        expert,
        evidence=(EvidenceRow("load_ratio", 5, "> 3"),),
    )


def rows_with_a_dominating_token(num_tokens: int = 800) -> dict[str, Any]:
    """Top-1 of 8: half of the tokens are token 7, which all go to expert 0; the others are spread evenly."""
    ids = np.arange(num_tokens) % 8
    token = 100 + np.arange(num_tokens)
    token[::2], ids[::2] = 7, 0
    ids[1::2] = np.arange(num_tokens // 2) % 8
    return {
        "layer_index": np.zeros(num_tokens, int),
        "expert_ids": ids[:, None],
        "token_id": token,
        "request_id": np.array([f"r{n % 40}" for n in range(num_tokens)], object),
        "is_padding": np.zeros(num_tokens, bool),
    }


def test_a_token_without_which_the_expert_is_not_hot_is_the_cause() -> None:
    found = explained(finding=hot(), histories={}, rows=rows_with_a_dominating_token(), is_training=False)
    cause = only(found)
    # Expert 0 has 450 of 800 (4.5 times the fair share), and 50 of 400 without token 7.
    assert (cause.code, cause.rule, cause.args["name"]) == ("one_token_dominates", "rows.token", "7")
    assert cause.evidence[0].value == pytest.approx(4.5)
    assert cause.evidence[0].baseline == pytest.approx(1.0)
    assert cause.score == pytest.approx(CAP)
    assert found.remedies[0].change == "tokens where layer = 0 and token_id = 7"
    assert found.remedies[0].effect_value == pytest.approx(1.0)


def test_a_token_that_is_common_everywhere_explains_nothing() -> None:
    rows = rows_with_a_dominating_token()
    rows["token_id"] = np.arange(800) % 3 + 7
    found = explained(finding=hot(), histories={}, rows=rows, is_training=False)
    assert found.causes == ()


def test_a_request_that_is_all_there_is_explains_nothing() -> None:
    rows = {**rows_with_a_dominating_token(), "token_id": np.arange(800)}
    rows["request_id"] = np.array(["only"] * 800, object)
    assert explained(finding=hot(), histories={}, rows=rows, is_training=False).causes == ()


def test_a_skew_that_never_changed_in_inference_is_specialisation_and_in_training_is_not() -> None:
    rng = np.random.default_rng(0)
    layer = LayerHistory(0, np.arange(60), rng.multinomial(4000, [0.51, *[0.07] * 7], 60))
    found = explained(finding=hot(), histories={0: layer}, is_training=False)
    assert (only(found).code, only(found).rule) == ("constant_specialisation", "specialisation.constant")
    assert explained(finding=hot(), histories={0: layer}).causes == ()
    assert explained(finding=hot(), histories={0: history(0, ONSET)}, is_training=False).causes == ()


def test_dropped_slots_give_the_capacity_that_would_have_held_them() -> None:
    # One forward of 8 tokens, top-1 of 2 experts: 6 want expert 0, 2 expert 1. Fair share 4; expert 0 held 5.
    intended = np.array([[0]] * 6 + [[1]] * 2)
    status = np.array([[1]] * 5 + [[2]] + [[1]] * 2)
    rows = {
        "layer_index": np.zeros(8, int),
        "forward_index": np.zeros(8, int),
        "expert_ids": np.where(status == 2, -1, intended),
        "intended_expert_ids": intended,
        "slot_status": status,
    }
    finding = Finding(
        FindingKind.CAPACITY_OVERFLOW, Severity.WARNING, "capacity_overflow", 0,
        evidence=(EvidenceRow("dropped_share", 1 / 8, "> 0.01"),),
    )  # fmt: skip
    layer = LayerHistory(0, [0], [[50, 20]])
    found = explained(finding=finding, histories={0: layer}, rows=rows, is_training=False)
    assert only(found).rule == "capacity.uneven"
    # Overflow 6 - 4 cf must be at most 0.01 * 8 slots: cf >= 1.48.
    assert found.remedies[-1].change == "capacity_factor: 1.48"


def test_an_unhealthy_capture_is_explained_by_nothing_but_itself() -> None:
    finding = Finding(FindingKind.CAPTURE_UNHEALTHY, Severity.WARNING, "capture_unhealthy")
    found = explained(observed(balance_coef=[0.0] * 150), finding=finding)
    assert (found.causes, found.missing, found.rows, found.status) == ((), (), None, "no_match")


def test_two_causes_share_the_weight_and_the_stronger_comes_first() -> None:
    found = explained(observed(balance_coef=jump(0.02, -0.02), lr=jump(1e-3, 3e-3, at=87)))
    assert [one.code for one in found.causes] == ["balancing_sign_turned", "learning_rate_spike"]
    assert sum(one.weight for one in found.causes) + found.unexplained == pytest.approx(1)
    assert found.causes[0].weight >= found.causes[1].weight


def test_nothing_is_blamed_where_all_was_observed_and_nothing_changed() -> None:
    settings = ObservedSettings(
        [
            *(series(name, [value] * 150) for name, value in (("balance_coef", 0.02), ("lr", 1e-3))),
            series("balance_loss", [1.0 + 1e-4 * (n % 3) for n in range(150)]),
            series("router_gradient_norm", [1.0] * 150, 0),
        ]
    )
    found = explained(settings)
    assert found.causes == ()
    assert found.missing == ()
    assert found.status == "no_match"
