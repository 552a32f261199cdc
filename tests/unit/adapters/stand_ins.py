"""Small MoE models of the kinds that a person writes an adapter for, and the right adapter for each."""

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_debugger import Adapter, Call, LayerShape, Routing

GLAM_FOLDER = Path(__file__).parents[3] / "examples" / "glam"
VOCAB, HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 50, 16, 12, 8, 2


def example(name: str) -> ModuleType:
    """Return a module of the GLaM example, imported once."""
    if name not in sys.modules:
        if name != "modeling_glam":
            example("modeling_glam")
        spec = importlib.util.spec_from_file_location(name, GLAM_FOLDER / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[name]


class Decoder(nn.Module):
    """Embeddings, blocks with a residual around each, and a head; tokens see those to their left by a running mean."""

    def __init__(self, *blocks: nn.Module, is_sequence_first: bool = False) -> None:
        super().__init__()
        self.is_sequence_first = is_sequence_first
        self.embed = nn.Embedding(VOCAB, HIDDEN)
        self.layers = nn.ModuleList(blocks)
        self.head = nn.Linear(HIDDEN, VOCAB)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        hidden = self.embed(input_ids)
        counts = torch.arange(1, hidden.shape[1] + 1, device=hidden.device)[:, None].to(hidden.dtype)
        if self.is_sequence_first:
            hidden, counts = hidden.transpose(0, 1), counts[:, None]
        for layer in self.layers:
            hidden = hidden + hidden.cumsum(dim=0 if self.is_sequence_first else 1) / counts
            hidden = hidden + layer(hidden)
        logits: Tensor = self.head(hidden)
        return logits.transpose(0, 1) if self.is_sequence_first else logits


class Choice(NamedTuple):
    """What `Router` returns: ids [T, k], weights [T, k] normalised and not, scores [T, E]."""

    ids: Tensor
    weights: Tensor
    raw: Tensor
    scores: Tensor


class Router(nn.Module):
    """Sigmoid scores; a bias selects; the weights are the scores, normalised and scaled."""

    def __init__(self, scale: float, jitter: float) -> None:
        super().__init__()
        self.scale, self.jitter = scale, jitter
        self.gate = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.register_buffer("bias", torch.linspace(-0.15, 0.15, EXPERTS))
        self.register_buffer("num_calls", torch.zeros((), dtype=torch.int64))
        self.bias: Tensor
        self.num_calls: Tensor

    def forward(self, rows: Tensor) -> Choice:
        self.num_calls += 1
        if self.jitter:
            rows = rows * (1 + self.jitter * torch.randn_like(rows))
        scores = self.gate(rows).sigmoid()
        ids = (scores + self.bias).topk(TOP_K, dim=-1).indices
        raw = scores.gather(1, ids)
        return Choice(ids, raw / raw.sum(dim=-1, keepdim=True) * self.scale, raw, scores)


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(HIDDEN, INTERMEDIATE)
        self.down = nn.Linear(INTERMEDIATE, HIDDEN)

    def forward(self, rows: Tensor) -> Tensor:
        output: Tensor = self.down(F.silu(self.up(rows)))
        return output


class Block(nn.Module):
    """One module per expert and a shared one.

    Args:
        scale: the router multiplies the normalised weights by it.
        block_scale: the block multiplies the experts' sum by it.
        normalises_late: the block normalises the router's raw weights itself.
        has_norm: a norm follows the experts.
        scales_input: the weight multiplies the expert's input.
    """

    def __init__(
        self,
        *,
        scale: float = 1.0,
        block_scale: float = 1.0,
        normalises_late: bool = False,
        has_norm: bool = False,
        scales_input: bool = False,
        jitter: float = 0.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.router = Router(scale, jitter)
        self.experts = nn.ModuleList(Expert() for _ in range(EXPERTS))
        self.shared = Expert()
        self.norm = nn.LayerNorm(HIDDEN) if has_norm else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.block_scale, self.normalises_late, self.scales_input = block_scale, normalises_late, scales_input

    def forward(self, hidden: Tensor) -> Tensor:
        rows = hidden.reshape(-1, HIDDEN)
        choice = self.router(rows)
        weights = choice.weights
        if self.normalises_late:
            weights = choice.raw / choice.raw.sum(dim=-1, keepdim=True)
        output = torch.zeros_like(rows)
        for expert_id, expert in enumerate(self.experts):
            tokens, slots = torch.where(choice.ids == expert_id)
            weight = weights[tokens, slots, None]
            given = expert(rows[tokens] * weight) if self.scales_input else expert(rows[tokens]) * weight
            output.index_add_(0, tokens, given)
        output = self.norm(output * self.block_scale + self.shared(rows))
        result: Tensor = self.dropout(output)
        return result.view_as(hidden)


class BlockAdapter(Adapter):
    """Reads `Block`; its subclasses each make one mistake."""

    name = "block"

    def matches(self, name: str, module: nn.Module) -> bool:
        return isinstance(module, Block)

    def describe(self, module: Block) -> LayerShape:
        meaning = "multiplies the expert's input" if module.scales_input else "multiplies the expert's output"
        return LayerShape(EXPERTS, TOP_K, num_shared_experts=1, block_scale=module.block_scale, weight_meaning=meaning)

    def hooked(self, module: Block) -> nn.Module:
        return module.router

    def read(self, call: Call) -> Routing:
        return Routing(expert_ids=call.output.ids, gate_weights=call.output.weights)

    def expert_output_weights(self, module: Block, expert_id: int) -> Sequence[Tensor]:
        down = module.experts[expert_id].get_submodule("down")
        return list(down.parameters())


class DenseRouter(nn.Module):
    """Returns (probabilities [T, E], routing map [T, E]) as Megatron-Core's TopKRouter does."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(EXPERTS, HIDDEN))

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        logits = F.linear(hidden.reshape(-1, HIDDEN), self.weight)
        top, ids = logits.topk(TOP_K, dim=-1)
        probabilities = torch.zeros_like(logits).scatter(1, ids, top.softmax(dim=-1))
        return probabilities, torch.zeros_like(logits, dtype=torch.bool).scatter(1, ids, value=True)


class GroupedExperts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight1 = nn.Parameter(torch.empty(EXPERTS, HIDDEN, INTERMEDIATE))
        self.weight2 = nn.Parameter(torch.empty(EXPERTS, INTERMEDIATE, HIDDEN))

    def forward(self, rows: Tensor, probabilities: Tensor, routing_map: Tensor) -> Tensor:
        tokens, expert_ids = routing_map.nonzero(as_tuple=True)
        inner = F.silu(torch.einsum("nh,nhi->ni", rows[tokens], self.weight1[expert_ids]))
        inner = inner * probabilities[tokens, expert_ids, None]
        outputs = torch.einsum("ni,nih->nh", inner, self.weight2[expert_ids])
        return torch.zeros_like(rows).index_add(0, tokens, outputs)


class DenseLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router = DenseRouter()
        self.experts = GroupedExperts()

    def forward(self, hidden: Tensor) -> Tensor:
        probabilities, routing_map = self.router(hidden)
        output: Tensor = self.experts(hidden.reshape(-1, HIDDEN), probabilities, routing_map)
        return output.view_as(hidden)


class DenseAdapter(Adapter):
    """Reads `DenseLayer`, whatever comes first of batch and sequence."""

    name = "dense"
    is_sequence_first = False

    def matches(self, name: str, module: nn.Module) -> bool:
        return isinstance(module, DenseLayer)

    def describe(self, module: DenseLayer) -> LayerShape:
        return LayerShape(EXPERTS, TOP_K)

    def hooked(self, module: DenseLayer) -> nn.Module:
        return module.router

    def read(self, call: Call) -> Routing:
        probabilities, routing_map = call.output
        if self.is_sequence_first:
            length, batch = call.args[0].shape[:2]
            probabilities, routing_map = (
                each.view(length, batch, -1).transpose(0, 1).flatten(0, 1) for each in (probabilities, routing_map)
            )
        return Routing.dense(probabilities, routing_map)

    def expert_output_weights(self, module: DenseLayer, expert_id: int) -> Sequence[Tensor]:
        return [module.experts.weight2[expert_id]]


class SequenceFirstAdapter(DenseAdapter):
    """Gives rows in the order of the forward's tokens, [batch, sequence]: the layer has [sequence, batch]."""

    is_sequence_first = True

    def expert_output(self, module: DenseLayer, expert_id: int, hidden: Tensor) -> Tensor:
        inner: Tensor = F.silu(hidden @ module.experts.weight1[expert_id])
        return inner @ module.experts.weight2[expert_id]


class MixtralAdapter(Adapter):
    """Reads the arguments of fused experts, as a person may for an architecture of transformers."""

    name = "mine"
    moment = "before"

    def matches(self, name: str, module: nn.Module) -> bool:
        return type(module).__name__ == "MixtralSparseMoeBlock"

    def describe(self, module: Any) -> LayerShape:
        return LayerShape(module.experts.num_experts, module.top_k)

    def hooked(self, module: Any) -> nn.Module:
        return module.experts  # type: ignore[no-any-return]

    def read(self, call: Call) -> Routing:
        return Routing(expert_ids=call.args[1], gate_weights=call.args[2])

    def expert_output_weights(self, module: Any, expert_id: int) -> Sequence[Tensor]:
        return [module.experts.down_proj[expert_id]]


def make_mixtral() -> Any:
    """Return a random Mixtral of two layers."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
    )
    return MixtralForCausalLM(config).eval()


def make(model: nn.Module, seed: int = 0) -> Any:
    """Give `model` random parameters that are large enough for experts to differ."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    return model.eval()
