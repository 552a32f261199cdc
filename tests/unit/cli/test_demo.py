"""The findings at the end of `demo` come from the loads of the run, by the same rules as everywhere."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc

from moe_debugger.cli.demo import _Account, _fleet_findings, _line
from moe_debugger.demo.scenarios import ScenarioStep, plan_scenario
from moe_debugger.demo.training import StepResult
from moe_debugger.embedded.endpoints import Endpoints
from moe_debugger.v1 import gateway_pb2, gateway_pb2_grpc, session_pb2

_HEALTHY = ((250, 260, 255, 259, 250, 256, 260, 258),) * 4
_COLLAPSED = ((1024, 1024, 0, 0, 0, 0, 0, 0),) * 4


def _step(number: int, counts: tuple[tuple[int, ...], ...], *, is_fault_on: bool) -> ScenarioStep:
    return ScenarioStep(
        plan=plan_scenario("collapse", steps=200, fault_step=100),
        result=StepResult(step=number, loss=2.0, balance_loss=1.0, counts=counts),
        balance_coef=-0.3 if is_fault_on else 0.05,
        is_fault_on=is_fault_on,
        elapsed_s=1.0,
    )


def test_sums_of_a_collapsed_run_warn_in_sentences_and_say_since_when_and_why() -> None:
    account = _Account()
    for number in range(200):
        account.add(_step(number, _HEALTHY if number < 100 else _COLLAPSED, is_fault_on=number >= 100))
    findings = account.findings()
    assert all("and now uses 2 (at most 2 with 95 % confidence)" in sentence for _, sentence in findings), findings
    # No early warning: at the fault it was still learning what is normal.
    assert [severity for severity, _ in findings] == ["critical"] * 4
    assert all("{{" not in sentence and " " in sentence for _, sentence in findings)
    for _, _, explanation in account.explained_findings():
        text = "\n".join(explanation)
        # 200 steps are joined in pairs.
        assert "at step 100 (steps 100 to 101)" in text
        assert "turned from 0.05 to -0.3 at step 100" in text
        assert "router_aux_loss_coef: 0.05" in text
        assert "{{" not in text


def test_a_healthy_run_has_no_alarm() -> None:
    account = _Account()
    for number in range(200):
        account.add(_step(number, _HEALTHY, is_fault_on=False))
    assert [finding for finding in account.findings() if finding[0] != "info"] == []


def test_a_line_names_the_fault_while_it_is_on() -> None:
    assert "FAULT" in _line(_step(120, _COLLAPSED, is_fault_on=True))
    assert "effective experts by layer: 2.0 2.0 2.0 2.0" in _line(_step(120, _COLLAPSED, is_fault_on=True))
    assert "FAULT" not in _line(_step(1, _HEALTHY, is_fault_on=False))


class _Gateway(gateway_pb2_grpc.DebuggerServiceServicer):
    def ListSessions(self, request: Any, context: Any) -> gateway_pb2.ListSessionsResponse:
        return gateway_pb2.ListSessionsResponse(sessions=[session_pb2.Session(session_id="s", name="demo collapse")])

    def GetSession(self, request: Any, context: Any) -> gateway_pb2.GetSessionResponse:
        def finding(code: str, **values: Any) -> session_pb2.Finding:
            return session_pb2.Finding(
                rule_id=code,
                code=code,
                kind=session_pb2.FINDING_KIND_DEAD_EXPERT,
                args={"layer": "1", "expert": "2"},
                **values,
            )

        findings = [
            finding("dead_expert", severity=2),
            finding("cold_expert", severity=1, state=session_pb2.FINDING_STATE_CLOSED),
            finding("load_imbalance", severity=2, state=session_pb2.FINDING_STATE_SUPERSEDED),
            finding("hot_expert", severity=2, silenced_until_unix_ns=2**62),
        ]
        return gateway_pb2.GetSessionResponse(snapshot=session_pb2.SessionSnapshot(findings=findings))


def test_of_a_fleets_findings_those_that_are_open_are_told() -> None:
    server = grpc.server(ThreadPoolExecutor(2))
    gateway_pb2_grpc.add_DebuggerServiceServicer_to_server(_Gateway(), server)  # type: ignore[abstract]
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        endpoints = Endpoints(page="", grpc=f"127.0.0.1:{port}", nats="", redis="", worker="")
        found = _fleet_findings(endpoints, "demo collapse")
    finally:
        server.stop(None)
    assert found is not None
    assert [(severity, explanation) for severity, _, explanation in found] == [("warning", [])]
    assert "Expert 2 of layer 1" in found[0][1]
