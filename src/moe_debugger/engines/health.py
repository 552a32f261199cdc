"""Capture health of a pushed source: what its arrays were checked for, as `capture_health` shows it for hooks.

Rows are checked before they are taken, so a violation is either a refused call, whose rows are counted as dropped
besides, or something that was flagged and left out.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from moe_debugger.capture_health import CHECK_NAMES, CheckStatus, HealthCheck

__all__ = ["PushedHealth"]

_UNITS = {
    "conservation": "slots",
    "distinctness": "rows",
    "range": "slots",
    "weights": "slots",
    "layers": "layer forwards",
    "gaps": "forwards",
    "drops": "decisions",
    "overhead": "ms of forwards",
}
_UNKNOWN = {
    "weights": "no weights were pushed",
    "gaps": "what an engine routed and did not push is not known here",
    "overhead": "the engine's own time is not known here",
}


@dataclass(slots=True)
class _Tally:
    num_checked: int = 0
    num_violations: int = 0
    example: str = ""


class PushedHealth:
    """The running checks of one source; not thread-safe, the source holds its lock.

    Args:
        num_layers: MoE layers of the source.
        num_slots: slots of one token over all of them.
    """

    def __init__(self, num_layers: int, num_slots: int) -> None:
        self._num_layers = num_layers
        self._num_slots = num_slots
        self._tallies = {name: _Tally() for name in CHECK_NAMES}
        self._has_sums = False

    def taken(
        self,
        num_tokens: int,
        problems: Mapping[str, int],
        *,
        with_weights: bool,
        num_missing_tokens: int,
        num_missing_layers: int,
    ) -> None:
        """Count a call whose rows were taken.

        Args:
            num_tokens: rows that were taken.
            problems: what was flagged.
            num_missing_tokens: tokens without a route at any layer that no prefix cache explains.
            num_missing_layers: layers without routes for tokens that others have.
        """
        num_slots = num_tokens * self._num_slots
        missing_slots = num_missing_tokens * self._num_slots
        of_layers = next((text for text in problems if text.startswith("layer ")), "")
        of_tokens = next((text for text in problems if text.startswith("tokens ")), "")
        self._add("conservation", num_slots + missing_slots, missing_slots, of_tokens)
        self._add("distinctness", num_tokens * self._num_layers)
        self._add("range", num_slots)
        self._add("weights", num_slots if with_weights else 0)
        self._add("layers", self._num_layers if num_tokens else 0, num_missing_layers, of_layers)

    def counted(self, num_assignments: int, num_layers: int) -> None:
        """Count sums that were taken: their shape is checked, and nothing of single rows can be."""
        self._add("range", num_assignments)
        self._add("layers", num_layers)
        self._has_sums = True

    def refused(self, check: str, num_tokens: int, example: str) -> None:
        """Count a refused call under the check that refused it."""
        number = max(1, num_tokens * self._num_slots) if _UNITS[check] == "slots" else max(1, num_tokens)
        self._add(check, number, number, example)

    def checks(self, *, num_produced: int, dropped: Mapping[str, int]) -> tuple[HealthCheck, ...]:
        """Return the outcome of all checks.

        Args:
            num_produced: decisions that were handed over, refused ones included.
            dropped: decisions lost, by reason.
        """
        reasons = ", ".join(f"{number:,} {reason}" for reason, number in sorted(dropped.items()) if number)
        self._tallies["drops"] = _Tally(num_produced, sum(dropped.values()), reasons)
        return tuple(self._outcome(name, self._tallies[name]) for name in CHECK_NAMES)

    def _add(self, name: str, checked: int, violations: int = 0, example: str = "") -> None:
        tally = self._tallies[name]
        tally.num_checked += checked
        if violations:
            tally.num_violations += violations
            tally.example = tally.example or example

    def _outcome(self, name: str, tally: _Tally) -> HealthCheck:
        status = CheckStatus.OK if tally.num_checked else CheckStatus.UNKNOWN
        if tally.num_violations:
            status = CheckStatus.FAILED
        example = tally.example
        if status is CheckStatus.UNKNOWN:
            nothing = "sums do not show single rows" if self._has_sums else "nothing was pushed yet"
            example = _UNKNOWN.get(name, nothing)
        return HealthCheck(name, status, tally.num_checked, tally.num_violations, _UNITS[name], example)
