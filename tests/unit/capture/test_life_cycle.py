"""What may happen to a model while it is watched, or to its debugger: none of it may hurt the model or falsify rows."""

import asyncio
import copy
import gc
import io
import pickle
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_moe import build
from torch import nn

from moe_debugger import MoEDebugger
from moe_debugger.capture import hooks
from moe_debugger.capture.model_hooks import EnterHook, LeaveHook, TapHook

IDS = torch.randint(3, 90, (2, 5), generator=torch.Generator().manual_seed(3))


def _our_hooks(model: nn.Module) -> int:
    return sum(
        isinstance(hook, EnterHook | LeaveHook | TapHook)
        for module in model.modules()
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    )


def _tokens(debugger: MoEDebugger) -> list[int]:
    return [layer.num_tokens for layer in debugger.get_routing_stats().layers]


def _problems(debugger: MoEDebugger) -> list[str]:
    return list(debugger.get_performance_metrics().problems)


@contextmanager
def _hooked(module: nn.Module, hook: Callable[..., Any]) -> Iterator[None]:
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _interrupt(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


# -- forwards that do not end as they should ---------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["model.layers.1.mlp.experts", "model.layers.1.mlp.gate", "model.norm", "lm_head"])
def test_the_forward_after_an_interrupt_is_captured(where: str) -> None:
    model = build("mixtral")
    with torch.no_grad(), MoEDebugger(model) as debugger:
        with _hooked(model.get_submodule(where), _interrupt), pytest.raises(KeyboardInterrupt):
            model(IDS)
        # From a deeper place than the interrupted call, and of another shape.
        model.generate(IDS[:1, :3], max_new_tokens=2, do_sample=False, eos_token_id=95)
        assert _tokens(debugger) == [4, 4, 4]
        assert _problems(debugger) == ["a forward of the model was interrupted; its routes so far were not kept"]
        assert set(debugger.get_performance_metrics().num_dropped) <= {"capture_error"}


def test_an_interrupt_inside_of_a_hook_of_ours_reaches_the_user_and_harms_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = build("mixtral")
    with torch.no_grad(), MoEDebugger(model) as debugger:
        for name in ("read_frame", "RawForward", "RawLayer"):
            with monkeypatch.context() as patch:
                patch.setattr(hooks, name, _interrupt)
                with pytest.raises(KeyboardInterrupt):
                    model(IDS)
        model(IDS)
        assert _tokens(debugger) == [10, 10, 10]


def test_a_part_that_runs_after_an_interrupt_opens_a_forward_of_its_own() -> None:
    model = build("mixtral")
    with torch.no_grad(), MoEDebugger(model) as debugger:
        with _hooked(model.lm_head, _interrupt), pytest.raises(KeyboardInterrupt):
            model(IDS)
        model.model(IDS[:, :2])
        assert _tokens(debugger) == [4, 4, 4]


def test_a_hook_of_someone_else_that_raises_before_ours_ends_no_forward() -> None:
    model = build("mixtral")

    def fail(*_: Any) -> None:
        raise KeyError("theirs")

    with torch.no_grad(), MoEDebugger(model) as debugger:
        handle = model.model.register_forward_pre_hook(fail, prepend=True)
        with pytest.raises(KeyError):
            model(IDS)
        handle.remove()
        model(IDS)
        assert _tokens(debugger) == [10, 10, 10]


def test_a_model_that_returns_nothing_is_captured() -> None:
    class Silent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = build("mixtral")

        def forward(self, input_ids: torch.Tensor) -> None:
            self.inner(input_ids)

    model = Silent()
    with torch.no_grad(), MoEDebugger(model) as debugger:
        try:
            raise ValueError
        except ValueError:
            # Within an except block, where an error is being handled that is not the model's.
            model(IDS)
        assert _tokens(debugger) == [10, 10, 10]
        assert _problems(debugger) == []


def test_a_forward_within_a_forward_of_the_same_model_is_one_of_its_own() -> None:
    model = build("mixtral")
    expected, inner_expected = model(IDS).logits, model(IDS[:1, :3]).logits
    seen: list[torch.Tensor] = []
    is_inside = threading.Event()

    def run_again(*_: Any) -> None:
        if not is_inside.is_set():
            is_inside.set()
            seen.append(model(IDS[:1, :3]).logits)

    with torch.no_grad(), MoEDebugger(model) as debugger:
        with _hooked(model.model.layers[0], run_again):
            assert torch.equal(model(IDS).logits, expected)
        assert torch.equal(seen[0], inner_expected)
        assert _tokens(debugger) == [13, 13, 13]
        assert _problems(debugger) == []


def test_a_debugger_that_is_closed_amid_a_forward_says_what_it_lost() -> None:
    model = build("mixtral")
    expected = model(IDS).logits
    debugger = MoEDebugger(model)
    session = debugger.start_session()
    with torch.no_grad():
        with _hooked(model.model.layers[1], lambda *_: session.stop()):
            assert torch.equal(model(IDS).logits, expected)
        assert _problems(debugger) == ["the capture ended amid a forward of the model"]
        assert debugger.get_performance_metrics().num_dropped == {"capture_error": 20}
        debugger.close()
        assert _our_hooks(model) == 0


def test_threads_and_tasks_that_run_one_model_do_not_mix() -> None:
    model = build("mixtral")
    batches = [torch.randint(3, 90, (2, 3 + index)) for index in range(3)]
    same: list[bool] = []
    with torch.no_grad():
        expected = [model(batch).logits for batch in batches]

    def run(index: int) -> None:
        with torch.no_grad():
            same.extend(torch.equal(model(batches[index]).logits, expected[index]) for _ in range(6))

    async def tasks() -> None:
        await asyncio.gather(*(asyncio.to_thread(run, index) for index in range(3)))

    with MoEDebugger(model) as debugger:
        threads = [threading.Thread(target=run, args=(index,)) for index in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        asyncio.run(tasks())
        assert same == [True] * 36
        session = debugger.session
        assert session is not None
        rows = session.decisions()
        assert len(rows) == 12 * 3 * sum(batch.numel() for batch in batches)
        assert len(rows.request_ids) == 36 * 2
        assert _problems(debugger) == []
        assert session.capture_health().is_healthy


# -- copies and lost debuggers -----------------------------------------------------------------------------------------


def _pickled(model: nn.Module) -> nn.Module:
    copied: nn.Module = pickle.loads(pickle.dumps(model))
    return copied


def _saved(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded: nn.Module = torch.load(buffer, weights_only=False)
    return loaded


@pytest.mark.parametrize("copied_by", [copy.deepcopy, _pickled, _saved])
def test_a_copy_of_a_watched_model_works_and_is_not_watched(copied_by: Callable[[nn.Module], nn.Module]) -> None:
    model = build("mixtral")
    with torch.no_grad(), MoEDebugger(model) as debugger:
        expected = model(IDS).logits
        twin: Any = copied_by(model)
        assert _our_hooks(twin) == 0
        assert torch.equal(twin(IDS).logits, expected)
        assert _tokens(debugger) == [10, 10, 10]
        with MoEDebugger(twin) as other:
            twin(IDS[:, :2])
            assert _tokens(other) == [4, 4, 4]
        assert _tokens(debugger) == [10, 10, 10]
    assert torch.equal(twin(IDS).logits, expected)


def test_a_pickled_model_needs_no_module_of_ours() -> None:
    model = build("mixtral")
    with MoEDebugger(model):
        assert b"moe_debugger" not in pickle.dumps(model)


def test_what_is_saved_of_a_watched_model_is_the_same(tmp_path: Path) -> None:
    model = build("mixtral")
    names = list(model.state_dict())
    model.save_pretrained(tmp_path / "before")
    with MoEDebugger(model):
        assert list(model.state_dict()) == names
        model.save_pretrained(tmp_path / "during")
    files = sorted(path.name for path in (tmp_path / "before").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "during").iterdir())
    for name in files:
        assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "during" / name).read_bytes()


def test_a_debugger_that_nobody_holds_leaves_the_model() -> None:
    model = build("mixtral")
    debugger = MoEDebugger(model)
    debugger.start_session()
    model(IDS)
    capture = weakref.ref(debugger._capture)
    del debugger
    gc.collect()
    assert capture() is None
    assert _our_hooks(model) == 0
    MoEDebugger(model).close()


def test_a_session_alone_keeps_the_capture() -> None:
    model = build("mixtral")
    session = MoEDebugger(model).start_session()
    gc.collect()
    with torch.no_grad():
        model(IDS)
    assert session.get_routing_stats().num_tokens == 10
    session.close()


@pytest.mark.parametrize("is_closed", [True, False])
def test_a_watched_model_is_freed_with_its_debugger(*, is_closed: bool) -> None:
    before = {thread.name for thread in threading.enumerate()}
    model = build("mixtral")
    debugger = MoEDebugger(model)
    debugger.start_session()
    with torch.no_grad():
        model(IDS)
    if is_closed:
        debugger.close()
    reference = weakref.ref(model)
    del debugger, model
    gc.collect()
    assert reference() is None
    for thread in threading.enumerate():
        if thread.name not in before:
            thread.join(5)
            assert not thread.is_alive()


def test_many_forwards_leave_nothing_behind() -> None:
    model = build("mixtral", num_hidden_layers=1)
    with torch.no_grad(), MoEDebugger(model, level="counts") as debugger:
        session = debugger.session
        assert session is not None
        for _ in range(40):
            model.generate(IDS, max_new_tokens=4, do_sample=False)
        for _ in range(300):
            model(IDS[:, :2])
        session.flush()
        gc.collect()
        tracker = debugger._capture._tracker
        assert len(tracker._known) <= 1, "caches that were freed are forgotten"
        assert len(tracker._fed) <= 1
        assert len(debugger._capture._local._open) == 0
        assert session.capture_health().is_healthy


# -- models that change under the debugger -----------------------------------------------------------------------------


def test_a_model_may_change_dtype_and_mode_under_the_debugger() -> None:
    model = build("mixtral")
    with torch.no_grad(), MoEDebugger(model) as debugger:
        for change in (nn.Module.half, nn.Module.bfloat16, nn.Module.float, nn.Module.train, nn.Module.eval):
            change(model)
            model(IDS)
        assert _tokens(debugger) == [50, 50, 50]
        assert _problems(debugger) == []


def test_a_layer_that_was_replaced_is_named_and_never_zero_load() -> None:
    model, other = build("mixtral"), build("mixtral", seed=3)
    with torch.no_grad(), MoEDebugger(model) as debugger:
        model.model.layers[1] = other.model.layers[1]
        model(IDS)
        session = debugger.session
        assert session is not None
        health = session.capture_health()
        assert not health.is_healthy
        assert any("model.layers.1.mlp" in text and "not called" in text for text in health.problems)
        assert set(session.decisions().layer_index) == {0, 2}
    assert _our_hooks(model) + _our_hooks(other) == 0


# -- ways to call a model ----------------------------------------------------------------------------------------------


def test_functional_calls_and_their_gradients_are_captured() -> None:
    from torch.func import functional_call, grad

    model = build("mixtral")
    parameters = {name: value.detach() for name, value in model.named_parameters()}

    def loss(values: Any) -> Any:
        return functional_call(model, values, (IDS,), {"use_cache": False}).logits.square().mean()

    expected = grad(loss)(parameters)
    with MoEDebugger(model) as debugger:
        found = grad(loss)(parameters)
        assert all(torch.equal(found[name], value) for name, value in expected.items())
        with torch.inference_mode():
            model(IDS)
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
            model(IDS)
        assert _tokens(debugger) == [30, 30, 30]
        assert _problems(debugger) == []


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_is_said_and_runs_as_without() -> None:
    from torch.func import vmap

    model = build("mixtral")

    def run() -> Any:
        return vmap(lambda ids: model(ids, use_cache=False).logits)(IDS[:, None])

    with torch.no_grad():
        expected = run()
        with MoEDebugger(model) as debugger:
            assert torch.equal(run(), expected)
            assert any("vmap" in text for text in _problems(debugger))
            model(IDS)
            assert _tokens(debugger) == [10, 10, 10]


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("is_reentrant", [True, False])
def test_a_model_within_a_checkpoint_is_captured_once(*, is_reentrant: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    model = build("mixtral").train()
    embedded = torch.randn(2, 4, 32, requires_grad=True)
    with MoEDebugger(model) as debugger:
        output = checkpoint(
            lambda value: model(inputs_embeds=value, use_cache=False).logits, embedded, use_reentrant=is_reentrant
        )
        output.sum().backward()
        model(IDS)
        assert _tokens(debugger) == [18, 18, 18]
        assert _problems(debugger) == []


def test_an_exported_program_holds_nothing_of_ours() -> None:
    model = build("mixtral", num_hidden_layers=1)
    model.set_experts_implementation("batched_mm")
    with torch.no_grad(), MoEDebugger(model):
        program = torch.export.export(model.model.layers[0].mlp, (torch.randn(2, 5, 32),), strict=False)
    assert "moe_debugger" not in str(program.graph)


def _training_step(model: Any) -> list[torch.Tensor]:
    torch.manual_seed(5)
    model.zero_grad()
    output = model(IDS, labels=IDS, output_router_logits=True)
    output.loss.backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    return [output.logits.detach(), *gradients, torch.get_rng_state()]


@pytest.mark.parametrize("level", ["counts", "routes", "routes+tokens", "full"])
def test_a_training_step_and_its_random_numbers_are_bit_identical(level: Any) -> None:
    model = build("mixtral", attention_dropout=0.1).train()
    expected = _training_step(model)
    with MoEDebugger(model, level=level):
        found = _training_step(model)
    assert len(found) == len(expected) > 10
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
