"""Findings of a live session get explanations from its loads over steps and its series, and not with every look."""

import asyncio

import numpy as np

from moe_analyzer.aggregate import SourceState
from moe_analyzer.explaining import Explainer
from moe_debugger.analysis import Analysis, EvidenceRow, Finding, FindingKind, LayerShape, RoutingState, Severity
from moe_debugger.v1 import routing_pb2 as routing
from moe_debugger.v1 import session_pb2 as pb
from moe_debugger.wire.codec import CountsColumns, LayerCountColumns

SECOND = 1_000_000_000


def collapsed_state() -> RoutingState:
    """120 training steps of 4,000 assignments, from step 60 on to experts 0 and 1 alone."""
    rng = np.random.default_rng(0)
    state = RoutingState.empty([LayerShape(0, 8, 2)])
    for step in range(120):
        share = [1 / 8] * 8 if step < 60 else [0.5, 0.5, *[0.0] * 6]
        load = rng.multinomial(4000, share).astype(np.uint64)
        columns = [LayerCountColumns(0, 8, 0, 2000, 0, load)]
        state.fold_counts(CountsColumns(step, step, routing.PHASE_TRAIN, 2000, columns))
    return state


def analysis_of(*findings: Finding) -> Analysis:
    return Analysis(metrics={}, findings=findings, num_requests=0)


COLLAPSE = Finding(
    FindingKind.ROUTER_COLLAPSE, Severity.CRITICAL, "router_collapse", 0,
    evidence=(EvidenceRow("effective_experts", 2.0, "< 3"),),
)  # fmt: skip
NOTE = Finding(FindingKind.LOAD_IMBALANCE, Severity.INFO, "load_imbalance_one_workload", 0)


class Series:
    """Stands in for the stored series, and counts how often they are read."""

    def __init__(self) -> None:
        self.num_reads = 0

    async def read(self, tenant: str, session_id: str) -> list[pb.Series]:
        self.num_reads += 1
        steps = np.arange(120)
        values = np.where(steps < 58, 0.05, -0.05)
        return [
            pb.Series(
                source_id="s", name="balance_coef", num_values=1,
                step=steps.astype("<u8").tobytes(), value=values.astype("<f8").tobytes(),
            )
        ]  # fmt: skip


def look(explainer: Explainer, analysis: Analysis, newest_ns: int, state: RoutingState) -> Analysis:
    return asyncio.run(
        explainer.explained("default", "s1", analysis, totals=state, sources=[SourceState("s")], newest_ns=newest_ns)
    )


def test_a_collapse_is_explained_from_the_state_and_the_series() -> None:
    series = Series()
    found = look(Explainer(series.read), analysis_of(COLLAPSE, NOTE), 10 * SECOND, collapsed_state())
    explanation = found.findings[0].explanation
    assert explanation is not None
    assert explanation.causes[0].code == "balancing_sign_turned"
    assert explanation.started_at is not None
    assert 58 <= explanation.started_at.first_step <= 60 <= explanation.started_at.last_step
    # What only says that there is nothing to do needs no search.
    assert found.findings[1].explanation is None


def test_it_is_made_again_after_five_seconds_of_data_or_for_a_new_finding() -> None:
    series, state = Series(), collapsed_state()
    explainer = Explainer(series.read)
    first = look(explainer, analysis_of(COLLAPSE), 10 * SECOND, state)
    again = look(explainer, analysis_of(COLLAPSE), 14 * SECOND, state)
    assert series.num_reads == 1
    assert again.findings[0].explanation == first.findings[0].explanation
    look(explainer, analysis_of(COLLAPSE), 15 * SECOND, state)
    assert series.num_reads == 2
    other = Finding(FindingKind.HOT_EXPERT, Severity.WARNING, "hot_expert", 0, 1)
    found = look(explainer, analysis_of(COLLAPSE, other), 15 * SECOND, state)
    assert series.num_reads == 3
    assert all(one.explanation is not None for one in found.findings)


def test_a_healthy_session_reads_no_series() -> None:
    series = Series()
    look(Explainer(series.read), analysis_of(NOTE), 10 * SECOND, collapsed_state())
    assert series.num_reads == 0
