"""The life of a finding: open, update, close, open again; what counts as a second; marks of people; the bound."""

import math
from dataclasses import replace

import pytest

from moe_analyzer.findings import QUIET_SECONDS_TO_CLOSE, TrackedFindings, with_marks
from moe_debugger.analysis import Analysis, Finding, FindingKind, RoutingState, Severity, Thresholds, finish
from moe_debugger.analysis.early_warning import LayerWarning, WarningReport, WarningStatus
from moe_debugger.analysis.metrics import LayerMetrics
from moe_debugger.analysis.state import LayerShape
from moe_debugger.catalogue import FindingMarks
from moe_debugger.v1 import session_pb2 as pb

SECOND = 1_000_000_000
HOT = "hot_expert.l1.e2"
_EMPTY = finish(RoutingState.empty([LayerShape(index, 8, 2) for index in range(3)]))


def hot(step: int | None = None, *, layer: int = 1, expert: int = 2, severity: Severity = Severity.WARNING) -> Finding:
    return Finding(FindingKind.HOT_EXPERT, severity, "hot_expert", layer, expert, since_step=step)


def look(
    *findings: Finding,
    num_tokens: int = 5000,
    num_requests: int = 50,
    num_blocks: int = 20,
    early_warning: WarningReport | None = None,
) -> Analysis:
    """An analysis of layers with so much data, and what was found in it."""
    metrics: dict[int, LayerMetrics] = {
        index: replace(one, num_tokens=num_tokens, num_blocks=num_blocks) for index, one in _EMPTY.metrics.items()
    }
    return Analysis(metrics=metrics, findings=findings, num_requests=num_requests, early_warning=early_warning)


class Session:
    """Looks at one second of data after the other."""

    def __init__(self) -> None:
        self.tracked = TrackedFindings()
        self.second = 1000

    def see(self, analysis: Analysis, seconds: int = 1) -> pb.Finding:
        for _ in range(seconds):
            self.second += 1
            self.tracked.update(analysis, self.second * SECOND)
        return self.tracked.findings[HOT]


def test_a_finding_opens_once_and_is_updated() -> None:
    session = Session()
    first = session.see(look(hot(step=70)))
    assert (first.state, first.num_occurrences) == (pb.FINDING_STATE_OPEN, 1)
    assert first.opened_at_unix_ns == first.first_seen_at_unix_ns == first.last_seen_at_unix_ns == 1001 * SECOND
    assert session.tracked.turned == {HOT}
    again = session.see(look(hot(step=90, severity=Severity.CRITICAL)), 3)
    assert list(session.tracked.findings) == [HOT]
    assert again.severity == pb.SEVERITY_CRITICAL
    assert (again.since_step, again.num_occurrences) == (70, 4)
    assert (again.opened_at_unix_ns, again.last_seen_at_unix_ns) == (1001 * SECOND, 1004 * SECOND)
    # Later looks see other rows: the begin that was said stays.
    assert session.see(look(hot(step=60))).since_step == 70
    assert session.see(look(hot())).since_step == 70
    assert session.tracked.turned == {HOT}


def test_the_same_data_count_once_and_older_data_not_at_all() -> None:
    tracked = TrackedFindings()
    assert tracked.update(look(hot()), 5 * SECOND)
    assert not tracked.update(look(hot()), 5 * SECOND)
    assert not tracked.update(look(hot(expert=3)), 4 * SECOND)
    # Within a second: the newest is taken over, the occurrence is the same.
    assert tracked.update(look(hot()), 5 * SECOND + 5)
    assert tracked.findings[HOT].num_occurrences == 1
    # A rule that holds since other data of the same instant came: it is new.
    assert tracked.update(look(hot(), hot(expert=3)), 5 * SECOND + 5)
    assert len(tracked.findings) == 2


def test_what_a_source_says_later_of_the_same_data_is_taken_over() -> None:
    def capture(reasons: str) -> Analysis:
        words = {"reasons": reasons}
        return look(Finding(FindingKind.CAPTURE_UNHEALTHY, Severity.WARNING, "capture_unhealthy", args=words))

    tracked = TrackedFindings()
    assert tracked.update(capture("drops"), 5 * SECOND)
    assert tracked.update(capture("drops; range: expert 9"), 5 * SECOND)
    assert not tracked.update(capture("drops; range: expert 9"), 5 * SECOND)
    (finding,) = tracked.findings.values()
    assert (finding.args["reasons"], finding.num_occurrences) == ("drops; range: expert 9", 1)


def test_it_closes_after_so_many_quiet_seconds_in_a_row_and_not_before() -> None:
    session = Session()
    session.see(look(hot(step=1)))
    for _ in range(3):
        # It sways around the limit: every time but the last it holds again just in time.
        almost = session.see(look(), QUIET_SECONDS_TO_CLOSE - 1)
        assert (almost.state, almost.num_quiet_seconds) == (pb.FINDING_STATE_OPEN, QUIET_SECONDS_TO_CLOSE - 1)
        assert session.see(look(hot(step=2))).num_quiet_seconds == 0
    assert session.tracked.turned == {HOT}
    seen_at = session.second * SECOND
    closed = session.see(look(), QUIET_SECONDS_TO_CLOSE)
    assert (closed.state, closed.closed_at_unix_ns) == (pb.FINDING_STATE_CLOSED, session.second * SECOND)
    assert (closed.last_seen_at_unix_ns, closed.num_occurrences, closed.since_step) == (seen_at, 4, 1)
    later = session.see(look(), 5)
    assert later.closed_at_unix_ns == closed.closed_at_unix_ns


def test_looking_often_within_a_second_is_one_quiet_second() -> None:
    tracked = TrackedFindings()
    tracked.update(look(hot()), 5 * SECOND)
    for part in range(3 * QUIET_SECONDS_TO_CLOSE):
        tracked.update(look(), 6 * SECOND + part)
    assert tracked.findings[HOT].num_quiet_seconds == 1


@pytest.mark.parametrize(
    "thin",
    [
        look(num_tokens=999),
        look(num_requests=19),
        look(num_tokens=0, num_requests=0),
        look(num_requests=0, num_blocks=0),
        look(Finding(FindingKind.LOAD_IMBALANCE, Severity.INFO, "insufficient_evidence", 1)),
        replace(look(), metrics={}),
    ],
    ids=["few tokens", "few requests", "no tokens", "no blocks", "insufficient evidence", "no layer"],
)
def test_too_little_data_is_no_recovery(thin: Analysis) -> None:
    session = Session()
    session.see(look(hot()))
    assert session.see(thin, 5 * QUIET_SECONDS_TO_CLOSE).state == pb.FINDING_STATE_OPEN
    # Sums have no requests, and are judged by their tokens.
    assert session.see(look(num_requests=0), QUIET_SECONDS_TO_CLOSE).state == pb.FINDING_STATE_CLOSED


def test_what_does_not_warn_is_judged_without_so_many_requests() -> None:
    session = Session()
    session.see(look(hot(severity=Severity.INFO)))
    assert session.see(look(num_requests=3), QUIET_SECONDS_TO_CLOSE).state == pb.FINDING_STATE_CLOSED


def test_an_early_warning_closes_when_its_layer_is_watched_again() -> None:
    def report(status: WarningStatus) -> WarningReport:
        return WarningReport({1: LayerWarning(1, status, num_experts=8, threshold=5.0)}, 1e6)

    warning = Finding(FindingKind.COLLAPSE_WARNING, Severity.WARNING, "collapse_warning", 1)
    session = Session()
    session.see(look(hot(), warning, early_warning=report(WarningStatus.WARNED)))
    # Nothing is known of a layer that is learnt anew, and nothing without steps of a training.
    session.see(look(hot(), early_warning=report(WarningStatus.LEARNING)), 2 * QUIET_SECONDS_TO_CLOSE)
    session.see(look(hot()), 2 * QUIET_SECONDS_TO_CLOSE)
    assert session.tracked.findings["collapse_warning.l1"].state == pb.FINDING_STATE_OPEN
    session.see(look(hot(), early_warning=report(WarningStatus.WATCHING)), QUIET_SECONDS_TO_CLOSE)
    assert session.tracked.findings["collapse_warning.l1"].state == pb.FINDING_STATE_CLOSED


def of_layer(kind: FindingKind, code: str = "", expert: int | None = None, **more: str) -> Finding:
    return Finding(kind, Severity.WARNING, code or kind.value, 1, expert, args=more)


_COLLAPSE = of_layer(FindingKind.ROUTER_COLLAPSE)


@pytest.mark.parametrize(
    ("part", "greater"),
    [
        (hot(), _COLLAPSE),
        (of_layer(FindingKind.DEAD_EXPERT, expert=2), _COLLAPSE),
        (of_layer(FindingKind.COLD_EXPERT, expert=2), _COLLAPSE),
        (of_layer(FindingKind.LOAD_IMBALANCE), _COLLAPSE),
        (of_layer(FindingKind.RANK_STRAGGLER, rank="3"), _COLLAPSE),
        (of_layer(FindingKind.DRIFT), _COLLAPSE),
        (of_layer(FindingKind.DUPLICATE_EXPERTS, expert=2, other="3"), _COLLAPSE),
        (of_layer(FindingKind.COLD_EXPERT, expert=2), of_layer(FindingKind.DEAD_EXPERT, expert=2)),
        (of_layer(FindingKind.LOAD_IMBALANCE), hot(expert=5)),
        (of_layer(FindingKind.LOAD_IMBALANCE, "load_imbalance_steps"), of_layer(FindingKind.LOAD_IMBALANCE)),
    ],
    ids=lambda finding: finding.rule_id,
)
def test_what_another_finding_covers_is_no_recovery(part: Finding, greater: Finding) -> None:
    session = Session()
    session.see(look(hot(expert=2), part))
    opened = session.tracked.findings[part.rule_id].opened_at_unix_ns
    session.tracked.turned.clear()
    session.see(look(hot(expert=2, layer=0), greater), 2 * QUIET_SECONDS_TO_CLOSE)
    covered = session.tracked.findings[part.rule_id]
    assert (covered.state, covered.superseded_by) == (pb.FINDING_STATE_SUPERSEDED, greater.rule_id)
    assert (covered.num_quiet_seconds, covered.closed_at_unix_ns) == (0, 0)
    assert part.rule_id in session.tracked.turned
    # Its rule speaks again: the same episode goes on.
    session.see(look(greater, part))
    again = session.tracked.findings[part.rule_id]
    assert (again.state, again.superseded_by, again.num_reopened) == (pb.FINDING_STATE_OPEN, "", 0)
    assert again.opened_at_unix_ns == opened
    # The other one is over and this one, too: now it is judged.
    session.see(look(greater))
    session.see(look(), QUIET_SECONDS_TO_CLOSE)
    assert session.tracked.findings[part.rule_id].state == pb.FINDING_STATE_SUPERSEDED
    session.see(look(), QUIET_SECONDS_TO_CLOSE)
    covered = session.tracked.findings[part.rule_id]
    assert (covered.state, covered.superseded_by) == (pb.FINDING_STATE_CLOSED, "")


def test_a_collapse_covers_its_own_layer_and_no_other_kind() -> None:
    elsewhere = hot(layer=0)
    others = [
        of_layer(FindingKind.LOW_CONFIDENCE),
        of_layer(FindingKind.CAPACITY_OVERFLOW),
        # A detector of others does not stop at a collapse.
        of_layer(FindingKind.LOAD_IMBALANCE, "mine.skew"),
    ]
    session = Session()
    session.see(look(hot(), elsewhere, *others))
    session.see(look(_COLLAPSE), QUIET_SECONDS_TO_CLOSE)
    states = {name: one.state for name, one in session.tracked.findings.items()}
    assert states.pop(HOT) == pb.FINDING_STATE_SUPERSEDED
    assert states.pop(_COLLAPSE.rule_id) == pb.FINDING_STATE_OPEN
    assert set(states) == {one.rule_id for one in (elsewhere, *others)}
    assert set(states.values()) == {pb.FINDING_STATE_CLOSED}
    assert [one.rule_id for one in session.tracked.in_order()][:2] == [_COLLAPSE.rule_id, HOT]


def test_what_needs_no_minimum_closes_on_little_data() -> None:
    capture = Finding(FindingKind.CAPTURE_UNHEALTHY, Severity.WARNING, "capture_unhealthy")
    overflow = Finding(FindingKind.CAPACITY_OVERFLOW, Severity.WARNING, "capacity_overflow", 1)
    session = Session()
    session.see(look(hot(), capture, overflow))
    session.see(look(num_tokens=5, num_requests=1), QUIET_SECONDS_TO_CLOSE)
    states = {name: one.state for name, one in session.tracked.findings.items()}
    assert states == {
        HOT: pb.FINDING_STATE_OPEN,
        "capture_unhealthy": pb.FINDING_STATE_CLOSED,
        "capacity_overflow.l1": pb.FINDING_STATE_CLOSED,
    }


def test_it_opens_again_with_its_history() -> None:
    session = Session()
    session.see(look(hot(step=10)), 4)
    session.see(look(), QUIET_SECONDS_TO_CLOSE)
    again = session.see(look(hot(step=500)))
    assert (again.state, again.num_reopened, again.num_occurrences) == (pb.FINDING_STATE_OPEN, 1, 5)
    assert (again.since_step, again.closed_at_unix_ns, again.num_quiet_seconds) == (500, 0, 0)
    assert again.opened_at_unix_ns == session.second * SECOND
    assert again.first_seen_at_unix_ns == 1001 * SECOND
    session.see(look(), QUIET_SECONDS_TO_CLOSE)
    assert session.see(look(hot())).num_reopened == 2
    assert list(session.tracked.findings) == [HOT]


def test_stored_and_loaded_it_goes_on_as_if_nothing_had_happened() -> None:
    stayed, moved = Session(), Session()
    script = [look(hot(step=3))] * 2 + [look()] * (QUIET_SECONDS_TO_CLOSE - 2) + [look(hot(step=9))] + [look()] * 40
    for analysis in [*script, look(hot(step=70))]:
        stayed.see(analysis)
        moved.see(analysis)
        moved.tracked = TrackedFindings.decode(moved.tracked.encode())
        assert moved.tracked.findings == stayed.tracked.findings
        assert moved.tracked.evaluated_ns == stayed.tracked.evaluated_ns
    assert stayed.tracked.findings[HOT].num_reopened == 1
    assert not moved.tracked.turned


def test_findings_of_an_older_program_are_open() -> None:
    old = pb.Finding(rule_id="x", first_seen_at_unix_ns=7, last_seen_at_unix_ns=9, num_occurrences=2)
    tracked = TrackedFindings.of_messages([old.SerializeToString()], 9)
    assert (tracked.findings["x"].state, tracked.findings["x"].opened_at_unix_ns) == (pb.FINDING_STATE_OPEN, 7)


def test_the_closed_ones_seen_longest_ago_go_first() -> None:
    tracked = TrackedFindings()
    closed = [hot(layer=0, expert=expert) for expert in range(6)]
    for number, finding in enumerate(closed):
        tracked.update(look(finding), (1000 + number) * SECOND)
    for second in range(2 * QUIET_SECONDS_TO_CLOSE):
        tracked.update(look(), (1100 + second) * SECOND)
    held = [hot(layer=1, expert=expert) for expert in range(253)]
    tracked.update(look(*held), 2000 * SECOND)
    assert len(tracked.findings) == 256
    assert tracked.evicted == {"hot_expert.l0.e0", "hot_expert.l0.e1", "hot_expert.l0.e2"}
    # More open ones than there is room: the bound holds, and the most severe stay.
    flood = [hot(layer=2, expert=expert) for expert in range(300)]
    flood[7] = hot(layer=2, expert=7, severity=Severity.CRITICAL)
    tracked.update(look(*flood), 2001 * SECOND)
    assert len(tracked.findings) == 256
    assert "hot_expert.l2.e7" in tracked.findings
    assert tracked.turned.isdisjoint(tracked.evicted)
    # Held all the time, the same ones stay, and nothing is opened and evicted every second.
    kept = set(tracked.findings)
    tracked.turned.clear()
    tracked.evicted.clear()
    tracked.update(look(*flood), 2002 * SECOND)
    assert (set(tracked.findings), tracked.turned, tracked.evicted) == (kept, set(), set())


def test_order_open_first_then_the_worst() -> None:
    session = Session()
    session.see(look(hot(severity=Severity.CRITICAL)))
    session.see(look(), QUIET_SECONDS_TO_CLOSE)
    session.see(look(hot(expert=3), hot(expert=4, severity=Severity.CRITICAL)))
    assert [one.expert_id for one in session.tracked.in_order()] == [4, 3, 2]


def test_an_acknowledgement_is_of_one_episode_and_a_silence_ends() -> None:
    session = Session()
    opened = session.see(look(hot())).opened_at_unix_ns
    marks = {HOT: FindingMarks(50, "ada", opened, 9000, "grace"), "other": FindingMarks(1, "x", 1, 1, "x")}

    def marked(now_ns: int) -> pb.Finding:
        (finding,) = with_marks(session.tracked.in_order(), marks, now_ns)
        return finding

    assert (marked(8999).acknowledged_at_unix_ns, marked(8999).acknowledged_by) == (50, "ada")
    assert (marked(8999).silenced_until_unix_ns, marked(8999).silenced_by) == (9000, "grace")
    assert (marked(9000).silenced_until_unix_ns, marked(9000).silenced_by) == (0, "")
    session.see(look(), QUIET_SECONDS_TO_CLOSE)
    assert marked(0).state == pb.FINDING_STATE_CLOSED
    assert marked(0).acknowledged_by == "ada"
    session.see(look(hot()))
    assert (marked(0).acknowledged_at_unix_ns, marked(0).acknowledged_by) == (0, "")
    assert marked(0).silenced_by == "grace"
    assert not session.tracked.findings[HOT].acknowledged_by, "the history itself bears no marks"


def test_thresholds_of_the_session_say_what_is_enough() -> None:
    tracked = TrackedFindings()
    tracked.update(look(hot()), SECOND)
    few = look(num_tokens=200, num_requests=50)
    for second in range(2, 2 + QUIET_SECONDS_TO_CLOSE):
        tracked.update(few, second * SECOND, Thresholds(min_tokens=100))
    assert tracked.findings[HOT].state == pb.FINDING_STATE_CLOSED
    assert math.isnan(tracked.findings[HOT].statistic)
