"""Findings with their words and evidence, how long before a collapse its warning came, and the stated rate."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from moe_debugger.analysis import Analysis, Finding, FindingKind
from moe_debugger.messages import render_finding, sample_unit
from moe_debugger.reporting.content import EvidenceLine, FindingEntry, LeadTime, Text, known, say
from moe_debugger.reporting.explanation_text import explanation_entry
from moe_debugger.reporting.step_series import effective_over_steps

if TYPE_CHECKING:
    from moe_debugger.analysis.step_loads import LoadSeries

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
        plugin=finding.code.rpartition(".")[0],
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
                sample_unit=sample_unit(row.metric, finding.code, row.unit),
                unit=row.unit,
                layer_index=finding.layer_index,
                expert_id=finding.expert_id,
            )
            for row in finding.evidence
        ],
        explanation=None if finding.explanation is None else explanation_entry(finding.explanation),
    )


def lead_times(findings: Sequence[Finding], series: Mapping[int, "LoadSeries"]) -> list[LeadTime]:
    """Return how many steps before its fall to half each layer was warned of, by layer.

    Args:
        findings: with a `collapse_warning` for each such layer, whose baseline is in its evidence.
        series: loads over steps, by layer index.
    """
    result = []
    for finding in findings:
        if finding.kind is not FindingKind.COLLAPSE_WARNING or finding.layer_index is None:
            continue
        warned = finding.args.get("warned", "")
        warning_step = int(warned) if warned.isdigit() else finding.since_step
        levels = [row.baseline for row in finding.evidence if row.metric == "effective_experts"]
        half = None
        if levels and levels[0] is not None and finding.layer_index in series:
            half = _falls_below(series[finding.layer_index], levels[0] / 2, finding.since_step or 0)
        lead = half - warning_step if warning_step is not None and half is not None else None
        result.append(
            LeadTime(layer_index=finding.layer_index, warning_step=warning_step, collapse_step=half, lead_steps=lead)
        )
    return sorted(result, key=lambda lead: lead.layer_index)


def _falls_below(series: "LoadSeries", limit: float, first_step: int) -> int | None:
    """Return the first step from `first_step` on from which two points of three lie below `limit`, None where none."""
    steps = series.first_steps.astype(np.int64)
    effective = effective_over_steps(series.counts.astype(np.int64))
    known = np.flatnonzero((steps >= first_step) & np.isfinite(effective))
    is_below = effective[known] < limit
    for at in np.flatnonzero(is_below).tolist():
        if is_below[at : at + 3].sum() >= 2:
            return int(steps[known[at]])
    return None


def false_alarm_text(analysis: Analysis) -> Text:
    """Return how often healthy data would give a finding above `info`, or why no rate is stated."""
    return say("false_alarm", note=analysis.false_alarm_note)
