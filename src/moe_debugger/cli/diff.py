"""`moe-debugger diff`: whether two recordings route differently, with a stated rate of false alarms."""

import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from moe_debugger.cli.report import write_text

__all__ = ["EXIT_DIFFERENT", "EXIT_UNSURE", "FailOn", "diff"]

EXIT_DIFFERENT = 3
EXIT_UNSURE = 4


class FailOn(StrEnum):
    """Which verdicts end the command with another code than 0."""

    NEVER = "never"
    DIFFERENT = "different"
    UNSURE = "unsure"


def diff(
    first: Annotated[Path, typer.Argument(metavar="A", help="Folder of the recording to compare with.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="Folder of the other recording.")],
    is_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write one self-contained page.")] = None,
    fail_on: Annotated[
        FailOn,
        typer.Option(help="different: end with 3 where they differ. unsure: also with 4 where nothing can be said."),
    ] = FailOn.NEVER,
    alpha: Annotated[
        float, typer.Option(min=0.0001, max=0.5, help="Rate of false alarms over all layers and tests.")
    ] = 0.05,
    permutations: Annotated[int, typer.Option(min=19, max=99_999, help="Exchanges of whole requests.")] = 999,
    seed: Annotated[int, typer.Option(min=0, help="Of the exchanges.")] = 0,
    same_model: Annotated[
        bool, typer.Option("--same-model", help="They are one model although their configurations differ.")
    ] = False,
    damaged: Annotated[
        bool, typer.Option("--damaged", help="Compare what is whole of damaged recordings, and say what is not.")
    ] = False,
) -> None:
    """Compare two recordings of one model: loads by a test of whole requests, and the same tokens' choices.

    Ends with 0, with 1 on an error, and as --fail-on says with 3 where they differ significantly and with 4 where they
    are not comparable or there is too little evidence. See docs/report.md.

    Examples:

    \b
      moe-debugger diff runs/before runs/after
      moe-debugger diff runs/trainer runs/engine --html mismatch.html
      moe-debugger diff runs/main runs/branch --fail-on unsure   # in CI
    """
    from moe_debugger.recording import open_recording
    from moe_debugger.reporting import diff as compare

    mode: Any = "skip" if damaged else "raise"
    a, b = (open_recording(path, damaged=mode) for path in (first, second))
    result = compare(a, b, alpha=alpha, same_model=same_model, num_permutations=permutations, seed=seed)
    if html is not None:
        write_text(html, result.to_html())
    if is_json:
        sys.stdout.write(json.dumps(result.to_dict(), allow_nan=False) + "\n")
    else:
        typer.echo(str(result))
    if fail_on is not FailOn.NEVER and result.verdict == "different":
        raise typer.Exit(EXIT_DIFFERENT)
    if fail_on is FailOn.UNSURE and result.verdict != "no_difference":
        raise typer.Exit(EXIT_UNSURE)
