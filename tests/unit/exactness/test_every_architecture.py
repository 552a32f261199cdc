"""Every architecture in float32 by its default experts implementation, against the causal oracle.

A case also holds: outputs are bit-identical to those without the debugger, no hook remains, padding, positions, phases,
token ids and requests are those that the arguments say.
"""

import pytest
from oracle.matrix import check_forward, check_generate
from zoo.build import ALL


@pytest.mark.parametrize("name", list(ALL))
def test_a_left_padded_forward_is_captured_exactly(name: str) -> None:
    build = ALL[name]
    comparison = check_forward(build, build.make())
    assert comparison.is_exact, f"{name}: {comparison.summary()}"


@pytest.mark.parametrize("name", [name for name, build in ALL.items() if build.generate_inputs is not None])
def test_a_greedy_generate_is_captured_exactly(name: str) -> None:
    build = ALL[name]
    comparison = check_generate(build, build.make())
    assert comparison.is_exact, f"{name}: {comparison.summary()}"


def test_the_cases_hold_what_they_are_there_for() -> None:
    """Capacity drops tokens, a skip skips, an identity expert is chosen: else their cases would check nothing."""
    cases = {
        name: check_forward(ALL[name], ALL[name].make()) for name in ("switch_transformers", "zaya", "longcat_flash")
    }
    assert cases["switch_transformers"].num_rows_without_expert > 0
    assert cases["zaya"].num_rows_without_expert > 0
    assert cases["longcat_flash"].num_identity_rows > 0
