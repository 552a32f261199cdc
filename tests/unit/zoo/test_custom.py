"""The models that are not of transformers compute what they say, each against a slow loop over tokens."""

import math
from typing import Any

import pytest
import torch
from zoo.custom import CUSTOM, GateModuleMoE, LinearGateMoE, glam_module

torch.set_num_threads(1)


def assert_close(got: torch.Tensor, expected: Any) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.fixture
def glam() -> Any:
    torch.manual_seed(0)
    module = glam_module()
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    # Room for all: else a token's experts depend on the other tokens of its forward, and parts differ from the whole.
    return module.GlamForCausalLM(module.GlamConfig(**sizes, num_attention_heads=2, capacity_factor=64.0)).eval()


@pytest.mark.parametrize("capacity_factor", [0.4, 0.7, 8.0])
def test_glam_routes_first_choices_before_second_ones_within_capacity(capacity_factor: float) -> None:
    module = glam_module()
    torch.manual_seed(1)
    num_tokens, num_experts = 20, 4
    router = module.GlamRouter(
        module.GlamConfig(hidden_size=8, num_experts=num_experts, capacity_factor=capacity_factor)
    )
    hidden, is_token = torch.randn(num_tokens, 8), torch.arange(num_tokens) % 5 != 0

    routing = router(hidden, is_token)

    scores, chosen = router.gate(hidden).softmax(dim=-1).topk(2, dim=-1)
    room = [math.ceil(capacity_factor * 2 * num_tokens / num_experts)] * num_experts
    expected = torch.zeros(num_tokens, num_experts)
    num_refused = 0
    for choice in range(2):
        for token in range(num_tokens):
            expert_id = int(chosen[token, choice])
            if not is_token[token]:
                continue
            if room[expert_id] > 0:
                expected[token, expert_id] = scores[token, choice] / scores[token].sum()
            else:
                num_refused += 1
            room[expert_id] -= 1
    assert_close(routing.probabilities, expected)
    assert torch.equal(routing.routing_map, expected > 0)
    assert torch.equal(routing.chosen, chosen)
    assert (num_refused > 0) == (capacity_factor < 8.0)


def test_glam_has_experts_in_every_other_layer_and_a_balance_loss_of_one_when_even(glam: Any) -> None:
    names = [name for name, module in glam.named_modules() if isinstance(module, glam_module().GlamMoE)]
    assert names == ["layers.1.feed_forward"]
    torch.nn.init.zeros_(glam.layers[1].feed_forward.router.gate.weight)
    ids = torch.arange(3, 35)[None]
    # All scores are equal: the mean probability of each expert is 1 / 64, so their weighted sum is 64 x 1 / 64.
    assert glam(ids).aux_loss.item() == pytest.approx(1.0)
    assert glam(ids, labels=ids).loss.requires_grad


def test_glam_gives_the_same_logits_in_parts_and_behind_padding(glam: Any) -> None:
    ids = torch.arange(3, 27).view(2, 12)
    whole = glam(ids).logits
    first = glam(ids[:, :7], use_cache=True)
    rest = glam(ids[:, 7:], past_key_values=first.past_key_values, use_cache=True)
    assert_close(rest.logits, whole[:, 7:])
    padding = torch.zeros(2, 3, dtype=torch.int64)
    mask = torch.cat([padding, torch.ones_like(ids)], dim=1)
    padded = glam(torch.cat([padding, ids], dim=1), attention_mask=mask)
    assert_close(padded.logits[:, 3:], whole)


@pytest.mark.parametrize("layer_index", [1, 2])
def test_old_style_linear_gate_sums_its_best_two_experts(layer_index: int) -> None:
    block: Any = CUSTOM["old_style_linear_gate"].make().get_submodule(f"layers.{layer_index}.mlp")
    assert isinstance(block, LinearGateMoE)
    assert block.norm_topk_prob == (layer_index == 1)
    hidden = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(2))
    for row, output in zip(hidden.flatten(0, 1), block(hidden).flatten(0, 1), strict=True):
        scores = block.gate(row).softmax(dim=-1)
        best = scores.argsort(descending=True)[:2].tolist()
        total = scores[best].sum() if block.norm_topk_prob else 1.0
        expected = sum(scores[expert_id] / total * block.experts[expert_id](row) for expert_id in best)
        assert_close(output, expected)


def test_old_style_gate_module_sums_the_experts_that_its_gate_returns() -> None:
    block: Any = CUSTOM["old_style_gate_module"].make().get_submodule("layers.1.mlp")
    assert isinstance(block, GateModuleMoE)
    hidden = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(3))
    ids, weights, _ = block.gate(hidden)
    outputs = block(hidden).flatten(0, 1)
    for index, row in enumerate(hidden.flatten(0, 1)):
        routed = sum(
            weight * block.experts[expert_id](row)
            for expert_id, weight in zip(ids[index].tolist(), weights[index], strict=True)
        )
        assert_close(outputs[index], routed + block.shared_experts(row))
    # The bias matters: with it, other experts are best than by the scores alone.
    with torch.no_grad():
        block.gate.e_score_correction_bias.zero_()
    assert block.gate(hidden)[0].sort(dim=-1).values.tolist() != ids.sort(dim=-1).values.tolist()
