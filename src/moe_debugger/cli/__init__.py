"""The command line: `moe-debugger`."""

import logging
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import structlog
import typer

from moe_debugger.cli._output import echo
from moe_debugger.cli.check_adapter import check_adapter
from moe_debugger.cli.demo import demo
from moe_debugger.cli.diff import diff
from moe_debugger.cli.doctor import doctor
from moe_debugger.cli.plan import plan
from moe_debugger.cli.profile import profile
from moe_debugger.cli.query import query
from moe_debugger.cli.record import record
from moe_debugger.cli.replay import replay
from moe_debugger.cli.report import report
from moe_debugger.cli.trace import trace
from moe_debugger.cli.up import DEFAULT_DATA_DIR, run_up, service_env, up
from moe_debugger.config import Config, load_config
from moe_debugger.embedded.fleet import FleetOptions
from moe_debugger.errors import ConfigError, InvalidInputError, MoEDebuggerError

__all__ = ["app", "main"]

EXIT_FAILED = 1
EXIT_CONFIG = 2

app = typer.Typer(
    name="moe-debugger",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(up)
app.command()(demo)
app.command()(trace)
app.command()(record)
app.command()(replay)
app.command()(profile)
app.command()(doctor)
app.command()(check_adapter)
app.command()(query)
app.command()(report)
app.command()(diff)
app.command()(plan)


def _print_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"moe-debugger {version('moe-debugger')}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    model: Annotated[
        str | None, typer.Option(metavar="PATH", help="`demo`, or a folder with safetensors weights.")
    ] = None,
    interactive: Annotated[bool, typer.Option("--interactive", help="A prompt loop with that model.")] = False,
    config: Annotated[Path | None, typer.Option(metavar="FILE", help="YAML file, see docs/configuration.md.")] = None,
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, metavar="PORT", help="Port of the fleet's page.")
    ] = None,
    _version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """See what the routers of a Mixture-of-Experts model do, live: which experts are used, dead, hot, and why.

    Without a command, `--interactive` is a prompt loop, and `--model`, `--config` or `--port` alone start the fleet
    as `up` does.

    Examples:

    \b
      moe-debugger up                                  # the whole fleet with the demo model; prints the page's URL
      moe-debugger demo --scenario collapse            # watch routers collapse in a real training run
      moe-debugger trace --model demo --prompt "1 + 1 ="
      moe-debugger --model ./my-mixtral --interactive
      moe-debugger --config config.yaml --port 9000
    """
    if context.invoked_subcommand is not None:
        if interactive or any(value is not None for value in (model, config, port)):
            raise InvalidInputError(
                f"options before `{context.invoked_subcommand}` act only without a command: put them after it"
            )
        return
    if not interactive and model is None and config is None and port is None:
        typer.echo(context.get_help())
        return
    loaded = load_config(config) if config is not None else Config()
    if model is not None:
        loaded = loaded.model_copy(update={"model": loaded.model.model_copy(update={"path": model})})
    if interactive:
        if port is not None:
            raise InvalidInputError("--port is the port of the fleet's page: --interactive has none")
        from moe_debugger.cli.interactive import run_interactive

        run_interactive(loaded)
        return
    run_up(FleetOptions(DEFAULT_DATA_DIR, web_port=port, service_env=service_env(loaded, None)), is_json=False)


def main() -> None:
    """Run the command line; our own errors are printed without a traceback."""
    # The library's progress is for services: here it would stand between the lines of a table.
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    try:
        app()
    except ConfigError as error:
        _fail(error, EXIT_CONFIG)
    except MoEDebuggerError as error:
        _fail(error, EXIT_FAILED)


def _fail(error: MoEDebuggerError, code: int) -> None:
    echo(f"moe-debugger: {error}", err=True)
    sys.exit(code)
