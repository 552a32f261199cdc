"""Every public number is defined in docs/metrics.md: formula, unit, sample size, and where it does not apply."""

import dataclasses
import inspect
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from moe_debugger import analysis, planning
from moe_debugger.analysis import expert_similarity, locality, metrics, small_samples, step_metrics

DOCUMENT = Path(__file__).parents[3] / "docs" / "metrics.md"
RESULTS: list[Any] = [
    analysis.LayerMetrics,
    analysis.BalancedBand,
    analysis.StepBalance,
    analysis.Coactivation,
    analysis.ExpertPair,
    analysis.Transitions,
    analysis.Locality,
    locality.NgramLocality,
    locality.SegmentLocality,
    analysis.CapacityDrops,
    analysis.LayerDrift,
    analysis.LayerMismatch,
    analysis.Mismatch,
    analysis.LayerPermutation,
    analysis.LayerSaturation,
    analysis.DomainSpecialisation,
    analysis.VocabularySpecialisation,
    analysis.ExpertSimilarity,
    analysis.SimilarPair,
    analysis.TogetherPair,
    planning.RankMetrics,
]
# What results hold besides numbers of their own: places and sizes, limits that the caller set, labels, tables that the
# numbers are made of, and parts that are results themselves.
NO_NUMBERS = {
    *(
        "layer_index",
        "next_layer_index",
        "expert_ids",
        "expert_id",
        "expert_a",
        "expert_b",
        "token_id",
        "hottest_expert",
    ),
    *("first", "last", "second", "n", "length", "top_k", "next_top_k", "labels", "blocks_of", "notes", "is_exact"),
    *("not_applicable", "overflow_not_applicable", "layers", "ngrams", "segments", "expert_tokens"),
    *("next_expert_tokens", "capacity_factor", "threshold", "prior_tokens", "cache_size", "statistic"),
    # Parts of a number that has its own line: a limit of it, or what it is compared with.
    *("lower", "expected", "half_width", "null_mean", "null_upper", "overall_rate"),
}
NUMBERS_THAT_COUNT = {"num_unused", "num_hottest_experts"}
# Functions, where their names differ from those of the results' fields.
FUNCTIONS = {
    "expert_share": "share",
    "coefficient_of_variation": "cv",
    "debiased_coefficient_of_variation": "cv_debiased",
    "unused_experts": "num_unused",
    "linear_cka": "linear_cka",
}
# What computes no number of its own: it gathers others, or draws what they are judged by.
NO_METRICS = {"layer_metrics", "entropy_bias", "balanced_band", "balanced_counts", "step_balance"}
NO_METRICS |= {"aligned_similarity", "output_similarity"}


class Line(NamedTuple):
    """One line of a table of definitions."""

    cells: dict[str, str]
    section: str


def lines_of(text: str) -> dict[str, list[Line]]:
    """Return the lines of all tables of definitions, by each name in their first cell."""
    found: dict[str, list[Line]] = {}
    for section in re.split(r"^(?=#{2,3} )", text, flags=re.MULTILINE):
        header: list[str] = []
        for line in section.splitlines():
            if not line.startswith("|"):
                header = []
                continue
            cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip().strip("|"))]
            if not header:
                header = cells
                continue
            for name in re.findall(r"`([^`]+)`", cells[0]):
                last = re.sub(r"\[.*?\]", "", name).split(".")[-1]
                found.setdefault(last, []).append(Line(dict(zip(header, cells, strict=False)), section))
    return found


def problem(line: Line) -> str:
    """Return what a line lacks, or nothing."""
    cells = line.cells
    for word in ("formula", "unit", "sample"):
        texts = [text for name, text in cells.items() if word in name]
        if not texts:
            return f"its table has no column {word!r}"
        if not any(texts):
            return f"{word!r} is empty"
    own = cells.get("not applicable")
    if own == "" or (own is None and "not applicable" not in line.section.lower()):
        return "nothing says where it is not applicable"
    return ""


LINES = lines_of(DOCUMENT.read_text("utf-8"))


def names_of(result: Any) -> list[str]:
    names: list[str] = []
    for field in dataclasses.fields(result):
        name = field.name
        is_count = name.startswith("num_") and name not in NUMBERS_THAT_COUNT
        if not (is_count or name in NO_NUMBERS or name.endswith("interval") or name.startswith("next_num_")):
            names.append(name)
    return names


def functions() -> list[str]:
    return [
        FUNCTIONS.get(str(name), str(name))
        for module in (metrics, small_samples, step_metrics, expert_similarity)
        for name in module.__all__
        if inspect.isfunction(getattr(module, name)) and name not in NO_METRICS
    ]


@pytest.mark.parametrize(
    ("owner", "name"),
    [(result.__name__, name) for result in RESULTS for name in names_of(result)]
    + [("function", name) for name in functions()],
)
def test_every_number_is_defined(owner: str, name: str) -> None:
    lines = LINES.get(name, [])
    assert lines, f"{owner}.{name} has no line in docs/metrics.md"
    problems = [problem(line) for line in lines]
    assert not all(problems), f"{owner}.{name}: {problems}"


def test_a_missing_cell_is_noticed() -> None:
    table = "## A\n\n| metric | formula | unit, range | sample | not applicable |\n|---|---|---|---|---|\n"
    good = lines_of(table + "| `x` | a / b | 0..1 | N | NaN without load |")["x"][0]
    assert problem(good) == ""
    for index, name in enumerate(["formula", "unit", "sample", "not applicable"]):
        cells = ["a / b", "0..1", "N", "NaN without load"]
        cells[index] = ""
        bad = lines_of(table + "| `y.x` | " + " | ".join(cells) + " |")["x"][0]
        assert name in problem(bad)
    assert "no column 'unit'" in problem(lines_of("| metric | formula |\n|---|---|\n| `x` | a |")["x"][0])
