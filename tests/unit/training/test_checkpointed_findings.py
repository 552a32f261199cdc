"""Gradient checkpointing runs every forward twice: the loads and findings are those of a training without it."""

from typing import Any

import pytest

from moe_debugger import Decisions, MoEDebugger, analyze
from moe_debugger.analysis import Severity

torch = pytest.importorskip("torch")


def trained(*, is_checkpointed: bool) -> Decisions:
    """Train a small Mixtral for some steps, and return its routes."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=8,
        num_experts_per_tok=2,
        output_router_logits=True,
    )
    model: Any = MixtralForCausalLM(config).train()
    if is_checkpointed:
        model.activation_checkpointing_enable()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    batches = torch.Generator().manual_seed(0)
    with MoEDebugger(model, level="routes", step_domain="global") as debugger:
        for number in range(24):
            tokens = torch.randint(0, 256, (8, 32), generator=batches)
            with debugger.step(number):
                model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        session = debugger.session
        assert session is not None
        return session.decisions()


def test_a_checkpointed_training_has_the_counts_and_findings_of_a_plain_one() -> None:
    plain, again = (analyze(trained(is_checkpointed=on), num_experts=8, top_k=2) for on in (False, True))
    for layer, metrics in plain.metrics.items():
        assert metrics.num_tokens == 24 * 8 * 32
        assert (again.metrics[layer].num_tokens, again.metrics[layer].share) == (metrics.num_tokens, metrics.share)
    assert [finding.rule_id for finding in again.findings] == [finding.rule_id for finding in plain.findings]
    assert {finding.severity for finding in again.findings} <= {Severity.INFO}
