"""Text to form and back; errors with their place; bounds; and no text that does anything else than fail as a query."""

import time
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moe_debugger.errors import InvalidInputError, QueryError
from moe_debugger.query import form, parse, unparse
from moe_debugger.query.parser import AGGREGATES, KEYWORDS, MAX_CONDITIONS, MAX_DEPTH, MAX_TEXT

_words = st.from_regex(r"[a-z_][a-z0-9_]{0,8}", fullmatch=True).filter(lambda word: word not in (*KEYWORDS, "count"))
_names = _words.map(form.Name)
_floats = st.floats(allow_nan=False, allow_infinity=False, width=32).filter(lambda x: x == 0 or 1e-9 < abs(x) < 1e12)
_numbers = st.builds(
    form.Literal, st.integers(-(10**17), 10**17) | _floats.map(lambda x: round(x, 6)), st.sampled_from(["", "x", "%"])
)
_texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).map(form.Literal)
_literals = st.one_of(
    _numbers, _texts, st.booleans().map(form.Literal), _words.map(lambda word: form.Literal(word, is_word=True))
)
_tests = st.one_of(
    st.builds(form.Comparison, _names, st.sampled_from(["=", "!=", "<", "<=", ">", ">="]), _literals),
    st.builds(form.Membership, _names, st.lists(_literals, min_size=1, max_size=3).map(tuple)),
    st.builds(form.Between, _names, _literals, _literals),
    st.builds(form.Contains, _names, _texts),
    st.builds(form.Missing, _names),
)


def _joined(inner: Any) -> Any:
    parts = st.lists(inner, min_size=2, max_size=3).map(tuple)
    return st.one_of(st.builds(form.Not, inner), st.builds(form.And, parts), st.builds(form.Or, parts))


_conditions = st.recursive(_tests, _joined, max_leaves=8)
_items = st.one_of(
    _names,
    st.just(form.Aggregate(form.Name("count"))),
    st.builds(form.Aggregate, st.sampled_from(AGGREGATES[1:]).map(form.Name), _names),
)
_queries = st.builds(
    form.Query,
    subject=_names,
    where=st.none() | _conditions,
    by=st.lists(_names, max_size=2).map(tuple),
    show=st.lists(_items, max_size=3).map(tuple),
    order=st.lists(st.builds(form.OrderKey, _items, st.booleans()), max_size=2).map(tuple),
    limit=st.none() | st.integers(1, 10**9),
)


@settings(max_examples=300, deadline=None)
@given(_queries)
def test_the_canonical_text_parses_to_the_same_form(query: form.Query) -> None:
    text = unparse(query)
    assert parse(text) == query
    assert unparse(parse(text)) == text
    assert parse(text.encode()) == query


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        (
            "experts where layer = 23 and load > 8x order by load desc",
            "experts where layer = 23 and load > 8x order by load desc",
        ),
        ("EXPERTS  WHERE layer==23", "experts where layer = 23"),
        ("tokens limit 3 order by step asc where a<>1", "tokens where a != 1 order by step limit 3"),
        ("tokens select count, mean(margin) by layer", "tokens by layer show count, mean(margin)"),
        ("a where b not in ('x') or c is not missing", 'a where not b in ("x") or not c is missing'),
        ("a where x = 1 or y = 2 and not z = 3", "a where x = 1 or (y = 2 and not z = 3)"),
        ("a where t = 'it\\'s \"so\"'", 'a where t = "it\'s \\"so\\""'),
        ("a where inn = 1 and byte = 2 and order_x = 3", "a where inn = 1 and byte = 2 and order_x = 3"),
    ],
)
def test_spellings(text: str, canonical: str) -> None:
    assert unparse(parse(text)) == canonical


@pytest.mark.parametrize(
    ("text", "reason", "at"),
    [
        ("experts wehre layer = 2", "did you mean `where`?", "wehre"),
        ("experts where layer = ", "ends too early", ""),
        ("experts where layer = 8foo", "`8foo` is not expected", "8foo"),
        ("experts where (layer = 8", "expected `)`", ""),
        ('a where x = "abc', "has no end on its line", '"'),
        ('a where x = "\\q"', "is no escape", "\\q"),
        ("tokens limit 0", "a whole number from 1 on", "0"),
        ("tokens limit 5%", "a whole number from 1 on", "5%"),
        ("tokens limit 5 limit 6", "a second `limit`", "limit"),
        ("a show foo(b)", "there is no function `foo`", "foo"),
        ("a show mean()", "needs a column", "mean"),
        ("a show count(b)", "takes no column", "count"),
        ("a where x = 1234567890123456789012", "more than 18 digits", "1234567890123456789012"),
        ("a where x = 1e999", "larger than any", "1e999"),
        ("a where ; drop table", "is not expected", ";"),
        ("a where __import__('os')", "is not expected", "("),
        ("", "the query is empty", ""),
    ],
)
def test_an_error_has_its_place(text: str, reason: str, at: str) -> None:
    with pytest.raises(QueryError) as caught:
        parse(text)
    error = caught.value
    assert reason in error.reason
    assert text[error.start : error.end] == at
    if text:
        line, carets = str(error).splitlines()[-2:]
        assert line == f"  {text}"
        assert carets == "  " + " " * error.start + "^" * max(1, len(at))
    assert isinstance(error, InvalidInputError)


def test_bounds_are_kept_before_and_while_the_text_is_read() -> None:
    for text in ("x" * (MAX_TEXT + 1), b"x" * (4 * MAX_TEXT + 1)):
        with pytest.raises(QueryError, match=f"at most {MAX_TEXT:,}"):
            parse(text)
    deep = "(" * MAX_DEPTH + "a = 1" + ")" * MAX_DEPTH
    assert parse(f"t where {deep}").where == form.Comparison(form.Name("a"), "=", form.Literal(1))
    for too_deep in (f"({deep})", "not " * (MAX_DEPTH + 1) + "a = 1", "not (" * 400 + "a=1" + ")" * 400):
        with pytest.raises(QueryError, match="within each other"):
            parse(f"t where {too_deep}")
    many = " or ".join(["a = 1"] * MAX_CONDITIONS)
    assert parse(f"t where {many}")
    with pytest.raises(QueryError, match=f"more than {MAX_CONDITIONS} comparisons"):
        parse(f"t where {many} or a = 1")


_pieces = st.lists(
    st.sampled_from(
        [*KEYWORDS, *AGGREGATES, "layer", "(", ")", ",", "=", "<>", ">=", "8x", "5%", '"a"', "'", "\\", " "]
    ),
    max_size=60,
).map(" ".join)


@settings(max_examples=400, deadline=None)
@given(st.one_of(st.binary(max_size=300), st.text(max_size=300), _pieces, _pieces.map(lambda text: f"t where {text}")))
@example("t where " + "not " * 990)
@example("t where " + "(" * 3990)
@example('t where a = "' + "\\" * 3980)
@example("t show " + "a," * 1990)
@example("t where a in (" + "1," * 1990)
@example("\x00\x1b[2J\u202e")
@example(b"\xff\xfe")
def test_no_text_does_anything_but_fail_as_a_query_and_soon(text: str | bytes) -> None:
    parse("experts")  # the grammar is built once
    problem: QueryError | None = None
    started = time.process_time()
    try:
        parse(text)
    except QueryError as error:
        problem = error
    assert time.process_time() - started < 0.1
    if problem is not None:
        assert problem.reason
        assert not problem.query or all(line.isprintable() for line in str(problem).splitlines()[-2:])
