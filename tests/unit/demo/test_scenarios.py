"""The scenarios: what they plan, what they report, and that the wrong sign really collapses routers."""

import contextlib
from collections.abc import Iterator, Sequence

import pytest

from moe_debugger.demo import scenarios
from moe_debugger.demo.corpus import Corpus
from moe_debugger.demo.scenarios import SCENARIOS, ScenarioStep, plan_scenario, run_scenario
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


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        ("colapse", {}, "collapse, no-balance, healthy"),
        ("healthy", {"steps": 0}, "at least 1"),
        ("healthy", {"fault_step": 3}, "has no fault"),
        ("collapse", {"steps": 10, "fault_step": 10}, "0 to 9"),
    ],
)
def test_plan_refuses_what_does_not_fit(name: str, options: dict[str, int], text: str) -> None:
    with pytest.raises(InvalidInputError, match=text):
        plan_scenario(name, **options)


@pytest.mark.parametrize("name", SCENARIOS)
def test_scenario_reports_each_step(name: str) -> None:
    seen: list[ScenarioStep] = []
    last = run_scenario(name, steps=3, on_step=seen.append)
    assert [step.step for step in seen] == [0, 1, 2]
    assert seen[-1] == last
    assert [step.is_fault_on for step in seen] == [name == "collapse" and step >= 1 for step in range(3)]
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
