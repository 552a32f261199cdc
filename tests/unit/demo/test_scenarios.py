"""The scenarios: what they plan, what they report, and that the wrong sign really collapses routers."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from moe_debugger.demo import scenarios
from moe_debugger.demo.corpus import Corpus
from moe_debugger.demo.loss_free import LossFreeTrainer
from moe_debugger.demo.scenarios import SCENARIOS, ScenarioStep, plan_scenario, run_scenario
from moe_debugger.demo.training import SMALL_SIZE
from moe_debugger.errors import InvalidInputError


@pytest.fixture(autouse=True)
def _small_corpus(held_out: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(split: str, *, seed: int) -> Corpus:
        return held_out

    monkeypatch.setattr(scenarios, "build_corpus", build)


def test_collapse_is_healthy_until_its_fault_turns_the_sign() -> None:
    plan = plan_scenario("collapse", steps=10, fault_step=4)
    assert [plan.balance_coef(step) > 0 for step in range(10)] == [True] * 4 + [False] * 6


def test_other_scenarios_have_no_fault() -> None:
    assert {plan_scenario("healthy").balance_coef(step) > 0 for step in range(300)} == {True}
    assert {plan_scenario("no-balance").balance_coef(step) for step in range(300)} == {0.0}


def test_loss_free_collapse_turns_the_bias_update() -> None:
    plan = plan_scenario("loss-free-collapse", steps=10, fault_step=4, fault_coef=-0.02)
    assert plan.is_loss_free
    assert [plan.balance_coef(step) for step in (0, 3, 4, 9)] == [0.01, 0.01, -0.02, -0.02]


def test_learning_rate_warms_up_and_changes() -> None:
    plan = plan_scenario("healthy", steps=100, learning_rate_change=(50, 0.2))
    rates = [plan.learning_rate(step) for step in (0, 9, 19, 49, 50, 99)]
    assert rates == pytest.approx([1e-4, 1e-3, 2e-3, 2e-3, 4e-4, 4e-4])


def test_loss_free_bias_rises_where_load_is_missing_and_is_no_part_of_the_weights(held_out: Corpus) -> None:
    trainer = LossFreeTrainer(held_out, seed=0, size=SMALL_SIZE)
    gates = [layer.mlp.gate for layer in trainer.model.model.layers]
    batch = trainer.next_batch(0, row_lengths=(64,), batch_tokens=256)
    result = trainer.train_step(0, batch, learning_rate=0.0, balance_coef=0.01)
    for gate, counts in zip(gates, result.counts, strict=True):
        mean = sum(counts) / len(counts)
        expected = [0.01 * ((mean > count) - (mean < count)) for count in counts]
        assert gate.e_score_correction_bias.tolist() == pytest.approx(expected)
        assert not any(parameter is gate.e_score_correction_bias for parameter in trainer.model.parameters())


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        ("colapse", {}, "collapse, no-balance, healthy"),
        ("healthy", {"steps": 0}, "at least 1"),
        ("healthy", {"fault_step": 3}, "has no fault"),
        ("loss-free", {"fault_coef": -0.1}, "has no fault"),
        ("collapse", {"steps": 10, "fault_step": 10}, "0 to 9"),
    ],
)
def test_plan_refuses_what_does_not_fit(name: str, options: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidInputError, match=text):
        plan_scenario(name, **options)


@pytest.mark.parametrize("name", SCENARIOS)
def test_scenario_reports_each_step(name: str) -> None:
    seen: list[ScenarioStep] = []
    last = run_scenario(name, steps=3, on_step=seen.append)
    assert [step.step for step in seen] == [0, 1, 2]
    assert seen[-1] == last
    assert [step.is_fault_on for step in seen] == [name.endswith("collapse") and step >= 1 for step in range(3)]
    assert all(len(step.effective_experts) == 4 for step in seen)
    assert all(sum(layer) == 2048 for step in seen for layer in step.result.counts)


class RecordingDebugger:
    """Notes in which order the training loop speaks to the debugger."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def step(self, n: int, **series: float) -> None:
        self.calls.append(f"step {n} {','.join(sorted(series))}")

    @contextlib.contextmanager
    def requests(self, request_ids: Sequence[str | None], *, phase: str | None = None) -> Iterator[None]:
        self.calls.append(f"enter {phase} {len(set(request_ids))}")
        yield
        self.calls.append("leave")


def test_scenario_names_each_row_as_a_request_of_its_step(monkeypatch: pytest.MonkeyPatch) -> None:
    debugger = RecordingDebugger()

    def attach(*_: object) -> contextlib.AbstractContextManager[RecordingDebugger]:
        return contextlib.nullcontext(debugger)

    monkeypatch.setattr(scenarios, "_debugger", attach)
    run_scenario("no-balance", steps=1)
    assert debugger.calls == [
        "step 0 balance_coef,learning_rate",
        "enter train 4",
        "leave",
        "step 0 balance_loss,loss",
    ]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_collapse_takes_every_layer_from_balanced_to_its_floor_while_the_loss_still_falls() -> None:
    seen: list[ScenarioStep] = []
    run_scenario("collapse", steps=200, fault_step=120, on_step=seen.append)
    assert min(seen[119].effective_experts) > 6
    assert max(seen[-1].effective_experts) < 3
    assert sum(step.loss for step in seen[-10:]) < sum(step.loss for step in seen[110:120])
