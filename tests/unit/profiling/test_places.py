"""What of a layer is timed, and what its weights weigh, by structure."""

import math

import pytest
import tiny_moe
import torch
from oracle.builds import EVERY_BUILD
from timed_moe import ListModel
from torch import nn

from moe_debugger.capture.discovery import find_sites
from moe_debugger.profiling.places import LayerPlan, Part, _expert_weights, layer_plan


def _plans(model: nn.Module) -> list[LayerPlan]:
    modules = dict(model.named_modules(remove_duplicate=False))
    return [layer_plan(site, modules) for site in find_sites(model).sites]


def test_experts_in_one_call() -> None:
    (plan, *_) = _plans(tiny_moe.build("olmoe"))
    assert plan.layout == "fused"
    assert [place.part for place in plan.places] == [Part.BLOCK, Part.ROUTER, Part.EXPERTS]
    # gate and up [64, 32], down [32, 32] in float32.
    assert plan.expert_bytes == (64 * 32 + 32 * 32) * 4
    assert plan.flops_per_row == 2 * (64 * 32 + 32 * 32)


def test_biases_weigh_but_compute_no_products() -> None:
    (plan, *_) = _plans(tiny_moe.build("gpt_oss"))
    weights = 64 * 32 + 32 * 32
    assert plan.expert_bytes == (weights + 64 + 32) * 4
    assert plan.flops_per_row == 2 * weights


def test_experts_that_are_modules() -> None:
    (plan, *_) = _plans(ListModel(1, 3))
    assert plan.layout == "modules"
    assert [(place.part, place.expert_id) for place in plan.places] == [
        (Part.BLOCK, -1), (Part.ROUTER, -1), (Part.EXPERT, 0), (Part.EXPERT, 1), (Part.EXPERT, 2),
    ]  # fmt: skip
    assert plan.expert_bytes == 16 * 16 * 4
    assert plan.read_ids is None, "their rows are those that they are called with"


def test_shared_experts_have_a_place() -> None:
    (plan, *_) = _plans(tiny_moe.build("deepseek_v3"))
    assert Part.SHARED in [place.part for place in plan.places]
    assert "shared" not in plan.reasons


@pytest.mark.parametrize(
    ("name", "layout"), [("llama4_text", "dense"), ("doge", "whole"), ("switch_transformers", "modules")]
)
def test_other_layouts(name: str, layout: str) -> None:
    plans = _plans(EVERY_BUILD[name].make())
    assert {plan.layout for plan in plans} == {layout}
    if layout == "whole":
        assert "not separable" in plans[0].reasons["experts"]


def test_matrices_of_all_experts_in_one_stack() -> None:
    stacked = nn.Module()
    stacked.w1 = nn.Parameter(torch.zeros(4 * 10, 6, dtype=torch.bfloat16))
    assert _expert_weights(stacked, [], 4) == (60 * 2, 120)
    nothing = nn.Module()
    assert all(math.isnan(value) for value in _expert_weights(nothing, [], 4))
