"""A router that is really trained the wrong way, over NATS into an analyzer: its snapshot says since when and why."""

from typing import Any

import pytest
import torch
from analyzer_process import Analyzer
from servers import NatsServer, eventually
from tiny_moe import VOCABULARY, build

from moe_debugger import MoEDebugger, new_id
from moe_debugger.analysis.explanation import explanation_from_proto, explanation_text
from moe_debugger.demo.training import switch_balance_loss
from moe_debugger.v1 import analyzer_pb2 as pb
from moe_debugger.v1 import session_pb2

FAULT_STEP, NUM_STEPS, TOP_K = 20, 90, 2


def train(debugger: MoEDebugger, model: Any) -> None:
    """Train 90 steps, from step 20 on with the sign of the balancing term turned."""
    torch.manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for n in range(NUM_STEPS):
        coefficient = 0.05 if n < FAULT_STEP else -0.3
        ids = torch.randint(3, VOCABULARY, (8, 32))
        with debugger.step(n) as step:
            output = model(input_ids=ids, labels=ids, use_cache=False, output_router_logits=True)
            terms = [switch_balance_loss(logits.unsqueeze(0), TOP_K).mean() for logits in output.router_logits]
            (output.loss + coefficient * torch.stack(terms).sum()).backward()
            step.record(loss=output.loss, balance_coef=coefficient)
            optimizer.step()
            optimizer.zero_grad()


def explained(analyzer: Analyzer, session_id: str) -> session_pb2.Finding:
    """Return the finding of falling load once its explanation has seen the series up to the end."""
    request = pb.AnalyzerServiceGetSnapshotRequest(tenant="default", session_id=session_id)

    def is_there() -> session_pb2.Finding | None:
        for finding in analyzer.stub.GetSnapshot(request, timeout=5).snapshot.findings:
            if finding.HasField("layer_index") and finding.explanation.causes:
                return finding
        return None

    found = eventually(is_there, 40)
    assert isinstance(found, session_pb2.Finding)
    return found


@pytest.mark.timeout(180)
def test_the_snapshot_explains_a_collapse_by_the_sign_that_was_streamed_with_it(
    nats: NatsServer, analyzer: Analyzer
) -> None:
    model = build("mixtral", seed=1).train()
    with MoEDebugger(model, fleet=nats.url, session_name=new_id(), step_domain="global", kind="training") as debugger:
        train(debugger, model)
        assert debugger.session is not None
        session_id = debugger.session.session_id
        assert session_id is not None
        finding = explained(analyzer, session_id)
    cause = finding.explanation.causes[0]
    assert (cause.code, cause.args["step"], cause.is_association) == ("balancing_sign_turned", "20", True)
    assert finding.explanation.started_at.first_step <= FAULT_STEP + 20
    assert sum(one.weight for one in finding.explanation.causes) + finding.explanation.unexplained == pytest.approx(1)
    assert [one.name for one in finding.explanation.missing] == ["balance_loss", "lr", "router_gradient_norm"]
    lines = explanation_text(explanation_from_proto(finding.explanation, finding.rule_id))
    assert any("router_aux_loss_coef: 0.05" in line for line in lines)
