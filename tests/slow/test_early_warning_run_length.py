"""The stated run length of the early warning on healthy loads of few slots a step; about a minute of one core."""

import math

import numpy as np
import pytest
from small_counts import SmallCounts

from moe_debugger.analysis import PAGE_RUN_LENGTH
from moe_debugger.analysis.early_warning import min_slots

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

_SHAPES = [(8, 1), (8, 2), (16, 2), (64, 8), (128, 8), (256, 8)]


@pytest.mark.parametrize("sigma", [0.0, 1.0], ids=["balanced", "skewed"])
@pytest.mark.parametrize(("num_experts", "top_k"), _SHAPES)
def test_false_alarms_on_few_slots_are_as_rare_as_stated(num_experts: int, top_k: int, sigma: float) -> None:
    just_enough = -(-min_slots(num_experts) // top_k)
    found, watched = 0, 0.0
    for tokens in (4, 16, just_enough, (4, 64)):
        noise = SmallCounts(num_experts, top_k, tokens, sigma)
        count, steps = noise.false_alarms(np.random.default_rng(1), 1e4, num_at_once=6e5)
        found, watched = found + count, watched + steps
    expected = watched / PAGE_RUN_LENGTH
    tail = 1 - sum(math.exp(-expected) * expected**i / math.factorial(i) for i in range(found))
    assert tail > 0.001, (found, watched)


def test_steps_that_are_no_sums_fail_that_test(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_debugger.analysis.early_warning.min_slots", lambda num_experts: 1)
    found, watched = SmallCounts(8, 2, 8).false_alarms(np.random.default_rng(1), 2e4, num_at_once=6e5)
    assert found > 10 * watched / PAGE_RUN_LENGTH
