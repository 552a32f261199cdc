"""The training maths that the shipped model and the scenarios share: network, balancing loss, batches, one step."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from moe_debugger.demo.corpus import KINDS, Corpus, Kind

if TYPE_CHECKING:
    import torch

__all__ = [
    "CONTEXT_TOKENS",
    "DEMO_SIZE",
    "SMALL_SIZE",
    "Batch",
    "NetworkSize",
    "StepResult",
    "Trainer",
    "build_network",
    "effective_experts",
    "next_byte_loss",
    "switch_balance_loss",
]

CONTEXT_TOKENS: Final = 2048

# Most rows are short, which is what a CPU is fast at; the long ones are there because rotary positions do not reach
# beyond the lengths that were trained (measured: trained to 1024, the loss at 2048 is 0.8 nats a byte higher).
_BATCH_TOKENS: Final = 2048
_ROW_LENGTHS: Final = (*[128] * 5, 512, *[128] * 5, 512, *[128] * 3, CONTEXT_TOKENS)


@dataclass(frozen=True)
class NetworkSize:
    """How wide and deep a network is; all have 8 experts and top-2."""

    hidden_size: int
    intermediate_size: int
    num_layers: int


DEMO_SIZE: Final = NetworkSize(hidden_size=128, intermediate_size=192, num_layers=4)
# Trains 400 steps of 512 tokens in 10 to 15 s on one core, and balances and collapses as the demo's network does.
SMALL_SIZE: Final = NetworkSize(hidden_size=64, intermediate_size=64, num_layers=4)


def build_network(*, seed: int, size: NetworkSize = DEMO_SIZE) -> Any:
    """Return a fresh `MixtralForCausalLM` over bytes, in training mode; of 2.6 million parameters in the demo's size.

    Mixtral's architecture (Jiang et al. 2024, arXiv:2401.04088, section 2) with 8 experts and top-2.
    """
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=256,
        hidden_size=size.hidden_size,
        intermediate_size=size.intermediate_size,
        num_hidden_layers=size.num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=CONTEXT_TOKENS,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    torch.manual_seed(seed)
    model: Any = MixtralForCausalLM(config)
    model.train()
    return model


def switch_balance_loss(router_logits: torch.Tensor, top_k: int) -> torch.Tensor:
    """Return the load-balancing loss of one layer, of each group of tokens.

    Fedus et al. 2021 (arXiv:2101.03961), eq. 4 to 6, for top-k: `E * sum_e f_e * P_e` with `f_e` the share of the
    routed slots that go to expert e and `P_e` the mean router probability of e. It is 1 where the load is uniform
    and E / top_k at most where top_k experts take everything. `f_e` has no gradient; the gradient flows through `P_e`.

    Args:
        router_logits: [num_groups, num_tokens, num_experts]. One group for a whole batch balances the batch; one group
            for each sequence balances every sequence (DeepSeek-AI 2024, arXiv:2412.19437, eq. 17 to 20).
        top_k: experts for each token.

    Returns:
        [num_groups].
    """
    import torch

    num_experts = router_logits.shape[-1]
    probabilities = torch.softmax(router_logits.float(), dim=-1)
    chosen = torch.topk(probabilities, top_k, dim=-1).indices
    load = torch.nn.functional.one_hot(chosen, num_experts).sum(dim=-2).float().mean(dim=-2) / top_k
    return num_experts * (load * probabilities.mean(dim=-2)).sum(dim=-1)


def next_byte_loss(logits: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
    """Return the mean cross entropy of each row's next bytes, in nats."""
    import torch

    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), input_ids[:, 1:].flatten())


def effective_experts(counts: Sequence[int | float]) -> float:
    """Return exp of the load's entropy: the number of equally busy experts that would be as spread (1 to E)."""
    total = sum(counts)
    if not total:
        return 0.0
    return math.exp(-sum(count / total * math.log(count / total) for count in counts if count))


@dataclass(frozen=True)
class Batch:
    """Rows of equal length; each row is of one kind of text.

    Attributes:
        input_ids: [num_rows, row_length] int64.
        kinds: the kind of each row.
    """

    input_ids: torch.Tensor
    kinds: tuple[Kind, ...]


@dataclass(frozen=True)
class StepResult:
    """What one training step did.

    Attributes:
        loss: next-byte cross entropy in nats, without the balancing terms.
        balance_loss: mean over the layers of the Switch loss over the batch; 1 is uniform.
        counts: for each layer, the routed slots of each expert in this batch.
    """

    step: int
    loss: float
    balance_loss: float
    counts: tuple[tuple[int, ...], ...]

    @property
    def effective_experts(self) -> tuple[float, ...]:
        """For each layer, the effective experts of this batch."""
        return tuple(effective_experts(layer) for layer in self.counts)


class Trainer:
    """Trains one fresh network, step by step; the same seed and the same corpus give the same weights."""

    def __init__(self, corpus: Corpus, *, seed: int, size: NetworkSize = DEMO_SIZE) -> None:
        import torch

        self.model = self._build(seed=seed, size=size)
        self._corpus = corpus
        self._rng = random.Random(f"{seed}/batches")  # noqa: S311
        self._optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.01)

    def _build(self, *, seed: int, size: NetworkSize) -> Any:
        return build_network(seed=seed, size=size)

    def next_batch(
        self, step: int, *, row_lengths: Sequence[int] = _ROW_LENGTHS, batch_tokens: int = _BATCH_TOKENS
    ) -> Batch:
        """Return a batch in which the kinds take turns, row by row."""
        import torch

        length = row_lengths[step % len(row_lengths)]
        # Short batches hold every kind equally often; a batch of two rows has two of the kinds, then the other two.
        num_rows = max(2, batch_tokens // length)
        first = step // len(row_lengths) * num_rows
        kinds: tuple[Kind, ...] = tuple(KINDS[(first + row) % len(KINDS)] for row in range(num_rows))
        rows = [list(self._corpus.window(kind, length, self._rng)) for kind in kinds]
        return Batch(input_ids=torch.tensor(rows), kinds=kinds)

    def train_step(
        self, step: int, batch: Batch, *, learning_rate: float, balance_coef: float, sequence_balance_coef: float = 0.0
    ) -> StepResult:
        """Run forward, backward and one AdamW update.

        Args:
            balance_coef: weight of the per-layer Switch loss over the whole batch. Negative is the classic sign error:
                the update then drives the load onto as few experts as it can.
            sequence_balance_coef: weight of the same loss over each sequence.
        """
        import torch

        num_rows, row_length = batch.input_ids.shape
        top_k = self.model.config.num_experts_per_tok
        # transformers' own balancing loss pools all layers before it takes the product, so a layer that overuses an
        # expert is excused by another that does not; ours is per layer.
        output = self.model(input_ids=batch.input_ids, use_cache=False, output_router_logits=True)
        loss = next_byte_loss(output.logits, batch.input_ids)
        layers = [logits.view(num_rows, row_length, -1) for logits in output.router_logits]
        batch_terms = [switch_balance_loss(layer.flatten(0, 1).unsqueeze(0), top_k).mean() for layer in layers]
        balance = torch.stack(batch_terms).mean()
        total = loss + balance_coef * torch.stack(batch_terms).sum()
        if sequence_balance_coef:
            row_terms = [switch_balance_loss(layer, top_k).mean() for layer in layers]
            total = total + sequence_balance_coef * torch.stack(row_terms).sum()

        self._update(total, learning_rate)
        counts = tuple(_slot_counts(layer.detach(), top_k) for layer in layers)
        return StepResult(step=step, loss=loss.item(), balance_loss=balance.item(), counts=counts)

    def _update(self, total: torch.Tensor, learning_rate: float) -> None:
        import torch

        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.zero_grad(set_to_none=True)
        total.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self._optimizer.step()


def _slot_counts(router_logits: torch.Tensor, top_k: int) -> tuple[int, ...]:
    import torch

    # As the router does it: float32 probabilities tie where logits still differ, and a tie goes to the lower expert.
    chosen = torch.topk(torch.softmax(router_logits.flatten(0, -2).float(), dim=-1), top_k, dim=-1).indices
    counts = torch.bincount(chosen.flatten(), minlength=router_logits.shape[-1])
    return tuple(int(count) for count in counts.tolist())
