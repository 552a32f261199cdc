"""Models that are not of transformers: code in the manner of its version 4, and the GLaM-style decoder of the examples.

`OldStyleDecoder` is plain torch. Its MoE layers have one module per expert in a ModuleList, and an expert gets the rows
of the tokens that chose it. In `LinearGateMoE` (as Mixtral's and Qwen's first code) the gate is a linear layer and the
block chooses; in `GateModuleMoE` (as DeepSeek's own code) the gate is a module that returns ids and weights.
"""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo.build import BOS, EOS, PAD, SEED, VOCAB, Build, decoder, left_padded, redraw, right_padded

__all__ = ["CUSTOM", "GateModuleMoE", "LinearGateMoE", "OldStyleDecoder", "glam_module"]

_HIDDEN, _INTERMEDIATE, _HEADS, _EXPERTS = 32, 24, 4, 8


class _Expert(nn.Module):
    def __init__(self, intermediate: int = _INTERMEDIATE) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(_HIDDEN, intermediate, bias=False)
        self.up_proj = nn.Linear(_HIDDEN, intermediate, bias=False)
        self.down_proj = nn.Linear(intermediate, _HIDDEN, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        output: Tensor = self.down_proj(F.silu(self.gate_proj(hidden)) * self.up_proj(hidden))
        return output


class LinearGateMoE(nn.Module):
    """A block that takes the softmax and the top-k of its linear gate itself."""

    def __init__(self, *, norm_topk_prob: bool) -> None:
        super().__init__()
        self.num_experts = _EXPERTS
        self.top_k = 2
        self.norm_topk_prob = norm_topk_prob
        self.gate = nn.Linear(_HIDDEN, _EXPERTS, bias=False)
        self.experts = nn.ModuleList(_Expert() for _ in range(_EXPERTS))

    def forward(self, hidden: Tensor) -> Tensor:
        tokens = hidden.flatten(0, 1)
        probabilities = self.gate(tokens).softmax(dim=-1, dtype=torch.float32)
        weights, ids = probabilities.topk(self.top_k, dim=-1)
        if self.norm_topk_prob:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        weights = weights.to(tokens.dtype)
        output = torch.zeros_like(tokens)
        for expert_id, expert in enumerate(self.experts):
            rows, slots = torch.where(ids == expert_id)
            # An expert without tokens is called all the same, with no row.
            output.index_add_(0, rows, expert(tokens[rows]) * weights[rows, slots, None])
        return output.view_as(hidden)


class _Gate(nn.Module):
    """Sigmoid scores; a bias selects, within the best groups; the weights are renormalised and scaled."""

    def __init__(self, *, num_groups: int, num_chosen_groups: int, routed_scaling_factor: float) -> None:
        super().__init__()
        self.top_k = 3
        self.n_routed_experts = _EXPERTS
        self.n_group = num_groups
        self.topk_group = num_chosen_groups
        self.routed_scaling_factor = routed_scaling_factor
        self.weight = nn.Parameter(torch.zeros(_EXPERTS, _HIDDEN))
        self.e_score_correction_bias = nn.Parameter(torch.zeros(_EXPERTS), requires_grad=False)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, None]:
        """Return ids and weights [T, k] of `hidden` [B, S, H], and no auxiliary loss."""
        scores = F.linear(hidden.flatten(0, 1).float(), self.weight.float()).sigmoid()
        selecting = (scores + self.e_score_correction_bias).view(-1, self.n_group, _EXPERTS // self.n_group)
        groups = selecting.topk(2, dim=-1).values.sum(dim=-1).topk(self.topk_group, dim=-1).indices
        in_groups = torch.zeros_like(selecting[..., 0], dtype=torch.bool).scatter(1, groups, value=True)
        selecting = selecting.masked_fill(~in_groups[..., None], float("-inf")).flatten(1)
        ids = selecting.topk(self.top_k, dim=-1, sorted=False).indices
        weights = scores.gather(1, ids)
        weights = weights / weights.sum(dim=-1, keepdim=True) * self.routed_scaling_factor
        return ids, weights, None


class GateModuleMoE(nn.Module):
    """A block that sorts the tokens by expert, and calls only the experts that have any."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts_per_tok = 3
        self.gate = _Gate(num_groups=4, num_chosen_groups=2, routed_scaling_factor=1.5)
        self.experts = nn.ModuleList(_Expert() for _ in range(_EXPERTS))
        self.shared_experts = _Expert()

    def forward(self, hidden: Tensor) -> Tensor:
        ids, weights, _ = self.gate(hidden)
        tokens = hidden.flatten(0, 1)
        order = ids.flatten().argsort(stable=True)
        counts = ids.flatten().bincount(minlength=_EXPERTS).tolist()
        sorted_tokens = torch.split(tokens[order // ids.shape[1]], counts)
        outputs = [expert(rows) for expert, rows in zip(self.experts, sorted_tokens, strict=True) if rows.shape[0] > 0]
        by_slot = torch.empty(ids.numel(), _HIDDEN, dtype=tokens.dtype, device=tokens.device)
        by_slot = by_slot.index_copy(0, order, torch.cat(outputs)).view(*ids.shape, _HIDDEN)
        routed = (by_slot * weights[..., None]).sum(dim=1).to(tokens.dtype)
        output: Tensor = routed.view_as(hidden) + self.shared_experts(hidden)
        return output


class _Layer(nn.Module):
    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(_HIDDEN)
        self.qkv_proj = nn.Linear(_HIDDEN, 3 * _HIDDEN, bias=False)
        self.o_proj = nn.Linear(_HIDDEN, _HIDDEN, bias=False)
        self.post_attention_layernorm = nn.RMSNorm(_HIDDEN)
        self.mlp = mlp

    def forward(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        heads = self.qkv_proj(self.input_layernorm(hidden)).unflatten(-1, (3, _HEADS, -1))
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask)
        hidden = hidden + self.o_proj(attended.transpose(1, 2).flatten(2))
        output: Tensor = hidden + self.mlp(self.post_attention_layernorm(hidden))
        return output


class OldStyleDecoder(nn.Module):
    """A causal decoder of three layers, the first of them dense; `make_block(i)` is MoE block i."""

    def __init__(self, make_block: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCAB, _HIDDEN)
        self.layers = nn.ModuleList([_Layer(_Expert(48)), _Layer(make_block(0)), _Layer(make_block(1))])
        self.norm = nn.RMSNorm(_HIDDEN)
        self.lm_head = nn.Linear(_HIDDEN, VOCAB, bias=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Return the logits [B, S, vocabulary]; `attention_mask` [B, S] is 0 where padding."""
        hidden = self.embed_tokens(input_ids)
        length = input_ids.shape[1]
        mask = torch.ones(length, length, dtype=torch.bool, device=input_ids.device).tril()[None, None]
        if attention_mask is not None:
            # Each token sees itself: one in front of its text would see nothing, and become NaN.
            itself = torch.eye(length, dtype=torch.bool, device=input_ids.device)
            mask = mask & attention_mask[:, None, None, :].bool() | itself
        for layer in self.layers:
            hidden = layer(hidden, mask)
        logits: Tensor = self.lm_head(self.norm(hidden))
        return logits


def _old_style(name: str, make_block: Callable[[int], nn.Module], note: str) -> Build:
    def make(dtype: torch.dtype = torch.float32, experts_implementation: str | None = None) -> nn.Module:
        if experts_implementation not in (None, "eager"):
            raise ValueError(f"{name} is plain torch and has no experts implementation {experts_implementation!r}")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            model = OldStyleDecoder(make_block)
        redraw(model)
        return model.to(dtype).eval()

    return Build(name, "decoder", make, left_padded, None, right_padded, note)


def glam_module() -> ModuleType:
    """Return the module `modeling_glam` of the examples, which is in no package."""
    name = "modeling_glam"
    if name not in sys.modules:
        path = Path(__file__).parents[2] / "examples" / "glam" / f"{name}.py"
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


def _glam() -> Build:
    glam = glam_module()

    def config() -> Any:
        return glam.GlamConfig(
            vocab_size=VOCAB,
            hidden_size=_HIDDEN,
            intermediate_size=_INTERMEDIATE,
            num_hidden_layers=4,
            num_attention_heads=_HEADS,
            pad_token_id=PAD,
            bos_token_id=BOS,
            eos_token_id=EOS,
        )

    return decoder(
        "glam", glam.GlamForCausalLM, config, note="two of 64 experts, capacity of 1 token for each; needs its adapter"
    )


CUSTOM: dict[str, Build] = {
    build.name: build
    for build in (
        _old_style(
            "old_style_linear_gate",
            lambda index: LinearGateMoE(norm_topk_prob=index == 0),
            "the weights of the second MoE layer are not renormalised",
        ),
        _old_style(
            "old_style_gate_module",
            lambda index: GateModuleMoE(),
            "the gate returns (ids, weights, None); only experts with tokens are called",
        ),
        _glam(),
    )
}
