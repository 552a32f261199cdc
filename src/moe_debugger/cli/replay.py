"""`moe-debugger replay`: play a recording into a fleet, where the page shows it live."""

import math
import time
from pathlib import Path
from threading import Event
from typing import Annotated

import typer

from moe_debugger.cli._output import PlainConsole
from moe_debugger.cli._signals import stop_on_signals
from moe_debugger.cli.up import DEFAULT_DATA_DIR
from moe_debugger.embedded.endpoints import read_endpoints

__all__ = ["replay"]

_PLAIN_INTERVAL_S = 5.0


def replay(
    recording: Annotated[
        list[Path], typer.Argument(metavar="REC...", help="Folder of a recording; several: those of its ranks.")
    ],
    speed: Annotated[
        float, typer.Option(metavar="X", help="1 = as it was captured, 4 = four times as fast, inf = at once.")
    ] = 1.0,
    data: Annotated[Path, typer.Option(metavar="FOLDER", help="Folder of the fleet to play to.")] = DEFAULT_DATA_DIR,
    fleet: Annotated[
        str | None, typer.Option(metavar="NATS_URL", help="Play to this fleet: the `nats` value of `up --json`.")
    ] = None,
    session: Annotated[str | None, typer.Option(help="Name of the session on the page.")] = None,
    damaged: Annotated[bool, typer.Option("--damaged", help="Play what is whole of a damaged recording.")] = False,
) -> None:
    """Play a recording into a running fleet, without the model: the page shows it as it was, live.

    Examples:

    \b
      moe-debugger replay runs/today --speed 4
      moe-debugger replay runs/rank-0 runs/rank-1 --speed inf
    """
    from moe_debugger.recording import open_recording
    from moe_debugger.recording.republish import ReplayProgress, replay_to_fleet

    console = PlainConsole(highlight=False, soft_wrap=True)
    opened = open_recording(recording[0] if len(recording) == 1 else recording, damaged="skip" if damaged else "raise")
    page = ""
    if fleet is None:
        endpoints = read_endpoints(data)
        fleet, page = endpoints.nats, endpoints.page
    num_sums = sum(entry.num_rows for entry in opened.manifest.parts if entry.kind == "counts")
    # At level "counts" there are sums in the place of rows; of several processes some may have either.
    unit = "rows and sums" if num_sums and opened.manifest.num_rows else "sums" if num_sums else "rows"
    num_items = opened.manifest.num_rows + num_sums
    console.print(f"{num_items:,} {unit} of {opened.manifest.model.name}", markup=False)
    if page:
        console.print(f"watch it on {page}")
    known = opened.problems
    for problem in known:
        console.print(problem, style="yellow", markup=False)
    printed_at = time.monotonic()

    def show(progress: ReplayProgress) -> None:
        nonlocal printed_at
        if time.monotonic() - printed_at >= _PLAIN_INTERVAL_S:
            printed_at = time.monotonic()
            console.print(f"{progress.num_rows:,} {unit}, {progress.rows_per_s:,.0f} {unit}/s")

    is_stopping = Event()
    with stop_on_signals(is_stopping, Event()):
        done = replay_to_fleet(
            opened, fleet, speed=speed, session_name=session, on_progress=show, is_stopping=is_stopping
        )
    how = "stopped after" if is_stopping.is_set() else "played"
    pace = "as fast as the fleet takes it" if math.isinf(speed) else f"at speed {speed:g}"
    console.print(
        f"{how} {done.num_rows:,} {unit} {pace} in {done.elapsed_s:.2f} s: {done.rows_per_s:,.0f} {unit}/s, "
        f"session {done.session_id}"
    )
    # Damage that does not change a part's size is found when it is read.
    for problem in opened.problems:
        if problem not in known:
            console.print(problem, style="yellow", markup=False)
    if opened.num_rows_lost:
        console.print(f"left out: {opened.num_rows_lost:,} {unit} of damaged parts", style="yellow")
    if done.num_dropped:
        console.print(f"dropped on the way: {done.num_dropped}", style="yellow", markup=False)
