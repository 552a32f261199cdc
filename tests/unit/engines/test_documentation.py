"""The examples of docs/engines.md run as written, but for those that need an engine or a fleet."""

import re
from pathlib import Path

import pytest

_DOCUMENT = (Path(__file__).parents[3] / "docs" / "engines.md").read_text(encoding="utf-8")
_SNIPPETS = re.findall(r"^```python\n(.*?)^```", _DOCUMENT, re.DOTALL | re.MULTILINE)
_RUNNABLE = [snippet for snippet in _SNIPPETS if not snippet.startswith("# needs")]


@pytest.mark.parametrize("snippet", _RUNNABLE, ids=range(len(_RUNNABLE)))
def test_an_example_prints_what_it_says(snippet: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(snippet, "docs/engines.md", "exec"), {})
    printed = capsys.readouterr().out
    for line, expected in re.findall(r"^ *print\((.*)\) {5}# (?:… )?(.*)$", snippet, re.MULTILINE):
        assert expected in printed, line


def test_every_other_example_is_python() -> None:
    others = [snippet for snippet in _SNIPPETS if snippet.startswith("# needs")]
    assert len(others) == 3
    for snippet in others:
        compile(snippet, "docs/engines.md", "exec")
