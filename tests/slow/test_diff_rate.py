"""The stated rate of false alarms of a comparison, on healthy halves: it is not rejected at 0.001."""

import math

import pytest
from reported import forwards, infos, material, sampled

from moe_debugger.reporting.comparing import _compare

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

ALPHA, PAIRS = 0.05, 600


def _upper_tail(num: int, of: int, rate: float) -> float:
    """Return the chance of `num` or more of `of` at that rate."""
    return sum(math.comb(of, k) * rate**k * (1 - rate) ** (of - k) for k in range(num, of + 1))


@pytest.mark.parametrize(("num_layers", "requests", "tokens"), [(2, 10, 12), (6, 20, 8)])
def test_healthy_halves_are_called_different_at_the_stated_rate(num_layers: int, requests: int, tokens: int) -> None:
    shape, wrong = (8, 2), 0
    layers = infos(*[shape] * num_layers)
    for trial in range(PAIRS):
        choices = [
            [sampled(10_000 * trial + 16 * r + i, tokens, shape, strength=1.0) for i in range(num_layers)]
            for r in range(2 * requests)
        ]
        a = material(forwards(choices[:requests], [8] * num_layers), layers)
        b = material(forwards(choices[requests:], [8] * num_layers, first_request=requests), layers)
        wrong += _compare(a, b, ALPHA, False, 199, trial).verdict == "different"
    assert _upper_tail(wrong, PAIRS, ALPHA) > 0.001, wrong
