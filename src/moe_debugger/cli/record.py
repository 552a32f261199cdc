"""`moe-debugger record`: record a live session of a fleet, stop, list and fetch recordings."""

import contextlib
import json
import sys
import time
from pathlib import Path
from threading import Event
from typing import Annotated, Any

import typer
from google.protobuf.json_format import MessageToDict
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from moe_debugger.cli._output import PlainConsole
from moe_debugger.cli._signals import stop_on_signals
from moe_debugger.cli.up import DEFAULT_DATA_DIR
from moe_debugger.embedded.endpoints import read_endpoints
from moe_debugger.errors import FleetError, InvalidInputError
from moe_debugger.recording.fleet import FleetRecordings
from moe_debugger.v1 import session_pb2 as pb

__all__ = ["record", "state_word"]

_POLL_S = 1.0
_PLAIN_INTERVAL_S = 10.0
_WAIT_FOR_END_S = 60.0
_GONE = (pb.RECORDING_STATE_FAILED, pb.RECORDING_STATE_INTERRUPTED)


def record(
    session: Annotated[
        str | None, typer.Argument(metavar="[SESSION]", help="Name or id; default: the session that is open.")
    ] = None,
    data: Annotated[Path, typer.Option(metavar="FOLDER", help="Folder of the fleet.")] = DEFAULT_DATA_DIR,
    fleet: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="A fleet's `gRPC` address that `up` prints.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Fetch the recording to this new folder when it has ended.")
    ] = None,
    duration: Annotated[float | None, typer.Option(min=0.0, metavar="SECONDS", help="Stop after this time.")] = None,
    name: Annotated[str, typer.Option(help="What to call the recording.")] = "",
    max_bytes: Annotated[int, typer.Option(min=0, metavar="BYTES", help="Bound of its files; 0 = the fleet's.")] = 0,
    is_detached: Annotated[bool, typer.Option("--detach", help="Start it and leave it running.")] = False,
    is_stop: Annotated[bool, typer.Option("--stop", help="Stop the recording of this session, or of this id.")] = False,
    is_list: Annotated[bool, typer.Option("--list", help="List recordings.")] = False,
    fetch: Annotated[
        str | None, typer.Option("--fetch", metavar="ID", help="Fetch a recording that has ended to --out.")
    ] = None,
    is_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Record a live session of a fleet as Parquet files, until Ctrl-C: all that its sources send from now on.

    The fleet writes the recording, so it goes on when this program is killed; `--stop` ends it. See docs/recordings.md.

    Examples:

    \b
      moe-debugger record                                  # the open session, until Ctrl-C
      moe-debugger record demo --duration 60 --out runs/today
      moe-debugger record demo --detach                    # and later:
      moe-debugger record demo --stop --out runs/today
      moe-debugger record --list
    """
    chosen = [is_detached, is_stop, is_list, fetch is not None]
    if sum(chosen) > 1:
        raise InvalidInputError("--detach, --stop, --list and --fetch are different things to do: give one of them")
    if out is not None and (is_list or is_detached):
        raise InvalidInputError("--out needs a recording that has ended: give it with --stop or --fetch")
    if fetch is not None and out is None:
        raise InvalidInputError("--fetch needs --out DIR, the new folder for the files")
    if out is not None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InvalidInputError(f"{out} is there already, and nothing in it is overwritten; give a new folder")
    console = PlainConsole(stderr=is_json, highlight=False, soft_wrap=True)
    with FleetRecordings(fleet or read_endpoints(data).grpc) as recordings:
        if is_list:
            _show_list(console, recordings.list(), is_json=is_json)
            return
        if fetch is not None:
            recording = recordings.get(fetch)
        elif is_stop:
            recording = recordings.stop(recording_id=recordings.find_running(session).recording_id)
        else:
            found = recordings.find_session(session)
            recording, was_running = recordings.start(found.session_id, name=name, max_bytes=max_bytes)
            what = "is being recorded already" if was_running else "is recorded"
            console.print(f"session {escape(found.name)} {what} to {escape(recording.path)}")
            if is_detached:
                _print_json(recording, None, is_json=is_json)
                console.print(f"stop it with: moe-debugger record --stop {recording.recording_id}")
                return
            recording = _watch(console, recordings, recording, duration)
        recording = _wait_for_end(recordings, recording)
        folder = None if out is None else _fetch(console, recordings, recording, out)
        _print_json(recording, folder, is_json=is_json)
        _show_end(console, recording, folder)


def _watch(
    console: Console, recordings: FleetRecordings, recording: pb.Recording, duration: float | None
) -> pb.Recording:
    """Show how it grows until Ctrl-C, the time is up or it ends by itself; return it stopped."""
    is_stopping, is_hurried = Event(), Event()
    end = None if duration is None else time.monotonic() + duration
    printed_at = time.monotonic()
    console.print("Ctrl-C stops it" if duration is None else f"for {duration:g} s; Ctrl-C stops it before")
    with stop_on_signals(is_stopping, is_hurried), contextlib.ExitStack() as stack:
        live = None
        if console.is_terminal:
            live = stack.enter_context(Live(Text(), console=console, refresh_per_second=4, transient=True))
        while not is_stopping.is_set():
            left = _POLL_S if end is None else min(_POLL_S, end - time.monotonic())
            if left <= 0 or is_stopping.wait(left):
                break
            try:
                recording = recordings.get(recording.recording_id)
            except FleetError as error:
                # It goes on without us; what matters is the stop.
                console.print(f"[yellow]{escape(str(error))}[/]")
                continue
            if recording.ended_at_unix_ns:
                return recording
            line = _line(recording)
            if live is not None:
                live.update(Text(line))
            elif time.monotonic() - printed_at >= _PLAIN_INTERVAL_S:
                printed_at = time.monotonic()
                console.print(line)
    return recordings.stop(recording_id=recording.recording_id)


def _wait_for_end(recordings: FleetRecordings, recording: pb.Recording) -> pb.Recording:
    deadline = time.monotonic() + _WAIT_FOR_END_S
    while not recording.ended_at_unix_ns:
        if time.monotonic() > deadline:
            raise FleetError(
                f"recording {recording.recording_id} is still being written after {_WAIT_FOR_END_S:.0f} s; "
                f"look again with --list"
            )
        time.sleep(_POLL_S)
        recording = recordings.get(recording.recording_id)
    return recording


def _fetch(console: Console, recordings: FleetRecordings, recording: pb.Recording, out: Path) -> Path:
    with console.status("fetching") as status:
        return recordings.download(
            recording.recording_id,
            out,
            lambda done, total: status.update(f"fetching {done / 1e6:,.1f} of {total / 1e6:,.1f} MB"),
        )


def state_word(recording: pb.Recording) -> str:
    """Return "finished" for RECORDING_STATE_FINISHED."""
    return pb.RecordingState.Name(recording.state).removeprefix("RECORDING_STATE_").lower()


def _line(recording: pb.Recording) -> str:
    end_ns = recording.ended_at_unix_ns or time.time_ns()
    seconds = max(0.0, (end_ns - recording.started_at_unix_ns) / 1e9)
    gaps = f", {recording.num_missing_messages} messages missing" if recording.num_missing_messages else ""
    dropped = f", {recording.num_decisions_dropped:,} decisions dropped" if recording.num_decisions_dropped else ""
    lost = sum(recording.num_rows_not_written.values())
    not_written = f", {lost:,} rows not written" if lost else ""
    return (
        f"{state_word(recording)} {seconds:,.0f} s: {recording.num_rows:,} rows of {recording.num_sources} source(s), "
        f"{recording.size_bytes / 1e6:,.1f} MB{gaps}{dropped}{not_written}"
    )


def _show_end(console: Console, recording: pb.Recording, folder: Path | None) -> None:
    colour = "yellow" if recording.state in _GONE else "green"
    console.print(f"[{colour}]{escape(_line(recording))}[/]")
    if recording.detail:
        console.print(f"[yellow]{escape(recording.detail)}[/]")
    where = folder or recording.path
    console.print(f"next:  moe-debugger report {where}")
    console.print(f'       moe-debugger query {where} "experts where load > 4x order by load desc"', markup=False)
    console.print(f"       moe-debugger replay {where} --speed 4")


def _show_list(console: Console, recordings: "list[pb.Recording]", *, is_json: bool) -> None:
    if is_json:
        sys.stdout.write(json.dumps([_values(one) for one in recordings]) + "\n")
        return
    table = Table("id", "session", "name", "state", "rows", "MB", "sources", "folder", box=None)
    for one in recordings:
        table.add_row(
            one.recording_id,
            escape(one.session_name),
            escape(one.name),
            state_word(one),
            f"{one.num_rows:,}",
            f"{one.size_bytes / 1e6:,.1f}",
            str(one.num_sources),
            escape(one.path),
        )
    console.print(table if recordings else "there are no recordings yet")


def _values(recording: pb.Recording) -> dict[str, Any]:
    values: dict[str, Any] = MessageToDict(
        recording, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    # JSON's numbers of 64 bits are texts in protobuf's mapping; these are far below 2**53, but for the times.
    names = ("num_rows", "size_bytes", "max_bytes", "num_missing_messages", "num_decisions_dropped")
    values |= {name: int(values[name]) for name in names}
    return values | {"state": state_word(recording)}


def _print_json(recording: pb.Recording, folder: Path | None, *, is_json: bool) -> None:
    if is_json:
        values = _values(recording) | ({} if folder is None else {"fetched_to": str(folder)})
        sys.stdout.write(json.dumps(values) + "\n")
