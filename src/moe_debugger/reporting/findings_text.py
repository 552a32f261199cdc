"""Findings with their words and evidence, how long before a collapse its warning came, and the stated rate."""

from collections.abc import Sequence

from moe_debugger.analysis import Analysis, Finding, FindingKind
from moe_debugger.messages import render_finding
from moe_debugger.reporting.content import EvidenceLine, FindingEntry, LeadTime, Text, known, say
from moe_debugger.reporting.explanation_text import explanation_entry

__all__ = ["false_alarm_text", "finding_entries", "lead_times"]


def finding_entries(findings: Sequence[Finding]) -> list[FindingEntry]:
    """Return each finding as it is shown, in the order given: most severe first."""
    return [_entry(finding) for finding in findings]


def _entry(finding: Finding) -> FindingEntry:
    return FindingEntry(
        rule_id=finding.rule_id,
        kind=finding.kind.value,
        severity=finding.severity.value,
        title=render_finding(finding.code, finding.args, "title"),
        summary=render_finding(finding.code, finding.args, "summary"),
        remedy=render_finding(finding.code, finding.args, "remedy"),
        layer_index=finding.layer_index,
        expert_id=finding.expert_id,
        since_step=finding.since_step,
        evidence=[
            EvidenceLine(
                metric=row.metric,
                now=known(row.value),
                baseline=None if row.baseline is None else known(row.baseline),
                rule=row.rule,
                sample_size=row.sample_size,
                sample_unit="",
                unit=row.unit,
                layer_index=finding.layer_index,
                expert_id=finding.expert_id,
            )
            for row in finding.evidence
        ],
        explanation=None if finding.explanation is None else explanation_entry(finding.explanation),
    )


def lead_times(findings: Sequence[Finding]) -> list[LeadTime]:
    """Return for each layer with a `collapse_warning` how many steps before its collapse it came, by layer."""

    def first_steps(kind: FindingKind) -> dict[int, int | None]:
        steps: dict[int, int | None] = {}
        for finding in findings:
            if finding.kind is kind and finding.layer_index is not None:
                known_step, step = steps.get(finding.layer_index), finding.since_step
                if known_step is None or (step is not None and step < known_step):
                    steps[finding.layer_index] = step
        return steps

    warnings, collapses = first_steps(FindingKind.COLLAPSE_WARNING), first_steps(FindingKind.ROUTER_COLLAPSE)
    result = []
    for layer_index, warned in sorted(warnings.items()):
        collapsed = collapses.get(layer_index)
        lead = collapsed - warned if warned is not None and collapsed is not None else None
        result.append(LeadTime(layer_index=layer_index, warning_step=warned, collapse_step=collapsed, lead_steps=lead))
    return result


def false_alarm_text(analysis: Analysis) -> Text:
    """Return how often healthy data would give a finding above `info`, or why no rate is stated."""
    return say("false_alarm", note=analysis.false_alarm_note)
