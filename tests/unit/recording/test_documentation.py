"""docs/recordings.md: it names every file, column and field, and its code runs as written."""

import re
from pathlib import Path
from typing import Any

import torch
from zoo.build import ALL

from moe_debugger.recording import tables
from moe_debugger.recording.manifest import GroupManifest, Manifest, ModelIdentity, PartEntry

_PAGE = (Path(__file__).parents[3] / "docs" / "recordings.md").read_text()


def _table(heading: str) -> list[list[str]]:
    section = _PAGE.split(f"\n{heading}\n", 1)[1]
    lines = re.findall(r"^\|(.+)\|$", re.split(r"\n#+ ", section, maxsplit=1)[0], re.MULTILINE)
    return [[cell.strip() for cell in line.split(" | ")] for line in lines[2:]]


def test_every_column_of_rows_is_there_with_its_type() -> None:
    def words(field: Any) -> str:
        text = str(field.type)
        if text.startswith("dictionary"):
            return "text"
        found = re.fullmatch(r"list<\w+: (\w+)>", text)
        text = found[1] if found else text
        return ("list of " if found else "") + {"float": "float32"}.get(text, text)

    documented = [(row[0].strip("`"), row[1]) for row in _table("### Columns of `rows`")]
    assert documented == [(field.name, words(field)) for field in tables.schema_of("rows")]


def test_every_column_of_counts_and_field_of_the_manifest_is_named() -> None:
    counts = _PAGE.split("### Columns of `counts`", 1)[1].split("###", 1)[0]
    assert set(re.findall(r"`(\w+)`", counts)) == set(tables.schema_of("counts").names)
    named = {name for row in _table("### The manifest") for name in re.findall(r"`(\w+)`", " ".join(row))}
    assert {*Manifest.model_fields, *ModelIdentity.model_fields, "sha256"} <= named
    group = _PAGE.split("The manifest of a fleet's recording has", 1)[1].split("##", 1)[0]
    assert set(GroupManifest.model_fields) - {"format_version"} <= set(re.findall(r"`(\w+)`", group))
    of_parts = " ".join(_table("### The manifest")[-2])
    for name in ("path", "kind", "num_rows", "size_bytes", "sha256", "layout"):
        assert f"`{name}`" in of_parts
        assert name in PartEntry.model_fields


def test_the_code_runs_as_written(tmp_path: Path) -> None:
    snippets = re.findall(r"```python\n(.*?)```", _PAGE, re.DOTALL)
    assert len(snippets) == 6
    ids = torch.randint(3, 80, (3, 7), generator=torch.Generator().manual_seed(5))
    names: dict[str, Any] = {
        "model": ALL["mixtral"].make(),
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "folder": tmp_path / "recorded",
    }
    with torch.no_grad():
        for snippet in snippets:
            exec(compile(snippet, "docs/recordings.md", "exec"), names)
    assert names["recording"].manifest.is_finished
    assert names["verification"].is_whole
    assert len(names["joined"].members) == 1
    assert len(names["frame"]) == len(names["rows"]) > 0
    assert names["decoded"].num_rows == (names["rows"].phase == 2).sum() > 0
    assert names["layers"]["num_experts"].tolist() == [info.num_experts for info in names["recording"].layers()]
