"""The tests of a comparison: what rows allow, and what they say of each layer."""

from collections.abc import Sequence
from statistics import NormalDist
from typing import Literal

import numpy as np

from moe_debugger.analysis import (
    Alignment,
    Drift,
    Mismatch,
    PermutationResult,
    RowSet,
    align,
    jensen_shannon_bits,
    permutation_test,
    routing_drift,
    routing_mismatch,
)
from moe_debugger.reporting.comparability import Point
from moe_debugger.reporting.content import known, say
from moe_debugger.reporting.layer_diff import ExpertChange, LayerDiff, MarginRate
from moe_debugger.reporting.material import Material
from moe_debugger.reporting.renaming import best_renaming

__all__ = ["OVERLAP_FLOOR", "RowTests", "compare_layer", "overlap_bound", "run_tests", "usable_tests"]

# Choices that agree more than this are a numeric wobble (see docs/report.md), not another router.
OVERLAP_FLOOR = 0.95
# A renaming that brings less is none.
_RENAMING_GAIN = 0.2
_MIN_DOCUMENTS = 2
_NUM_CHANGED = 5


class RowTests:
    """What the tests of rows gave; None where they could not be made."""

    def __init__(self) -> None:
        self.drift: Drift | None = None
        self.permutation: PermutationResult | None = None
        self.alignment: Alignment | None = None
        self.mismatch: Mismatch | None = None

    @property
    def has_overlap(self) -> bool:
        """Whether the overlap has an interval in some layer."""
        return self.drift is not None and any(
            not np.isnan(layer.overlap_interval.upper) for layer in self.drift.layers.values()
        )


def run_tests(
    a: Material, b: Material, wanted: Sequence[int], num_permutations: int, seed: int, found: list[Point]
) -> RowTests:
    """Return the tests of rows, and add to `found` how requests and tokens match."""
    parts = RowTests()
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


def usable_tests(parts: RowTests, alpha: float, found: list[Point]) -> list[str]:
    """Return the names of the tests that share `alpha`.

    A test of loads that cannot find anything, as there are too few requests, is none: it goes from `parts`, and the
    point of `found` about requests says so.
    """
    tests = [name for name, each in (("loads", parts.permutation), ("choices", parts.has_overlap)) if each]
    loads = parts.permutation
    if loads is None or loads.smallest_p_value <= alpha / len(tests):
        return tests
    follows = say(
        "cmp.blunt_documents",
        a=loads.num_units_a,
        b=loads.num_units_b,
        num=loads.num_permutations,
        least=loads.smallest_p_value,
        level=alpha / len(tests),
    )
    for index, point in enumerate(found):
        if point.key == "documents":
            found[index] = point.model_copy(
                update={"status": "differs", "follows": follows, "remedy": say("do.few_documents")}
            )
    parts.permutation = None
    return [name for name in tests if name != "loads"]


def compare_layer(a: Material, b: Material, index: int, parts: RowTests, alpha: float, num_layers: int) -> LayerDiff:
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
