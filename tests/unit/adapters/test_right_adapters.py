"""Adapters that are right are proven, and the model is left as it was."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from unit.adapters.stand_ins import (
    EXPERTS,
    Block,
    BlockAdapter,
    Decoder,
    DenseAdapter,
    DenseLayer,
    MixtralAdapter,
    SequenceFirstAdapter,
    example,
    make,
    make_mixtral,
)

from moe_debugger import Adapter, Call, InvalidInputError, ModelNotSupportedError, Routing, check_adapter


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_the_glam_of_the_examples_is_proven_with_its_dropped_slots() -> None:
    model = example("modeling_glam").tiny_model()
    result = check_adapter(example("glam_adapter").GlamAdapter(), model)
    assert result.agrees, result
    assert [layer.module_name for layer in result.layers] == ["layers.1.feed_forward", "layers.3.feed_forward"]
    for layer in result.layers:
        # 56 tokens with two slots each: every slot is accounted for.
        assert (layer.num_experts_checked, layer.num_slots + layer.num_empty_slots) == (64, 112)
        # Each expert has room for 3 tokens, and 14 tokens are padding.
        assert layer.num_slots > 50
        assert layer.num_empty_slots > 28
        assert layer.weight_proof == "expert_output"
        assert layer.max_weight_error < 1e-5
    assert "why slots are empty" in str(result)


def test_without_expert_output_the_weights_are_proven_by_changing_them() -> None:
    class Short(example("glam_adapter").GlamAdapter):  # type: ignore[misc]
        expert_output = Adapter.expert_output

    result = check_adapter(Short(), example("modeling_glam").tiny_model(), max_experts=20)
    assert result.agrees, result
    assert [layer.weight_proof for layer in result.layers] == ["changed weights"] * 2
    assert [layer.num_experts_checked for layer in result.layers] == [20, 20]
    assert "44 experts beyond max_experts (every layer)" in result.not_checked
    assert "expert_output would tell" in str(result)


@pytest.mark.parametrize(
    "options",
    [{}, {"scale": 2.5}, {"block_scale": 0.5}, {"scales_input": True}, {"dropout": 0.5}],
    ids=lambda options: next(iter(options), "plain"),
)
def test_a_list_of_experts_beside_a_shared_one_is_proven(options: dict[str, Any]) -> None:
    result = check_adapter(BlockAdapter(), make(Decoder(Block(**options), Block(**options))))
    assert result.agrees, result
    assert [(layer.weight_proof, layer.num_slots) for layer in result.layers] == [("expert_output", 112)] * 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_every_precision_is_proven_within_its_rounding(dtype: torch.dtype) -> None:
    result = check_adapter(BlockAdapter(), make(Decoder(Block(), Block())).to(dtype))
    assert result.agrees, result
    for layer in result.layers:
        assert layer.max_weight_error <= layer.weight_tolerance


@pytest.mark.parametrize("adapter", [DenseAdapter(), SequenceFirstAdapter()], ids=["batch first", "sequence first"])
def test_dense_maps_as_of_megatron_core_are_proven(adapter: DenseAdapter) -> None:
    model = make(Decoder(DenseLayer(), DenseLayer(), is_sequence_first=adapter.is_sequence_first))
    result = check_adapter(adapter, model)
    assert result.agrees, result
    assert not any("in order" in text for text in result.not_checked)


def test_an_adapter_that_computes_the_choice_itself_is_proven_by_the_experts_modules() -> None:
    class FromScores(BlockAdapter):
        def read(self, call: Call) -> Routing:
            scores = call.output.scores
            ids = (scores + call.module.get_buffer("bias")).topk(2, dim=-1).indices
            weights = scores.gather(1, ids)
            return Routing(expert_ids=ids, gate_weights=weights / weights.sum(dim=-1, keepdim=True))

    assert check_adapter(FromScores(), make(Decoder(Block()))).agrees


def test_the_arguments_of_fused_experts_are_read_before_their_call() -> None:
    model = make_mixtral().train()
    result = check_adapter(MixtralAdapter(), model)
    assert result.agrees, result
    assert [layer.num_slots for layer in result.layers] == [112, 112]
    assert model.training


def test_the_model_is_left_bit_by_bit_as_it_was() -> None:
    model = make(Decoder(Block(dropout=0.5), Block())).train()
    model.layers[1].eval()
    before, modes = state_of(model), [module.training for module in model.modules()]
    random = torch.get_rng_state()
    check_adapter(BlockAdapter(), model)
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_the_model_is_left_as_it_was_when_the_adapter_fails_half_way() -> None:
    class Fails(BlockAdapter):
        def expert_output(self, module: Block, expert_id: int, hidden: Tensor) -> Tensor:
            if expert_id == 3:
                raise RuntimeError("no expert 3")
            output: Tensor = module.experts[expert_id](hidden)
            return output

    model = make(Decoder(Block()))
    before = state_of(model)
    result = check_adapter(Fails(), model)
    assert "expert_output(module, 3, hidden): RuntimeError: no expert 3" in str(result)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_rows_of_a_mask_and_identity_experts_are_understood() -> None:
    class Masked(Block):
        def forward(self, hidden: Tensor) -> Tensor:
            rows = hidden.reshape(-1, hidden.shape[-1])
            self.mask = rows[:, 0] > 0
            output = rows.clone()
            output[self.mask] = super().forward(rows[self.mask])
            return output.view_as(hidden)

    class MaskedAdapter(BlockAdapter):
        def read(self, call: Call) -> Routing:
            return Routing(expert_ids=call.output.ids, gate_weights=call.output.weights, row_mask=masked.mask)

    masked = Masked()
    result = check_adapter(MaskedAdapter(), make(Decoder(masked)))
    assert result.agrees, result
    assert 0 < result.layers[0].num_slots < 112


def test_inputs_may_be_given_and_say_when_they_are_needed() -> None:
    model = make(Decoder(Block()))
    result = check_adapter(BlockAdapter(), model, {"input_ids": torch.arange(30).view(3, 10)})
    assert result.layers[0].num_tokens == 30
    with pytest.raises(InvalidInputError, match=r"Block\.forward takes no input_ids.*\(model, inputs\)"):
        check_adapter(BlockAdapter(), make(Block()))
    assert check_adapter(BlockAdapter(), make(Block()), {"hidden": torch.randn(5, 7, 16)}).agrees


def test_an_adapter_that_matches_nothing_is_told_what_it_was_asked_about() -> None:
    with pytest.raises(ModelNotSupportedError, match=r"'dense' matches none of the .* Decoder, Embedding"):
        check_adapter(DenseAdapter(), make(Decoder(Block())))


def test_a_result_is_a_table_and_plain_values() -> None:
    result = check_adapter(BlockAdapter(), make(Decoder(Block())))
    assert result.to_dict()["layers"][0]["num_experts"] == EXPERTS
    assert "layers.0" in str(result)
    result.raise_if_wrong()
