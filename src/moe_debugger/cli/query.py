"""`moe-debugger query`: one query over a recording, or over a session of a fleet."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moe_debugger._plain_text import plain_text
from moe_debugger.cli._output import echo
from moe_debugger.errors import FleetError, InvalidInputError

if TYPE_CHECKING:
    import grpc

    from moe_debugger.query import QueryResult
    from moe_debugger.v1 import session_pb2

__all__ = ["query"]

_TIMEOUT_S = 15.0
_MAX_MESSAGE_BYTES = 64 << 20


def query(
    arguments: Annotated[
        list[str],
        typer.Argument(metavar="[REC...] QUERY", help="Folder of a recording (several: its ranks), then the query."),
    ],
    fleet: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Ask a fleet: the `gRPC` address that `up` prints.")
    ] = None,
    session: Annotated[
        str | None, typer.Option(metavar="NAME", help="Name or id of the fleet's session; default: the newest.")
    ] = None,
    is_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
    is_csv: Annotated[bool, typer.Option("--csv", help="Print CSV instead of a table.")] = False,
    model: Annotated[
        str | None, typer.Option(metavar="PATH", help="Folder with the model's tokenizer, for the texts of tokens.")
    ] = None,
    max_rows: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Read at most so many rows of a recording.")
    ] = None,
    damaged: Annotated[
        bool, typer.Option("--damaged", help="Ask what is whole of a damaged recording, and say what is not.")
    ] = False,
) -> None:
    """Ask a recording, or a session of a fleet, in the language of docs/query.md. Nothing is ever changed.

    Examples:

    \b
      moe-debugger query runs/today "experts where layer = 23 and load > 8x order by load desc"
      moe-debugger query runs/today "tokens where layer = 3 and expert = 5 limit 20"
      moe-debugger query runs/today "experts where token = ' the'" --model ./my-mixtral
      moe-debugger query runs/today "tokens by layer, expert show count" --csv > loads.csv
      moe-debugger query --fleet 127.0.0.1:50051 --session demo "findings where severity >= warning" --json
    """
    *folders, text = arguments
    if is_json and is_csv:
        raise InvalidInputError("--json and --csv cannot both be the form of the answer; give one of them")
    if fleet is not None:
        if folders or model is not None or max_rows is not None or damaged:
            raise InvalidInputError(
                "a fleet answers from its own data: --fleet goes with --session and the query, without a recording, "
                "--model, --max-rows and --damaged"
            )
        result = _of_fleet(fleet, session, text)
    elif not folders:
        raise InvalidInputError(
            f"there is nothing to ask: give the folder of a recording before the query {text[:60]!r}, or --fleet"
        )
    elif session is not None:
        raise InvalidInputError("--session names a session of a fleet; give --fleet too")
    else:
        result = _of_recording([Path(each) for each in folders], text, model, max_rows, is_damaged=damaged)
    if is_json:
        sys.stdout.write(json.dumps(result.to_dict(), allow_nan=False) + "\n")
    elif is_csv:
        # A file or a pipe has the texts as they are.
        text = result.to_csv()
        sys.stdout.write(plain_text(text, "\r\n\t") if sys.stdout.isatty() else text)
        for note in result.notes:
            echo(f"note: {note}", err=True)
    else:
        echo(str(result))


def _of_recording(
    folders: list[Path], text: str, model: str | None, max_rows: int | None, *, is_damaged: bool
) -> "QueryResult":
    from moe_debugger.query import LOCAL_LIMITS, parse, run_query
    from moe_debugger.query.local import RecordingSource
    from moe_debugger.recording import open_recording

    # Before anything is opened: a fault of the query is what there is to say.
    parse(text)
    mode: Any = "skip" if is_damaged else "raise"
    recording = open_recording(folders[0] if len(folders) == 1 else folders, damaged=mode)
    limits = LOCAL_LIMITS if max_rows is None else replace(LOCAL_LIMITS, max_rows=max_rows)
    return run_query(text, RecordingSource(recording, None if model is None else _tokenizer(model)), limits)


def _tokenizer(model: str) -> Any:
    from moe_debugger.query.vocabulary import ByteVocabulary

    if model == "demo":
        return ByteVocabulary()
    folder = Path(model).expanduser()
    if not (folder / "tokenizer_config.json").is_file():
        raise InvalidInputError(f"--model {model!r}: there is no tokenizer_config.json in that folder")
    import transformers

    from moe_debugger.models import _load_tokenizer

    return _load_tokenizer(transformers, folder)


def _of_fleet(target: str, name: str | None, text: str) -> "QueryResult":
    import grpc

    from moe_debugger.query.messages import result_from_proto
    from moe_debugger.v1 import gateway_pb2, gateway_pb2_grpc

    address = _address(target)
    options = (("grpc.enable_http_proxy", 0), ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES))
    with grpc.insecure_channel(address, options=options) as channel:
        stub = gateway_pb2_grpc.DebuggerServiceStub(channel)
        try:
            sessions = stub.ListSessions(gateway_pb2.ListSessionsRequest(), timeout=_TIMEOUT_S).sessions
            request = gateway_pb2.QueryRequest(session_id=_session_id(sessions, name), text=text)
            return result_from_proto(stub.Query(request, timeout=_TIMEOUT_S).result)
        except grpc.RpcError as error:
            raise _explained(error, address) from None


def _address(target: str) -> str:
    if target.startswith(("http://", "https://")):
        raise InvalidInputError(
            f"--fleet {target!r} is the address of the page; give the gRPC address that `moe-debugger up` prints, such "
            "as 127.0.0.1:50051"
        )
    address = target.removeprefix("grpc://").rstrip("/")
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) <= 65535:
        raise InvalidInputError(f"--fleet {target!r}: expected host:port, such as 127.0.0.1:50051")
    return address


def _session_id(sessions: "Any", name: str | None) -> str:
    found: list[session_pb2.Session] = [each for each in sessions if name in (None, each.name, each.session_id)]
    if not found:
        names = ", ".join(sorted({each.name for each in sessions})) or "none"
        raise InvalidInputError(
            f"the fleet has no session {name!r}; it has: {names}"
            if name is not None
            else "the fleet has no session yet"
        )
    return max(found, key=lambda each: each.last_seen_at_unix_ns).session_id


def _explained(error: "grpc.RpcError", address: str) -> Exception:
    import grpc

    code, details = (error.code(), error.details() or "") if isinstance(error, grpc.Call) else (None, str(error))
    if code in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND):
        return InvalidInputError(details)
    return FleetError(f"the fleet at {address} did not answer the query: {details or code}")
