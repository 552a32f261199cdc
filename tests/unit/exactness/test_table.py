"""The page of the architectures is complete, and says what the results say."""

import pytest
from oracle.builds import EVERY_BUILD
from oracle.describe import Description, describe
from oracle.matrix import matrix_columns
from oracle.modes import FAMILIES, MODES, builds_of
from oracle.outcome import Outcome
from oracle.table import PAGE, cells, render
from zoo.build import ALL


@pytest.fixture(scope="module")
def descriptions() -> dict[str, Description]:
    empty = Description("decoder", "standard", "layers.*.mlp", "8", "2", "0", "0", "softmax", "", "", "ids", "")
    return dict.fromkeys(EVERY_BUILD, empty)


def _rows(page: str, name: str) -> list[str]:
    return [line for line in page.splitlines() if line.startswith(f"| {name} |")]


def test_the_committed_page_lists_every_architecture_of_the_zoo_in_each_table() -> None:
    page = PAGE.read_text()
    missing = [name for name in EVERY_BUILD if len(_rows(page, name)) != 3]
    assert missing == [], f"{PAGE.name} lacks {missing}: run `make test-slow`, then `python -m oracle.table` in tests/"


def test_a_page_says_which_cells_are_exact_wrong_impossible_and_not_run(descriptions: dict[str, Description]) -> None:
    columns = matrix_columns()
    outcomes = {
        (outcome.arch, outcome.column): outcome
        for outcome in (
            Outcome("mixtral", columns[0], "exact", num_rows=40, num_slots=80),
            Outcome("mixtral", columns[1], "wrong", "row 3 | differs", num_rows=2, num_slots=4, num_wrong_ids=7),
            Outcome("mixtral", columns[2], "impossible", "RuntimeError: no half"),
            Outcome("mixtral", "beam search", "not accepted", "does not generate"),
        )
    }
    page = render(descriptions, outcomes)
    _, matrix, modes = _rows(page, "mixtral")
    assert matrix.split(" | ")[1:5] == ["✓", "✗", "—", ""]
    assert modes.count("·") == 1
    assert f"**1 of {len(ALL)} builds" in page
    assert f"4 of {len(cells())} cells" in page
    assert "42 rows" in page
    assert "7 wrong ids" in page
    assert f"- mixtral ({columns[1]}): row 3 \\| differs" in page
    assert f"- mixtral ({columns[2]}): RuntimeError: no half" in page


def test_the_tiers_have_all_cells_of_the_matrix_and_at_least_12_families_in_every_mode() -> None:
    every = cells()
    assert len(every) == len(set(every))
    assert len([cell for cell in every if cell[1] in matrix_columns()]) == 9 * len(EVERY_BUILD)
    assert len(FAMILIES) >= 12
    assert set(FAMILIES) <= set(ALL)
    for mode in MODES:
        assert len(builds_of(mode)) >= 12, mode


def test_a_description_tells_shapes_adapter_and_columns() -> None:
    switch, longcat = describe("switch_transformers"), describe("longcat_flash")
    assert (switch.num_experts, switch.top_k) == ("8", "1")
    assert "dropped slots" in switch.captured
    assert switch.modules == "encoder.block.*.layer.*.mlp, decoder.block.*.layer.*.mlp"
    assert (longcat.num_experts, longcat.num_identity) == ("8", "4")
    assert "identity slots" in longcat.captured
