"""docs/query.md and the page's completions name exactly the columns that there are, and the examples run as written."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from zoo.build import ALL

import moe_debugger
from moe_debugger import MoEDebugger
from moe_debugger.query import FLEET_LIMITS, LOCAL_LIMITS, SUBJECTS, parse
from moe_debugger.query.binding import Capabilities, bind
from moe_debugger.query.columns import Kind, Place, markdown_tables
from moe_debugger.query.derive import derived
from moe_debugger.query.parser import MAX_CONDITIONS, MAX_DEPTH, MAX_TEXT
from moe_debugger.query.rows import LayerFacts, raw_columns
from moe_debugger.query.vocabulary import ByteVocabulary

_ROOT = Path(__file__).parents[3]
_PAGE = (_ROOT / "docs" / "query.md").read_text()
_EXAMPLES = re.findall(r"^\| `([^`]+)` \| ", _PAGE.split("## Form", 1)[1].split("## Columns", 1)[0], re.MULTILINE)


class _OneToken(ByteVocabulary):
    """A vocabulary in which every text is one token."""

    def encode(self, text: str) -> list[int]:
        self.text = text
        return [0]

    def piece(self, token_id: int) -> bytes:
        return self.text.encode()


def test_the_tables_are_the_allow_list() -> None:
    shown = _PAGE.split("markdown_tables -->\n", 1)[1].split("<!-- end of columns", 1)[0].strip()
    assert shown == markdown_tables().strip(), "put what markdown_tables() gives between the marks"


def test_the_page_completes_the_same_columns() -> None:
    known = json.loads((_ROOT / "web" / "src" / "model" / "query-columns.json").read_text())
    assert known == {name: subject.names for name, subject in SUBJECTS.items()}


def test_every_example_is_a_query() -> None:
    assert len(_EXAMPLES) >= 12
    for text in _EXAMPLES:
        bind(parse(text), text, Capabilities("a test", vocabulary=_OneToken()), LOCAL_LIMITS)
    asked = {parse(text).subject.text for text in _EXAMPLES}
    assert asked == set(SUBJECTS)
    for text in re.findall(r'moe-debugger query .*?"([^"]+)"', _PAGE):
        bind(parse(text), text, Capabilities("a test", vocabulary=_OneToken()), LOCAL_LIMITS)


def test_the_numbers_are_those_of_the_code() -> None:
    for value in (f"{MAX_TEXT:,} characters", f"{MAX_CONDITIONS} comparisons", f"{MAX_DEPTH} parentheses"):
        assert value in _PAGE
    rows = dict(
        re.findall(r"^\| ([a-z][^|]+?) \| (.+ \| .+) \|$", _PAGE.split("## What a query may cost", 1)[1], re.MULTILINE)
    )
    gib, mib = 1024**3, 1024**2
    for name, values in {
        "rows read": (LOCAL_LIMITS.max_rows == 200_000_000, f"{FLEET_LIMITS.max_rows // 10**6} million"),
        "bytes of the columns read": (
            f"{LOCAL_LIMITS.max_bytes // gib} GiB" in rows["bytes of the columns read"],
            f"{FLEET_LIMITS.max_bytes // mib} MiB",
        ),
        "wall time": (f"{LOCAL_LIMITS.max_seconds:g} s" in rows["wall time"], f"{FLEET_LIMITS.max_seconds:g} s"),
        "rows of a result": (
            f"{LOCAL_LIMITS.max_result_rows:,}" in rows["rows of a result"],
            f"{FLEET_LIMITS.max_result_rows:,}",
        ),
        "rows of a result without `limit`": (
            f"{LOCAL_LIMITS.default_result_rows:,}" in rows["rows of a result without `limit`"],
            f"{FLEET_LIMITS.default_result_rows:,}",
        ),
        "groups, or (step, layer) pairs": (
            f"{LOCAL_LIMITS.max_groups:,}" in rows["groups, or (step, layer) pairs"],
            f"{FLEET_LIMITS.max_groups:,}",
        ),
    }.items():
        assert values[0], name
        assert rows[name].endswith(values[1]), name


def test_the_code_runs_as_written(tmp_path: Path) -> None:
    snippets = re.findall(r"```python\n(.*?)```", _PAGE, re.DOTALL)
    assert len(snippets) == 1
    model: Any = ALL["mixtral"].make()
    ids = torch.randint(3, 80, (16, 40), generator=torch.Generator().manual_seed(5))
    with MoEDebugger(model) as debugger, torch.no_grad():
        session = debugger.session
        assert session is not None
        with session.record(tmp_path / "rec"):
            model(input_ids=ids)
        names: dict[str, Any] = {"session": session, "moe_debugger": moe_debugger, "folder": tmp_path / "rec"}
        exec(compile(snippets[0], "docs/query.md", "exec"), names)
    assert len(names["frame"]) == len(names["result"]) > 0


@pytest.mark.parametrize("subject", SUBJECTS.values(), ids=lambda subject: subject.name)
def test_every_column_can_be_computed(subject: Any) -> None:
    """The allow list promises nothing that no code gives."""
    names = [column.name for column in subject.columns]
    assert len(set(names)) == len(names)
    layers = [LayerFacts(0, 4, 2, module="m")]
    if subject.name == "tokens":
        assert raw_columns(frozenset(names)) >= {"layer_index", "expert_ids", "token_id", "margin"}
    elif subject.name in ("experts", "layers", "steps", "requests"):
        table = derived(subject.name, layers, frozenset(names), 100).table()
        assert {column.name for column in subject.columns if column.place is not Place.ROWS} <= set(table.columns)
        assert raw_columns(frozenset(column.name for column in subject.columns if column.place is Place.ROWS))
    for column in subject.columns:
        assert column.doc
        assert (column.kind is Kind.CHOICE) == bool(column.choices)
