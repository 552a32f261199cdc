"""`moe-debugger report` and `diff`: files, standard output and exit codes."""

import json
import stat
from collections.abc import Callable
from pathlib import Path

import numpy as np
from reported import forwards, infos, record, sampled

from moe_debugger import Diff, Report

SHAPE = (8, 2)
Run = Callable[..., tuple[str, str]]


def _record(path: Path, *, permutes: bool = False, num: int = 24, level: str = "routes+tokens") -> Path:
    order = np.array([3, 0, 1, 2, 7, 4, 5, 6] if permutes else range(8), np.int32)
    choices = [[order[sampled(r, 48, SHAPE)]] for r in range(num)]
    return record(path, forwards(choices, [8]), infos(SHAPE), level=level)


def test_a_page_and_json_are_private_files(run: Run, tmp_path: Path) -> None:
    folder, page, values = _record(tmp_path / "rec"), tmp_path / "a.html", tmp_path / "a.json"
    out, _ = run("report", folder, "--out", page, "--json", values, "--baseline", folder, "--ranks", 2)
    assert out == ""
    assert page.read_text().startswith("<!doctype html>")
    made = Report.from_dict(json.loads(values.read_text()))
    assert made.to_html() == page.read_text()
    assert made.baseline_name == "rec"
    for path in (page, values):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_without_a_file_a_summary_is_printed(run: Run, tmp_path: Path) -> None:
    folder = _record(tmp_path / "rec")
    assert "Load balance" in run("report", folder)[0]
    assert Report.from_dict(json.loads(run("report", folder, "--json", "-")[0])).title == "rec · tiny"


def test_tokens_are_shown_as_text(run: Run, tmp_path: Path) -> None:
    folder, texts = _record(tmp_path / "rec"), tmp_path / "tokens.json"
    texts.write_text(json.dumps({str(token): f"<b>{token}" for token in range(97)}))
    page = tmp_path / "a.html"
    run("report", folder, "--tokens", texts, "--out", page)
    assert "&lt;b&gt;" in page.read_text()
    texts.write_text("[1]")
    assert "expected a JSON object" in run("report", folder, "--tokens", texts, code=1)[1]


def test_damage_is_an_error_unless_asked_for(run: Run, tmp_path: Path) -> None:
    folder = _record(tmp_path / "rec")
    part = next((folder / "rows").glob("*.parquet"))
    part.write_bytes(part.read_bytes()[:-10])
    assert part.name in run("report", folder, code=1)[1]
    assert "Parts damaged, missing or foreign: 1; rows lost: " in run("report", folder, "--damaged")[0]
    assert part.name in run("diff", folder, folder, code=1)[1]
    assert "is no recording" in run("report", tmp_path, code=1)[1]
    assert "cannot be written" in run("report", folder, "--damaged", "--out", tmp_path / "no" / "a.html", code=1)[1]


def test_exit_codes_of_diff(run: Run, tmp_path: Path) -> None:
    a, same = _record(tmp_path / "a"), _record(tmp_path / "same")
    other, short = _record(tmp_path / "other", permutes=True), _record(tmp_path / "short", num=1)
    for fail_on in ("never", "different", "unsure"):
        assert "No difference" in run("diff", a, same, "--fail-on", fail_on)[0]
        codes = {"never": (0, 0), "different": (3, 0), "unsure": (3, 4)}[fail_on]
        assert "Different" in run("diff", a, other, "--fail-on", fail_on, code=codes[0])[0]
        run("diff", short, _record(tmp_path / f"x{fail_on}", num=1), "--fail-on", fail_on, code=codes[1])


def test_diff_as_json_and_page(run: Run, tmp_path: Path) -> None:
    a, other, page = _record(tmp_path / "a"), _record(tmp_path / "other", permutes=True), tmp_path / "d.html"
    out, _ = run("diff", a, other, "--json", "--html", page, "--permutations", 99, "--seed", 3)
    found = Diff.from_dict(json.loads(out))
    assert (found.verdict, found.num_permutations) == ("different", 99)
    assert found.to_html() == page.read_text()
    assert page.stat().st_mode & 0o077 == 0
