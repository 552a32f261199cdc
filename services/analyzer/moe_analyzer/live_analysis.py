"""The analysis of a live session: its recent window, and what its steps did before that.

Most rules judge the recent window. Those about the course of a training (early warning, collapse since the first steps)
need the loads over all steps, which stand in Redis beside the head. They are large and change slowly, so they are read
again only after some new data, later the larger they are.
"""

import asyncio
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import structlog

from moe_analyzer.aggregate import SourceState
from moe_analyzer.explaining import Explainer
from moe_analyzer.step_history import INDEX_FIELD, chunk_fields, read_history
from moe_analyzer.store import Store
from moe_debugger.analysis import Analysis, CaptureHealth, RoutingState, Thresholds, finish
from moe_debugger.analysis.step_loads import LoadSeries, StepSample
from moe_debugger.analysis.token_sample import TokenSample
from moe_debugger.errors import WireFormatError

__all__ = ["LiveAnalysis"]

_log = structlog.get_logger()

History = dict[int, tuple[LoadSeries, StepSample, TokenSample]]

# New data after which the history is read again: a second for each MB that it has.
_REFRESH_NS_PER_BYTE = 1_000
_MAX_REFRESH_NS = 10_000_000_000
_MAX_SESSIONS = 32
# A chunk may make room between the read of the index and that of the chunks.
_NUM_READS = 3


@dataclass(slots=True)
class _Known:
    history: History
    newest_ns: int = -1
    refresh_ns: int = 0
    flushes: Mapping[int, int] | None = None
    analysis: Analysis | None = None


class LiveAnalysis:
    """Analyses sessions, and answers again for data that it has analysed."""

    def __init__(self, store: Store, explainer: Explainer, thresholds: Thresholds | None) -> None:
        self._store = store
        self._explainer = explainer
        self._thresholds = thresholds
        self._known: dict[tuple[str, str], _Known] = {}

    async def of(
        self,
        tenant: str,
        session_id: str,
        *,
        recent: RoutingState,
        totals: RoutingState,
        sources: Iterable[SourceState],
        flushes: Mapping[int, int],
        health: CaptureHealth,
        newest_ns: int,
    ) -> Analysis:
        """Return what is found in a session now.

        Args:
            recent: state of the recent window.
            totals: state of the whole session; its layers get their loads over steps.
            flushes: flush number by partition: the same ones are the same data.
            newest_ns: broker time of the newest data.
        """
        sources = list(sources)
        known = self._known.pop((tenant, session_id), None) or _Known({})
        self._known[(tenant, session_id)] = known
        while len(self._known) > _MAX_SESSIONS:
            del self._known[next(iter(self._known))]
        if not known.newest_ns <= newest_ns < known.newest_ns + known.refresh_ns:
            known.history, num_bytes = await self._read(tenant, session_id, flushes)
            known.refresh_ns = min(_REFRESH_NS_PER_BYTE * num_bytes, _MAX_REFRESH_NS)
            known.newest_ns = newest_ns
        for index, (series, steps, tokens) in known.history.items():
            if index in totals.layers:
                layer = totals.layers[index]
                layer.load_series, layer.step_sample, layer.token_sample = series, steps, tokens
        if known.analysis is not None and known.flushes == flushes:
            return known.analysis
        # Some hundred milliseconds for many layers: other sessions are answered meanwhile.
        analysis = await asyncio.to_thread(
            finish,
            _with_history(recent, known.history),
            thresholds=self._thresholds,
            health=health,
            expert_ranks=_expert_ranks(recent, sources),
        )
        analysis = await self._explainer.explained(
            tenant, session_id, analysis, totals=totals, sources=sources, newest_ns=newest_ns
        )
        known.flushes, known.analysis = dict(flushes), analysis
        return analysis

    async def _read(self, tenant: str, session_id: str, partitions: Iterable[int]) -> tuple[History, int]:
        """Return the history over all partitions, and its stored size in bytes."""
        merged: History = {}
        num_bytes = 0
        for partition in partitions:
            part, size = await self._read_part(tenant, session_id, partition)
            num_bytes += size
            for index, theirs in part.items():
                mine = merged.get(index)
                merged[index] = theirs if mine is None else _merged(mine, theirs)
        return merged, num_bytes

    async def _read_part(self, tenant: str, session_id: str, partition: int) -> tuple[History, int]:
        for attempt in range(_NUM_READS):
            state = await self._store.read_state(partition, tenant, session_id, [INDEX_FIELD])
            if INDEX_FIELD not in state:
                break
            state |= await self._store.read_state(partition, tenant, session_id, chunk_fields(state[INDEX_FIELD]))
            try:
                return read_history(state), sum(map(len, state.values()))
            except WireFormatError as error:
                if attempt == _NUM_READS - 1:
                    # The window can be judged without it: better that than no picture of the session.
                    _log.warning("history_unreadable", session_id=session_id, partition=partition, error=str(error))
        return {}, 0


def _merged(
    mine: tuple[LoadSeries, StepSample, TokenSample], theirs: tuple[LoadSeries, StepSample, TokenSample]
) -> tuple[LoadSeries, StepSample, TokenSample]:
    return mine[0].merge(theirs[0]), mine[1].merge(theirs[1]), mine[2].merge(theirs[2])


def _with_history(recent: RoutingState, history: History) -> RoutingState:
    """Return the window with the series of the whole run, and the sampled steps that lie in the window."""
    layers = {}
    for index, layer in recent.layers.items():
        if index in history:
            series, steps, tokens = history[index]
            layer = replace(layer, load_series=series, step_sample=_since(steps, layer.first_step), token_sample=tokens)
        layers[index] = layer
    return RoutingState(layers, recent.request_registers, recent.request_sample)


def _since(sample: StepSample, first_step: int | None) -> StepSample | None:
    if first_step is None:
        return None
    kept = sample.steps >= np.uint64(first_step)
    return StepSample(sample.hashes[kept], sample.steps[kept], sample.counts[kept], sample.num_tokens[kept])


def _expert_ranks(state: RoutingState, sources: Iterable[SourceState]) -> dict[int, npt.NDArray[np.int64]]:
    ranks: dict[int, npt.NDArray[np.int64]] = {}
    for source in sources:
        for layer in source.manifest.layers if source.manifest is not None else ():
            index = layer.layer_index
            if index in state.layers and len(layer.expert_parallel_ranks) == state.layers[index].shape.num_experts:
                ranks.setdefault(index, np.asarray(layer.expert_parallel_ranks, np.int64))
    return ranks
