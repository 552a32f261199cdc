"""Continuous batching over a causal language model of transformers, with every forward named to the debugger.

One worker thread owns the model. Requests join between two steps: their prompt is run in a prefill forward of its own,
then their cache rows are put beside those that decode already. They leave when they are finished or cancelled. A
generated token is fed to the model only when the next one is wanted, so a request's routed tokens are
``prompt + generated - 1``.
"""

import asyncio
import contextlib
import math
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

import structlog

from moe_debugger.errors import InvalidInputError, ModelNotSupportedError, MoEDebuggerError
from moe_debugger.wire.ids import check_id, new_id

from ._kv_batch import KVBatch, new_cache

if TYPE_CHECKING:
    import torch
    from transformers import DynamicCache

__all__ = [
    "DuplicateRequestError",
    "EngineClosedError",
    "EngineStatistics",
    "Finished",
    "Generation",
    "GenerationEngine",
    "GenerationError",
    "Limits",
    "QueueFullError",
    "RequestNamer",
    "Started",
    "Token",
]

# Tokens of one prefill forward, padding included. It bounds the attention mask (chunk x cached positions) and the time
# for which those who decode already have to wait.
PREFILL_CHUNK_TOKENS = 1024
# Layer types whose cache is keys and values by position, which is what rows can be merged of.
_POSITIONAL_LAYER_TYPES = {"full_attention", "sliding_attention", "chunked_attention"}

_log = structlog.get_logger(__name__)


class QueueFullError(MoEDebuggerError):
    """Too many requests wait already."""


class DuplicateRequestError(MoEDebuggerError):
    """A request with that id is being generated already."""


class EngineClosedError(MoEDebuggerError):
    """The engine takes no more requests."""


class GenerationError(MoEDebuggerError):
    """The model failed while it generated."""


class RequestNamer(Protocol):
    """The part of `MoEDebugger` that the engine uses."""

    def requests(
        self, request_ids: Sequence[str | None], *, phase: str | None = None
    ) -> AbstractContextManager[object]:
        """Name the batch rows of the forwards that run inside."""
        ...


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds on what one caller, and all together, may ask for."""

    max_batch_size: int = 8
    max_new_tokens: int = 512
    max_prompt_bytes: int = 65536
    max_waiting: int = 64


@dataclass(frozen=True, slots=True)
class Generation:
    """What a caller asks for. Zero `max_new_tokens` means the engine's limit, zero `temperature` greedy."""

    prompt: str
    max_new_tokens: int = 0
    temperature: float = 0.0
    seed: int = 0
    request_id: str = ""


@dataclass(frozen=True, slots=True)
class Started:
    """The request was taken; it may still wait for its prefill."""

    request_id: str
    prompt_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Token:
    """A generated token and its position in the request; the prompt's tokens come first."""

    position: int
    token_id: int


@dataclass(frozen=True, slots=True)
class Finished:
    """The request is complete."""

    reason: Literal["length", "end_of_text"]
    num_prompt_tokens: int
    num_generated_tokens: int
    duration_s: float


Event = Started | Token | Finished


@dataclass(frozen=True, slots=True)
class EngineStatistics:
    """A snapshot of what runs, and of what was run since the start."""

    num_active: int
    num_waiting: int
    num_forwards: int
    num_forward_rows: int


@dataclass(slots=True, eq=False)
class _Request:
    request_id: str
    prompt_ids: tuple[int, ...]
    max_new_tokens: int
    temperature: float
    generator: "torch.Generator | None"
    # Called from the worker thread; hands the event over to the caller's loop.
    emit: Callable[[Event | BaseException], None]
    started_at: float
    generated: list[int] = field(default_factory=list)
    is_cancelled: bool = False


class GenerationEngine:
    """Generates for several requests at once.

    Args:
        model: a causal language model of transformers, in eval mode.
        encode: text to token ids.
        eos_token_ids: ids that end a text.
        debugger: what the forwards are named to; None runs the model alone.
        limits: see `Limits`.

    Raises:
        ModelNotSupportedError: the model's cache is not made of keys and values by position.
    """

    def __init__(
        self,
        model: Any,
        encode: Callable[[str], list[int]],
        *,
        eos_token_ids: Sequence[int] = (),
        debugger: RequestNamer | None = None,
        limits: Limits | None = None,
    ) -> None:
        _check_cache_is_positional(model)
        self._model = model
        self._encode = encode
        self._eos_token_ids = frozenset(eos_token_ids)
        self._debugger = debugger
        self.limits = limits or Limits()
        self._forward_options = _forward_options(model)
        self._max_positions: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self._condition = threading.Condition()
        self._waiting: deque[_Request] = deque()
        self._joining: list[_Request] = []
        self._known: dict[str, _Request] = {}
        self._is_refusing = False
        self._is_closed = False
        self._running: list[_Request] = []
        self._batch = KVBatch()
        self._num_forwards = 0
        self._num_forward_rows = 0
        self._thread = threading.Thread(target=self._run, name="moe-engine", daemon=True)
        self._thread.start()

    async def generate(self, generation: Generation) -> AsyncGenerator[Event, None]:
        """Yield `Started`, a `Token` for each generated token, and `Finished`.

        Closing the iterator (or cancelling its task) takes the request out of the batch at the next step.

        Raises:
            InvalidInputError: a value is out of its limit; the text names both.
            DuplicateRequestError: that request id is being generated already.
            QueueFullError: `max_waiting` requests wait.
            EngineClosedError: the engine was closed, before or meanwhile.
            GenerationError: the model failed.
        """
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Event | BaseException] = asyncio.Queue()

        def emit(event: Event | BaseException) -> None:
            # The caller's loop may be gone when a service stops.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(events.put_nowait, event)

        request = self._admit(generation, emit)
        try:
            yield Started(request.request_id, request.prompt_ids)
            while True:
                event = await events.get()
                if isinstance(event, BaseException):
                    raise event
                yield event
                if isinstance(event, Finished):
                    return
        finally:
            self._withdraw(request)

    def statistics(self) -> EngineStatistics:
        """Return what runs now, and the forwards that were run."""
        with self._condition:
            num_active = len(self._running) + len(self._joining)
            return EngineStatistics(num_active, len(self._waiting), self._num_forwards, self._num_forward_rows)

    @property
    def is_alive(self) -> bool:
        """Whether the worker thread runs."""
        return self._thread.is_alive()

    def refuse(self) -> None:
        """Take no more requests; those that are here go on."""
        with self._condition:
            self._is_refusing = True

    def close(self, timeout_s: float = 5.0) -> None:
        """End all requests with `EngineClosedError` and stop the worker thread."""
        with self._condition:
            self._is_closed = True
            self._condition.notify_all()
        if self._thread is not threading.current_thread():
            self._thread.join(timeout_s)

    # -- the caller's side -----------------------------------------------------------------------------------------

    def _admit(self, generation: Generation, emit: Callable[[Event | BaseException], None]) -> _Request:
        request = self._checked(generation, emit)
        with self._condition:
            if self._is_closed or self._is_refusing:
                raise EngineClosedError("the worker is stopping; send the request again when it is back")
            if len(self._waiting) >= self.limits.max_waiting:
                raise QueueFullError(
                    f"{len(self._waiting)} requests wait already (limit {self.limits.max_waiting}); try again later"
                )
            if request.request_id in self._known:
                raise DuplicateRequestError(f"request {request.request_id} is being generated already; use a new id")
            self._known[request.request_id] = request
            self._waiting.append(request)
            self._condition.notify_all()
        return request

    def _checked(self, generation: Generation, emit: Callable[[Event | BaseException], None]) -> _Request:
        import torch

        limits = self.limits
        num_bytes = len(generation.prompt.encode("utf-8", "surrogatepass"))
        if num_bytes > limits.max_prompt_bytes:
            raise InvalidInputError(
                f"prompt has {num_bytes} bytes, the limit is {limits.max_prompt_bytes}; send a shorter one"
            )
        if not 0 <= generation.max_new_tokens <= limits.max_new_tokens:
            raise InvalidInputError(
                f"max_new_tokens is {generation.max_new_tokens}, expected 1 to {limits.max_new_tokens}, "
                "or 0 for the worker's default"
            )
        if not (math.isfinite(generation.temperature) and generation.temperature >= 0):
            raise InvalidInputError(f"temperature is {generation.temperature}, expected 0 (greedy) or more")
        if not 0 <= generation.seed < 1 << 64:
            raise InvalidInputError(f"seed is {generation.seed}, expected 0 to 2**64 - 1")
        request_id = check_id(generation.request_id, "request_id") if generation.request_id else new_id()
        prompt_ids = tuple(self._encode(generation.prompt))
        if not prompt_ids:
            raise InvalidInputError("prompt is empty; send at least one character")
        room = limits.max_new_tokens if self._max_positions is None else self._max_positions - len(prompt_ids)
        if room < max(1, generation.max_new_tokens):
            raise InvalidInputError(
                f"prompt has {len(prompt_ids)} tokens and max_new_tokens is {generation.max_new_tokens}, the model has "
                f"{self._max_positions} positions; shorten one of them"
            )
        generator = None
        if generation.temperature > 0:
            # On the CPU and one for each request: the same seed gives the same text, whoever shares the batch.
            generator = torch.Generator(device="cpu").manual_seed(generation.seed)
        return _Request(
            request_id=request_id,
            prompt_ids=prompt_ids,
            max_new_tokens=generation.max_new_tokens or min(limits.max_new_tokens, room),
            temperature=generation.temperature,
            generator=generator,
            emit=emit,
            started_at=time.monotonic(),
        )

    def _withdraw(self, request: _Request) -> None:
        with self._condition:
            request.is_cancelled = True
            if request in self._waiting:
                self._waiting.remove(request)
            # In the batch its id stays taken until the worker thread has removed its row.
            if request not in self._running and request not in self._joining:
                self._forget(request)

    def _forget(self, request: _Request) -> None:
        if self._known.get(request.request_id) is request:
            del self._known[request.request_id]

    # -- the worker thread -----------------------------------------------------------------------------------------

    def _run(self) -> None:
        import torch

        with torch.inference_mode():
            while True:
                with self._condition:
                    while not (self._waiting or self._running or self._is_closed):
                        self._condition.wait()
                    if self._is_closed:
                        break
                self._step()
        error = EngineClosedError("the worker stopped during generation; send the request again when it is back")
        with self._condition:
            unfinished = [*self._running, *self._waiting]
            self._running, self._batch = [], KVBatch()
            self._waiting.clear()
            self._known.clear()
        for request in unfinished:
            request.emit(error)

    def _step(self) -> None:
        self._drop_cancelled()  # first, so that those who wait find room
        try:
            self._prefill_waiting()
        except Exception as error:  # noqa: BLE001 - whatever a model raises must end only the requests concerned
            self._fail(self._joining, error)
        finally:
            self._joining = []
        self._decode_running()

    def _decode_running(self) -> None:
        self._drop_cancelled()
        if self._running:
            try:
                self._decode()
            except Exception as error:  # noqa: BLE001
                self._fail(self._running, error)

    def _fail(self, requests: list[_Request], error: Exception) -> None:
        failure = GenerationError(f"the model failed: {type(error).__name__}: {str(error)[:300]}")
        failed = list(requests)
        with self._condition:
            if requests is self._running:
                self._running, self._batch = [], KVBatch()
            for request in failed:
                self._forget(request)
        for request in failed:
            request.emit(failure)
        # Last: whoever waits has the answer, whatever becomes of the log.
        _log.error("forward_failed", num_requests=len(failed), error=repr(error)[:500])

    def _drop_cancelled(self) -> None:
        if not any(request.is_cancelled for request in self._running):
            return
        self._keep([row for row, request in enumerate(self._running) if not request.is_cancelled])

    def _keep(self, rows: list[int]) -> None:
        with self._condition:
            kept = [self._running[row] for row in rows]
            for request in self._running:
                if request not in kept:
                    self._forget(request)
            self._running = kept
        self._batch.keep(rows)

    def _take_group(self) -> list[_Request]:
        """Take waiting requests for one prefill: as many as fit into the batch and the chunk when padded."""
        group: list[_Request] = []
        with self._condition:
            width = 0
            while self._waiting and len(self._running) + len(group) < self.limits.max_batch_size:
                width = max(width, len(self._waiting[0].prompt_ids))
                if group and width * (len(group) + 1) > PREFILL_CHUNK_TOKENS:
                    break
                group.append(self._waiting.popleft())
            self._joining = group
        return group

    def _prefill_waiting(self) -> None:
        group = self._take_group()
        if not group:
            return
        import torch

        lengths = [len(request.prompt_ids) for request in group]
        width = max(lengths)
        device = self._model.device
        ids = torch.zeros((len(group), width), dtype=torch.long)
        for row, request in enumerate(group):
            ids[row, width - lengths[row] :] = torch.tensor(request.prompt_ids)
        padding = torch.tensor([width - length for length in lengths]).unsqueeze(1)
        columns = torch.arange(width).unsqueeze(0)
        mask = (columns >= padding).long().to(device)
        positions = (columns - padding).clamp(min=0).to(device)
        ids = ids.to(device)
        cache = new_cache()
        logits = torch.empty(0)
        # Only a request that is alone is longer than a chunk, so no chunk is padding from end to end.
        for start in range(0, width, PREFILL_CHUNK_TOKENS):
            if start and self._must_give_up(group):
                return
            chunk = slice(start, min(width, start + PREFILL_CHUNK_TOKENS))
            logits = self._forward(group, "prefill", ids[:, chunk], mask[:, : chunk.stop], positions[:, chunk], cache)
            if start + PREFILL_CHUNK_TOKENS < width:
                self._decode_running()
        self._batch.join(cache, lengths)
        with self._condition:
            first_row = len(self._running)
            self._running = [*self._running, *group]
            self._joining = []
        self._accept(logits, first_row)

    def _must_give_up(self, group: list[_Request]) -> bool:
        with self._condition:
            if self._is_closed:
                self._waiting.extendleft(reversed(group))  # so that `_run` tells them
                return True
            if all(request.is_cancelled for request in group):
                for request in group:
                    self._forget(request)
                return True
        return False

    def _decode(self) -> None:
        import torch

        device = self._model.device
        ids = torch.tensor([[request.generated[-1]] for request in self._running], device=device)
        positions = torch.tensor([[length] for length in self._batch.lengths], device=device)
        mask = self._batch.attention_mask(1, device)
        logits = self._forward(self._running, "decode", ids, mask, positions, self._batch.cache)
        self._batch.appended(1)
        self._accept(logits, 0)

    def _forward(
        self,
        requests: list[_Request],
        phase: Literal["prefill", "decode"],
        ids: "torch.Tensor",
        mask: "torch.Tensor",
        positions: "torch.Tensor",
        cache: "DynamicCache",
    ) -> "torch.Tensor":
        """Run the model; return the logits behind each row's last token, [rows, vocabulary]."""
        named: AbstractContextManager[object] = contextlib.nullcontext()
        if self._debugger is not None:
            named = self._debugger.requests([request.request_id for request in requests], phase=phase)
        with named:
            output = self._model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                **self._forward_options,
            )
        with self._condition:
            self._num_forwards += 1
            self._num_forward_rows += len(requests)
        logits: torch.Tensor = output.logits[:, -1, :]
        return logits

    def _accept(self, logits: "torch.Tensor", first_row: int) -> None:
        """Choose the next token of the rows from `first_row` on, tell their callers, and let the finished ones go."""
        chosen: list[int] = logits.argmax(dim=-1).tolist()
        kept = list(range(first_row))
        events: list[tuple[_Request, Event | GenerationError]] = []
        for offset, token_id in enumerate(chosen):
            request = self._running[first_row + offset]
            if request.generator is not None:
                try:
                    token_id = _sample(logits[offset], request.temperature, request.generator)
                except RuntimeError as error:  # logits that are not finite; the other rows go on
                    events.append((request, GenerationError(f"sampling failed: {error}")))
                    continue
            request.generated.append(token_id)
            position = len(request.prompt_ids) + len(request.generated) - 1
            events.append((request, Token(position, token_id)))
            is_end = token_id in self._eos_token_ids
            if is_end or len(request.generated) >= request.max_new_tokens:
                duration_s = time.monotonic() - request.started_at
                counts = (len(request.prompt_ids), len(request.generated))
                events.append((request, Finished("end_of_text" if is_end else "length", *counts, duration_s)))
            elif not request.is_cancelled:
                kept.append(first_row + offset)
        if len(kept) < len(self._running):
            self._keep(kept)
        # After the batch was updated: who sees `Finished` can ask for the same request id again.
        for request, event in events:
            request.emit(event)


def _sample(logits: "torch.Tensor", temperature: float, generator: "torch.Generator") -> int:
    import torch

    # In float64 on the CPU, so that rounding by the batch's shape moves as few draws as possible.
    probabilities = torch.softmax(logits.double().cpu() / temperature, dim=-1)
    return int(torch.multinomial(probabilities, 1, generator=generator).item())


def _check_cache_is_positional(model: Any) -> None:
    layer_types = set(getattr(model.config.get_text_config(), "layer_types", None) or ())
    others = sorted(layer_types - _POSITIONAL_LAYER_TYPES)
    if others:
        raise ModelNotSupportedError(
            f"{type(model).__name__} has layers of type {', '.join(others)}; this worker batches models whose cache is "
            "keys and values only. Run it with model.generate() under MoEDebugger.profile() instead"
        )


def _forward_options(model: Any) -> dict[str, Any]:
    """Options that spare work where the model knows them: logits of one position, no auxiliary loss."""
    import inspect

    parameters = inspect.signature(model.forward).parameters
    wanted: dict[str, Any] = {"logits_to_keep": 1, "output_router_logits": False}
    return {name: value for name, value in wanted.items() if name in parameters}
