"""What the pictures show, as numbers; `svg.py` draws them. Each has a table that says the same.

All are per layer. Where something was not captured a picture says so instead of being empty.
"""

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
from moe_debugger.reporting.audit import collapse_limit
from moe_debugger.reporting.content import (
    Bars,
    Cell,
    Heatmap,
    HeatmapRow,
    Line,
    Lines,
    Matrix,
    Picture,
    Table,
    Text,
    known,
    say,
)
from moe_debugger.reporting.material import Material
from moe_debugger.reporting.step_series import effective_over_steps

__all__ = ["pictures"]

_MAX_MATRIX = 16
_NUM_NAMED = 6
_MAX_LORENZ_POINTS = 33
_NUM_PAIRS = 20
_MIN_PAIR_TOKENS = 20
# At k = 1 this leaves a perfectly balanced layer at 0.97 E at least.
_TOKENS_PER_EXPERT = 16
_NUM_TOKEN_EXPERTS, _NUM_TOKENS = 16, 5
# A table of every expert of every layer is read by nobody beyond this; JSON has them all.
_MAX_FULL_CELLS = 512


def pictures(material: Material, token_texts: Mapping[int, str] | None = None) -> list[Picture]:
    """Return all pictures in the order in which they are shown.

    Args:
        material: what was recorded.
        token_texts: text of a token by its id; ids stand alone without it.
    """
    return [
        _load(material),
        _over_steps(material),
        _lorenz(material),
        _coactivation(material),
        _transitions(material),
        _drops(material),
        _tokens(material, token_texts or {}),
    ]


def _picture(key: str, why_not: Text | None = None, **values: object) -> Picture:
    return Picture.model_validate(
        {"key": key, "title": say(f"picture.{key}"), "caption": say(f"caption.{key}"), "why_not": why_not, **values}
    )


def _load(material: Material) -> Picture:
    rows, table = [], []
    for index, metrics in material.analysis.metrics.items():
        ratios = np.asarray(metrics.share, np.float64) * metrics.num_experts
        rows.append(
            HeatmapRow(
                layer_index=index,
                num_experts=metrics.num_experts,
                top_k=metrics.top_k,
                values=[known(round(float(ratio), 4)) for ratio in ratios],
            )
        )
        table.append((index, metrics, ratios))
    if not any(metrics.num_assignments for _, metrics, _ in table):
        return _picture("load", say("missing.no_load"))
    cells: list[list[Cell]]
    if sum(len(ratios) for _, _, ratios in table) <= _MAX_FULL_CELLS:
        columns = ["layer", *(f"E{e}" for e in range(max(len(ratios) for _, _, ratios in table)))]
        width = len(columns) - 1
        cells = [[i, *(known(r) for r in ratios), *([None] * (width - len(ratios)))] for i, _, ratios in table]
        note = None
    else:
        columns = ["layer", "experts", "most loaded", "× fair", "least loaded", "× fair", "unused", "assignments"]
        cells = []
        for index, metrics, ratios in table:
            if not metrics.num_assignments:
                continue
            most, least = int(ratios.argmax()), int(ratios.argmin())
            cells.append([
                index, metrics.num_experts, f"E{most}", float(ratios[most]), f"E{least}", float(ratios[least]),
                metrics.num_unused, metrics.num_assignments,
            ])  # fmt: skip
        note = say("note.all_in_json")
    return _picture("load", data=Heatmap(rows=rows), table=Table(columns=columns, rows=cells, note=note))


def _over_steps(material: Material) -> Picture:
    series = {}
    for index, steps in material.steps.items():
        experts = steps.counts.shape[1]
        # Few tokens read low, whatever the router does.
        steps = steps.at_least(_TOKENS_PER_EXPERT * experts)
        if len(steps.first_steps) >= 2 and experts > 1:
            series[index] = (steps, effective_over_steps(steps.counts) / experts)
    if not series:
        return _picture("over_steps", say("missing.no_steps"))
    lowest = {index: float(np.nanmin(values)) for index, (_, values) in series.items()}
    named = sorted(lowest, key=lambda index: (lowest[index], index))[:_NUM_NAMED]
    lines = [
        Line(
            name=f"layer {index}",
            x=[float(step) for step in steps.first_steps],
            y=[known(round(float(value), 4)) for value in values],
            is_named=index in named,
        )
        for index, (steps, values) in series.items()
    ]
    some = next(iter(series))
    info = material.layers[some]
    guides = [
        (material.thresholds.load_balance, "skew begins"),
        (collapse_limit(info.num_experts, max(1, info.top_k), material.thresholds) / info.num_experts, "collapse"),
    ]
    rows: list[list[Cell]] = [
        [
            index,
            int(steps.first_steps[0]),
            steps.last_step,
            len(steps.first_steps),
            int(np.median(steps.num_tokens)),
            float(values[0]),
            lowest[index],
            int(steps.first_steps[int(np.nanargmin(values))]),
            float(values[-1]),
        ]
        for index, (steps, values) in series.items()
    ]
    columns = ["layer", "from step", "to step", "points", "tokens each", "first", "lowest", "at step", "last"]
    data = Lines(x_title="step", y_title="effective experts / E", lines=lines, guides=guides)
    return _picture("over_steps", data=data, table=Table(columns=columns, rows=rows))


def _lorenz(material: Material) -> Picture:
    known_metrics = {i: m for i, m in material.analysis.metrics.items() if m.num_assignments and m.num_experts > 1}
    if not known_metrics:
        return _picture("lorenz", say("missing.no_load"))
    named = sorted(known_metrics, key=lambda index: (-known_metrics[index].gini, index))[:_NUM_NAMED]
    lines, rows = [], []
    for index, metrics in known_metrics.items():
        shares = np.sort(np.asarray(metrics.share))
        curve = np.r_[0.0, np.cumsum(shares)]
        at = np.unique(np.linspace(0, len(shares), min(_MAX_LORENZ_POINTS, len(shares) + 1)).round().astype(int))
        lines.append(
            Line(
                name=f"layer {index}",
                x=[round(float(x), 4) for x in at / len(shares)],
                y=[round(float(y), 4) for y in curve[at]],
                is_named=index in named,
            )
        )
        tenth = max(1, round(len(shares) / 10))
        rows.append([
            index, metrics.gini, metrics.effective_experts, metrics.num_experts, float(shares[-tenth:].sum()), tenth,
            metrics.num_assignments,
        ])  # fmt: skip
    lines.append(Line(name="even", x=[0.0, 1.0], y=[0.0, 1.0]))
    columns = ["layer", "Gini", "effective experts", "E", "share of the most loaded", "of them", "assignments"]
    data = Lines(x_title="share of experts, least loaded first", y_title="share of load", lines=lines)
    return _picture("lorenz", data=data, table=Table(columns=columns, rows=rows))


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


def _coactivation(material: Material) -> Picture:
    if material.rows is None:
        return _picture("coactivation", _no_rows(material))
    found = expert_coactivation(material.rows, **material.sizes(), num_top_pairs=_MAX_MATRIX)
    usable = {index: each for index, each in found.items() if each.top_pairs}
    if not usable:
        reason = next((each.not_applicable for each in found.values() if each.not_applicable), "")
        return _picture("coactivation", say("missing.other", reason=reason or "no pair stands out"))
    pairs = [(f"{i}", pair, each.chance_lift) for i, each in usable.items() for pair in each.top_pairs]
    pairs.sort(key=lambda each: -_strength(each[1], each[2]))
    best = max(usable, key=lambda index: max(_strength(p, usable[index].chance_lift) for p in usable[index].top_pairs))
    return _picture(
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


def _transitions(material: Material) -> Picture:
    if material.rows is None:
        return _picture("transitions", _no_rows(material))
    if len(material.analysis.metrics) < 2:
        return _picture("transitions", say("missing.one_layer"))
    found = layer_transitions(material.rows, **material.sizes(), num_top_pairs=_MAX_MATRIX)
    usable = {pair: each for pair, each in found.items() if each.top_pairs}
    if not usable:
        reason = next((each.not_applicable for each in found.values() if each.not_applicable), "")
        return _picture("transitions", say("missing.other", reason=reason or "no transition stands out"))
    pairs = [(f"{a} → {b}", pair, 1.0) for (a, b), each in usable.items() for pair in each.top_pairs]
    pairs.sort(key=lambda each: -_strength(each[1], 1.0))
    best = max(usable, key=lambda key: max(_strength(pair, 1.0) for pair in usable[key].top_pairs))
    return _picture("transitions", data=_step_matrix(usable[best]), table=_pair_rows(pairs[:_NUM_PAIRS]))


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


def _drops(material: Material) -> Picture:
    if material.rows is None:
        return _picture("drops", _no_rows(material))
    found = capacity_drops(material.rows, **material.sizes())
    usable = {index: each for index, each in found.items() if not each.not_applicable and each.by_position}
    if not usable:
        reason = next((each.not_applicable for each in found.values()), "no rows")
        return _picture("drops", say("missing.other", reason=reason))
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
    return _picture("drops", data=data, table=Table(columns=columns, rows=rows))


def _tokens(material: Material, token_texts: Mapping[int, str]) -> Picture:
    if material.rows is None:
        return _picture("tokens", _no_rows(material))
    indices = sorted(material.analysis.metrics)
    chosen = sorted({indices[0], indices[len(indices) // 2], indices[-1]}) if indices else []
    try:
        rows = RowSet.of(material.rows, **material.sizes())
        found = vocabulary_specialisation(rows, layers=[i for i in chosen if i in rows.bounds])
    except InvalidInputError as error:
        return _picture("tokens", say("missing.other", reason=str(error)))
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
    return _picture("tokens", table=Table(columns=columns, rows=table, note=say("note.shrunk")))


def _no_rows(material: Material) -> Text:
    if material.source == "analysis":
        return say("missing.analysis")
    return say("missing.counts" if material.level == "counts" else "missing.no_rows")
