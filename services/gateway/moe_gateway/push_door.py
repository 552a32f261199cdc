"""The push door of engines: sources that the gateway opens for them, each with its own way to NATS.

A source lives in the gateway that opened it. Its tenant is the gateway's, as in every call: a client cannot name one.
"""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import structlog

from moe_debugger.capture import LayerInfo
from moe_debugger.errors import FleetError, InvalidInputError
from moe_debugger.publish import PublisherStatistics
from moe_debugger.source import PublishedRoutes, Source, open_source
from moe_debugger.v1 import gateway_pb2 as pb
from moe_debugger.v1 import routing_pb2
from moe_debugger.wire.ids import check_id
from moe_gateway.errors import BusyError, NotFoundError
from moe_gateway.settings import GatewaySettings

__all__ = ["PushDoor"]

log = structlog.get_logger(__name__)

T = TypeVar("T")

_OPEN_TIMEOUT_S = 5.0
_CLOSE_TIMEOUT_S = 3.0
# The gateway's own end must not wait for a broker that is away.
_DRAIN_TIMEOUT_S = 0.5
_MAX_REMEMBERED_CALLS = 1024
_MAX_VERSIONS = 32
_LEVELS = {
    routing_pb2.CAPTURE_LEVEL_UNSPECIFIED: "routes",
    routing_pb2.CAPTURE_LEVEL_COUNTS: "counts",
    routing_pb2.CAPTURE_LEVEL_ROUTES: "routes",
    routing_pb2.CAPTURE_LEVEL_ROUTES_TOKENS: "routes+tokens",
}


@dataclass(slots=True)
class _Entry:
    """An open source.

    Attributes:
        calls: answers of the newest calls that had an id; a call that runs is among them.
    """

    source: Source
    last_used_at: float
    num_running: int = 0
    calls: "OrderedDict[str, asyncio.Task[pb.PublishRoutesResponse]]" = field(default_factory=OrderedDict)


class PushDoor:
    """Opens, feeds and closes sources; at most `settings.max_sources` at a time, idle ones are closed."""

    def __init__(self, settings: GatewaySettings) -> None:
        self._settings = settings
        self._entries: dict[str, _Entry] = {}
        self._num_opening = 0
        # Checking arrays takes milliseconds, and a broker may take seconds: neither belongs on the event loop.
        self._pool = ThreadPoolExecutor(settings.max_sources + 2, thread_name_prefix="push-door")

    @property
    def num_sources(self) -> int:
        """Sources that are open."""
        return len(self._entries)

    async def open(self, request: pb.OpenSourceRequest, remaining_s: float | None) -> pb.OpenSourceResponse:
        """Open a source and wait for its session.

        Raises:
            BusyError: too many sources are open.
            InvalidInputError: the layers, the level or the session's name are wrong.
            FleetError: NATS or the analyzer does not answer.
        """
        if len(self._entries) + self._num_opening >= self._settings.max_sources:
            raise BusyError(
                f"{len(self._entries)} sources are open, the most allowed; close one, or raise MOE_GATEWAY_MAX_SOURCES"
            )
        self._num_opening += 1
        try:
            timeout_s = _OPEN_TIMEOUT_S if remaining_s is None else min(_OPEN_TIMEOUT_S, remaining_s)
            source = self._make(request)
            try:
                session_id = await self._run(partial(_wait_for_session, source, timeout_s))
            except BaseException:
                # Also where the client has gone: nobody else would close it.
                self._pool.submit(source.close, timeout_s=0.0, ends_session=False, reason="the source was not opened")
                raise
            self._entries[source.source_id] = _Entry(source, time.monotonic())
        finally:
            self._num_opening -= 1
        log.info("source_opened", session_id=session_id, source_id=source.source_id, num_sources=len(self._entries))
        return pb.OpenSourceResponse(
            session_id=session_id,
            source_id=source.source_id,
            max_request_bytes=self._settings.max_request_bytes,
            idle_timeout_s=self._settings.source_idle_s,
        )

    async def publish(self, request: pb.PublishRoutesRequest) -> pb.PublishRoutesResponse:
        """Take routes.

        Raises:
            NotFoundError: the source is not open here.
            InvalidInputError: a column does not have the bytes that it should, or the routes are refused.
            SessionClosedError: the source is being closed.
        """
        entry = self._entry(request.source_id)
        entry.last_used_at = time.monotonic()
        if not request.call_id:
            return await self._publish(entry, request)
        call_id = check_id(request.call_id, "call_id")
        task = entry.calls.get(call_id)
        if task is None:
            task = asyncio.get_running_loop().create_task(self._publish(entry, request))
            entry.calls[call_id] = task
            task.add_done_callback(partial(_forget_if_failed, entry, call_id))
            while len(entry.calls) > _MAX_REMEMBERED_CALLS:
                entry.calls.popitem(last=False)
        # A client that leaves must not undo what its retry will ask for.
        return await asyncio.shield(task)

    async def close(self, request: pb.CloseSourceRequest) -> pb.CloseSourceResponse:
        """Publish what waits, say goodbye, and forget the source.

        Raises:
            NotFoundError: the source is not open here.
        """
        entry = self._entry(request.source_id)
        source = entry.source
        del self._entries[source.source_id]
        await self._run(
            partial(source.close, timeout_s=_CLOSE_TIMEOUT_S, ends_session=request.closes_session, reason="closed")
        )
        log.info("source_closed", source_id=source.source_id, num_sources=len(self._entries))
        statistics = source.publisher_statistics()
        assert statistics is not None
        return pb.CloseSourceResponse(counters=_counters(statistics))

    async def run(self) -> None:
        """Close idle sources until cancelled."""
        idle_s = self._settings.source_idle_s
        while True:
            await asyncio.sleep(min(5.0, idle_s / 4))
            limit = time.monotonic() - idle_s
            for source_id, entry in list(self._entries.items()):
                if entry.last_used_at < limit and not entry.num_running:
                    del self._entries[source_id]
                    self._pool.submit(
                        entry.source.close, timeout_s=_CLOSE_TIMEOUT_S, ends_session=False, reason="idle for too long"
                    )
                    log.info("source_closed", source_id=source_id, reason="idle", idle_s=idle_s)

    async def drain(self) -> None:
        """Close all sources; their sessions stay open for those that go on."""
        entries, self._entries = list(self._entries.values()), {}
        await asyncio.gather(
            *(
                self._run(
                    partial(
                        entry.source.close, timeout_s=_DRAIN_TIMEOUT_S, ends_session=False, reason="the gateway ends"
                    )
                )
                for entry in entries
            ),
            return_exceptions=True,
        )
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _entry(self, source_id: str) -> _Entry:
        entry = self._entries.get(check_id(source_id, "source_id"))
        if entry is None:
            raise NotFoundError(
                f"source {source_id} is not open in this gateway: it was closed, idle for more than "
                f"{self._settings.source_idle_s:g} s, or opened in another gateway; open a new one with OpenSource"
            )
        return entry

    def _make(self, request: pb.OpenSourceRequest) -> Source:
        if request.level not in _LEVELS:
            raise InvalidInputError(
                f"level {request.level} is not one of counts, routes, routes with tokens; an engine has no logits"
            )
        if not request.model_name:
            raise InvalidInputError("model_name is empty; give the name that the fleet shall show")
        if len(request.versions) > _MAX_VERSIONS:
            raise InvalidInputError(f"versions has {len(request.versions)} entries; at most {_MAX_VERSIONS} are shown")
        layers = [_layer_info(layer) for layer in request.layers]
        mapping = None
        if request.physical_to_logical:
            num_ids = len(request.physical_to_logical) // 2
            mapping = _column(
                "physical_to_logical", request.physical_to_logical, "<i2", (len(layers), num_ids // max(1, len(layers)))
            )
        return open_source(
            layers,
            physical_to_logical=mapping,
            fleet=self._settings.nats_url.get_secret_value(),
            session_name=request.session_name or request.model_name,
            model_name=request.model_name,
            model_type=request.model_type,
            level=_LEVELS[request.level],  # type: ignore[arg-type]
            versions=dict(request.versions),
            tenant=self._settings.tenant,
            buffer_bytes=self._settings.source_buffer_bytes,
            keeps_local=False,
            wait_s=0,
        )

    async def _publish(self, entry: _Entry, request: pb.PublishRoutesRequest) -> pb.PublishRoutesResponse:
        entry.num_running += 1
        try:
            published = await self._run(partial(_push, entry.source, request))
        finally:
            entry.num_running -= 1
        return pb.PublishRoutesResponse(
            request_id=published.request_id,
            num_tokens=published.num_tokens,
            num_decisions=published.num_decisions,
            num_not_routed_tokens=published.num_not_routed_tokens,
            is_taken=published.is_taken,
            problems=dict(published.problems),
        )

    async def _run(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)


def _wait_for_session(source: Source, timeout_s: float) -> str:
    publisher = source.publisher
    assert publisher is not None
    try:
        return publisher.wait_for_session(timeout_s)
    except FleetError as error:
        statistics = publisher.statistics()
        if statistics.state == "refused":
            raise InvalidInputError(f"the session cannot be opened: {statistics.last_error}") from error
        raise


def _push(source: Source, request: pb.PublishRoutesRequest) -> PublishedRoutes:
    num_tokens = request.num_tokens
    routes_shape = (num_tokens, len(source.layers()), source.top_k)
    phase = None if request.phase == routing_pb2.PHASE_UNSPECIFIED else int(request.phase)
    try:
        expert_ids = _column("expert_ids", request.expert_ids, "<i2", routes_shape)
        position = _column("position", request.position, "<u4", (num_tokens,))
        weights = _column("gate_weights", request.gate_weights, "<f4", routes_shape) if request.gate_weights else None
        token_ids = _column("token_id", request.token_id, "<u4", (num_tokens,)) if request.token_id else None
        is_padding = _column("is_padding", request.is_padding, "u1", (num_tokens,)) if request.is_padding else None
    except InvalidInputError as error:
        # What the client says it has may be anything; the bytes that came tell how many tokens' routes are lost.
        num_lost = -(-len(request.expert_ids) // (2 * routes_shape[1] * routes_shape[2]))
        source.count_refused(num_lost, example=str(error))
        raise
    return source.publish_routes(
        request.request_id or None,
        expert_ids,
        position,
        weights,
        phase=phase,
        token_ids=token_ids,
        is_padding=is_padding,
        num_prompt_tokens=request.num_prompt_tokens if request.HasField("num_prompt_tokens") else None,
        num_cached_tokens=request.num_cached_tokens if request.HasField("num_cached_tokens") else None,
    )


def _column(name: str, data: bytes, dtype: str, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    expected = int(np.prod(shape, dtype=object)) * np.dtype(dtype).itemsize
    if len(data) != expected:
        raise InvalidInputError(
            f"{name} has {len(data)} bytes; expected {expected} for the shape {shape} of {np.dtype(dtype).name}"
        )
    return np.frombuffer(data, dtype).reshape(shape)


def _layer_info(layer: routing_pb2.LayerDescription) -> LayerInfo:
    return LayerInfo(
        layer_index=layer.layer_index,
        model_layer_index=layer.model_layer_index,
        module_name=layer.module_name or f"layers.{layer.model_layer_index or layer.layer_index}.mlp",
        stack=layer.stack or "decoder",
        num_experts=layer.num_experts,
        top_k=layer.top_k,
        num_shared_experts=layer.num_shared_experts,
        num_identity_experts=layer.num_identity_experts,
        scoring_function=layer.scoring_function or "unknown",
        weight_meaning=layer.weight_meaning or "as the engine reports it",
        unavailable_reason=layer.unavailable_reason
        or "the engine returns the selected experts, not the router's scores",
        site="attention" if layer.site == "attention" else "mlp",
    )


def _counters(statistics: PublisherStatistics) -> routing_pb2.SourceCounters:
    counters = routing_pb2.SourceCounters(
        num_produced=statistics.num_produced,
        num_published=statistics.num_published,
        num_in_flight=statistics.num_in_flight,
    )
    for name, number in statistics.num_dropped.items():
        counters.dropped.add(reason=routing_pb2.DropReason.Value(f"DROP_REASON_{name.upper()}"), num_decisions=number)
    return counters


def _forget_if_failed(entry: _Entry, call_id: str, task: "asyncio.Task[pb.PublishRoutesResponse]") -> None:
    # Nothing of a refused call was taken: the same id may come again with what was meant.
    if task.cancelled() or task.exception() is not None:
        entry.calls.pop(call_id, None)
