"""The page of the architectures is complete, and says what the results say."""

from types import ModuleType

import pytest
from oracle.builds import EVERY_BUILD
from oracle.columns import FAMILIES, MODE_FILES, MODES, builds_of, matrix_columns
from oracle.describe import Description, describe
from oracle.outcome import Outcome
from oracle.table import PAGE, cells, render
from zoo.build import ALL


@pytest.fixture(scope="module")
def descriptions() -> dict[str, Description]:
    empty = Description("decoder", "standard", "layers.*.mlp", "8", "2", "0", "0", "softmax", "", "", "ids", "")
    return dict.fromkeys(EVERY_BUILD, empty)


def _modes_of(file: ModuleType, name: str) -> list[str]:
    return [mode for mode, (run, _) in MODES.items() if run.__module__ == file.__name__ and name in builds_of(mode)]


def _rows(page: str, name: str) -> list[str]:
    return [line for line in page.splitlines() if line.startswith(f"| {name} |")]


def test_the_committed_page_lists_every_architecture_of_the_zoo_in_each_table() -> None:
    page = PAGE.read_text()
    num_tables = {name: 2 + len([file for file in MODE_FILES if _modes_of(file, name)]) for name in EVERY_BUILD}
    missing = [name for name in EVERY_BUILD if len(_rows(page, name)) != num_tables[name]]
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
    _, matrix, *modes = _rows(page, "mixtral")
    assert matrix.split(" | ")[1:5] == ["✓", "✗", "—", ""]
    assert "".join(modes).count("·") == 1
    assert f"**0 of {len(ALL)} builds are exact in every cell" in page
    assert f"4 of {len(cells())} cells" in " ".join(page.split())
    assert "42 rows" in page
    assert "7 wrong ids" in page
    assert f"- mixtral ({columns[1]}): row 3 \\| differs" in page
    assert f"- mixtral ({columns[2]}): RuntimeError: no half" in page


def test_a_build_counts_as_exact_only_if_all_its_cells_have_run_and_none_is_wrong(
    descriptions: dict[str, Description],
) -> None:
    outcomes = {
        (arch, column): Outcome(arch, column, "impossible" if column == "pp" else "exact", num_rows=1)
        for arch, column in cells()
    }
    assert f"**{len(ALL)} of {len(ALL)} builds are exact in every cell" in render(descriptions, outcomes)
    wrong = {**outcomes, ("olmoe", "levels"): Outcome("olmoe", "levels", "wrong", "off")}
    assert f"**{len(ALL) - 1} of {len(ALL)} builds are exact in every cell" in render(descriptions, wrong)
    del outcomes["olmoe", "eager bf16"]
    assert f"**{len(ALL) - 1} of {len(ALL)} builds are exact in every cell" in render(descriptions, outcomes)


def test_the_tiers_have_all_cells_of_the_matrix_and_at_least_12_families_in_every_mode() -> None:
    every = cells()
    assert len(every) == len(set(every))
    assert len([cell for cell in every if cell[1] in matrix_columns()]) == 9 * len(EVERY_BUILD)
    assert len(FAMILIES) >= 12
    assert set(FAMILIES) <= set(EVERY_BUILD)
    for mode in MODES:
        # Compiling to machine code takes long, and differs from tracing in nothing that depends on the router.
        assert len(builds_of(mode)) >= (3 if mode == "compile, inductor" else 12), mode


def test_the_families_cover_every_adapter_and_every_scoring_function() -> None:
    described = PAGE.read_text().partition("## Experts implementations")[0]
    cells_of = {line.split(" | ")[0].strip("| "): line.split(" | ") for line in described.splitlines() if "| " in line}
    for column in (3, 6):
        every = {part for name in EVERY_BUILD for part in cells_of[name][column].split(" or ")}
        covered = {part for name in FAMILIES for part in cells_of[name][column].split(" or ")}
        assert covered == every, every - covered


def test_a_description_tells_shapes_adapter_and_columns() -> None:
    switch, longcat = describe("switch_transformers"), describe("longcat_flash")
    assert (switch.num_experts, switch.top_k) == ("8", "1")
    assert "dropped slots" in switch.captured
    assert switch.modules == "encoder.block.*.layer.*.mlp, decoder.block.*.layer.*.mlp"
    assert (longcat.num_experts, longcat.num_identity) == ("8", "4")
    assert "identity slots" in longcat.captured
