"""docs/report.md: it names every category, field, point and verdict, and its code runs as written."""

import re
from pathlib import Path
from typing import Any, get_args

import pytest
from reported import forwards, infos, record, sampled

from moe_debugger import Diff, Report
from moe_debugger.cli.diff import EXIT_DIFFERENT, EXIT_UNSURE
from moe_debugger.reporting.audit import WEIGHTS
from moe_debugger.reporting.comparing import Verdict
from moe_debugger.reporting.comparison_tests import OVERLAP_FLOOR
from moe_debugger.reporting.texts import catalogue

_PAGE = (Path(__file__).parents[3] / "docs" / "report.md").read_text()
_NAMED = set(re.findall(r"`(\w+)`", _PAGE))


def test_every_field_point_and_verdict_is_named() -> None:
    assert {*Report.model_fields, *Diff.model_fields} - {"format", "format_version"} <= _NAMED
    assert {code.removeprefix("point.") for code in catalogue() if code.startswith("point.")} <= _NAMED
    assert set(get_args(Verdict)) <= _NAMED
    assert f"**{OVERLAP_FLOOR}**" in _PAGE
    assert f"| {EXIT_DIFFERENT} | {EXIT_DIFFERENT} |" in _PAGE
    assert f"| 0 | {EXIT_UNSURE} |" in _PAGE


def test_every_category_has_its_weight() -> None:
    assert dict(re.findall(r"^\| `(\w+)` \((\d)\) \|", _PAGE, re.MULTILINE)) == {k: str(v) for k, v in WEIGHTS.items()}
    assert f"less\nthan 5 of {sum(WEIGHTS.values())}" in _PAGE


def test_the_code_runs_as_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    choices = [[sampled(r, 48, (8, 2))] for r in range(24)]
    folders = [record(tmp_path / name, forwards(choices, [8]), infos((8, 2))) for name in ("a", "b")]
    (snippet,) = re.findall(r"```python\n(.*?)```", _PAGE, re.DOTALL)
    names: dict[str, Any] = {"folder": folders[0], "other": folders[1], "page": tmp_path / "a.html"}
    exec(compile(snippet, "docs/report.md", "exec"), names)
    assert "Load balance" in capsys.readouterr().out
    assert (tmp_path / "a.html").stat().st_size > 10_000
    assert names["values"]["format"] == "moe-debugger-report"
    assert names["difference"].verdict == "no_difference"


def test_the_image_is_there() -> None:
    for image in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", _PAGE):
        assert (Path(__file__).parents[3] / "docs" / image).stat().st_size > 10_000
