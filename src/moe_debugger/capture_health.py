"""How far a capture can be trusted: the checks that it makes of itself, and their outcome as typed values.

Example: a session whose layer 3 lost rows::

    health = session.capture_health()
    health.is_healthy                # False
    health.check("layers").example   # 'layer 3 (model.layers.3.mlp): its hook saw 20 of the 24 tokens that ...'
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from moe_debugger._tables import html_table, text_table
from moe_debugger.v1 import routing_pb2 as pb

__all__ = ["CHECK_NAMES", "CaptureHealth", "CheckStatus", "HealthCheck", "merge_checks"]

# In the order in which they are shown; docs/metrics.md defines each.
CHECK_NAMES = ("conservation", "distinctness", "range", "weights", "layers", "gaps", "drops", "overhead")
_HEADERS = ("check", "status", "violations", "of", "unit", "first example")


class CheckStatus(StrEnum):
    """Outcome of a check; values equal the proto's `CheckStatus` names in lower case."""

    OK = "ok"
    FAILED = "failed"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class HealthCheck:
    """One check over all that was captured so far.

    Attributes:
        name: one of `CHECK_NAMES`.
        status: "unknown" where nothing was there to check, or what it takes to check is not known.
        num_checked: what was looked at, in `unit`; num_violations: how many of these failed.
        example: the first violation, or why the check is unknown; empty where all is well.
    """

    name: str
    status: CheckStatus
    num_checked: int = 0
    num_violations: int = 0
    unit: str = ""
    example: str = ""

    def to_proto(self) -> pb.HealthCheck:
        """Return the check as it goes on the wire."""
        return pb.HealthCheck(
            name=self.name,
            status=pb.CheckStatus.Value(f"CHECK_STATUS_{self.status.name}"),
            num_checked=self.num_checked,
            num_violations=self.num_violations,
            unit=self.unit,
            example=self.example,
        )

    @classmethod
    def from_proto(cls, message: pb.HealthCheck) -> "HealthCheck":
        """Return the check of a message; a status that this program does not know is "unknown"."""
        names = {pb.CHECK_STATUS_OK: CheckStatus.OK, pb.CHECK_STATUS_FAILED: CheckStatus.FAILED}
        return cls(
            message.name,
            names.get(message.status, CheckStatus.UNKNOWN),
            message.num_checked,
            message.num_violations,
            message.unit,
            message.example,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "name": self.name,
            "status": self.status.value,
            "num_checked": self.num_checked,
            "num_violations": self.num_violations,
            "unit": self.unit,
            "example": self.example,
        }


def merge_checks(checks: Iterable[HealthCheck]) -> tuple[HealthCheck, ...]:
    """Return the checks of several sources as one of each name: failed where any failed, unknown where all are."""
    merged: dict[str, HealthCheck] = {}
    for check in checks:
        before = merged.setdefault(check.name, check)
        if before is check:
            continue
        statuses = {before.status, check.status}
        order = (CheckStatus.FAILED, CheckStatus.OK, CheckStatus.UNKNOWN)
        status = next(status for status in order if status in statuses)
        merged[check.name] = HealthCheck(
            check.name,
            status,
            before.num_checked + check.num_checked,
            before.num_violations + check.num_violations,
            before.unit,
            # A text belongs to an outcome: that of a failure, where there is one.
            next((one.example for one in (before, check) if one.status is status and one.example), ""),
        )
    return tuple(merged.values())


@dataclass(frozen=True, slots=True)
class CaptureHealth:
    """What is known of the capture behind the rows.

    Attributes:
        num_produced: decisions that the hooks saw.
        dropped: decisions lost by reason; sampling is no loss and does not belong here.
        num_missing_messages: gaps in the sources' sequences.
        problems: what sources reported about themselves, in words.
        checks: the outcome of each check; empty where none were made.
    """

    num_produced: int = 0
    dropped: dict[str, int] | None = None
    num_missing_messages: int = 0
    problems: tuple[str, ...] = ()
    checks: tuple[HealthCheck, ...] = ()

    @property
    def is_healthy(self) -> bool:
        """True where what is shown is all that was routed: nothing lost, nothing reported, no failed check.

        A failed "overhead" says that watching is dear, not that what is shown is wrong, so it changes nothing here.
        """
        failed = any(check.name != "overhead" for check in self.failed)
        return not (failed or any((self.dropped or {}).values()) or self.num_missing_messages or self.problems)

    @property
    def failed(self) -> tuple[HealthCheck, ...]:
        """The checks that failed."""
        return tuple(check for check in self.checks if check.status is CheckStatus.FAILED)

    def check(self, name: str) -> HealthCheck:
        """Return the check of that name.

        Raises:
            KeyError: there is none.
        """
        for check in self.checks:
            if check.name == name:
                return check
        raise KeyError(f"no check {name!r}; there are: {', '.join(check.name for check in self.checks) or 'none'}")

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "is_healthy": self.is_healthy,
            "num_produced": self.num_produced,
            "dropped": dict(self.dropped or {}),
            "num_missing_messages": self.num_missing_messages,
            "problems": list(self.problems),
            "checks": [check.to_dict() for check in self.checks],
        }

    def _rows(self) -> list[list[object]]:
        return [
            [check.name, check.status.value, check.num_violations, f"{check.num_checked:,}", check.unit, check.example]
            for check in self.checks
        ]

    @property
    def _title(self) -> str:
        problems = f"; {'; '.join(self.problems)}" if self.problems else ""
        return f"Capture health: {'healthy' if self.is_healthy else 'NOT healthy'}{problems}"

    def __str__(self) -> str:
        return f"{self._title}\n{text_table(_HEADERS, self._rows())}"

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return html_table(self._title, _HEADERS, self._rows())
