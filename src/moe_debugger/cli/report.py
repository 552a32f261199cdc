"""`moe-debugger report`: what a recording shows, as one page and as JSON."""

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from moe_debugger.errors import InvalidInputError

__all__ = ["report", "write_text"]


def report(
    recording: Annotated[
        list[Path],
        typer.Argument(metavar="REC...", help="Folder of a recording; several of one session, as its ranks."),
    ],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE.html", help="Write one self-contained page.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE.json", help="Write the same as JSON; - = standard output.")
    ] = None,
    baseline: Annotated[
        Path | None, typer.Option(metavar="REC", help="The same model and workload while it was healthy.")
    ] = None,
    ranks: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Plan for so many expert-parallel ranks; else as recorded.")
    ] = None,
    redundant: Annotated[
        int, typer.Option(min=0, metavar="N", help="Spare expert slots over all ranks that a placement may fill.")
    ] = 0,
    tokens: Annotated[
        Path | None, typer.Option(metavar="FILE.json", help="An object of token id to text, to show tokens as text.")
    ] = None,
    damaged: Annotated[
        bool, typer.Option("--damaged", help="Report on what is whole of a damaged recording, and say what is not.")
    ] = False,
) -> None:
    """Write a report of a recording: an audit of 0 to 100, findings, what to do, pictures and the evidence.

    Without --out and --json a summary is printed. The page needs no network and no script. See docs/report.md.

    Examples:

    \b
      moe-debugger report runs/today --out today.html
      moe-debugger report runs/today --baseline runs/healthy --out today.html --json today.json
      moe-debugger report runs/rank0 runs/rank1 --ranks 2 --redundant 8 --out ranks.html
    """
    from moe_debugger.recording import open_recording
    from moe_debugger.reporting import report as make

    texts = _token_texts(tokens)
    mode: Any = "skip" if damaged else "raise"
    source = open_recording(recording[0] if len(recording) == 1 else recording, damaged=mode)
    before = open_recording(baseline, damaged=mode) if baseline is not None else None
    made = make(source, baseline=before, num_ranks=ranks, num_redundant=redundant, token_texts=texts)
    if out is not None:
        write_text(out, made.to_html())
    if json_file is not None:
        text = json.dumps(made.to_dict(), allow_nan=False) + "\n"
        if str(json_file) == "-":
            sys.stdout.write(text)
        else:
            write_text(json_file, text)
    if out is None and json_file is None:
        typer.echo(str(made))
    elif out is not None:
        typer.echo(f"wrote {out}", err=True)


def write_text(path: Path, text: str) -> None:
    """Write a file that only its owner may read: routing can reveal the text that was routed.

    Raises:
        InvalidInputError: the file cannot be written.
    """
    try:
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            file.write(text.encode())
    except OSError as error:
        raise InvalidInputError(f"{path} cannot be written: {error.strerror or error}") from error


def _token_texts(path: Path | None) -> dict[int, str] | None:
    if path is None:
        return None
    try:
        values = json.loads(path.read_text("utf-8"))
        return {int(token): str(text) for token, text in values.items()}
    except (OSError, ValueError, AttributeError) as error:
        raise InvalidInputError(f"--tokens {path}: expected a JSON object of token id to text: {error}") from error
