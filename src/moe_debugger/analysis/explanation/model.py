"""What an explanation is: where a finding began, what goes with it, and what to do. Words are code + args."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from moe_debugger.analysis.findings import EvidenceRow

__all__ = ["Cause", "Explanation", "Missing", "Onset", "Remedy", "RowsLink"]


@dataclass(frozen=True, slots=True)
class Onset:
    """Where and when it began.

    Attributes:
        step: first step after the layer left its earlier level; where only a limit was crossed, the step of that.
        first_step, last_step: it began in these steps: 95 % interval of the change point; where only a limit was
            crossed, all steps up to that.
        metric: what changed: "effective_experts", "load_ratio" or "max_over_mean".
        before, after: its fitted levels; NaN where only a limit was crossed.
        score: evidence for a change in nats, less the penalty for having searched for it; 0 where only a limit was
            crossed.
        rule: "change_point" or "first_crossing".
    """

    layer_index: int
    step: int
    first_step: int
    last_step: int
    metric: str
    before: float
    after: float
    score: float
    rule: str


@dataclass(frozen=True, slots=True)
class Cause:
    """Something observed that goes with the finding. An association, never a proof: nothing was intervened on.

    Attributes:
        code: key ``cause.<code>`` of its words; `args` fill the template.
        weight: 0..1; the weights of all causes and `Explanation.unexplained` sum to 1.
        score: nats in favour of it, as the rule defines them (docs/explanations.md).
        rule: id of the rule that gave the score, such as "balance.sign.coefficient".
        evidence: what the rule compared.
        setting: the observed series that it is about, empty where it is about data or placement.
    """

    code: str
    args: dict[str, str]
    score: float
    rule: str
    evidence: tuple[EvidenceRow, ...] = ()
    weight: float = 0.0
    setting: str = ""

    @property
    def is_association(self) -> bool:
        """Always True."""
        return True


@dataclass(frozen=True, slots=True)
class Missing:
    """Something that was not observed, and what to supply; ``missing.<code>`` has the words.

    Attributes:
        name: the series, rows or option that is missing.
        change: text to paste that supplies it.
    """

    code: str
    name: str
    change: str
    args: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Remedy:
    """A concrete change; ``remedy.<code>`` has the words.

    Attributes:
        change: text to paste (code, JSON or YAML); empty where the advice is to change nothing.
        language: "python", "yaml", "json" or "query".
        effect: ``effect.<code>``: "not_predicted", or what was computed.
        effect_value, effect_lower, effect_upper: the computed number and its interval; None = not predicted.
        cause: code of the cause that it belongs to, empty where it belongs to the finding.
    """

    code: str
    args: dict[str, str] = field(default_factory=dict)
    change: str = ""
    language: str = ""
    effect: str = "not_predicted"
    effect_value: float | None = None
    effect_lower: float | None = None
    effect_upper: float | None = None
    cause: str = ""


@dataclass(frozen=True, slots=True)
class RowsLink:
    """The rows behind a finding.

    Attributes:
        query: in the query language (`moe-debugger query`, the page's Console).
        filter: columns of `decisions()` and the value that they have there.
    """

    query: str
    filter: dict[str, int]

    def to_python(self) -> str:
        """Return an expression that selects the rows of ``rows = session.decisions()``."""
        parts = []
        for name, value in self.filter.items():
            if name == "expert_id":
                parts.append(f"(rows.expert_ids == {value}).any(axis=1)")
            elif name == "first_step":
                parts.append(f"(rows.step >= {value})")
            else:
                parts.append(f"(rows.{name} == {value})")
        return " & ".join(parts)


@dataclass(frozen=True, slots=True)
class Explanation:
    """The answer to "why, and what to do" about one finding.

    Attributes:
        rule_id: of the finding.
        started_at: None where no series of loads over steps was given, or none changed.
        spread: (layer, first step at which it crossed the finding's rule), the first layer first.
        causes: the likeliest first.
        unexplained: weight of what no rule matched.
        missing: what was not observed and bears on this kind of finding.
        remedies: the likeliest cause's first.
        rows: where to look.
    """

    rule_id: str
    started_at: Onset | None
    spread: tuple[tuple[int, int], ...]
    causes: tuple[Cause, ...]
    unexplained: float
    missing: tuple[Missing, ...]
    remedies: tuple[Remedy, ...]
    rows: RowsLink | None

    @property
    def status(self) -> str:
        """``explanation.<status>`` has the words.

        "ranked" = there are causes; "not_observable" = none, and something that bears on it was not observed;
        "no_match" = all of it was observed and nothing matches.
        """
        if self.causes:
            return "ranked"
        return "not_observable" if self.missing else "no_match"

    @property
    def status_args(self) -> dict[str, str]:
        """Arguments of the words of `status`."""
        return {
            "names": ", ".join(one.name for one in self.missing),
            "percent": f"{100 * self.unexplained:.0f}",
        }

    def to_dict(self) -> dict[str, Any]:
        """Return plain values; what is not known (NaN) is None."""
        values = asdict(self)
        values["status"] = self.status
        for cause, plain in zip(self.causes, values["causes"], strict=True):
            plain["is_association"] = cause.is_association
        if self.rows is not None:
            values["rows"]["python"] = self.rows.to_python()
        return _plain(values)  # type: ignore[no-any-return]


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
