"""No false alarm: on every architecture of the zoo all checks of a left-padded forward are known and pass."""

import pytest
import torch
from zoo.build import ALL

from moe_debugger import MoEDebugger
from moe_debugger.capture_health import CheckStatus


@pytest.mark.parametrize("name", list(ALL))
def test_every_architecture_is_healthy_and_accounts_for_every_slot(name: str) -> None:
    build = ALL[name]
    model = build.make()
    with torch.no_grad(), MoEDebugger(model) as debugger:
        model(**build.inputs(model))
        assert debugger.session is not None
        health = debugger.session.capture_health()
        stats = debugger.get_routing_stats()
    assert {check.name: check.example for check in health.checks if check.status is not CheckStatus.OK} in (
        {},
        {"overhead": health.check("overhead").example},
    )
    assert health.is_healthy, health.problems
    for layer in stats.layers:
        slots = layer.num_dropped_slots + layer.num_skipped_slots + layer.num_identity_slots + layer.num_unused_slots
        assert int(layer.expert_counts.sum()) + slots == layer.num_tokens * layer.info.top_k
