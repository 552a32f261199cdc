"""`moe-debugger up`: the whole fleet on this machine, in the foreground."""

import contextlib
import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Group
from rich.live import Live
from rich.markup import escape
from rich.text import Text

from moe_debugger.cli._output import PlainConsole
from moe_debugger.cli._signals import stop_on_signals
from moe_debugger.cli._summary import Summary, SummaryReader
from moe_debugger.config import Config, load_config
from moe_debugger.embedded.endpoints import Endpoints
from moe_debugger.embedded.fleet import Fleet, FleetOptions
from moe_debugger.embedded.supervisor import PartEvent, PartState
from moe_debugger.errors import InvalidInputError

__all__ = ["DEFAULT_DATA_DIR", "run_up", "service_env", "up"]

DEFAULT_DATA_DIR = Path("./.moe-debugger")
_PLAIN_INTERVAL_LOOKS = 10
_COLOURS = {
    PartState.READY: "green",
    PartState.WAITING: "yellow",
    PartState.FAILED: "red",
    PartState.STOPPED: "dim",
    PartState.STARTING: "default",
}


def up(
    data: Annotated[
        Path, typer.Option(metavar="FOLDER", help="Folder of everything that is stored; private.")
    ] = DEFAULT_DATA_DIR,
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, metavar="PORT", help="Port of the page (8080, else a free one).")
    ] = None,
    grpc_port: Annotated[
        int | None, typer.Option(min=1, max=65535, metavar="PORT", help="Port of gRPC (50051, else free).")
    ] = None,
    worker_port: Annotated[
        int | None, typer.Option(min=1, max=65535, metavar="PORT", help="Port of the worker's gRPC (50061, else free).")
    ] = None,
    nats_url: Annotated[
        str | None, typer.Option(metavar="URL", help="Use this NATS (>= 2.12) instead of an own one.")
    ] = None,
    redis_url: Annotated[
        str | None, typer.Option(metavar="URL", help="Use this Redis or Valkey instead of an own one.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(metavar="PATH", help="`demo`, or a folder with safetensors weights.")
    ] = None,
    no_worker: Annotated[bool, typer.Option("--no-worker", help="Without a model of its own.")] = False,
    json_line: Annotated[bool, typer.Option("--json", help="One line of JSON once every part is ready.")] = False,
    config: Annotated[Path | None, typer.Option(metavar="FILE", help="YAML file, see docs/configuration.md.")] = None,
) -> None:
    """Run the whole fleet on this machine until Ctrl-C, and print the page's URL.

    NATS, Valkey, the analyzer, the gateway with the page, and a worker that generates with a model while its routing
    is captured. Everything listens on loopback only. What was stored is there again after the next `up`.

    Examples:

    \b
      moe-debugger up
      moe-debugger up --model ./my-mixtral --port 9000
      moe-debugger up --json --data /tmp/fleet     # for scripts: {"page": ..., "grpc": ..., "nats": ..., ...}
    """
    loaded = load_config(config) if config is not None else Config()
    options = FleetOptions(
        data_dir=data,
        web_port=port,
        grpc_port=grpc_port,
        worker_port=worker_port,
        nats_url=nats_url,
        redis_url=redis_url,
        with_worker=not no_worker,
        service_env=service_env(loaded, model),
    )
    run_up(options, is_json=json_line)


def service_env(config: Config, model: str | None) -> dict[str, str]:
    """Return the services' settings of a configuration, the command line's model taking precedence.

    Raises:
        InvalidInputError: the model is not a folder.
    """
    env = config.service_env()
    if model is not None:
        env["MOE_COLLECTOR_MODEL"] = model
    source = env.get("MOE_COLLECTOR_MODEL") or os.environ.get("MOE_COLLECTOR_MODEL", "demo")
    if source != "demo":
        folder = Path(source).expanduser().absolute()
        if not (folder / "config.json").is_file():
            raise InvalidInputError(
                f"the model {source!r} is not a folder with a config.json and safetensors weights: "
                "give such a folder, or `demo`"
            )
        env["MOE_COLLECTOR_MODEL"] = str(folder)
        env.setdefault("MOE_COLLECTOR_SESSION_NAME", os.environ.get("MOE_COLLECTOR_SESSION_NAME", folder.name))
    return env


def run_up(options: FleetOptions, *, is_json: bool) -> None:
    """Start the fleet, show it, and stop it in order at a signal.

    Raises:
        FleetError: a part cannot be started; everything is stopped by then.
    """
    screen = _Screen(is_json=is_json)
    fleet = Fleet(options, on_event=screen.show_event, on_note=screen.say)
    with stop_on_signals(fleet.is_stopping, fleet.is_hurried):
        try:
            screen.say("starting the fleet")
            if not fleet.start(lambda endpoints: screen.show_page(endpoints, options)):
                return
            assert fleet.endpoints is not None
            if is_json and fleet.wait_until_ready():
                with contextlib.suppress(OSError):
                    sys.stdout.write(fleet.endpoints.to_json() + "\n")
                    sys.stdout.flush()
            with screen.summary_of(fleet.endpoints):
                fleet.run()
        finally:
            screen.is_stopping = True
            if fleet.stop():
                screen.say("stopped")


class _Screen:
    """What a person sees: progress, then a live summary on a terminal and a line now and then elsewhere."""

    def __init__(self, *, is_json: bool) -> None:
        self._is_json = is_json
        self._console = PlainConsole(stderr=is_json, highlight=False, soft_wrap=True)
        self._live: Live | None = None
        self._num_looks = 0
        self._last_lines: list[str] = []
        self.is_stopping = False

    def say(self, text: str) -> None:
        """Print a line; a terminal that is gone must not hinder the stop."""
        with contextlib.suppress(OSError, ValueError):
            self._console.print(escape(text))

    def show_event(self, event: PartEvent) -> None:
        """Print what became of a part."""
        colour = _COLOURS[event.state]
        with contextlib.suppress(OSError, ValueError):
            self._console.print(f"[{colour}]{event.part:<9}[/] {escape(event.text)}")
            for line in event.log_lines:
                self._console.print(f"  [dim]| {escape(line)}[/]")

    def show_page(self, endpoints: Endpoints, options: FleetOptions) -> None:
        """Print where the fleet answers; the page's URL is the first one that is ever printed."""
        self.say(f"\nthe page:  {endpoints.page}\n")
        self.say(f"gRPC:      {endpoints.grpc}")
        self.say(f"sources:   MoEDebugger(model, fleet=...) with the `nats` value of {options.data_dir}/endpoints.json")
        if options.with_worker:
            self.say("the worker loads the model; the page works meanwhile. Ctrl-C stops everything.\n")
        else:
            self.say("Ctrl-C stops everything.\n")

    @contextlib.contextmanager
    def summary_of(self, endpoints: Endpoints):  # type: ignore[no-untyped-def]
        """Show the live summary while the block runs."""
        if self._is_json:
            yield
            return
        reader = SummaryReader(endpoints.grpc, self._show_summary)
        with contextlib.ExitStack() as stack:
            if self._console.is_terminal:
                self._live = stack.enter_context(
                    Live(Text("looking at the fleet"), console=self._console, refresh_per_second=2, transient=True)
                )
            reader.start()
            stack.callback(reader.close)
            try:
                yield
            finally:
                self._live = None

    def _show_summary(self, summary: Summary) -> None:
        lines = summary.lines()
        live = self._live
        if live is not None:
            live.update(Group(*(Text(line, no_wrap=True, overflow="ellipsis") for line in lines)))
            return
        self._num_looks += 1
        if self._num_looks % _PLAIN_INTERVAL_LOOKS == 1 and lines != self._last_lines and not self.is_stopping:
            self._last_lines = lines
            for line in lines:
                self.say(line)
