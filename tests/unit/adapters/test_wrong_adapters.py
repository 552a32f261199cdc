"""Adapters with a mistake are refused, with the layer, the token, what was said, what was seen, and what to do."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from unit.adapters.stand_ins import (
    EXPERTS,
    TOP_K,
    Block,
    BlockAdapter,
    Decoder,
    DenseAdapter,
    DenseLayer,
    example,
    make,
)

from moe_debugger import Adapter, AdapterCheck, Call, LayerShape, ModelNotSupportedError, Routing, check_adapter


def refusal(adapter: Any, model: nn.Module | None = None, **options: Any) -> str:
    """Return the text with which `adapter` is refused on a model of one `Block`."""
    result: AdapterCheck = check_adapter(adapter, make(Decoder(Block(**options))) if model is None else model)
    assert not result.agrees, result
    assert "wrong" in str(result) or not result.layers
    with pytest.raises(ModelNotSupportedError, match="is refused"):
        result.raise_if_wrong()
    return "\n".join(result.all_problems)


class Reads(BlockAdapter):
    """Gives the ids and weights that a function makes of the router's output."""

    def __init__(self, change: Any) -> None:
        self.change = change

    def read(self, call: Call) -> Routing:
        ids, weights = self.change(call.output)
        return Routing(expert_ids=ids, gate_weights=weights)


def test_ids_that_are_off_by_one() -> None:
    text = refusal(Reads(lambda choice: ((choice.ids - 1) % EXPERTS, choice.weights)))
    assert "layers.0: the experts of 56 of 56 tokens are wrong. Token 0 (text 0, position 0): the adapter said" in text
    assert "Every id is 1 too low" in text
    text = refusal(Reads(lambda choice: (choice.ids + 1, choice.weights)))
    assert "to 8; the layer is described with ids 0 to 7, and -1 where a slot reached no expert" in text


def test_experts_in_another_order() -> None:
    order = torch.tensor([3, 1, 7, 0, 2, 6, 5, 4])
    assert "numbered differently" in refusal(Reads(lambda choice: (order[choice.ids], choice.weights)))


def test_a_choice_that_leaves_out_the_bias() -> None:
    def without_bias(choice: Any) -> tuple[Tensor, Tensor]:
        top = choice.scores.topk(TOP_K, dim=-1)
        return top.indices, top.values / top.values.sum(dim=-1, keepdim=True)

    assert "from biased or grouped scores" in refusal(Reads(without_bias))


@pytest.mark.parametrize("shift", [1, -2])
def test_rows_that_are_shifted(shift: int) -> None:
    text = refusal(Reads(lambda choice: (choice.ids.roll(shift, 0), choice.weights.roll(shift, 0))))
    assert f"The rows are shifted by {shift}" in text


def test_rows_in_the_order_of_the_layer_and_not_of_the_forward() -> None:
    model = make(Decoder(DenseLayer(), is_sequence_first=True))
    assert "tokens are wrong" in refusal(DenseAdapter(), model)


def test_rows_that_leave_tokens_out() -> None:
    text = refusal(Reads(lambda choice: (choice.ids[:-3], choice.weights[:-3])))
    assert "read() returned 53 rows, the layer works on 56 tokens" in text


def test_weights_before_they_are_normalised() -> None:
    text = refusal(Reads(lambda choice: (choice.ids, choice.raw)))
    assert "weights are wrong. Token" in text
    assert "Within each token they are off by one factor: read the weights after (or before) they are norm" in text


def test_weights_before_they_are_scaled() -> None:
    text = refusal(Reads(lambda choice: (choice.ids, choice.weights / 2.5)), scale=2.5)
    assert "off by the factor 2.5: if the block multiplies the sum afterwards, describe it as block_scale" in text


def test_a_scale_of_the_block_that_is_not_described() -> None:
    class NoScale(BlockAdapter):
        def describe(self, module: Block) -> LayerShape:
            return LayerShape(EXPERTS, TOP_K)

    assert "off by the factor 0.5" in refusal(NoScale(), block_scale=0.5)


def test_weights_that_are_swapped_between_the_slots() -> None:
    assert "read them where the layer uses them" in refusal(Reads(lambda each: (each.ids, each.weights.flip(-1))))


class Fused(BlockAdapter):
    """As for experts without a module of their own: nothing gives an expert's output."""

    def experts(self, module: Block) -> nn.Module:
        return module


def test_changed_weights_tell_those_that_are_normalised_afterwards() -> None:
    class Early(Fused):
        def read(self, call: Call) -> Routing:
            return Routing(expert_ids=call.output.ids, gate_weights=call.output.raw)

    text = refusal(Early(), normalises_late=True)
    assert "multiplies an expert's contribution by 1 and not by 2" in text
    assert "a normalisation?" in text


def test_changed_weights_tell_a_tensor_that_is_not_used() -> None:
    class Unused(Fused):
        def read(self, call: Call) -> Routing:
            return Routing(expert_ids=call.output.ids, gate_weights=call.output.raw)

    assert "add expert_output(module, expert_id, hidden) to the adapter" in refusal(Unused())


def test_changed_weights_prove_the_right_tensor() -> None:
    assert check_adapter(Fused(), make(Decoder(Block()))).agrees


def test_dropped_tokens_that_are_said_to_be_routed() -> None:
    glam, adapters = example("modeling_glam"), example("glam_adapter")

    class Chosen(adapters.GlamAdapter):  # type: ignore[misc, name-defined]
        def read(self, call: Call) -> Routing:
            chosen = call.output.chosen
            weights = call.output.logits.softmax(-1).gather(1, chosen)
            return Routing(expert_ids=chosen, gate_weights=weights / weights.sum(-1, keepdim=True))

    text = refusal(Chosen(), glam.tiny_model())
    assert "layers.1.feed_forward: the experts of" in text
    assert "a slot that reached no expert (capacity, padding) must be -1, or False in the routing map" in text
    assert "no expert move the output" in text or "intended_expert_ids" in text


@pytest.mark.parametrize("num_slots", [1, 3])
def test_a_number_of_slots_that_is_not_the_layers(num_slots: int) -> None:
    class Slots(BlockAdapter):
        def describe(self, module: Block) -> LayerShape:
            return LayerShape(EXPERTS, num_slots)

    assert f"describe() says top_k={num_slots}, but read() returned 2 slots per row" in refusal(Slots())


def test_slots_that_are_left_out() -> None:
    class First(Reads):
        def describe(self, module: Block) -> LayerShape:
            return LayerShape(EXPERTS, 1)

    text = refusal(First(lambda choice: (choice.ids[:, :1], choice.weights[:, :1])))
    assert "All that was said moved, and more did: is top_k too small" in text


def test_a_dense_map_with_more_experts_than_slots_or_than_described() -> None:
    class Described(DenseAdapter):
        def __init__(self, num_experts: int, top_k: int) -> None:
            self.shape = LayerShape(num_experts, top_k)

        def describe(self, module: DenseLayer) -> LayerShape:
            return self.shape

    model = make(Decoder(DenseLayer()))
    assert "a row of the routing map has 2 experts, the layer has 1 slots" in refusal(Described(EXPERTS, 1), model)
    assert "num_experts=7, but read() returned a routing_map of shape (56, 8)" in refusal(Described(7, 2), model)


def test_one_expert_in_two_slots() -> None:
    text = refusal(Reads(lambda choice: (choice.ids[:, :1].expand(-1, 2), choice.weights)))
    assert "one expert twice for a token: row 0" in text


def test_a_read_that_raises_or_returns_something_else() -> None:
    assert "read() raised AttributeError" in refusal(Reads(lambda choice: (choice.indices, choice.weights)))
    text = refusal(Reads(lambda choice: (choice.weights, choice.weights)))
    assert "expected integer expert_ids and floating gate_weights" in text
    assert "NaN or infinite" in refusal(Reads(lambda choice: (choice.ids, choice.weights * torch.nan)))


def test_a_read_that_writes_into_the_models_tensors() -> None:
    assert "read() changed the tensors" in refusal(Reads(lambda choice: (choice.ids, choice.weights.mul_(2))))


class Weights(BlockAdapter):
    """Gives the output weights that a function makes of the layer and an expert's id."""

    def __init__(self, weights: Any) -> None:
        self.weights = weights

    def expert_output_weights(self, module: Block, expert_id: int) -> Sequence[Tensor]:
        return self.weights(module, expert_id)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        (lambda module, e: [module.experts[e].down.weight.clone()], "returned a copy"),
        (lambda module, e: [module.experts[0].down.weight], "the same parameter as for expert 0"),
        (lambda module, e: [], "returned no tensor"),
        (lambda module, e: module.experts[e + 1].down.parameters(), "expert_output_weights(module, 7) raised"),
        (lambda module, e: [module.router.num_calls], "expected floating tensors"),
    ],
)
def test_output_weights_that_cannot_silence_one_expert(weights: Any, expected: str) -> None:
    assert expected in refusal(Weights(weights))


def test_output_weights_of_something_else() -> None:
    class Spare(Block):
        def __init__(self) -> None:
            super().__init__()
            self.spare = nn.Parameter(torch.zeros(EXPERTS, 4))

    text = refusal(Weights(lambda module, e: [module.spare[e]]), make(Decoder(Spare())))
    assert "silencing the experts changes nothing" in text


def test_an_adapter_without_output_weights() -> None:
    class Unwritten(BlockAdapter):
        expert_output_weights = Adapter.expert_output_weights

    assert "the adapter has no expert_output_weights" in refusal(Unwritten())


def test_an_expert_output_that_is_not_the_experts() -> None:
    class Twice(BlockAdapter):
        def expert_output(self, module: Block, expert_id: int, hidden: Tensor) -> Tensor:
            output: Tensor = module.experts[expert_id](hidden + 1)
            return output

    assert "is no multiple of what expert_output gives" in refusal(Twice())


def test_a_hooked_module_that_is_called_never_or_often() -> None:
    class Hooks(BlockAdapter):
        def __init__(self, name: str) -> None:
            self.inner = name

        def hooked(self, module: Block) -> nn.Module:
            return module.get_submodule(self.inner)

    assert "was called 0 times in a call of the layer" in refusal(Hooks("experts"))

    class Again(Block):
        def forward(self, hidden: Tensor) -> Tensor:
            self.router(hidden.reshape(-1, hidden.shape[-1]))
            return super().forward(hidden)

    assert "was called 2 times in a call of the layer" in refusal(Hooks("router"), make(Decoder(Again())))


def test_a_layer_whose_output_is_not_the_sum_of_its_experts() -> None:
    assert "something follows that is not linear, a norm perhaps" in refusal(BlockAdapter(), has_norm=True)


def test_a_model_that_is_not_deterministic() -> None:
    text = refusal(BlockAdapter(), jitter=0.1)
    assert "the model is not deterministic: layers.0 differs between two runs" in text


def test_a_layer_that_depends_on_more_than_its_arguments() -> None:
    class Told(Block):
        factor = 1.0

        def forward(self, hidden: Tensor) -> Tensor:
            return super().forward(hidden) * self.factor

    class Teller(Decoder):
        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            block: Any = self.layers[0]
            block.factor = 2.0
            logits = super().forward(input_ids, attention_mask)
            block.factor = 1.0
            return logits

    assert "depends on something else than its arguments" in refusal(BlockAdapter(), make(Teller(Told())))


def test_a_layer_that_is_not_called() -> None:
    class Skips(Decoder):
        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            return super().forward(input_ids) if self.training else self.head(self.embed(input_ids))

    assert "layers.0: the layer was not called" in refusal(BlockAdapter(), make(Skips(Block())))
