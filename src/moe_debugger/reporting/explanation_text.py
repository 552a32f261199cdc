"""Explanations of findings in words, as plain values."""

from moe_debugger.analysis.explanation import Explanation, Remedy
from moe_debugger.analysis.explanation.texts import effect_text, onset_text
from moe_debugger.messages import render
from moe_debugger.reporting.content import CauseEntry, ExplanationEntry, MissingEntry, RemedyEntry

__all__ = ["explanation_entry"]


def explanation_entry(explanation: Explanation) -> ExplanationEntry:
    """Return an explanation as it is shown."""
    return ExplanationEntry(
        started=onset_text(explanation.started_at, explanation.spread),
        spread=list(explanation.spread),
        status=render(f"explanation.{explanation.status}", explanation.status_args),
        causes=[
            CauseEntry(text=render(f"cause.{one.code}", one.args), weight=one.weight, rule=one.rule)
            for one in explanation.causes
        ],
        unexplained=explanation.unexplained,
        missing=[
            MissingEntry(text=render(f"missing.{one.code}", {"name": one.name, **one.args}), change=one.change)
            for one in explanation.missing
        ],
        remedies=[_remedy(one) for one in explanation.remedies],
        rows_query="" if explanation.rows is None else explanation.rows.query,
        rows_python="" if explanation.rows is None else explanation.rows.to_python(),
    )


def _remedy(remedy: Remedy) -> RemedyEntry:
    is_gain = remedy.effect == "step_bound"
    return RemedyEntry(
        text=render(f"remedy.{remedy.code}", remedy.args),
        change=remedy.change,
        language=remedy.language,
        effect=effect_text(remedy),
        gain=remedy.effect_value if is_gain else None,
        gain_lower=remedy.effect_lower if is_gain else None,
        gain_upper=remedy.effect_upper if is_gain else None,
    )
