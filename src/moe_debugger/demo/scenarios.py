"""Training runs to watch: healthy ones, one without a balancing loss, and some into which a real bug is introduced.

Each scenario trains a fresh network on the demo's texts, with the maths that trained the shipped model, and can stream
its routing to a fleet. Nothing is staged: what is seen is what the routers did.

- healthy: the per-layer Switch loss from start to end.
- no-balance: no balancing term. On mixed text this gives imbalance, not collapse.
- collapse: healthy at first; then the sign of the balancing term is wrong, as when a loss that is to be minimised is
  subtracted. The language-model loss hardly shows it; the routing does.
- loss-free: a selection bias in the place of the loss (`moe_debugger.demo.loss_free`).
- loss-free-collapse: the same; then the bias is updated with the wrong sign.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, Protocol, get_args

from moe_debugger.demo.corpus import build_corpus
from moe_debugger.demo.loss_free import LossFreeTrainer
from moe_debugger.demo.training import DEMO_SIZE, NetworkSize, StepResult, Trainer
from moe_debugger.errors import InvalidInputError
from moe_debugger.wire.ids import new_id

__all__ = ["SCENARIOS", "ScenarioName", "ScenarioPlan", "ScenarioStep", "plan_scenario", "run_scenario"]

ScenarioName = Literal["collapse", "no-balance", "healthy", "loss-free", "loss-free-collapse"]
SCENARIOS: Final[tuple[ScenarioName, ...]] = get_args(ScenarioName)

_FAULTY: Final = ("collapse", "loss-free-collapse")
_LOSS_FREE: Final = ("loss-free", "loss-free-collapse")

# One row of each kind, and half of the shipped model's batch: what a debugger that records every token of every layer
# keeps up with on a laptop.
_ROW_LENGTH: Final = 256
_NUM_ROWS: Final = 4
_LEARNING_RATE: Final = 2e-3
_WARMUP_STEPS: Final = 20

_HEALTHY_COEF: Final = 0.05
# Measured (docs/demo-model.md): with -0.3 three layers are at the floor of top_k experts after 20 steps and the first
# one after 40; weaker takes longer, and with -0.5 the first layer's router saturates at 4 experts.
_WRONG_SIGN_COEF: Final = -0.3

# The bias's step u. DeepSeek-V3 has 0.001 over 14.8 trillion tokens; a run of some hundred steps needs more.
_BIAS_STEP: Final = 0.01

_DEFAULT_STEPS: Final = 300
# Behind the 150 steps in which the collapse warning learns what is healthy.
_DEFAULT_FAULT_STEP: Final = 160


@dataclass(frozen=True)
class ScenarioPlan:
    """What a scenario will do.

    Attributes:
        fault_step: the first step with the fault, or None where there is none.
        fault_coef: what `balance_coef` is from then on.
        learning_rate_change: (step, factor): from that step on the learning rate is so many times as high.
    """

    name: ScenarioName
    num_steps: int
    fault_step: int | None
    fault_coef: float = _WRONG_SIGN_COEF
    learning_rate_change: tuple[int, float] | None = None

    def balance_coef(self, step: int) -> float:
        """Return the weight of the balancing loss at a step, or in the loss-free scenarios the bias's step."""
        if self.name == "no-balance":
            return 0.0
        if self.fault_step is not None and step >= self.fault_step:
            return self.fault_coef
        return _BIAS_STEP if self.is_loss_free else _HEALTHY_COEF

    def learning_rate(self, step: int) -> float:
        """Return a step's learning rate: linear warm-up over 20 steps, then constant but for the change."""
        rate = _LEARNING_RATE * min(1.0, (step + 1) / _WARMUP_STEPS)
        if self.learning_rate_change is not None and step >= self.learning_rate_change[0]:
            rate *= self.learning_rate_change[1]
        return rate

    @property
    def is_loss_free(self) -> bool:
        """Whether a selection bias balances, and no loss."""
        return self.name in _LOSS_FREE


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


def plan_scenario(
    name: str,
    *,
    steps: int | None = None,
    fault_step: int | None = None,
    fault_coef: float | None = None,
    learning_rate_change: tuple[int, float] | None = None,
) -> ScenarioPlan:
    """Return what a scenario will do, without doing it.

    Args:
        name: one of `SCENARIOS`.
        steps: number of training steps; 300 by default.
        fault_step: first step of the fault, where the scenario has one; 160 by default, sooner in a run that is short.
        fault_coef: weight of the balancing loss (or step of the bias) from then on; -0.3 (-0.01) by default.
        learning_rate_change: (step, factor).

    Raises:
        InvalidInputError: no such scenario, or numbers that do not fit together.
    """
    if name not in SCENARIOS:
        raise InvalidInputError(f"scenario {name!r}: expected one of {', '.join(SCENARIOS)}")
    num_steps = _DEFAULT_STEPS if steps is None else steps
    if num_steps < 1:
        raise InvalidInputError(f"steps {num_steps}: expected at least 1")
    chosen: ScenarioName = next(one for one in SCENARIOS if one == name)
    if chosen not in _FAULTY:
        for given, value in (("fault_step", fault_step), ("fault_coef", fault_coef)):
            if value is not None:
                raise InvalidInputError(f"{given} {value}: scenario {name!r} has no fault; leave it out")
        return ScenarioPlan(chosen, num_steps, None, learning_rate_change=learning_rate_change)
    first = min(_DEFAULT_FAULT_STEP, num_steps * 8 // 15) if fault_step is None else fault_step
    if not 0 <= first < num_steps:
        raise InvalidInputError(f"fault_step {first}: expected 0 to {num_steps - 1}, the last step")
    wrong = -_BIAS_STEP if chosen in _LOSS_FREE else _WRONG_SIGN_COEF
    return ScenarioPlan(chosen, num_steps, first, wrong if fault_coef is None else fault_coef, learning_rate_change)


def run_scenario(
    name: str,
    *,
    fleet: str | None = None,
    session_name: str | None = None,
    steps: int | None = None,
    fault_step: int | None = None,
    fault_coef: float | None = None,
    learning_rate_change: tuple[int, float] | None = None,
    seed: int = 0,
    size: NetworkSize = DEMO_SIZE,
    row_length: int = _ROW_LENGTH,
    watch: Callable[[Any], contextlib.AbstractContextManager[_Debugger]] | None = None,
    on_step: Callable[[ScenarioStep], None] | None = None,
) -> ScenarioStep:
    """Train a fresh network and stream its routing to a fleet, one request for each batch row.

    Args:
        name: one of `SCENARIOS`.
        fleet: the fleet's NATS URL (`moe-debugger up --json` prints it), or None to train without one.
        session_name: the name that the fleet shows; the scenario's name by default.
        steps, fault_step, fault_coef, learning_rate_change: as in `plan_scenario`.
        seed: of the weights, the batches and the generated texts.
        size: of the network.
        row_length: tokens of each of a batch's four rows.
        watch: makes the debugger of the model, in the place of the fleet's: such as one that stays in this process.
        on_step: is called after each step; what it raises ends the run (the session is closed all the same).

    Returns:
        The last step.

    Raises:
        InvalidInputError: as in `plan_scenario`.
    """
    plan = plan_scenario(
        name, steps=steps, fault_step=fault_step, fault_coef=fault_coef, learning_rate_change=learning_rate_change
    )
    make = LossFreeTrainer if plan.is_loss_free else Trainer
    trainer = make(build_corpus("train", seed=seed), seed=seed, size=size)
    coefficient_name = "selection_bias_step" if plan.is_loss_free else "balance_coef"
    started = time.monotonic()
    last: ScenarioStep | None = None
    attached = (
        _debugger(trainer.model, fleet, session_name or f"demo {plan.name}") if watch is None else watch(trainer.model)
    )
    with attached as debugger:
        for step in range(plan.num_steps):
            batch = trainer.next_batch(step, row_lengths=(row_length,), batch_tokens=_NUM_ROWS * row_length)
            balance_coef, learning_rate = plan.balance_coef(step), plan.learning_rate(step)
            # Before the forward, so that the step's decisions carry its number.
            debugger.step(step, **{coefficient_name: balance_coef, "learning_rate": learning_rate})
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
