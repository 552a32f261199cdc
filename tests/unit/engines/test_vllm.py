"""vLLM's outputs in every documented shape: the load is that of the routes, and what cannot be told is refused."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from unit.engines.conftest import EXPERTS, LAYERS, TOP_K, Truth
from unit.engines.stand_ins import Completion, Output, SplitOutput, npy

import moe_debugger
from moe_debugger import InvalidInputError, Source
from moe_debugger.engines import vllm
from moe_debugger.v1 import routing_pb2 as pb

PROMPT = list(range(100, 107))


@pytest.fixture
def source() -> Iterator[Source]:
    with moe_debugger.open_source(num_layers=LAYERS, num_experts=EXPERTS, top_k=TOP_K, level="routes+tokens") as source:
        yield source


def load(source: Source) -> list[list[int]]:
    return [layer.expert_counts.tolist() for layer in source.get_routing_stats().layers]


def test_routes_of_a_whole_sequence(source: Source, truth: Truth) -> None:
    # 7 tokens of the prompt and 3 generated: the last one was never fed back.
    routes = truth.routes(9).astype(np.uint8)
    (published,) = vllm.publish_output(source, Output(PROMPT, [Completion([7, 8, 9], routes)]))
    assert (published.num_tokens, published.num_not_routed_tokens) == (9, 0)
    assert load(source) == truth.expected()
    decisions = source.decisions()
    rows = decisions.layer_index == 2
    assert decisions.position[rows].tolist() == list(range(9))
    assert decisions.phase[rows].tolist() == [pb.PHASE_PREFILL] * 7 + [pb.PHASE_DECODE] * 2
    assert decisions.token_id is not None
    assert decisions.token_id[rows].tolist() == [*PROMPT, 7, 8]
    assert np.array_equal(decisions.expert_ids[rows], routes[:, 2])


def test_cached_tokens_are_left_out(source: Source, truth: Truth) -> None:
    routes = truth.routes(9, not_routed=5)
    (published,) = vllm.publish_output(source, Output(PROMPT, [Completion([7, 8, 9], routes)], num_cached_tokens=5))
    assert (published.num_tokens, published.num_not_routed_tokens) == (4, 5)
    assert load(source) == truth.expected()


def test_generated_tokens_are_no_part_of_a_cached_prefix(source: Source, truth: Truth) -> None:
    # As after a preemption: the request's own tokens are in the cache when it goes on.
    routes = truth.routes(9, not_routed=7)
    (published,) = vllm.publish_output(source, Output(PROMPT, [Completion([7, 8, 9], routes)], num_cached_tokens=8))
    assert (published.num_tokens, published.num_not_routed_tokens) == (2, 7)
    assert load(source) == truth.expected()


@pytest.mark.parametrize("extra", [0, 1], ids=["one row fewer than generated", "one row for each generated"])
def test_routes_split_into_prompt_and_generated(source: Source, truth: Truth, extra: int) -> None:
    prompt = truth.routes(7, not_routed=4).astype(np.int16)
    prompt[:4] = -1
    generated = truth.routes(2 + extra).astype(np.int16)
    output = SplitOutput(PROMPT, [Completion([7, 8, 9], generated)], num_cached_tokens=4, prompt_routed_experts=prompt)
    (published,) = vllm.publish_output(source, output)
    assert (published.num_tokens, published.num_not_routed_tokens) == (5 + extra, 4)
    assert load(source) == truth.expected()
    assert set(source.decisions().position.tolist()) == set(range(4, 9 + extra))


def test_a_prompt_without_routes_is_counted_as_lost(source: Source, truth: Truth) -> None:
    output = SplitOutput(PROMPT, [Completion([7, 8, 9], truth.routes(3))], num_cached_tokens=2)
    (published,) = vllm.publish_output(source, output)
    assert published.num_tokens == 3
    assert source.account().num_dropped == {"capture_error": 5 * LAYERS}
    assert load(source) == truth.expected()


def test_of_several_completions_the_prompt_counts_once(source: Source, truth: Truth) -> None:
    shared = truth.routes(7)
    first, second = truth.routes(2), truth.routes(3)
    completions = [
        Completion([1, 2, 3], np.concatenate([shared, first])),
        Completion([4, 5, 6, 7], np.concatenate([shared, second]), 1),
    ]
    ids = [moe_debugger.new_id(), None]
    published = vllm.publish_output(source, Output(PROMPT, completions), request_ids=ids)
    assert [one.num_tokens for one in published] == [9, 3]
    assert published[0].request_id == ids[0]
    assert published[1].request_id != ids[0]
    assert load(source) == truth.expected()
    with pytest.raises(InvalidInputError, match="1 ids for 2 completions"):
        vllm.publish_output(source, Output(PROMPT, completions), request_ids=ids[:1])


def test_rows_may_begin_inside_the_prompt(source: Source, truth: Truth) -> None:
    (published,) = vllm.publish_output(source, Output(PROMPT, [Completion([7, 8], truth.routes(5))]), prompt_start=3)
    assert published.num_tokens == 5
    assert load(source) == truth.expected()
    assert set(source.decisions().position.tolist()) == {3, 4, 5, 6, 7}


def test_an_array_with_a_place_for_every_layer_gives_the_moe_layers(truth: Truth) -> None:
    with moe_debugger.open_source(
        num_experts=EXPERTS, top_k=TOP_K, model_layer_indices=[1, 2, 4], num_model_layers=5
    ) as source:
        whole = np.zeros((9, 5, TOP_K), np.int32)
        whole[:, [1, 2, 4]] = truth.routes(9)
        vllm.publish_output(source, Output(PROMPT, [Completion([7, 8, 9], whole)]))
        assert load(source) == truth.expected()
        whole[3, 3] = [2, 1]
        with pytest.raises(InvalidInputError, match="layer 3 of the model has routes"):
            vllm.publish_output(source, Output(PROMPT, [Completion([7, 8, 9], whole)]))
        with pytest.raises(InvalidInputError, match="3 MoE layers of 5 layers"):
            vllm.publish_output(source, Output(PROMPT, [Completion([7, 8, 9], whole[:, :4])]))
        assert source.account().num_dropped == {"capture_error": 2 * 9 * LAYERS}
        assert load(source) == truth.expected()


def test_what_is_not_finished_is_passed_over(source: Source) -> None:
    output = Output(PROMPT, [Completion([7], None)], finished=False)
    assert vllm.publish_output(source, output) == []
    assert source.account().num_calls == 0


def test_a_finished_request_without_routes_is_lost_and_said(source: Source) -> None:
    assert vllm.publish_output(source, Output(PROMPT, [Completion([7, 8, 9])], num_cached_tokens=3)) == []
    account = source.account()
    assert account.num_dropped == {"capture_error": (9 - 3) * LAYERS}
    assert any("enable_return_routed_experts" in text for text in account.problems)
    assert not source.health().is_healthy


@pytest.mark.parametrize(
    ("output", "text"),
    [
        (Output(PROMPT, [Completion([7, 8, 9], Truth().routes(8))]), "has 8 rows; expected 9"),
        (Output(PROMPT, [Completion([7, 8, 9], Truth().routes(11))]), "has 11 rows; expected 9"),
        (Output(PROMPT, [Completion([7, 8, 9], Truth().routes(2))]), "has 2 rows; expected 9"),
        (Output(PROMPT, [Completion([7, 8, 9], Truth(layers=4).routes(9))]), "3 MoE layers; where the engine"),
        (Output(PROMPT, [Completion([7, 8, 9], Truth(top_k=4).routes(9))]), r"\(9, 3, 4\); expected"),
        (Output(PROMPT, [Completion([7, 8, 9], Truth().routes(9)[0])]), "integers"),
        (Output(PROMPT, [Completion([7, 8, 9], np.zeros((9, LAYERS, TOP_K)))]), "dtype float64; expected integers"),
        (Output(PROMPT, [Completion([7, 8, 9], np.zeros((9, LAYERS, TOP_K), int))]), "none of the 9 tokens"),
        (Output(None, [Completion([7, 8, 9], Truth().routes(9))]), "no prompt_token_ids"),
        (
            SplitOutput(PROMPT, [Completion([7, 8, 9], Truth().routes(1))], prompt_routed_experts=Truth().routes(7)),
            "has 1 rows for 3 generated tokens",
        ),
        (
            SplitOutput(PROMPT, [Completion([7, 8, 9], Truth().routes(3))], prompt_routed_experts=Truth().routes(6)),
            "prompt_routed_experts has 6 rows for 7 tokens",
        ),
    ],
)
def test_arrays_of_another_shape_are_refused(source: Source, output: Output, text: str) -> None:
    with pytest.raises(InvalidInputError, match=text):
        vllm.publish_output(source, output)
    assert load(source) == [[0] * EXPERTS] * LAYERS
    assert source.account().num_refused_calls == 1


def _response(**fields: Any) -> dict[str, Any]:
    return {"id": "cmpl-7", "usage": {"prompt_tokens": 7, "completion_tokens": 3}, **fields}


def test_a_response_of_the_server_with_npy_rows(source: Source, truth: Truth) -> None:
    response = _response(
        choices=[{"index": 0, "text": "…", "routed_experts": npy(truth.routes(9, not_routed=2).astype(np.uint8))}]
    )
    response["usage"]["prompt_tokens_details"] = {"cached_tokens": 2}
    (published,) = vllm.publish_response(source, response)
    assert (published.num_tokens, published.num_not_routed_tokens) == (7, 2)
    assert load(source) == truth.expected()


def test_a_response_of_the_server_with_lists_split_in_two(source: Source, truth: Truth) -> None:
    prompt, generated = truth.routes(7), truth.routes(3)
    response = _response(
        prompt_routed_experts=prompt.tolist(),
        prompt_token_ids=PROMPT,
        choices=[{"routed_experts": generated.tolist(), "token_ids": [1, 2, 3]}],
    )
    vllm.publish_response(source, response)
    assert load(source) == truth.expected()
    decisions = source.decisions()
    assert decisions.token_id is not None
    assert decisions.token_id[:10].tolist() == [*PROMPT, 1, 2, 3]


@pytest.mark.parametrize(
    ("response", "text"),
    [
        ({}, "is no completion of vLLM's OpenAI server"),
        ({"error": {"message": "no"}}, "is no completion"),
        (_response(choices=[{}, {}]), "2 choices without token_ids"),
        (_response(choices=[{"routed_experts": "%%%"}]), "cannot be read"),
        (_response(choices=[{"routed_experts": "bm90IG5weQ=="}]), "cannot be read"),
        (_response(choices=[{"routed_experts": npy(Truth().routes(9))[:-40]}]), "cannot be read"),
        (_response(choices=[{"routed_experts": [[[0, 1]], [[2]]]}]), "cannot be read"),
        (_response(choices=[{"routed_experts": [[["a", "b"]]]}]), "expected integers"),
    ],
)
def test_responses_that_are_none_are_refused(source: Source, response: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidInputError, match=text):
        vllm.publish_response(source, response)
    assert source.account().num_refused_calls == 1


def test_a_pickle_in_an_npy_file_is_never_loaded(source: Source) -> None:
    objects = np.empty((9, LAYERS, TOP_K), object)
    objects[...] = 1
    import base64
    import io

    data = io.BytesIO()
    np.save(data, objects, allow_pickle=True)
    encoded = base64.b64encode(data.getvalue()).decode()
    with pytest.raises(InvalidInputError, match="cannot be read"):
        vllm.publish_response(source, _response(choices=[{"routed_experts": encoded}]))
