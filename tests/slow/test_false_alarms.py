"""The stated false-alarm rates, measured: 1,000 seeded runs of each healthy condition, and windows in turn."""

from pathlib import Path

import numpy as np
import pytest
from healthy_routing import (
    Healthy,
    as_if_independent,
    documents,
    healthy_conditions,
    num_alarms,
    resampled,
    topic_strength,
)

from moe_debugger.analysis import Severity, finish, fold_decisions, merge_all
from moe_debugger.analysis.analyze import FALSE_ALARM_RATE, FALSE_ALARMS_PER_1000_WINDOWS
from moe_debugger.analysis.rules import look
from moe_debugger.analysis.state import RoutingState

RUNS = 1000
SEEDS = range(10_000, 10_000 + RUNS)
# The one-sided test does not reject the stated rate at this level.
LEVEL = 0.001
TABLE = Path("build/false-alarms.txt")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def binomial_upper_tail(successes: int, trials: int, rate: float) -> float:
    """Return P(X >= successes) of a binomial, by summing in logarithms."""
    from math import exp, lgamma, log

    def term(k: int) -> float:
        choose = lgamma(trials + 1) - lgamma(k + 1) - lgamma(trials - k + 1)
        return exp(choose + k * log(rate) + (trials - k) * log(1 - rate))

    return min(1.0, sum(term(k) for k in range(successes, trials + 1)))


def note(text: str) -> None:
    TABLE.parent.mkdir(exist_ok=True)
    with TABLE.open("a") as out:
        out.write(text + "\n")


def test_the_tail_is_that_of_the_table() -> None:
    # Of 20 trials at 0.05 three or more succeed with probability 0.0755.
    assert binomial_upper_tail(3, 20, 0.05) == pytest.approx(0.0755, abs=1e-4)


@pytest.mark.parametrize("condition", healthy_conditions(), ids=lambda condition: condition.name)
def test_the_stated_rate_is_not_rejected(condition: Healthy) -> None:
    count = num_alarms(condition, SEEDS)
    note(f"{condition.name}: {count} of {RUNS} calls")
    assert binomial_upper_tail(count, RUNS, FALSE_ALARM_RATE) > LEVEL


def test_variances_of_independent_tokens_would_be_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(look, "variance_blocks", as_if_independent)
    rejected = []
    for condition in healthy_conditions():
        if "skewed" in condition.name:
            count = num_alarms(condition, SEEDS)
            note(f"{condition.name}, variances as of independent tokens: {count} of {RUNS} calls")
            if binomial_upper_tail(count, RUNS, FALSE_ALARM_RATE) <= LEVEL:
                rejected.append(condition.name)
    assert len(rejected) >= 2


@pytest.mark.parametrize("source", ["demo model, mixed", "documents 64/8, design effect 10"])
def test_the_stated_number_of_windows_is_not_rejected(source: str) -> None:
    # A live page looks at the newest 30 of seconds that bring four requests each, again and again.
    opened, looks, open_before = 0, 0, set[str]()
    for run in range(10):
        rng = np.random.default_rng(run)
        recent: list[RoutingState] = []
        for second in range(130):
            if source.startswith("demo"):
                rows, sizes = resampled(rng, num_requests=4), {"num_experts": 8, "top_k": 2}
            else:
                strength = topic_strength(64, 8, 64, 10.0)
                rows, sizes = documents(rng, 64, 8, 4, 64, strength=strength), {"num_experts": 64, "top_k": 8}
            rows["request_id"] = np.char.add(f"{second} ", rows["request_id"])
            recent = [*recent[-29:], fold_decisions(rows, **sizes).without_history()]
            if len(recent) < 30:
                continue
            found = finish(merge_all(recent))
            now = {finding.rule_id for finding in found.findings if finding.severity is not Severity.INFO}
            opened += bool(now - open_before)
            open_before, looks = now, looks + 1
    note(f"{source}: {opened} of {looks} windows open a finding above info")
    assert looks >= 1000
    assert binomial_upper_tail(opened, looks, FALSE_ALARMS_PER_1000_WINDOWS / 1000) > LEVEL
