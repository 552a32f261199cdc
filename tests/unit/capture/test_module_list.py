"""Old-style layers with rules of their own: their weights are right or said not to be known, never wrong."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_debugger import Decisions, MoEDebugger

HIDDEN, EXPERTS, TOP_K = 16, 6, 2
Weigh = Callable[[Tensor], Tensor]


class _Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(HIDDEN, 24)
        self.down = nn.Linear(24, HIDDEN)

    def forward(self, hidden: Tensor) -> Tensor:
        output: Tensor = self.down(F.silu(self.up(hidden)))
        return output


class _Block(nn.Module):
    """A linear gate, and one module per expert, weighed by `weigh(chosen logits, all logits)`."""

    def __init__(self, weigh: Any, shared: str = "") -> None:
        super().__init__()
        self.top_k = TOP_K
        self.gate = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.experts = nn.ModuleList(_Expert() for _ in range(EXPERTS))
        if shared:
            self.shared_expert = _Expert()
        if shared == "gated":
            self.shared_expert_gate = nn.Linear(HIDDEN, 1)
        self.weigh = weigh
        self.applied: list[Tensor] = []
        self.ids: list[Tensor] = []

    def forward(self, hidden: Tensor) -> Tensor:
        tokens = hidden.flatten(0, 1)
        logits = self.gate(tokens)
        ids = logits.float().topk(TOP_K, dim=-1).indices
        weights = self.weigh(logits.float(), ids).to(tokens.dtype)
        self.applied.append(weights.detach().float())
        self.ids.append(ids)
        output = torch.zeros_like(tokens)
        # Slot after slot, as Mixtral's first code.
        for expert_id, expert in enumerate(self.experts):
            slots, rows = torch.where(ids.t() == expert_id)
            if len(rows):
                output.index_add_(0, rows, expert(tokens[rows]).mul_(weights[rows, slots, None]))
        if hasattr(self, "shared_expert_gate"):
            output = output + torch.sigmoid(self.shared_expert_gate(tokens)) * self.shared_expert(tokens)
        elif hasattr(self, "shared_expert"):
            output = output + self.shared_expert(tokens)
        return output.view_as(hidden)


class _Model(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, HIDDEN)
        self.layers = nn.ModuleList([nn.Module()])
        self.layers[0].mlp = block

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.embed(input_ids)
        # Changed in place afterwards, as residual streams are.
        block: Any = self.layers[0].mlp
        output: Tensor = block(hidden)
        return output.add_(hidden)


def _softmax(logits: Tensor, ids: Tensor) -> Tensor:
    return logits.softmax(-1).gather(1, ids)


def _softmax_renormalised(logits: Tensor, ids: Tensor) -> Tensor:
    weights = _softmax(logits, ids)
    return weights / weights.sum(-1, keepdim=True)


def _sigmoid(logits: Tensor, ids: Tensor) -> Tensor:
    return logits.sigmoid().gather(1, ids)


def _sigmoid_renormalised(logits: Tensor, ids: Tensor) -> Tensor:
    weights = _sigmoid(logits, ids)
    return weights / weights.sum(-1, keepdim=True)


def _equal(logits: Tensor, ids: Tensor) -> Tensor:
    return torch.full(ids.shape, 1 / TOP_K)


def _scaled(logits: Tensor, ids: Tensor) -> Tensor:
    return 2.5 * _softmax_renormalised(logits, ids)


def _model(weigh: Any, shared: str = "", dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    model = _Model(_Block(weigh, shared))
    with torch.no_grad():
        model.layers[0].mlp.gate.weight.normal_(std=0.5)  # type: ignore[union-attr,operator]
    return model.to(dtype).eval()


def _run(model: Any, **options: Any) -> tuple[Decisions, str, list[str]]:
    """Run three batches; return the rows, what the weights mean, and the problems."""
    with torch.no_grad():
        batches = [torch.randint(0, 64, (2, size), generator=torch.Generator().manual_seed(size)) for size in (9, 5, 1)]
        expected = [model(batch) for batch in batches]
        block = model.layers[0].mlp
        block.applied.clear()
        block.ids.clear()
        with MoEDebugger(model, **options) as debugger:
            assert all(torch.equal(model(batch), output) for batch, output in zip(batches, expected, strict=True))
            session = debugger.session
            assert session is not None
            rows = session.decisions()
            return rows, session.layers()[0].weight_meaning, list(debugger.get_performance_metrics().problems)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shared", ["", "plain", "gated"])
@pytest.mark.parametrize("weigh", [_softmax, _softmax_renormalised, _sigmoid, _sigmoid_renormalised])
def test_the_rule_that_gives_the_output_is_found(weigh: Any, shared: str, dtype: torch.dtype) -> None:
    model = _model(weigh, shared, dtype)
    rows, _, problems = _run(model)
    block = model.layers[0].mlp
    assert problems == []
    assert np.array_equal(rows.expert_ids, torch.cat(block.ids).numpy())
    tolerance = 1e-6 if dtype is torch.float32 else 1e-2
    assert np.allclose(rows.gate_weights, torch.cat(block.applied).numpy(), atol=tolerance)


@pytest.mark.parametrize("weigh", [_equal, _scaled])
def test_weights_of_another_rule_are_not_known_and_their_experts_are(weigh: Any) -> None:
    model = _model(weigh)
    rows, meaning, _ = _run(model)
    assert np.array_equal(rows.expert_ids, torch.cat(model.layers[0].mlp.ids).numpy())
    assert np.isnan(rows.gate_weights).all()
    assert np.isnan(rows.router_entropy).all()
    assert "not known" in meaning
    assert "adapter" in meaning


def test_a_rule_that_selects_in_another_way_is_refused() -> None:
    model = _model(_softmax)
    block = model.layers[0].mlp
    with torch.no_grad(), MoEDebugger(model) as debugger:
        # Someone changes the logits behind our hook: what the block chooses is not what the gate returned.
        block.gate.register_forward_hook(lambda module, args, output: -output)
        model(torch.randint(0, 64, (2, 9)))
        performance = debugger.get_performance_metrics()
        assert performance.num_dropped == {"capture_error": 18}
        assert any("selects in another way" in text for text in performance.problems)


def test_nothing_more_is_kept_once_the_weights_are_confirmed() -> None:
    model = _model(_softmax_renormalised)
    with torch.no_grad(), MoEDebugger(model) as debugger:
        session = debugger.session
        assert session is not None
        kept: list[set[str]] = []
        offer = session.offer

        def spy(raw: Any) -> None:
            kept.append(set(raw.layers[0].tensors))
            offer(raw)

        session.offer = spy  # type: ignore[method-assign]
        for _ in range(2):
            model(torch.randint(0, 64, (2, 9)))
            session.flush()
    assert any(name.startswith("sums_") for name in kept[0])
    assert not any(name.startswith(("sums_", "features_")) for name in kept[1])


def test_random_numbers_and_gradients_are_untouched_while_the_weights_are_being_confirmed() -> None:
    def step(model: Any) -> list[Tensor]:
        torch.manual_seed(3)
        model.zero_grad()
        ids = torch.randint(0, 64, (2, 9))
        model(F.dropout(ids.float(), 0.1).long() % 64).square().mean().backward()
        return [*(parameter.grad.clone() for parameter in model.parameters()), torch.get_rng_state()]

    model = _model(_softmax_renormalised)
    expected = step(model)
    with MoEDebugger(model):
        found = step(model)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
