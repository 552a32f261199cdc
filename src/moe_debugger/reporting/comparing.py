"""Compares two recordings: `diff(a, b)` gives a `Diff`, which goes to HTML, to JSON, and back.

Two tests share the stated rate of false alarms: whether loads differ by more than whole requests do by chance (a
permutation test, max T over the layers), and whether the same tokens go to other experts (the interval of the overlap,
from whole requests, widened for the number of layers, lies wholly below 0.95). Loads alone hide experts that were
permuted, and tokens can be compared only where both have the same text, so neither is enough alone.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import ValidationError

from moe_debugger._plain_text import plain_text
from moe_debugger.analysis import Thresholds
from moe_debugger.errors import InvalidInputError
from moe_debugger.reporting.building import check_format
from moe_debugger.reporting.comparability import Point, blocking, common_layers, points
from moe_debugger.reporting.comparison_pictures import comparison_pictures
from moe_debugger.reporting.comparison_tests import RowTests, compare_layer, run_tests, usable_tests
from moe_debugger.reporting.content import Fact, FindingEntry, Model, Notice, Picture, Text, known, say
from moe_debugger.reporting.findings_text import finding_entries
from moe_debugger.reporting.header import facts, notices
from moe_debugger.reporting.layer_diff import LayerDiff
from moe_debugger.reporting.material import DEFAULT_MAX_ROWS, Material, gather, layer_range

if TYPE_CHECKING:
    from moe_debugger._session import Session
    from moe_debugger.recording import Recording

__all__ = ["DIFF_FORMAT", "Diff", "Verdict", "diff"]

DIFF_FORMAT = "moe-debugger-diff"
_MAJOR = 1

Verdict = Literal["different", "no_difference", "insufficient_evidence", "not_comparable"]


class Side(Model):
    """One of the two recordings."""

    name: str
    facts: list[Fact]
    notices: list[Notice]


class Diff(Model):
    """The comparison of two recordings; docs/report.md describes every field.

    Attributes:
        verdict: "different" only where a test says so; `verdict_text` says which.
        alpha: stated rate of false alarms of the whole comparison.
        p_value: of "no layer's loads differ"; None without that test.
        points: what was looked at before comparing, and what follows.
        layers: of the layers that were compared.
        token_rate: share of tokens with other experts in one layer at least.
        appeared, disappeared, in_both: findings of the second recording alone, of the first alone, of both.
    """

    format: Literal["moe-debugger-diff"] = "moe-debugger-diff"
    format_version: str = f"{_MAJOR}.0"
    a: Side
    b: Side
    verdict: Verdict
    verdict_text: Text
    alpha: float
    tests: list[str]
    p_value: float | None = None
    num_permutations: int = 0
    smallest_p_value: float | None = None
    points: list[Point]
    layers: list[LayerDiff]
    token_rate: float | None = None
    token_rate_lower: float | None = None
    token_rate_upper: float | None = None
    independent_token_rate: float | None = None
    num_tokens: int = 0
    appeared: list[FindingEntry]
    disappeared: list[FindingEntry]
    in_both: list[FindingEntry]
    pictures: list[Picture]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, as in the JSON file."""
        return self.model_dump(mode="json")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Return the comparison that `to_dict` wrote.

        Raises:
            InvalidInputError: these are no comparison's values.
            UnsupportedFormatError: written by a newer major version.
        """
        check_format(values, DIFF_FORMAT, _MAJOR)
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            first = error.errors()[0]
            raise InvalidInputError(
                f"no comparison: {'.'.join(str(each) for each in first['loc'])}: {first['msg']}"
            ) from error

    def to_html(self) -> str:
        """Return one self-contained page: no script, nothing from a network, everything escaped.

        Raises:
            DependencyMissingError: jinja2 is not installed.
        """
        from moe_debugger.reporting.html import diff_html

        return diff_html(self)

    def __str__(self) -> str:
        from moe_debugger._tables import text_table

        headers = ["layer", "JS bits", "noise floor", "drift", "p adjusted", "overlap", "chance", "mismatch"]
        rows: list[list[object]] = []
        for layer in self.layers:
            numbers = (
                layer.js_bits, layer.noise_floor_bits, layer.drift_bits, layer.p_value_adjusted, layer.overlap,
                layer.chance_overlap, layer.router_rate,
            )  # fmt: skip
            rows.append([layer.layer_index, *(float("nan") if each is None else each for each in numbers)])
        said = [
            f"{p.key}: {p.follows.text}" + (f" ({p.remedy.text})" if p.remedy else "")
            for p in self.points
            if p.status != "same"
        ]
        changed = [f"+ {entry.title}" for entry in self.appeared] + [f"- {entry.title}" for entry in self.disappeared]
        lines = [self.verdict_text.text, *said, *([text_table(headers, rows)] if rows else []), *changed]
        return plain_text("\n".join(lines), "\n")


def diff(
    a: "Recording | Session",
    b: "Recording | Session",
    *,
    alpha: float = 0.05,
    same_model: bool = False,
    num_permutations: int = 999,
    seed: int = 0,
    thresholds: Thresholds | None = None,
    max_rows: int = DEFAULT_MAX_ROWS,
) -> Diff:
    """Compare two recordings of one model: another checkpoint, engine, precision, or time.

    Args:
        a: the first, what is compared with.
        b: the second.
        alpha: stated rate of false alarms of the whole comparison: of any layer and either test.
        same_model: they are one model in spite of different configurations (another precision, say).
        num_permutations: exchanges of whole requests, at least 19.
        seed: of the exchanges.
        thresholds: of the findings; None = the defaults.
        max_rows: rows that are read of each, the first ones of a recording.

    Raises:
        InvalidInputError: something else was given, or a value is out of range.
        RecordingError: a part is damaged, and the recording was not opened with ``damaged="skip"``.
    """
    if not 0 < alpha < 1:
        raise InvalidInputError(f"alpha {alpha}: expected between 0 and 1")
    if num_permutations < 19:
        raise InvalidInputError(f"num_permutations {num_permutations}: expected 19 or more")
    sides = [gather(each, thresholds=thresholds, max_rows=max_rows) for each in (a, b)]
    for side in sides:
        if side.source == "analysis":
            raise InvalidInputError("an analysis cannot be compared: give recordings or sessions")
    return _compare(sides[0], sides[1], alpha, same_model, num_permutations, seed)


def _compare(a: Material, b: Material, alpha: float, same_model: bool, num_permutations: int, seed: int) -> Diff:
    found = points(a, b, same_model=same_model)
    wanted = common_layers(a, b)
    parts = RowTests()
    if not blocking(found, "tests"):
        parts = run_tests(a, b, wanted, num_permutations, seed, found)
    is_comparable = not blocking(found, "everything")
    tests = usable_tests(parts, alpha, found)
    each_alpha = alpha / max(1, len(tests))
    layers = [compare_layer(a, b, index, parts, each_alpha, len(wanted)) for index in wanted] if is_comparable else []
    verdict, text = _verdict(found, layers, parts, tests, alpha)
    entries_a, entries_b = (finding_entries(each.analysis.findings) for each in (a, b))
    ids_a, ids_b = {entry.rule_id for entry in entries_a}, {entry.rule_id for entry in entries_b}
    mismatch = parts.mismatch
    return Diff(
        a=_side(a),
        b=_side(b),
        verdict=verdict,
        verdict_text=text,
        alpha=alpha,
        tests=tests,
        p_value=None if parts.permutation is None else parts.permutation.p_value,
        num_permutations=0 if parts.permutation is None else parts.permutation.num_permutations,
        smallest_p_value=None if parts.permutation is None else parts.permutation.smallest_p_value,
        points=found,
        layers=layers,
        token_rate=None if mismatch is None else known(mismatch.token_rate),
        token_rate_lower=None if mismatch is None else known(mismatch.token_interval.lower),
        token_rate_upper=None if mismatch is None else known(mismatch.token_interval.upper),
        independent_token_rate=None if mismatch is None else known(mismatch.independent_token_rate),
        num_tokens=0 if mismatch is None else mismatch.num_tokens,
        # Findings of different models have nothing to do with each other.
        appeared=[entry for entry in entries_b if entry.rule_id not in ids_a] if is_comparable else [],
        disappeared=[entry for entry in entries_a if entry.rule_id not in ids_b] if is_comparable else [],
        in_both=[entry for entry in entries_b if entry.rule_id in ids_a] if is_comparable else [],
        pictures=comparison_pictures(layers, a, b) if is_comparable else [],
    )


def _verdict(
    found: list[Point], layers: list[LayerDiff], parts: RowTests, tests: list[str], alpha: float
) -> tuple[Verdict, Text]:
    stops = blocking(found, "everything")
    if stops:
        return "not_comparable", say("verdict.not_comparable", reason="; ".join(point.follows.text for point in stops))
    if not tests:
        missing = blocking(found, "tests") or [point for point in found if point.key in ("documents", "text")]
        reason = "; ".join(point.follows.text for point in missing if point.status != "same") or "there are no rows"
        return "insufficient_evidence", say("verdict.insufficient", reason=reason)
    reasons = []
    loads = [layer for layer in layers if layer.is_load_different]
    if loads:
        p = min(layer.p_value_adjusted or 1.0 for layer in loads)
        reasons.append(say("what.loads", layers=layer_range([each.layer_index for each in loads]), p=p))
    choices = [layer for layer in layers if layer.is_choice_different]
    if choices:
        lowest = min(choices, key=lambda layer: layer.overlap or 0.0)
        indices = layer_range([each.layer_index for each in choices])
        args = {"overlap": lowest.overlap or 0.0, "chance": lowest.chance_overlap or 0.0}
        reasons.append(say("what.choices", layers=indices, **args))
    renamed = [layer for layer in choices if layer.renamed is not None]
    if renamed:
        least = min(layer.overlap_renamed or 0.0 for layer in renamed)
        indices = layer_range([each.layer_index for each in renamed])
        reasons.append(say("what.renamed", layers=indices, overlap=least))
    if reasons:
        return "different", say("verdict.different", what="; ".join(reason.text for reason in reasons))
    return "no_difference", say("verdict.no_difference", alpha=100 * alpha, tests=" and ".join(tests))


def _side(material: Material) -> Side:
    return Side(name=material.name, facts=facts(material, 1), notices=notices(material))
