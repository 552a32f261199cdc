"""Training runs to watch: a healthy one, one without a balancing loss, and one into which a real bug is introduced.

Each scenario trains a fresh network on the demo's texts, with the maths that trained the shipped model, and can stream
its routing to a fleet. Nothing is staged: what is seen is what the routers did.

- healthy: the per-layer Switch loss from start to end.
- no-balance: no balancing term. On mixed text this gives imbalance, not collapse.
- collapse: healthy at first; then the sign of the balancing term is wrong, as when a loss that is to be minimised is
  subtracted. The language-model loss hardly shows it; the routing does.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, Protocol, get_args

from moe_debugger.demo.corpus import build_corpus
from moe_debugger.demo.training import StepResult, Trainer
from moe_debugger.errors import InvalidInputError
from moe_debugger.wire.ids import new_id

__all__ = ["SCENARIOS", "ScenarioName", "ScenarioPlan", "ScenarioStep", "plan_scenario", "run_scenario"]

ScenarioName = Literal["collapse", "no-balance", "healthy"]
SCENARIOS: Final[tuple[ScenarioName, ...]] = get_args(ScenarioName)

# One row of each kind, and half of the shipped model's batch: what a debugger that records every token of every layer
# keeps up with on a laptop.
_ROW_LENGTH: Final = 256
_BATCH_TOKENS: Final = 1024
_LEARNING_RATE: Final = 2e-3
_WARMUP_STEPS: Final = 20

_HEALTHY_COEF: Final = 0.05
# Measured (docs/demo-model.md): with -0.3 three layers are at the floor of top_k experts after 20 steps and the first
# one after 40; weaker takes longer, and with -0.5 the first layer's router saturates at 4 experts.
_WRONG_SIGN_COEF: Final = -0.3

_DEFAULT_STEPS: Final = 300
_DEFAULT_FAULT_STEP: Final = 120


@dataclass(frozen=True)
class ScenarioPlan:
    """What a scenario will do.

    Attributes:
        fault_step: the first step with the fault, or None where there is none.
    """

    name: ScenarioName
    num_steps: int
    fault_step: int | None

    def balance_coef(self, step: int) -> float:
        """Return the weight of the balancing loss at a step."""
        if self.name == "no-balance":
            return 0.0
        if self.fault_step is not None and step >= self.fault_step:
            return _WRONG_SIGN_COEF
        return _HEALTHY_COEF


@dataclass(frozen=True)
class ScenarioStep:
    """One step that was done.

    Attributes:
        result: loss, balance loss and the load of each layer, counted in this step's batch.
        balance_coef: the weight that the balancing loss had.
        is_fault_on: whether the fault was active in this step.
        elapsed_s: seconds since the scenario started.
    """

    plan: ScenarioPlan
    result: StepResult
    balance_coef: float
    is_fault_on: bool
    elapsed_s: float

    @property
    def step(self) -> int:
        """The step's number, from 0."""
        return self.result.step

    @property
    def loss(self) -> float:
        """Next-byte cross entropy in nats."""
        return self.result.loss

    @property
    def effective_experts(self) -> tuple[float, ...]:
        """For each layer, exp of the entropy of the load."""
        return self.result.effective_experts


class _Debugger(Protocol):
    """The part of `MoEDebugger` that a training loop uses."""

    def step(self, n: int, **series: float) -> object: ...

    def requests(
        self, request_ids: Sequence[str | None], *, phase: str | None = None
    ) -> contextlib.AbstractContextManager[None]: ...


class _NoDebugger:
    """Stands in where no fleet is given."""

    def step(self, n: int, **series: float) -> None:
        pass

    def requests(
        self, request_ids: Sequence[str | None], *, phase: str | None = None
    ) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


def plan_scenario(name: str, *, steps: int | None = None, fault_step: int | None = None) -> ScenarioPlan:
    """Return what a scenario will do, without doing it.

    Args:
        name: one of `SCENARIOS`.
        steps: number of training steps; 300 by default.
        fault_step: first step of the fault in `collapse`; 120 by default, sooner in a run that is short.

    Raises:
        InvalidInputError: no such scenario, or numbers that do not fit together.
    """
    if name not in SCENARIOS:
        raise InvalidInputError(f"scenario {name!r}: expected one of {', '.join(SCENARIOS)}")
    num_steps = _DEFAULT_STEPS if steps is None else steps
    if num_steps < 1:
        raise InvalidInputError(f"steps {num_steps}: expected at least 1")
    if name != "collapse":
        if fault_step is not None:
            raise InvalidInputError(f"fault_step {fault_step}: scenario {name!r} has no fault; leave it out")
        return ScenarioPlan(name=name, num_steps=num_steps, fault_step=None)
    first = min(_DEFAULT_FAULT_STEP, num_steps * 2 // 5) if fault_step is None else fault_step
    if not 0 <= first < num_steps:
        raise InvalidInputError(f"fault_step {first}: expected 0 to {num_steps - 1}, the last step")
    return ScenarioPlan(name="collapse", num_steps=num_steps, fault_step=first)


def run_scenario(
    name: str,
    *,
    fleet: str | None = None,
    session_name: str | None = None,
    steps: int | None = None,
    fault_step: int | None = None,
    seed: int = 0,
    on_step: Callable[[ScenarioStep], None] | None = None,
) -> ScenarioStep:
    """Train a fresh network and stream its routing to a fleet, one request for each batch row.

    Args:
        name: "collapse", "no-balance" or "healthy".
        fleet: the fleet's NATS URL (`moe-debugger up --json` prints it), or None to train without one.
        session_name: the name that the fleet shows; the scenario's name by default.
        steps, fault_step: as in `plan_scenario`.
        seed: of the weights, the batches and the generated texts.
        on_step: is called after each step; what it raises ends the run (the session is closed all the same).

    Returns:
        The last step.

    Raises:
        InvalidInputError: as in `plan_scenario`.
    """
    plan = plan_scenario(name, steps=steps, fault_step=fault_step)
    trainer = Trainer(build_corpus("train", seed=seed), seed=seed)
    started = time.monotonic()
    last: ScenarioStep | None = None
    with _debugger(trainer.model, fleet, session_name or f"demo {plan.name}") as debugger:
        for step in range(plan.num_steps):
            batch = trainer.next_batch(step, row_lengths=(_ROW_LENGTH,), batch_tokens=_BATCH_TOKENS)
            balance_coef = plan.balance_coef(step)
            learning_rate = _LEARNING_RATE * min(1.0, (step + 1) / _WARMUP_STEPS)
            # Before the forward, so that the step's decisions carry its number.
            debugger.step(step, balance_coef=balance_coef, learning_rate=learning_rate)
            with debugger.requests([new_id() for _ in batch.kinds], phase="train"):
                result = trainer.train_step(step, batch, learning_rate=learning_rate, balance_coef=balance_coef)
            debugger.step(step, loss=result.loss, balance_loss=result.balance_loss)
            last = ScenarioStep(
                plan=plan,
                result=result,
                balance_coef=balance_coef,
                is_fault_on=plan.fault_step is not None and step >= plan.fault_step,
                elapsed_s=time.monotonic() - started,
            )
            if on_step is not None:
                on_step(last)
    assert last is not None
    return last


def _debugger(model: Any, fleet: str | None, session_name: str) -> contextlib.AbstractContextManager[_Debugger]:
    if fleet is None:
        return contextlib.nullcontext(_NoDebugger())
    from moe_debugger import MoEDebugger

    return MoEDebugger(
        model, fleet=fleet, session_name=session_name, model_name="demo scenario", step_domain="global", kind="training"
    )
