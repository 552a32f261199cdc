"""The capture equals a recount that is taken inside the experts' forward and shares no code with it."""

from typing import Any

import numpy as np
import pytest
import torch
from tiny_moe import ARCHITECTURES, VOCABULARY, build, recount
from transformers import GenerationConfig

from moe_debugger import MoEDebugger
from moe_debugger.v1 import routing_pb2 as pb


def _batch(side: str, *, rows: int = 3, columns: int = 9, seed: int = 1) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (rows, columns), generator=generator)
    mask = torch.ones_like(ids)
    if side != "none":
        for row in range(1, rows):
            pads = slice(0, 2 * row) if side == "left" else slice(columns - 2 * row, columns)
            mask[row, pads] = 0
            ids[row, pads] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_forward_captures_the_ids_and_weights_that_the_experts_were_given(name: str, side: str) -> None:
    model = build(name)
    batch = _batch(side)
    with recount(model) as truth, MoEDebugger(model, level="routes+tokens") as debugger:
        with torch.no_grad():
            model(**batch)
        session = debugger.session
        assert session is not None
        rows, stats, layers = session.decisions(), session.get_routing_stats(), session.layers()
    assert [f"{info.module_name}.experts" for info in layers] == list(truth.ids)
    padding = (batch["attention_mask"] == 0).reshape(-1).numpy()
    for info, layer in zip(layers, stats.layers, strict=True):
        ids, weights = truth.ids[f"{info.module_name}.experts"][0], truth.weights[f"{info.module_name}.experts"][0]
        mine = rows.layer_index == info.layer_index
        assert np.array_equal(rows.expert_ids[mine][:, : ids.shape[1]], ids)
        np.testing.assert_allclose(rows.gate_weights[mine][:, : ids.shape[1]], weights, rtol=1e-3, atol=1e-4)
        assert np.array_equal(rows.is_padding[mine], padding)
        assert rows.token_id is not None
        assert np.array_equal(rows.token_id[mine], batch["input_ids"].reshape(-1).numpy())
        expected = np.bincount(ids[~padding].reshape(-1), minlength=8)
        assert np.array_equal(layer.expert_counts, expected)
        assert layer.num_tokens == int((~padding).sum())
        assert layer.num_padding_tokens == int(padding.sum())
    expected_position = (batch["attention_mask"].cumsum(-1) - 1).reshape(-1).numpy()
    first = rows.layer_index == 0
    assert np.array_equal(rows.position[first][~padding], expected_position[~padding])
    assert not rows.position[rows.is_padding].any()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_generate_routes_prompt_plus_generated_minus_one_tokens_of_each_request(name: str) -> None:
    model = build(name)
    model.generation_config.eos_token_id = None
    batch = _batch("left")
    new_tokens = 6
    with recount(model) as truth, MoEDebugger(model) as debugger:
        output = model.generate(**batch, max_new_tokens=new_tokens, do_sample=False)
        session = debugger.session
        assert session is not None
        rows, stats, layers = session.decisions(), session.get_routing_stats(), session.layers()
    assert output.shape[1] == 9 + new_tokens
    prompts = batch["attention_mask"].sum(-1).tolist()
    assert len(rows.request_ids) == 3
    for info in layers:
        mine = (rows.layer_index == info.layer_index) & ~rows.is_padding
        for row, prompt in enumerate(prompts):
            request = mine & (rows.request_index == row)
            assert int(request.sum()) == prompt + new_tokens - 1
            assert sorted(rows.position[request].tolist()) == list(range(prompt + new_tokens - 1))
            decode = request & (rows.phase == pb.PHASE_DECODE)
            assert int(decode.sum()) == new_tokens - 1
            assert int((request & (rows.phase == pb.PHASE_PREFILL)).sum()) == prompt
        name_of = f"{info.module_name}.experts"
        captured = rows.expert_ids[rows.layer_index == info.layer_index]
        assert np.array_equal(captured[:, : info.top_k], np.concatenate(truth.ids[name_of]))
    assert sum(int(layer.expert_counts.sum()) for layer in stats.layers) == sum(
        int((rows.expert_ids[~rows.is_padding & (rows.layer_index == info.layer_index)] >= 0).sum()) for info in layers
    )


def test_generate_flags_what_is_fed_after_the_end_of_a_text_as_padding() -> None:
    model = build("mixtral")
    batch = _batch("none", rows=2, columns=5)
    free = model.generate(**batch, max_new_tokens=8, do_sample=False, eos_token_id=None)
    # The token that row 0 generates third ends texts: row 0 stops there, row 1 goes on where it does not say it.
    model.generation_config.eos_token_id = int(free[0, 7])
    with MoEDebugger(model) as debugger:
        output = model.generate(**batch, max_new_tokens=8, do_sample=False, pad_token_id=0)
        session = debugger.session
        assert session is not None
        rows = session.decisions()
    for row in range(2):
        generated = output[row, 5:].tolist()
        ends = [i + 1 for i, token in enumerate(generated) if token == model.generation_config.eos_token_id]
        num_generated = min([*ends, 8])
        mine = (rows.layer_index == 0) & (rows.request_index == row) & ~rows.is_padding
        assert int(mine.sum()) == 5 + num_generated - 1, f"row {row}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_outputs_are_bit_identical_with_the_capture(name: str, dtype: torch.dtype) -> None:
    model = build(name, dtype=dtype)
    batch = _batch("left")
    with torch.no_grad():
        before = model(**batch).logits
        with MoEDebugger(model, level="full") as debugger:
            during = model(**batch).logits
            rows = debugger.session.decisions() if debugger.session else None
        after = model(**batch).logits
    assert torch.equal(before, during)
    assert torch.equal(before, after)
    assert rows is not None
    assert rows.logits is not None
    assert rows.logits.shape[1] == 8


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_router_statistics_equal_their_definition(name: str) -> None:
    model = build(name)
    batch = _batch("left")
    routers = [
        (module_name.rpartition(".")[0], module)
        for module_name, module in model.named_modules()
        if module_name.endswith((".gate", ".router"))
    ]
    seen: dict[str, torch.Tensor] = {}
    for module_name, module in routers:
        module.register_forward_hook(lambda m, a, output, n=module_name: seen.__setitem__(n, output[0].float()))
    with MoEDebugger(model) as debugger:
        with torch.no_grad():
            model(**batch)
        session = debugger.session
        assert session is not None
        rows, layers = session.decisions(), session.layers()
    for info in layers:
        logits = seen[info.module_name]
        is_sigmoid = name == "deepseek_v3"
        assert info.scoring_function == ("sigmoid" if is_sigmoid else "softmax")
        scores = torch.sigmoid(logits) if is_sigmoid else torch.softmax(logits, -1)
        probabilities = scores / scores.sum(-1, keepdim=True)
        entropy = -(probabilities * probabilities.log()).sum(-1)
        mine = rows.layer_index == info.layer_index
        np.testing.assert_allclose(rows.router_entropy[mine], entropy.numpy(), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(rows.top1_probability[mine], probabilities.amax(-1).numpy(), rtol=1e-4)
        np.testing.assert_allclose(rows.router_logsumexp[mine], logits.logsumexp(-1).numpy(), rtol=1e-4, atol=1e-5)
        # The padding token's embedding is zero here, so its logits tie and its top-k cannot be recomputed.
        valid = ~rows.is_padding[mine]
        margin = rows.margin[mine][valid]
        assert not np.isnan(margin).any(), "the selection is recomputable for these five"
        assert (margin >= 0).all()
        if not is_sigmoid:
            ordered = logits[torch.from_numpy(valid)].sort(-1, descending=True).values
            np.testing.assert_allclose(
                margin, ordered[:, info.top_k - 1] - ordered[:, info.top_k], rtol=1e-4, atol=1e-5
            )


def test_gradient_checkpointing_counts_each_token_once() -> None:
    model = build("mixtral").train()
    model.activation_checkpointing_enable()
    batch = _batch("none")
    with recount(model) as truth, MoEDebugger(model) as debugger:
        model(**batch, labels=batch["input_ids"]).loss.backward()
        session = debugger.session
        assert session is not None
        stats, rows = session.get_routing_stats(), session.decisions()
    calls = {name: len(ids) for name, ids in truth.ids.items()}
    assert set(calls.values()) == {2}, "the experts ran twice"
    assert {layer.num_tokens for layer in stats.layers} == {27}
    assert set(rows.phase.tolist()) == {pb.PHASE_TRAIN}


def test_layers_may_begin_after_dense_ones() -> None:
    with MoEDebugger(build("deepseek_v3")) as debugger:
        layers = debugger.layers()
    assert [(info.layer_index, info.model_layer_index) for info in layers] == [(0, 1), (1, 2)]
    assert {info.num_shared_experts for info in layers} == {1}


def test_a_prompt_in_chunks_goes_on_with_its_request() -> None:
    model = build("mixtral")
    ids = _batch("none", rows=2, columns=10)["input_ids"]
    with torch.no_grad(), MoEDebugger(model) as debugger:
        cache = model(ids[:, :6], use_cache=True).past_key_values
        model(ids[:, 6:], past_key_values=cache, use_cache=True)
        model(ids[:, :1], past_key_values=cache, use_cache=True)
        session = debugger.session
        assert session is not None
        rows = session.decisions()
    assert len(rows.request_ids) == 2
    mine = (rows.layer_index == 0) & (rows.request_index == 1)
    assert rows.position[mine].tolist() == list(range(11))


def test_the_model_without_its_head_is_watched_too() -> None:
    model = build("mixtral")
    with torch.no_grad(), MoEDebugger(model) as debugger:
        model.model(_batch("none")["input_ids"])
        assert debugger.get_routing_stats().num_tokens == 27


def test_continuous_batching_tells_prompts_from_generated_tokens_in_a_packed_row() -> None:
    model = build("qwen3_moe")
    config = GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=-1, pad_token_id=0)
    prompts = [[5, 6, 7, 8], [9, 10, 11, 12, 13, 14], [3, 4]]
    with recount(model) as truth, MoEDebugger(model, level="routes+tokens") as debugger:
        model.generate_batch(prompts, generation_config=config)
        session = debugger.session
        assert session is not None
        rows, layers = session.decisions(), session.layers()
        assert debugger.get_performance_metrics().problems == {}
    first = rows.layer_index == 0
    is_prompt = first & (rows.phase == pb.PHASE_PREFILL)
    is_generated = first & (rows.phase == pb.PHASE_DECODE)
    assert rows.token_id is not None
    assert sorted(rows.token_id[is_prompt].tolist()) == sorted(token for prompt in prompts for token in prompt)
    assert sorted(rows.position[is_generated].tolist()) == [2, 3, 4, 4, 5, 6, 6, 7, 8]
    for info in layers:
        captured = rows.expert_ids[rows.layer_index == info.layer_index]
        assert np.array_equal(captured[:, : info.top_k], np.concatenate(truth.ids[f"{info.module_name}.experts"]))


@pytest.mark.parametrize("level", ["counts", "routes"])
def test_rejected_drafts_of_assisted_decoding_are_rows_but_no_load(level: Any) -> None:
    model = build("mixtral")
    # A text that repeats itself, so that prompt lookup finds drafts; the model accepts some and rejects most.
    ids = torch.tensor([[5, 6, 7, 8, 9, 5, 6, 7, 8, 9, 5, 6, 7]])
    plain = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None)
    with recount(model) as truth, MoEDebugger(model, level=level) as debugger:
        output = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None, prompt_lookup_num_tokens=3)
        session = debugger.session
        assert session is not None
        stats, rows, layers = session.get_routing_stats(), session.decisions(), session.layers()
    assert torch.equal(output, plain)
    computed = len(np.concatenate(truth.ids[f"{layers[0].module_name}.experts"]))
    num_fed = output.shape[1] - 1
    assert computed > num_fed, "some drafts were rejected"
    # Nothing follows the last step, so which of its drafts were accepted is not known: they stay load.
    last = len(truth.ids[f"{layers[0].module_name}.experts"][-1])
    for layer in stats.layers:
        assert num_fed <= layer.num_tokens < num_fed + last
        assert layer.num_tokens + layer.num_padding_tokens == computed
    if level == "counts":
        return
    first = rows.layer_index == 0
    assert int(first.sum()) == computed
    load = rows.position[first & ~rows.is_padding]
    assert sorted(set(load.tolist())) == list(range(len(load))), "each position of the text once"
    assert set(rows.phase[first & (rows.position >= ids.shape[1])].tolist()) == {pb.PHASE_DECODE}
