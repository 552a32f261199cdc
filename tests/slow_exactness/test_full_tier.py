"""The full tier: each cell of the matrix and of the modes runs once for the sources that it depends on.

What came out is kept in `build/exactness/`, so a run that was stopped goes on where it ended; `python -m oracle.table`
(from `tests/`) makes the page of it.
"""

import pytest
from oracle.builds import EVERY_BUILD
from oracle.matrix import matrix_cell, matrix_columns
from oracle.modes import MODES, builds_of, key_of, mode_cell
from oracle.outcome import Results

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


@pytest.mark.parametrize(("arch", "mode"), [(arch, mode) for mode in MODES for arch in builds_of(mode)])
def test_mode(arch: str, mode: str) -> None:
    outcome = Results(key_of).once(arch, mode, lambda: mode_cell(arch, mode))
    assert outcome.status != "wrong", f"{arch}, {mode}: {outcome.detail}"
