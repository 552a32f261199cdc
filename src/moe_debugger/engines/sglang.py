"""What SGLang returns with a request, pushed into a source: a thin call of `moe_debugger.Source.publish_routes`.

SGLang returns the routed experts where the server runs with ``--enable-return-routed-experts`` and the request asks for
``return_routed_experts``: ``meta_info["routed_experts"]`` is base64 of flat little-endian numbers
[prompt + generated - 1, layers, k], int32 unless ``meta_info["routed_experts_dtype"]`` says otherwise. The layer axis
has a place for every layer of the model, dense ones included: open the source with `num_model_layers` and
`model_layer_indices`. Rows of cached tokens hold what the request routed that filled the cache.

    response = engine.generate(prompt, sampling_params, return_routed_experts=True)
    sglang.publish_response(source, response)
"""

import base64
import binascii
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import numpy.typing as npt

from moe_debugger.engines.arrays import ZeroRows, pick_moe_layers
from moe_debugger.errors import InvalidInputError
from moe_debugger.wire.ids import ID_PATTERN

if TYPE_CHECKING:
    from moe_debugger.source import PublishedRoutes, Source

__all__ = ["decode_routes", "publish_response"]

_DTYPES = {"int32": "<i4", "uint16": "<u2", "uint8": "u1"}


def publish_response(
    source: "Source",
    response: Mapping[str, Any],
    *,
    request_id: str | None = None,
    start_len: int = 0,
    prompt_token_ids: Sequence[int] | None = None,
    zero_rows: ZeroRows = "check",
) -> "PublishedRoutes | None":
    """Push the routes of one response of SGLang's ``/generate`` or ``Engine.generate``.

    Args:
        source: of the model that SGLang serves.
        response: with `meta_info`. Of a stream, pass the last one: others are passed over.
        request_id: None mints one, unless SGLang's own id is one of ours.
        start_len: ``routed_experts_start_len`` of the request: rows begin at that position.
        prompt_token_ids: kept with the response's ``output_ids`` at level "routes+tokens".
        zero_rows: for top-1 models, see `Source.publish_routes`.

    Returns:
        None where the response is not the last of its stream, or has no routes (which is counted as dropped).

    Raises:
        InvalidInputError: the response is no such, or an array is not of the documented shape.
    """
    try:
        meta = response["meta_info"]
        if "finish_reason" in meta and meta["finish_reason"] is None:
            return None
        num_prompt, num_generated = int(meta["prompt_tokens"]), int(meta["completion_tokens"])
    except (KeyError, TypeError, ValueError) as error:
        _refuse(source, 0, f"the response is none of SGLang's /generate ({type(error).__name__}: {error})")
    cached = meta.get("cached_tokens")
    # A request that was retracted finds its own generated tokens cached: those were routed by nobody else.
    num_cached = None if cached is None else min(int(cached), num_prompt)
    start_len = int(meta.get("routed_experts_start_len", start_len) or 0)
    expected = num_prompt + num_generated - 1 - start_len
    num_routed = max(0, num_prompt + num_generated - 1 - max(start_len, num_cached or 0))
    routed = meta.get("routed_experts")
    if routed is None:
        source.count_refused(
            num_routed,
            "SGLang returned no routed_experts: the server runs without --enable-return-routed-experts, or the request "
            "did not ask for return_routed_experts",
        )
        return None
    layers = source.layers()
    try:
        array = decode_routes(
            routed,
            source.num_model_layers or len(layers),
            source.top_k,
            dtype=meta.get("routed_experts_dtype") or "int32",
        )
        array = pick_moe_layers(array, layers, source.num_model_layers)
    except InvalidInputError as error:
        _refuse(source, num_routed, str(error))
    if len(array) != expected:
        _refuse(
            source,
            num_routed,
            f"routed_experts has {len(array)} rows; expected {expected} for {num_prompt} tokens of the prompt and "
            f"{num_generated} generated ones, from position {start_len}, the last of which is never fed back. It is "
            "cut or too long, or the source's layers or top_k are not the model's",
        )
    engine_id = str(meta.get("id", ""))
    token_ids = None
    if prompt_token_ids is not None and response.get("output_ids") is not None:
        token_ids = [*prompt_token_ids, *response["output_ids"]][start_len : start_len + expected]
    return source.publish_routes(
        request_id or (engine_id if ID_PATTERN.match(engine_id) else None),
        array,
        np.arange(start_len, start_len + expected),
        token_ids=token_ids,
        num_prompt_tokens=num_prompt,
        num_cached_tokens=num_cached,
        zero_rows=zero_rows,
    )


def decode_routes(value: Any, num_layers: int, top_k: int, *, dtype: str = "int32") -> npt.NDArray[Any]:
    """Return routes [tokens, layers, k] from SGLang's base64 of flat numbers, or from an array.

    Args:
        num_layers: all layers of the model, which SGLang's arrays have a place for.
        dtype: "int32", "uint16" or "uint8", as ``routed_experts_dtype`` says.

    Raises:
        InvalidInputError: it is neither, or its size is no multiple of layers times k.
    """
    if dtype not in _DTYPES:
        raise InvalidInputError(f"routed_experts_dtype is {dtype!r}; expected one of {', '.join(_DTYPES)}")
    if isinstance(value, str | bytes):
        try:
            data = base64.b64decode(value, validate=True)
        except (binascii.Error, ValueError) as error:
            raise InvalidInputError(f"routed_experts is not base64 ({error}); it may be cut") from error
        if len(data) % np.dtype(_DTYPES[dtype]).itemsize:
            raise InvalidInputError(f"routed_experts has {len(data)} bytes, which is no whole number of {dtype}")
        array: npt.NDArray[Any] = np.frombuffer(data, _DTYPES[dtype])
    else:
        array = np.asarray(value)
    if array.dtype.kind not in "iu":
        raise InvalidInputError(f"routed_experts has dtype {array.dtype}; expected integers")
    if array.size % (num_layers * top_k):
        raise InvalidInputError(
            f"routed_experts has {array.size} ids, which is no multiple of {num_layers} layers x {top_k} experts: it "
            "is cut, or the source was opened with other layers; SGLang has a place for every layer of the model, so "
            "open the source with num_model_layers and model_layer_indices"
        )
    return array.reshape(-1, num_layers, top_k)


def _refuse(source: "Source", num_tokens: int, text: str) -> NoReturn:
    source.count_refused(num_tokens, example=text)
    raise InvalidInputError(text)
