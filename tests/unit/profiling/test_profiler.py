"""The profiler on running models: known costs on a clock of the test's, real ones, and what it must leave alone."""

import copy
import gc
import pickle
import sys
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tiny_moe
import torch
from rich.console import Console
from timed_moe import FakeTime, ListModel
from torch import nn
from torch.utils.checkpoint import checkpoint

from moe_debugger import InvalidInputError, ModelNotSupportedError, MoEDebugger
from moe_debugger.capture.discovery import find_sites
from moe_debugger.cli.profile import show_profile
from moe_debugger.profiling import LayerProfile, LayerProfiler, clocks
from moe_debugger.profiling.places import Part


def profiler_of(model: nn.Module, **options: Any) -> LayerProfiler:
    return LayerProfiler(model, find_sites(model).sites, **options)


def hooks_of(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@pytest.fixture
def fake_time(monkeypatch: pytest.MonkeyPatch) -> FakeTime:
    clock = FakeTime()
    monkeypatch.setattr(clocks.HostClock, "mark", clock.mark)
    return clock


@pytest.fixture
def attached() -> Iterator[list[LayerProfiler]]:
    found: list[LayerProfiler] = []
    yield found
    for each in found:
        each.detach()


# -- times -------------------------------------------------------------------------------------------------------------


def test_every_time_of_a_model_whose_costs_are_known(fake_time: FakeTime) -> None:
    costs = {(1, 2): (9_000, 70)}
    model = ListModel(2, 4, 2, clock=fake_time, costs=costs, default=(500, 10))
    profiler = profiler_of(model)
    profiler.attach()
    ids = torch.arange(10).reshape(2, 5)
    with torch.no_grad():
        for _ in range(3):
            model(ids)
    profile = LayerProfile(profiler)
    profiler.detach()
    for position, summary in enumerate(profile.summaries):
        calls = summary.calls
        assert calls.expert_rows is not None
        assert calls.expert_times is not None
        rows = calls.expert_rows[0]
        assert rows.sum() == 20
        cost = np.array([costs.get((position, e), (500, 10)) for e in range(4)])
        expected = np.where(rows > 0, cost[:, 0] + cost[:, 1] * rows, 0)
        np.testing.assert_array_equal(calls.expert_times, np.tile(expected, (3, 1)))
        assert calls.router.tolist() == [1000] * 3
        assert calls.block.tolist() == [1000 + 20 + 4 * 3 + 7 + expected.sum()] * 3
        last = int(np.flatnonzero(rows)[-1])
        assert calls.dispatch.tolist() == [20 + 3 * int(np.flatnonzero(rows)[0])] * 3
        assert calls.combine.tolist() == [7 + 3 * (4 - last)] * 3
        assert calls.rows.tolist() == [10] * 3
        parts = summary.times.parts
        assert parts["router"].median_ms == 1e-3
        assert parts["shared"].reason == "the layer has no shared experts"
        assert parts["wait"].reason.startswith("not applicable: one process")
        assert summary.times.p95_ms == summary.times.median_ms == calls.block[0] / 1e6
        assert summary.times.experts[0].is_estimated is False
    assert profile.forward_ns.tolist() == [sum(int(s.calls.block[0]) for s in profile.summaries)] * 3
    assert sum(layer.share_of_forward for layer in profile.layers) == pytest.approx(1.0)
    # 16 x 16 float32 weights.
    first = profile.layers[0].roofline.points
    assert first.active_bytes.tolist() == (first.distinct_experts * 16 * 16 * 4).tolist()
    assert first.flops.tolist() == [20 * 2 * 16 * 16] * 3


def test_the_table_has_every_time_with_its_place(fake_time: FakeTime) -> None:
    model = ListModel(1, 4, 2, clock=fake_time, default=(500, 10))
    profiler = profiler_of(model)
    profiler.attach()
    with torch.no_grad():
        model(torch.arange(6)[None])
    table = LayerProfile(profiler, layer_numbers={0: 5}).table
    assert list(table) == [
        "step", "forward_index", "layer_index", "part", "expert_id", "start_ns", "duration_ns", "num_tokens",
        "is_estimated",
    ]  # fmt: skip
    assert set(table.part.tolist()) == {"forward", "block", "router", "dispatch", "expert", "combine", "rest"}
    assert set(table.layer_index[table.part != "forward"].tolist()) == {5}
    experts = table.select("expert")
    assert int(experts.num_tokens.sum()) == 12
    assert str(table.select("forward")).endswith("–")
    assert experts.duration_ns.tolist() == [500 + 10 * int(n) for n in experts.num_tokens]
    assert not table.is_estimated.any()
    block = table.select("block", layer_index=5)
    parts = [table.select(name).duration_ns.sum() for name in ("router", "dispatch", "expert", "combine", "rest")]
    assert sum(parts) == block.duration_ns.sum()
    assert len(table.to_pandas()) == len(table)
    assert "layer" in str(table)
    profiler.detach()


def test_an_expert_that_sleeps_is_found_there_and_nowhere_else(attached: list[LayerProfiler]) -> None:
    model = ListModel(3, 4, 2, costs={(1, 2): (3_000_000, 0)})
    profiler = profiler_of(model)
    attached.append(profiler)
    profiler.attach()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _ in range(40):
            model(torch.randint(0, 64, (1, 24), generator=generator))
    profile = LayerProfile(profiler)
    found = {(each.kind.value, each.layer_index, each.expert_id) for each in profile.bottlenecks}
    assert ("slow_expert", 1, 2) in found
    assert ("slow_layer", 1, None) in found
    assert {each for each in found if each[0] in ("slow_expert", "slow_layer")} == {
        ("slow_expert", 1, 2),
        ("slow_layer", 1, None),
    }
    slow = profile.layers[1].experts[2]
    assert slow.median_ms >= 3.0


def test_an_estimate_of_single_experts_is_judged_by_what_was_measured(fake_time: FakeTime) -> None:
    model = ListModel(1, 6, 2, clock=fake_time, default=(4_000, 100))
    profiler = profiler_of(model)
    profiler.attach()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for index in range(60):
            model(torch.randint(0, 64, (1, 1 + index % 13), generator=generator))
    profiler.detach()
    layer = LayerProfile(profiler).layers[0]
    assert layer.model.is_fitted
    assert layer.model.per_row == pytest.approx(100, rel=1e-3)
    assert layer.model.per_expert == pytest.approx(4_000, rel=1e-3)
    assert layer.model.held_out_error < 1e-6
    assert layer.estimate_error < 1e-3


def test_experts_in_one_call_are_estimated_and_say_so() -> None:
    model = tiny_moe.build("olmoe")
    with MoEDebugger(model, profiling=True) as debugger:
        with torch.no_grad():
            for index in range(40):
                model(torch.randint(3, 90, (1, 1 + 7 * (index % 5))))
        profile = debugger.layer_profile()
        decisions = debugger.session.decisions()  # type: ignore[union-attr]
    assert profile.num_forwards == 40
    for layer in profile.layers:
        assert layer.layout == "fused"
        assert layer.model.is_fitted
        assert 0 <= layer.model.held_out_error < 10
        assert all(expert.is_estimated for expert in layer.experts)
        assert "not separable" in layer.parts["dispatch"].reason
        assert "not separable" in layer.parts["combine"].reason
        assert np.isnan(layer.parts["dispatch"].median_ms)
    estimated = profile.table.select("expert")
    assert estimated.is_estimated.all()
    assert (estimated.start_ns == -1).all()
    # Rows of experts are those that the capture saw.
    for layer_index in range(3):
        seen = np.bincount(decisions.expert_ids[decisions.layer_index == layer_index].reshape(-1), minlength=8)
        ours = estimated.select("expert", layer_index=layer_index)
        counted = np.bincount(ours.expert_id, ours.num_tokens, minlength=8)
        assert counted.tolist() == seen.tolist()
    assert set(profile.table.forward_index.tolist()) == set(decisions.forward_index.tolist())


@pytest.mark.parametrize("name", tiny_moe.ARCHITECTURES)
def test_the_parts_of_a_block_add_up_to_it(name: str) -> None:
    model = tiny_moe.build(name)
    profiler = profiler_of(model)
    profiler.attach()
    with torch.no_grad():
        for _ in range(3):
            model(torch.randint(3, 90, (2, 9)))
    profile = LayerProfile(profiler)
    profiler.detach()
    for summary in profile.summaries:
        calls = summary.calls
        assert len(calls) == 3
        total = calls.router + calls.experts + calls.shared + calls.rest
        np.testing.assert_allclose(total, calls.block)
        assert (calls.router > 0).all()
        assert (calls.experts > 0).all()
        assert calls.expert_rows is not None
        # 18 tokens, k experts each.
        assert set(calls.expert_rows.sum(axis=1).tolist()) == {18 * summary_top_k(model)}
        assert np.isfinite(summary.times.roofline.median("gbps"))
    assert (profile.forward_ns > sum(s.calls.block for s in profile.summaries)).all()


def summary_top_k(model: Any) -> int:
    return int(model.config.num_experts_per_tok)


# -- the model is left alone -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", tiny_moe.ARCHITECTURES)
def test_outputs_are_bit_identical_and_the_hooks_go(name: str) -> None:
    model = tiny_moe.build(name)
    ids = torch.randint(3, 90, (2, 11))
    with torch.no_grad():
        bare = model(ids).logits
        before = hooks_of(model)
        with MoEDebugger(model, profiling=True):
            profiled = model(ids).logits
            assert hooks_of(model) > before
        after = model(ids).logits
    assert torch.equal(bare, profiled)
    assert torch.equal(bare, after)
    assert hooks_of(model) == before


def test_gradients_are_bit_identical() -> None:
    model = tiny_moe.build("mixtral").train()
    ids = torch.randint(3, 90, (2, 11))

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        model(ids).logits.float().pow(2).mean().backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    bare = gradients()
    profiler = profiler_of(model)
    profiler.attach()
    profiled = gradients()
    profiler.detach()
    assert len(bare) == len(profiled) > 0
    assert all(torch.equal(a, b) for a, b in zip(bare, profiled, strict=True))


def test_off_by_default_and_a_capture_without_it_has_the_hooks_it_had() -> None:
    model = tiny_moe.build("olmoe")
    with MoEDebugger(model) as debugger:
        kinds = {type(hook).__module__ for m in model.modules() for hook in m._forward_pre_hooks.values()}
        assert not any("profiling" in kind for kind in kinds)
        with pytest.raises(InvalidInputError, match="profiling=True"):
            debugger.layer_profile()


def test_a_profile_block_times_what_runs_inside_and_takes_its_hooks_along() -> None:
    model = tiny_moe.build("olmoe")
    ids = torch.randint(3, 90, (1, 5))
    with MoEDebugger(model) as debugger, torch.no_grad():
        model(ids)
        before = hooks_of(model)
        with debugger.profile(layers=True) as block:
            model(ids)
            model(ids)
        assert hooks_of(model) == before
        assert block.layers is not None
        assert block.layers.num_forwards == 2
        assert block.layers.table.forward_index.min() == 1
        with debugger.profile() as plain:
            model(ids)
        assert plain.layers is None
        assert "block:" in str(block)


def test_what_a_watched_session_gives_inside_of_a_block_are_the_blocks_forwards() -> None:
    model = tiny_moe.build("olmoe")
    ids = torch.randint(3, 90, (1, 5))
    with MoEDebugger(model, profiling=True) as debugger, torch.no_grad():
        model(ids)
        with debugger.profile() as block:
            model(ids)
        assert block.layers is not None
        assert block.layers.num_forwards == 1
        assert debugger.layer_profile().num_forwards == 2


def test_a_copy_and_a_pickle_of_a_profiled_model_take_nothing_along() -> None:
    model = tiny_moe.build("olmoe")
    profiler = profiler_of(model)
    profiler.attach()
    ids = torch.randint(3, 90, (1, 5))
    with torch.no_grad():
        expected = model(ids).logits
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(ids).logits, expected)
    assert profiler.num_forwards == 1
    profiler.detach()


def test_a_profiler_that_was_lost_takes_its_hooks_along() -> None:
    model = tiny_moe.build("olmoe")
    before = hooks_of(model)
    profiler = profiler_of(model)
    profiler.attach()
    assert hooks_of(model) > before
    del profiler
    gc.collect()
    assert hooks_of(model) == before


# -- what cannot be measured is said -----------------------------------------------------------------------------------


def test_a_compiled_model_is_refused_with_words() -> None:
    model = tiny_moe.build("olmoe")
    compiled: Any = torch.compile(model, backend="eager")
    with pytest.raises(ModelNotSupportedError, match="is compiled"):
        MoEDebugger(compiled, profiling=True)
    model.model.layers[1].mlp.compile(backend="eager")
    with pytest.raises(ModelNotSupportedError, match=r"model\.layers\.1\.mlp"):
        MoEDebugger(model, profiling=True)


def test_a_model_that_was_compiled_meanwhile_is_refused_and_left_as_it_was() -> None:
    model = tiny_moe.build("olmoe")
    before = hooks_of(model)
    debugger = MoEDebugger(model, profiling=True)
    model.model.layers[1].mlp.compile(backend="eager")
    with pytest.raises(ModelNotSupportedError, match="is compiled"):
        debugger.start_session()
    assert hooks_of(model) == before
    debugger.close()
    with MoEDebugger(model) as other:
        with pytest.raises(ModelNotSupportedError, match="is compiled"), other.profile(layers=True):
            pass
        assert other.layers()


def test_code_that_is_compiled_later_runs_without_a_break_and_is_not_measured(attached: list[LayerProfiler]) -> None:
    model = ListModel(1)
    profiler = profiler_of(model)
    attached.append(profiler)
    profiler.attach()
    ids = torch.arange(6)[None]
    gate = model.layers[0]["mlp"].gate  # type: ignore[index]
    with torch.no_grad():
        expected = model(ids)
        compiled: Any = torch.compile(gate, backend="eager", fullgraph=True)
        compiled(torch.randn(3, 16))
        assert torch.equal(model(ids), expected)
    assert not profiler.notes


def test_a_layer_that_is_compiled_later_is_said_once_with_its_name() -> None:
    model = ListModel(3)
    profiler = profiler_of(model)
    profiler.attach()
    ids = torch.arange(6)[None]
    with torch.no_grad():
        expected = model(ids)
        assert not LayerProfile(profiler).notes
        model.layers[1]["mlp"].compile(backend="eager")  # type: ignore[index]
        assert torch.equal(model(ids), expected)
        assert torch.equal(model(ids), expected)
    profile = LayerProfile(profiler)
    profiler.detach()
    model.layers[2].compile(backend="eager")
    assert [layer.num_calls for layer in profile.layers] == [3, 1, 3]
    for notes in (profile.notes, LayerProfile(profiler).notes):
        assert [(text.startswith("compiled after profiling began: layers.1.mlp;"), n) for text, n in notes.items()] == [
            (True, 1)
        ]


def test_a_session_says_how_many_forwards_of_code_compiled_later_it_did_not_see() -> None:
    model = ListModel(1)
    ids = torch.arange(6)[None]
    with MoEDebugger(model, profiling=True) as debugger, torch.no_grad():
        model(ids)
        assert not debugger.layer_profile().notes
        later: Any = torch.compile(model, backend="eager")
        later(ids)
        later(ids)
        profile = debugger.layer_profile()
    assert profile.num_forwards == 1
    assert [("did not see" in text, number) for text, number in profile.notes.items()] == [(True, 2)]


def test_a_profile_in_which_nothing_ran_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    model = ListModel(1)
    profiler = profiler_of(model)
    profiler.attach()
    empty = LayerProfile(profiler)
    show_profile(Console(), empty)
    assert "nan" not in str(empty) + capsys.readouterr().out
    assert str(empty) == "nothing was timed: no forward of the model ran while it was profiled"
    with pytest.raises(IndexError), torch.no_grad():
        model(torch.tensor([[999]]))
    failed = LayerProfile(profiler)
    profiler.detach()
    show_profile(Console(), failed)
    for text in (str(failed), capsys.readouterr().out):
        assert "nothing was timed: of the model's forwards 1 was given up" in text
        assert "raised" in text


def test_ids_that_a_router_writes_into_one_buffer_are_counted_as_they_were() -> None:
    model = tiny_moe.build("mixtral")
    seen: list[int] = []
    for layer in model.model.layers:
        kept: dict[Any, torch.Tensor] = {}

        def routed(hidden: Any, own: Any = layer.mlp.gate.forward, kept: dict[Any, Any] = kept) -> Any:
            logits, weights, ids = own(hidden)
            seen.append(ids.unique().numel())
            return logits, weights, kept.setdefault(ids.shape, torch.empty_like(ids)).copy_(ids)

        layer.mlp.gate.forward = routed
    profiler = profiler_of(model)
    profiler.attach()
    with torch.no_grad():
        for _ in range(12):
            model(torch.randint(3, 90, (1, 2)))
    profile = LayerProfile(profiler)
    profiler.detach()
    counted = [layer.roofline.points.distinct_experts for layer in profile.layers]
    assert np.stack(counted, axis=1).reshape(-1).tolist() == seen


def test_what_a_checkpoint_computes_again_is_no_second_forward() -> None:
    model = ListModel(2)
    profiler = profiler_of(model)
    profiler.attach()
    ids = torch.arange(6)[None]

    hidden = model.embed(ids)
    model(ids)  # the forward that counts

    for layer in model.layers:
        hidden = checkpoint(layer["mlp"], hidden, use_reentrant=False)  # type: ignore[index]
    hidden.sum().backward()
    profile = LayerProfile(profiler)
    profiler.detach()
    assert profile.num_forwards == 1
    assert len(profile.spans.record[profile.spans.part == Part.BLOCK]) == 2
    # Two blocks alone, and each again within backward.
    assert profile.overhead.num_outside == 4


def test_a_checkpointed_forward_has_the_times_of_its_first_run_alone() -> None:
    model = tiny_moe.build("olmoe").train()
    model.activation_checkpointing_enable({"use_reentrant": False})
    profiler = profiler_of(model)
    profiler.attach()
    model(torch.randint(3, 90, (1, 6)), use_cache=False).logits.sum().backward()
    profile = LayerProfile(profiler)
    profiler.detach()
    assert [layer.num_calls for layer in profile.layers] == [1, 1, 1]
    assert profile.overhead.num_outside == 3


def test_a_forward_that_raises_is_given_up_and_the_next_one_is_whole() -> None:
    model = ListModel(2)
    profiler = profiler_of(model)
    profiler.attach()
    with torch.no_grad():
        with pytest.raises(IndexError):
            model(torch.tensor([[999]]))
        with pytest.raises(RuntimeError):
            _failing_inside(model)
        model(torch.arange(4)[None])
    profile = LayerProfile(profiler)
    profiler.detach()
    assert profile.num_forwards == 1
    assert profile.overhead.num_given_up == 2
    assert profile.notes == {"a forward raised: its times were not kept": 2}
    assert [layer.num_calls for layer in profile.layers] == [1, 1]


def _failing_inside(model: ListModel) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("planted")

    handle = model.layers[1]["mlp"].experts[0].register_forward_pre_hook(fail)  # type: ignore[index]
    try:
        model(torch.arange(64)[None])
    finally:
        handle.remove()


def test_a_failing_hook_never_reaches_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ListModel(1)
    profiler = profiler_of(model)

    def broken(*_: Any) -> int:
        raise OSError("no clock")

    monkeypatch.setattr(clocks.HostClock, "mark", broken)
    profiler.attach()
    ids = torch.arange(4)[None]
    with torch.no_grad():
        model(ids)
    profiler.detach()
    assert any("no clock" in note for note in profiler.notes)


def test_threads_have_forwards_of_their_own() -> None:
    model = ListModel(2)
    profiler = profiler_of(model)
    profiler.attach()

    def run() -> None:
        with torch.no_grad():
            for _ in range(10):
                model(torch.arange(12)[None])

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    profile = LayerProfile(profiler)
    profiler.detach()
    assert profile.num_forwards == 30
    assert [layer.num_calls for layer in profile.layers] == [30, 30]
    assert profile.spans.num_unmatched == 0
    assert len({record.lane for record in profile.records}) == 3


def test_forwards_of_several_threads_are_numbered_as_the_capture_numbers_them() -> None:
    model = ListModel(2)
    switches = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with MoEDebugger(model, profiling=True) as debugger:

            def run(token: int) -> None:
                with torch.no_grad():
                    for _ in range(40):
                        model(torch.full((1, 4 + token), token))

            threads = [threading.Thread(target=run, args=(token,)) for token in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            profile = debugger.layer_profile()
            decisions = debugger.session.decisions()  # type: ignore[union-attr]
    finally:
        sys.setswitchinterval(switches)
    assert sorted(record.forward_index for record in profile.records) == list(range(160))
    points = profile.roofline.points
    assert len(points) == 160
    # Rows x k x layers x operations of a row, of the very forward with that number.
    tokens = np.bincount(decisions.forward_index[decisions.layer_index == 0], minlength=160)
    assert points.flops.tolist() == (tokens[points.forward_index] * 2 * 2 * 2 * 16 * 16).tolist()


def test_memory_is_bounded_and_drops_are_counted() -> None:
    model = ListModel(2)
    profiler = profiler_of(model, limit_bytes=20_000)
    profiler.attach()
    with torch.no_grad():
        for _ in range(64):
            model(torch.arange(12)[None])
    profile = LayerProfile(profiler)
    profiler.detach()
    assert profile.overhead.used_bytes <= 20_000
    assert 0 < profile.num_forwards < 64
    assert profile.overhead.num_dropped == 64 - profile.num_forwards
    assert profile.table.num_forwards_dropped == profile.overhead.num_dropped
    assert profile.records[-1].forward_index == 63


def test_it_reports_what_it_costs() -> None:
    model = tiny_moe.build("olmoe")
    with MoEDebugger(model, profiling=True) as debugger, torch.no_grad():
        for _ in range(20):
            model(torch.randint(3, 90, (1, 16)))
        overhead = debugger.layer_profile().overhead
    assert 0 < overhead.own_s < 10
    assert 0 < overhead.share < 1
    assert overhead.num_forwards == 20
    assert overhead.num_dropped == overhead.num_given_up == overhead.num_pending == overhead.num_outside == 0


def test_experts_that_layers_share_are_told_apart_by_the_block_that_runs(fake_time: FakeTime) -> None:
    model = ListModel(2, clock=fake_time, default=(500, 10))
    model.layers[1]["mlp"].experts = model.layers[0]["mlp"].experts  # type: ignore[index]
    profiler = profiler_of(model)
    profiler.attach()
    with torch.no_grad():
        model(torch.arange(8)[None])
    profile = LayerProfile(profiler)
    profiler.detach()
    assert len(profile.layers) == 2
    for summary in profile.summaries:
        assert summary.calls.expert_rows is not None
        assert summary.calls.expert_rows.sum(axis=1).tolist() == [16]
