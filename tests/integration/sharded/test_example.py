"""The example script runs, and prints each decision's load once."""

from collections.abc import Callable
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[3] / "examples" / "sharded" / "generate.py"


def numbers(output: str, after: str, column: int) -> list[int]:
    """Return a column of the table whose title begins with `after`, in each place where it is printed."""
    lines = output.splitlines()
    values: list[int] = []
    for start, line in enumerate(lines):
        if line.startswith(after) and not line.endswith("every rank computes all experts"):
            for row in lines[start + 3 :]:
                if not row.strip():
                    break
                values.append(int(row.split()[column].replace(",", "")))
    return values


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["ep", "dp", "pp"])
def test_the_example_prints_the_load_of_every_rank(launch: Callable[..., str], plan: str) -> None:
    output = launch(2, EXAMPLE, "--model", "tiny", "--plan", plan, "--max-new-tokens", "4")
    # Four prompts of 12 tokens, and three more of each that were fed back; one such batch for each rank under dp.
    num_tokens = 4 * (12 + 3)
    num_tables = 2 if plan == "dp" else 1
    assert numbers(output, "Routing of", 4) == [num_tokens] * 4 * num_tables
    by_rank = numbers(output, "Ranks of", 3)
    assert sum(by_rank) == (0 if plan == "pp" else 2 * num_tokens * 4 * num_tables)
    assert len(by_rank) == (0 if plan == "pp" else 8 * num_tables)
    assert ("replica of rank 0" in output) == (plan == "ep")
