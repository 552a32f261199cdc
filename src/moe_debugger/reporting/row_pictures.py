"""Pictures that need rows: experts used together, transitions, drops by position, tokens."""

import math
from collections.abc import Mapping

import numpy as np

from moe_debugger.analysis import (
    Coactivation,
    ExpertPair,
    RowSet,
    Transitions,
    capacity_drops,
    expert_coactivation,
    layer_transitions,
    vocabulary_specialisation,
)
from moe_debugger.errors import InvalidInputError
from moe_debugger.reporting.content import Bars, Cell, Matrix, Picture, Table, Text, known, picture, say
from moe_debugger.reporting.material import Material

__all__ = ["coactivation", "drops", "tokens", "transitions"]

_MAX_MATRIX = 16
_NUM_PAIRS = 20
_MIN_PAIR_TOKENS = 20
_NUM_TOKEN_EXPERTS, _NUM_TOKENS = 16, 5


def _strength(pair: ExpertPair, neutral: float) -> float:
    """Return how far a pair is above what unrelated experts would have together, in square roots of that.

    Not the lift alone, which is highest for experts that were hardly used.
    """
    if pair.num_tokens < _MIN_PAIR_TOKENS or not pair.lift > 0:
        return 0.0
    expected = pair.num_tokens * neutral / pair.lift
    return (pair.num_tokens - expected) / math.sqrt(expected)


def _pair_rows(pairs: list[tuple[str, ExpertPair, float]]) -> Table:
    rows: list[list[Cell]] = [
        [
            where, f"E{pair.first}", f"E{pair.second}", pair.num_tokens, pair.conditional, pair.lift,
            known(pair.lift_interval.lower), known(pair.lift_interval.upper), neutral,
        ]
        for where, pair, neutral in pairs
    ]  # fmt: skip
    columns = ["layer", "first", "second", "tokens with both", "P(second | first)", "lift", "from", "to", "unrelated"]
    return Table(columns=columns, rows=rows, note=say("note.picked"))


def coactivation(material: Material) -> Picture:
    """Return the experts that tokens use together."""
    if material.rows is None:
        return picture("coactivation", _no_rows(material))
    found = expert_coactivation(material.rows, **material.sizes(), num_top_pairs=_MAX_MATRIX)
    usable = {index: each for index, each in found.items() if each.top_pairs}
    if not usable:
        reason = next((each.not_applicable for each in found.values() if each.not_applicable), "")
        return picture("coactivation", say("missing.other", reason=reason or "no pair stands out"))
    pairs = [(f"{i}", pair, each.chance_lift) for i, each in usable.items() for pair in each.top_pairs]
    pairs.sort(key=lambda each: -_strength(each[1], each[2]))
    best = max(usable, key=lambda index: max(_strength(p, usable[index].chance_lift) for p in usable[index].top_pairs))
    return picture(
        "coactivation",
        data=_pair_matrix(usable[best]),
        table=_pair_rows(pairs[:_NUM_PAIRS]),
    )


def _pair_matrix(found: Coactivation) -> Matrix | None:
    if found.lift is None:
        return None
    members = list(dict.fromkeys(expert for pair in found.top_pairs for expert in (pair.first, pair.second)))
    if found.num_experts <= _MAX_MATRIX:
        members = list(range(found.num_experts))
    members = sorted(members[:_MAX_MATRIX])
    return Matrix(
        row_title=f"expert of layer {found.layer_index}",
        column_title=f"expert of layer {found.layer_index}",
        row_names=[f"E{e}" for e in members],
        column_names=[f"E{e}" for e in members],
        values=[[known(round(float(found.lift[i, j]), 4)) for j in members] for i in members],
        neutral=found.chance_lift,
    )


def transitions(material: Material) -> Picture:
    """Return which experts of the next layer take the tokens of an expert."""
    if material.rows is None:
        return picture("transitions", _no_rows(material))
    if len(material.analysis.metrics) < 2:
        return picture("transitions", say("missing.one_layer"))
    found = layer_transitions(material.rows, **material.sizes(), num_top_pairs=_MAX_MATRIX)
    usable = {pair: each for pair, each in found.items() if each.top_pairs}
    if not usable:
        reason = next((each.not_applicable for each in found.values() if each.not_applicable), "")
        return picture("transitions", say("missing.other", reason=reason or "no transition stands out"))
    pairs = [(f"{a} → {b}", pair, 1.0) for (a, b), each in usable.items() for pair in each.top_pairs]
    pairs.sort(key=lambda each: -_strength(each[1], 1.0))
    best = max(usable, key=lambda key: max(_strength(pair, 1.0) for pair in usable[key].top_pairs))
    return picture("transitions", data=_step_matrix(usable[best]), table=_pair_rows(pairs[:_NUM_PAIRS]))


def _step_matrix(found: Transitions) -> Matrix | None:
    if found.lift is None:
        return None
    firsts = list(dict.fromkeys(pair.first for pair in found.top_pairs))
    seconds = list(dict.fromkeys(pair.second for pair in found.top_pairs))
    if max(found.num_experts, found.next_num_experts) <= _MAX_MATRIX:
        firsts, seconds = list(range(found.num_experts)), list(range(found.next_num_experts))
    firsts, seconds = sorted(firsts[:_MAX_MATRIX]), sorted(seconds[:_MAX_MATRIX])
    return Matrix(
        row_title=f"expert of layer {found.layer_index}",
        column_title=f"expert of layer {found.next_layer_index}",
        row_names=[f"E{e}" for e in firsts],
        column_names=[f"E{e}" for e in seconds],
        values=[[known(round(float(found.lift[i, j]), 4)) for j in seconds] for i in firsts],
    )


def drops(material: Material) -> Picture:
    """Return the drops by position."""
    if material.rows is None:
        return picture("drops", _no_rows(material))
    found = capacity_drops(material.rows, **material.sizes())
    usable = {index: each for index, each in found.items() if not each.not_applicable and each.by_position}
    if not usable:
        reason = next((each.not_applicable for each in found.values()), "no rows")
        return picture("drops", say("missing.other", reason=reason))
    worst = max(usable, key=lambda index: usable[index].dropped_share)
    buckets = usable[worst].by_position
    names = [f"{each.first}–{each.last}" if each.last is not None else f"{each.first}…" for each in buckets]
    rows: list[list[Cell]] = [
        [
            index, f"{each.first}–{'' if each.last is None else each.last}", known(each.dropped_share),
            known(each.interval.lower), known(each.interval.upper), each.num_dropped, each.num_slots,
        ]
        for index, drops in usable.items()
        for each in drops.by_position
    ]  # fmt: skip
    data = Bars(
        y_title=f"share of slots dropped, layer {worst}",
        names=names,
        values=[known(each.dropped_share) for each in buckets],
        lower=[known(each.interval.lower) for each in buckets],
        upper=[known(each.interval.upper) for each in buckets],
    )
    columns = ["layer", "positions", "dropped", "from", "to", "slots dropped", "of slots"]
    return picture("drops", data=data, table=Table(columns=columns, rows=rows))


def tokens(material: Material, token_texts: Mapping[int, str]) -> Picture:
    """Return the tokens that experts are chosen for."""
    if material.rows is None:
        return picture("tokens", _no_rows(material))
    indices = sorted(material.analysis.metrics)
    chosen = sorted({indices[0], indices[len(indices) // 2], indices[-1]}) if indices else []
    try:
        rows = RowSet.of(material.rows, **material.sizes())
        found = vocabulary_specialisation(rows, layers=[i for i in chosen if i in rows.bounds])
    except InvalidInputError as error:
        return picture("tokens", say("missing.other", reason=str(error)))
    table: list[list[Cell]] = []
    for index, each in found.items():
        # How much more often than the layer's average a token goes to an expert; the largest of each expert orders.
        excess = each.shrunk_rate - each.overall_rate[each.expert_id]
        most = np.full(len(each.overall_rate), -np.inf)
        np.maximum.at(most, each.expert_id, excess)
        for expert in np.argsort(-most, kind="stable")[:_NUM_TOKEN_EXPERTS].tolist():
            if not np.isfinite(most[expert]):
                continue
            tops = each.top_tokens(expert, _NUM_TOKENS)
            names = [
                f"{token_texts[token]!r} {rate:.2f} (n {num})"
                if token in token_texts
                else f"{token} {rate:.2f} (n {num})"
                for token, rate, num in tops
            ]
            table.append(
                [index, f"E{expert}", float(each.overall_rate[expert]), *names, *[None] * (_NUM_TOKENS - len(names))]
            )
    columns = ["layer", "expert", "rate of all tokens", *(f"token {n + 1}" for n in range(_NUM_TOKENS))]
    return picture("tokens", table=Table(columns=columns, rows=table, note=say("note.shrunk")))


def _no_rows(material: Material) -> Text:
    if material.source == "analysis":
        return say("missing.analysis")
    return say("missing.counts" if material.level == "counts" else "missing.no_rows")
