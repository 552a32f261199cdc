"""Compares two recordings: `diff(a, b)` gives a `Diff`, which goes to HTML, to JSON, and back.

Two tests share the stated rate of false alarms: whether loads differ by more than whole requests do by chance (a
permutation test, max T over the layers), and whether the same tokens go to other experts (the interval of the overlap,
from whole requests, widened for the number of layers, lies wholly below 0.95). Loads alone hide experts that were
permuted, and tokens can be compared only where both have the same text, so neither is enough alone.
"""

from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
from pydantic import ValidationError

from moe_debugger.analysis import (
    Alignment,
    Drift,
    Mismatch,
    PermutationResult,
    RowSet,
    Thresholds,
    align,
    permutation_test,
    routing_drift,
    routing_mismatch,
)
from moe_debugger.errors import InvalidInputError
from moe_debugger.reporting.building import check_format
from moe_debugger.reporting.comparability import Point, blocking, common_layers, points
from moe_debugger.reporting.comparison_pictures import comparison_pictures
from moe_debugger.reporting.content import Fact, FindingEntry, Model, Notice, Picture, Text, known, say
from moe_debugger.reporting.findings_text import finding_entries
from moe_debugger.reporting.header import facts, notices
from moe_debugger.reporting.layer_diff import ExpertChange, LayerDiff, MarginRate
from moe_debugger.reporting.material import DEFAULT_MAX_ROWS, Material, gather, layer_range
from moe_debugger.reporting.renaming import best_renaming

if TYPE_CHECKING:
    from moe_debugger._session import Session
    from moe_debugger.recording import Recording

__all__ = ["DIFF_FORMAT", "OVERLAP_FLOOR", "Diff", "diff"]

DIFF_FORMAT = "moe-debugger-diff"
_MAJOR = 1
# Choices that agree more than this are a numeric wobble (see docs/report.md), not another router.
OVERLAP_FLOOR = 0.95
# A renaming that brings less is none.
_RENAMING_GAIN = 0.2
_MIN_DOCUMENTS, _MIN_INTERVAL_DOCUMENTS = 2, 4
_NUM_CHANGED = 5

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
        return "\n".join([self.verdict_text.text, *said, *([text_table(headers, rows)] if rows else []), *changed])


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
    parts = _Parts()
    if not blocking(found, "tests"):
        parts = _tested(a, b, wanted, num_permutations, seed, found)
    is_comparable = not blocking(found, "everything")
    tests = [name for name, each in (("loads", parts.permutation), ("choices", parts.saturated)) if each]
    each_alpha = alpha / max(1, len(tests))
    layers = [_layer(a, b, index, parts, each_alpha, len(wanted)) for index in wanted] if is_comparable else []
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


class _Parts:
    """What the tests of rows gave; None where they could not be made."""

    def __init__(self) -> None:
        self.drift: Drift | None = None
        self.permutation: PermutationResult | None = None
        self.alignment: Alignment | None = None
        self.mismatch: Mismatch | None = None

    @property
    def saturated(self) -> bool:
        """Whether the overlap has an interval in some layer."""
        return self.drift is not None and any(
            not np.isnan(layer.overlap_interval.upper) for layer in self.drift.layers.values()
        )


def _tested(
    a: Material, b: Material, wanted: Sequence[int], num_permutations: int, seed: int, found: list[Point]
) -> _Parts:
    """Return the tests of rows, and add to `found` how requests and tokens match."""
    parts = _Parts()
    assert a.rows is not None
    assert b.rows is not None
    rows_a, rows_b = RowSet.of(a.rows, **a.sizes()), RowSet.of(b.rows, **b.sizes())
    in_rows = [index for index in wanted if index in rows_a.shapes and index in rows_b.shapes]
    if not in_rows:
        return parts
    # In training the names of a batch's rows come again in every step: the unit is the request of one step.
    units_a, units_b = set(rows_a.units), set(rows_b.units)
    paired = len(units_a & units_b)
    names = f"{len(units_a):,}", f"{len(units_b):,}"
    if min(len(units_a), len(units_b)) < _MIN_DOCUMENTS:
        follows = say("cmp.few_documents", a=len(units_a), b=len(units_b))
        found.append(
            Point(
                key="documents",
                status="differs",
                a=names[0],
                b=names[1],
                follows=follows,
                remedy=say("do.few_documents"),
            )
        )
    else:
        parts.permutation = permutation_test(
            rows_a, rows_b, layers=in_rows, num_permutations=num_permutations, seed=seed
        )
        is_same = units_a == units_b
        counts = {"paired": paired, "a": len(units_a) - paired, "b": len(units_b) - paired}
        follows = say("cmp.documents", **counts) if paired else say("cmp.other_documents")
        status: Literal["same", "differs"] = "same" if is_same else "differs"
        remedy = None if is_same else say("do.documents")
        found.append(Point(key="documents", status=status, a=names[0], b=names[1], follows=follows, remedy=remedy))
    parts.drift = routing_drift(rows_a, rows_b, layers=in_rows, seed=seed)
    alignment = (
        align(rows_a, rows_b, layers=in_rows) if rows_a.position is not None and rows_b.position is not None else None
    )
    account = "; ".join(alignment.account()) if alignment is not None else "no positions"
    if alignment is None or not alignment.num_rows:
        # Where nothing matches, what each recording has too much says it all.
        account = "; ".join(alignment.account()[:2]) if alignment is not None else account
        found.append(
            Point(
                key="text",
                status="unknown",
                a="",
                b="",
                follows=say("cmp.no_match", account=account),
                remedy=say("do.text"),
            )
        )
        return parts
    parts.alignment, parts.mismatch = alignment, routing_mismatch(alignment)
    code, is_all = ("cmp.match", False) if account else ("cmp.match_all", True)
    found.append(
        Point(
            key="text",
            status="same" if is_all else "differs" if alignment.is_text_checked else "unknown",
            a=f"{len(rows_a.row):,} rows",
            b=f"{len(rows_b.row):,} rows",
            follows=say(code, num=alignment.num_rows, account=account),
            remedy=None if is_all else say("do.text"),
        )
    )
    return parts


def _layer(a: Material, b: Material, index: int, parts: _Parts, alpha: float, num_layers: int) -> LayerDiff:
    metrics_a, metrics_b = a.analysis.metrics[index], b.analysis.metrics[index]
    drift = None if parts.drift is None else parts.drift.layers.get(index)
    test = None if parts.permutation is None else parts.permutation.layers.get(index)
    mismatch = None if parts.mismatch is None else parts.mismatch.layers.get(index)
    bound = overlap_bound(drift.overlap, drift.overlap_interval.upper, alpha, num_layers) if drift is not None else None
    is_other = bound is not None and bound < OVERLAP_FLOOR
    renaming = best_renaming(parts.alignment, index) if is_other and parts.alignment is not None else None
    if renaming is not None and drift is not None and renaming.overlap < drift.overlap + _RENAMING_GAIN:
        renaming = None
    shares_a, shares_b = np.asarray(metrics_a.share), np.asarray(metrics_b.share)
    order = np.argsort(-np.abs(np.nan_to_num(shares_b - shares_a)), kind="stable")[:_NUM_CHANGED].tolist()
    from moe_debugger.analysis import jensen_shannon_bits

    js = float(jensen_shannon_bits(shares_a, shares_b)) if drift is None else drift.js_bits
    return LayerDiff(
        layer_index=index,
        num_experts=metrics_a.num_experts,
        top_k=metrics_a.top_k,
        num_assignments_a=metrics_a.num_assignments,
        num_assignments_b=metrics_b.num_assignments,
        num_documents_a=0 if drift is None else drift.num_documents_a,
        num_documents_b=0 if drift is None else drift.num_documents_b,
        effective_experts_a=known(metrics_a.effective_experts),
        effective_experts_b=known(metrics_b.effective_experts),
        js_bits=known(js),
        across_bits=None if drift is None else known(drift.across_bits),
        noise_floor_bits=None if drift is None else known(drift.noise_floor_bits),
        drift_bits=None if drift is None else known(drift.drift_bits),
        p_value=None if test is None else test.p_value,
        p_value_adjusted=None if test is None else test.p_value_adjusted,
        num_tokens=0 if drift is None else drift.num_tokens,
        overlap=None if drift is None else known(drift.overlap),
        overlap_lower=None if drift is None else known(drift.overlap_interval.lower),
        overlap_upper=None if drift is None else known(drift.overlap_interval.upper),
        overlap_bound=bound,
        chance_overlap=None if drift is None else known(drift.chance_overlap),
        router_rate=None if mismatch is None else known(mismatch.router_rate),
        slot_rate=None if mismatch is None else known(mismatch.slot_rate),
        by_margin=[]
        if mismatch is None
        else [
            MarginRate(
                lower=known(bucket.lower),
                upper=known(bucket.upper),
                is_known=not np.isnan(bucket.lower),
                num_tokens=bucket.num_tokens,
                router_rate=known(bucket.router_rate),
                slot_rate=known(bucket.slot_rate),
            )
            for bucket in mismatch.by_margin
        ],
        changes=[
            ExpertChange(expert_id=e, share_a=known(float(shares_a[e])), share_b=known(float(shares_b[e])))
            for e in order
        ],
        is_load_different=test is not None and test.p_value_adjusted <= alpha,
        is_choice_different=is_other,
        renamed=None if renaming is None else renaming.new_id,
        overlap_renamed=None if renaming is None else renaming.overlap,
    )


def overlap_bound(overlap: float, upper: float, alpha: float, num_layers: int) -> float | None:
    """Return the upper bound of an overlap that holds over all layers at rate `alpha`; None without an interval.

    The two-sided 95 % interval, whose half is 1.96 standard errors, is widened by the ratio of normal quantiles.
    """
    if np.isnan(overlap) or np.isnan(upper):
        return None
    normal = NormalDist()
    ratio = max(1.0, normal.inv_cdf(1 - alpha / max(1, num_layers)) / normal.inv_cdf(0.975))
    return min(1.0, overlap + (upper - overlap) * ratio)


def _verdict(
    found: list[Point], layers: list[LayerDiff], parts: _Parts, tests: list[str], alpha: float
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
