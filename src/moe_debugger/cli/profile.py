"""`moe-debugger profile`: one prompt, and where the time of the MoE layers went."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from moe_debugger import _tables
from moe_debugger.cli._output import PlainConsole
from moe_debugger.cli.trace import debug_model, run_prompt
from moe_debugger.config import Config, load_config
from moe_debugger.errors import InvalidInputError
from moe_debugger.messages import render_finding

if TYPE_CHECKING:
    from moe_debugger.profiling import LayerProfile, LayerTimes, Peak, SizeError

__all__ = ["profile"]

_BAR_WIDTH = 24
# Of a block, in the order of a forward; what is not router, experts or waiting is drawn as the rest.
_SEGMENTS = (("router", "#e69f00"), ("experts", "#56b4e9"), ("shared", "#009e73"), ("wait", "#d55e00"))
_NUM_EXPERTS = 5


def profile(
    prompt: Annotated[str, typer.Option("--prompt", help="Text to run.", metavar="TEXT")],
    model: Annotated[
        str | None, typer.Option("--model", metavar="PATH", help="`demo` (default), or a folder with safetensors.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, max=4096, help="Tokens to generate.")] = 64,
    peak: Annotated[
        str, typer.Option(metavar="WHAT", help="Roof of the roofline: `measure`, `none`, or GFLOP/s,GB/s.")
    ] = "measure",
    perfetto: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write Chrome trace JSON for ui.perfetto.dev.")
    ] = None,
    is_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
    no_color: Annotated[bool, typer.Option("--no-color", help="Print without colours.")] = False,
    config: Annotated[Path | None, typer.Option(metavar="FILE", help="YAML file, see docs/configuration.md.")] = None,
) -> None:
    """Run one prompt and show where the time went: router, experts and the rest by layer, slow experts, the roofline.

    The prompt runs once before, so that loading is not measured.

    Examples:

    \b
      moe-debugger profile --prompt "def add(a, b):"
      moe-debugger profile --model ./my-mixtral --prompt "Hello" --perfetto trace.json
      moe-debugger profile --prompt "1 + 1 =" --peak 180,38 --json | jq .bottlenecks
    """
    settings = load_config(config) if config is not None else Config()
    with debug_model(settings, model) as (loaded, debugger):
        roof = _peak(peak, loaded.model)
        run_prompt(loaded, prompt, min(4, max_new_tokens))
        with debugger.profile(layers=True, peak=roof) as block:
            result = run_prompt(loaded, prompt, max_new_tokens)
        layers = block.layers
        assert layers is not None
        num_events = layers.to_perfetto(perfetto) if perfetto is not None else 0
        if is_json:
            answer: dict[str, Any] = {"model": loaded.name, "num_prompt_tokens": len(result.prompt_ids)}
            answer |= {"num_generated_tokens": len(result.generated_ids), "wall_s": block.wall_s, **layers.to_dict()}
            # JSON has no NaN.
            plain = json.loads(json.dumps(answer), parse_constant=lambda _: None)
            sys.stdout.write(json.dumps(plain, allow_nan=False) + "\n")
            return
        console = PlainConsole(no_color=no_color or None, highlight=False)
        console.print(Text(loaded.name, "bold"))
        show_profile(console, layers)
        if perfetto is not None:
            console.print(Text(f"\n{num_events:,} events in {perfetto}: open it in https://ui.perfetto.dev", "dim"))


def _peak(wanted: str, model: Any) -> "Peak | None":
    from moe_debugger.profiling import Peak, measure_peak

    if wanted == "none":
        return None
    if wanted == "measure":
        parameter = next(model.parameters())
        return measure_peak(parameter.device, parameter.dtype)
    try:
        gflops, gbps = (float(part) for part in wanted.split(","))
        return Peak(gflops, gbps)
    except ValueError as error:
        raise InvalidInputError(
            f"--peak {wanted!r}: expected `measure`, `none`, or two finite numbers above 0 such as 180,38 "
            "(GFLOP/s,GB/s)"
        ) from error


def show_profile(console: Console, layers: "LayerProfile") -> None:
    """Print a profile as tables."""
    if layers.nothing_ran:
        console.print(layers.nothing_ran)
        _show_notes(console, layers)
        return
    overhead = layers.overhead
    console.print(
        Text(
            f"{layers.num_forwards} forwards, median {layers.forward_median_ms:.2f} ms; profiling took "
            f"{overhead.share:.1%} of it by its own clock",
            "dim",
        )
    )
    console.print(_layer_table(layers))
    key = Text("  ")
    for name, colour in _SEGMENTS:
        key.append("█ ", colour).append(f"{name}  ")
    console.print(key.append("░ rest"))
    for line in _reasons(layers):
        console.print(Text(f"  – {line}", "dim"), soft_wrap=True)
    _show_experts(console, layers)
    _show_roofline(console, layers)
    console.print(Text("\nBottlenecks", "bold"))
    for each in layers.bottlenecks:
        mark = (" (estimated)" if each.is_estimated else "") + f" [{each.num_calls} calls]"
        console.print(f"  {each.severity.value:<9}{render_finding(each.code, each.args)}{mark}", soft_wrap=True)
        console.print(Text(f"           {render_finding(each.code, each.args, 'remedy')}", "dim"), soft_wrap=True)
    if not layers.bottlenecks:
        console.print(Text(f"  none beyond the rules' floors in {layers.num_forwards} forwards", "dim"))
    _show_notes(console, layers)


def _show_notes(console: Console, layers: "LayerProfile") -> None:
    for text, number in layers.notes.items():
        console.print(Text(f"  note ({number}x): {text}", "yellow"), soft_wrap=True)


def _layer_table(layers: "LayerProfile") -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("layer", "ms", "p95", "forward", "router", "experts", "rest"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True, min_width=_BAR_WIDTH)
    for layer in layers.layers:
        parts = layer.parts
        rest = 1 - sum(_known(parts[name].share) for name, _ in _SEGMENTS)
        table.add_row(
            str(layer.layer_index),
            _number(layer.median_ms),
            _number(layer.p95_ms),
            _percent(layer.share_of_forward),
            _percent(parts["router"].share),
            _percent(parts["experts"].share),
            _percent(rest),
            _bar(layer),
        )
    return table


def _bar(layer: "LayerTimes") -> Text:
    bar, used = Text(), 0
    for name, colour in _SEGMENTS:
        width = round(_known(layer.parts[name].share) * _BAR_WIDTH)
        bar.append("█" * width, colour)
        used += width
    return bar.append("░" * max(0, _BAR_WIDTH - used))


def _reasons(layers: "LayerProfile") -> list[str]:
    parts = [item for layer in layers.layers for item in layer.parts.items()]
    return sorted({f"{name}: {part.reason}" for name, part in parts if part.reason})


def _show_experts(console: Console, layers: "LayerProfile") -> None:
    console.print(Text("\nExperts that take most", "bold"))
    rows = [(expert, layer) for layer in layers.layers for expert in layer.experts]
    rows.sort(key=lambda row: -row[0].median_ms * row[0].num_calls)
    for expert, layer in rows[:_NUM_EXPERTS]:
        mark = "estimated" if expert.is_estimated else "measured"
        console.print(
            f"  layer {layer.layer_index} expert {expert.expert_id:<4}{_tables.bar(expert.share, 12)} "
            f"{expert.share:6.1%} of the layer's, {expert.median_ms * 1e3:,.0f} µs a call ({mark})",
            soft_wrap=True,
        )
    for layer in layers.layers:
        if layer.expert_reason and (not layer.experts or layer is layers.layers[0]):
            console.print(Text(f"  – layer {layer.layer_index}: {layer.expert_reason}", "dim"), soft_wrap=True)
    fitted = [layer for layer in layers.layers if layer.model.is_fitted]
    if fitted:
        errors = [layer.model.held_out_error for layer in fitted]
        sizes = [(layer.model.worst, layer.layer_index) for layer in fitted]
        worst = max(((size, layer) for size, layer in sizes if size is not None), key=lambda each: each[0].error)
        lines = [
            "time = a + b x rows + c x active experts, fitted to the calls of each layer; on calls held out it is off "
            f"by {min(errors):.0%} to {max(errors):.0%} by layer (medians by size of the calls, weighted by time)",
            _most_off(*worst),
            *sorted({layer.model.note for layer in fitted if layer.model.note}),
        ]
        for line in lines:
            console.print(Text(f"  – {line}", "dim"), soft_wrap=True)


def _most_off(size: "SizeError", layer: int) -> str:
    judged = f"{size.num_held_out} of {size.num_calls} calls held out"
    return f"most in layer {layer} for calls with {size.rows}: {size.error:.0%} (median, {judged})"


def _show_roofline(console: Console, layers: "LayerProfile") -> None:
    roofline = layers.roofline
    console.print(Text("\nRoofline of the experts, a step", "bold"))
    if not len(roofline.points):
        console.print(Text(f"  not applicable: {roofline.reason}", "dim"), soft_wrap=True)
        return
    console.print(
        f"  {roofline.median('distinct_experts'):.0f} distinct experts (summed over layers), "
        f"{roofline.median('active_bytes') / 1e6:,.2f} MB of active weights, "
        f"{roofline.median('intensity'):.2f} FLOP/byte",
        soft_wrap=True,
    )
    console.print(f"  achieved {roofline.median('gbps'):,.2f} GB/s and {roofline.median('gflops'):,.2f} GFLOP/s")
    if roofline.peak is not None:
        peak = roofline.peak
        console.print(
            f"  roof {peak.gbps:,.1f} GB/s and {peak.gflops:,.1f} GFLOP/s ({peak.source}); "
            f"{roofline.attained_share:.1%} of what is attainable at that intensity ({roofline.side} side)",
            soft_wrap=True,
        )


def _known(value: float) -> float:
    return value if value == value else 0.0


def _number(value: float) -> str:
    return "–" if value != value else f"{value:.3f}"


def _percent(value: float) -> str:
    return "–" if value != value else f"{value:.1%}"
