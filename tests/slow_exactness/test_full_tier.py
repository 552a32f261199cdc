"""The full tier: each cell of the matrix and of the modes runs once for the sources that it depends on.

What came out is kept in `build/exactness/`, so a run that was stopped goes on where it ended; `python -m oracle.table`
(from `tests/`) makes the page of it.
"""

import pytest
from oracle.builds import EVERY_BUILD
from oracle.columns import MODES, builds_of, key_of, matrix_cell, matrix_columns, mode_cell
from oracle.modes_sharded import SHARDED, expert_plan
from oracle.outcome import Results
from zoo.build import ALL

pytestmark = [
    pytest.mark.slow,
    # The block diffusion model imports torch's compiler at its first step, which defines a module in a deprecated way.
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning"),
]


@pytest.mark.parametrize("column", matrix_columns())
@pytest.mark.parametrize("arch", list(EVERY_BUILD))
def test_matrix(arch: str, column: str) -> None:
    outcome = Results(key_of).once(arch, column, lambda: matrix_cell(EVERY_BUILD[arch], column))
    assert outcome.status != "wrong", f"{arch}, {column}: {outcome.detail}"


# The first sharded column of a build runs all of them, the first compiled one compiles what others compare with.
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("arch", "mode"), [(arch, mode) for mode in MODES for arch in builds_of(mode)])
def test_mode(arch: str, mode: str) -> None:
    outcome = Results(key_of).once(arch, mode, lambda: mode_cell(arch, mode))
    assert outcome.status != "wrong", f"{arch}, {mode}: {outcome.detail}"


def test_every_kind_of_expert_parallel_plan_has_a_family() -> None:
    kinds: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for arch in ALL:
        kinds.setdefault(expert_plan(arch), []).append(arch)
    assert len(kinds) > 5
    lacking = [archs for archs in kinds.values() if not set(archs) & set(SHARDED)]
    assert lacking == []
