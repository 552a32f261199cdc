"""Training that balances without a loss: a bias on the scores, for the selection alone, rises where load is missing.

After each step the bias of every expert with less than the mean load goes up by u, and that of the others down by u
(Wang et al. 2024, arXiv:2408.15664, algorithm 1). With the wrong sign the busy experts get busier still.
"""

from __future__ import annotations

from typing import Any

from moe_debugger.demo.training import Batch, NetworkSize, StepResult, Trainer, next_byte_loss, switch_balance_loss

__all__ = ["LossFreeTrainer", "build_loss_free_network"]

_NUM_EXPERTS = 8
_TOP_K = 2
# Standard deviation of the routers' first weights. The library leaves them at 0, where every token has the same scores.
_ROUTER_SCALE = 0.02


def build_loss_free_network(*, seed: int, size: NetworkSize) -> Any:
    """Return a fresh `DeepseekV3ForCausalLM` over bytes, in training mode: 8 experts, top-2, one shared expert.

    DeepSeek-V3's architecture (DeepSeek-AI 2024, arXiv:2412.19437, section 2.1) without groups and dense layers.
    """
    import torch
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    config = DeepseekV3Config(
        vocab_size=256,
        hidden_size=size.hidden_size,
        intermediate_size=size.intermediate_size,
        moe_intermediate_size=size.intermediate_size,
        num_hidden_layers=size.num_layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_routed_experts=_NUM_EXPERTS,
        num_experts_per_tok=_TOP_K,
        n_group=1,
        topk_group=1,
        n_shared_experts=1,
        first_k_dense_replace=0,
        kv_lora_rank=16,
        q_lora_rank=None,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=16,
        routed_scaling_factor=1.0,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    torch.manual_seed(seed)
    model: Any = DeepseekV3ForCausalLM(config)
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.mlp.gate.weight, std=_ROUTER_SCALE)
    model.train()
    return model


class LossFreeTrainer(Trainer):
    """Trains with a selection bias in the place of a balancing loss."""

    def _build(self, *, seed: int, size: NetworkSize) -> Any:
        model = build_loss_free_network(seed=seed, size=size)
        self._gates = [layer.mlp.gate for layer in model.model.layers]
        self._routed: list[tuple[Any, Any]] = []
        for gate in self._gates:
            # (logits, weights, indices): the logits are without the bias, so only the indices tell the selection.
            gate.register_forward_hook(lambda _module, _args, output: self._routed.append((output[0], output[2])))
        return model

    def train_step(
        self, step: int, batch: Batch, *, learning_rate: float, balance_coef: float, sequence_balance_coef: float = 0.0
    ) -> StepResult:
        """Run forward, backward, one AdamW update and one update of the biases.

        Args:
            balance_coef: u, the size of the bias update. Negative is the sign error: overloaded experts gain.
            sequence_balance_coef: not used; there is no balancing loss.
        """
        import torch

        self._routed.clear()
        output = self.model(input_ids=batch.input_ids, use_cache=False)
        loss = next_byte_loss(output.logits, batch.input_ids)
        self._update(loss, learning_rate)
        with torch.no_grad():
            loads = [torch.bincount(ids.flatten(), minlength=_NUM_EXPERTS) for _, ids in self._routed]
            for gate, load in zip(self._gates, loads, strict=True):
                missing = load.float().mean() - load.float()
                gate.e_score_correction_bias.add_(balance_coef * torch.sign(missing))
            terms = [switch_balance_loss(logits.unsqueeze(0), _TOP_K).mean() for logits, _ in self._routed]
        counts = tuple(tuple(int(count) for count in load.tolist()) for load in loads)
        return StepResult(step=step, loss=loss.item(), balance_loss=torch.stack(terms).mean().item(), counts=counts)
