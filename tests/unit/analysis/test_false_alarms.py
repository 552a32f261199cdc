"""Healthy data give no finding above info more often than is stated, and variances of independent tokens would.

Here a few runs of each condition; tests/slow/test_false_alarms.py has a thousand.
"""

import numpy as np
import pytest
from healthy_routing import Healthy, healthy_conditions

from moe_debugger.analysis import LayerState, Severity, analyze, intervals
from moe_debugger.analysis.rules import look

RUNS = 8
MUTANT_SHOWS_AT = "documents 64/8, design effect 25, skewed to the floors"


def alarms(condition: Healthy, seeds: range) -> int:
    """Return in how many runs any finding above info came."""
    count = 0
    for seed in seeds:
        found = analyze(condition(seed), num_experts=condition.num_experts, top_k=condition.top_k)
        count += any(finding.severity is not Severity.INFO for finding in found.findings)
    return count


@pytest.mark.parametrize("condition", healthy_conditions(), ids=lambda condition: condition.name)
def test_healthy_data_give_nothing_above_info(condition: Healthy) -> None:
    # At the stated rate three or more of eight would come once in 1,500 times.
    assert alarms(condition, range(RUNS)) <= 2


def test_variances_of_independent_tokens_would_give_more_than_the_stated_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    [condition] = [one for one in healthy_conditions() if one.name == MUTANT_SHOWS_AT]
    honest = alarms(condition, range(40))

    def as_if_independent(state: LayerState, **options: object) -> intervals.Blocks:
        # Slots dealt to 64 blocks at random: blocks differ as independent tokens would.
        rng = np.random.default_rng(int(state.num_assignments))
        counts = state.counts.astype(np.int64)
        table = np.stack([rng.multinomial(count, [1 / 64] * 64) for count in counts.tolist()], axis=1)
        return intervals.Blocks(table.astype(np.float64), intervals.BlockKind.REQUESTS)

    monkeypatch.setattr(look, "variance_blocks", as_if_independent)
    mutant = alarms(condition, range(40))
    # At 0.05, eight or more of forty would come once in 1,000 times.
    assert mutant >= 8
    assert honest <= 4
