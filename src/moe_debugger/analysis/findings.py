"""What a diagnosis is: its kind, severity, place, evidence and words (code + args), and the thresholds of the rules."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from moe_debugger.errors import InvalidInputError
from moe_debugger.v1 import session_pb2 as pb

if TYPE_CHECKING:
    from moe_debugger.analysis.explanation.model import Explanation

__all__ = [
    "EvidenceRow",
    "Finding",
    "FindingKind",
    "Severity",
    "Thresholds",
    "finding_from_proto",
    "finding_to_proto",
    "findings_to_proto",
]


class FindingKind(StrEnum):
    """The closed set of diagnoses; values equal the proto's `FindingKind` names in lower case."""

    DEAD_EXPERT = "dead_expert"
    COLD_EXPERT = "cold_expert"
    HOT_EXPERT = "hot_expert"
    LOAD_IMBALANCE = "load_imbalance"
    ROUTER_COLLAPSE = "router_collapse"
    COLLAPSE_WARNING = "collapse_warning"
    LOW_CONFIDENCE = "low_confidence"
    CAPACITY_OVERFLOW = "capacity_overflow"
    RANK_STRAGGLER = "rank_straggler"
    DRIFT = "drift"
    DUPLICATE_EXPERTS = "duplicate_experts"
    CAPTURE_UNHEALTHY = "capture_unhealthy"


class Severity(StrEnum):
    """How much a finding asks for attention; ordered by `rank`, not by spelling."""

    INFO = "info"
    WARNING = "warning"
    CRITICAL = "critical"

    @property
    def rank(self) -> int:
        """1 info, 2 warning, 3 critical, as in the proto."""
        return pb.Severity.Value(f"SEVERITY_{self.name}")


# Codes that are rules of their own; others are words for one rule of the kind.
_OWN_RULES = ("insufficient_evidence", "load_imbalance_steps", "duplicate_weights")


@dataclass(frozen=True, slots=True)
class EvidenceRow:
    """One line of a finding's evidence.

    Attributes:
        metric: name of a metric in docs/metrics.md.
        rule: what `value` is compared with, as text, such as "< 3".
        sample_size: tokens, blocks or requests behind `value`; docs/metrics.md says which for each metric. 0 = none.
        unit: of `value`.
    """

    metric: str
    value: float
    rule: str = ""
    baseline: float | None = None
    sample_size: int = 0
    unit: str = ""


@dataclass(frozen=True, slots=True)
class Finding:
    """A diagnosis at one place.

    Attributes:
        code: key of its words in the message catalogue; `args` fill the template.
        statistic: the number that the rule judged.
        since_step: first step of the rows that show it, where rows have steps. Over a window it is the window's first
            step; whoever looks at window after window keeps the earliest.
        explanation: why, and what to do; None where it was not looked for (`explain_analysis`).
    """

    kind: FindingKind
    severity: Severity
    code: str
    layer_index: int | None = None
    expert_id: int | None = None
    since_step: int | None = None
    args: dict[str, str] = field(default_factory=dict)
    evidence: tuple[EvidenceRow, ...] = ()
    statistic: float = float("nan")
    explanation: "Explanation | None" = None

    @property
    def rule_id(self) -> str:
        """Identity for merging repeated findings: rule and place, whatever the numbers and words."""
        place = [f"l{self.layer_index}"] if self.layer_index is not None else []
        place += [f"e{self.expert_id}"] if self.expert_id is not None else []
        # A rank, or the other expert of a pair, is part of the place, too.
        place += [f"{mark}{self.args[name]}" for name, mark in (("rank", "r"), ("other", "e")) if name in self.args]
        return ".".join([self.rule, *place])

    @property
    def rule(self) -> str:
        """The kind; the code where a kind has rules that may hold beside each other, and for those of plug-ins."""
        return self.code if self.code in _OWN_RULES or "." in self.code else self.kind.value

    def to_dict(self) -> dict[str, Any]:
        """Return the finding as plain values, `rule_id` included, and `explanation` where it has one."""
        values = {"rule_id": self.rule_id, **asdict(self)}
        if self.explanation is None:
            del values["explanation"]
        else:
            values["explanation"] = self.explanation.to_dict()
        return values


# Thresholds that are multiples, of 1 at least.
_MULTIPLES = ("hot_expert", "collapse_top_k_factor", "step_imbalance", "rank_straggler")


@dataclass(frozen=True, slots=True)
class Thresholds:
    """Where the rules draw their lines. docs/metrics.md gives the reasons.

    Attributes:
        dead_expert: an expert without a hit is dead only where its share is proved below this part of the fair share.
        cold_expert: floor of cold experts, as a multiple of the fair share.
        hot_expert: floor of hot experts, as a multiple of the fair share.
        load_balance: load is skewed below this many effective experts, as a part of all experts.
        routing_confidence: a router is undecided below this 1 - token entropy / ln E.
        collapse_top_k_factor: without a baseline, a router has collapsed below this multiple of k effective experts...
        collapse_share: ...or below this part of all experts, whichever is more.
        collapse_baseline_ratio: with a baseline, below this part of the baseline's effective experts.
        capacity_overflow: share of slots dropped for capacity that is too much.
        step_imbalance: single steps are uneven where their max/mean, less what chance adds, is above this on average.
        rank_straggler: a rank is one above this multiple of the ranks' mean load.
        drift_bits: loads have moved where their Jensen-Shannon divergence from the baseline's is above this, in bits.
        drift_overlap: routes have moved where the same tokens share less than this part of their experts with it.
        duplicate_experts: two experts act as one where this part of the tokens of either chooses both.
        false_discovery_rate: of hot and cold experts over all layers and experts together; of ranks likewise.
        min_requests: requests (sequences) below which variances come from stretches of positions instead, and load
            findings are `info`.
        min_tokens: valid tokens of a layer below which nothing is claimed about it.

    Raises:
        InvalidInputError: a value is out of its range; all of them are named.
    """

    dead_expert: float = 0.01
    cold_expert: float = 0.2
    hot_expert: float = 3.0
    load_balance: float = 0.7
    routing_confidence: float = 0.02
    collapse_top_k_factor: float = 1.5
    collapse_share: float = 0.25
    collapse_baseline_ratio: float = 0.5
    capacity_overflow: float = 0.01
    step_imbalance: float = 2.0
    rank_straggler: float = 1.25
    drift_bits: float = 0.02
    drift_overlap: float = 0.8
    duplicate_experts: float = 0.9
    false_discovery_rate: float = 0.02
    min_requests: int = 20
    min_tokens: int = 1000

    def __post_init__(self) -> None:
        problems = []
        for spec in fields(self):
            value = getattr(self, spec.name)
            if spec.name.startswith("min_") or spec.name in _MULTIPLES:
                is_fine, expected = value >= 1, "1 or more"
            else:
                is_fine, expected = 0 < value < 1, "between 0 and 1"
            if not is_fine:
                problems.append(f"{spec.name} is {value}, expected {expected}")
        if problems:
            raise InvalidInputError("thresholds: " + "; ".join(problems))


def finding_to_proto(finding: Finding) -> pb.Finding:
    """Return `finding` as a message; the times and the number of occurrences are the caller's."""
    message = pb.Finding(
        rule_id=finding.rule_id,
        kind=pb.FindingKind.Value(f"FINDING_KIND_{finding.kind.name}"),
        severity=pb.Severity.Value(f"SEVERITY_{finding.severity.name}"),
        code=finding.code,
        args=finding.args,
        statistic=finding.statistic,
    )
    for name in ("layer_index", "expert_id", "since_step"):
        value = getattr(finding, name)
        if value is not None:
            setattr(message, name, value)
    for row in finding.evidence:
        item = message.evidence.add(
            metric=row.metric, value=row.value, rule=row.rule, sample_size=row.sample_size, unit=row.unit
        )
        if row.baseline is not None:
            item.baseline = row.baseline
    if finding.explanation is not None:
        # Explanations are built from findings: a module cannot import the other at once.
        from moe_debugger.analysis.explanation.wire import explanation_to_proto

        message.explanation.CopyFrom(explanation_to_proto(finding.explanation))
    return message


def findings_to_proto(findings: Iterable[Finding]) -> list[pb.Finding]:
    """Return each of `findings` as a message."""
    return [finding_to_proto(finding) for finding in findings]


def finding_from_proto(message: pb.Finding) -> Finding:
    """Return the finding in `message`.

    Raises:
        InvalidInputError: its kind or severity is none that this program knows.
    """
    try:
        kind = FindingKind(pb.FindingKind.Name(message.kind).removeprefix("FINDING_KIND_").lower())
        severity = Severity(pb.Severity.Name(message.severity).removeprefix("SEVERITY_").lower())
    except ValueError as error:
        raise InvalidInputError(f"finding {message.rule_id!r}: {error}; was it written by a newer version?") from error

    from moe_debugger.analysis.explanation.wire import explanation_from_proto

    def optional(name: str) -> int | None:
        return int(getattr(message, name)) if message.HasField(name) else None  # type: ignore[arg-type]

    return Finding(
        kind=kind,
        severity=severity,
        code=message.code,
        layer_index=optional("layer_index"),
        expert_id=optional("expert_id"),
        since_step=optional("since_step"),
        args=dict(message.args),
        evidence=tuple(
            EvidenceRow(
                metric=row.metric,
                value=row.value,
                rule=row.rule,
                baseline=row.baseline if row.HasField("baseline") else None,
                sample_size=row.sample_size,
                unit=row.unit,
            )
            for row in message.evidence
        ),
        statistic=message.statistic,
        explanation=(
            explanation_from_proto(message.explanation, message.rule_id) if message.HasField("explanation") else None
        ),
    )
