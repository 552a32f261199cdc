"""Explains a session's findings from what the fleet keeps: loads over steps, training series, ranks of the experts."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, replace

from moe_analyzer.aggregate import SourceState
from moe_debugger.analysis import Analysis, RoutingState, Severity
from moe_debugger.analysis.explanation import Explanation, ObservedSettings, PlacementOptions, explain_analysis
from moe_debugger.v1 import session_pb2 as pb

__all__ = ["Explainer"]

# An explanation searches all steps: it is made again after so much new data, not with every look.
_REFRESH_NS = 5_000_000_000
_MAX_FINDINGS = 16
_MAX_SESSIONS = 64


@dataclass(slots=True)
class _Known:
    newest_ns: int
    explanations: dict[str, Explanation]


class Explainer:
    """Adds explanations to findings above `info`, and remembers them for some seconds of data.

    Args:
        read_series: returns the series of a session, by tenant and session id, without those of experts.
    """

    def __init__(self, read_series: Callable[[str, str], Awaitable[list[pb.Series]]]) -> None:
        self._read_series = read_series
        self._known: dict[tuple[str, str], _Known] = {}

    async def explained(
        self,
        tenant: str,
        session_id: str,
        analysis: Analysis,
        *,
        totals: RoutingState,
        sources: Iterable[SourceState],
        newest_ns: int,
    ) -> Analysis:
        """Return `analysis` with explanations, most severe findings first, at most 16.

        Args:
            totals: state of the whole session.
            newest_ns: broker time of the newest data in it.
        """
        wanted = [finding for finding in analysis.findings if finding.severity is not Severity.INFO][:_MAX_FINDINGS]
        if not wanted:
            return analysis
        key = (tenant, session_id)
        known = self._known.pop(key, None)
        if (
            known is None
            or newest_ns - known.newest_ns >= _REFRESH_NS
            or newest_ns < known.newest_ns
            or any(finding.rule_id not in known.explanations for finding in wanted)
        ):
            settings = ObservedSettings.from_messages(await self._read_series(tenant, session_id))
            # The search takes up to some hundred milliseconds: other sessions are answered meanwhile.
            made = await asyncio.to_thread(
                explain_analysis,
                replace(analysis, findings=tuple(wanted)),
                state=totals,
                settings=settings,
                placement=_placement(sources),
            )
            known = _Known(newest_ns, {one.rule_id: one.explanation for one in made.findings if one.explanation})
        self._known[key] = known
        while len(self._known) > _MAX_SESSIONS:
            del self._known[next(iter(self._known))]
        found = known.explanations
        return replace(
            analysis,
            findings=tuple(replace(one, explanation=found.get(one.rule_id)) for one in analysis.findings),
        )


def _placement(sources: Iterable[SourceState]) -> PlacementOptions | None:
    owners: dict[int, tuple[int, ...]] = {}
    for source in sources:
        for layer in source.manifest.layers if source.manifest is not None else ():
            if layer.expert_parallel_ranks:
                owners.setdefault(layer.layer_index, tuple(layer.expert_parallel_ranks))
    ranks = max((max(of_layer) + 1 for of_layer in owners.values()), default=0)
    return PlacementOptions(num_ranks=ranks, owners=owners) if ranks > 1 else None
