"""What vLLM returns with a request, pushed into a source: thin calls of `moe_debugger.Source.publish_routes`.

vLLM returns the routed experts of a request when it has ended, where it was started with
``enable_return_routed_experts``. Two shapes are documented, both read here (docs/engines.md names the versions):

    whole     ``outputs[i].routed_experts`` [prompt + generated - 1, layers, k]: the last generated token was never fed
              back, so it has no routes. ``routed_experts_prompt_start`` cuts rows off the prompt's start.
    split     ``prompt_routed_experts`` [prompt, layers, k] on the request, ``outputs[i].routed_experts``
              [generated or one fewer, layers, k]; -1 at positions of the prefix cache.

    outputs = llm.generate(prompts, sampling_params)          # enable_return_routed_experts=True
    for output in outputs:
        vllm.publish_output(source, output)
"""

import base64
import binascii
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import numpy.typing as npt

from moe_debugger.engines.arrays import ZeroRows, pick_moe_layers
from moe_debugger.errors import InvalidInputError
from moe_debugger.wire.ids import ID_PATTERN

if TYPE_CHECKING:
    from moe_debugger.source import PublishedRoutes, Source

__all__ = ["decode_routes", "publish_output", "publish_response"]

_NOTHING = (
    "vLLM returned no routed_experts for a finished request: started without enable_return_routed_experts, or the "
    "request was preempted"
)


@dataclass(frozen=True, slots=True)
class _Completion:
    """One sequence: its routes and how many tokens it generated."""

    routes: Any
    num_generated: int
    token_ids: Sequence[int] | None


@dataclass(frozen=True, slots=True)
class _Request:
    """What both ways to ask vLLM say about a request."""

    engine_id: str
    num_prompt: int
    prompt_token_ids: Sequence[int] | None
    prompt_routes: Any
    num_cached: int | None
    completions: Sequence[_Completion]
    is_split: bool


def publish_output(
    source: "Source",
    output: Any,
    *,
    request_ids: Sequence[str | None] | None = None,
    prompt_start: int = 0,
    zero_rows: ZeroRows = "check",
) -> list["PublishedRoutes"]:
    """Push the routes of a finished ``vllm.RequestOutput``.

    Args:
        source: of the model that vLLM serves.
        output: of output kind FINAL_ONLY or CUMULATIVE: with DELTA, the last output has not all token ids. One that is
            not finished is passed over: its routes come with the last one.
        request_ids: one for each completion; None mints one, unless vLLM's own id is one of ours. With ``n > 1`` the
            prompt's rows are taken with the first completion alone, since they are shared.
        prompt_start: ``routed_experts_prompt_start`` of the sampling parameters.
        zero_rows: for top-1 models, see `Source.publish_routes`.

    Returns:
        One answer for each completion that has routes.

    Raises:
        InvalidInputError: an array is not of the documented shape, see `Source.publish_routes`.
    """
    if not output.finished:
        return []
    prompt = output.prompt_token_ids
    if prompt is None:
        _refuse(source, 0, "the output has no prompt_token_ids, so positions cannot be told")
    request = _Request(
        engine_id=str(output.request_id),
        num_prompt=len(prompt),
        prompt_token_ids=prompt,
        prompt_routes=getattr(output, "prompt_routed_experts", None),
        num_cached=_of_prompt(getattr(output, "num_cached_tokens", None), len(prompt)),
        completions=[_Completion(one.routed_experts, len(one.token_ids), one.token_ids) for one in output.outputs],
        is_split=hasattr(output, "prompt_routed_experts"),
    )
    return _publish(source, request, request_ids, prompt_start, zero_rows)


def publish_response(
    source: "Source",
    response: Mapping[str, Any],
    *,
    request_ids: Sequence[str | None] | None = None,
    prompt_start: int = 0,
    zero_rows: ZeroRows = "check",
) -> list["PublishedRoutes"]:
    """Push the routes of a response of vLLM's OpenAI server (``/v1/completions``, ``/v1/chat/completions``).

    Args:
        response: the parsed JSON. With several choices, ask for ``return_token_ids``: without them the number of tokens
            of a choice is not known. How many tokens came from the prefix cache is known where the server runs with
            ``--enable-prompt-tokens-details``.
        request_ids, prompt_start, zero_rows: as in `publish_output`.

    Raises:
        InvalidInputError: the response is no such, or an array is not of the documented shape.
    """
    try:
        usage, choices = response["usage"], response["choices"]
        details = usage.get("prompt_tokens_details") or {}
        completions = []
        for choice in choices:
            token_ids = choice.get("token_ids")
            if token_ids is None and len(choices) > 1:
                raise InvalidInputError(
                    f"the response has {len(choices)} choices without token_ids, so their lengths are not known; ask "
                    "for return_token_ids"
                )
            number = int(usage["completion_tokens"]) if token_ids is None else len(token_ids)
            completions.append(_Completion(choice.get("routed_experts"), number, token_ids))
        request = _Request(
            engine_id=str(response.get("id", "")),
            num_prompt=int(usage["prompt_tokens"]),
            prompt_token_ids=response.get("prompt_token_ids"),
            prompt_routes=response.get("prompt_routed_experts"),
            num_cached=_of_prompt(details.get("cached_tokens"), int(usage["prompt_tokens"])),
            completions=completions,
            is_split="prompt_routed_experts" in response,
        )
    except (KeyError, TypeError, AttributeError) as error:
        _refuse(source, 0, f"the response is no completion of vLLM's OpenAI server ({type(error).__name__}: {error})")
    except InvalidInputError as error:
        _refuse(source, 0, str(error))
    return _publish(source, request, request_ids, prompt_start, zero_rows)


def decode_routes(value: Any) -> npt.NDArray[Any]:
    """Return routes [tokens, layers, k] from what vLLM gives: an array, nested lists, or base64 of an npy file.

    Raises:
        InvalidInputError: it is none of these.
    """
    try:
        if isinstance(value, str):
            data = io.BytesIO(base64.b64decode(value, validate=True))
            array = np.load(data, allow_pickle=False)
        else:
            array = np.asarray(value)
    except (ValueError, TypeError, OSError, EOFError, binascii.Error) as error:
        raise InvalidInputError(
            f"routed_experts cannot be read ({error}); expected an array, nested lists, or base64 of an npy file"
        ) from error
    if not isinstance(array, np.ndarray) or array.ndim != 3 or array.dtype.kind not in "iu":
        shape, dtype = getattr(array, "shape", None), getattr(array, "dtype", type(array).__name__)
        raise InvalidInputError(
            f"routed_experts has shape {shape} and dtype {dtype}; expected integers (tokens, layers, k)"
        )
    return array


def _publish(
    source: "Source",
    request: _Request,
    request_ids: Sequence[str | None] | None,
    prompt_start: int,
    zero_rows: ZeroRows,
) -> list["PublishedRoutes"]:
    if request_ids is not None and len(request_ids) != len(request.completions):
        raise InvalidInputError(f"request_ids has {len(request_ids)} ids for {len(request.completions)} completions")
    if not 0 <= prompt_start <= request.num_prompt:
        raise InvalidInputError(f"prompt_start is {prompt_start}; expected 0 to {request.num_prompt} (the prompt)")
    published = []
    for place, completion in enumerate(request.completions):
        if completion.routes is None:
            source.count_refused(_num_routed(request, completion, place, prompt_start), _NOTHING)
            continue
        start, routes = _rows(source, request, completion, place, prompt_start)
        own_id = request.engine_id if place == 0 and ID_PATTERN.match(request.engine_id) else None
        published.append(
            source.publish_routes(
                own_id if request_ids is None else request_ids[place],
                routes,
                np.arange(start, start + len(routes)),
                token_ids=_token_ids(request, completion, start, len(routes)),
                num_prompt_tokens=request.num_prompt,
                num_cached_tokens=request.num_cached,
                zero_rows=zero_rows,
            )
        )
    return published


def _rows(
    source: "Source", request: _Request, completion: _Completion, place: int, prompt_start: int
) -> tuple[int, npt.NDArray[Any]]:
    """Return the first position and the rows of what this completion adds."""
    num_prompt, num_generated = request.num_prompt, completion.num_generated
    lost = _num_routed(request, completion, place, prompt_start)
    try:
        routes = pick_moe_layers(decode_routes(completion.routes), source.layers(), source.num_model_layers)
        prompt = None
        if request.prompt_routes is not None and place == 0:
            prompt = pick_moe_layers(decode_routes(request.prompt_routes), source.layers(), source.num_model_layers)
    except InvalidInputError as error:
        _refuse(source, lost, str(error))
    if request.is_split and len(routes) <= num_generated < num_prompt - prompt_start + num_generated - 1:
        if len(routes) not in (num_generated - 1, num_generated):
            _refuse(
                source,
                lost,
                f"routed_experts has {len(routes)} rows for {num_generated} generated tokens; expected that many, or "
                "one fewer: it is cut, and which tokens the rows belong to cannot be known",
            )
        if place > 0:
            return num_prompt, routes
        if prompt is None:
            # The prompt's rows are missing, not cached: they were routed, and nobody knows where to.
            source.count_refused(max(0, num_prompt - (request.num_cached or 0)), "vLLM returned no routes of a prompt")
            return num_prompt, routes
        if len(prompt) != num_prompt - prompt_start:
            _refuse(
                source,
                lost,
                f"prompt_routed_experts has {len(prompt)} rows for {num_prompt - prompt_start} tokens of the prompt; "
                "it is cut, or of another request",
            )
        return prompt_start, np.concatenate([prompt, routes.astype(prompt.dtype, copy=False)])
    expected = num_prompt - prompt_start + num_generated - 1
    if len(routes) not in (expected, expected + 1):
        _refuse(
            source,
            lost,
            f"routed_experts has {len(routes)} rows; expected {expected} for {num_prompt} tokens of the prompt (from "
            f"{prompt_start}) and {num_generated} generated ones, the last of which is never fed back. It is cut or "
            "too long, and which tokens the rows belong to cannot be known",
        )
    return (prompt_start, routes) if place == 0 else (num_prompt, routes[num_prompt - prompt_start :])


def _of_prompt(num_cached: int | None, num_prompt: int) -> int | None:
    # A request that was preempted finds its own generated tokens cached: those were routed by nobody else.
    return None if num_cached is None else min(int(num_cached), num_prompt)


def _token_ids(request: _Request, completion: _Completion, start: int, num_rows: int) -> list[int] | None:
    if request.prompt_token_ids is None or completion.token_ids is None:
        return None
    return [*request.prompt_token_ids, *completion.token_ids][start : start + num_rows]


def _num_routed(request: _Request, completion: _Completion, place: int, prompt_start: int) -> int:
    """Return how many tokens of this completion the engine routed, as far as that can be known."""
    known_prompt = max(prompt_start, request.num_cached or 0)
    prompt = request.num_prompt - known_prompt if place == 0 else 0
    return max(0, prompt) + max(0, completion.num_generated - 1)


def _refuse(source: "Source", num_tokens: int, text: str) -> NoReturn:
    source.count_refused(num_tokens, example=text)
    raise InvalidInputError(text)
