"""The push door: a source whose routes are pushed, for engines where hooks cannot fire.

    source = moe_debugger.open_source(num_layers=48, num_experts=128, top_k=8, fleet="nats://…")
    source.publish_routes(None, expert_ids, positions, num_prompt_tokens=12)     # [tokens, layers, k]
    source.close()

Adapters for what vLLM and SGLang return with a request are thin calls of it, see `moe_debugger.engines`.
"""

import importlib.metadata
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import urlsplit

import numpy.typing as npt

from moe_debugger._decisions import Decisions
from moe_debugger._stats import ExpertMetrics, RoutingStats
from moe_debugger.analysis import Analysis, CaptureHealth, RoutingState, Thresholds, finish
from moe_debugger.capture import LayerInfo
from moe_debugger.engines.arrays import (
    CheckedRoutes,
    RefusedRoutesError,
    RouteChecker,
    ZeroRows,
    check_sums,
    engine_layers,
)
from moe_debugger.engines.health import PushedHealth
from moe_debugger.engines.local import LocalRoutes
from moe_debugger.errors import FleetError, InvalidInputError, SessionClosedError
from moe_debugger.publish import Health, Publisher, PublisherStatistics, SourceDescription, redact_url
from moe_debugger.publish.account import reason_name
from moe_debugger.v1 import routing_pb2 as pb
from moe_debugger.wire.codec import CountsColumns, RoutingColumns
from moe_debugger.wire.ids import DEFAULT_TENANT, check_id, check_tenant, new_id

__all__ = ["PublishedRoutes", "Source", "SourceAccount", "open_source"]

SourceLevelName = Literal["counts", "routes", "routes+tokens"]
LEVELS: dict[str, int] = {
    "counts": pb.CAPTURE_LEVEL_COUNTS,
    "routes": pb.CAPTURE_LEVEL_ROUTES,
    "routes+tokens": pb.CAPTURE_LEVEL_ROUTES_TOKENS,
}
_FLUSH_TIMEOUT_S = 60.0
_MAX_PROBLEM_KINDS = 16
_REFUSED = "arrays were refused: zero-filled, cut, out of line or out of range"
# What the fleet shows beside a source's account: tokens are no decisions, so the counters have no place for them.
_NOT_ROUTED_SERIES = "not_routed_tokens"


@dataclass(frozen=True, slots=True)
class PublishedRoutes:
    """What became of one call of `Source.publish_routes`.

    Attributes:
        request_id: the caller's, else the one that was minted.
        num_tokens: rows taken, padded ones included.
        num_decisions: rows times layers.
        num_not_routed_tokens: tokens left out: from a prefix cache, or without a route at any layer.
        is_taken: False where the buffer was full; the decisions are counted as dropped then.
        problems: what is suspicious in the arrays, with how many tokens show it.
    """

    request_id: str
    num_tokens: int
    num_decisions: int
    num_not_routed_tokens: int
    is_taken: bool
    problems: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SourceAccount:
    """Where everything that was pushed went.

    Attributes:
        num_calls, num_refused_calls: calls of `publish_routes` and `publish_counts`; the refused ones raised.
        num_tokens: rows taken from the caller, padded ones included.
        num_decisions: decisions of those rows; counts that were pushed included.
        num_not_routed_tokens: tokens left out as not routed here.
        num_dropped: decisions dropped, by reason ("buffer_full", "capture_error" for refused arrays...). With a fleet
            it is the way there; what this process did not keep beside it is "local_buffer_full".
        problems: what was suspicious, with how many tokens showed it.
    """

    num_calls: int = 0
    num_refused_calls: int = 0
    num_tokens: int = 0
    num_decisions: int = 0
    num_not_routed_tokens: int = 0
    num_dropped: Mapping[str, int] = field(default_factory=dict)
    problems: Mapping[str, int] = field(default_factory=dict)


def open_source(
    layers: Sequence[LayerInfo] | None = None,
    *,
    num_layers: int | None = None,
    num_experts: int | None = None,
    top_k: int | None = None,
    model_layer_indices: Sequence[int] | None = None,
    num_model_layers: int | None = None,
    physical_to_logical: npt.ArrayLike | None = None,
    fleet: str | None = None,
    session_name: str | None = None,
    model_name: str = "engine",
    model_type: str = "",
    level: SourceLevelName = "routes",
    kind: str = "engine",
    versions: Mapping[str, str] | None = None,
    tenant: str = DEFAULT_TENANT,
    buffer_bytes: int = 64 * 1024 * 1024,
    max_rows_bytes: int = 512 * 1024 * 1024,
    keeps_local: bool | None = None,
    thresholds: Thresholds | None = None,
    wait_s: float = 10.0,
) -> "Source":
    """Open a source that an engine pushes its routes into.

    Args:
        layers: the model's MoE layers in the order of the arrays; or give `num_layers`, `num_experts` and `top_k` where
            all are of one size.
        model_layer_indices: index of each MoE layer among all layers of the model; default 0, 1, 2...
        num_model_layers: all layers of the model, dense ones included. Engines whose arrays have a place for every
            layer (SGLang, early vLLM) need both, so that the adapters can pick the MoE layers out.
        physical_to_logical: [layers, num_physical] the logical expert of each physical replica, where the engine's ids
            are those of replicas; `Source.place_replicas` changes it later.
        fleet: NATS URL of a running fleet (the `nats` value of ``moe-debugger up --json``); None stays local.
        session_name: a session of that name that is open in the fleet is joined; default: `model_name`.
        level: what is kept and sent: "counts", "routes", "routes+tokens". An engine's arrays hold no logits.
        kind: what this process is, shown in the fleet.
        versions: of the engine, shown in the fleet.
        buffer_bytes: bound on what waits to be counted or sent; beyond it whole calls are dropped and counted.
        max_rows_bytes: bound on the rows kept for `Source.decisions`; counts stay exact.
        keeps_local: whether counts and rows are kept in this process, for `decisions`, `analyze` and others; default:
            where there is no fleet.
        wait_s: how long to wait for the fleet's answer; 0 does not wait, and connects in the background.

    Raises:
        InvalidInputError: an argument has no such value.
        FleetError: the fleet did not answer in `wait_s`, or refused.
    """
    if layers is None:
        if num_layers is None and model_layer_indices is not None:
            num_layers = len(model_layer_indices)
        if num_layers is None or num_experts is None or top_k is None:
            raise InvalidInputError(
                "the model's MoE layers are not described; give layers, or num_layers, num_experts and top_k"
            )
        layers = engine_layers(num_layers, num_experts, top_k, model_layer_indices=model_layer_indices)
    if level not in LEVELS:
        raise InvalidInputError(
            f"level {level!r}: expected one of {', '.join(LEVELS)}; an engine's arrays hold no logits for more"
        )
    if num_model_layers is not None and num_model_layers <= max(info.model_layer_index for info in layers):
        raise InvalidInputError(
            f"num_model_layers is {num_model_layers}, but a MoE layer has the index "
            f"{max(info.model_layer_index for info in layers)} in the model; expected all layers, dense ones included"
        )
    if fleet is not None:
        parts = urlsplit(fleet)
        if parts.scheme not in ("nats", "tls") or not parts.hostname:
            raise InvalidInputError(
                f"fleet {redact_url(fleet)!r}: expected a NATS URL (nats://user:password@host:port), which is the "
                "`nats` value of `moe-debugger up --json`"
            )
    name = session_name or model_name
    checker = RouteChecker(layers, physical_to_logical)
    publisher = None
    if fleet is not None:
        description = SourceDescription(
            session_name=name,
            model_name=model_name,
            model_type=model_type,
            layers=[_description(info) for info in layers],
            level=LEVELS[level],
            kind=kind,
            versions={"moe-debugger": importlib.metadata.version("moe-debugger"), **(versions or {})},
        )
        publisher = Publisher(fleet, description, tenant=check_tenant(tenant), buffer_bytes=buffer_bytes)
    local = None
    if keeps_local if keeps_local is not None else fleet is None:
        local = LocalRoutes(
            layers, buffer_bytes=buffer_bytes, max_rows_bytes=max_rows_bytes, keeps_rows=level != "counts"
        )
    source = Source(name, checker, level, publisher, local, num_model_layers=num_model_layers, thresholds=thresholds)
    if publisher is not None:
        publisher.set_health_source(source.health)
        publisher.start()
        if wait_s > 0:
            try:
                publisher.wait_for_session(wait_s)
            except FleetError:
                source.close(timeout_s=0.0, reason="the fleet did not answer")
                raise
    return source


class Source:
    """Takes an engine's routes; made by `open_source`. Its methods may be called from any thread, and never wait for
    the fleet (but `flush` and `close`, which say how long).

    Attributes:
        name: of the session.
        level: "counts", "routes" or "routes+tokens".
        num_model_layers: all layers of the model, or None where that was not said.
        publisher: None where the source is local.
    """

    def __init__(
        self,
        name: str,
        checker: RouteChecker,
        level: str,
        publisher: Publisher | None,
        local: LocalRoutes | None,
        *,
        num_model_layers: int | None = None,
        thresholds: Thresholds | None = None,
    ) -> None:
        self.name = name
        self.level = level
        self.num_model_layers = num_model_layers
        self.publisher = publisher
        self._checker = checker
        self._local = local
        self._thresholds = thresholds
        self._checks = PushedHealth(len(checker.layers), sum(info.top_k for info in checker.layers))
        if local is not None:
            local.set_failure_sink(self._fold_failed)
        self._local_id = new_id()
        self._lock = threading.Lock()
        self._is_closed = False
        self._step = 0
        self._num_calls = 0
        self._num_refused = 0
        self._num_tokens = 0
        self._num_decisions = 0
        self._num_not_routed = 0
        self._dropped: dict[int, int] = {}
        self._problems: dict[str, int] = {}
        self._busy_ns = 0
        self._status_mark = (time.monotonic_ns(), 0)

    @property
    def session_id(self) -> str | None:
        """The fleet's id of the session, None until it answered; a local source has its own."""
        return self._local_id if self.publisher is None else self.publisher.session_id

    @property
    def source_id(self) -> str:
        """The id of this source."""
        return self._local_id if self.publisher is None else self.publisher.source_id

    @property
    def is_closed(self) -> bool:
        """True after `close`."""
        return self._is_closed

    @property
    def top_k(self) -> int:
        """Slots of the arrays' last axis: the largest top-k of the layers."""
        return self._checker.top_k

    def layers(self) -> tuple[LayerInfo, ...]:
        """Return the MoE layers, in the order of the arrays' layer axis."""
        return self._checker.layers

    def place_replicas(self, physical_to_logical: npt.ArrayLike | None) -> None:
        """Take the next arrays' ids as those of physical replicas, placed so; None: as logical experts.

        Call it whenever the engine has rebalanced its experts.

        Args:
            physical_to_logical: [layers, num_physical] the logical expert of each replica.

        Raises:
            InvalidInputError: the map does not fit the layers; the old one stays.
        """
        self._checker = self._checker.with_map(physical_to_logical)

    def publish_routes(
        self,
        request_id: str | None,
        expert_ids: npt.ArrayLike,
        positions: npt.ArrayLike,
        weights: npt.ArrayLike | None = None,
        *,
        phase: str | int | Sequence[str | int] | None = None,
        token_ids: npt.ArrayLike | None = None,
        is_padding: npt.ArrayLike | None = None,
        num_prompt_tokens: int | None = None,
        num_cached_tokens: int | None = None,
        num_expected_tokens: int | None = None,
        zero_rows: ZeroRows = "check",
    ) -> PublishedRoutes:
        """Take routes of some tokens of one request. A call is one step of this source.

        Args:
            request_id: a lowercase ULID (`moe_debugger.new_id`), the same for all calls of a request; None mints one,
                which is in the answer.
            expert_ids: [tokens, layers, k] integers; -1 where a slot reached no expert. A row whose k > 1 slots are all
                equal was never written by the engine: it is "not routed here", never an expert's load.
            positions: [tokens] integers, place of each token in its request, rising.
            weights: [tokens, layers, k] floats as applied, or None.
            phase: "prefill", "decode", "train" or "eval", for all tokens or one for each; None: told by
                `num_prompt_tokens` where that is given, else unknown.
            token_ids: [tokens] ids in the vocabulary; kept at level "routes+tokens".
            is_padding: [tokens] booleans; padded rows are kept and flagged, and never load.
            num_prompt_tokens: tokens of the request's prompt: positions below are prefill, the others decode.
            num_cached_tokens: tokens of the request's start that came from a prefix cache: whatever the arrays hold for
                them was routed by another request, so they are left out and counted as not routed here.
            num_expected_tokens: rows that the arrays must have; others are refused as cut.
            zero_rows: for top-1 models alone: what tokens with expert 0 at every layer are. "check" takes them as
                routed unless they are too many, see docs/engines.md.

        Raises:
            SessionClosedError: the source was closed.
            InvalidInputError: the arrays are zero-filled, cut, out of line or out of range, or the request's id is no
                id; nothing of them is taken, and their decisions are counted as dropped ("capture_error").
        """
        started_ns = time.perf_counter_ns()
        self._check_open()
        with self._lock:
            step = self._step
            self._step += 1
        try:
            name = new_id() if request_id is None else check_id(request_id, "request_id")
            checked = self._checker.check(
                name,
                expert_ids,
                positions,
                weights,
                phase=phase,
                token_ids=token_ids,
                is_padding=is_padding,
                num_prompt_tokens=num_prompt_tokens,
                num_cached_tokens=num_cached_tokens,
                num_expected_tokens=num_expected_tokens,
                zero_rows=zero_rows,
                step=step,
            )
        except InvalidInputError as error:
            check = error.check if isinstance(error, RefusedRoutesError) else "conservation"
            self._refuse(_num_rows(expert_ids) * len(self._checker.layers), _REFUSED, str(error), check)
            raise
        published = self._take(name, checked)
        with self._lock:
            self._busy_ns += time.perf_counter_ns() - started_ns
        return published

    def publish_counts(self, columns: CountsColumns) -> bool:
        """Take sums of tokens whose routes are not known one by one, as dumps have them.

        Args:
            columns: sums for this source's layers; the steps are the caller's.

        Returns:
            False where the buffer was full; the decisions are counted as dropped then.

        Raises:
            SessionClosedError: the source was closed.
            InvalidInputError: a layer is not of this source, its sums are not [E], or they have more slots than its
                tokens have; nothing is taken, and the decisions are counted as dropped.
        """
        self._check_open()
        try:
            check_sums(self._checker.layers, columns)
        except RefusedRoutesError as error:
            self._refuse(columns.num_decisions, _REFUSED, str(error), error.check)
            raise
        is_taken = self._forward(columns)
        with self._lock:
            self._num_calls += 1
            self._num_decisions += columns.num_decisions
            self._checks.counted(sum(int(layer.expert_counts.sum()) for layer in columns.layers), len(columns.layers))
            self._step = max(self._step, columns.last_step + 1)
        return is_taken

    def count_refused(self, num_tokens: int, problem: str = "", *, example: str = "") -> None:
        """Count tokens whose routes cannot be had, as adapters do where an engine returns none.

        Args:
            num_tokens: how many; their decisions at every layer are dropped ("capture_error").
            problem: the kind of fault, shown and counted with the source's health.
            example: what is wrong with these tokens, kept of the first ones; default: `problem`.
        """
        problem = problem or _REFUSED
        self._refuse(num_tokens * len(self._checker.layers), problem, example or problem)

    def _refuse(self, num_decisions: int, problem: str, example: str, check: str = "conservation") -> None:
        with self._lock:
            self._num_calls += 1
            self._num_refused += 1
            self._note(problem, 1)
            self._checks.refused(check, num_decisions // len(self._checker.layers), example)
        self._drop(pb.DROP_REASON_CAPTURE_ERROR, num_decisions)

    def account(self) -> SourceAccount:
        """Return where everything that was pushed went."""
        with self._lock:
            dropped = {reason_name(reason): number for reason, number in sorted(self._dropped.items())}
            if self.publisher is not None:
                num_local = self._dropped.get(pb.DROP_REASON_BUFFER_FULL, 0)
                dropped = dict(self.publisher.statistics().num_dropped)
                dropped |= {"local_buffer_full": num_local} if num_local else {}
            return SourceAccount(
                num_calls=self._num_calls,
                num_refused_calls=self._num_refused,
                num_tokens=self._num_tokens,
                num_decisions=self._num_decisions,
                num_not_routed_tokens=self._num_not_routed,
                num_dropped=dropped,
                problems=dict(self._problems),
            )

    def publisher_statistics(self) -> PublisherStatistics | None:
        """Return the account of the way to the fleet; None for a local source."""
        return None if self.publisher is None else self.publisher.statistics()

    def decisions(self) -> Decisions:
        """Return all kept rows as columns; at level "counts" there are none.

        Raises:
            SessionClosedError: the source was closed.
            InvalidInputError: the source keeps nothing in this process.
        """
        return self._settled().decisions()

    def get_routing_stats(self) -> RoutingStats:
        """Return load per layer; what needs the router's scores is NaN.

        Raises:
            SessionClosedError: the source was closed.
            InvalidInputError: the source keeps nothing in this process.
        """
        return self._settled().routing_stats(self.name)

    def get_expert_metrics(self) -> ExpertMetrics:
        """Return the load of every expert.

        Raises:
            SessionClosedError: the source was closed.
            InvalidInputError: the source keeps nothing in this process.
        """
        return self._settled().expert_metrics(self.name)

    def analyze(self, *, baseline: RoutingState | None = None) -> Analysis:
        """Return metrics and findings of what was pushed so far.

        Raises:
            SessionClosedError: the source was closed.
            InvalidInputError: the source keeps nothing in this process.
        """
        state = self._settled().state()
        return finish(state, thresholds=self._thresholds, baseline=baseline, health=self.capture_health())

    def capture_health(self) -> CaptureHealth:
        """Return how far what was pushed can be trusted; docs/engines.md says what each check means here."""
        account = self.account()
        dropped = dict(account.num_dropped)
        # Refused calls are no decisions of the account; what was taken and dropped later is.
        num_produced = account.num_decisions + dropped.get(reason_name(pb.DROP_REASON_CAPTURE_ERROR), 0)
        with self._lock:
            checks = self._checks.checks(num_produced=num_produced, dropped=dropped)
        return CaptureHealth(num_produced, dropped, problems=tuple(account.problems), checks=checks)

    def flush(self, timeout_s: float = _FLUSH_TIMEOUT_S) -> bool:
        """Wait until all that was pushed is counted, and on the broker where there is a fleet.

        Returns:
            False when the time is up.
        """
        self._check_open()
        deadline = time.monotonic() + timeout_s
        if self._local is not None and not self._local.settle(timeout_s):
            return False
        return self.publisher is None or self.publisher.flush(max(0.0, deadline - time.monotonic()))

    def close(self, *, timeout_s: float = 3.0, ends_session: bool = True, reason: str = "closed") -> None:
        """Publish what waits for at most `timeout_s`, and free the rows; again does nothing.

        Args:
            ends_session: False where another source goes on under the same name (another replica, or a restart).
            reason: shown in the fleet.
        """
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
        if self._local is not None:
            self._local.close(timeout_s)
        if self.publisher is not None:
            self.publisher.stop(timeout_s, closes_session=ends_session, reason=reason)

    def health(self) -> Health:
        """Return what goes into the next status: called on the publisher's thread."""
        now_ns = time.monotonic_ns()
        health = self.capture_health()
        with self._lock:
            before_ns, before_busy_ns = self._status_mark
            self._status_mark = (now_ns, self._busy_ns)
            share = (self._busy_ns - before_busy_ns) / max(1, now_ns - before_ns)
            return Health(
                last_step=max(0, self._step - 1),
                hook_time_share=min(1.0, share),
                is_healthy=health.is_healthy,
                problems=tuple(f"{text} ({number}x)" for text, number in self._problems.items()),
                checks=health.checks,
            )

    def __enter__(self) -> "Source":
        self._check_open()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        where = "local" if self.publisher is None else "streaming"
        state = "closed" if self._is_closed else "open"
        return f"<Source {self.name!r} {state}, {where}, {self._num_tokens} tokens>"

    def _take(self, request_id: str, checked: CheckedRoutes) -> PublishedRoutes:
        columns = checked.columns
        num_decisions = 0 if columns is None else columns.num_decisions
        is_taken = True
        if columns is not None:
            if self.level != "routes+tokens":
                columns.token_id = None
            is_taken = self._forward(columns)
        with self._lock:
            self._num_calls += 1
            self._checks.taken(
                checked.num_tokens,
                checked.problems,
                with_weights=columns is not None and columns.layers[0].gate_weights is not None,
                num_missing_tokens=checked.num_missing_tokens,
                num_missing_layers=checked.num_missing_layers,
            )
            self._num_tokens += checked.num_tokens
            self._num_decisions += num_decisions
            self._num_not_routed += checked.num_not_routed_tokens
            for text, number in checked.problems.items():
                self._note(text, number)
            num_not_routed = self._num_not_routed
        if self.publisher is not None and checked.num_not_routed_tokens:
            self.publisher.set_series({_NOT_ROUTED_SERIES: float(num_not_routed)})
        return PublishedRoutes(
            request_id=request_id,
            num_tokens=checked.num_tokens,
            num_decisions=num_decisions,
            num_not_routed_tokens=checked.num_not_routed_tokens,
            is_taken=is_taken,
            problems=checked.problems,
        )

    def _forward(self, columns: RoutingColumns | CountsColumns) -> bool:
        """Hand columns on; each of local state and fleet has its own bound."""
        is_taken = True
        if self._local is not None and not self._local.offer(columns):
            is_taken = False
            with self._lock:
                reason = int(pb.DROP_REASON_BUFFER_FULL)
                self._dropped[reason] = self._dropped.get(reason, 0) + columns.num_decisions
        if self.publisher is not None:
            is_taken = self.publisher.submit(columns) and is_taken
        return is_taken

    def _fold_failed(self, columns: RoutingColumns | CountsColumns, error: Exception) -> None:
        with self._lock:
            self._note(f"counting failed: {type(error).__name__}: {error}"[:200], 1)
            if self.publisher is None:
                reason = int(pb.DROP_REASON_CAPTURE_ERROR)
                self._dropped[reason] = self._dropped.get(reason, 0) + columns.num_decisions

    def _drop(self, reason: int, num_decisions: int) -> None:
        with self._lock:
            self._dropped[reason] = self._dropped.get(reason, 0) + num_decisions
        if self.publisher is not None:
            self.publisher.count_dropped(reason, num_decisions)

    def _note(self, text: str, number: int) -> None:
        if text in self._problems or len(self._problems) < _MAX_PROBLEM_KINDS:
            self._problems[text] = self._problems.get(text, 0) + number

    def _settled(self) -> LocalRoutes:
        self._check_open()
        if self._local is None:
            raise InvalidInputError(
                f"source {self.name!r} sends its routes to the fleet and keeps none in this process; read the session "
                f"there ({self.session_id}), or open the source with keeps_local=True"
            )
        self._local.settle(_FLUSH_TIMEOUT_S)
        return self._local

    def _check_open(self) -> None:
        if self._is_closed:
            raise SessionClosedError(
                f"source {self.name!r} was closed; open a new one with moe_debugger.open_source(...)"
            )


def _num_rows(expert_ids: Any) -> int:
    """Return how many tokens a refused array says it has."""
    try:
        return len(expert_ids) if getattr(expert_ids, "ndim", 3) == 3 else 0
    except TypeError:
        return 0


def _description(info: LayerInfo) -> pb.LayerDescription:
    return pb.LayerDescription(
        layer_index=info.layer_index,
        model_layer_index=info.model_layer_index,
        module_name=info.module_name,
        stack=info.stack,
        num_experts=info.num_experts,
        top_k=info.top_k,
        num_shared_experts=info.num_shared_experts,
        num_identity_experts=info.num_identity_experts,
        scoring_function=info.scoring_function,
        weight_meaning=info.weight_meaning,
        unavailable_reason=info.unavailable_reason,
        site=info.site,
    )
