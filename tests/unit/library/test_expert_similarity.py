"""Experts of real architectures, one of which is made another's copy with its hidden units in another order."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tiny_moe
import torch
from torch import Tensor, nn
from zoo.build import ALL
from zoo.custom import CUSTOM

import moe_debugger
from moe_debugger import MoEDebugger
from moe_debugger.capture import find_sites
from moe_debugger.errors import InvalidInputError, ModelNotSupportedError

SOURCE, COPY = 1, 5


def experts_of(model: Any, layer: int = 0) -> Any:
    return find_sites(model).sites[layer].experts


def halves(order: Tensor) -> Tensor:
    """Order of rows of gate and up, one half each."""
    return torch.cat([order, order + len(order)])


def pairs(order: Tensor) -> Tensor:
    """Order of rows of gate and up that stand by turns."""
    return torch.stack([2 * order, 2 * order + 1], dim=1).flatten()


def fused(experts: Any, order: Tensor) -> None:
    experts.gate_up_proj[COPY] = experts.gate_up_proj[SOURCE][halves(order)]
    experts.down_proj[COPY] = experts.down_proj[SOURCE][:, order]


def gpt_oss(experts: Any, order: Tensor) -> None:
    experts.gate_up_proj[COPY] = experts.gate_up_proj[SOURCE][:, pairs(order)]
    experts.gate_up_proj_bias[COPY] = experts.gate_up_proj_bias[SOURCE][pairs(order)]
    experts.down_proj[COPY] = experts.down_proj[SOURCE][order]
    experts.down_proj_bias[COPY] = experts.down_proj_bias[SOURCE]


def transposed(experts: Any, order: Tensor) -> None:
    experts.gate_up_proj[COPY] = experts.gate_up_proj[SOURCE][:, halves(order)]
    experts.down_proj[COPY] = experts.down_proj[SOURCE][order]


def up_only(experts: Any, order: Tensor) -> None:
    experts.up_proj[COPY] = experts.up_proj[SOURCE][order]
    experts.down_proj[COPY] = experts.down_proj[SOURCE][:, order]


def dbrx(experts: Any, order: Tensor) -> None:
    num = len(order)
    for weight in (experts.mlp.w1, experts.mlp.v1, experts.mlp.w2):
        weight[COPY * num : (COPY + 1) * num] = weight[SOURCE * num : (SOURCE + 1) * num][order]


def modules(experts: Any, order: Tensor) -> None:
    source, copy = experts[SOURCE], experts[COPY]
    copy.gate_proj.weight[:] = source.gate_proj.weight[order]
    copy.up_proj.weight[:] = source.up_proj.weight[order]
    copy.down_proj.weight[:] = source.down_proj.weight[:, order]


def with_biases(experts: Any, order: Tensor) -> None:
    source, copy = experts[f"expert_{SOURCE}"], experts[f"expert_{COPY}"]
    copy.fc1.weight[:], copy.fc1.bias[:] = source.fc1.weight[order], source.fc1.bias[order]
    copy.fc2.weight[:], copy.fc2.bias[:] = source.fc2.weight[:, order], source.fc2.bias


CASES: dict[str, tuple[Callable[[], Any], Callable[[Any, Tensor], None], bool]] = {
    # Name: model, how its layout copies an expert, whether its experts can be run one by one.
    "mixtral (H = I)": (lambda: tiny_moe.build("mixtral"), fused, True),
    "qwen3_moe (H = 2 I)": (lambda: tiny_moe.build("qwen3_moe"), fused, True),
    "gpt_oss": (lambda: tiny_moe.build("gpt_oss"), gpt_oss, True),
    "aria": (ALL["aria_text"].make if "aria_text" in ALL else ALL["aria"].make, transposed, True),
    "llama4": (ALL["llama4_text"].make, transposed, False),
    "nemotron_h": (ALL["nemotron_h"].make, up_only, True),
    "dbrx": (ALL["dbrx"].make, dbrx, True),
    "nllb_moe": (ALL["nllb_moe"].make, with_biases, True),
    "module list": (CUSTOM["old_style_linear_gate"].make, modules, True),
}


@pytest.mark.parametrize("name", CASES)
def test_a_copy_with_other_unit_order_is_found_whatever_the_layout(name: str) -> None:
    make, copy_expert, can_run = CASES[name]
    model = make()
    experts = experts_of(model)
    size = moe_debugger.expert_similarity(model, 0, experts=[0, 1]).num_units
    order = torch.from_numpy(np.random.default_rng(0).permutation(size))
    with torch.no_grad():
        copy_expert(experts, order)
    tokens = torch.randn(40, 32, generator=torch.Generator().manual_seed(0))
    found = moe_debugger.expert_similarity(model, 0, hidden_states=tokens if can_run else None)
    assert found.is_exact
    assert found.aligned_cosine[SOURCE, COPY] == pytest.approx(1, abs=1e-5)
    assert found.flattened_cosine[SOURCE, COPY] < 0.7
    off = ~np.eye(len(found.expert_ids), dtype=bool)
    off[SOURCE, COPY] = off[COPY, SOURCE] = False
    assert found.aligned_cosine[off].max() < 0.9
    if can_run:
        # The copy is a copy: the model itself computes the same with it.
        assert found.output_cosine[SOURCE, COPY] == pytest.approx(1, abs=1e-4)
        assert found.output_cka[SOURCE, COPY] == pytest.approx(1, abs=1e-3)
        assert found.num_tokens == 40
        assert found.not_applicable == ""


@pytest.mark.parametrize("name", ["mixtral (H = I)", "gpt_oss", "module list"])
def test_units_of_which_one_matrix_has_another_order_are_no_copy(name: str) -> None:
    make, copy_expert, _ = CASES[name]
    model = make()
    experts = experts_of(model)
    with torch.no_grad():
        copy_expert(experts, torch.arange(moe_debugger.expert_similarity(model, 0, experts=[0, 1]).num_units))
        down = experts[COPY].down_proj.weight if name == "module list" else experts.down_proj[COPY]
        down[:] = down.roll(1, dims=0 if name == "gpt_oss" else 1)
    found = moe_debugger.expert_similarity(model, 0, experts=[SOURCE, COPY])
    assert found.aligned_cosine[0, 1] < 0.95


def test_comparing_outputs_counts_no_tokens_and_leaves_the_model_as_it_was() -> None:
    model = tiny_moe.build("olmoe")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with MoEDebugger(model) as debugger:
        found = moe_debugger.expert_similarity(debugger, 1, experts=[2, 0], hidden_states=np.ones((5, 32), np.float32))
        assert debugger.session is not None
        assert len(debugger.session.decisions()["layer_index"]) == 0
    assert found.expert_ids == (2, 0)
    assert found.output_cosine.shape == (2, 2)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_cannot_be_compared_says_so() -> None:
    model = tiny_moe.build("mixtral")
    with pytest.raises(InvalidInputError, match=r"no MoE layer 9; it has \[0, 1, 2\]"):
        moe_debugger.expert_similarity(model, 9)
    with pytest.raises(InvalidInputError, match="different ones of 0 to 7"):
        moe_debugger.expert_similarity(model, 0, experts=[1, 1])
    with pytest.raises(InvalidInputError, match="hidden_states have shape"):
        moe_debugger.expert_similarity(model, 0, hidden_states=np.ones(32))
    llama = ALL["llama4_text"].make()
    partly = moe_debugger.expert_similarity(llama, 0, experts=[0, 1], hidden_states=np.ones((4, 32), np.float32))
    assert partly.num_units > 0
    assert partly.not_applicable.startswith("outputs: the experts of")
    assert np.isnan(partly.output_cosine).all()


def test_weights_that_cannot_be_read_leave_the_outputs() -> None:
    model = CUSTOM["old_style_linear_gate"].make()
    for expert in experts_of(model):
        expert.gate_proj.weight = nn.Parameter(expert.gate_proj.weight.detach().to(torch.float8_e4m3fn), False)
    with pytest.raises(ModelNotSupportedError, match="float8_e4m3fn on cpu, expected plain 16-bit numbers"):
        moe_debugger.expert_similarity(model, 0)
