"""What was found in a session, when first, when last and how often. Pure."""

from moe_analyzer.blob import pack, unpack
from moe_debugger.analysis import Analysis, findings_to_proto
from moe_debugger.v1 import session_pb2 as pb

__all__ = ["TrackedFindings"]

# Of the resolved ones the oldest go first.
_MAX_FINDINGS = 256


class TrackedFindings:
    """Findings by rule id.

    An occurrence is one second of broker time in which the rule held, so looking twice at the same data counts once.
    """

    def __init__(self, findings: dict[str, pb.Finding] | None = None, evaluated_ns: int = 0) -> None:
        self.findings = findings or {}
        self.evaluated_ns = evaluated_ns

    def update(self, analysis: Analysis, newest_ns: int) -> bool:
        """Take in what holds now, of data up to `newest_ns`; return False where that says nothing new."""
        known = self.findings.keys()
        if newest_ns < self.evaluated_ns or (
            newest_ns == self.evaluated_ns and all(finding.rule_id in known for finding in analysis.findings)
        ):
            return False
        is_new_second = newest_ns // 1_000_000_000 > self.evaluated_ns // 1_000_000_000
        for finding in findings_to_proto(analysis.findings):
            before = self.findings.get(finding.rule_id)
            finding.last_seen_at_unix_ns = newest_ns
            if before is None:
                finding.first_seen_at_unix_ns, finding.num_occurrences = newest_ns, 1
            else:
                finding.first_seen_at_unix_ns = before.first_seen_at_unix_ns
                finding.num_occurrences = before.num_occurrences + is_new_second
                if before.HasField("since_step"):
                    finding.since_step = min(before.since_step, finding.since_step)
            self.findings[finding.rule_id] = finding
        self.evaluated_ns = newest_ns
        by_age = sorted(self.findings.values(), key=lambda one: one.last_seen_at_unix_ns)
        for old in by_age[: max(0, len(by_age) - _MAX_FINDINGS)]:
            del self.findings[old.rule_id]
        return True

    def in_order(self) -> list[pb.Finding]:
        """Return the findings: those that hold now first, the most severe first."""
        return sorted(
            self.findings.values(),
            key=lambda one: (-(one.last_seen_at_unix_ns == self.evaluated_ns), -one.severity, one.rule_id),
        )

    def encode(self) -> bytes:
        """Return the findings as a Redis value."""
        values = [finding.SerializeToString() for finding in self.findings.values()]
        return pack({"kind": "findings", "evaluated": self.evaluated_ns}, values)

    @classmethod
    def decode(cls, data: bytes | None) -> "TrackedFindings":
        """Return the findings that `encode` gave."""
        if data is None:
            return cls()
        header, columns = unpack(data)
        findings = [pb.Finding.FromString(column) for column in columns]
        return cls({finding.rule_id: finding for finding in findings}, header["evaluated"])
