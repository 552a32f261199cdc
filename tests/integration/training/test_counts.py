"""A training at level "counts" into a fleet: sums know their steps, and the last step's series arrive."""

import pytest
import tiny_moe
import torch
from servers import NatsServer
from source_broker import Broker

from moe_debugger import MoEDebugger
from moe_debugger.training import SERIES_NAMES

torch.set_num_threads(1)
NUM_STEPS, ACCUMULATION, BATCH, LENGTH = 4, 2, 2, 8


@pytest.mark.parametrize("first_step", [1, 5_000_000_000])
def test_sums_and_series_belong_to_the_global_step(first_step: int) -> None:
    steps = list(range(first_step, first_step + NUM_STEPS))
    with NatsServer() as server:
        broker = Broker(server)
        broker.start()
        try:
            model = tiny_moe.build("deepseek_v3", output_router_logits=True).train()
            options = {"step_domain": "global", "gradients": True, "kind": "training"}
            with MoEDebugger(model, fleet=server.url, level="counts", **options) as debugger:  # type: ignore[arg-type]
                for step in steps:
                    with debugger.step(step, lr=0.1, balance_coef=0.01, balance_loss=1.0, grad_norm=2.0) as scope:
                        for _ in range(ACCUMULATION):
                            ids = torch.randint(3, tiny_moe.VOCABULARY, (BATCH, LENGTH))
                            loss = model(input_ids=ids, labels=ids).loss
                            loss.backward()
                            scope.record(loss=loss)
                    model.zero_grad()
                # Left at once: what was recorded last goes out with the goodbye.
            messages = [message for _, message in broker.messages()]
        finally:
            broker.stop()
    counts = [message.counts for message in messages if message.WhichOneof("payload") == "counts"]
    assert not [message for message in messages if message.WhichOneof("payload") == "batch"]
    assert min(one.first_step for one in counts) == steps[0]
    assert max(one.last_step for one in counts) == steps[-1]
    tokens = sum(layer.num_tokens for one in counts for layer in one.layers if layer.layer_index == 0)
    assert tokens == NUM_STEPS * ACCUMULATION * BATCH * LENGTH
    statuses = [message.status for message in messages if message.WhichOneof("payload") == "status"]
    points = [point for status in statuses for point in status.series_points]
    assert {point.name for point in points} == set(SERIES_NAMES)
    for name in SERIES_NAMES:
        assert sorted({point.step for point in points if point.name == name}) == steps
    assert statuses[-1].last_step == steps[-1]
    assert statuses[-1].series["lr"] == 0.1
    assert statuses[-1].num_series_points_dropped == 0
    # The newest values are those of the whole model only: a layer's would overwrite one another.
    assert not {"router_gradient_norm", "expert_gradient_norm"} & set(statuses[-1].series)
