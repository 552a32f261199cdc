"""docs/decisions.md: it names every column and field, and its code runs as written."""

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from routing_rows import forward, layer_infos
from tiny_moe import build

from moe_debugger import Decisions, LayerInfo
from moe_debugger._row_blocks import COLUMNS
from moe_debugger.v1 import routing_pb2 as pb

_PAGE = (Path(__file__).parents[3] / "docs" / "decisions.md").read_text()


def _table(heading: str) -> list[list[str]]:
    """Return the cells of the first table below a heading, without its own headings."""
    section = _PAGE.split(f"\n{heading}\n", 1)[1]
    lines = re.findall(r"^\|(.+)\|$", re.split(r"\n#+ ", section, maxsplit=1)[0], re.MULTILINE)
    return [[cell.strip() for cell in line.split(" | ")] for line in lines[2:]]


def test_every_column_is_described_in_the_order_of_the_code() -> None:
    assert [row[0].strip("`") for row in _table("## Columns")] == list(COLUMNS)


def test_the_described_dtypes_and_shapes_are_those_of_the_code() -> None:
    batch = forward(0, has_tokens=True, has_logits=True, shapes=((8, 2), (8, 2)), num_tokens=5)
    batch.layers[0].intended_expert_ids = batch.layers[0].expert_ids
    decisions = Decisions([batch], layer_infos((8, 2), (8, 2)))
    shapes = {(10,): "[n]", (10, 2): "[n, k]", (10, 8): "[n, E]"}
    for name, dtype, shape, *_ in _table("## Columns"):
        column = decisions[name.strip("`")]
        assert (column.dtype.name, shapes[column.shape]) == (dtype.removesuffix(" (str)"), shape), name


def test_phases_and_statuses_have_the_names_and_numbers_of_the_wire() -> None:
    for heading, enum, prefix in (
        ("### Phases", pb.Phase, "PHASE_"),
        ("### Slot statuses", pb.SlotStatus, "SLOT_STATUS_"),
    ):
        documented = {row[1].strip("`"): int(row[0]) for row in _table(heading)}
        items = enum.items()
        assert documented == {name.removeprefix(prefix).lower(): number for name, number in items if number}


def test_every_field_of_a_layer_is_described() -> None:
    assert [row[0].strip("`") for row in _table("## Layers")] == [field.name for field in fields(LayerInfo)]


def test_the_code_runs_as_written() -> None:
    snippets = re.findall(r"```python\n(.*?)```", _PAGE, re.DOTALL)
    assert len(snippets) == 6
    ids = torch.randint(3, 90, (3, 7), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    names: dict[str, Any] = {"model": build("mixtral"), "input_ids": ids, "attention_mask": mask, "np": np}
    with torch.no_grad():
        for snippet in snippets:
            exec(compile(snippet, "docs/decisions.md", "exec"), names)
    rows: Decisions = names["rows"]
    valid = ~rows.is_padding
    assert valid.sum() < len(rows)
    assert len(names["strongest"]) == (valid & (rows.layer_index == 0)).sum()
    assert len(names["one_row_per_slot"]) == 2 * len(rows)
    assert names["decoded"].num_rows == (rows.phase == 2).sum() > 0
    assert names["counts"].sum() == 2 * int(mask.sum())
    assert names["num_rows"] == 3 * 7 * 3
