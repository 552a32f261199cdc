"""A really trained network whose selection bias is turned: warned of first, collapsed after. The long form is slow."""

import numpy as np
import pytest
from trained_runs import TrainedRun, series_of, train

from moe_debugger.analysis import collapse_warnings

_FAULT = 165


@pytest.fixture(scope="module")
def turned() -> TrainedRun:
    return train("loss-free-collapse", seed=1, steps=200, fault_step=_FAULT, texts="held_out")


@pytest.mark.timeout(300)
def test_a_turned_selection_bias_is_warned_of_before_half_of_any_layer_is_lost(turned: TrainedRun) -> None:
    assert turned.warned_at is not None
    assert turned.half_at is not None
    assert _FAULT < turned.warned_at < turned.half_at
    since = min(layer.since_step for layer in turned.warnings.layers.values() if layer.since_step is not None)
    assert abs(since - _FAULT) <= 6


def test_collapse_follows_the_warning(turned: TrainedRun) -> None:
    assert turned.collapses(_FAULT - 20, _FAULT) == set()
    assert turned.collapses(180, 200) != set()


def test_looks_after_each_step_say_nothing_before_the_fault_and_the_same_after_it(turned: TrainedRun) -> None:
    for steps in range(150, len(turned.loads)):
        looked = collapse_warnings(series_of(turned.loads[:steps]))
        known = {index for index, layer in looked.layers.items() if layer.warned_at_step is not None}
        due = {
            index
            for index, layer in turned.warnings.layers.items()
            if layer.warned_at_step is not None and layer.warned_at_step < steps
        }
        assert known == due
        for index in known:
            assert looked.layers[index].since_step == turned.warnings.layers[index].since_step


def test_the_captured_rows_are_the_loads_of_every_step(turned: TrainedRun) -> None:
    # 4 rows of 128 tokens, two experts each, in 4 layers.
    assert turned.loads.shape == (200, 4, 8)
    assert np.unique(turned.loads.sum(axis=2)).tolist() == [4 * 128 * 2]
