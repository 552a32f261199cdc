"""Scripted trainings: loads over steps and the settings that were recorded with them."""

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import pytest

from moe_debugger.analysis import EvidenceRow, Finding, FindingKind, Severity
from moe_debugger.analysis.explanation import LayerHistory, ObservedSettings, Setting

Floats = npt.NDArray[np.float64]

EXPERTS = 8


def collapsing_counts(num_steps: int, onset: int | None, *, length: int = 20, seed: int = 0) -> Floats:
    """Return [num_steps, 8] loads of 4,000 assignments: even, and from `onset` on moving to experts 0 and 1."""
    rng = np.random.default_rng(seed)
    rows = []
    for step in range(num_steps):
        done = 0.0 if onset is None else min(max((step - onset + 1) / length, 0.0), 1.0)
        share = (1 - done) * np.full(EXPERTS, 1 / EXPERTS) + done * np.array([0.5, 0.5, 0, 0, 0, 0, 0, 0])
        rows.append(rng.multinomial(4000, share))
    return np.array(rows, np.float64)


def history(layer: int, onset: int | None, *, num_steps: int = 150, length: int = 20) -> LayerHistory:
    """Return a layer that falls to two experts from `onset` on."""
    return LayerHistory(layer, np.arange(num_steps), collapsing_counts(num_steps, onset, length=length, seed=layer))


def collapse(layer: int = 0) -> Finding:
    """Return a collapse with its limit of 3 of 8 effective experts."""
    return Finding(
        FindingKind.ROUTER_COLLAPSE,
        Severity.CRITICAL,
        "router_collapse",
        layer,
        evidence=(EvidenceRow("effective_experts", 2.0, "< 3"),),
    )


def series(name: str, values: Sequence[float] | Floats, layer: int = -1) -> Setting:
    """Return a setting with one value a step from 0 on."""
    column = np.asarray(values, np.float64)
    return Setting(name, layer, np.arange(len(column)), column.reshape(len(column), -1))


def observed(**values: Sequence[float] | Floats) -> ObservedSettings:
    """Return settings of the whole model."""
    return ObservedSettings(series(name, column) for name, column in values.items())


@pytest.fixture
def stepped() -> Callable[[float, float, int], list[float]]:
    """Return a function that makes 150 values with a jump."""
    return lambda before, after, at: [before] * at + [after] * (150 - at)
