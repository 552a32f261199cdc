"""`moe-debugger trace`: one prompt, and what the routers did with it."""

import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from moe_debugger.cli._output import PlainConsole
from moe_debugger.config import Config, load_config
from moe_debugger.errors import InvalidInputError

if TYPE_CHECKING:
    from moe_debugger._debugger import MoEDebugger
    from moe_debugger.models import LoadedModel

__all__ = ["PromptResult", "debug_model", "run_prompt", "trace"]


@dataclass(frozen=True, slots=True)
class PromptResult:
    """A prompt's tokens and those that were generated."""

    prompt_ids: list[int]
    generated_ids: list[int]
    pieces: list[bytes]

    @property
    def generated_text(self) -> str:
        """The generated text; broken characters are replaced."""
        return b"".join(self.pieces[len(self.prompt_ids) :]).decode("utf-8", errors="replace")


def trace(
    prompt: Annotated[str, typer.Option("--prompt", help="Text to run.", metavar="TEXT")],
    model: Annotated[
        str | None, typer.Option("--model", metavar="PATH", help="`demo` (default), or a folder with safetensors.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, max=4096, help="Tokens to generate.")] = 32,
    layer: Annotated[int | None, typer.Option(min=0, help="Show this MoE layer only.")] = None,
    is_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
    no_color: Annotated[bool, typer.Option("--no-color", help="Print without colours.")] = False,
    record: Annotated[
        Path | None,
        typer.Option("--record", metavar="DIR", help="Record it to this new folder."),
    ] = None,
    config: Annotated[Path | None, typer.Option(metavar="FILE", help="YAML file, see docs/configuration.md.")] = None,
) -> None:
    """Run one prompt and show the routing: load per layer, unused and hot experts, confidence, each token's experts.

    Examples:

    \b
      moe-debugger trace --prompt "def add(a, b):"
      moe-debugger trace --model ./my-mixtral --prompt "Hello" --layer 2
      moe-debugger trace --prompt "1 + 1 =" --json | jq .layers
      moe-debugger trace --prompt "Once upon a time" --record runs/story
    """
    settings = load_config(config) if config is not None else Config()
    with debug_model(settings, model) as (loaded, debugger):
        num_layers = len(debugger.layers())
        if layer is not None and layer >= num_layers:
            raise InvalidInputError(f"--layer {layer}: the model has MoE layers 0 to {num_layers - 1}")
        session = debugger.session
        assert session is not None
        with nullcontext() if record is None else session.record(record):
            result = run_prompt(loaded, prompt, max_new_tokens)
        if is_json:
            sys.stdout.write(json.dumps(_as_json(loaded, debugger, result, layer), allow_nan=False) + "\n")
        else:
            show_result(PlainConsole(no_color=no_color or None, highlight=False), loaded, debugger, result, layer)


@contextmanager
def debug_model(settings: Config, model: str | None = None) -> "Iterator[tuple[LoadedModel, MoEDebugger]]":
    """Load the model that `settings` and `model` name, and capture it, on this machine alone."""
    from moe_debugger._debugger import MoEDebugger
    from moe_debugger.analysis import Thresholds
    from moe_debugger.models import load_model

    given = {name: value for name, value in settings.thresholds.model_dump().items() if value is not None}
    loaded = load_model(
        model or settings.model.path or "demo",
        device=settings.model.device or "auto",
        precision=settings.model.precision or "auto",
    )
    level = settings.capture.level or "routes+tokens"
    with MoEDebugger(
        loaded.model,
        level=level,
        sampling_rate=1.0 if settings.capture.sampling_rate is None else settings.capture.sampling_rate,
        buffer_bytes=settings.capture.buffer_size or 64 * 1024 * 1024,
        thresholds=Thresholds(**given) if given else None,
        session_name=loaded.name,
    ) as debugger:
        yield loaded, debugger


def run_prompt(loaded: "LoadedModel", prompt: str, max_new_tokens: int) -> PromptResult:
    """Generate greedily from `prompt`.

    Raises:
        InvalidInputError: the prompt has no tokens, or is too long for the model.
    """
    import torch

    prompt_ids = loaded.tokenizer.encode(prompt)
    if not prompt_ids:
        raise InvalidInputError("the prompt is empty; give some text with --prompt")
    limit = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(limit, int) and len(prompt_ids) + max_new_tokens > limit:
        raise InvalidInputError(
            f"{len(prompt_ids)} prompt tokens and {max_new_tokens} new ones are more than the model's {limit} "
            "positions; shorten the prompt or lower --max-new-tokens"
        )
    ids = torch.tensor([prompt_ids], device=loaded.model.device)
    eos = loaded.tokenizer.eos_token_id
    with torch.no_grad():
        output = loaded.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=0 if eos is None else eos,
        )
    tokens = [int(token) for token in output[0]]
    pieces = [loaded.tokenizer.piece(token) for token in tokens]
    return PromptResult(tokens[: len(prompt_ids)], tokens[len(prompt_ids) :], pieces)


def show_result(
    console: Console, loaded: "LoadedModel", debugger: "MoEDebugger", result: PromptResult, layer: int | None
) -> None:
    """Print everything about a prompt that ran."""
    from moe_debugger.cli import _trace_view as view

    session = debugger.session
    assert session is not None
    stats, performance = session.get_routing_stats(), session.get_performance_metrics()
    console.print(Text(f"{loaded.name} ({loaded.model_type})", "bold"))
    console.print(
        Text(
            f"{len(result.prompt_ids)} prompt tokens, {len(result.generated_ids)} generated, {stats.num_tokens} routed "
            f"per layer, {performance.tokens_per_s:,.0f} tokens/s, {performance.hook_time_share:.1%} of it in hooks",
            "dim",
        )
    )
    console.print(Text("→ ", "green").append(result.generated_text.encode("unicode_escape").decode()[:400]))
    for part in view.layer_loads(stats, session.get_expert_metrics(), layer):
        console.print(part)
    decisions = session.decisions()
    if len(decisions):
        console.print(Text("\nEach token's experts, strongest first, in the strongest one's colour", "bold"))
        num_prompt = len(result.prompt_ids)
        console.print(view.token_lines(decisions, result.pieces, num_prompt, layer, console.width))
    elif stats.num_tokens:
        console.print(Text('\nNo rows are kept at level "counts": set capture.level to "routes" to see tokens', "dim"))
    view.print_findings(console, session.diagnose(), stats.num_tokens)


def _as_json(loaded: "LoadedModel", debugger: "MoEDebugger", result: PromptResult, layer: int | None) -> dict[str, Any]:
    session = debugger.session
    assert session is not None
    stats, experts, decisions = session.get_routing_stats(), session.get_expert_metrics(), session.decisions()
    analysis = session.diagnose()
    chosen = [item for item in stats.layers if layer is None or item.info.layer_index == layer]
    tokens: list[dict[str, Any]] = [
        {"position": i, "token_id": token, "text": piece.decode("utf-8", errors="backslashreplace"), "layers": {}}
        for i, (token, piece) in enumerate(zip(result.prompt_ids + result.generated_ids, result.pieces, strict=True))
    ]
    for row in range(len(decisions)):
        index, position = int(decisions.layer_index[row]), int(decisions.position[row])
        if decisions.is_padding[row] or position >= len(tokens) or (layer is not None and index != layer):
            continue
        tokens[position]["layers"][str(index)] = {
            "experts": decisions.expert_ids[row].tolist(),
            "weights": [round(float(weight), 4) for weight in decisions.gate_weights[row]],
        }
    answer = {
        "model": loaded.name,
        "model_type": loaded.model_type,
        "num_prompt_tokens": len(result.prompt_ids),
        "num_generated_tokens": len(result.generated_ids),
        "generated_text": result.generated_text,
        "layers": [item.to_dict() for item in chosen],
        "unused_experts": {str(item.info.layer_index): list(item.unused_experts) for item in chosen},
        "hottest_experts": [
            {"layer_index": row.layer_index, "expert_id": row.expert_id, "load_ratio": row.load_ratio}
            for row in experts.hottest(10)
            if layer is None or row.layer_index == layer
        ],
        "tokens": tokens,
        "findings": [finding.to_dict() for finding in analysis.findings],
        "problems": list(analysis.problems),
        "performance": session.get_performance_metrics().to_dict(),
    }
    return _without_nan(answer)  # type: ignore[no-any-return]


def _without_nan(value: Any) -> Any:
    """Return `value` with None for NaN and infinity, which JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return value
