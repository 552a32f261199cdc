"""`moe-debugger --model … --interactive`: a prompt loop over one model."""

from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from moe_debugger.cli._output import PlainConsole
from moe_debugger.cli.trace import debug_model, run_prompt
from moe_debugger.config import Config
from moe_debugger.errors import InvalidInputError, MoEDebuggerError

if TYPE_CHECKING:
    from moe_debugger._debugger import MoEDebugger
    from moe_debugger._session import Session
    from moe_debugger.models import LoadedModel
    from moe_debugger.recording import Recorder

__all__ = ["run_interactive"]

_HELP = """\
Type a prompt to generate from it. Counts add up over prompts. Commands:
  /layer N     show this MoE layer with every prompt; /layer alone shows all
  /tokens N    generate N tokens for each prompt
  /stats       routing per layer so far
  /experts     load of every expert so far
  /performance what ran, and what watching it cost
  /findings    what the analysis says so far
  /record DIR  record what comes from now on to a new folder; /record alone stops
  /reset       forget everything so far
  /help        this text
  /quit        leave (or Ctrl-D)"""


class _Loop:
    """The state of one loop: the layer that is shown and how much is generated."""

    def __init__(self, console: Console, loaded: "LoadedModel", debugger: "MoEDebugger") -> None:
        self._console = console
        self._loaded = loaded
        self._debugger = debugger
        self._layer: int | None = None
        self._max_new_tokens = 32
        self._recorder: Recorder | None = None

    def run(self) -> None:
        self._console.print(Text(_HELP, "dim"))
        while True:
            try:
                line = self._console.input("[bold]prompt>[/bold] ")
            except (EOFError, KeyboardInterrupt):
                self._console.print()
                return
            command, _, argument = line.strip().partition(" ")
            if command in ("/quit", "/exit", "/q"):
                return
            try:
                if command.startswith("/"):
                    self._command(command, argument.strip())
                elif line.strip():
                    self._prompt(line)
            except MoEDebuggerError as error:
                self._console.print(Text(str(error), "red"))

    @property
    def _session(self) -> "Session":
        return self._debugger.session or self._debugger.start_session()

    def _command(self, command: str, argument: str) -> None:
        from moe_debugger.cli._trace_view import layer_loads, print_findings

        session = self._session
        if command == "/layer":
            self._layer = _number(argument, 0, len(session.layers()) - 1) if argument else None
            if self._layer is not None:
                for part in layer_loads(session.get_routing_stats(), session.get_expert_metrics(), self._layer):
                    self._console.print(part)
        elif command == "/tokens":
            self._max_new_tokens = _number(argument, 1, 4096)
        elif command == "/stats":
            self._console.print(Text(str(session.get_routing_stats())), soft_wrap=True)
        elif command == "/experts":
            self._console.print(Text(str(session.get_expert_metrics())), soft_wrap=True)
        elif command == "/performance":
            self._console.print(Text(str(session.get_performance_metrics())), soft_wrap=True)
        elif command == "/findings":
            print_findings(self._console, session.diagnose(), session.get_routing_stats().num_tokens)
        elif command == "/record":
            self._record(session, argument)
        elif command == "/reset":
            session.close()
            self._debugger.start_session()
        elif command == "/help":
            self._console.print(Text(_HELP, "dim"))
        else:
            raise InvalidInputError(f"there is no command {command!r}; /help lists them")

    def _record(self, session: "Session", folder: str) -> None:
        if folder:
            self._recorder = session.record(Path(folder).expanduser())
            self._console.print(Text(f"recording to {self._recorder.path}", "dim"))
        elif self._recorder is None:
            raise InvalidInputError("nothing is recorded; /record DIR begins")
        else:
            recorder, self._recorder = self._recorder, None
            manifest = recorder.stop()
            self._console.print(Text(f"{manifest.num_rows:,} rows in {recorder.path}: {manifest.status}", "dim"))

    def _prompt(self, prompt: str) -> None:
        from moe_debugger.cli._trace_view import token_lines

        first = self._session.get_routing_stats().num_forwards
        result = run_prompt(self._loaded, prompt, self._max_new_tokens)
        decisions = self._session.decisions_since(first)
        if len(decisions):
            num_prompt, width = len(result.prompt_ids), self._console.width
            self._console.print(token_lines(decisions, result.pieces, num_prompt, self._layer, width))
        text = result.generated_text
        self._console.print(Text("".join(c if c.isprintable() or c == "\n" else "·" for c in text), "green"))


def run_interactive(config: Config, *, console: Console | None = None) -> None:
    """Load the model that `config` names and run the loop until /quit or the end of the input."""
    with debug_model(config) as (loaded, debugger):
        _Loop(console or PlainConsole(highlight=False), loaded, debugger).run()


def _number(text: str, low: int, high: int) -> int:
    if not text.isdecimal() or not low <= int(text) <= high:
        raise InvalidInputError(f"{text!r}: expected a number from {low} to {high}")
    return int(text)
