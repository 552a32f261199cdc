"""What a report says, apart from how it looks: plain values with a version, which go to JSON and back.

NaN never gets in: what is not known is None, and the reason stands beside it.
"""

import math
from typing import Annotated, Any, Literal, TypeGuard

from pydantic import BaseModel, ConfigDict, Field, computed_field

from moe_debugger.reporting.texts import sentence

__all__ = [
    "Bars",
    "Category",
    "CauseEntry",
    "EvidenceLine",
    "ExplanationEntry",
    "Fact",
    "FindingEntry",
    "Fix",
    "Heatmap",
    "HeatmapRow",
    "LeadTime",
    "Line",
    "Lines",
    "Matrix",
    "MissingEntry",
    "Model",
    "Notice",
    "Picture",
    "RemedyEntry",
    "Table",
    "Text",
    "known",
    "picture",
    "say",
    "show",
]

Cell = str | int | float | None
Tone = Literal["critical", "warning", "info", "good"]


class Model(BaseModel):
    """Frozen plain values; fields of a newer minor version are passed over."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


def known(value: float) -> float | None:
    """Return `value`, None where it is NaN or infinite."""
    return float(value) if math.isfinite(value) else None


def show(value: Cell, digits: int = 3) -> str:
    """Return a number as people read it: `digits` significant ones, thousands apart; "–" where there is none."""
    if value is None:
        return "–"
    if isinstance(value, str):
        return value
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"


class Text(Model):
    """A sentence for people, as code and args; `text` is it in English."""

    code: str
    args: dict[str, str] = {}

    @computed_field  # type: ignore[prop-decorator]
    @property
    def text(self) -> str:
        """The sentence."""
        return sentence(self.code, self.args)

    def __str__(self) -> str:
        return self.text


def _is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def say(code: str, **args: object) -> Text:
    """Return the sentence of `code`; numbers in `args` are shown as `show` does."""
    return Text(
        code=code,
        args={
            name: show(known(value)) if isinstance(value, float) else show(value) if _is_int(value) else str(value)
            for name, value in args.items()
        },
    )


class Notice(Model):
    """Something to know before anything else: a gap, a drop, damage, what was left out."""

    tone: Tone
    text: Text


class Fact(Model):
    """One line of the header; `key` names its label, `fact.<key>` of the catalogue."""

    key: str
    value: str


class EvidenceLine(Model):
    """One line of evidence.

    Attributes:
        metric: name of a metric of docs/metrics.md.
        lower, upper: its 95 % interval, None where there is none.
        baseline: the same metric of the baseline.
        rule: what it is compared with, as text.
        sample_size: tokens, steps, slots or rows behind it, in `sample_unit`.
    """

    metric: str
    now: float | None
    lower: float | None = None
    upper: float | None = None
    baseline: float | None = None
    rule: str = ""
    sample_size: int = 0
    sample_unit: str = "tokens"
    unit: str = ""
    layer_index: int | None = None
    expert_id: int | None = None


class Category(Model):
    """One category of the audit.

    Attributes:
        score: 0..100, None where there is none, and then `why` says why.
        layer_index: the layer whose score this is: the lowest one.
        num_layers: layers that have a score; num_layers_without: those that have none.
        weight: in the overall score.
    """

    key: str
    title: Text
    score: Annotated[float, Field(ge=0, le=100)] | None
    why: Text
    formula: Text
    weight: int
    layer_index: int | None = None
    layer_scores: dict[int, float | None] = {}
    evidence: list[EvidenceLine] = []

    @property
    def num_layers(self) -> int:
        """Layers that have a score."""
        return sum(score is not None for score in self.layer_scores.values())


class CauseEntry(Model):
    """Something observed that goes with a finding: an association. `weight` is 0..1; `rule` gave it."""

    text: str
    weight: float
    rule: str


class MissingEntry(Model):
    """Something that was not observed; `change` supplies it, to paste."""

    text: str
    change: str


class RemedyEntry(Model):
    """A concrete change to paste; `gain` is the share of the bound on step time, where it was predicted."""

    text: str
    change: str
    language: str
    effect: str
    gain: float | None = None
    gain_lower: float | None = None
    gain_upper: float | None = None


class ExplanationEntry(Model):
    """Why a finding is there; docs/explanations.md.

    Attributes:
        started: when and where it began; spread: (layer, step), the first layer first.
        status: whether causes were found, and what bears on them and was not observed.
        causes: the likeliest first; with `unexplained` their weights sum to 1.
        rows_query, rows_python: where the rows behind it are; "" where there are none.
    """

    started: str
    spread: list[tuple[int, int]]
    status: str
    causes: list[CauseEntry]
    unexplained: float
    missing: list[MissingEntry]
    remedies: list[RemedyEntry]
    rows_query: str
    rows_python: str


class FindingEntry(Model):
    """A finding with its words and evidence; `explanation` is None of findings that were not explained.

    `plugin` is the name of the plug-in that found it, "" of the built-in rules.
    """

    rule_id: str
    kind: str
    severity: Literal["info", "warning", "critical"]
    title: str
    summary: str
    remedy: str
    plugin: str = ""
    layer_index: int | None = None
    expert_id: int | None = None
    since_step: int | None = None
    evidence: list[EvidenceLine] = []
    explanation: ExplanationEntry | None = None


class Fix(Model):
    """Something to do.

    Attributes:
        gain: predicted, as a share of the bound on step time; None = not predicted. gain_lower, gain_upper: interval.
        places: where it applies, such as "layer 3".
        change: the change itself in a form to be applied, where there is one: text to paste, or a placement.
        is_worth_it: False where it was tried and no help was shown: said, so that nobody tries it again unknowingly.
        verdict: what the trial gave, where there was one.
    """

    title: str
    detail: str
    severity: Literal["info", "warning", "critical"]
    gain: float | None = None
    gain_lower: float | None = None
    gain_upper: float | None = None
    gain_note: Text
    places: list[str] = []
    change: dict[str, Any] | str | None = None
    is_worth_it: bool = True
    verdict: str = ""


class LeadTime(Model):
    """How long before its layer's fall to half of its effective experts a warning came, in steps.

    Attributes:
        warning_step: when the chart warned, which is later than the step since when it falls.
        collapse_step: the first step below half of the level before the fall; None where there is none.
    """

    layer_index: int
    warning_step: int | None
    collapse_step: int | None
    lead_steps: int | None


class Table(Model):
    """What a picture shows, in numbers."""

    columns: list[str]
    rows: list[list[Cell]] = []
    note: Text | None = None


class HeatmapRow(Model):
    """One layer: loads over the fair share, 0 = not one token; None = no load known."""

    layer_index: int
    num_experts: int
    top_k: int
    values: list[float | None]


class Heatmap(Model):
    """A value of every expert of every layer, on a scale of log2 around 1; `hot` is its upper end, None = log2(E/k)."""

    kind: Literal["heatmap"] = "heatmap"
    rows: list[HeatmapRow]
    hot: float | None = None
    value_name: str = "times the fair share"


class Line(Model):
    """One line; `is_named` lines are coloured, the others are context."""

    name: str
    x: list[float]
    y: list[float | None]
    is_named: bool = False


class Lines(Model):
    """Lines over one axis; `guides` are (height, name)."""

    kind: Literal["lines"] = "lines"
    x_title: str
    y_title: str
    lines: list[Line]
    guides: list[tuple[float, str]] = []
    y_max: float = 1.0


class Matrix(Model):
    """Lifts of pairs of experts on a scale of log2; None = not defined."""

    kind: Literal["matrix"] = "matrix"
    row_title: str
    column_title: str
    row_names: list[str]
    column_names: list[str]
    values: list[list[float | None]]
    neutral: float = 1.0


class Bars(Model):
    """Bars with intervals."""

    kind: Literal["bars"] = "bars"
    y_title: str
    names: list[str]
    values: list[float | None]
    lower: list[float | None] = []
    upper: list[float | None] = []


class Picture(Model):
    """One picture with its table; without data `why_not` says why there is none."""

    key: str
    title: Text
    caption: Text
    data: Annotated[Heatmap | Lines | Matrix | Bars, Field(discriminator="kind")] | None = None
    why_not: Text | None = None
    table: Table | None = None


def picture(key: str, why_not: Text | None = None, **values: object) -> Picture:
    """Return the picture of `key`, whose words are `picture.<key>` and `caption.<key>`."""
    return Picture.model_validate(
        {"key": key, "title": say(f"picture.{key}"), "caption": say(f"caption.{key}"), "why_not": why_not, **values}
    )
