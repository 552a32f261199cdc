"""`moe-debugger trace` and the prompt loop, on the shipped model."""

import io
import json

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from moe_debugger.cli._trace_view import printable
from moe_debugger.cli.interactive import run_interactive
from moe_debugger.cli.trace import trace
from moe_debugger.config import Config

app = typer.Typer()
app.command()(trace)


def test_trace_prints_loads_confidence_and_each_tokens_experts() -> None:
    result = CliRunner().invoke(app, ["--prompt", "def f", "--max-new-tokens", "3", "--no-color"])
    assert result.exit_code == 0, result.output
    assert "5 prompt tokens, 3 generated, 7 routed per layer" in result.output.replace("\n", " ")
    for text in ("Layer 0", "effective experts", "dead in this run", "top-1 probability", "layer 0"):
        assert text in result.output
    assert "\x1b" not in result.output


def test_trace_as_json_counts_what_its_token_lines_say() -> None:
    result = CliRunner().invoke(app, ["--prompt", "1 + 1 =", "--max-new-tokens", "4", "--json", "--layer", "1"])
    assert result.exit_code == 0, result.output
    answer = json.loads(result.output)
    (layer,) = answer["layers"]
    counts = [0] * layer["num_experts"]
    for token in answer["tokens"]:
        for expert in token["layers"].get("1", {}).get("experts", []):
            counts[expert] += 1
    assert counts == layer["expert_counts"]
    assert layer["num_tokens"] == answer["num_prompt_tokens"] + answer["num_generated_tokens"] - 1


def test_a_layer_that_is_not_there_is_refused_with_those_that_are() -> None:
    result = CliRunner().invoke(app, ["--prompt", "x", "--layer", "99"])
    assert result.exit_code != 0
    assert "MoE layers 0 to" in str(result.exception)


def test_the_prompt_loop_obeys_its_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = iter(["/tokens 2", "hello", "/layer 1", "/nothing", "/stats", "/reset", "/quit"])
    output = io.StringIO()
    console = Console(file=output, width=120, highlight=False)
    monkeypatch.setattr(console, "input", lambda prompt: next(lines))
    run_interactive(Config(), console=console)
    text = output.getvalue()
    assert "there is no command '/nothing'" in text
    assert "Layer 1" in text
    assert "6 tokens in 2 forwards" in text


def test_a_tokens_bytes_never_reach_the_terminal_as_commands() -> None:
    assert printable(b"\x1b[2J") == "\\x1b[2J"
    assert printable(b"\xff\n") == "\\xff⏎"
