"""The life of a session's findings: opened, updated, closed, opened again. Pure: no Redis, no SQL, no clock."""

from collections.abc import Iterable, Mapping

from moe_analyzer.blob import pack, unpack
from moe_debugger.analysis import Analysis, FindingKind, Thresholds, WarningStatus, findings_to_proto
from moe_debugger.catalogue import FindingMarks
from moe_debugger.v1 import session_pb2 as pb

__all__ = ["QUIET_SECONDS_TO_CLOSE", "TrackedFindings", "with_marks"]

# A rule that does not hold for this many judged seconds of data in a row is over. The recent window smooths already;
# this keeps a value that sways around its limit from opening and closing all the time.
QUIET_SECONDS_TO_CLOSE = 10
# The closed ones that were seen longest ago go first.
_MAX_FINDINGS = 256
_NS = 1_000_000_000
# These speak of what is there, however little that is; all others need the evidence that docs/metrics.md asks for.
_NEED_NO_MINIMUM = {FindingKind.CAPTURE_UNHEALTHY, FindingKind.CAPACITY_OVERFLOW}
_INSUFFICIENT = "insufficient_evidence"
# Kinds whose rules do not look at a collapsed layer (docs/metrics.md, "Order").
_PART_OF_COLLAPSE = {
    FindingKind.DEAD_EXPERT,
    FindingKind.COLD_EXPERT,
    FindingKind.HOT_EXPERT,
    FindingKind.LOAD_IMBALANCE,
    FindingKind.RANK_STRAGGLER,
    FindingKind.DRIFT,
    FindingKind.DUPLICATE_EXPERTS,
}
_ORDER = (pb.FINDING_STATE_OPEN, pb.FINDING_STATE_SUPERSEDED, pb.FINDING_STATE_CLOSED)


class TrackedFindings:
    """Findings by rule id: one entry each, however often the rule holds.

    An occurrence is one second of broker time in which the rule held, so looking twice at the same data counts once. A
    second in which the rule does not hold counts towards the end only where there was enough data to judge it: silence
    is no recovery. Nor is it one where the rule does not look because of an open finding that says more, such as the
    collapse of the layer: the finding is superseded by that one until its rule speaks again.

    Attributes:
        evaluated_ns: broker time of the newest data that was looked at.
        turned: rule ids that opened, closed or were superseded since this object was made.
        evicted: rule ids that had to go since this object was made.
    """

    def __init__(self, findings: dict[str, pb.Finding] | None = None, evaluated_ns: int = 0) -> None:
        self.findings = findings or {}
        self.evaluated_ns = evaluated_ns
        self.turned: set[str] = set()
        self.evicted: set[str] = set()

    def update(self, analysis: Analysis, newest_ns: int, thresholds: Thresholds | None = None) -> bool:
        """Take in what holds now, of data up to `newest_ns`; return False where that says nothing new."""
        holding = {finding.rule_id: finding for finding in findings_to_proto(analysis.findings)}
        if newest_ns < self.evaluated_ns:
            return False
        is_new_second = newest_ns // _NS > self.evaluated_ns // _NS
        known = set(self.findings)
        # What a source says of its capture may change without new data.
        has_news = newest_ns > self.evaluated_ns
        for finding in holding.values():
            has_news |= self._hold(finding, newest_ns, is_new_second=is_new_second)
        if not has_news:
            return False
        limits = thresholds or Thresholds()
        for rule_id, finding in self.findings.items():
            if rule_id in holding or finding.state == pb.FINDING_STATE_CLOSED:
                continue
            greater = self._greater(finding)
            if greater:
                self._supersede(finding, greater)
            elif is_new_second and _is_judged(finding, analysis, limits):
                self._be_quiet(finding, newest_ns)
        self.evaluated_ns = newest_ns
        self._evict(known)
        return True

    def _is_open(self, rule_id: str) -> bool:
        return rule_id in self.findings and self.findings[rule_id].state == pb.FINDING_STATE_OPEN

    def _hold(self, finding: pb.Finding, newest_ns: int, *, is_new_second: bool) -> bool:
        """Take in a finding that holds, and return whether anything about it is new."""
        before = self.findings.get(finding.rule_id)
        finding.state = pb.FINDING_STATE_OPEN
        finding.num_quiet_seconds_to_close = QUIET_SECONDS_TO_CLOSE
        finding.last_seen_at_unix_ns = newest_ns
        finding.first_seen_at_unix_ns = finding.opened_at_unix_ns = newest_ns
        finding.num_occurrences = 1
        if before is not None:
            finding.first_seen_at_unix_ns = before.first_seen_at_unix_ns
            finding.num_occurrences = before.num_occurrences + is_new_second
            finding.num_reopened = before.num_reopened
            if before.state == pb.FINDING_STATE_CLOSED:
                finding.num_reopened += 1
            else:
                # Later looks see other rows, and would move the begin of an episode that has one.
                finding.opened_at_unix_ns = before.opened_at_unix_ns
                if before.HasField("since_step"):
                    finding.since_step = before.since_step
        if before is None or before.state != pb.FINDING_STATE_OPEN:
            self.turned.add(finding.rule_id)
        self.findings[finding.rule_id] = finding
        # Not by ==: NaN differs from itself.
        return before is None or _content(before) != _content(finding)

    def _greater(self, finding: pb.Finding) -> str:
        """Return the rule id of an open finding beside which the rule of `finding` does not speak; empty for none."""
        # Detectors of others know nothing of it.
        if not finding.HasField("layer_index") or "." in finding.code:
            return ""
        layer, kind = f"l{finding.layer_index}", _kind(finding)
        names = [f"router_collapse.{layer}"] if kind in _PART_OF_COLLAPSE else []
        if kind is FindingKind.COLD_EXPERT:
            names.append(f"dead_expert.{layer}.e{finding.expert_id}")
        if kind is FindingKind.LOAD_IMBALANCE:
            names += sorted(name for name in self.findings if name.startswith(f"hot_expert.{layer}.e"))
        if finding.code == "load_imbalance_steps":
            names.append(f"load_imbalance.{layer}")
        return next((name for name in names if self._is_open(name)), "")

    def _supersede(self, finding: pb.Finding, greater: str) -> None:
        finding.num_quiet_seconds = 0
        if finding.superseded_by != greater:
            finding.state, finding.superseded_by = pb.FINDING_STATE_SUPERSEDED, greater
            self.turned.add(finding.rule_id)

    def _be_quiet(self, finding: pb.Finding, newest_ns: int) -> None:
        finding.num_quiet_seconds += 1
        if finding.num_quiet_seconds >= QUIET_SECONDS_TO_CLOSE:
            finding.state, finding.superseded_by = pb.FINDING_STATE_CLOSED, ""
            finding.closed_at_unix_ns = newest_ns
            self.turned.add(finding.rule_id)

    def _evict(self, known: set[str]) -> None:
        by_worth = sorted(
            self.findings.values(),
            key=lambda one: (-_ORDER.index(one.state), one.last_seen_at_unix_ns, one.severity, one.rule_id),
        )
        for old in by_worth[: max(0, len(by_worth) - _MAX_FINDINGS)]:
            del self.findings[old.rule_id]
            self.turned.discard(old.rule_id)
            if old.rule_id in known:
                self.evicted.add(old.rule_id)

    def in_order(self) -> list[pb.Finding]:
        """Return the findings: open ones first, closed ones last, of these the most severe first."""
        return sorted(self.findings.values(), key=lambda one: (_ORDER.index(one.state), -one.severity, one.rule_id))

    def encode(self) -> bytes:
        """Return the findings as a Redis value."""
        values = [finding.SerializeToString() for finding in self.findings.values()]
        return pack({"kind": "findings", "evaluated": self.evaluated_ns}, values)

    @classmethod
    def decode(cls, data: bytes) -> "TrackedFindings":
        """Return the findings that `encode` gave."""
        header, columns = unpack(data)
        return cls.of_messages(columns, header["evaluated"])

    @classmethod
    def of_messages(cls, messages: Iterable[bytes], evaluated_ns: int) -> "TrackedFindings":
        """Return findings from their messages."""
        findings = [pb.Finding.FromString(message) for message in messages]
        for finding in findings:
            # Written before findings had a life: all of them were shown as present.
            if finding.state == pb.FINDING_STATE_UNSPECIFIED:
                finding.state = pb.FINDING_STATE_OPEN
                finding.opened_at_unix_ns = finding.first_seen_at_unix_ns
                finding.num_quiet_seconds_to_close = QUIET_SECONDS_TO_CLOSE
        return cls({finding.rule_id: finding for finding in findings}, evaluated_ns)


def with_marks(findings: Iterable[pb.Finding], marks: Mapping[str, FindingMarks], now_ns: int) -> list[pb.Finding]:
    """Return copies of `findings` that bear what people said about them.

    Args:
        marks: by rule id. An acknowledgement is of the episode that began at its `acknowledged_opened_at_unix_ns`.
        now_ns: a silence that has ended by then is none.
    """
    marked = []
    for finding in findings:
        copy = pb.Finding()
        copy.CopyFrom(finding)
        mark = marks.get(finding.rule_id)
        if mark is not None:
            if mark.acknowledged_at_unix_ns and mark.acknowledged_opened_at_unix_ns == finding.opened_at_unix_ns:
                copy.acknowledged_at_unix_ns, copy.acknowledged_by = mark.acknowledged_at_unix_ns, mark.acknowledged_by
            if mark.silenced_until_unix_ns > now_ns:
                copy.silenced_until_unix_ns, copy.silenced_by = mark.silenced_until_unix_ns, mark.silenced_by
        marked.append(copy)
    return marked


def _content(finding: pb.Finding) -> bytes:
    return finding.SerializeToString(deterministic=True)


def _kind(finding: pb.Finding) -> FindingKind:
    return FindingKind(pb.FindingKind.Name(finding.kind).removeprefix("FINDING_KIND_").lower())


def _is_judged(finding: pb.Finding, analysis: Analysis, limits: Thresholds) -> bool:
    """Return whether the data were enough for the rule of `finding` to speak, had it held."""
    if not finding.HasField("layer_index"):
        return True
    metrics = analysis.metrics.get(finding.layer_index)
    if metrics is None or not metrics.num_tokens:
        return False
    kind = _kind(finding)
    if kind in _NEED_NO_MINIMUM or finding.code == _INSUFFICIENT:
        return True
    if any(one.code == _INSUFFICIENT and one.layer_index == finding.layer_index for one in analysis.findings):
        return False
    if kind is FindingKind.COLLAPSE_WARNING:
        report = analysis.early_warning
        layer = None if report is None else report.layers.get(finding.layer_index)
        return layer is not None and layer.status is WarningStatus.WATCHING
    # What warns rests on requests, where there are any: a session that is captured as sums has none.
    needs_requests = finding.severity > pb.SEVERITY_INFO and analysis.num_requests > 0
    has_enough = analysis.num_requests >= limits.min_requests if needs_requests else metrics.num_blocks > 0
    return metrics.num_tokens >= limits.min_tokens and has_enough
