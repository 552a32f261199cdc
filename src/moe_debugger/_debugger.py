"""`MoEDebugger`: attaches to a model and captures its routing, locally or for a fleet."""

import dataclasses
import importlib.metadata
import math
import operator
import os
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, Literal, SupportsFloat, get_args
from urllib.parse import urlsplit

from moe_debugger._layers import Layers
from moe_debugger._session import Profile, Session, SessionOptions
from moe_debugger._stats import ExpertMetrics, PerformanceMetrics, RoutingStats
from moe_debugger.analysis import Analysis, Thresholds
from moe_debugger.capture import PHASES, Capture, LayerInfo, RawForward, RequestScope
from moe_debugger.errors import FleetError, InvalidInputError, ModelNotSupportedError, SessionClosedError
from moe_debugger.parallel import (
    ParallelCoordinates,
    detect_coordinates,
    expert_owners,
    is_pipeline_stage,
    layer_numbers,
)
from moe_debugger.publish import Health, Publisher, SourceDescription, redact_url
from moe_debugger.training.optimizer_watch import OptimizerWatch
from moe_debugger.training.step import StepScope
from moe_debugger.v1 import routing_pb2 as pb
from moe_debugger.wire.ids import DEFAULT_TENANT, check_id, check_tenant

if TYPE_CHECKING:
    from torch import nn

    from moe_debugger.profiling import LayerProfile, Peak

__all__ = ["LEVELS", "CaptureLevelName", "MoEDebugger"]

CaptureLevelName = Literal["counts", "routes", "routes+tokens", "full"]
LEVELS: dict[str, int] = {
    "counts": pb.CAPTURE_LEVEL_COUNTS,
    "routes": pb.CAPTURE_LEVEL_ROUTES,
    "routes+tokens": pb.CAPTURE_LEVEL_ROUTES_TOKENS,
    "full": pb.CAPTURE_LEVEL_FULL,
}
_STEP_DOMAINS = {"source": pb.STEP_DOMAIN_SOURCE, "global": pb.STEP_DOMAIN_GLOBAL}
_MIN_BUFFER_BYTES = 64 * 1024
# A step that names no id is a forward; ids of a named source of steps fit 64 bits on the wire.
_MAX_STEP = 2**63


class MoEDebugger:
    """Watches the routing of a Mixture-of-Experts model.

    The model's outputs stay bit-identical. Hooks are installed while a session is open and are gone after `close`::

        debugger = MoEDebugger(model)
        session = debugger.start_session()
        with debugger.profile():
            model.generate(**inputs)
        print(debugger.get_routing_stats())
        debugger.close()

    Args:
        model: a torch module with MoE layers, such as a causal language model of transformers.
        level: what is kept and sent: "counts" (sums per layer and expert), "routes" (ids, weights, router
            statistics), "routes+tokens" (and token ids), "full" (and logits). Routes alone can reveal the text.
        sampling_rate: share of the requests that are captured, 0..1, by a hash of the request's id.
        fleet: NATS URL of a running fleet (the `nats` value of ``moe-debugger up --json``); None stays local.
        session_name: the name of sessions; default: the model's class.
        buffer_bytes: bound on what waits for the capture's thread, and again on what waits for the broker.
        max_rows_bytes: bound on the rows in memory for `Session.decisions`; older ones go to files, counts stay exact.
        max_disk_bytes: bound on those files; past it the oldest rows are dropped and counted. 0 = no files.
        rows_dir: folder for those files; default: the system's temporary directory. They are in a folder of their own
            (mode 0700), which is removed at `close` and at the interpreter's exit.
        thresholds: of `Session.analyze`.
        model_name: shown in the fleet; default: the config's name, else the model's class.
        tenant: whose session it is.
        step_domain: "source": each forward is a step of this process; "global": `step` gives the training step,
            which other ranks share.
        kind: what this process is, shown in the fleet ("library", "worker", "training"...).
        gradients: read the norms of gradients and weights of routers and experts when a `step` block ends, as series.
        profiling: time routers, experts and what lies between them, by layer and expert (`layer_profile`); the page
            of a fleet shows it. Costs more than watching alone, see docs/profiling.md.
        peak: what the machine can do, for the roofline of a profile (`moe_debugger.profiling.measure_peak`).
        coordinates: this rank's place in a sharded model; default: told from torch.distributed and the model's device
            meshes. A replica of a lower rank captures as any other, but sends no decisions to the fleet.

    Raises:
        ModelNotSupportedError: no MoE layer of the model can be read, or it is compiled and `profiling` is asked for.
        AlreadyAttachedError: another debugger watches the model.
        InvalidInputError: an argument has no such value.
    """

    def __init__(
        self,
        model: "nn.Module",
        *,
        level: CaptureLevelName = "routes",
        sampling_rate: float = 1.0,
        fleet: str | None = None,
        session_name: str | None = None,
        buffer_bytes: int = 64 * 1024 * 1024,
        max_rows_bytes: int = 512 * 1024 * 1024,
        max_disk_bytes: int = 4 * 1024**3,
        rows_dir: str | os.PathLike[str] | None = None,
        thresholds: Thresholds | None = None,
        model_name: str | None = None,
        tenant: str = DEFAULT_TENANT,
        step_domain: Literal["source", "global"] = "source",
        kind: str = "library",
        gradients: bool = False,
        profiling: bool = False,
        peak: "Peak | None" = None,
        coordinates: ParallelCoordinates | None = None,
    ) -> None:
        _check_rows(max_disk_bytes, rows_dir)
        _check_arguments(level, sampling_rate, fleet, buffer_bytes, max_rows_bytes, step_domain)
        if profiling:
            from moe_debugger.profiling import refuse_compiled

            refuse_compiled(model)
        self._tenant = check_tenant(tenant)
        self._level = level
        self._fleet = fleet
        self._step_domain = step_domain
        self._kind = kind
        self._reads_gradients = gradients
        self._session: Session | None = None
        self._is_closed = False
        self._session_name = session_name or type(model).__name__
        try:
            self._capture = Capture(model, self._take)
        except ModelNotSupportedError as error:
            if not is_pipeline_stage(model):
                raise
            raise ModelNotSupportedError(
                "this pipeline stage holds no MoE layer that can be read, so there is nothing to watch; attach on the "
                f"other stages only. What was looked at: {error}"
            ) from error
        self._coordinates = detect_coordinates(model) if coordinates is None else coordinates
        self._numbers, owners = self._place(model)
        config = getattr(model, "config", None)
        self._model_type = str(getattr(config, "model_type", "") or "")
        self._model_name = model_name or str(getattr(config, "_name_or_path", "") or "") or type(model).__name__
        self._options = SessionOptions(
            level=LEVELS[level],
            sampling_rate=float(sampling_rate),
            buffer_bytes=buffer_bytes,
            max_rows_bytes=max_rows_bytes,
            max_disk_bytes=max_disk_bytes,
            rows_dir=rows_dir,
            thresholds=thresholds,
            eos_token_ids=_eos_token_ids(model),
            coordinates=self._coordinates,
            layer_numbers=self._numbers,
            expert_owners=owners,
            model_name=self._model_name,
            step_domain=_STEP_DOMAINS[step_domain],
            profiling=profiling,
            peak=peak,
        )

    @property
    def session(self) -> Session | None:
        """The open session, None where there is none."""
        return self._session if self._session is not None and not self._session.is_closed else None

    @property
    def model(self) -> "nn.Module":
        """The model that it watches."""
        return self._capture.model

    @property
    def coordinates(self) -> ParallelCoordinates:
        """This rank's place in a sharded model."""
        return self._coordinates

    def layers(self) -> Layers:
        """Return the model's MoE layers; with a session open, as its forwards confirmed them."""
        session = self.session
        if session is not None:
            return session.layers()
        return Layers(self._known_layers())

    def start_session(self, name: str | None = None, *, wait_s: float = 10.0) -> Session:
        """Install the hooks and start to capture.

        Args:
            name: of the session; a session of that name that is open in the fleet is joined.
            wait_s: with a fleet, how long to wait for its answer; 0 does not wait, and connects in the background.

        Raises:
            SessionClosedError: this debugger was closed.
            InvalidInputError: a session is open already.
            FleetError: the fleet did not answer in `wait_s`, or refused.
            AlreadyAttachedError: another debugger has taken the model meanwhile.
        """
        self._check_open()
        if self.session is not None:
            raise InvalidInputError(
                f"session {self.session.name!r} is open; use debugger.session, or close it first with session.close()"
            )
        name = name or self._session_name
        publisher = self._make_publisher(name) if self._fleet is not None else None
        try:
            self._capture.attach()
        except BaseException:
            if publisher is not None:
                publisher.stop()
            raise
        try:
            session = Session(name, self._capture, self._options, publisher)
        except BaseException:
            # A model that was compiled meanwhile cannot be profiled.
            if publisher is not None:
                publisher.stop()
            self._capture.detach()
            raise
        self._session = session
        if publisher is not None:
            publisher.set_health_source(_health_of(session))
            publisher.start()
            if wait_s > 0:
                try:
                    publisher.wait_for_session(wait_s)
                except FleetError:
                    session.close(timeout_s=0.0, reason="the fleet did not answer")
                    self._session = None
                    raise
        return session

    @contextmanager
    def profile(self, *, layers: bool = False, peak: "Peak | None" = None) -> Iterator[Profile]:
        """Measure what runs inside; starts a session where none is open.

        Args:
            layers: time the parts of the MoE layers as well: `Profile.layers`.
            peak: for the roofline; default: the debugger's.
        """
        session = self.session or self.start_session()
        with session.profile(layers=layers, peak=peak) as profile:
            yield profile

    def layer_profile(self) -> "LayerProfile":
        """Return where the forwards' time went in the open session; see `Session.layer_profile`.

        Raises:
            InvalidInputError: this debugger was made without ``profiling=True``.
            SessionClosedError: no session is open.
        """
        return self._open_session().layer_profile()

    def requests(
        self,
        request_ids: Sequence[str | None],
        *,
        phase: str | Sequence[str] | None = None,
        positions: Sequence[int] | None = None,
    ) -> AbstractContextManager[None]:
        """Name the batch rows of the forwards that this thread runs inside.

        Args:
            request_ids: one for each batch row, a lowercase ULID (`moe_debugger.new_id`); None is a dummy row, which
                is flagged as padding and never counted as load.
            phase: "prefill", "decode", "train" or "eval", for all rows or one for each; default: told from the forward.
            positions: position in its request of each row's first real token; default: position_ids, else the mask.

        Raises:
            InvalidInputError: an id, a phase or a length is wrong.
        """
        ids = tuple(name if name is None else check_id(name, "request id") for name in request_ids)
        phases: tuple[int, ...] | None = None
        if phase is not None:
            names = [phase] * len(ids) if isinstance(phase, str) else list(phase)
            wrong = [name for name in names if name not in PHASES]
            if wrong or len(names) != len(ids):
                raise InvalidInputError(
                    f"phase {phase!r}: expected one of {', '.join(PHASES)}, or a list of {len(ids)} of them"
                )
            phases = tuple(PHASES[name] for name in names)
        starts: tuple[int, ...] | None = None
        if positions is not None:
            starts = tuple(int(position) for position in positions)
            if len(starts) != len(ids) or min(starts, default=0) < 0:
                raise InvalidInputError(f"positions has {len(starts)} values, expected {len(ids)} that are 0 or more")
        return self._capture.scope(RequestScope(ids, phases, starts))

    def step(
        self,
        n: int,
        *,
        loss: SupportsFloat | None = None,
        balance_loss: SupportsFloat | None = None,
        balance_coef: SupportsFloat | None = None,
        lr: SupportsFloat | None = None,
        grad_norm: SupportsFloat | None = None,
        **series: SupportsFloat,
    ) -> StepScope:
        """Say which training step the next forwards belong to, and values of its series.

        Call it before the step's forwards, and again with the same `n` once loss and others are known; or as a block::

            with debugger.step(n) as step:
                loss = model(**batch).loss
                loss.backward()
                step.record(loss=loss, lr=scheduler.get_last_lr()[0])

        Where the debugger was made with ``gradients=True``, they are read at the first `optimizer.step` in the block,
        else when it is left: after backward, and before `zero_grad`. All forwards up to the next call belong to the
        step, so those of gradient accumulation (several blocks of the same `n`, or one around all) and of an evaluation
        after it. A value that is given again for the same step replaces the one before. The first block, or the first
        value, starts a session where none was started, as `profile` does.

        Args:
            n: the global step.
            loss, balance_loss, balance_coef, lr, grad_norm: as defined in docs/training.md. Numbers, or tensors of one
                element, which are read later without waiting for the device.
            series: others by name.

        Raises:
            InvalidInputError: `n` is no integer in 0..2^63, or a value is no number.
        """
        n = _step_number(n)
        self._name_step(n)
        known = {
            "loss": loss,
            "balance_loss": balance_loss,
            "balance_coef": balance_coef,
            "lr": lr,
            "grad_norm": grad_norm,
        }
        self._record_series(n, {**{name: value for name, value in known.items() if value is not None}, **series})
        return StepScope(n, enter=self._enter_step, record=self._record_series, leave=self._leave_step)

    def record_gradients(self) -> None:
        """Read the gradients as they are now, for the current step: for loops that cannot use a `step` block.

        Raises:
            InvalidInputError: the debugger was made without ``gradients=True``, or no step was named.
            SessionClosedError: no session is open.
        """
        step = self._capture.step
        if not self._reads_gradients or step is None:
            raise InvalidInputError(
                "record_gradients() needs MoEDebugger(model, gradients=True), and debugger.step(n) before it"
            )
        self._open_session().record_gradients(step)

    @property
    def reads_gradients(self) -> bool:
        """Whether it was made with ``gradients=True``."""
        return self._reads_gradients

    def _name_step(self, n: int) -> None:
        self._capture.step = n

    def _enter_step(self, n: int) -> OptimizerWatch | None:
        self._start_for_steps()
        self._name_step(n)
        return OptimizerWatch(self.model, lambda: self._leave_step(n)) if self._reads_gradients else None

    def _start_for_steps(self) -> None:
        # A session that was closed stays so: the loop that goes on without one is the caller's choice.
        if self._session is None and not self._is_closed:
            self.start_session()

    def _record_series(self, n: int, series: Mapping[str, Any]) -> None:
        if not series:
            return
        self._start_for_steps()
        session = self.session
        if session is not None:
            session.record_series(n, series)

    def _leave_step(self, n: int) -> None:
        session = self.session
        if session is not None and self._reads_gradients:
            session.record_gradients(n)

    def get_routing_stats(self) -> RoutingStats:
        """Return load and confidence per layer of the open session.

        Raises:
            SessionClosedError: no session is open.
        """
        return self._open_session().get_routing_stats()

    def get_expert_metrics(self) -> ExpertMetrics:
        """Return the load of every expert in the open session.

        Raises:
            SessionClosedError: no session is open.
        """
        return self._open_session().get_expert_metrics()

    def get_performance_metrics(self) -> PerformanceMetrics:
        """Return what ran in the open session and what watching it cost.

        Raises:
            SessionClosedError: no session is open.
        """
        return self._open_session().get_performance_metrics()

    def analyze(self) -> Analysis:
        """Return metrics and findings of the open session, by this debugger's thresholds.

        Raises:
            SessionClosedError: no session is open.
        """
        return self._open_session().analyze()

    def close(self, *, timeout_s: float = 3.0, ends_session: bool = True, reason: str = "closed") -> None:
        """Close the session and leave the model as it was; see `Session.close`. Again does nothing."""
        if self._session is not None:
            self._session.close(timeout_s=timeout_s, ends_session=ends_session, reason=reason)
        self._capture.detach()
        self._is_closed = True

    def __enter__(self) -> "MoEDebugger":
        self._check_open()
        if self.session is None:
            self.start_session()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        where = f"fleet {redact_url(self._fleet)}" if self._fleet else "local"
        state = "closed" if self._is_closed else f"{len(self._capture.discovery.sites)} MoE layers"
        return f"<MoEDebugger of {self._model_name}: {state}, level {self._level}, {where}>"

    def _take(self, raw: RawForward) -> None:
        session = self._session
        if session is not None:
            session.offer(raw)

    def _place(self, model: "nn.Module") -> tuple[dict[int, int], dict[int, tuple[int, ...]]]:
        """Return the layers' indices in the whole model by those in this rank's part, and their experts' owners."""
        infos = [site.info for site in self._capture.discovery.sites]
        numbers = layer_numbers(model, tuple(info.module_name for info in infos), self._coordinates)
        owners = {
            number: expert_owners(model, info.module_name, info.num_experts, self._coordinates)
            for number, info in zip(numbers, infos, strict=True)
        }
        return dict(zip((info.layer_index for info in infos), numbers, strict=True)), owners

    def _known_layers(self) -> tuple[LayerInfo, ...]:
        infos = (site.info for site in self._capture.discovery.sites)
        return tuple(dataclasses.replace(info, layer_index=self._numbers[info.layer_index]) for info in infos)

    def _check_open(self) -> None:
        if self._is_closed:
            raise SessionClosedError("this MoEDebugger was closed; make a new one: MoEDebugger(model)")

    def _open_session(self) -> Session:
        self._check_open()
        session = self.session
        if session is None:
            raise SessionClosedError(
                "no session is open; call debugger.start_session() (or use `with debugger.profile():`) and run the "
                "model first. A closed session's data are freed: read them before close()"
            )
        return session

    def _make_publisher(self, session_name: str) -> Publisher:
        # Recordings are a part of their own, which a debugger without a fleet does not load.
        from moe_debugger.recording.recorder import model_identity

        assert self._fleet is not None
        identity = model_identity(self._capture.model, self._model_name)
        return Publisher(
            self._fleet,
            SourceDescription(
                session_name=session_name,
                model_name=self._model_name,
                model_type=self._model_type,
                model_fingerprint=identity.config_sha256 or "",
                model_class_name=identity.class_name,
                layers=[
                    _description(info, self._options.expert_owners.get(info.layer_index, ()))
                    for info in self._known_layers()
                ],
                level=LEVELS[self._level],
                sampling_rate=self._options.sampling_rate,
                step_domain=_STEP_DOMAINS[self._step_domain],
                kind=self._kind,
                versions=_versions(),
                coordinates=self._coordinates.to_message(),
            ),
            tenant=self._tenant,
            buffer_bytes=self._options.buffer_bytes,
        )


def _step_number(n: object) -> int:
    try:
        number = operator.index(n)  # type: ignore[arg-type]  # whatever is no integer raises
    except TypeError:
        number = -1
    if not 0 <= number < _MAX_STEP:
        raise InvalidInputError(f"step {n!r}: expected an integer from 0 to 2^63 - 1, the global step")
    return number


def _check_arguments(
    level: str, sampling_rate: float, fleet: str | None, buffer_bytes: int, max_rows_bytes: int, step_domain: str
) -> None:
    if level not in LEVELS:
        raise InvalidInputError(f"level {level!r}: expected one of {', '.join(get_args(CaptureLevelName))}")
    if not 0 <= sampling_rate <= 1 or math.isnan(sampling_rate):
        raise InvalidInputError(f"sampling_rate {sampling_rate}: expected a share of the requests, 0 to 1")
    if buffer_bytes < _MIN_BUFFER_BYTES:
        raise InvalidInputError(f"buffer_bytes {buffer_bytes}: expected at least {_MIN_BUFFER_BYTES}")
    if max_rows_bytes < 0:
        raise InvalidInputError(f"max_rows_bytes {max_rows_bytes}: expected 0 or more")
    if step_domain not in _STEP_DOMAINS:
        raise InvalidInputError(f"step_domain {step_domain!r}: expected one of {', '.join(_STEP_DOMAINS)}")
    if fleet is not None:
        parts = urlsplit(fleet)
        if parts.scheme not in ("nats", "tls") or not parts.hostname:
            raise InvalidInputError(
                f"fleet {redact_url(fleet)!r}: expected a NATS URL (nats://user:password@host:port), which is the "
                "`nats` value of `moe-debugger up --json`"
            )


def _check_rows(max_disk_bytes: int, rows_dir: str | os.PathLike[str] | None) -> None:
    if max_disk_bytes < 0:
        raise InvalidInputError(f"max_disk_bytes {max_disk_bytes}: expected 0 or more")
    if rows_dir is not None and not os.path.isdir(rows_dir):
        raise InvalidInputError(f"rows_dir {os.fspath(rows_dir)!r}: expected a folder that is there")


def _description(info: LayerInfo, owners: Sequence[int]) -> pb.LayerDescription:
    return pb.LayerDescription(
        layer_index=info.layer_index,
        model_layer_index=info.model_layer_index,
        module_name=info.module_name,
        stack=info.stack,
        num_experts=info.num_experts,
        top_k=max(1, info.top_k),
        num_shared_experts=info.num_shared_experts,
        num_identity_experts=info.num_identity_experts,
        scoring_function=info.scoring_function,
        weight_meaning=info.weight_meaning,
        unavailable_reason=info.unavailable_reason,
        expert_parallel_ranks=owners,
        site=info.site,
    )


def _versions() -> dict[str, str]:
    versions = {}
    for name in ("moe-debugger", "torch", "transformers", "numpy"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _health_of(session: Session) -> Callable[[], Health]:
    """Return what gives the session's health, without keeping alive a session that everyone has lost."""
    reference = weakref.ref(session)

    def health() -> Health:
        held = reference()
        return Health() if held is None else held.health()

    return health


def _eos_token_ids(model: Any) -> tuple[int, ...]:
    value = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    values = value if isinstance(value, list | tuple) else [value]
    return tuple(item for item in values if isinstance(item, int))
