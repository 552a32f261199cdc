"""SGLang's responses in the documented shape: flat base64 with a place for every layer of the model."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from unit.engines.conftest import EXPERTS, TOP_K, Truth
from unit.engines.stand_ins import sglang_response

import moe_debugger
from moe_debugger import InvalidInputError, Source
from moe_debugger.engines import sglang

# A model of 5 layers, the first and the fourth of which are dense.
MOE_LAYERS = [1, 2, 4]


@pytest.fixture
def source() -> Iterator[Source]:
    with moe_debugger.open_source(
        num_experts=EXPERTS, top_k=TOP_K, model_layer_indices=MOE_LAYERS, num_model_layers=5, level="routes+tokens"
    ) as source:
        yield source


def whole(routes: "np.ndarray[Any, Any]") -> "np.ndarray[Any, Any]":
    array = np.zeros((len(routes), 5, TOP_K), np.int32)
    array[:, MOE_LAYERS] = routes
    return array


def load(source: Source) -> list[list[int]]:
    return [layer.expert_counts.tolist() for layer in source.get_routing_stats().layers]


@pytest.mark.parametrize("dtype", [None, "int32", "uint16", "uint8"])
def test_routes_of_a_request(source: Source, truth: Truth, dtype: str | None) -> None:
    routes = truth.routes(9)
    response = sglang_response(whole(routes), num_prompt=7, output_ids=[1, 2, 3], dtype=dtype)
    published = sglang.publish_response(source, response, prompt_token_ids=range(7))
    assert published is not None
    assert (published.num_tokens, published.num_not_routed_tokens, dict(published.problems)) == (9, 0, {})
    assert load(source) == truth.expected()
    assert [info.model_layer_index for info in source.layers()] == MOE_LAYERS
    decisions = source.decisions()
    assert decisions.token_id is not None
    assert decisions.token_id[:9].tolist() == [0, 1, 2, 3, 4, 5, 6, 1, 2]


def test_rows_of_cached_tokens_belong_to_the_request_that_filled_the_cache(source: Source, truth: Truth) -> None:
    response = sglang_response(
        whole(truth.routes(9, not_routed=6)), num_prompt=7, output_ids=[1, 2, 3], cached_tokens=6
    )
    published = sglang.publish_response(source, response)
    assert published is not None
    assert (published.num_tokens, published.num_not_routed_tokens) == (3, 6)
    assert load(source) == truth.expected()


def test_generated_tokens_are_no_part_of_a_cached_prefix(source: Source, truth: Truth) -> None:
    routes = whole(truth.routes(9, not_routed=7))
    published = sglang.publish_response(
        source, sglang_response(routes, num_prompt=7, output_ids=[1, 2, 3], cached_tokens=8)
    )
    assert published is not None
    assert (published.num_tokens, published.num_not_routed_tokens) == (2, 7)
    assert load(source) == truth.expected()


@pytest.mark.parametrize("is_in_meta", [True, False])
def test_rows_may_begin_later(source: Source, truth: Truth, is_in_meta: bool) -> None:
    meta: dict[str, Any] = {"routed_experts_start_len": 4} if is_in_meta else {}
    response = sglang_response(whole(truth.routes(5)), num_prompt=7, output_ids=[1, 2, 3], **meta)
    published = sglang.publish_response(source, response, start_len=0 if is_in_meta else 4)
    assert published is not None
    assert published.num_tokens == 5
    assert set(source.decisions().position.tolist()) == {4, 5, 6, 7, 8}
    assert load(source) == truth.expected()


def test_our_own_id_is_kept(source: Source, truth: Truth) -> None:
    request_id = moe_debugger.new_id()
    response = sglang_response(whole(truth.routes(9)), num_prompt=7, output_ids=[1, 2, 3], id=request_id)
    published = sglang.publish_response(source, response)
    assert published is not None
    assert published.request_id == request_id


def test_other_responses_of_a_stream_are_passed_over(source: Source, truth: Truth) -> None:
    response = sglang_response(whole(truth.routes(9)), num_prompt=7, output_ids=[1, 2, 3], finish_reason=None)
    assert sglang.publish_response(source, response) is None
    assert source.account().num_calls == 0


def test_a_response_without_routes_is_lost_and_said(source: Source) -> None:
    assert sglang.publish_response(source, sglang_response(None, num_prompt=7, output_ids=[1, 2, 3])) is None
    account = source.account()
    assert account.num_dropped == {"capture_error": 9 * 3}
    assert any("--enable-return-routed-experts" in text for text in account.problems)


@pytest.mark.parametrize(
    ("response", "text"),
    [
        ({}, "none of SGLang's /generate"),
        ({"meta_info": {"prompt_tokens": 3}}, "none of SGLang's /generate"),
        (sglang_response(whole(Truth().routes(8)), num_prompt=7, output_ids=[1, 2, 3]), "has 8 rows; expected 9"),
        (sglang_response(Truth().routes(9), num_prompt=7, output_ids=[1, 2, 3]), "no multiple of 5 layers x 2"),
        (sglang_response(np.zeros((9, 5, 2)), num_prompt=7, output_ids=[1, 2, 3]), "none of the 9 tokens"),
        (
            sglang_response(None, num_prompt=7, output_ids=[1, 2, 3], routed_experts="AAA"),
            "is not base64",
        ),
        (
            sglang_response(None, num_prompt=7, output_ids=[1, 2, 3], routed_experts="AAAA"),
            "3 bytes, which is no whole number of int32",
        ),
        (
            sglang_response(
                whole(Truth().routes(9)), num_prompt=7, output_ids=[1, 2, 3], routed_experts_dtype="float32"
            ),
            "routed_experts_dtype is 'float32'",
        ),
    ],
)
def test_other_shapes_are_refused(source: Source, response: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidInputError, match=text):
        sglang.publish_response(source, response)
    assert load(source) == [[0] * EXPERTS] * 3
    assert source.account().num_refused_calls == 1
