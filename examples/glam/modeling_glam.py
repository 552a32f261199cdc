"""A decoder in the manner of GLaM (Du et al. 2021, arXiv:2112.06905), whose own weights are not public.

Every other layer has 64 experts in place of its feed-forward network. A token goes to its best two, weighted by a
softmax; an expert takes no more tokens than its capacity, and where both are full, only the residual goes on. The other
layers have a GELU-gated network; positions are a bias of the attention, one table for each layer. The sizes are those
of an example. What a debugger reads is the output of `GlamRouter`: a dense map, as Megatron-Core has it.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

__all__ = ["GlamConfig", "GlamExperts", "GlamForCausalLM", "GlamMoE", "GlamRouter", "GlamRouting", "tiny_model"]

NUM_DISTANCES = 128  # keys that are farther away share the position bias of the last distance


class GlamConfig(PretrainedConfig):  # type: ignore[misc]
    """Sizes of a model.

    Args:
        num_experts: E, the experts of each MoE layer.
        num_experts_per_tok: How many experts a token chooses; GLaM chooses 2.
        capacity_factor: An expert takes at most this many times the tokens of a perfectly even load.
        router_aux_loss_coef: Factor of the load-balancing loss in the training loss.
    """

    model_type = "glam"

    def __init__(
        self,
        vocab_size: int = 32000,
        hidden_size: int = 256,
        intermediate_size: int = 512,
        num_hidden_layers: int = 8,
        num_attention_heads: int = 8,
        num_experts: int = 64,
        num_experts_per_tok: int = 2,
        capacity_factor: float = 1.25,
        router_aux_loss_coef: float = 0.01,
        initializer_range: float = 0.02,
        **kwargs: Any,
    ) -> None:
        self.vocab_size, self.hidden_size, self.intermediate_size = vocab_size, hidden_size, intermediate_size
        self.num_hidden_layers, self.num_attention_heads = num_hidden_layers, num_attention_heads
        self.num_experts, self.num_experts_per_tok = num_experts, num_experts_per_tok
        self.capacity_factor, self.router_aux_loss_coef = capacity_factor, router_aux_loss_coef
        self.initializer_range = initializer_range
        super().__init__(**kwargs)


class GlamRouting(NamedTuple):
    """Where the T tokens of one call go.

    Attributes:
        probabilities: [T, E] float32, by what an expert's output is multiplied; 0 where `routing_map` is False.
        routing_map: [T, E] bool, which experts compute a token: at most k, fewer where an expert was full.
        chosen: [T, k] int64, the experts that each token chose, best first, whether they had room or not.
        logits: [T, E] float32, the router's scores before the softmax.
        balance_loss: [] float32, E times the sum over experts of (share of first choices) x (mean probability).
    """

    probabilities: Tensor
    routing_map: Tensor
    chosen: Tensor
    logits: Tensor
    balance_loss: Tensor


class GlamRouter(nn.Module):
    """Chooses experts: softmax, top-k, renormalised, within capacity (Lepikhin et al. 2020, algorithm 1)."""

    def __init__(self, config: GlamConfig) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.num_experts = config.num_experts
        self.capacity_factor = config.capacity_factor
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)

    def forward(self, hidden: Tensor, is_token: Tensor) -> GlamRouting:
        """Route `hidden` [T, H]; rows where `is_token` [T] is False are padding: no expert, and no one's room."""
        logits = self.gate(hidden).float()
        scores = logits.softmax(dim=-1)
        top_scores, chosen = scores.topk(self.top_k, dim=-1)
        weights = top_scores / top_scores.sum(dim=-1, keepdim=True)

        choices = F.one_hot(chosen, self.num_experts) * is_token[:, None, None]  # [T, k, E]
        # All first choices queue before any second choice, in the order of the tokens.
        queue = choices.transpose(0, 1).reshape(-1, self.num_experts)
        places = (queue.cumsum(dim=0) - queue).view(self.top_k, -1, self.num_experts).transpose(0, 1)
        capacity = math.ceil(self.capacity_factor * self.top_k * hidden.shape[0] / self.num_experts)
        kept = choices.bool() & (places < capacity)

        num_tokens = is_token.sum().clamp(min=1)
        first_choices = choices[:, 0].sum(dim=0) / num_tokens
        mean_scores = (scores * is_token[:, None]).sum(dim=0) / num_tokens
        return GlamRouting(
            probabilities=(kept * weights[..., None]).sum(dim=1),
            routing_map=kept.any(dim=1),
            chosen=chosen,
            logits=logits,
            balance_loss=self.num_experts * (first_choices * mean_scores).sum(),
        )


class GlamExperts(nn.Module):
    """E feed-forward networks in two parameters: `w_in` [E, H, I] and `w_out` [E, I, H]."""

    def __init__(self, config: GlamConfig) -> None:
        super().__init__()
        shape = (config.num_experts, config.hidden_size, config.intermediate_size)
        self.w_in = nn.Parameter(torch.randn(shape) * config.initializer_range)
        self.w_out = nn.Parameter(torch.randn(shape).mT.contiguous() * config.initializer_range)

    def forward(self, hidden: Tensor, routing: GlamRouting) -> Tensor:
        """Return [T, H], the weighted sum of each token's experts; zeros for a token that has none."""
        output = torch.zeros_like(hidden)
        for expert_id in range(self.w_in.shape[0]):
            tokens = routing.routing_map[:, expert_id].nonzero().squeeze(-1)
            expert = F.gelu(hidden[tokens] @ self.w_in[expert_id]) @ self.w_out[expert_id]
            weights = routing.probabilities[tokens, expert_id, None]
            output = output.index_add(0, tokens, expert * weights.to(expert.dtype))
        return output


class GlamMoE(nn.Module):
    """One MoE layer, which returns its output [B, S, H] and its load-balancing loss []."""

    def __init__(self, config: GlamConfig) -> None:
        super().__init__()
        self.router = GlamRouter(config)
        self.experts = GlamExperts(config)

    def forward(self, hidden: Tensor, is_token: Tensor) -> tuple[Tensor, Tensor]:
        tokens = hidden.flatten(0, 1)
        routing: GlamRouting = self.router(tokens, is_token.flatten())
        return self.experts(tokens, routing).view_as(hidden), routing.balance_loss


class GlamFeedForward(nn.Module):
    """The network of the other layers: a linear map gated by the GELU of another one."""

    def __init__(self, config: GlamConfig) -> None:
        super().__init__()
        self.in_proj = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.out_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        gate, linear = self.in_proj(hidden).chunk(2, dim=-1)
        return self.out_proj(F.gelu(gate) * linear)  # type: ignore[no-any-return]


class GlamAttention(nn.Module):
    """Causal attention with a learnt bias for each head and distance."""

    def __init__(self, config: GlamConfig, layer_index: int) -> None:
        super().__init__()
        self.layer_index = layer_index
        self.num_heads = config.num_attention_heads
        self.qkv_proj = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.relative_bias = nn.Embedding(NUM_DISTANCES, config.num_attention_heads)

    def forward(self, hidden: Tensor, key_mask: Tensor, cache: DynamicCache | None) -> Tensor:
        """Attend from `hidden` [B, S, H] to the keys so far, of which `key_mask` [B, K] says which are no padding."""
        heads = self.qkv_proj(hidden).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = heads.permute(2, 0, 3, 1, 4)  # [B, heads, S, H / heads] each
        if cache is not None:
            key, value = cache.update(key, value, self.layer_index)
        keys = torch.arange(key.shape[2], device=hidden.device)
        distance = keys[-hidden.shape[1] :, None] - keys  # [S, K]
        bias = self.relative_bias(distance.clamp(0, NUM_DISTANCES - 1)).permute(2, 0, 1)
        # Not -inf: a padding token in front of a text has no key at all, and its row would become NaN.
        bias = bias.masked_fill((distance < 0) | ~key_mask[:, None, None, :], torch.finfo(bias.dtype).min)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        output: Tensor = self.o_proj(attended.transpose(1, 2).flatten(2))
        return output


class GlamLayer(nn.Module):
    """One layer of the decoder; `feed_forward` is a `GlamMoE` or a `GlamFeedForward`."""

    def __init__(self, config: GlamConfig, layer_index: int) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.hidden_size)
        self.attention = GlamAttention(config, layer_index)
        self.feed_forward_norm = nn.RMSNorm(config.hidden_size)
        self.feed_forward = GlamMoE(config) if layer_index % 2 else GlamFeedForward(config)

    def forward(self, hidden: Tensor, key_mask: Tensor, cache: DynamicCache | None) -> tuple[Tensor, Tensor | None]:
        hidden = hidden + self.attention(self.attention_norm(hidden), key_mask, cache)
        normed = self.feed_forward_norm(hidden)
        if isinstance(self.feed_forward, GlamMoE):
            output, balance_loss = self.feed_forward(normed, key_mask[:, -hidden.shape[1] :])
            return hidden + output, balance_loss
        return hidden + self.feed_forward(normed), None


class GlamForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """The decoder with its language-modelling head."""

    config_class = GlamConfig
    accepts_loss_kwargs = False  # its loss is a mean over the batch's tokens, which a trainer may average

    def __init__(self, config: GlamConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(GlamLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool = False,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        """Return logits [B, S, vocabulary], the mean load-balancing loss and, with `labels`, the training loss.

        `attention_mask` [B, keys so far] is 0 where padding; `labels` [B, S] are -100 where nothing is to be learnt.
        """
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        num_past = past_key_values.get_seq_length() if past_key_values is not None else 0
        if attention_mask is None:
            attention_mask = input_ids.new_ones(input_ids.shape[0], num_past + input_ids.shape[1])
        hidden, balance_losses = self.embed_tokens(input_ids), []
        for layer in self.layers:
            hidden, balance_loss = layer(hidden, attention_mask.bool(), past_key_values)
            balance_losses += [balance_loss] if balance_loss is not None else []
        logits = self.lm_head(self.norm(hidden))
        aux_loss = torch.stack(balance_losses).mean() if balance_losses else logits.new_zeros(())
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100)
            loss = loss + self.config.router_aux_loss_coef * aux_loss
        return MoeCausalLMOutputWithPast(loss=loss, aux_loss=aux_loss, logits=logits, past_key_values=past_key_values)


def tiny_model(seed: int = 0) -> GlamForCausalLM:
    """Return a random model of four layers, two of them with 64 experts, that runs anywhere."""
    torch.manual_seed(seed)
    config = GlamConfig(
        vocab_size=256, hidden_size=32, intermediate_size=32, num_hidden_layers=4, num_attention_heads=4, pad_token_id=0
    )
    return GlamForCausalLM(config).eval()
