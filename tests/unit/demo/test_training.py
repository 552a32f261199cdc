"""The training maths against hand-worked examples, and that a seed fixes a run."""

import math

import pytest
import torch

from moe_debugger.demo.corpus import KINDS, Corpus
from moe_debugger.demo.training import Trainer, effective_experts, next_byte_loss, switch_balance_loss


def logits_of(*probabilities: tuple[float, ...]) -> torch.Tensor:
    return torch.log(torch.tensor([probabilities]))


def test_switch_balance_loss_equals_a_hand_worked_example() -> None:
    # Four tokens, two experts, top-1. Three tokens choose expert 0: f = (3/4, 1/4).
    # P = ((3 * 0.75 + 0.25) / 4, ...) = (0.625, 0.375). 2 * (0.75 * 0.625 + 0.25 * 0.375) = 1.125.
    router_logits = logits_of((0.75, 0.25), (0.75, 0.25), (0.25, 0.75), (0.75, 0.25))
    assert switch_balance_loss(router_logits, top_k=1).tolist() == pytest.approx([1.125])


def test_switch_balance_loss_is_one_for_a_uniform_load_with_top_2() -> None:
    # The slots of both tokens together name each of four experts once, and P is 1/4 for each.
    router_logits = logits_of((0.4, 0.4, 0.1, 0.1), (0.1, 0.1, 0.4, 0.4))
    assert switch_balance_loss(router_logits, top_k=2).tolist() == pytest.approx([1.0])


def test_switch_balance_loss_reaches_experts_over_top_k_where_two_experts_take_everything() -> None:
    router_logits = logits_of((0.5, 0.5, 0.0, 0.0), (0.5, 0.5, 0.0, 0.0)).clamp(min=-1e4)
    assert switch_balance_loss(router_logits, top_k=2).tolist() == pytest.approx([2.0])


def test_switch_balance_loss_excuses_no_group_by_another() -> None:
    one, other = logits_of((0.9, 0.1), (0.9, 0.1)), logits_of((0.1, 0.9), (0.1, 0.9))
    grouped = switch_balance_loss(torch.cat([one, other]), top_k=1)
    together = switch_balance_loss(torch.cat([one, other], dim=1), top_k=1)
    assert grouped.tolist() == pytest.approx([1.8, 1.8])
    assert together.tolist() == pytest.approx([1.0])


def test_descending_the_switch_loss_takes_probability_from_the_busy_expert() -> None:
    router_logits = logits_of((0.75, 0.25), (0.75, 0.25), (0.25, 0.75), (0.75, 0.25)).requires_grad_()
    (gradient,) = torch.autograd.grad(switch_balance_loss(router_logits, top_k=1).sum(), router_logits)
    assert (gradient[..., 0] > 0).all()
    assert (gradient[..., 1] < 0).all()


def test_next_byte_loss_is_log_of_the_vocabulary_for_uniform_logits() -> None:
    assert float(next_byte_loss(torch.zeros(2, 5, 256), torch.zeros(2, 5, dtype=torch.long))) == pytest.approx(
        math.log(256)
    )


@pytest.mark.parametrize(
    ("counts", "expected"),
    [([5, 5, 5, 5], 4.0), ([7, 0, 0, 0], 1.0), ([3, 3, 0, 0], 2.0), ([0, 0], 0.0), ([2, 1, 1], 2 * math.sqrt(2))],
)
def test_effective_experts_counts_equally_busy_experts(counts: list[int], expected: float) -> None:
    assert effective_experts(counts) == pytest.approx(expected)


def test_batch_has_every_kind_equally_often(held_out: Corpus) -> None:
    batch = Trainer(held_out, seed=0).next_batch(0)
    assert batch.input_ids.shape == (16, 128)
    assert {kind: batch.kinds.count(kind) for kind in KINDS} == dict.fromkeys(KINDS, 4)


def test_training_is_fixed_by_its_seed_and_counts_every_slot(held_out: Corpus) -> None:
    def run() -> list[tuple[float, tuple[tuple[int, ...], ...]]]:
        trainer = Trainer(held_out, seed=5)
        results = []
        for step in range(3):
            batch = trainer.next_batch(step, row_lengths=(32,), batch_tokens=128)
            results.append(trainer.train_step(step, batch, learning_rate=1e-3, balance_coef=0.02))
        return [(result.loss, result.counts) for result in results]

    first = run()
    assert run() == first
    assert all(sum(layer) == 4 * 32 * 2 for _, counts in first for layer in counts)
