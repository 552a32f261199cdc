"""`moe-debugger profile` on the demo model."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., str]


@pytest.fixture
def run(run: Callable[..., tuple[str, str]], monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("COLUMNS", "160")
    return lambda *arguments, code=0: "".join(run("profile", *arguments, code=code))


def test_the_tables_say_what_is_estimated_and_what_cannot_be_told_apart(run: Run, tmp_path: Path) -> None:
    trace = tmp_path / "t.json"
    text = run("--prompt", "def add(a, b):", "--max-new-tokens", "30", "--peak", "40,10", "--perfetto", str(trace))
    for words in (
        "router",
        "experts",
        "not separable",
        "estimated",
        "distinct experts",
        "GB/s",
        "given",
        "Bottlenecks",
    ):
        assert words in text, words
    assert "ui.perfetto.dev" in text
    assert json.loads(trace.read_text())["traceEvents"]


def test_json_has_the_whole_summary(run: Run) -> None:
    answer = json.loads(run("--prompt", "1 + 1 =", "--max-new-tokens", "8", "--peak", "none", "--json"))
    assert len(answer["layers"]) == 4
    assert answer["num_forwards"] == 8
    layer = answer["layers"][0]
    assert layer["layout"] == "fused"
    assert layer["parts"]["dispatch"]["median_ms"] is None
    assert "not separable" in layer["parts"]["dispatch"]["reason"]
    assert layer["roofline"]["peak"] is None
    assert answer["overhead"]["own_s"] > 0
    assert answer["bottlenecks"] == []


@pytest.mark.parametrize("peak", ["fast", "1,2,3", "0,5", "-1,2", "inf,1"])
def test_a_wrong_peak_is_refused_with_words(run: Run, peak: str) -> None:
    text = run("--prompt", "x", f"--peak={peak}", code=1)
    assert "GFLOP/s" in text
