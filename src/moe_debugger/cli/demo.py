"""`moe-debugger demo`: a real training run to watch, healthy or with a fault."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import grpc
import typer
from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from moe_debugger.cli._output import PlainConsole
from moe_debugger.cli._summary import finding_sentence, findings_of, open_findings
from moe_debugger.cli.up import DEFAULT_DATA_DIR
from moe_debugger.embedded.endpoints import Endpoints, read_endpoints
from moe_debugger.errors import DependencyMissingError, InvalidInputError
from moe_debugger.v1 import gateway_pb2, gateway_pb2_grpc

if TYPE_CHECKING:
    from moe_debugger.analysis.explanation import ObservedSettings
    from moe_debugger.analysis.state import RoutingState
    from moe_debugger.demo.scenarios import ScenarioStep

__all__ = ["demo"]

_PLAIN_INTERVAL_STEPS = 10
# The scenarios' model is top-2, as the shipped demo model is.
DEMO_TOP_K = 2
_CALL_TIMEOUT_S = 5.0
_RECENT_STEPS = 40
_COLOURS = {"critical": "bold red", "warning": "yellow", "info": "green"}


def demo(
    scenario: Annotated[
        Literal["collapse", "no-balance", "healthy", "loss-free", "loss-free-collapse"],
        typer.Option(
            help="collapse: the balancing term gets the wrong sign; no-balance: it is left out; healthy; loss-free: a "
            "selection bias instead; loss-free-collapse: that bias is updated the wrong way."
        ),
    ] = "collapse",
    data: Annotated[Path, typer.Option(metavar="FOLDER", help="Folder of the fleet to stream to.")] = DEFAULT_DATA_DIR,
    fleet: Annotated[
        str | None, typer.Option(metavar="NATS_URL", help="Stream to this fleet: the `nats` value of `up --json`.")
    ] = None,
    no_fleet: Annotated[bool, typer.Option("--no-fleet", help="Train without a fleet; watch it here.")] = False,
    steps: Annotated[int | None, typer.Option(min=1, help="Training steps (300).")] = None,
    session: Annotated[str | None, typer.Option(help="Name of the session on the page.")] = None,
) -> None:
    """Train a small MoE model here and now, and watch its routers on the running fleet's page.

    Nothing is staged: `collapse` is a real run, healthy at first, into which a realistic fault is put; its routers
    collapse within about two minutes while the loss hardly shows it.

    Examples:

    \b
      moe-debugger demo --scenario collapse
      moe-debugger demo --scenario no-balance --session "without balancing"
      moe-debugger demo --scenario healthy --no-fleet --steps 100
    """
    if no_fleet and fleet is not None:
        raise InvalidInputError("--fleet and --no-fleet contradict each other: give one of them")
    endpoints: Endpoints | None = None
    if not no_fleet and fleet is None:
        endpoints = read_endpoints(data)
        fleet = endpoints.nats
    try:
        import torch  # noqa: F401 - the scenario needs it; say so before anything starts
    except ImportError:
        raise DependencyMissingError(
            "training needs torch and transformers: pip install 'moe-debugger[collector]'"
        ) from None
    from moe_debugger.demo.scenarios import plan_scenario, run_scenario

    console = PlainConsole(highlight=False)
    plan = plan_scenario(scenario, steps=steps)
    console.print(f"training a fresh model: {plan.name}, {plan.num_steps} steps", end="")
    console.print(f"; the fault comes at step {plan.fault_step}" if plan.fault_step is not None else "")
    if endpoints is not None:
        console.print(f"watch it on {endpoints.page}")
    account = _Account()
    with _shown(console) as show:

        def on_step(step: ScenarioStep) -> None:
            account.add(step)
            show(step)

        run_scenario(scenario, fleet=fleet, session_name=session, steps=steps, on_step=on_step)
    found = _fleet_findings(endpoints, session or f"demo {plan.name}") if endpoints is not None else None
    if found is not None:
        _print_findings(console, found, "as on the page")
    else:
        # Sums hold no requests, whose differences prove more than those of steps; the analyzer has the rows.
        origin = f"from the sums of the last {_RECENT_STEPS} steps; with a fleet they come from all decisions"
        _print_findings(console, account.explained_findings(), origin)


@contextlib.contextmanager
def _shown(console: Console) -> Iterator[Callable[[ScenarioStep], None]]:
    """Show each step: as a live table on a terminal, as a line now and then elsewhere."""
    if not console.is_terminal:

        def show_plain(step: ScenarioStep) -> None:
            is_last = step.step == step.plan.num_steps - 1
            if step.step % _PLAIN_INTERVAL_STEPS == 0 or is_last or step.step == step.plan.fault_step:
                console.print(_line(step), soft_wrap=True)

        yield show_plain
        return
    with Live(Text("building the texts and the model"), console=console, refresh_per_second=4) as live:
        yield lambda step: live.update(_table(step))


def _line(step: ScenarioStep) -> str:
    experts = " ".join(f"{value:.1f}" for value in step.effective_experts)
    what = (
        "the selection bias goes the wrong way" if step.plan.is_loss_free else "the balancing term has the wrong sign"
    )
    fault = f"  FAULT: {what}" if step.is_fault_on else ""
    return (
        f"step {step.step:>4}  loss {step.loss:.3f}  balance {step.result.balance_loss:.2f}  "
        f"effective experts by layer: {experts}{fault}"
    )


def _table(step: ScenarioStep) -> Group:
    done = f"step {step.step + 1} of {step.plan.num_steps}, {step.elapsed_s:.0f} s; loss {step.loss:.3f}"
    table = Table("layer", "effective experts", "load by expert", "hottest")
    for index, (counts, effective) in enumerate(zip(step.result.counts, step.effective_experts, strict=True)):
        total = sum(counts) or 1
        shares = [count / total for count in counts]
        bars = "".join("▁▂▃▄▅▆▇█"[min(7, int(share * len(shares) * 2))] if share else " " for share in shares)
        style = "red" if effective < len(counts) / 2 else "yellow" if effective < len(counts) * 0.75 else "green"
        hottest = max(range(len(shares)), key=shares.__getitem__)
        table.add_row(
            str(index),
            Text(f"{effective:.2f} of {len(counts)}", style=style),
            bars,
            f"{hottest} ({shares[hottest]:.0%})",
        )
    fault = "the balancing term has the wrong sign since step " + str(step.plan.fault_step) if step.is_fault_on else ""
    return Group(Text(done), Text(fault, style="bold red"), table)


class _Account:
    """The load that was seen, step by step: what the findings at the end are about."""

    def __init__(self) -> None:
        self._steps: list[ScenarioStep] = []

    def add(self, step: ScenarioStep) -> None:
        """Keep one step's load."""
        self._steps.append(step)

    def findings(self) -> list[tuple[str, str]]:
        """Return severity and sentence of each finding about the end of the run."""
        return [(severity, sentence) for severity, sentence, _ in self.explained_findings()]

    def explained_findings(self) -> list[tuple[str, str, list[str]]]:
        """Return severity, sentence and explanation of each finding about the end of the run.

        A run with a fault is compared with its own healthy part before the fault; when it began is looked for in the
        whole run.
        """
        from moe_debugger.analysis import finish
        from moe_debugger.analysis.explanation import explain_analysis, explanation_text

        if not self._steps:
            return []
        fault_step = self._steps[-1].plan.fault_step
        healthy = [] if fault_step is None else self._steps[fault_step // 3 : fault_step]
        analysis = finish(self._state(self._steps[-_RECENT_STEPS:]), baseline=self._state(healthy) if healthy else None)
        explained = explain_analysis(
            analysis, state=self._state(self._steps), settings=self._settings(), is_training=True
        )
        return [
            (
                str(finding.severity),
                finding_sentence(finding.code, dict(finding.args)),
                [] if finding.explanation is None else explanation_text(finding.explanation),
            )
            for finding in explained.findings
        ]

    def _settings(self) -> ObservedSettings:
        import numpy as np

        from moe_debugger.analysis.explanation import ObservedSettings, Setting

        steps = np.array([step.step for step in self._steps], np.int64)
        is_loss_free = bool(self._steps) and self._steps[0].plan.is_loss_free
        name = "selection_bias_step" if is_loss_free else "balance_coef"
        series = {
            # What balances: a loss by its weight, or a selection bias by its step.
            name: [step.balance_coef for step in self._steps],
            "balance_loss": [step.result.balance_loss for step in self._steps],
            "loss": [step.loss for step in self._steps],
        }
        return ObservedSettings(
            Setting(name, -1, steps, np.array(values, np.float64).reshape(-1, 1)) for name, values in series.items()
        )

    @staticmethod
    def _state(steps: Sequence[ScenarioStep]) -> RoutingState:
        import numpy as np

        from moe_debugger.analysis.state import LayerShape, RoutingState
        from moe_debugger.v1 import routing_pb2 as pb
        from moe_debugger.wire.codec import CountsColumns, LayerCountColumns

        sizes = [len(layer) for layer in steps[0].result.counts]
        state = RoutingState.empty([LayerShape(index, size, DEMO_TOP_K) for index, size in enumerate(sizes)])
        for step in steps:
            layers = [
                LayerCountColumns(index, sizes[index], 0, sum(counts) // DEMO_TOP_K, 0, np.array(counts, np.uint64))
                for index, counts in enumerate(step.result.counts)
            ]
            tokens = layers[0].num_tokens
            state.fold_counts(CountsColumns(step.step, step.step, pb.PHASE_TRAIN, tokens, layers))
        return state


def _fleet_findings(endpoints: Endpoints, name: str) -> list[tuple[str, str, list[str]]] | None:
    """Return what the fleet found in the session, or None where it cannot be asked."""
    options = (("grpc.enable_http_proxy", 0),)
    try:
        with grpc.insecure_channel(endpoints.grpc, options=options) as channel:
            stub = gateway_pb2_grpc.DebuggerServiceStub(channel)
            sessions = stub.ListSessions(gateway_pb2.ListSessionsRequest(), timeout=_CALL_TIMEOUT_S).sessions
            ours = [session for session in sessions if session.name == name]
            if not ours:
                return None
            newest = max(ours, key=lambda session: session.created_at_unix_ns)
            request = gateway_pb2.GetSessionRequest(session_id=newest.session_id)
            snapshot = stub.GetSession(request, timeout=_CALL_TIMEOUT_S).snapshot
    except grpc.RpcError:
        return None
    from moe_debugger.analysis.explanation import explanation_from_proto, explanation_text

    shown = open_findings(snapshot.findings)
    return [
        (
            severity,
            sentence,
            explanation_text(explanation_from_proto(finding.explanation, finding.rule_id))
            if finding.HasField("explanation")
            else [],
        )
        for (severity, sentence), finding in zip(findings_of(shown), shown, strict=True)
    ]


def _print_findings(console: Console, findings: Sequence[tuple[str, str, list[str]]], origin: str) -> None:
    console.print(f"\n{len(findings)} finding(s), {origin}:" if findings else f"\nno finding ({origin})")
    shown: set[str] = set()
    for severity, sentence, explanation in findings:
        console.print(f"  [{_COLOURS[severity]}]{severity:<8}[/] {escape(sentence)}", soft_wrap=True)
        for line in explanation:
            # Layers that fell together share onset, causes and changes: each is said once.
            if line not in shown:
                console.print(f"           {escape(line)}", style="dim", soft_wrap=True)
            shown.add(line)
