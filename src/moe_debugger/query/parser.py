"""Text to parsed form. The grammar has no way to change anything, to call anything or to name what is not a column.

The parser is LALR(1): its time is linear in the text, which is bounded before it is looked at.
"""

import re
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from typing import Any

from lark import Lark, Token, Transformer, v_args
from lark.exceptions import LarkError, UnexpectedCharacters, UnexpectedInput, UnexpectedToken

from moe_debugger.errors import QueryError
from moe_debugger.query import form
from moe_debugger.query.form import Span

__all__ = ["AGGREGATES", "GRAMMAR", "KEYWORDS", "MAX_CONDITIONS", "MAX_DEPTH", "MAX_TEXT", "parse"]

MAX_TEXT = 4000
"""Most characters of a query."""
MAX_DEPTH = 16
"""Most parentheses and `not` within each other."""
MAX_CONDITIONS = 64
"""Most comparisons of a query."""
_MAX_DIGITS = 18

AGGREGATES = ("count", "sum", "mean", "min", "max")

GRAMMAR = r"""
query: NAME clause*
?clause: where | by | show | order | limit

where: WHERE _condition
by: BY NAME ("," NAME)*
show: SHOW item ("," item)*
order: ORDER BY key ("," key)*
limit: LIMIT NUMBER

?item: NAME -> column
     | NAME "(" [NAME] ")" -> call
key: item [ASC | DESC]

_condition: or_
?or_: and_ (OR and_)*
?and_: not_ (AND not_)*
?not_: NOT not_ -> negation
     | "(" or_ ")" -> group
     | test
?test: NAME OPERATOR value -> comparison
     | NAME [NOT] IN "(" value ("," value)* ")" -> membership
     | NAME [NOT] BETWEEN value AND value -> between
     | NAME [NOT] CONTAINS STRING -> contains
     | NAME IS [NOT] MISSING -> missing
value: NUMBER | STRING | TRUE | FALSE | NAME

WHERE.2: /where\b/i
BY.2: /by\b/i
SHOW.2: /(show|select)\b/i
ORDER.2: /order\b/i
LIMIT.2: /limit\b/i
ASC.2: /asc\b/i
DESC.2: /desc\b/i
OR.2: /or\b/i
AND.2: /and\b/i
NOT.2: /not\b/i
IN.2: /in\b/i
BETWEEN.2: /between\b/i
CONTAINS.2: /contains\b/i
IS.2: /is\b/i
MISSING.2: /missing\b/i
TRUE.2: /true\b/i
FALSE.2: /false\b/i
OPERATOR: "==" | "=" | "!=" | "<>" | "<=" | "<" | ">=" | ">"
NUMBER: /-?[0-9]+(\.[0-9]+)?([eE][+-]?[0-9]{1,3})?[xX%]?(?![A-Za-z0-9_.%])/
STRING: /"([^"\\\n]|\\.)*"|'([^'\\\n]|\\.)*'/
NAME: /[A-Za-z_][A-Za-z0-9_]*/

%ignore /[ \t\r\n]+/
"""

KEYWORDS = (
    "where", "by", "show", "select", "order", "limit", "asc", "desc", "or", "and", "not", "in", "between", "contains",
    "is", "missing", "true", "false",
)  # fmt: skip

_EXPECTED = {
    "WHERE": "`where`", "BY": "`by`", "SHOW": "`show`", "ORDER": "`order by`", "LIMIT": "`limit`", "ASC": "`asc`",
    "DESC": "`desc`", "OR": "`or`", "AND": "`and`", "NOT": "`not`", "IN": "`in`", "BETWEEN": "`between`",
    "CONTAINS": "`contains`", "IS": "`is missing`", "MISSING": "`missing`", "OPERATOR": "`=` or the like",
    "NUMBER": "a number", "STRING": "a text in quotes", "NAME": "a name", "LPAR": "`(`", "RPAR": "`)`", "COMMA": "`,`",
    "$END": "the end",
}  # fmt: skip
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\", '"': '"', "'": "'"}
_NUMBER = re.compile(r"(-?)(\d+)(\.\d+)?([eE][+-]?\d+)?([xX%]?)")


@dataclass(frozen=True, slots=True)
class _Part:
    """A condition while it is built, with how deep and how large it is."""

    condition: form.Condition
    depth: int
    size: int


class _Fault(Exception):
    """What is wrong at a place; the text is known outside."""

    def __init__(self, reason: str, span: Span) -> None:
        self.reason, self.span = reason, span
        super().__init__(reason)


@v_args(inline=True)
class _Builder(Transformer[Token, Any]):
    """Called while the text is parsed, bottom up, so that no depth of the text becomes depth of the stack."""

    def query(self, subject: Token, *clauses: tuple[Token, dict[str, Any]]) -> form.Query:
        values: dict[str, Any] = {}
        for token, given in clauses:
            if given.keys() & values.keys():
                raise _Fault(f"a second `{token.lower()}`; each part is given once", _span(token))
            values |= given
        return form.Query(_name(subject), **values)

    def where(self, token: Token, part: _Part) -> tuple[Token, dict[str, Any]]:
        return token, {"where": part.condition}

    def by(self, token: Token, *names: Token) -> tuple[Token, dict[str, Any]]:
        return token, {"by": tuple(_name(name) for name in names)}

    def show(self, token: Token, *items: form.Item) -> tuple[Token, dict[str, Any]]:
        return token, {"show": items}

    def order(self, token: Token, _by: Token, *keys: form.OrderKey) -> tuple[Token, dict[str, Any]]:
        return token, {"order": keys}

    def limit(self, token: Token, number: Token) -> tuple[Token, dict[str, Any]]:
        value = _number(number)
        if value.unit or not isinstance(value.value, int) or value.value < 1:
            raise _Fault(f"`limit {number}`: expected a whole number from 1 on", _span(number))
        return token, {"limit": value.value, "limit_span": _span(number)}

    def column(self, name: Token) -> form.Item:
        return form.Aggregate(_name(name)) if name.lower() == "count" else _name(name)

    def call(self, function: Token, column: Token | None) -> form.Item:
        name = _name(function)
        if name.text not in AGGREGATES:
            raise _Fault(
                f"there is no function `{name.text}`; there are {', '.join(AGGREGATES)}{_near(name.text, AGGREGATES)}",
                name.span,
            )
        if (column is None) != (name.text == "count"):
            needs = "takes no column" if name.text == "count" else "needs a column, as in `mean(margin)`"
            raise _Fault(f"`{name.text}` {needs}", name.span)
        return form.Aggregate(name, None if column is None else _name(column))

    def key(self, item: form.Item, direction: Token | None) -> form.OrderKey:
        return form.OrderKey(item, direction is not None and direction.type == "DESC")

    def or_(self, *parts: "_Part | Token") -> _Part:
        return _joined(form.Or, parts)

    def and_(self, *parts: "_Part | Token") -> _Part:
        return _joined(form.And, parts)

    def negation(self, token: Token, part: _Part) -> _Part:
        return _deeper(form.Not(part.condition), part, token)

    def group(self, part: _Part) -> _Part:
        return _deeper(part.condition, part, None)

    def comparison(self, column: Token, operator: Token, value: form.Literal) -> _Part:
        op = {"==": "=", "<>": "!="}.get(str(operator), str(operator))
        return _Part(form.Comparison(_name(column), op, value), 0, 1)

    def membership(self, column: Token, negated: Token | None, _in: Token, *values: form.Literal) -> _Part:
        return _negated(form.Membership(_name(column), values), negated)

    def between(
        self, column: Token, negated: Token | None, _word: Token, low: form.Literal, _and: Token, high: form.Literal
    ) -> _Part:
        return _negated(form.Between(_name(column), low, high), negated)

    def contains(self, column: Token, negated: Token | None, _word: Token, text: Token) -> _Part:
        return _negated(form.Contains(_name(column), _value(text)), negated)

    def missing(self, column: Token, _is: Token, negated: Token | None, _word: Token) -> _Part:
        return _negated(form.Missing(_name(column)), negated)

    def value(self, token: Token) -> form.Literal:
        return _value(token)


def parse(text: str | bytes) -> form.Query:
    """Return the parsed form of a query.

    Args:
        text: at most `MAX_TEXT` characters; bytes are taken as UTF-8.

    Raises:
        QueryError: it is no query; the error has the place. Nothing else is raised, whatever the text.
    """
    if isinstance(text, bytes):
        if len(text) > 4 * MAX_TEXT:
            raise QueryError(f"the query has {len(text):,} bytes; at most {MAX_TEXT:,} characters are read")
        try:
            text = text.decode("utf-8")
        except UnicodeDecodeError as error:
            raise QueryError(f"the query is not UTF-8 at byte {error.start}") from None
    if len(text) > MAX_TEXT:
        raise QueryError(f"the query has {len(text):,} characters; at most {MAX_TEXT:,} are read")
    if not text.strip():
        raise QueryError("the query is empty; try `experts order by load desc limit 10`")
    try:
        query: form.Query = _parser().parse(text)  # type: ignore[assignment]  # what the builder returns
    except _Fault as fault:
        raise QueryError(fault.reason, text, fault.span.start, fault.span.end) from None
    except UnexpectedInput as error:
        raise _explained(error, text) from None
    except LarkError as error:  # pragma: no cover - no other kind is known
        raise QueryError(f"the query cannot be read: {error}", text) from None
    return query


@cache
def _parser() -> Lark:
    return Lark(
        GRAMMAR, start="query", parser="lalr", lexer="contextual", transformer=_Builder(), maybe_placeholders=True
    )


def _span(token: Token) -> Span:
    return Span(token.start_pos or 0, token.end_pos or 0)


def _name(token: Token) -> form.Name:
    return form.Name(str(token).lower(), _span(token))


def _near(word: str, known: "tuple[str, ...] | list[str]") -> str:
    close = get_close_matches(word.lower(), known, n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(f'`{each}`' for each in close)}?" if close else ""


def _joined(kind: type[form.And] | type[form.Or], parts: tuple["_Part | Token", ...]) -> _Part:
    kept = [part for part in parts if isinstance(part, _Part)]
    if len(kept) == 1:
        return kept[0]
    size = sum(part.size for part in kept)
    if size > MAX_CONDITIONS:
        token = next(part for part in parts if isinstance(part, Token))
        raise _Fault(f"the query has more than {MAX_CONDITIONS} comparisons; use `in (...)` or `between`", _span(token))
    return _Part(kind(tuple(part.condition for part in kept)), max(part.depth for part in kept), size)


def _deeper(condition: form.Condition, part: _Part, token: Token | None) -> _Part:
    if part.depth + 1 > MAX_DEPTH:
        span = next(iter(form.names_of(condition))).span if token is None else _span(token)
        raise _Fault(f"more than {MAX_DEPTH} parentheses or `not` within each other", span)
    return _Part(condition, part.depth + 1, part.size)


def _negated(test: form.Condition, negated: Token | None) -> _Part:
    return _Part(test, 0, 1) if negated is None else _Part(form.Not(test), 1, 1)


def _value(token: Token) -> form.Literal:
    if token.type == "NUMBER":
        return _number(token)
    if token.type in ("TRUE", "FALSE"):
        return form.Literal(token.type == "TRUE", span=_span(token))
    if token.type == "NAME":
        return form.Literal(str(token), is_word=True, span=_span(token))
    start = token.start_pos or 0
    pieces: list[str] = []
    at = 1
    while at < len(token) - 1:
        char = token[at]
        if char == "\\":
            at += 1
            if token[at] not in _ESCAPES:
                raise _Fault(
                    rf"`\{token[at]}` is no escape; there are \n \t \r \\ \" and \'",
                    Span(start + at - 1, start + at + 1),
                )
            char = _ESCAPES[token[at]]
        pieces.append(char)
        at += 1
    return form.Literal("".join(pieces), span=_span(token))


def _number(token: Token) -> form.Literal:
    found = _NUMBER.fullmatch(token)
    assert found is not None, token
    sign, whole, fraction, exponent, unit = found.groups()
    if len(whole) + len(fraction or "") > _MAX_DIGITS + 1:
        raise _Fault(f"a number of more than {_MAX_DIGITS} digits", _span(token))
    is_whole = fraction is None and exponent is None
    text = f"{sign}{whole}{fraction or ''}{exponent or ''}"
    value: int | float = int(text) if is_whole else float(text)
    if value in (float("inf"), float("-inf")):
        raise _Fault("the number is larger than any that can be compared", _span(token))
    return form.Literal(value, unit.lower(), span=_span(token))


def _explained(error: UnexpectedInput, text: str) -> QueryError:
    expected: set[str] = set()
    found = ""
    start = end = len(text.rstrip())
    if isinstance(error, UnexpectedToken):
        expected = set(error.accepts or error.expected)
        if error.token.type != "$END":
            span = _span(error.token)
            found, start, end = str(error.token), span.start, span.end
    elif isinstance(error, UnexpectedCharacters):
        expected, start = set(error.allowed), error.pos_in_stream or 0
        # The whole word, so that `8foo` is shown as one.
        found = "".join(re.findall(r"^(?:[\w.%]+|.)", text[start:], re.DOTALL))
        end = start + len(found)
        if found in "\"'":
            return QueryError(f"the text that begins with {found} has no end on its line", text, start, end)
    words = [_EXPECTED[name] for name in _EXPECTED if name in expected]
    what = f"`{found[:40]}` is not expected here" if found else "the query ends too early"
    wanted = f"; expected {', '.join(words[:-1])}{' or ' if len(words) > 1 else ''}{words[-1]}" if words else ""
    keywords = [word.strip("`").split()[0] for word in words if word.startswith("`") and word[1].isalpha()]
    return QueryError(f"{what}{wanted}{_near(found, keywords) if found else ''}", text, start, end)
