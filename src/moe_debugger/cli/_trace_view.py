"""Shows one prompt's routing in the terminal."""

from collections.abc import Iterable

import numpy as np
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from moe_debugger import _tables
from moe_debugger._decisions import Decisions
from moe_debugger._stats import ExpertMetrics, LayerRoutingStats, RoutingStats
from moe_debugger.analysis import Analysis, Severity
from moe_debugger.analysis.explanation import explanation_text
from moe_debugger.messages import render_finding

__all__ = ["expert_colour", "layer_loads", "print_findings", "printable", "token_lines"]

# Okabe and Ito's colours for readers with any colour vision, then lighter kinds of them.
_COLOURS = (
    "#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7", "#999999",
    "#ffcf70", "#a6dcff", "#5fd3ac", "#fff6a0", "#6fb1e0", "#ff9d5c", "#eab5d2", "#cccccc",
)  # fmt: skip
# An expert that takes this many times its fair share is called hot; a finding needs more evidence than one prompt.
_HOT_RATIO = 2.0
# "pos", "in" and the token's text come first in a line; then one column for each layer.
_LINE_HEAD_WIDTH = 16
_SEVERITY_STYLES = {Severity.INFO: "cyan", Severity.WARNING: "yellow", Severity.CRITICAL: "bold red"}


def expert_colour(expert_id: int) -> str:
    """Return an expert's colour; far experts share one, so its number is always shown too."""
    return _COLOURS[expert_id % len(_COLOURS)]


def printable(piece: bytes) -> str:
    """Return a token's text on one line, without anything that a terminal would obey."""
    text = piece.decode("utf-8", errors="backslashreplace")
    known = {"\n": "⏎", "\t": "⇥", " ": "␣"}
    return "".join(known.get(c) or (c if c.isprintable() else c.encode("unicode_escape").decode()) for c in text)


def layer_loads(stats: RoutingStats, experts: ExpertMetrics, layer: int | None) -> Iterable[RenderableType]:
    """Yield a headline and a bar per expert for each layer."""
    for item in stats.layers:
        if layer is not None and item.info.layer_index != layer:
            continue
        rows = experts.layer(item.info.layer_index)
        peak = max((row.num_assignments for row in rows), default=0)
        grid = Table.grid(padding=(0, 1))
        for row in rows:
            note = Text("dead here: no token", "red") if row.is_unused else Text("")
            if row.num_assignments and row.load_ratio >= _HOT_RATIO:
                note = Text(f"hot: {row.load_ratio:.2f}x the fair share", "bold")
            style = expert_colour(row.expert_id)
            grid.add_row(
                Text(f"E{row.expert_id}".rjust(5), style),
                Text(_tables.bar(row.num_assignments / peak if peak else 0.0, 30), style),
                Text(f"{row.num_assignments:>6,}"),
                Text("–".rjust(6) if np.isnan(row.share) else f"{row.share:6.1%}"),
                note,
            )
        yield Group(_headline(item), grid)


def _headline(item: LayerRoutingStats) -> Text:
    text = Text()
    text.append(f"\nLayer {item.info.layer_index}", "bold")
    text.append(f"  {item.info.module_name}  top-{item.info.top_k} of {item.info.num_experts}", "dim")
    dead = " ".join(f"E{expert}" for expert in item.unused_experts) or "none"
    text.append(f"\n  load: {item.effective_experts:.2f} effective experts; dead in this run: {dead}; ")
    text.append(f"hottest: E{item.hottest_expert} with {item.hottest_load_ratio:.2f}x the fair share")
    text.append(f"\n  confidence: top-1 probability {_number(item.mean_top1_probability)}, ")
    text.append(f"router entropy {_number(item.mean_router_entropy)} nats, margin {_number(item.mean_margin)}")
    return text


def token_lines(
    decisions: Decisions, pieces: list[bytes], num_prompt: int, layer: int | None, width: int
) -> RenderableType:
    """Return one line per routed token: its text and the experts of as many layers as fit, strongest first."""
    layers = sorted(decisions.layers) if layer is None else [layer]
    k = decisions.expert_ids.shape[1]
    with_weights = _LINE_HEAD_WIDTH + len(layers) * (k * 10 + 2) <= width or len(layers) == 1
    cell_width = max(8, k * (10 if with_weights else 5)) + 2
    shown = layers[: max(1, (width - _LINE_HEAD_WIDTH) // cell_width)]
    table = Table(box=None, pad_edge=False, header_style="dim")
    for header in ("pos", "", "token", *(f"layer {index}" for index in shown)):
        table.add_column(header, no_wrap=True)
    by_place: dict[tuple[int, int], int] = {
        (int(position), int(index)): row
        for row, (position, index) in enumerate(zip(decisions.position, decisions.layer_index, strict=True))
        if not decisions.is_padding[row]
    }
    for position, piece in enumerate(pieces):
        cells = [_experts_text(decisions, by_place.get((position, index)), with_weights) for index in shown]
        if not any(cell.plain for cell in cells):
            continue
        row = by_place.get((position, shown[0]))
        top = None if row is None else _strongest_first(decisions, row)[0]
        origin = Text("in" if position < num_prompt else "out", "dim" if position < num_prompt else "green")
        token = Text(printable(piece), "" if top is None else expert_colour(int(decisions.expert_ids[row][top])))
        table.add_row(Text(str(position), "dim"), origin, token, *cells)
    if len(layers) <= len(shown):
        return table
    return Group(table, Text(f"{len(layers) - len(shown)} more layers: show one with --layer N", "dim"))


def _strongest_first(decisions: Decisions, row: int) -> list[int]:
    # The experts' order in a row is not by weight in many architectures.
    weights = decisions.gate_weights[row].astype(np.float32)
    used = np.flatnonzero(decisions.expert_ids[row] >= 0)
    return [int(slot) for slot in used[np.argsort(-weights[used], kind="stable")]]


def _experts_text(decisions: Decisions, row: int | None, with_weights: bool) -> Text:
    text = Text()
    if row is None:
        return text
    for slot in _strongest_first(decisions, row):
        expert = int(decisions.expert_ids[row][slot])
        text.append(f"E{expert}", expert_colour(expert))
        text.append(f" {float(decisions.gate_weights[row][slot]):.2f}  " if with_weights else " ", "dim")
    return text


def print_findings(console: Console, analysis: Analysis, num_tokens: int) -> None:
    """Print the findings, or why there are none, and what was wrong with detectors of others."""
    for problem in analysis.problems:
        console.print(Text(f"\n! {problem}", "yellow"), soft_wrap=True)
    if not analysis.findings:
        console.print(
            Text(
                f"\nNo findings from {num_tokens:,} tokens of about {analysis.num_requests:,} request(s). "
                "A single prompt can show routing, not health: `moe-debugger up` watches a model over many.",
                "dim",
            )
        )
        return
    console.print(Text("\nFindings", "bold"))
    for finding in analysis.findings:
        style = _SEVERITY_STYLES[finding.severity]
        line = Text(f"  {finding.severity.value!s:<9}", style)
        title, summary, remedy = (
            render_finding(finding.code, finding.args, part) for part in ("title", "summary", "remedy")
        )
        # Words of plug-ins come in parts of which none repeats the other.
        is_of_plugin = "." in finding.code
        line.append(f"{title}: {summary}" if is_of_plugin and title != summary else summary)
        console.print(line)
        if is_of_plugin and remedy:
            console.print(Text(f"            {remedy}", "dim"), soft_wrap=True)
        # Most of one prompt's findings say that it is too little to tell: there is nothing to explain yet.
        if finding.explanation is not None and finding.severity is not Severity.INFO:
            for text in explanation_text(finding.explanation):
                console.print(Text(f"            {text}", "dim"), soft_wrap=True)


def _number(value: float) -> str:
    return "not known" if np.isnan(value) else f"{value:.3f}"
