"""Explanations as messages."""

from moe_debugger.analysis.explanation.model import Cause, Explanation, Missing, Onset, Remedy, RowsLink
from moe_debugger.analysis.findings import EvidenceRow
from moe_debugger.v1 import session_pb2 as pb

__all__ = ["explanation_from_proto", "explanation_to_proto"]


def explanation_to_proto(explanation: Explanation) -> pb.Explanation:
    """Return `explanation` as a message; whose it is stands in the finding's."""
    message = pb.Explanation(
        spread=[pb.LayerCrossing(layer_index=layer, step=step) for layer, step in explanation.spread],
        unexplained=explanation.unexplained,
        missing=[
            pb.MissingObservation(code=one.code, args=one.args, name=one.name, change=one.change)
            for one in explanation.missing
        ],
        status=explanation.status,
        status_args=explanation.status_args,
    )
    onset = explanation.started_at
    if onset is not None:
        message.started_at.CopyFrom(
            pb.FindingOnset(
                layer_index=onset.layer_index,
                step=onset.step,
                first_step=onset.first_step,
                last_step=onset.last_step,
                metric=onset.metric,
                before=onset.before,
                after=onset.after,
                score=onset.score,
                rule=onset.rule,
            )
        )
    for cause in explanation.causes:
        message.causes.add(
            code=cause.code,
            args=cause.args,
            weight=cause.weight,
            score=cause.score,
            rule=cause.rule,
            evidence=[
                pb.EvidenceRow(
                    metric=row.metric,
                    value=row.value,
                    baseline=row.baseline,
                    rule=row.rule,
                    sample_size=row.sample_size,
                    unit=row.unit,
                )
                for row in cause.evidence
            ],
            setting=cause.setting,
            is_association=True,
        )
    for remedy in explanation.remedies:
        message.remedies.add(
            code=remedy.code,
            args=remedy.args,
            change=remedy.change,
            language=remedy.language,
            effect=remedy.effect,
            effect_value=remedy.effect_value,
            effect_lower=remedy.effect_lower,
            effect_upper=remedy.effect_upper,
            cause=remedy.cause,
        )
    if explanation.rows is not None:
        message.rows.CopyFrom(
            pb.RowsLink(
                query=explanation.rows.query, filter=explanation.rows.filter, python=explanation.rows.to_python()
            )
        )
    return message


def explanation_from_proto(message: pb.Explanation, rule_id: str) -> Explanation:
    """Return the explanation in `message`, of the finding `rule_id`."""
    at = message.started_at
    return Explanation(
        rule_id=rule_id,
        started_at=Onset(
            at.layer_index, at.step, at.first_step, at.last_step, at.metric, at.before, at.after, at.score, at.rule
        )
        if message.HasField("started_at")
        else None,
        spread=tuple((one.layer_index, one.step) for one in message.spread),
        causes=tuple(_cause(one) for one in message.causes),
        unexplained=message.unexplained,
        missing=tuple(Missing(one.code, one.name, one.change, dict(one.args)) for one in message.missing),
        remedies=tuple(_remedy(one) for one in message.remedies),
        rows=RowsLink(message.rows.query, dict(message.rows.filter)) if message.HasField("rows") else None,
    )


def _cause(message: pb.FindingCause) -> Cause:
    evidence = tuple(
        EvidenceRow(
            row.metric,
            row.value,
            row.rule,
            row.baseline if row.HasField("baseline") else None,
            row.sample_size,
            row.unit,
        )
        for row in message.evidence
    )
    return Cause(
        message.code, dict(message.args), message.score, message.rule, evidence, message.weight, message.setting
    )


def _remedy(message: pb.FindingRemedy) -> Remedy:
    return Remedy(
        message.code,
        dict(message.args),
        message.change,
        message.language,
        message.effect,
        message.effect_value if message.HasField("effect_value") else None,
        message.effect_lower if message.HasField("effect_lower") else None,
        message.effect_upper if message.HasField("effect_upper") else None,
        message.cause,
    )
