"""The worker's RPC edge: what one Ray Serve replica does for each call of `WorkerService`."""

import asyncio
import os
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import grpc
import structlog

from moe_debugger.errors import InvalidInputError
from moe_debugger.v1 import collector_pb2 as pb

from ._logging import configure_logging
from ._token import is_authorized
from .engine import (
    DuplicateRequestError,
    EngineClosedError,
    Event,
    Generation,
    GenerationEngine,
    GenerationError,
    QueueFullError,
    Started,
    Token,
)
from .ingress import REFUSAL, guard_replica
from .settings import CollectorSettings

if TYPE_CHECKING:
    from ray.serve.grpc_util import RayServegRPCContext

    from moe_debugger.models import TextTokenizer
    from moe_debugger.profiling import Peak

__all__ = ["MODEL_FAILED", "Worker", "status_of"]

# Details of an INTERNAL error that is the model's own, so that the front can tell it from a replica that died.
MODEL_FAILED = "generation failed: "

_FINISH_REASONS = {"length": pb.FINISH_REASON_LENGTH, "end_of_text": pb.FINISH_REASON_END_OF_TEXT}

_log = structlog.get_logger(__name__)


def status_of(error: Exception) -> tuple[grpc.StatusCode, str]:
    """Return the status code and text that a caller gets for `error`."""
    match error:
        case InvalidInputError():
            return grpc.StatusCode.INVALID_ARGUMENT, str(error)
        case QueueFullError():
            return grpc.StatusCode.RESOURCE_EXHAUSTED, str(error)
        case DuplicateRequestError():
            return grpc.StatusCode.ALREADY_EXISTS, str(error)
        case EngineClosedError():
            return grpc.StatusCode.UNAVAILABLE, str(error)
        case GenerationError():
            return grpc.StatusCode.INTERNAL, MODEL_FAILED + str(error)
    return grpc.StatusCode.INTERNAL, f"{MODEL_FAILED}{type(error).__name__}"


class Worker:
    """Loads the model, attaches the debugger, and generates.

    Method names are those of the RPCs: Ray Serve finds them by name, and gives each call's metadata as `grpc_context`.
    """

    def __init__(self, settings: CollectorSettings) -> None:
        # Nothing leaves this machine: a model that is not here is an error, never a download.
        guard_replica()
        os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"
        from moe_debugger import MoEDebugger
        from moe_debugger.models import load_model

        configure_logging(settings.log_level)
        self._settings = settings
        self._token = settings.fleet_token.get_secret_value()
        loaded = load_model(settings.model, device=settings.device, precision=settings.precision)
        self._model_name, self._model_type = loaded.name, loaded.model_type
        self._tokenizer: TextTokenizer = loaded.tokenizer
        self._debugger = MoEDebugger(
            loaded.model,
            level=settings.level,
            fleet=settings.nats_url.get_secret_value(),
            session_name=settings.session_name,
            sampling_rate=settings.sampling_rate,
            buffer_bytes=settings.buffer_bytes,
            # The fleet keeps the rows; nobody reads them here.
            max_rows_bytes=0,
            model_name=loaded.name,
            tenant=settings.tenant,
            kind="worker",
            profiling=settings.profiling,
            # Before the first request: it waits for the device.
            peak=_peak(loaded.model) if settings.profiling else None,
        )
        # Without waiting: a worker generates while the fleet is away, and its routing is sent when it is back.
        self._session = self._debugger.start_session(wait_s=0)
        self._engine = GenerationEngine(
            loaded.model,
            loaded.tokenizer.encode,
            eos_token_ids=_eos_token_ids(loaded.tokenizer, loaded.model),
            debugger=self._debugger,
            limits=settings.limits,
        )
        _log.info("model_ready", model=loaded.name, model_type=loaded.model_type)

    async def Generate(
        self, request: pb.GenerateRequest, grpc_context: "RayServegRPCContext"
    ) -> AsyncIterator[pb.GenerateResponse]:
        """Stream the text as it is made."""
        self._authorize(grpc_context)
        generation = Generation(
            prompt=request.prompt,
            max_new_tokens=request.max_new_tokens,
            temperature=request.temperature,
            seed=request.seed,
            request_id=request.request_id,
        )
        events = self._engine.generate(generation)
        try:
            async for event in events:
                yield self._response(event)
        except Exception as error:
            code, details = status_of(error)
            if code == grpc.StatusCode.INTERNAL:
                _log.error("generate_failed", request_id=request.request_id, error=repr(error)[:500])
            grpc_context.set_code(code)
            grpc_context.set_details(details)
            raise
        finally:
            # A cancelled call closes this generator; the request must leave the batch now, not when it is collected.
            await events.aclose()

    async def GetWorkerInfo(
        self, request: pb.GetWorkerInfoRequest, grpc_context: "RayServegRPCContext"
    ) -> pb.GetWorkerInfoResponse:
        """Say which model runs here, in which session, and how busy it is."""
        self._authorize(grpc_context)
        statistics, limits = self._engine.statistics(), self._settings.limits
        return pb.GetWorkerInfoResponse(
            model_name=self._model_name,
            model_type=self._model_type,
            session_id=self._session.session_id or "",
            source_id=self._session.source_id or "",
            num_active_requests=statistics.num_active,
            num_waiting_requests=statistics.num_waiting,
            max_prompt_bytes=limits.max_prompt_bytes,
            max_new_tokens=limits.max_new_tokens,
            max_batch_size=limits.max_batch_size,
            num_forwards=statistics.num_forwards,
            num_forward_rows=statistics.num_forward_rows,
        )

    async def drain(self, grace_s: float) -> None:
        """Let what runs end within `grace_s`, end the rest with a message, and say goodbye to the fleet."""
        deadline = asyncio.get_running_loop().time() + grace_s
        self._engine.refuse()
        while asyncio.get_running_loop().time() < deadline:
            statistics = self._engine.statistics()
            if not (statistics.num_active or statistics.num_waiting):
                break
            await asyncio.sleep(0.02)
        await asyncio.to_thread(self._engine.close, 1.0)
        await asyncio.to_thread(self._close_debugger)
        _log.info("drained")

    def __del__(self) -> None:
        # Serve calls this when it stops a replica for a reason of its own.
        if hasattr(self, "_engine"):
            self._engine.close(1.0)
            self._close_debugger()

    def _close_debugger(self) -> None:
        # The session stays open: the worker that comes next joins it.
        self._debugger.close(timeout_s=2.0, ends_session=False, reason="the worker stopped")

    def check_health(self) -> None:
        """Raise if this replica cannot generate any more, so that Serve replaces it."""
        if not self._engine.is_alive:
            raise RuntimeError("the generation thread ended")

    def _authorize(self, grpc_context: "RayServegRPCContext") -> None:
        if not is_authorized(grpc_context.invocation_metadata(), self._token):
            grpc_context.set_code(grpc.StatusCode.UNAUTHENTICATED)
            grpc_context.set_details(REFUSAL)
            raise PermissionError(REFUSAL)

    def _response(self, event: Event) -> pb.GenerateResponse:
        if isinstance(event, Started):
            prompt_tokens = [self._piece(token_id) for token_id in event.prompt_ids]
            session_id = self._session.session_id or ""
            return pb.GenerateResponse(
                started=pb.GenerateStarted(
                    request_id=event.request_id, session_id=session_id, prompt_tokens=prompt_tokens
                )
            )
        if isinstance(event, Token):
            return pb.GenerateResponse(
                token=pb.GeneratedToken(position=event.position, piece=self._piece(event.token_id))
            )
        return pb.GenerateResponse(
            finished=pb.GenerateFinished(
                reason=_FINISH_REASONS[event.reason],
                num_prompt_tokens=event.num_prompt_tokens,
                num_generated_tokens=event.num_generated_tokens,
                duration_s=event.duration_s,
            )
        )

    def _piece(self, token_id: int) -> pb.TokenPiece:
        return pb.TokenPiece(token_id=token_id, text=self._tokenizer.piece(token_id))


def _eos_token_ids(tokenizer: "TextTokenizer", model: Any) -> list[int]:
    ids = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found = set(ids if isinstance(ids, list) else [] if ids is None else [ids])
    if tokenizer.eos_token_id is not None:
        found.add(tokenizer.eos_token_id)
    return sorted(found)


def _peak(model: Any) -> "Peak":
    from moe_debugger.profiling import measure_peak

    parameter = next(model.parameters())
    return measure_peak(parameter.device, parameter.dtype)
