"""What a block makes of the sum of its experts' outputs is `LayerInfo.block_scale`, seen by silencing all experts."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from zoo.build import ALL

from moe_debugger import MoEDebugger

# A norm (or a projection, in muse_spark) follows the experts in the same module: no number scales their sum.
_MORE_BEHIND = ("axk1", "diffusion_gemma", "gemma4_text", "muse_spark")


def _first(value: Any) -> torch.Tensor:
    tensor: torch.Tensor = value[0] if isinstance(value, tuple) else value
    return tensor.detach().clone()


@contextmanager
def _scales_of(model: nn.Module, blocks: Collection[str]) -> Iterator[dict[str, torch.Tensor]]:
    """Run each block twice, with its experts and with silent ones, and collect what a unit of their output gives."""
    scales: dict[str, torch.Tensor] = {}
    modules = dict(model.named_modules())
    wrapped: list[nn.Module] = []
    for block_name in blocks:
        block, experts = modules[block_name], modules[f"{block_name}.experts"]
        kept: list[torch.Tensor] = []

        def run_experts(*args: Any, _run: Any = experts.forward, _kept: list[torch.Tensor] = kept) -> Any:
            output = _run(*args)
            if _kept and _kept[0].numel() == 0:
                return torch.zeros_like(output)
            _kept[:] = [output.detach().clone()]
            return output

        def run_block(
            *args: Any,
            _run: Any = block.forward,
            _kept: list[torch.Tensor] = kept,
            _name: str = block_name,
            **kwargs: Any,
        ) -> Any:
            copies = [value.clone() if isinstance(value, torch.Tensor) else value for value in args]
            _kept.clear()
            output = _run(*args, **kwargs)
            summed = _kept[0]
            _kept[:] = [torch.empty(0)]
            difference = (_first(output) - _first(_run(*copies, **kwargs))).reshape(summed.shape).double()
            scales[_name] = (difference * summed.double()).sum() / summed.double().square().sum()
            assert torch.allclose(difference, scales[_name] * summed.double(), atol=1e-4), f"{_name} does not scale"
            return output

        experts.__dict__["forward"], block.__dict__["forward"] = run_experts, run_block
        wrapped += [experts, block]
    try:
        yield scales
    finally:
        for module in wrapped:
            del module.__dict__["forward"]


@pytest.mark.parametrize("name", [name for name in ALL if name not in _MORE_BEHIND])
def test_the_block_scales_the_sum_of_its_experts_by_what_the_layer_says(name: str) -> None:
    build = ALL[name]
    model = build.make()
    with MoEDebugger(model) as debugger:
        said = {layer.module_name: layer.block_scale for layer in debugger.layers() if layer.adapter == "standard"}
    with torch.no_grad(), _scales_of(model, said) as scales:
        model(**build.inputs(model))
    for block, scale in scales.items():
        assert float(scale) == pytest.approx(said[block], rel=1e-4), block


def test_blocks_that_scale_are_among_them() -> None:
    for name in ("beam", "laguna", "minimax_m3_vl_text", "step3p7", "openai_privacy_filter"):
        with MoEDebugger(ALL[name].make()) as debugger:
            assert all(layer.block_scale != 1 for layer in debugger.layers()), name
