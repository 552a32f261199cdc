"""What the fleet sees, in a few lines: read from the gateway by gRPC, as any client could."""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import grpc

from moe_debugger.messages import render_finding
from moe_debugger.v1 import gateway_pb2, gateway_pb2_grpc, session_pb2

__all__ = ["Summary", "SummaryReader", "finding_sentence", "findings_of", "open_findings"]

_CALL_TIMEOUT_S = 3.0
_INTERVAL_S = 1.0
_MAX_FINDINGS = 5
_SEVERITIES = {
    session_pb2.SEVERITY_CRITICAL: "critical",
    session_pb2.SEVERITY_WARNING: "warning",
    session_pb2.SEVERITY_INFO: "info",
}


@dataclass(frozen=True, slots=True)
class Summary:
    """One look at the fleet.

    Attributes:
        name: the session looked at, the one seen last; empty where there is none.
        tokens_per_s: valid tokens routed since the look before.
        worst_layer: index of the layer with the fewest effective experts; -1 where no layer has routed lately.
        findings: severity and sentence, the worst first.
        problem: what hinders the look; empty where nothing does.
    """

    num_open_sessions: int = 0
    name: str = ""
    model_name: str = ""
    num_tokens: int = 0
    tokens_per_s: float = 0.0
    worst_layer: int = -1
    worst_effective_experts: float = 0.0
    worst_num_experts: int = 0
    findings: tuple[tuple[str, str], ...] = ()
    problem: str = ""

    def lines(self) -> list[str]:
        """Return the summary as plain lines."""
        if self.problem:
            return [f"waiting for the gateway: {self.problem}"]
        if not self.name:
            return ["no session yet: type a prompt on the page, or run `moe-debugger demo`"]
        first = (
            f"{self.num_open_sessions} open session(s); {self.name} ({self.model_name}): "
            f"{self.num_tokens:,} tokens, {self.tokens_per_s:,.0f} tokens/s"
        )
        if self.worst_layer >= 0:
            first += (
                f"; fewest effective experts: {self.worst_effective_experts:.1f} of {self.worst_num_experts} "
                f"in layer {self.worst_layer}"
            )
        return [first, *(f"{severity}: {sentence}" for severity, sentence in self.findings)]


def finding_sentence(code: str, args: dict[str, str]) -> str:
    """Return a finding in words; its code where the catalogue of messages has none."""
    return render_finding(code, args)


class SummaryReader(threading.Thread):
    """Looks at the fleet once a second until it is closed."""

    def __init__(self, grpc_target: str, on_summary: Callable[[Summary], None]) -> None:
        super().__init__(name="fleet-summary", daemon=True)
        self._target = grpc_target
        self._on_summary = on_summary
        self._is_closed = threading.Event()
        self._before: tuple[str, int, float] = ("", 0, 0.0)

    def close(self) -> None:
        """Stop looking."""
        self._is_closed.set()
        self.join(_CALL_TIMEOUT_S + 1)

    def run(self) -> None:
        """Look until closed."""
        options = (("grpc.enable_http_proxy", 0),)
        with grpc.insecure_channel(self._target, options=options) as channel:
            stub = gateway_pb2_grpc.DebuggerServiceStub(channel)
            while not self._is_closed.wait(_INTERVAL_S):
                try:
                    summary = self._look(stub)
                except grpc.RpcError as error:
                    details = error.details() if isinstance(error, grpc.Call) else str(error)
                    summary = Summary(problem=details or "no answer")
                if not self._is_closed.is_set():
                    self._on_summary(summary)

    def _look(self, stub: gateway_pb2_grpc.DebuggerServiceStub) -> Summary:
        answer = stub.ListSessions(gateway_pb2.ListSessionsRequest(), timeout=_CALL_TIMEOUT_S)
        is_open = (session_pb2.SESSION_STATE_OPEN, session_pb2.SESSION_STATE_STALE)
        sessions = [session for session in answer.sessions if session.state in is_open]
        if not sessions:
            return Summary()
        newest = max(sessions, key=lambda session: session.last_seen_at_unix_ns)
        request = gateway_pb2.GetSessionRequest(session_id=newest.session_id)
        snapshot = stub.GetSession(request, timeout=_CALL_TIMEOUT_S).snapshot
        num_tokens = max((layer.num_tokens for layer in snapshot.layers), default=0)
        now = time.monotonic()
        session_id, num_before, at = self._before
        is_same = session_id == newest.session_id and num_tokens >= num_before
        rate = (num_tokens - num_before) / (now - at) if is_same else 0.0
        self._before = (newest.session_id, num_tokens, now)
        worst = _worst_layer(snapshot.layers)
        return Summary(
            num_open_sessions=len(sessions),
            name=newest.name,
            model_name=newest.model_name,
            num_tokens=num_tokens,
            tokens_per_s=rate,
            worst_layer=worst.description.layer_index if worst else -1,
            worst_effective_experts=worst.effective_experts if worst else 0.0,
            worst_num_experts=worst.description.num_experts if worst else 0,
            findings=tuple(findings_of(snapshot.findings)[:_MAX_FINDINGS]),
        )


def _worst_layer(layers: Sequence[session_pb2.LayerSnapshot]) -> session_pb2.LayerSnapshot | None:
    """Return the layer that uses the smallest part of its experts in the recent window."""
    active = [layer for layer in layers if layer.recent_num_tokens and layer.description.num_experts]
    return min(active, key=lambda layer: layer.effective_experts / layer.description.num_experts, default=None)


def open_findings(findings: Sequence[session_pb2.Finding]) -> list[session_pb2.Finding]:
    """Return the findings that are open and not silenced, the worst first; none that is part of another."""
    return [
        finding
        for finding in sorted(findings, key=lambda finding: -finding.severity)
        if finding.state not in (session_pb2.FINDING_STATE_CLOSED, session_pb2.FINDING_STATE_SUPERSEDED)
        and not finding.silenced_until_unix_ns
    ]


def findings_of(findings: Sequence[session_pb2.Finding]) -> list[tuple[str, str]]:
    """Return severity and sentence of each of `open_findings`."""
    return [
        (_SEVERITIES.get(finding.severity, "info"), finding_sentence(finding.code, dict(finding.args)))
        for finding in open_findings(findings)
    ]
