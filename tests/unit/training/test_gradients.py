"""Norms of gradients and weights against numpy on the parameters themselves; and the training is left as it is."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny_moe
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from moe_debugger import MoEDebugger
from moe_debugger.errors import InvalidInputError
from moe_debugger.training import SeriesTable
from moe_debugger.training.gradients import GradientProbe

# Operations whose result the host has to wait for.
WAITING_OPERATIONS = ("_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "unique", "masked_select")


def run(model: nn.Module, seed: int) -> torch.Tensor:
    """One forward and backward on tokens of a seed."""
    ids = torch.randint(3, tiny_moe.VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(seed))
    loss: torch.Tensor = model(input_ids=ids, labels=ids).loss
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach()


def numbers(tensor: torch.Tensor | None) -> np.ndarray[Any, Any]:
    assert tensor is not None
    return tensor.detach().double().numpy()


def values(series: SeriesTable, name: str, layer: int) -> list[float]:
    found: list[float] = series.select(name, layer_index=layer).value.tolist()
    return found


@pytest.mark.parametrize("architecture", tiny_moe.ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_norms_are_those_of_the_parameters(architecture: str, dtype: torch.dtype) -> None:
    model = tiny_moe.build(architecture, dtype=dtype).train()
    with MoEDebugger(model, gradients=True) as debugger:
        with debugger.step(11):
            run(model, 0)
        session = debugger.session
        assert session is not None
        series = session.series()
        assert set(series.step.tolist()) == {11}
        assert series.notes == {}
        parameters = dict(model.named_parameters())
        for info in debugger.layers():
            prefix = info.module_name + "."
            own = {name.removeprefix(prefix): one for name, one in parameters.items() if name.startswith(prefix)}
            router = [one for name, one in own.items() if name.startswith(("gate.", "router."))]
            experts = [one for name, one in own.items() if name.startswith("experts.")]
            assert router
            assert experts
            index = info.layer_index
            gradient = np.sqrt(sum((numbers(one.grad) ** 2).sum() for one in router))
            weight = np.sqrt(sum((numbers(one) ** 2).sum() for one in router))
            assert values(series, "router_gradient_norm", index) == [pytest.approx(gradient, rel=1e-5)]
            assert values(series, "router_weight_norm", index) == [pytest.approx(weight, rel=1e-5)]
            by_expert = [
                np.sqrt(sum((numbers(one.grad)[expert] ** 2).sum() for one in experts))
                for expert in range(info.num_experts)
            ]
            rows = series.select("expert_gradient_norm", layer_index=index)
            assert rows.expert_id.tolist() == list(range(info.num_experts))
            np.testing.assert_allclose(rows.value, by_expert, rtol=1e-5)
            assert max(by_expert) > 0


def test_the_range_of_a_selection_bias_is_read_from_a_buffer() -> None:
    model = tiny_moe.build("deepseek_v3").train()
    with MoEDebugger(model, gradients=True) as debugger:
        with debugger.step(1):
            run(model, 0)
        session = debugger.session
        assert session is not None
        for info in debugger.layers():
            bias = numbers(model.get_submodule(info.module_name).gate.e_score_correction_bias)
            assert values(session.series(), "selection_bias_min", info.layer_index) == [np.float32(bias.min())]
            assert values(session.series(), "selection_bias_max", info.layer_index) == [np.float32(bias.max())]
            assert bias.min() < bias.max()


def test_a_selection_bias_of_the_block_is_no_part_of_the_routers_norm() -> None:
    block = nn.Module()
    block.gate = nn.Linear(4, 3, bias=False)
    block.moe_statics = nn.Module()
    block.moe_statics.e_score_correction_bias = nn.Parameter(torch.tensor([[-0.5, 0.0, 2.0]]), requires_grad=False)
    model = nn.Module()
    model.mlp = block
    site = SimpleNamespace(
        info=SimpleNamespace(layer_index=0, module_name="mlp", num_experts=3), experts=None, router=block.gate
    )
    series = SeriesTable(GradientProbe([site], model).measure(1).points())
    assert values(series, "selection_bias_min", 0) == [-0.5]
    assert values(series, "selection_bias_max", 0) == [2.0]
    assert values(series, "router_weight_norm", 0) == [pytest.approx(float(block.gate.weight.norm().detach()))]


class Separate(nn.Module):
    """Three experts of their own, as models before transformers 5 have them; the router comes with them."""

    def __init__(self, container: str) -> None:
        super().__init__()
        experts = [nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4)) for _ in range(3)]
        by_name: dict[str, nn.Module] = {f"expert_{number}": expert for number, expert in enumerate(experts)}
        self.experts = nn.ModuleList(experts) if container == "list" else nn.ModuleDict({**by_name, "act": nn.ReLU()})
        self.router = nn.Linear(4, 3)


@pytest.mark.parametrize("container", ["list", "dict"])
def test_experts_of_their_own_are_summed_over_their_parameters(container: str) -> None:
    torch.manual_seed(0)
    model = Separate(container)
    experts = list(model.experts.children())[:3]
    x = torch.randn(5, 4)
    # The last expert gets no token, so it has no gradient.
    (experts[0](x).sum() + 3 * experts[1](x).sum() + model.router(x).sum()).backward()
    # The capture may name the experts, or the whole layer.
    for holder in (model.experts, model):
        site = SimpleNamespace(
            info=SimpleNamespace(layer_index=2, module_name="", num_experts=3), experts=holder, router=model.router
        )
        reading = GradientProbe([site], model).measure(1)
        found = values(SeriesTable(reading.points()), "expert_gradient_norm", 2)
        for expert, norm in zip(experts[:2], found[:2], strict=True):
            expected = np.sqrt(sum((numbers(one.grad) ** 2).sum() for one in expert.parameters()))
            assert norm == pytest.approx(expected, rel=1e-5)
        assert np.isnan(found[2])
        assert any("some experts" in note for note in reading.notes)


def test_experts_below_one_another_in_one_matrix() -> None:
    glu = nn.Module()
    glu.moe_num_experts = 3  # type: ignore[assignment]
    glu.w1 = nn.Parameter(torch.zeros(3 * 5, 4))
    glu.w1.grad = torch.arange(60.0).reshape(15, 4)
    experts = nn.Module()
    experts.mlp = glu
    site = SimpleNamespace(
        info=SimpleNamespace(layer_index=0, module_name="x", num_experts=3), experts=experts, router=None
    )
    reading = GradientProbe([site], nn.Module()).measure(1)
    expected = np.sqrt((np.arange(60.0).reshape(3, 20) ** 2).sum(1))
    found = values(SeriesTable(reading.points()), "expert_gradient_norm", 0)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert any("router" in note for note in reading.notes)


def test_rows_of_identity_experts_are_left_out() -> None:
    experts = nn.Module()
    experts.up = nn.Parameter(torch.zeros(5, 2, 2))
    experts.up.grad = torch.arange(20.0).reshape(5, 2, 2)
    info = SimpleNamespace(layer_index=0, module_name="x", num_experts=3, num_identity_experts=2)
    site = SimpleNamespace(info=info, experts=experts, router=None)
    found = values(SeriesTable(GradientProbe([site], nn.Module()).measure(1).points()), "expert_gradient_norm", 0)
    np.testing.assert_allclose(found, np.sqrt((np.arange(12.0).reshape(3, 4) ** 2).sum(1)), rtol=1e-6)


def test_without_a_gradient_values_are_nan_and_the_reason_is_said() -> None:
    model = tiny_moe.build("mixtral").train()
    first = model.model.layers[0].mlp
    for parameter in first.experts.parameters():
        parameter.requires_grad_(False)
    with MoEDebugger(model, gradients=True) as debugger:
        session = debugger.session
        assert session is not None
        with debugger.step(1):
            model(torch.randint(3, 90, (1, 8)))
        with debugger.step(2):
            run(model, 0)
        with debugger.step(3):
            run(model, 1)
            model.zero_grad()
        series = session.series()
        norms = series.select("router_gradient_norm", layer_index=1)
        assert norms.step.tolist() == [1, 2, 3]
        assert np.isnan(norms.value).tolist() == [True, False, True]
        frozen = series.select("expert_gradient_norm", layer_index=0)
        assert len(frozen) == 3 * 8
        assert np.isnan(frozen.value).all()
        assert np.isfinite(series.select("router_weight_norm").value).all()
        said = {note: number for note, number in series.notes.items() if "layer 0" in note}
        assert sorted(said.values()) == [2, 3]
        assert any("frozen" in note and number == 3 for note, number in said.items())
        assert "before backward or after zero_grad" in str(series)


def test_the_trajectory_is_bit_identical_with_and_without() -> None:
    results = []
    for gradients in (None, False, True):
        torch.manual_seed(7)
        model = tiny_moe.build("deepseek_v3", attention_dropout=0.2).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        debugger = None if gradients is None else MoEDebugger(model, gradients=gradients)
        if debugger is not None:
            debugger.start_session()
        losses = []
        for step in range(5):
            if debugger is None:
                losses.append(run(model, step))
            else:
                with debugger.step(step) as scope:
                    losses.append(run(model, step))
                    scope.record(loss=losses[-1])
            optimizer.step()
            optimizer.zero_grad()
        if debugger is not None:
            debugger.close()
        results.append((torch.stack(losses), [one.detach().clone() for one in model.parameters()], torch.rand(4)))
    for trajectory, parameters, noise in results[1:]:
        assert torch.equal(trajectory, results[0][0])
        assert all(torch.equal(one, other) for one, other in zip(parameters, results[0][1], strict=True))
        assert torch.equal(noise, results[0][2])


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the operations that run."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.__name__.split(".")[0])
        return func(*args, **(kwargs or {}))


def test_reading_makes_one_copy_and_runs_nothing_that_waits_for_the_device() -> None:
    model = tiny_moe.build("deepseek_v3").train()
    with MoEDebugger(model, gradients=True) as debugger:
        session = debugger.session
        assert session is not None
        debugger.step(1)
        run(model, 0)
        with Operations() as operations:
            debugger.record_gradients()
        assert "linalg_vector_norm" in operations.names
        assert not set(WAITING_OPERATIONS) & set(operations.names)
        # All values of a device go to the host together.
        assert operations.names.count("_to_copy") + operations.names.count("copy_") <= 1 + len(debugger.layers())
        assert len(session.series().select("router_gradient_norm")) == len(debugger.layers())


def test_accumulated_gradients_are_those_of_the_whole_step() -> None:
    model = tiny_moe.build("mixtral").train()
    with MoEDebugger(model, gradients=True) as debugger:
        for seed in range(3):
            with debugger.step(4):
                run(model, seed)
        session = debugger.session
        assert session is not None
        norms = session.series().select("router_gradient_norm", layer_index=0)
        # One value for the step: that of the sum over its forwards.
        assert norms.step.tolist() == [4]
        expected = np.linalg.norm(numbers(model.model.layers[0].mlp.gate.weight.grad))
        assert norms.value.tolist() == [pytest.approx(expected, rel=1e-5)]


def test_a_failed_step_and_a_failing_probe_disturb_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_moe.build("mixtral").train()
    with MoEDebugger(model, gradients=True) as debugger:
        session = debugger.session
        assert session is not None

        def fail_after_backward() -> None:
            run(model, 0)
            raise RuntimeError("the loss is gone")

        with pytest.raises(RuntimeError, match="the loss is gone"), debugger.step(1):
            fail_after_backward()
        assert len(session.series()) == 0

        def fail(*args: Any) -> None:
            raise ValueError("no such parameter")

        monkeypatch.setattr("moe_debugger.training.gradients._measure_layer", fail)
        with debugger.step(2):
            run(model, 1)
        assert session.series().notes == {"gradients could not be read: ValueError: no such parameter": 1}


def test_gradients_have_to_be_asked_for() -> None:
    model = tiny_moe.build("mixtral").train()
    with MoEDebugger(model) as debugger:
        session = debugger.session
        assert session is not None
        with debugger.step(1):
            run(model, 0)
        assert len(session.series()) == 0
        with pytest.raises(InvalidInputError, match="gradients=True"):
            debugger.record_gradients()


def test_a_loop_that_updates_and_clears_inside_of_the_block_is_read_before_it_does() -> None:
    model = tiny_moe.build("mixtral").train()
    other = torch.nn.Linear(2, 2)
    optimizers = [torch.optim.SGD(one.parameters(), lr=0.1) for one in (other, model)]
    with MoEDebugger(model, gradients=True) as debugger:
        assert debugger.session is not None
        with debugger.step(1):
            model(input_ids=torch.arange(3, 9)[None], labels=torch.arange(3, 9)[None]).loss.backward()
            expected = [layer.mlp.gate.weight.grad.norm().item() for layer in model.model.layers]
            weights = [layer.mlp.gate.weight.norm().item() for layer in model.model.layers]
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        # Outside of a block nothing is read.
        optimizers[1].step()
        with pytest.raises(ZeroDivisionError), debugger.step(2):
            _ = 1 / 0
        optimizers[1].step()
        series = debugger.session.series()
        assert series.select("router_gradient_norm").value.tolist() == pytest.approx(expected)
        assert series.select("router_weight_norm").value.tolist() == pytest.approx(weights)
        assert set(series.step.tolist()) == {1}
        assert series.notes == {}
