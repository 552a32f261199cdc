"""Puts a report together: `report(...)` gives a `Report`, which goes to HTML, to JSON, and back."""

import datetime
from collections.abc import Mapping
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import ValidationError

from moe_debugger._plain_text import plain_text
from moe_debugger.analysis import Analysis, RoutingState, Thresholds
from moe_debugger.errors import InvalidInputError, UnsupportedFormatError
from moe_debugger.reporting.audit import audit, overall_score
from moe_debugger.reporting.content import (
    Category,
    Fact,
    FindingEntry,
    Fix,
    LeadTime,
    Model,
    Notice,
    Picture,
    Text,
)
from moe_debugger.reporting.findings_text import false_alarm_text, finding_entries, lead_times
from moe_debugger.reporting.fixes import fixes
from moe_debugger.reporting.header import facts, notices
from moe_debugger.reporting.material import DEFAULT_MAX_ROWS, Material, gather
from moe_debugger.reporting.pictures import pictures
from moe_debugger.reporting.rank_rows import loads_by_width

if TYPE_CHECKING:
    from moe_debugger._session import Session
    from moe_debugger.analysis.step_loads import LoadSeries
    from moe_debugger.recording import Recording

__all__ = ["FORMAT", "FORMAT_MAJOR", "Report", "check_format", "report"]

FORMAT = "moe-debugger-report"
FORMAT_MAJOR, _FORMAT_MINOR = 1, 0


def check_format(values: Mapping[str, Any], name: str, major: int) -> None:
    """Refuse what is not of that format, or of a newer major version.

    Raises:
        InvalidInputError: another format.
        UnsupportedFormatError: a newer major version.
    """
    if values.get("format") != name:
        raise InvalidInputError(f'"format" is {str(values.get("format"))[:40]!r}, expected "{name}"')
    version = str(values.get("format_version", ""))
    if not version.partition(".")[0].isdigit():
        raise InvalidInputError(f'"format_version" is {version[:40]!r}, expected "major.minor"')
    if int(version.partition(".")[0]) > major:
        raise UnsupportedFormatError(f"version {version[:40]}, this program reads {major}.x; upgrade moe-debugger")


class Report(Model):
    """A report; docs/report.md describes every field.

    Attributes:
        score: overall, 0..100, None where too little has a score; `score_why` says how it came about.
        notices: what to know first: gaps, drops, damage.
        false_alarm, false_alarm_rate: how often healthy data would give a finding above `info`; None where no rate is
            stated.
    """

    format: Literal["moe-debugger-report"] = "moe-debugger-report"
    format_version: str = f"{FORMAT_MAJOR}.{_FORMAT_MINOR}"
    title: str
    source: Literal["recording", "session", "analysis"]
    made_at: str
    notices: list[Notice]
    facts: list[Fact]
    false_alarm: Text
    false_alarm_rate: float | None
    score: float | None
    score_why: Text
    categories: list[Category]
    findings: list[FindingEntry]
    lead_times: list[LeadTime]
    fixes: list[Fix]
    pictures: list[Picture]
    baseline_name: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, as in the JSON file."""
        return self.model_dump(mode="json")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Return the report that `to_dict` wrote.

        Raises:
            InvalidInputError: these are no report's values.
            UnsupportedFormatError: written by a newer major version.
        """
        check_format(values, FORMAT, FORMAT_MAJOR)
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            first = error.errors()[0]
            raise InvalidInputError(
                f"no report: {'.'.join(str(each) for each in first['loc'])}: {first['msg']}"
            ) from error

    def to_html(self) -> str:
        """Return one self-contained page: no script, nothing from a network, everything escaped.

        Raises:
            DependencyMissingError: jinja2 is not installed.
        """
        from moe_debugger.reporting.html import report_html

        return report_html(self)

    def __str__(self) -> str:
        def scored(category: Category) -> str:
            number = "–" if category.score is None else f"{category.score:.0f}"
            return f"{number:>5}  {category.title.text:<20} {category.why.text}"

        counts = {s: sum(f.severity == s for f in self.findings) for s in ("critical", "warning", "info")}
        overall = "–" if self.score is None else f"{self.score:.0f}"
        lines = [
            f"{self.title}: {overall} of 100. {self.score_why.text}",
            *(f"! {notice.text.text}" for notice in self.notices if notice.tone in ("critical", "warning")),
            *(scored(category) for category in self.categories),
            "findings: " + ", ".join(f"{num} {severity}" for severity, num in counts.items()),
        ]
        return "\n".join(plain_text(line) for line in lines)


def report(
    source: "Recording | Session | Analysis",
    *,
    baseline: "Recording | RoutingState | None" = None,
    thresholds: Thresholds | None = None,
    num_ranks: int | None = None,
    num_redundant: int = 0,
    token_texts: Mapping[int, str] | None = None,
    max_rows: int = DEFAULT_MAX_ROWS,
) -> Report:
    """Return the report of a recording, an open session or an analysis.

    Args:
        source: what to report on. An analysis has no rows, so that pictures of pairs and tokens are not there.
        baseline: healthy rows of the same model on the same workload.
        thresholds: of the rules; None = the defaults.
        num_ranks: expert-parallel ranks to plan for; None = as many as were recorded.
        num_redundant: spare slots over all ranks, per layer, that a placement may fill with copies.
        token_texts: text of a token by its id.
        max_rows: pictures of pairs and tokens read so many rows at most, the first of a recording, the newest of a
            session. Metrics, scores and findings are of all rows.

    Raises:
        InvalidInputError: something else was given, or the baseline is another model's.
        RecordingError: a part of a recording is damaged, and it was not opened with ``damaged="skip"``.
        SessionClosedError: the session was closed.
    """
    if num_ranks is not None and num_ranks < 1:
        raise InvalidInputError(f"num_ranks {num_ranks}: expected 1 or more")
    if num_redundant < 0:
        raise InvalidInputError(f"num_redundant {num_redundant}: expected 0 or more")
    material = gather(source, baseline=baseline, thresholds=thresholds, max_rows=max_rows)
    ranks = num_ranks or (material.manifest.topology.expert_parallel_size if material.manifest is not None else 1)
    loads_of = loads_by_width(material) if ranks > 1 else {}
    categories = audit(material, ranks, loads_of)
    score, why = overall_score(categories, material.analysis.findings)
    entries = finding_entries(material.analysis.findings)
    return Report(
        title=_title(material),
        source=material.source,
        made_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        notices=notices(material),
        facts=facts(material, ranks),
        false_alarm=false_alarm_text(material.analysis),
        false_alarm_rate=material.analysis.false_alarm_rate,
        score=score,
        score_why=why,
        categories=categories,
        findings=entries,
        lead_times=lead_times(material.analysis.findings, _series(material)),
        fixes=fixes(material, entries, num_ranks=ranks, num_redundant=num_redundant, loads_of=loads_of),
        pictures=pictures(material, token_texts),
        baseline_name=material.baseline_name,
    )


def _series(material: Material) -> dict[int, "LoadSeries"]:
    layers = {} if material.state is None else material.state.layers
    return {index: layer.load_series for index, layer in layers.items() if layer.load_series is not None}


def _title(material: Material) -> str:
    # A model that was loaded from a folder has the folder's path for a name.
    model = PurePath(material.manifest.model.name).name if material.manifest is not None else ""
    return " · ".join(part for part in dict.fromkeys((material.name, model)) if part) or "Analysis"
