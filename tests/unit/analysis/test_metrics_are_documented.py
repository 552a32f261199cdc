"""Every public number is defined in docs/metrics.md: formula, unit, sample size, and where it does not apply."""

import ast
import dataclasses
import inspect
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import moe_debugger
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


SMALL = re.search(r"^### Few tokens, metric by metric$(.*?)^## ", DOCUMENT.read_text("utf-8"), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("result", RESULTS, ids=lambda result: result.__name__)
def test_every_number_says_what_to_hold_against_it_where_there_is_little(result: Any) -> None:
    assert SMALL is not None
    named = {
        name for cell in re.findall(r"^\|(.*?)\|", SMALL[1], re.MULTILINE) for name in re.findall(r"`(.+?)`", cell)
    }
    named = {re.sub(r"\[.*?\]", "", name).split(".")[-1] for name in named}
    # What it is compared with by chance, and bands, are the answers of this section.
    answers = {name for name in names_of(result) if name.startswith(("chance", "shuffled", "balanced"))}
    missing = set(names_of(result)) - named - answers - {"max_violation_at_balance"}
    assert not missing


# Evidence whose name is no literal: where it is made, and the names that come of it.
NAMES_OF_LOOPS = {
    ("analysis/early_warning.py", "metric"): ["max_over_mean", "mean_token_entropy"],
    ("analysis/explanation/data_rules.py", "limit.metric"): ["effective_experts", "load_ratio"],
    ("analysis/rules/quality.py", "f'capture_{check.name}'"): ["capture_<check>"],
    ("profiling/bottlenecks.py", "f'profile_{kind.value}'"): ["profile_<kind>"],
    ("profiling/bottlenecks.py", "f'profile_{kind.value}_low'"): ["profile_<kind>_low"],
    ("reporting/load_scores.py", "name"): ["max_over_mean", "gini", "cv_debiased"],
    ("reporting/load_scores.py", "f'{kind.value}s'"): ["dead_experts", "cold_experts", "hot_experts"],
    ("reporting/quality_scores.py", "name"): [
        *("mean_confidence", "mean_margin", "rank_waste_share", "rank_imbalance", "rank_window_imbalance"),
        *("decisions_dropped", "rows_not_written", "rows_damaged"),
    ],
    ("reporting/quality_scores.py", "f'capture_{check.name}'"): ["capture_<check>"],
    # Series of a training, which docs/training.md defines, numbers of other people's detectors, and evidence that is
    # read back from messages.
    ("analysis/explanation/training_rules.py", "name"): [],
    ("analysis/explanation/training_rules.py", "setting.name"): [],
    ("analysis/explanation/wire.py", "row.metric"): [],
    ("analysis/findings.py", "row.metric"): [],
    ("analysis/plugins.py", "_text(row.metric, _MAX_WORD)"): [],
    ("reporting/findings_text.py", "row.metric"): [],
}


def evidence_names() -> list[str]:
    """Return the names of all evidence that the code makes."""
    source = Path(moe_debugger.__file__).parent
    names: set[str] = set()
    for path in sorted(source.rglob("*.py")):
        for call in ast.walk(ast.parse(path.read_text("utf-8"))):
            if not isinstance(call, ast.Call):
                continue
            made = call.func.id if isinstance(call.func, ast.Name) else getattr(call.func, "attr", "")
            given = [*call.args[:1], *(word.value for word in call.keywords if word.arg == "metric")]
            if made not in ("EvidenceRow", "EvidenceLine") or not given:
                continue
            if isinstance(given[0], ast.Constant):
                names.add(str(given[0].value))
            else:
                names.update(NAMES_OF_LOOPS[path.relative_to(source).as_posix(), ast.unparse(given[0])])
    return sorted(names)


def test_the_names_of_evidence_are_found() -> None:
    assert {"share_upper", "rank_load_ratio", "capture_<check>", "lowest_effective_experts"} <= set(evidence_names())


@pytest.mark.parametrize("name", evidence_names())
def test_every_number_of_the_evidence_is_defined(name: str) -> None:
    lines = LINES.get(name, []) + lines_of((DOCUMENT.parent / "training.md").read_text("utf-8")).get(name, [])
    assert lines, f"evidence {name!r} has no line in docs/metrics.md, nor in docs/training.md"


@pytest.mark.parametrize("label", ["1 − entropy", "Min load entropy", "Tokens/s"])
def test_every_number_that_the_page_names_otherwise_is_defined(label: str) -> None:
    assert f'| "{label}" |' in DOCUMENT.read_text("utf-8")


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
