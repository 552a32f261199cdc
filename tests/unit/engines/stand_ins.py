"""What vLLM and SGLang hand out, in the documented shapes, around routes of the test's own."""

import base64
import io
from dataclasses import dataclass, field
from typing import Any

import numpy as np

__all__ = ["Completion", "Output", "SplitOutput", "npy", "sglang_response"]


@dataclass
class Completion:
    """`vllm.CompletionOutput`, as far as it concerns routes."""

    token_ids: list[int]
    routed_experts: Any = None
    index: int = 0


@dataclass
class Output:
    """`vllm.RequestOutput` where the routes of a sequence are one array."""

    prompt_token_ids: list[int] | None
    outputs: list[Completion]
    request_id: str = "0"
    finished: bool = True
    num_cached_tokens: int | None = None


@dataclass
class SplitOutput(Output):
    """`vllm.RequestOutput` where the prompt's routes stand on the request."""

    prompt_routed_experts: Any = field(default=None, kw_only=True)


def npy(array: "np.ndarray[Any, Any]") -> str:
    """Return what vLLM's OpenAI server sends: base64 of an npy file."""
    data = io.BytesIO()
    np.save(data, array, allow_pickle=False)
    return base64.b64encode(data.getvalue()).decode()


def sglang_response(
    routes: "np.ndarray[Any, Any] | None",
    *,
    num_prompt: int,
    output_ids: list[int],
    cached_tokens: int = 0,
    dtype: str | None = None,
    **meta: Any,
) -> dict[str, Any]:
    """Return a response of SGLang's /generate."""
    meta_info: dict[str, Any] = {
        "id": "5b0a",
        "finish_reason": {"type": "length", "length": len(output_ids)},
        "prompt_tokens": num_prompt,
        "completion_tokens": len(output_ids),
        "cached_tokens": cached_tokens,
        **meta,
    }
    if routes is not None:
        meta_info["routed_experts"] = base64.b64encode(routes.astype(dtype or "int32").tobytes()).decode()
    if dtype is not None:
        meta_info["routed_experts_dtype"] = dtype
    return {"text": "…", "output_ids": output_ids, "meta_info": meta_info}
