"""Hooks never raise into the model, never stay, and say what they could not read."""

from typing import Any

import pytest
import torch
from tiny_moe import build
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import moe_debugger
from moe_debugger import AlreadyAttachedError, ModelNotSupportedError, MoEDebugger
from moe_debugger.capture import hooks


def _num_hooks(model: nn.Module) -> int:
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) + len(module._forward_hooks_always_called)
        for module in model.modules()
    )


def test_detach_leaves_no_hook() -> None:
    model = build("mixtral")
    before = _num_hooks(model)
    for _ in range(2):
        debugger = MoEDebugger(model)
        debugger.start_session()
        assert _num_hooks(model) > before
        debugger.close()
        assert _num_hooks(model) == before


def test_a_dense_model_is_refused_by_what_was_looked_at() -> None:
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    )
    with pytest.raises(ModelNotSupportedError, match=r"mlp\.gate_proj \(Linear\).*Pass a Mixture-of-Experts model"):
        MoEDebugger(model)


def test_experts_of_another_layout_are_refused_by_name_and_reason() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(4, 2)
            self.experts = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

    with pytest.raises(ModelNotSupportedError, match=r"0\.experts: ModuleList holds one module per expert"):
        MoEDebugger(nn.Sequential(Block()))


def test_something_that_is_no_module_is_refused() -> None:
    with pytest.raises(ModelNotSupportedError, match="got str"):
        MoEDebugger("mixtral")  # type: ignore[arg-type]


@pytest.mark.parametrize("part", ["whole", "inner"])
def test_a_second_debugger_is_refused_until_the_first_is_closed(part: str) -> None:
    model = build("mixtral")
    first = MoEDebugger(model)
    with pytest.raises(AlreadyAttachedError, match="call close"):
        MoEDebugger(model if part == "whole" else model.model)
    first.close()
    MoEDebugger(model).close()


def test_detach_frees_a_model_whose_debugger_was_lost() -> None:
    model = build("mixtral")
    MoEDebugger(model).start_session()
    assert moe_debugger.detach(model)
    assert _num_hooks(model) == 0
    assert not moe_debugger.detach(model)
    MoEDebugger(model).close()


def test_an_error_in_a_hook_never_reaches_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("mixtral")
    ids = torch.randint(3, 90, (2, 5))
    with torch.no_grad():
        expected = model(ids).logits

        def broken(*arguments: Any, **named: Any) -> Any:
            raise RuntimeError("planted")

        with MoEDebugger(model) as debugger:
            for name in ("read_frame", "RawLayer", "RawForward"):
                with monkeypatch.context() as patch:
                    patch.setattr(hooks, name, broken)
                    assert torch.equal(model(ids).logits, expected)
            problems = debugger.get_performance_metrics().problems
            assert any("planted" in text for text in problems)
            model(ids)
            assert debugger.get_routing_stats().num_tokens == 10, "the capture goes on after its own errors"


def test_an_error_in_the_capture_thread_is_counted_as_a_drop(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("mixtral")
    ids = torch.randint(3, 90, (2, 5))
    with torch.no_grad(), MoEDebugger(model) as debugger:
        session = debugger.session
        assert session is not None
        with monkeypatch.context() as patch:
            patch.setattr(session._assembler, "assemble", lambda raw: 1 / 0)
            model(ids)
            session.flush()
        performance = debugger.get_performance_metrics()
        assert performance.num_dropped == {"capture_error": 30}
        assert any("ZeroDivisionError" in text for text in performance.problems)


def test_a_forward_that_raises_is_lost_and_said_and_the_next_one_is_right() -> None:
    model = build("mixtral")
    ids = torch.randint(3, 90, (2, 5))
    last = model.model.layers[2].mlp
    with torch.no_grad(), MoEDebugger(model) as debugger:
        handle = last.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyError("mine")))
        with pytest.raises(KeyError):
            model(ids)
        handle.remove()
        model(ids)
        assert {layer.num_tokens for layer in debugger.get_routing_stats().layers} == {10}
        performance = debugger.get_performance_metrics()
        assert performance.num_dropped == {"capture_error": 20}
        assert any("raised" in text for text in performance.problems)


def test_rows_that_match_no_token_are_said_and_not_guessed() -> None:
    model = build("mixtral")
    ids = torch.randint(3, 90, (2, 5))
    first = model.model.layers[0].mlp.experts

    def narrow(module: Any, args: Any) -> Any:
        hidden, expert_ids, weights = args
        return hidden[:3], expert_ids[:3], weights[:3]

    with torch.no_grad(), MoEDebugger(model) as debugger:
        # Run before ours, so that the experts see 3 of 10 rows.
        handle = first.register_forward_pre_hook(narrow, prepend=True)
        with pytest.raises(RuntimeError):
            model(ids)
        handle.remove()
        assert any("3 routed rows in a forward of 10" in t for t in debugger.get_performance_metrics().problems)


def test_a_full_buffer_drops_whole_forwards_and_counts_them() -> None:
    model = build("mixtral")
    ids = torch.randint(3, 90, (8, 200))
    with torch.no_grad(), MoEDebugger(model, buffer_bytes=64 * 1024) as debugger:
        model(ids)
        model(ids[:1, :4])
        performance = debugger.get_performance_metrics()
        stats = debugger.get_routing_stats()
    assert performance.num_dropped == {"buffer_full": 3 * 1600}
    assert {layer.num_tokens for layer in stats.layers} == {4}
    assert performance.num_decisions == 3 * 1604
    assert performance.buffer_peak_bytes <= performance.buffer_limit_bytes


@pytest.mark.parametrize("is_shared", [False, True], ids=["buffer_of_each_layer", "one_buffer_of_all_layers"])
def test_routes_in_a_buffer_that_is_written_again_are_copied_before(*, is_shared: bool) -> None:
    model = build("mixtral")
    ids = torch.randint(3, 90, (12, 2, 5))
    gates = [layer.mlp.gate for layer in model.model.layers]
    buffers = [torch.empty(10, gates[0].top_k, dtype=torch.int64) for _ in gates]
    truth: list[torch.Tensor] = []

    def into_buffer(module: Any, args: Any, output: Any) -> Any:
        logits, weights, chosen = output
        truth.append(chosen.clone())
        return logits, weights, buffers[0 if is_shared else gates.index(module)].copy_(chosen)

    for gate in gates:
        gate.register_forward_hook(into_buffer)
    with torch.no_grad(), MoEDebugger(model) as debugger:
        for each in ids:
            model(each)
        assert debugger.session is not None
        decisions = debugger.session.decisions()
        performance = debugger.get_performance_metrics()
    # Of one buffer, the last layer alone can be read of the first forward, and that is said.
    num_lost = 10 * (len(gates) - 1) if is_shared else 0
    assert performance.num_dropped == ({"capture_error": num_lost} if num_lost else {})
    assert any("another layer wrote into" in text for text in performance.problems) == is_shared
    assert len(decisions) == 10 * len(truth) - num_lost
    for forward, layer in zip(decisions.forward_index, decisions.layer_index, strict=True):
        rows = (decisions.forward_index == forward) & (decisions.layer_index == layer)
        assert decisions.expert_ids[rows].tolist() == truth[forward * len(gates) + layer].tolist()


def test_a_shared_buffer_is_copied_at_once_in_the_next_session_too() -> None:
    model = build("mixtral")
    gates = [layer.mlp.gate for layer in model.model.layers]
    buffer, truth = torch.empty(10, gates[0].top_k, dtype=torch.int64), []

    def into_buffer(module: Any, args: Any, output: Any) -> Any:
        truth.append(output[2].clone())
        return *output[:2], buffer.copy_(output[2])

    for gate in gates:
        gate.register_forward_hook(into_buffer)
    with torch.no_grad(), MoEDebugger(model) as debugger:
        model(torch.randint(3, 90, (2, 5)))
        assert debugger.session is not None
        debugger.session.close()
        session = debugger.start_session()
        truth.clear()
        model(torch.randint(3, 90, (2, 5)))
        decisions = session.decisions()
        assert debugger.get_performance_metrics().num_dropped == {}
    for layer, expected in enumerate(truth):
        assert decisions.expert_ids[decisions.layer_index == layer].tolist() == expected.tolist()
