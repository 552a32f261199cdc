"""The command line: help, version, and errors that say what to do, without a traceback."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import pytest
from rich.console import Console
from rich.text import Text

from moe_debugger._plain_text import plain_text
from moe_debugger.analysis import Analysis, Finding, FindingKind, Severity, plugins
from moe_debugger.cli._output import PlainConsole, echo
from moe_debugger.cli._summary import Summary
from moe_debugger.cli._trace_view import print_findings
from moe_debugger.cli.doctor import run_checks
from moe_debugger.cli.up import service_env
from moe_debugger.config import Config
from moe_debugger.errors import InvalidInputError


class Run(Protocol):
    """Runs the command line and returns all that it printed."""

    def __call__(self, *arguments: str, code: int = 0) -> str: ...


@pytest.fixture
def run(run: Callable[..., tuple[str, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Run the command line in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return lambda *arguments, code=0: "".join(run(*arguments, code=code))


@pytest.mark.parametrize(
    "control",
    ["\0", "\t", "\x1b", "\x7f", "\x9b", "\u061c", "\u200e", "\u200f", "\u2028", "\u202e", "\u2066", "\ud800"],
)
def test_texts_of_others_are_printed_without_control_characters(
    control: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plain_text(f"a{control}b") == "a b"
    assert plain_text(f"a{control}b", control) == f"a{control}b"
    console = PlainConsole(highlight=False, width=40)
    for print_text in (console.print, echo, lambda text: console.print(Text(text))):
        print_text(f"é{control}[2J\nü")
        shown = capsys.readouterr().out
        assert shown.count("\n") >= 1
        assert control == "\t" or control not in shown
        assert "ü" in shown


def test_a_console_keeps_its_own_colours(capsys: pytest.CaptureFixture[str]) -> None:
    PlainConsole(force_terminal=True, color_system="standard").print(Text("x\x1b[1m", "red"))
    assert capsys.readouterr().out == "\x1b[31mx [1m\x1b[0m\n"


def test_help_lists_the_commands_with_examples(run: Run) -> None:
    text = run("--help")
    for word in ("up", "trace", "demo", "doctor", "--interactive", "--config", "moe-debugger demo --scenario collapse"):
        assert word in text
    assert run() == text
    assert "moe-debugger up --json" in run("up", "--help")


def test_version_is_the_packages(run: Run) -> None:
    assert run("--version").startswith("moe-debugger 0.")


def test_a_wrong_configuration_ends_with_code_2_and_all_its_lines(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("model:\n  devise: cpu\ncapture:\n  gradients: maybe\n")
    text = run("up", "--config", str(path), code=2)
    assert "line 2: model.devise" in text
    assert "line 4: capture.gradients" in text
    assert not (tmp_path / ".moe-debugger").exists()


def test_a_demo_without_a_fleet_says_how_to_start_one(run: Run) -> None:
    assert "moe-debugger up" in run("demo", code=1)
    assert "contradict" in run("demo", "--no-fleet", "--fleet", "nats://127.0.0.1:1", code=1)


def test_options_before_a_command_are_refused(run: Run) -> None:
    assert "put them after it" in run("--port", "9000", "doctor", code=1)
    assert "--port" in run("--interactive", "--port", "9000", code=1)


def test_a_model_that_is_no_folder_is_refused_before_anything_starts(run: Run) -> None:
    assert "config.json" in run("up", "--model", "no-such-model", code=1)
    with pytest.raises(InvalidInputError, match="no-such-model"):
        service_env(Config(), "no-such-model")


def test_a_models_folder_becomes_absolute_and_names_the_session(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mixtral").mkdir()
    (tmp_path / "mixtral" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert service_env(Config(), "mixtral") == {
        "MOE_COLLECTOR_MODEL": str(tmp_path / "mixtral"),
        "MOE_COLLECTOR_SESSION_NAME": "mixtral",
    }


def test_the_command_line_works_without_torch_and_names_the_extra(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('not here')")
    command = [sys.executable, "-m", "moe_debugger.cli", "demo", "--no-fleet"]
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    result = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path, check=False)
    assert result.returncode == 1
    assert "moe-debugger[collector]" in result.stderr
    assert "Traceback" not in result.stderr


def test_doctor_reports_servers_and_what_it_would_need(run: Run, tmp_path: Path) -> None:
    checks = {check.name: check for check in run_checks(tmp_path / "data")}
    for name in ("python", "nats", "valkey", "[ray]", "device"):
        assert checks[name].state == "ok", checks[name]
    assert "sync" in checks["nats"].detail
    answer = json.loads(run("doctor", "--json", "--data", str(tmp_path / "data")))
    assert answer["can_run"] is True


def test_problems_of_plugins_are_shown_with_their_words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(plugins, "installed_detectors", lambda: ((), ("detector plug-in 'a' is bad", "'b' is bad")))
    found = [check for check in run_checks(tmp_path) if check.name == "detectors"]
    assert [(check.state, check.detail) for check in found] == [
        ("note", "detector plug-in 'a' is bad"), ("note", "'b' is bad")
    ]  # fmt: skip
    args = {"title": "Half idles", "summary": "of layer 3", "remedy": "look there"}
    findings = tuple(
        Finding(FindingKind.LOAD_IMBALANCE, Severity.INFO, "quiet-half.half_is_idle", args=each) for each in (args, {})
    )
    console = Console(record=True, width=100)
    print_findings(console, Analysis({}, findings, 1, problems=("plug-in 'a' failed",)), 10)
    shown = console.export_text()
    assert "! plug-in 'a' failed" in shown
    assert "Half idles: of layer 3" in shown
    assert "look there" in shown
    assert "half is idle (quiet-half)" in shown


def test_doctor_says_what_is_missing_and_fails(run: Run, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    text = run("doctor", "--json", "--data", str(blocked), code=1)
    assert any(check["state"] == "missing" for check in json.loads(text)["checks"])


def test_a_summary_says_what_it_knows() -> None:
    assert "no session yet" in Summary().lines()[0]
    assert Summary(problem="down").lines() == ["waiting for the gateway: down"]
    lines = Summary(
        num_open_sessions=1,
        name="demo",
        model_name="demo",
        num_tokens=1234,
        tokens_per_s=56.0,
        worst_layer=2,
        worst_effective_experts=3.25,
        worst_num_experts=8,
        findings=(("warning", "Layer 2 is skewed."),),
    ).lines()
    assert "1,234 tokens, 56 tokens/s" in lines[0]
    assert "3.2 of 8 in layer 2" in lines[0]
    assert lines[1] == "warning: Layer 2 is skewed."
