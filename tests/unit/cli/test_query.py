"""`moe-debugger query`: tables, JSON, CSV, and errors on stderr with the place."""

import json
from pathlib import Path

import pytest
from recorded_rows import record
from typer.testing import CliRunner

from moe_debugger.cli import app, main

runner = CliRunner()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made, _ = record(tmp_path_factory.mktemp("cli") / "rec", has_tokens=True)
    return made


def test_a_table_json_and_csv_of_the_same_query(folder: Path) -> None:
    text = "experts where layer = 1 show expert, assignments order by assignments desc, expert limit 3"
    table = runner.invoke(app, ["query", str(folder), text])
    assert table.exit_code == 0, table.output
    lines = table.output.splitlines()
    assert lines[0].split() == ["expert", "assignments"]
    assert "the first 3 rows of 8" in lines[-1]
    found = json.loads(runner.invoke(app, ["query", str(folder), text, "--json"]).output)
    assert [column["name"] for column in found["columns"]] == ["expert", "assignments"]
    values = list(zip(*(column["values"] for column in found["columns"]), strict=True))
    assert [line.split() for line in lines[2:5]] == [[str(a), str(b)] for a, b in values]
    csv = runner.invoke(app, ["query", str(folder), text, "--csv"]).stdout
    assert csv.splitlines() == ["expert,assignments", *(f"{a},{b}" for a, b in values)]


def test_tokens_by_text_with_a_tokenizer(folder: Path) -> None:
    done = runner.invoke(
        app, ["query", str(folder), "tokens where token_id < 256 show token limit 1", "--model", "demo"]
    )
    assert done.exit_code == 0, done.output
    assert done.output.splitlines()[0] == "token"


def test_csv_is_as_it_is_in_a_file_and_clean_on_a_terminal(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["query", str(folder), "tokens where token_id < 32 show token limit 50", "--model", "demo", "--csv"]
    for is_terminal in (False, True):
        monkeypatch.setattr("sys.argv", ["moe-debugger", *given])
        monkeypatch.setattr("sys.stdout.isatty", lambda is_terminal=is_terminal: is_terminal)
        with pytest.raises(SystemExit):
            main()
        controls = {c for c in capsys.readouterr().out if c < " "} - set("\r\n\t")
        assert bool(controls) is not is_terminal


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["REC", "experts where lod > 8x"], "did you mean `load`?"),
        (["REC", "experts where"], "the query ends too early"),
        (["experts"], "there is nothing to ask"),
        (["REC", "experts", "--json", "--csv"], "cannot both be"),
        (["REC", "experts", "--session", "x"], "give --fleet too"),
        (["REC", "experts", "--fleet", "127.0.0.1:1"], "without a recording"),
        (["experts", "--fleet", "http://127.0.0.1:8080/"], "is the address of the page"),
        (["experts", "--fleet", "localhost"], "expected host:port"),
        (["REC", "tokens by layer", "--max-rows", "5"], "the cap is 5"),
        (["REC", "experts where token = 'x'", "--model", "/nowhere"], "no tokenizer_config.json"),
    ],
)
def test_what_is_wrong_is_said(
    folder: Path,
    arguments: list[str],
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = [str(folder) if each == "REC" else each for each in arguments]
    monkeypatch.setattr("sys.argv", ["moe-debugger", "query", *given])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 1
    error = capsys.readouterr().err
    assert says in error
    if "lod" in arguments[-1]:
        assert error.splitlines()[-2:] == ["  experts where lod > 8x", "                ^^^"]
