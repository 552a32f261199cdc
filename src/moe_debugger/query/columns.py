"""The allow list: every subject of the language and every column of it, with unit and meaning.

What is not in this table cannot be named in a query. docs/query.md holds the same table; a test compares them.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from moe_debugger.v1 import routing_pb2, session_pb2

__all__ = [
    "KINDS",
    "PHASES",
    "SEVERITIES",
    "STATES",
    "SUBJECTS",
    "ColumnSpec",
    "Kind",
    "Place",
    "Subject",
    "markdown_tables",
]


class Kind(StrEnum):
    """What the values of a column are."""

    INTEGER = "integer"
    NUMBER = "number"
    TEXT = "text"
    CHOICE = "choice"
    BOOLEAN = "boolean"
    INTEGERS = "integers"
    NUMBERS = "numbers"


class Place(StrEnum):
    """Where a column can be used.

    ROWS: in `where` alone; it chooses the token rows that are counted. RESULT: everywhere; it is a value of a row of
    the result. BOTH: a row of the result has it, and token rows can be chosen by it before they are counted.
    """

    ROWS = "rows"
    RESULT = "result"
    BOTH = "both"


@dataclass(frozen=True, slots=True)
class ColumnSpec:
    """One column of the allow list.

    Attributes:
        unit: "x" = multiples of the fair share 1/E, "1" = a part of a whole (takes %), "s" = Unix seconds.
        choices: of a CHOICE, from the least to the greatest where `is_ordered`.
        is_shown: a part of the result where the query has no `show`.
        is_multiple: several values a row: a comparison holds where it holds for one of them.
    """

    name: str
    kind: Kind
    doc: str
    unit: str = ""
    place: Place = Place.RESULT
    choices: tuple[str, ...] = ()
    is_ordered: bool = False
    is_shown: bool = True
    is_multiple: bool = False


@dataclass(frozen=True, slots=True)
class Subject:
    """What a query asks for: rows of one kind.

    Attributes:
        row: what a row of the result is.
        order: how rows are sorted where the query does not say.
    """

    name: str
    row: str
    columns: tuple[ColumnSpec, ...]
    order: str = ""

    def column(self, name: str) -> ColumnSpec | None:
        """Return a column by its name or by the name that `Decisions` gives it."""
        wanted = _ALIASES.get(name, name)
        return next((column for column in self.columns if column.name == wanted), None)

    @property
    def names(self) -> list[str]:
        """The columns' names."""
        return [column.name for column in self.columns]


# As the columns of `Decisions` are called.
_ALIASES = {
    "layer_index": "layer",
    "expert_id": "expert",
    "expert_ids": "experts",
    "gate_weights": "weights",
    "request_id": "request",
    "module_name": "module",
    "rule_id": "rule",
    "effective": "effective_experts",
}


def _choices(names: Iterable[str], prefix: str) -> tuple[str, ...]:
    return tuple(name.removeprefix(prefix).lower() for name in names)


# At the places of their numbers on the wire.
PHASES = _choices(routing_pb2.Phase.keys(), "PHASE_")
SEVERITIES = _choices(session_pb2.Severity.keys(), "SEVERITY_")
KINDS = _choices(session_pb2.FindingKind.keys(), "FINDING_KIND_")
STATES = _choices(session_pb2.FindingState.keys(), "FINDING_STATE_")

_I, _N, _T, _C, _B = Kind.INTEGER, Kind.NUMBER, Kind.TEXT, Kind.CHOICE, Kind.BOOLEAN


def _column(name: str, kind: Kind, doc: str, unit: str = "", **options: object) -> ColumnSpec:
    return ColumnSpec(name, kind, doc, unit, **options)  # type: ignore[arg-type]


def _token_columns(place: Place, *, without: Iterable[str] = ()) -> tuple[ColumnSpec, ...]:
    """Columns by which token rows are chosen."""
    columns = (
        _column("token_id", _I, "id of the token in the model's vocabulary", place=place),
        _column("token", _T, "text of the token, where a tokenizer is at hand; one whole token", place=place),
        _column("position", _I, "position of the token in its request, from 0", place=place),
        _column("request", _T, "id of the request", place=place),
        _column("phase", _C, "pass of the model", place=place, choices=PHASES),
        _column("step", _I, "forward or training step", place=place),
    )
    return tuple(column for column in columns if column.name not in without)


_LAYER = _column("layer", _I, "index among the MoE layers, from 0", place=Place.BOTH)
_MODULE = _column("module", _T, "name of the layer's module", is_shown=False)
_ROW_LAYER = _column("layer", _I, "index among the MoE layers, from 0", place=Place.ROWS)
_ROW_EXPERT = _column("expert", _I, "one of the experts that a token reached", place=Place.ROWS, is_multiple=True)

_TOKENS = Subject(
    "tokens",
    "one token at one MoE layer; padding is left out",
    (
        _column("request", _T, "id of the request"),
        _column("position", _I, "position of the token in its request, from 0"),
        _column("phase", _C, "pass of the model", choices=PHASES),
        _column("step", _I, "forward or training step"),
        _column("token_id", _I, "id of the token in the model's vocabulary"),
        _column("token", _T, "text of the token, where a tokenizer is at hand"),
        _column("layer", _I, "index among the MoE layers, from 0"),
        _column("experts", Kind.INTEGERS, "experts that the token reached, in the router's order"),
        _column("weights", Kind.NUMBERS, "gate weights of these, as applied"),
        _column("margin", _N, "K-th minus (K+1)-th selection score; missing where it was not captured"),
        _column(
            "expert", _I, "one of `experts`: `expert = 5` are the tokens that reached expert 5; `by expert` counts a "
            "token once for each of its experts", is_shown=False, is_multiple=True,
        ),
        _column("module", _T, "name of the layer's module", is_shown=False),
        _column("num_experts_reached", _I, "entries of `experts`", is_shown=False),
        _column("dropped_slots", _I, "choices that a full expert turned away", is_shown=False),
        _column("router_entropy", _N, "entropy of the router's probabilities", "nats", is_shown=False),
        _column("router_logsumexp", _N, "log-sum-exp of the router's logits", is_shown=False),
        _column("top1_probability", _N, "probability of the first choice", "1", is_shown=False),
    ),
)  # fmt: skip

_EXPERTS = Subject(
    "experts",
    "one routed expert of one layer; with a column of tokens in `where`, over the matching tokens alone",
    (
        _LAYER,
        _column("expert", _I, "id of the expert, from 0"),
        _column("assignments", _I, "tokens routed to it"),
        _column("share", _N, "of the layer's assignments; missing before the first", "1"),
        _column("load", _N, "share over the fair share 1/E: 1 is even load", "x"),
        _column("mean_gate_weight", _N, "mean of its gate weights as applied; missing where it was not used"),
        _column("mean_probability", _N, "mean router probability over all tokens; missing of chosen tokens", "1"),
        _column("rank", _I, "expert-parallel rank that computes it; missing where every rank does", is_shown=False),
        _MODULE,
        *_token_columns(Place.ROWS),
    ),
    "layer, expert",
)

_LAYERS = Subject(
    "layers",
    "one MoE layer; with a column of tokens in `where`, over the matching tokens alone (metrics.md defines each)",
    (
        _LAYER,
        _column("module", _T, "name of the layer's module"),
        _column("stack", _T, "encoder, decoder or the like", is_shown=False),
        _column("num_experts", _I, "routed experts, E"),
        _column("top_k", _I, "experts for each token, k"),
        _column("tokens", _I, "valid tokens routed"),
        _column("assignments", _I, "tokens routed to experts, all experts together", is_shown=False),
        _column("effective_experts", _N, "exp of the load entropy, 1 to E"),
        _column("load_entropy", _N, "entropy of the load over experts", "nats", is_shown=False),
        _column("normalised_load_entropy", _N, "load entropy over ln E; 1 is even", "1", is_shown=False),
        _column("max_load", _N, "load of the hottest expert over the fair share (max/mean)", "x"),
        _column("hottest_expert", _I, "its id"),
        _column("unused_experts", _I, "experts without an assignment"),
        _column("cv", _N, "coefficient of variation of the load", is_shown=False),
        _column("gini", _N, "Gini coefficient of the load", is_shown=False),
        _column("jain", _N, "Jain's index of the load; 1 is even", is_shown=False),
        _column("confidence", _N, "mean probability of the first choice", "1"),
        _column("token_entropy", _N, "mean entropy of the router's probabilities for a token", "nats", is_shown=False),
        _column("margin", _N, "mean of K-th minus (K+1)-th selection score", is_shown=False),
        _column("z_loss", _N, "router z-loss", is_shown=False),
        _column("balancing_loss", _N, "Switch balancing loss; 1 at balance; missing of chosen tokens", is_shown=False),
        _column("dropped_share", _N, "choices that full experts turned away", "1", is_shown=False),
        *_token_columns(Place.ROWS),
    ),
    "layer",
)

_STEPS = Subject(
    "steps",
    "one MoE layer at one step",
    (
        _column("step", _I, "forward or training step", place=Place.BOTH),
        _LAYER,
        _column("tokens", _I, "valid tokens routed at the step"),
        _column("assignments", _I, "of them to experts", is_shown=False),
        _column("effective_experts", _N, "exp of the step's load entropy, 1 to E"),
        _column("max_load", _N, "load of the step's hottest expert over the fair share", "x"),
        _column("hottest_expert", _I, "its id"),
        _column("used_experts", _I, "distinct experts with an assignment"),
        *_token_columns(Place.ROWS, without=("step",)),
    ),
    "step, layer",
)

_REQUESTS = Subject(
    "requests",
    "one request; with a column of tokens in `where`, those that have such tokens, which alone are counted",
    (
        _column("request", _T, "id of the request", place=Place.BOTH),
        _column("tokens", _I, "valid tokens of the layer that saw most"),
        _column("prefill_tokens", _I, "of them in prefill"),
        _column("decode_tokens", _I, "of them in decode"),
        _column("first_step", _I, "first step with a token of it"),
        _column("last_step", _I, "last one"),
        _column("first_seen", _N, "when it was first seen", "s", is_shown=False),
        _column("last_seen", _N, "when it was last seen", "s", is_shown=False),
        _column("has_routes", _B, "whether its rows are kept", is_shown=False),
        _ROW_LAYER,
        _ROW_EXPERT,
        *_token_columns(Place.ROWS, without=("request",)),
    ),
)

_FINDINGS = Subject(
    "findings",
    "one finding",
    (
        _column("severity", _C, "how much it asks for attention", choices=SEVERITIES, is_ordered=True),
        _column("kind", _C, "which diagnosis", choices=KINDS),
        _column("layer", _I, "layer that it is about; missing where it is about none"),
        _column("expert", _I, "expert likewise"),
        _column("since_step", _I, "first step of the rows that show it"),
        _column("statistic", _N, "number that the rule judged"),
        _column("summary", _T, "one sentence"),
        _column(
            "state",
            _C,
            "whether it is open; what people said is in `is_acknowledged` and `is_silenced`",
            choices=STATES,
            is_shown=False,
        ),
        _column("is_acknowledged", _B, "whether somebody has seen this episode", is_shown=False),
        _column("is_silenced", _B, "whether it is silenced now", is_shown=False),
        _column("rule", _T, "identity: code and place", is_shown=False),
        _column("code", _T, "key of its words", is_shown=False),
        _column("occurrences", _I, "seconds in which it held", is_shown=False),
        _column("first_seen", _N, "when it was first seen", "s", is_shown=False),
        _column("last_seen", _N, "when it was last seen", "s", is_shown=False),
    ),
)

_SERIES = Subject(
    "series",
    "one value of a training series",
    (
        _column("step", _I, "training step"),
        _column("name", _T, "such as loss, lr, router_gradient_norm"),
        _column("layer", _I, "missing for a series of the whole model"),
        _column("expert", _I, "missing where it is not of one expert"),
        _column("value", _N, "missing where there was nothing to read"),
        _column("rank", _I, "global rank of the source", is_shown=False),
        _column("source", _T, "id of the source", is_shown=False),
    ),
)

SUBJECTS: dict[str, Subject] = {
    subject.name: subject for subject in (_EXPERTS, _LAYERS, _TOKENS, _REQUESTS, _STEPS, _FINDINGS, _SERIES)
}
"""The allow list, by subject."""


def markdown_tables() -> str:
    """Return the allow list as the tables of docs/query.md."""
    parts = []
    for subject in SUBJECTS.values():
        lines = [
            f"### `{subject.name}`",
            "",
            f"A row is {subject.row}.",
            "",
            "| column | type | unit | what |",
            "|---|---|---|---|",
        ]
        for column in subject.columns:
            kind = "text" if column.kind is Kind.CHOICE else str(column.kind)
            notes = [column.doc]
            if column.choices:
                order = ", from least to most" if column.is_ordered else ""
                notes.append(f"one of {', '.join(f'`{each}`' for each in column.choices[1:])}{order}")
            if column.place is Place.ROWS:
                notes.append("*in `where` only*")
            elif not column.is_shown:
                notes.append("*shown on request*")
            lines.append(f"| `{column.name}` | {kind} | {column.unit} | {'; '.join(notes)} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)
