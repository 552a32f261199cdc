"""Training: captured is what ran in that forward, and outputs, losses and gradients are those without the debugger.

Dropout and the routers' noise are on wherever a family has them. The oracle replays the experts with the very arguments
of their call, so it follows whatever noise there was before it.
"""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from oracle.compare import Comparison, compare
from oracle.matrix import merge
from oracle.observe import WEIGHT_ROUNDING, bare, is_same, state_of, tensors_of, watch
from oracle.outcome import Impossible
from oracle.registry import register_mode
from torch import nn
from zoo.build import Build

from moe_debugger import MoEDebugger
from moe_debugger.v1 import routing_pb2 as pb

_RATE = 0.1
# Attributes of the library's modules, read at each forward: rates of dropout, and widths of a router's noise.
_DROPOUTS = ("attention_dropout", "dropout", "resid_pdrop", "moe_token_dropout")
_NOISES = ("jitter_noise", "input_jitter_noise", "moe_jitter_eps")

Steps = Callable[[Any, Mapping[str, Any], MoEDebugger | None], list[torch.Tensor]]


@register_mode("training")
def training(build: Build) -> Comparison:
    """Two optimizer steps, neither dropout nor noise."""
    return _trains(build, None, _two_steps, is_noisy=False)


@register_mode("training with noise")
def training_with_noise(build: Build) -> Comparison:
    """Two optimizer steps with dropout, and with noise in the router where the family has any."""
    return _trains(build, None, _two_steps)


@register_mode("checkpointing")
def checkpointing(build: Build) -> Comparison:
    """Gradient checkpointing, not reentrant, with noise: what the backward pass computes again is counted once."""
    return _trains(build, False, _two_steps)


@register_mode("checkpointing, reentrant")
def checkpointing_reentrant(build: Build) -> Comparison:
    """The same by torch's reentrant way, which runs the first pass without gradients."""
    return _trains(build, True, _two_steps)


@register_mode("gradient accumulation")
def gradient_accumulation(build: Build) -> Comparison:
    """Two backward passes before an optimizer step: both forwards are of that step."""
    result = _trains(build, None, _accumulated)
    # Where the bare model has no checkpointing, that is another column's.
    with contextlib.suppress(Impossible):
        merge(result, _trains(build, False, _accumulated))
    return result


def _trains(build: Build, use_reentrant: bool | None, steps: Steps, *, is_noisy: bool = True) -> Comparison:
    def made() -> Any:
        return _prepared_for_training(build, use_reentrant, is_noisy=is_noisy)

    model = made()
    inputs = build.inputs(model)
    expected = bare(lambda model: steps(model, inputs, None), model)
    before = state_of(model)
    model.load_state_dict(made().state_dict())
    with watch(model, step_domain="global") as (oracle, debugger):
        kept = steps(model, inputs, debugger)
        assert debugger.session is not None
        decisions = debugger.session.decisions()
    result = compare(decisions, oracle.calls, weight_rounding=WEIGHT_ROUNDING)
    if not is_same(expected, kept):
        result.add_problem("outputs, losses, gradients or weights with the debugger differ from those without")
    if before != state_of(model):
        result.add_problem("the model's hooks, methods or modes are not as they were before the debugger")
    if set(decisions.phase.tolist()) != {pb.PHASE_TRAIN}:
        result.add_problem(f"phases {sorted(set(decisions.phase.tolist()))}, all should be train")
    for layer_index in decisions.layers:
        rows = decisions.layer_index == layer_index
        pairs = np.unique(np.stack([decisions.step[rows], decisions.forward_index[rows]]), axis=1)
        expected_steps = [4, 4, 5, 5] if steps is _accumulated else [4, 5]
        # NLLB-MoE leaves layers out at random while it trains: the number of calls is the oracle's to check.
        is_skipped = pairs.shape[1] < len(expected_steps) and set(pairs[0]) <= set(expected_steps)
        if pairs[0].tolist() != expected_steps and not (is_skipped and build.name == "nllb_moe"):
            result.add_problem(f"layer {layer_index}: the forwards are of steps {pairs[0].tolist()}")
    if use_reentrant is not None and not oracle.num_recomputed:
        raise Impossible("with gradient checkpointing on, no layer with experts is computed a second time")
    return result


def _prepared_for_training(build: Build, use_reentrant: bool | None, *, is_noisy: bool) -> nn.Module:
    model: Any = build.make()
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = _RATE if is_noisy else 0.0
        for name in (*_DROPOUTS, *(_NOISES if is_noisy else ())):
            value = getattr(module, name, 0)
            # A Dropout module may have one of these names.
            if name in vars(module) and (value is None or isinstance(value, float | int)):
                setattr(module, name, _RATE if is_noisy else 0.0)
        if is_noisy and hasattr(module, "second_expert_policy"):
            module.__dict__["second_expert_policy"] = "random"
    if use_reentrant is not None:
        if not getattr(model, "supports_gradient_checkpointing", False):
            raise Impossible(f"{type(model).__name__} does not support gradient checkpointing")
        model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
        model.enable_input_require_grads()
    return model  # type: ignore[no-any-return]


def _two_steps(model: Any, inputs: Mapping[str, Any], debugger: MoEDebugger | None) -> list[torch.Tensor]:
    return _run(model, inputs, debugger, num_passes=1)


def _accumulated(model: Any, inputs: Mapping[str, Any], debugger: MoEDebugger | None) -> list[torch.Tensor]:
    return _run(model, inputs, debugger, num_passes=2)


def _run(model: Any, inputs: Mapping[str, Any], debugger: MoEDebugger | None, num_passes: int) -> list[torch.Tensor]:
    """Return outputs, losses and gradients of two steps, and the weights after them."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    options = {"use_cache": False} if hasattr(getattr(model, "config", None), "use_cache") else {}
    kept: list[torch.Tensor] = []
    for step in (4, 5):
        if debugger is not None:
            debugger.step(step)
        for _ in range(num_passes):
            output = model(**inputs, **options)
            main = next(tensors_of(output))
            loss: Any = main.float().square().mean() / num_passes
            loss.backward()
            kept += [main.detach().clone(), loss.detach().clone()]
        kept.extend(p.grad.clone() for p in model.parameters() if p.grad is not None)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    kept.extend(parameter.detach().clone() for parameter in model.parameters())
    return kept
