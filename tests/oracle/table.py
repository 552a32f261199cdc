"""Writes docs/architectures.md from the results of the full tier: `cd tests && python -m oracle.table`."""

import inspect
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version

import torch
from oracle.builds import EVERY_BUILD
from oracle.columns import FAMILIES, MODE_FILES, MODES, builds_of, key_of, matrix_columns
from oracle.describe import Description, describe
from oracle.outcome import ROOT, Outcome, Results
from zoo.build import ALL
from zoo.custom import CUSTOM

__all__ = ["PAGE", "cells", "render"]

PAGE = ROOT / "docs" / "architectures.md"

_Outcomes = Mapping[tuple[str, str], Outcome]
_INTRO = """\
# Architectures

Generated from the results of `make test-slow` by `cd tests && python -m oracle.table`; do not edit. Transformers
{transformers}, torch {torch}, CPU, tiny models with random weights.

**{num_exact_builds} of {num_builds} builds are exact in every cell that the bare model can run**, attached without
configuration (but {custom}, which are code of others: of these {num_exact_custom} of {num_custom} are). {num_run} of
{num_cells} cells below have run: {num_exact} exact, {num_wrong} wrong, {num_impossible} impossible (the bare model
fails, with its error at the end), {num_not_accepted} not accepted (the architecture has no such option). Over all cells
{num_rows:,} rows (one token at one layer) with {num_slots:,} slots were compared: {num_wrong_ids:,} wrong ids; the
largest relative error of a weight in an exact cell is {max_weight_error:.1e}; {num_unseen:,} slots have a weight of
exactly 0, which the oracle cannot see.

The oracle shares no code with the capture. Inside the model's forward it replays the experts' computation in float64,
once per expert with the output weights of all the others at zero: a token used an expert exactly if that expert alone
moves its output, and the weight is the factor between that movement and the expert's output at weight 1. Where the
weight multiplies an expert's input (Llama 4), it is the factor between that input and the hidden state. Compiled and
sharded models are compared with the oracle on the plain model with the same weights and inputs, the stages of a
pipeline with the oracle on the stages themselves; a stage without experts is refused by the debugger, and runs bare. A
cell also holds: outputs bit-identical with and without the debugger, no hook left after it, and, in forwards and greedy
decoding, padding, positions, phases, token ids and requests as the arguments say.
"""


def cells() -> list[tuple[str, str]]:
    """Return every (arch, column) that the full tier runs."""
    matrix = [(arch, column) for arch in EVERY_BUILD for column in matrix_columns()]
    return matrix + [(arch, mode) for mode in MODES for arch in builds_of(mode)]


def render(descriptions: Mapping[str, Description], outcomes: _Outcomes) -> str:
    """Return the page."""
    wanted = [outcomes[cell] for cell in cells() if cell in outcomes]
    counted = {status: sum(each.status == status for each in wanted) for status in _SIGNS}
    exact = _exact_builds(outcomes)
    intro = _INTRO.format(
        transformers=version("transformers"),
        torch=version("torch").partition("+")[0],
        num_exact_builds=len(exact & set(ALL)),
        num_builds=len(ALL),
        num_exact_custom=len(exact & set(CUSTOM)),
        num_custom=len(CUSTOM),
        custom=", ".join(CUSTOM),
        num_run=len(wanted),
        num_cells=len(cells()),
        num_exact=counted["exact"],
        num_wrong=counted["wrong"],
        num_impossible=counted["impossible"],
        num_not_accepted=counted["not accepted"],
        num_rows=sum(each.num_rows for each in wanted),
        num_slots=sum(each.num_slots for each in wanted),
        num_wrong_ids=sum(each.num_wrong_ids for each in wanted),
        num_unseen=sum(each.num_unseen_slots for each in wanted),
        max_weight_error=max((each.max_weight_error for each in wanted if each.status == "exact"), default=0.0),
    )
    parts = [
        intro,
        "## What is captured\n",
        "E experts and k slots are those of the tiny build; `*` stands for a layer's number.\n",
        _described(descriptions),
        "## Experts implementations and dtypes\n",
        "A left-padded forward, and a greedy generate where the model has one. ✓ exact, · not accepted, — impossible, "
        "✗ wrong, blank: not run.\n",
        _grid(list(descriptions), matrix_columns(), outcomes),
        "## Modes\n",
        f"In float32 with the default implementation, on {len(FAMILIES)} families that cover every way of reading and "
        "of calling experts and every scoring function; some of them on all builds, plans for sharding on one build "
        "more of each kind of expert-parallel plan.\n",
    ]
    for file in MODE_FILES:
        modes = [name for name, (mode, _) in MODES.items() if mode.__module__ == file.__name__]
        archs = [arch for arch in descriptions if any(arch in builds_of(mode) for mode in modes)]
        parts += [f"### {inspect.cleandoc(file.__doc__ or '').splitlines()[0]}\n", _grid(archs, modes, outcomes)]
    for status, title in (("wrong", "Wrong"), ("impossible", "Impossible"), ("not accepted", "Not accepted")):
        those = [each for each in wanted if each.status == status]
        if those:
            parts += [f"## {title}\n", _reasons(those)]
    return "\n".join(parts)


def _exact_builds(outcomes: _Outcomes) -> set[str]:
    """Return the builds whose cells have all run, with none that is wrong and at least one that is exact."""
    statuses: dict[str, set[str]] = {}
    for arch, column in cells():
        outcome = outcomes.get((arch, column))
        statuses.setdefault(arch, set()).add("not run" if outcome is None else outcome.status)
    return {arch for arch, found in statuses.items() if "exact" in found and not found & {"wrong", "not run"}}


_SIGNS = {"exact": "✓", "not accepted": "·", "impossible": "—", "wrong": "✗"}


def _described(descriptions: Mapping[str, Description]) -> str:
    rows = []
    for name, each in descriptions.items():
        extra = [f"{each.num_shared} shared"] if each.num_shared != "0" else []
        extra += [f"{each.num_identity} identity"] if each.num_identity != "0" else []
        meaning = each.weight_meaning + (f"; the sum then x {each.block_scale}" if each.block_scale else "")
        rows.append(
            [
                name,
                each.kind,
                f"`{each.modules}`",
                each.adapters,
                f"{each.num_experts} / {each.top_k}",
                ", ".join(extra),
                each.scoring,
                meaning,
                each.captured,
                each.note,
            ]
        )
    headers = [
        "architecture",
        "kind",
        "layers",
        "adapter",
        "E / k",
        "besides",
        "scoring",
        "a weight",
        "captured",
        "note",
    ]
    return _table(headers, rows)


def _grid(archs: Sequence[str], columns: Sequence[str], outcomes: _Outcomes) -> str:
    rows = [[arch, *(_sign(outcomes.get((arch, column))) for column in columns)] for arch in archs]
    return _table(["architecture", *columns], rows)


def _sign(outcome: Outcome | None) -> str:
    return "" if outcome is None else _SIGNS[outcome.status]


def _reasons(outcomes: Iterable[Outcome]) -> str:
    """Return the reasons with the cells of each, so that one which holds for many cells is written once."""
    by_reason: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        by_reason.setdefault(" ".join(outcome.detail.split())[:300], []).append(outcome)
    lines = []
    for reason, those in by_reason.items():
        archs = ", ".join(dict.fromkeys(each.arch for each in those))
        columns = ", ".join(dict.fromkeys(each.column for each in those))
        lines.append(f"- {archs} ({columns}): {_escaped(reason)}")
    return "\n".join(lines) + "\n"


def _table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join("| " + " | ".join(_escaped(cell) for cell in line) + " |" for line in lines) + "\n"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")


def main() -> None:
    """Write the page from the results of the sources as they are now; `--any` takes those of other sources, too."""
    torch.set_num_threads(1)
    results = Results(key_of)
    descriptions = {}
    for name in EVERY_BUILD:
        descriptions[name] = describe(name)
    PAGE.write_text(render(descriptions, results.read(any_key="--any" in sys.argv)))
    print(f"wrote {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
