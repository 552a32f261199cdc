"""Every architecture in float32 by its default experts implementation, against the causal oracle.

A case also holds: outputs are bit-identical to those without the debugger, no hook remains, padding, positions, phases,
token ids and requests are those that the arguments say.
"""

import pytest
from oracle.builds import EVERY_BUILD
from oracle.matrix import check_forward, check_generate

# The block diffusion model imports torch's compiler at its first step, which defines a module in a deprecated way.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")


@pytest.mark.parametrize("name", list(EVERY_BUILD))
def test_a_left_padded_forward_is_captured_exactly(name: str) -> None:
    build = EVERY_BUILD[name]
    comparison = check_forward(build, build.make())
    assert comparison.is_exact, f"{name}: {comparison.summary()}"


@pytest.mark.parametrize("name", [name for name, build in EVERY_BUILD.items() if build.generate_inputs is not None])
def test_a_greedy_generate_is_captured_exactly(name: str) -> None:
    build = EVERY_BUILD[name]
    comparison = check_generate(build, build.make())
    assert comparison.is_exact, f"{name}: {comparison.summary()}"


def test_the_cases_hold_what_they_are_there_for() -> None:
    """Capacity drops tokens, a skip skips, an identity expert is chosen: else their cases would check nothing."""
    builds = [EVERY_BUILD[name] for name in ("switch_transformers", "zaya", "longcat_flash", "glam")]
    cases = {build.name: check_forward(build, build.make()) for build in builds}
    assert cases["switch_transformers"].num_rows_without_expert > 0
    assert cases["zaya"].num_rows_without_expert > 0
    assert cases["glam"].num_rows_without_expert > 0
    assert cases["longcat_flash"].num_identity_rows > 0
