"""Healthy data give no finding above info more often than is stated, and variances of independent tokens would.

Here a few runs of each condition; tests/slow/test_false_alarms.py has a thousand.
"""

import pytest
from healthy_routing import Healthy, as_if_independent, healthy_conditions, num_alarms

from moe_debugger.analysis.rules import look

RUNS = 8
MUTANT_SHOWS_AT = "documents 64/8, design effect 25, skewed to the floors"


@pytest.mark.parametrize("condition", healthy_conditions(), ids=lambda condition: condition.name)
def test_healthy_data_give_nothing_above_info(condition: Healthy) -> None:
    # At the stated rate three or more of eight would come once in 170 times.
    assert num_alarms(condition, range(RUNS)) <= 2


def test_variances_of_independent_tokens_would_give_more_than_the_stated_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    [condition] = [one for one in healthy_conditions() if one.name == MUTANT_SHOWS_AT]
    honest = num_alarms(condition, range(40))
    monkeypatch.setattr(look, "variance_blocks", as_if_independent)
    mutant = num_alarms(condition, range(40))
    # At 0.05, eight or more of forty would come once in 1,000 times.
    assert mutant >= 8
    assert honest <= 4
