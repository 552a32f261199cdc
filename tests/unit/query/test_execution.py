"""The vectorised executor against a slow evaluator in plain Python, over random rows and random queries."""

import math
from collections import Counter, defaultdict
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from query_reference import RowsSource, TableSource, evaluate, holds, random_source, token_rows

from moe_debugger.analysis.metrics import effective_experts
from moe_debugger.query import parse, run_query
from moe_debugger.query.columns import KINDS, SEVERITIES
from moe_debugger.query.form import names_of
from moe_debugger.query.table import Column, Labels
from moe_debugger.query.tables import Table, texts

_NUMBERS = {
    "layer": (-1, 3), "position": (-1, 6), "step": (-1, 5), "token_id": (-2, 4), "expert": (-1, 5),
    "num_experts_reached": (0, 3), "dropped_slots": (0, 2),
}  # fmt: skip
_FLOATS = ("margin", "router_entropy", "top1_probability")
_ORDERED = ("<", "<=", ">", ">=", "=", "!=")
_SHOWABLE = ("request", "position", "phase", "step", "token_id", "layer", "module", "experts", "weights", "margin")
_GROUPS = ("request", "phase", "step", "layer", "token_id", "module", "expert", "margin")


@st.composite
def _tests(draw: st.DrawFn) -> str:
    kind = draw(st.sampled_from(["number", "number", "float", "phase", "text", "missing"]))
    if kind == "missing":
        name = draw(st.sampled_from(["token_id", "margin", "expert", "layer"]))
        return f"{name} is {draw(st.sampled_from(['', 'not ']))}missing"
    if kind == "phase":
        words = st.sampled_from(["prefill", "Decode", '"eval"', "train"])
        if draw(st.booleans()):
            return f"phase {draw(st.sampled_from(['=', '!=']))} {draw(words)}"
        return f"phase in ({', '.join(draw(st.lists(words, min_size=1, max_size=3)))})"
    if kind == "text":
        name, values = draw(
            st.sampled_from([("request", ["req-a", "req-b", "Req-C", "none"]), ("module", ["a.mlp", "b.mlp"])])
        )
        if draw(st.booleans()):
            return f'{name} contains "{draw(st.sampled_from(["A", "req", "-b", ".MLP", ""]))}"'
        quoted = st.sampled_from([f'"{value}"' for value in values])
        return f"{name} {draw(st.sampled_from(['=', '!=', '<>']))} {draw(quoted)}"
    if kind == "float":
        name = draw(st.sampled_from(_FLOATS))
        value = st.integers(-1, 9).map(lambda n: f"{n * 25}%" if name == "top1_probability" else str(n / 4))
    else:
        name = draw(st.sampled_from(sorted(_NUMBERS)))
        low, high = _NUMBERS[name]
        value = st.integers(low, high).map(str) | st.integers(2 * low, 2 * high).map(lambda n: str(n / 2))
    form = draw(st.sampled_from(["compare", "compare", "in", "between"]))
    if form == "compare":
        return f"{name} {draw(st.sampled_from(_ORDERED))} {draw(value)}"
    negated = draw(st.sampled_from(["", "not "]))
    if form == "in":
        return f"{name} {negated}in ({', '.join(draw(st.lists(value, min_size=1, max_size=3)))})"
    return f"{name} {negated}between {draw(value)} and {draw(value)}"


_conditions = st.recursive(
    _tests(),
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["and", "or"]), inner).map(lambda t: f"({t[0]} {t[1]} {t[2]})"),
        st.tuples(inner, inner, inner).map(lambda t: f"({t[0]} and {t[1]} or {t[2]})"),
        inner.map(lambda text: f"not {text}"),
    ),
    max_leaves=5,
)


@st.composite
def _queries(draw: st.DrawFn) -> str:
    words = ["tokens"]
    if draw(st.booleans()):
        words.append(f"where {draw(_conditions)}")
    names = st.lists(st.sampled_from(_GROUPS), min_size=0, max_size=3, unique=True)
    by = draw(names)
    aggregates = st.sampled_from(
        ["count", "sum(position)", "mean(margin)", "min(step)", "max(margin)", "sum(margin)", "mean(position)"]
    )
    is_grouped = bool(by) or draw(st.booleans())
    if is_grouped:
        shown = draw(st.lists(aggregates, min_size=0 if by else 1, max_size=3, unique=True))
        words += [f"by {', '.join(by)}"] if by else []
        words += [f"show {', '.join([*draw(st.permutations(by)), *shown])}"] if shown else []
        keys = draw(st.lists(st.sampled_from([*by, *(shown or ["count"])]), max_size=2, unique=True))
    else:
        words.append(
            f"show {', '.join(draw(st.lists(st.sampled_from(_SHOWABLE), min_size=1, max_size=4, unique=True)))}"
        )
        sortable = [name for name in (*_SHOWABLE, "dropped_slots") if name not in ("experts", "weights")]
        keys = draw(st.lists(st.sampled_from(sortable), max_size=3, unique=True))
    if keys:
        directions = [draw(st.sampled_from(["", " asc", " desc"])) for _ in keys]
        words.append("order by " + ", ".join(key + way for key, way in zip(keys, directions, strict=True)))
    if draw(st.booleans()):
        words.append(f"limit {draw(st.integers(1, 12))}")
    return " ".join(words)


def _same(actual: list[tuple[Any, ...]], expected: list[tuple[Any, ...]], text: str) -> None:
    assert len(actual) == len(expected), text
    for mine, theirs in zip(actual, expected, strict=True):
        for one, other in zip(mine, theirs, strict=True):
            assert one == (pytest.approx(other) if isinstance(other, float) else other), text


@settings(max_examples=250, deadline=None)
@given(text=_queries(), seed=st.integers(0, 2**32 - 1), num_rows=st.integers(0, 60), data=st.data())
def test_tokens_agree_with_the_slow_evaluator(text: str, seed: int, num_rows: int, data: st.DataObject) -> None:
    cuts = data.draw(st.lists(st.integers(0, num_rows), max_size=3))
    source = random_source(seed, num_rows, cuts)
    result = run_query(text, source)
    names, rows = evaluate(parse(text), token_rows(source))
    assert list(result.names) == names
    _same(result.rows, rows, text)
    if result.num_matched is not None:
        assert result.is_truncated == (result.num_matched > len(rows))


def test_rows_beyond_the_kept_ones_are_sorted_right() -> None:
    source = random_source(3, 30_000, range(1000, 30_000, 1000))
    text = "tokens where layer = 1 show step, position, margin order by margin desc, step, position limit 7"
    result = run_query(text, source)
    assert result.rows == evaluate(parse(text), token_rows(source))[1]
    assert result.is_truncated
    assert result.num_rows_scanned == 30_000
    assert "(30,000 rows read in " in result.footer
    assert "(1 row read in " in replace(result, num_rows_scanned=1).footer


def test_reading_ends_with_the_limit() -> None:
    source = random_source(3, 30_000, range(1000, 30_000, 1000))
    result = run_query("tokens where layer = 1 limit 5", source)
    assert (len(result), result.is_truncated, result.num_matched, source.num_read) == (5, True, None, 1000)


@settings(max_examples=80, deadline=None)
@given(condition=_conditions, seed=st.integers(0, 2**32 - 1), num_rows=st.integers(0, 60), cut=st.integers(0, 60))
def test_experts_of_chosen_tokens_agree_with_counting_one_by_one(
    condition: str, seed: int, num_rows: int, cut: int
) -> None:
    # Of these subjects, what is no column of tokens cannot be in one condition with what is.
    allowed = ("position", "token_id", "request", "phase", "step")
    if not {name.text for name in _names(condition)} <= set(allowed):
        return
    source = random_source(seed, num_rows, [min(cut, num_rows)])
    chosen = [row for row in token_rows(source) if _holds(condition, row)]
    counts: Counter[tuple[int, int]] = Counter()
    for row in chosen:
        size = source.layers[row["layer"]].num_experts
        counts.update((row["layer"], expert) for expert in row["experts"] if expert < size)
    result = run_query(
        f"experts where {condition} show layer, expert, assignments, load order by layer, expert", source
    )
    totals = {layer: sum(n for (of, _), n in counts.items() if of == layer) for layer in range(3)}
    for layer, expert, assignments, load in result:
        assert assignments == counts[layer, expert]
        fair = totals[layer] / source.layers[layer].num_experts
        assert load == (pytest.approx(assignments / fair) if fair else None)
    assert len(result) == sum(layer.num_experts for layer in source.layers)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), num_rows=st.integers(1, 80), cut=st.integers(0, 80))
def test_steps_and_requests_agree_with_counting_one_by_one(seed: int, num_rows: int, cut: int) -> None:
    source = random_source(seed, num_rows, [min(cut, num_rows)])
    rows = token_rows(source)
    loads: dict[tuple[int, int], Counter[int]] = defaultdict(Counter)
    tokens: Counter[tuple[int, int]] = Counter()
    by_request: dict[str, Counter[int]] = defaultdict(Counter)
    for row in rows:
        key = row["step"], row["layer"]
        tokens[key] += 1
        by_request[row["request"]][row["layer"]] += 1
        loads[key].update(e for e in row["experts"] if e < source.layers[row["layer"]].num_experts)
    steps = run_query("steps show step, layer, tokens, assignments, effective_experts, max_load, used_experts", source)
    assert {row[:2] for row in steps} == set(tokens)
    for step, layer, n, assignments, effective, max_load, used in steps:
        load = loads[step, layer]
        counts = [load[e] for e in range(source.layers[layer].num_experts)]
        assert (n, assignments, used) == (tokens[step, layer], sum(counts), sum(c > 0 for c in counts))
        if sum(counts):
            assert effective == pytest.approx(effective_experts(counts))
            assert max_load == pytest.approx(max(counts) * len(counts) / sum(counts))
        else:
            assert effective is max_load is None
    requests = run_query("requests show request, tokens, first_step, last_step", source)
    assert {row[0]: row[1] for row in requests} == {name: max(n.values()) for name, n in by_request.items()}
    for name, _, first, last in requests:
        own = [row["step"] for row in rows if row["request"] == name]
        assert (first, last) == (min(own), max(own))


@settings(max_examples=100, deadline=None)
@given(data=st.data(), seed=st.integers(0, 2**32 - 1))
def test_ordered_choices_and_missing_places_of_findings(data: st.DataObject, seed: int) -> None:
    rng = np.random.default_rng(seed)
    n = data.draw(st.integers(0, 20))
    severity, kind = rng.integers(1, 4, n), rng.integers(1, len(KINDS), n)
    layer, missing = rng.integers(0, 3, n), rng.random(n) < 0.3
    statistic = np.where(rng.random(n) < 0.2, np.nan, rng.integers(0, 5, n) / 2)
    rules = [f"rule {rng.integers(0, 4)}" for _ in range(n)]
    none = Column(np.zeros(n, np.int64), np.ones(n, np.bool_))
    table = Table(
        {
            "severity": Column(severity, labels=Labels(SEVERITIES, is_ordered=True)),
            "kind": Column(kind, labels=Labels(KINDS)),
            "layer": Column(layer, missing),
            "statistic": Column(statistic),
            "rule": texts(rules),
            **dict.fromkeys(("expert", "since_step", "occurrences", "first_seen", "last_seen"), none),
            **dict.fromkeys(("summary", "code"), texts([""] * n)),
        },
        n,
    )
    rows = [
        {
            "severity": SEVERITIES[severity[i]],
            "kind": KINDS[kind[i]],
            "layer": None if missing[i] else int(layer[i]),
            "statistic": None if math.isnan(statistic[i]) else float(statistic[i]),
            "rule": rules[i],
        }
        for i in range(n)
    ]
    severities = st.sampled_from(["info", "warning", "critical"])
    tests = st.one_of(
        st.tuples(st.sampled_from(_ORDERED), severities).map(lambda t: f"severity {t[0]} {t[1]}"),
        st.tuples(severities, severities).map(lambda t: f"severity between {t[0]} and {t[1]}"),
        st.tuples(st.sampled_from(_ORDERED), st.integers(-1, 3)).map(lambda t: f"layer {t[0]} {t[1]}"),
        st.just("layer is missing"),
        st.integers(0, 5).map(lambda t: f"statistic >= {t / 2}"),
        st.just('rule in ("rule 1", "rule 2")'),
    )
    where = " and ".join(data.draw(st.lists(tests, min_size=1, max_size=3)))
    keys = data.draw(st.lists(st.sampled_from(["severity", "layer", "statistic", "rule"]), max_size=3, unique=True))
    ways = [data.draw(st.sampled_from(["", " desc"])) for _ in keys]
    order = " order by " + ", ".join(k + w for k, w in zip(keys, ways, strict=True)) if keys else ""
    text = f"findings where {where} show severity, kind, layer, statistic, rule{order}"
    result = run_query(text, TableSource(table))
    names, expected = evaluate(parse(text), rows)
    assert list(result.names) == names
    assert result.rows == expected, text
    grouped = run_query("findings by severity show count, max(layer)", TableSource(table))
    assert grouped.rows == evaluate(parse("findings by severity show count, max(layer)"), rows)[1]


def test_a_worked_example() -> None:
    # Two tokens at layer 0 with E = 4: token 7 to experts 1 and 3, token 9 to expert 3 alone.
    source = RowsSource(
        {
            "layer_index": np.zeros(3, np.uint32),
            "is_padding": np.array([False, False, True]),
            "request_index": np.zeros(3, np.uint32),
            "position": np.arange(3, dtype=np.uint32),
            "phase": np.full(3, 2, np.uint8),
            "step": np.arange(3, dtype=np.uint64),
            "token_id": np.array([7, 9, 7], np.int32),
            "expert_ids": np.array([[1, 3], [3, -1], [0, 2]], np.int32),
            "slot_status": np.array([[1, 1], [1, 2], [1, 1]], np.uint8),
            "gate_weights": np.array([[0.75, 0.25], [0.5, np.nan], [1, 1]], np.float32),
            "margin": np.array([0.5, np.nan, 1.0], np.float32),
        },
        ("r",),
        random_source(0, 0).layers[1:2],
    )
    source.layers = [type(source.layers[0])(0, 4, 2, module="m")]
    experts = run_query("experts show expert, assignments, share, load, mean_gate_weight", source)
    assert experts.rows == [
        (0, 0, 0.0, 0.0, None),
        (1, 1, pytest.approx(1 / 3), pytest.approx(4 / 3), 0.75),
        (2, 0, 0.0, 0.0, None),
        (3, 2, pytest.approx(2 / 3), pytest.approx(8 / 3), 0.375),
    ]
    assert run_query("tokens where expert = 3 show token_id, experts, weights, margin", source).rows == [
        (7, [1, 3], [0.75, 0.25], 0.5),
        (9, [3], [0.5], None),
    ]
    # Missing is neither equal nor unequal.
    assert run_query("tokens where margin != 0.5 show token_id", source).rows == []
    assert run_query("tokens where not margin = 0.5 show token_id", source).rows == [(9,)]
    assert run_query("tokens where expert != 3 show token_id", source).rows == [(7,)]
    assert run_query("tokens where not expert = 3 show token_id", source).rows == []
    assert run_query("tokens by expert", source).rows == [(1, 1), (3, 2)]
    assert run_query("tokens where dropped_slots > 0 show count, mean(margin)", source).rows == [(1, None)]
    # The most loaded first, where tokens were chosen.
    assert run_query("experts where token_id = 9 show expert, load", source).rows[0] == (3, 4.0)
    assert run_query("experts where token_id = 9 and load >= 4x show expert", source).rows == [(3,)]
    partly = run_query("experts where layer in (0, 23)", source)
    assert partly.notes == ("there is no layer 23: the layers are 0 to 0",)


def _names(condition: str) -> list[Any]:
    where = parse(f"tokens where {condition}").where
    assert where is not None
    return list(names_of(where))


def _holds(condition: str, row: Any) -> bool:
    where = parse(f"tokens where {condition}").where
    assert where is not None
    return holds(where, row, "tokens")
