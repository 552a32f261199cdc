"""Whatever holds a model, and however it is called: attaching works, and rows are right or said to be lost."""

import copy
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_moe import build
from torch import nn

from moe_debugger import MoEDebugger
from moe_debugger.v1 import routing_pb2 as pb

IDS = torch.randint(3, 90, (2, 5), generator=torch.Generator().manual_seed(3))
MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])


@pytest.fixture
def _one_process() -> Iterator[None]:
    from torch import distributed

    store: Any = distributed.HashStore()  # type: ignore[attr-defined]
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def _tokens(debugger: MoEDebugger) -> list[int]:
    return [layer.num_tokens for layer in debugger.get_routing_stats().layers]


def _assert_well(debugger: MoEDebugger) -> None:
    session = debugger.session
    assert session is not None
    assert session.capture_health().problems == ()
    wrong = [each for each in session.capture_health().checks if each.status == "failed" and each.name != "overhead"]
    assert wrong == []


# -- wrappers ----------------------------------------------------------------------------------------------------------


class _Peft(nn.Module):
    """Holds a model as PEFT does: base_model is a tuner whose attribute `model` is the model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.base_model = nn.Module()
        self.base_model.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        model: Any = self.base_model.model
        return model(*args, **kwargs)


class _Renamed(nn.Module):
    """A classifier of one's own, whose inputs have other names; its model is called as vision towers are."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.backbone = model.model
        self.head = nn.Linear(32, 3)

    def forward(self, tokens: torch.Tensor, keep: torch.Tensor | None = None) -> torch.Tensor:
        backbone: Any = self.backbone
        output: torch.Tensor = self.head(backbone(input_ids=tokens, attention_mask=keep).last_hidden_state[:, -1])
        return output


@pytest.mark.parametrize("wrap", [_Peft, _Renamed, nn.DataParallel, nn.Sequential])
@pytest.mark.parametrize("watches", ["wrapper", "model"])
def test_wrapped_models_are_captured_with_their_padding(wrap: Callable[[Any], nn.Module], watches: str) -> None:
    model = build("mixtral")
    wrapper: Any = wrap(model)
    arguments = (IDS,) if wrap is nn.Sequential else (IDS, MASK)
    with torch.no_grad():
        expected = wrapper(*arguments)
        watched = wrapper if watches == "wrapper" else model.model if wrap is _Renamed else model
        with MoEDebugger(watched, level="routes+tokens") as debugger:
            found = wrapper(*arguments)
            assert torch.equal(getattr(found, "logits", found), getattr(expected, "logits", expected))
            assert _tokens(debugger) == [10 if wrap is nn.Sequential else 8] * 3
            session = debugger.session
            assert session is not None
            rows = session.decisions()
            assert np.array_equal(rows.token_id[rows.layer_index == 1], IDS.reshape(-1).numpy())  # type: ignore[index]
            assert len(rows.request_ids) == 2
            _assert_well(debugger)


@pytest.mark.usefixtures("_one_process")
def test_data_parallel_training_is_captured_and_unchanged() -> None:
    from torch.nn.parallel import DistributedDataParallel

    def step(model: Any) -> list[torch.Tensor]:
        model.train()
        model(IDS, labels=IDS).loss.backward()
        return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]

    expected = step(DistributedDataParallel(build("mixtral")))
    model = DistributedDataParallel(build("mixtral"))
    with MoEDebugger(model) as debugger:
        found = step(model)
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
        # The model inside of the wrapper, as an evaluation runs it.
        with torch.no_grad():
            model.module.eval()(IDS, attention_mask=MASK)
        assert _tokens(debugger) == [18, 18, 18]
        _assert_well(debugger)


@pytest.mark.usefixtures("_one_process")
@pytest.mark.parametrize("when", ["before", "after"])
def test_fully_sharded_training_is_captured(when: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = build("mixtral").train()
    mesh = init_device_mesh("cpu", (1,))

    def shard() -> None:
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)

    if when == "before":
        shard()
    with MoEDebugger(model) as debugger:
        if when == "after":
            shard()
        model(IDS, labels=IDS).loss.backward()
        assert _tokens(debugger) == [10, 10, 10]
        _assert_well(debugger)


@pytest.mark.parametrize("kind", ["cpu", "disk", "dispatched"])
def test_offloaded_models_are_captured(kind: str, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = build("mixtral")
    with torch.no_grad():
        expected = model.generate(IDS, max_new_tokens=3, do_sample=False)
        if kind == "cpu":
            accelerate.cpu_offload(model, execution_device="cpu")
        elif kind == "disk":
            accelerate.disk_offload(model, str(tmp_path), execution_device="cpu")
        else:
            places = {
                "model.embed_tokens": "cpu",
                "model.layers": "cpu",
                "model.norm": "cpu",
                "model.rotary_emb": "cpu",
            }
            accelerate.dispatch_model(
                model, {**places, "lm_head": "disk"}, offload_dir=str(tmp_path), main_device="cpu", force_hooks=True
            )
        with MoEDebugger(model) as debugger:
            assert torch.equal(model.generate(IDS, max_new_tokens=3, do_sample=False), expected)
            assert _tokens(debugger) == [14, 14, 14]
            _assert_well(debugger)


def test_a_pipeline_is_refused_with_what_to_pass() -> None:
    class Pipeline:
        model = build("mixtral")

    with pytest.raises(Exception, match="pass the model itself, not a pipeline"):
        MoEDebugger(Pipeline())  # type: ignore[arg-type]


# -- several models, shared parts --------------------------------------------------------------------------------------


class _Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = build("mixtral")
        self.second = build("qwen3_moe", seed=1)

    def forward(self, tokens: torch.Tensor) -> Any:
        return self.first(tokens).logits.sum() + self.second(tokens[:, :3]).logits.sum()


def test_two_models_in_one_have_tokens_of_their_own() -> None:
    model = _Two()
    with torch.no_grad(), MoEDebugger(model) as debugger:
        model(IDS)
        assert _tokens(debugger) == [10, 10, 10, 6, 6, 6]
        _assert_well(debugger)
        model.second(IDS)
        assert _tokens(debugger) == [10, 10, 10, 16, 16, 16]
        _assert_well(debugger)


def test_a_layer_of_one_of_two_models_that_is_not_seen_is_still_said() -> None:
    model = _Two()
    with torch.no_grad(), MoEDebugger(model) as debugger:
        model.second.model.layers[1].mlp.experts._forward_pre_hooks.clear()
        model(IDS)
        session = debugger.session
        assert session is not None
        assert any("second.model.layers.1.mlp" in text for text in session.capture_health().problems)
        assert not session.capture_health().is_healthy


def test_experts_that_two_layers_share_are_told_apart_by_their_routers() -> None:
    model = build("mixtral")
    expected = copy.deepcopy(model)
    expected.model.layers[2].mlp.experts = copy.deepcopy(model.model.layers[0].mlp.experts)
    model.model.layers[2].mlp.experts = model.model.layers[0].mlp.experts
    columns = []
    for each in (model, expected):
        with torch.no_grad(), MoEDebugger(each) as debugger:
            each(IDS)
            session = debugger.session
            assert session is not None
            columns.append(session.decisions())
            _assert_well(debugger)
    found, wanted = columns
    assert list(found.module_names.values()) == [f"model.layers.{index}.mlp" for index in range(3)]
    for name in ("layer_index", "expert_ids", "gate_weights", "router_entropy", "margin"):
        assert np.array_equal(found[name], wanted[name], equal_nan=True)


def test_a_layer_that_stands_twice_in_the_model_has_a_row_for_each_call() -> None:
    model = build("mixtral")
    model.model.layers[2] = model.model.layers[0]
    with torch.no_grad(), MoEDebugger(model) as debugger:
        expected = model(IDS).logits
        assert [info.module_name for info in debugger.layers()] == ["model.layers.0.mlp", "model.layers.1.mlp"]
        assert _tokens(debugger) == [20, 10]
    assert torch.equal(model(IDS).logits, expected)


def test_an_old_debugger_of_a_shared_part_does_not_block_for_good() -> None:
    first, second = build("mixtral"), build("mixtral", seed=4)
    second.model.layers[0].mlp.experts = first.model.layers[0].mlp.experts
    with MoEDebugger(first), pytest.raises(Exception, match="is watched already"):
        MoEDebugger(second)
    MoEDebugger(second).close()


# -- parts called alone ------------------------------------------------------------------------------------------------


def test_a_block_that_is_called_alone_is_said_to_be_lost() -> None:
    model = build("mixtral")
    with torch.no_grad(), MoEDebugger(model) as debugger:
        model.model.layers[1].mlp(torch.randn(2, 5, 32))
        performance = debugger.get_performance_metrics()
        assert performance.num_dropped == {"capture_error": 10}
        assert any("outside of a forward" in text for text in performance.problems)
        assert _tokens(debugger) == [0, 0, 0]
    with torch.no_grad(), MoEDebugger(model.model.layers[1].mlp) as debugger:
        model.model.layers[1].mlp(torch.randn(2, 5, 32))
        assert _tokens(debugger) == [10]
        _assert_well(debugger)


def test_layers_that_cannot_be_read_beside_some_that_can_are_named() -> None:
    class Strange(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList([nn.Linear(32, 32), nn.Linear(32, 32)])

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            output: torch.Tensor = self.experts[0](hidden)
            return output

    model = build("mixtral")
    model.model.layers[1].mlp = Strange()
    with torch.no_grad(), MoEDebugger(model) as debugger:
        model(IDS)
        session = debugger.session
        assert session is not None
        assert [info.module_name for info in debugger.layers()] == ["model.layers.0.mlp", "model.layers.2.mlp"]
        health = session.capture_health()
        assert not health.is_healthy
        assert any("model.layers.1.mlp.experts: ModuleList holds" in text for text in health.problems)


# -- ways to generate --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["mixtral", "gpt_oss"])
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 2},
        {"num_beams": 2},
        {"num_beams": 2, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 2},
        {"use_cache": False},
    ],
    ids=str,
)
def test_each_batch_row_of_a_generate_is_one_request_with_rising_positions(
    architecture: str, options: dict[str, Any]
) -> None:
    # GPT-OSS has layers of two kinds of attention, whose prepared masks differ.
    model = build(architecture, sliding_window=None if architecture == "mixtral" else 4)
    arguments = {"attention_mask": MASK, "max_new_tokens": 4, "do_sample": False, "eos_token_id": 95, **options}

    def run() -> Any:
        torch.manual_seed(1)
        return model.generate(IDS, **arguments)

    with torch.no_grad():
        expected = run()
        with MoEDebugger(model) as debugger:
            assert torch.equal(run(), expected)
            session = debugger.session
            assert session is not None
            rows = session.decisions()
            _assert_well(debugger)
    if options.get("use_cache") is False:
        return  # each step is a forward of the whole text, by itself
    is_first = (rows.layer_index == 0) & ~rows.is_padding
    copies = options.get("num_beams", options.get("num_return_sequences", 1))
    assert len(rows.request_ids) == 2 * copies
    for request in range(len(rows.request_ids)):
        own = is_first & (rows.request_index == request)
        length = int(MASK[request // copies].sum())
        assert rows.position[own].tolist() == list(range(length + 3))
        assert rows.phase[own].tolist() == [pb.PHASE_PREFILL] * length + [pb.PHASE_DECODE] * 3


def test_texts_that_are_streamed_from_a_thread_are_captured() -> None:
    model = build("mixtral")
    with MoEDebugger(model) as debugger:
        threads = [
            threading.Thread(target=model.generate, args=(IDS[row : row + 1],), kwargs={"max_new_tokens": 3 + row})
            for row in range(2)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        session = debugger.session
        assert session is not None
        assert len(session.decisions().request_ids) == 2
        _assert_well(debugger)


def test_assisted_decoding_with_a_watched_assistant_keeps_both_apart() -> None:
    model, assistant = build("mixtral"), build("mixtral", seed=2, num_hidden_layers=1)
    with torch.no_grad():
        expected = model.generate(IDS[:1], max_new_tokens=6, do_sample=False)
        with MoEDebugger(model) as debugger, MoEDebugger(assistant) as other:
            found = model.generate(IDS[:1], max_new_tokens=6, do_sample=False, assistant_model=assistant)
            assert torch.equal(found, expected)
            for each in (debugger, other):
                session = each.session
                assert session is not None
                assert len(session.decisions().request_ids) == 1
                _assert_well(each)


@pytest.mark.parametrize(
    ("inputs", "positions"),
    [
        ({"inputs_embeds": torch.randn(1, 3, 32)}, [0, 1, 2]),
        ({"input_ids": IDS[:1, :1]}, [0]),
        ({"input_ids": IDS[:1], "position_ids": torch.tensor([[0, 1, 2, 0, 1]])}, [0, 1, 2, 0, 1]),
        ({"input_ids": IDS[1:], "attention_mask": torch.tensor([[1, 1, 1, 0, 0]])}, [0, 1, 2, 0, 0]),
        ({"input_ids": IDS[:1], "attention_mask": MASK[:1]}, [0, 0, 0, 1, 2]),
    ],
    ids=["embeddings", "one token", "packed", "right padding", "left padding"],
)
def test_positions_of_unusual_inputs(inputs: dict[str, Any], positions: list[int]) -> None:
    model = build("mixtral")
    with torch.no_grad(), MoEDebugger(model) as debugger:
        model(**inputs)
        session = debugger.session
        assert session is not None
        rows = session.decisions()
        assert rows.position[rows.layer_index == 0].tolist() == positions
        _assert_well(debugger)


def test_an_empty_batch_harms_nothing() -> None:
    block = build("mixtral").model.layers[0].mlp
    empty, full = torch.randn(0, 5, 32), torch.randn(2, 5, 32)
    block.experts.config._experts_implementation = "eager"
    with torch.no_grad():
        expected = block(empty)
        with MoEDebugger(block) as debugger:
            assert block(empty).shape == expected.shape
            block(full)
            assert _tokens(debugger) == [10]
            _assert_well(debugger)


def test_a_static_cache_of_ones_own_carries_the_requests() -> None:
    from transformers import StaticCache

    model = build("mixtral")
    with torch.no_grad(), MoEDebugger(model) as debugger:
        cache = StaticCache(config=model.config, max_cache_len=16)
        model(IDS, past_key_values=cache)
        model(IDS[:, :1], past_key_values=cache)
        session = debugger.session
        assert session is not None
        rows = session.decisions()
        assert len(rows.request_ids) == 2
        first = (rows.layer_index == 0) & (rows.request_index == 0)
        assert rows.position[first].tolist() == [0, 1, 2, 3, 4, 5]
        assert rows.phase[first].tolist() == [pb.PHASE_PREFILL] * 5 + [pb.PHASE_DECODE]
        _assert_well(debugger)
