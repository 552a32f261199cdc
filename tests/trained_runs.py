"""Small networks, really trained and watched by the debugger, and what the early warning said of them.

A run is one of the demo's scenarios in its small size: 4 layers, 8 experts, top-2, 512 tokens a step, learning rate
2e-3 after 20 steps of warm-up. What is judged are the rows that the debugger captured, nothing else.
"""

import random
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt

from moe_debugger import MoEDebugger
from moe_debugger.analysis import (
    FindingKind,
    LayerSeries,
    WarningReport,
    analyze,
    collapse_warnings,
)
from moe_debugger.demo import scenarios
from moe_debugger.demo.corpus import Corpus, Split, build_corpus
from moe_debugger.demo.scenarios import ScenarioStep, run_scenario
from moe_debugger.demo.training import SMALL_SIZE

__all__ = ["CASES", "NUM_EXPERTS", "TOP_K", "Case", "TrainedRun", "series_of", "train", "train_case"]

NUM_EXPERTS, TOP_K = 8, 2
_ROW_LENGTH = 128
# A window of the collapse rule: 80 sequences.
_WINDOW_STEPS = 20

_corpus = cache(build_corpus)


@dataclass(frozen=True)
class Case:
    """A kind of run, and the seeds that are trained of it.

    Attributes:
        scenario: of `moe_debugger.demo.scenarios`.
        fault_coef: weight of the balancing loss, or the bias's step, from the fault on.
        learning_rate_change: (step, factor).
    """

    scenario: str
    num_seeds: int
    fault_coef: float | None = None
    learning_rate_change: tuple[int, float] | None = None

    @property
    def is_faulty(self) -> bool:
        """Whether a fault comes."""
        return self.fault_coef is not None


CASES: dict[str, Case] = {
    "loss turned, 0.3": Case("collapse", 5, fault_coef=-0.3),
    "loss turned, 0.05": Case("collapse", 5, fault_coef=-0.05),
    "bias turned": Case("loss-free-collapse", 5, fault_coef=-0.01),
    "healthy, rate x 0.2": Case("healthy", 5, learning_rate_change=(200, 0.2)),
    "healthy, rate x 2.5": Case("healthy", 4, learning_rate_change=(200, 2.5)),
    "loss-free, rate x 0.2": Case("loss-free", 3, learning_rate_change=(200, 0.2)),
    "no balancing": Case("no-balance", 2),
}
_HEALTHY_STEPS = 320
# A fault comes at a random step of these, and the run goes on for as many steps after it.
_FAULT_STEPS = range(150, 250)
_STEPS_AFTER_FAULT = 80


@dataclass(frozen=True)
class TrainedRun:
    """A run that is over.

    Attributes:
        loads: [steps, layers, experts], counted from the captured rows.
        fault_step: first step with the fault, None in a healthy run.
        warnings: what the early warning says after the last step.
    """

    name: str
    seed: int
    loads: npt.NDArray[np.int64]
    fault_step: int | None
    warnings: WarningReport
    decisions: dict[str, Any]

    @property
    def effective_experts(self) -> npt.NDArray[np.float64]:
        """[steps, layers] exp of the entropy of each step's load."""
        share = self.loads / self.loads.sum(axis=2, keepdims=True)
        effective: npt.NDArray[np.float64] = np.exp(
            -(share * np.log(share, where=share > 0, out=np.zeros_like(share))).sum(axis=2)
        )
        return effective

    @property
    def warned_at(self) -> int | None:
        """The first step after which any layer was warned of."""
        steps = [layer.warned_at_step for layer in self.warnings.layers.values() if layer.warned_at_step is not None]
        earlier = [step for layer in self.warnings.layers.values() for step, _ in layer.earlier]
        return min(steps + earlier, default=None)

    @property
    def half_at(self) -> int | None:
        """The first step in which any layer has half of the effective experts of the 50 steps before the fault."""
        if self.fault_step is None:
            return None
        effective = self.effective_experts
        before = np.median(effective[self.fault_step - 50 : self.fault_step], axis=0)
        is_half = (effective[self.fault_step :] <= before / 2).any(axis=1)
        return self.fault_step + int(is_half.argmax()) if is_half.any() else None

    def window(self, first: int, last: int) -> dict[str, Any]:
        """Return the captured rows of steps first..last - 1."""
        step = np.asarray(self.decisions["step"])
        rows = np.flatnonzero((step >= first) & (step < last))
        return {name: _rows(column, rows) for name, column in self.decisions.items()}

    def collapses(self, first: int, last: int) -> set[int | None]:
        """Return the layers of `router_collapse` in the rows of steps first..last - 1."""
        found = analyze(self.window(first, last), num_experts=NUM_EXPERTS, top_k=TOP_K).findings
        return {finding.layer_index for finding in found if finding.kind is FindingKind.ROUTER_COLLAPSE}

    def collapsed_at(self) -> int | None:
        """The last step of the first window of 20 steps (every 10) with a `router_collapse`."""
        for last in range(_WINDOW_STEPS, len(self.loads) + 1, _WINDOW_STEPS // 2):
            if self.collapses(last - _WINDOW_STEPS, last):
                return last - 1
        return None


def _rows(column: Any, rows: npt.NDArray[np.intp]) -> Any:
    return column[rows] if isinstance(column, np.ndarray) else [column[row] for row in rows.tolist()]


def series_of(loads: npt.NDArray[np.int64], *, width: int = 1) -> dict[int, LayerSeries]:
    """Return the series of loads [steps, layers, experts] in points of `width` steps."""
    num = len(loads) // width
    points = loads[: num * width].reshape(num, width, *loads.shape[1:]).sum(axis=1)
    first = np.arange(num, dtype=np.uint64) * np.uint64(width)
    return {
        layer: LayerSeries.from_loads(first, points[:, layer], points[:, layer].sum(axis=1) // TOP_K, width=width)
        for layer in range(loads.shape[1])
    }


def train(
    name: str,
    *,
    seed: int,
    steps: int,
    fault_step: int | None = None,
    fault_coef: float | None = None,
    learning_rate_change: tuple[int, float] | None = None,
    texts: Split = "train",
) -> TrainedRun:
    """Train a small network and return what the debugger saw of it.

    Args:
        texts: the split to train on; the held-out texts are fewer, and there in a second.
        others: as in `run_scenario`.
    """
    import torch

    torch.set_num_threads(1)
    captured: list[dict[str, Any]] = []
    debuggers: list[MoEDebugger] = []

    def watch(model: Any) -> AbstractContextManager[MoEDebugger]:
        debuggers.append(MoEDebugger(model, step_domain="global", kind="training"))
        return debuggers[-1]

    def on_step(step: ScenarioStep) -> None:
        if step.step == steps - 1:
            session = debuggers[-1].session
            assert session is not None
            rows = session.decisions()
            wanted = ("layer_index", "step", "expert_ids", "request_id", "position", "phase", "is_padding", "token_id")
            captured.append({column: rows[column] for column in wanted if column in rows})

    # The same for every seed: they take seconds to build.
    def build(split: Split, *, seed: int) -> Corpus:
        return _corpus(texts)

    with mock.patch.object(scenarios, "build_corpus", build):
        last = run_scenario(
            name,
            steps=steps,
            fault_step=fault_step,
            fault_coef=fault_coef,
            learning_rate_change=learning_rate_change,
            seed=seed,
            size=SMALL_SIZE,
            row_length=_ROW_LENGTH,
            watch=watch,
            on_step=on_step,
        )
    decisions = captured[0]
    layer, step = np.asarray(decisions["layer_index"]), np.asarray(decisions["step"]).astype(np.int64)
    ids = np.asarray(decisions["expert_ids"]).astype(np.int64)
    num_layers = int(layer.max()) + 1
    cell = (step * num_layers + layer)[:, None] * NUM_EXPERTS + ids
    loads = np.bincount(cell.ravel(), minlength=steps * num_layers * NUM_EXPERTS).reshape(steps, num_layers, -1)
    return TrainedRun(name, seed, loads, last.plan.fault_step, collapse_warnings(series_of(loads)), decisions)


def train_case(name: str, seed: int) -> TrainedRun:
    """Train one run of a case; its seed also draws the step of the fault."""
    case = CASES[name]
    fault_step = random.Random(f"{name}/{seed}").choice(_FAULT_STEPS) if case.is_faulty else None
    return train(
        case.scenario,
        seed=seed,
        steps=_HEALTHY_STEPS if fault_step is None else fault_step + _STEPS_AFTER_FAULT,
        fault_step=fault_step,
        fault_coef=case.fault_coef,
        learning_rate_change=case.learning_rate_change,
    )
