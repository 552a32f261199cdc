"""Times of a CUDA device, by a runtime of the test's: events that are over later, and never a wait for them."""

from typing import Any

import pytest
import tiny_moe
import torch
from torch import nn

from moe_debugger.capture.discovery import find_sites
from moe_debugger.profiling import LayerProfile, LayerProfiler, clocks, placing, profiler
from moe_debugger.profiling.collectives import ONE_PROCESS, CollectiveWatch
from moe_debugger.profiling.counting import ExpertCounts
from moe_debugger.profiling.hooks import OpenForward, ThreadState


class LateEvents:
    """A device whose work is done when the test says so; each event lies 10 µs behind the one before.

    It has neither `synchronize` nor `wait`: whoever asks for them fails.
    """

    def __init__(self) -> None:
        self.num_recorded = 0
        self.num_done = 0
        self.num_made = 0
        self.is_graph = False

    def new_event(self) -> dict[str, int]:
        self.num_made += 1
        return {}

    def record(self, event: dict[str, int], device: Any) -> None:
        self.num_recorded += 1
        event["at"] = self.num_recorded

    def is_over(self, event: dict[str, int]) -> bool:
        return event["at"] <= self.num_done

    def elapsed_ms(self, first: dict[str, int], second: dict[str, int]) -> float:
        assert self.is_over(first)
        assert self.is_over(second)
        return (second["at"] - first["at"]) * 0.01

    def is_capturing(self) -> bool:
        return self.is_graph

    def finish(self) -> None:
        self.num_done = self.num_recorded


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> LateEvents:
    """Take every module for one on a CUDA device."""
    events = LateEvents()

    def on_device(_: Any, known: dict[str, Any], runtime: Any = None) -> Any:
        return known.setdefault("cuda:0", clocks.CudaClock("cuda:0", runtime))

    monkeypatch.setattr(placing, "clock_of", on_device)
    return events


def _profiler(model: nn.Module, events: LateEvents) -> LayerProfiler:
    class Device:
        type = "cuda"

        def __str__(self) -> str:
            return "cuda:0"

    found = LayerProfiler(model, find_sites(model).sites, runtime=events)
    found._placement.names = ["cuda:0"] * len(found._placement.names)
    return found


def test_times_are_read_when_the_device_has_passed_them_and_never_before(device: LateEvents) -> None:
    model = tiny_moe.build("olmoe")
    timing = _profiler(model, device)
    timing.attach()
    ids = torch.randint(3, 90, (1, 4))
    with torch.no_grad():
        for _ in range(3):
            model(ids)
    assert timing.settle() == 3
    assert timing.num_pending == 3
    assert LayerProfile(timing, records=timing.store.records()).num_forwards == 0
    device.num_done = device.num_recorded // 3
    assert timing.settle() == 2
    device.finish()
    profile = LayerProfile(timing)
    timing.detach()
    assert profile.num_forwards == 3
    assert profile.overhead.num_pending == 0
    # Between the events of a forward lie 10 µs each: router and experts are neighbours.
    for layer in profile.summaries:
        assert layer.calls.router.tolist() == [10_000] * 3
        assert layer.calls.experts.tolist() == [10_000] * 3
        assert layer.calls.block.tolist() == [50_000] * 3
    assert not timing.notes


def test_events_are_used_again(device: LateEvents) -> None:
    model = tiny_moe.build("olmoe")
    timing = _profiler(model, device)
    timing.attach()
    ids = torch.randint(3, 90, (1, 4))
    with torch.no_grad():
        model(ids)
        device.finish()
        timing.settle()
        made = device.num_made
        for _ in range(5):
            model(ids)
            device.finish()
            timing.settle()
    timing.detach()
    assert device.num_made == made


def test_a_device_that_stopped_holds_no_more_than_its_bound(
    device: LateEvents, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profiler, "_MAX_PENDING", 4)
    model = tiny_moe.build("olmoe")
    timing = _profiler(model, device)
    timing.attach()
    with torch.no_grad():
        for _ in range(10):
            model(torch.randint(3, 90, (1, 4)))
    assert timing.num_pending == 4
    assert timing.num_given_up == 6
    device.finish()
    assert LayerProfile(timing).num_forwards == 4
    timing.detach()


def test_a_forward_that_is_captured_into_a_graph_is_not_timed(device: LateEvents) -> None:
    model = tiny_moe.build("olmoe")
    timing = _profiler(model, device)
    timing.attach()
    device.is_graph = True
    with torch.no_grad():
        model(torch.randint(3, 90, (1, 4)))
    timing.detach()
    assert device.num_recorded == 0
    assert any("CUDA graph" in note for note in timing.notes)


def test_rows_are_counted_on_the_device_without_a_number_on_the_host() -> None:
    from moe_debugger.profiling.counting import _device_counts

    ids = [torch.tensor([[0, 3], [3, 9]]), torch.tensor([[1, 1], [-1, 2]])]
    # The same arithmetic as on a device; on the meta device it would fail where it asked for a value.
    assert _device_counts(ids, 4).reshape(2, 5)[:, :4].tolist() == [[1, 0, 0, 2], [0, 2, 1, 0]]
    assert _device_counts([each.to("meta") for each in ids], 4).shape == (10,)


def test_rows_by_expert_of_several_layers() -> None:
    counts = ExpertCounts([(0, torch.tensor([[0, 5], [1, 0]])), (1, [4, 0]), (0, torch.tensor([[2, 2]]))], [3, 2])
    assert counts.is_ready()
    plans, rows = counts.values()
    assert plans.tolist() == [0, 1, 0]
    assert rows.tolist() == [[2, 1, 0], [4, 0, 0], [0, 0, 2]]
    plans, rows = ExpertCounts([], [3]).values()
    assert rows.shape == (0, 0)


# -- waiting for other ranks -------------------------------------------------------------------------------------------


class FakeDistributed:
    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.calls: list[str] = []

    def is_initialized(self) -> bool:
        return self.world_size > 0

    def get_world_size(self) -> int:
        return self.world_size

    def all_reduce(self, tensor: str, async_op: bool = False) -> str:
        self.calls.append(tensor)
        return tensor

    def all_to_all(self, tensor: str) -> str:
        raise RuntimeError(tensor)


class Counter:
    def __init__(self) -> None:
        self.now = 0

    def mark(self) -> int:
        self.now += 5
        return self.now


def _open(layer: int) -> ThreadState:
    state = ThreadState()
    state.open = OpenForward(object(), 0, 0, 0)
    state.open.layers = [layer] if layer >= 0 else []
    return state


def test_collectives_are_timed_in_the_block_that_runs_and_put_back() -> None:
    distributed = FakeDistributed(2)
    clock = Counter()
    state = _open(3)
    watch = CollectiveWatch(state, {-1: (2, clock), 3: (8, clock)}, distributed)
    original = distributed.all_reduce
    watch.install()
    assert distributed.all_reduce("a") == "a"
    with pytest.raises(RuntimeError, match="b"):
        distributed.all_to_all("b")
    assert state.open is not None
    assert state.open.codes == [8, 9, 8, 9]
    assert state.open.marks == [5, 10, 15, 20]
    state.open.layers = []
    distributed.all_reduce("c")
    assert state.open.codes[4:] == [2, 3]
    assert watch.reason == ""
    distributed.all_reduce("d", async_op=True)
    assert len(state.open.codes) == 6
    assert "1 collectives were started asynchronously" in watch.reason
    state.open = None
    distributed.all_reduce("e")
    watch.remove()
    assert distributed.all_reduce == original
    assert distributed.calls == ["a", "c", "d", "e"]


@pytest.mark.parametrize("world_size", [0, 1])
def test_one_process_waits_for_no_one(world_size: int) -> None:
    distributed = FakeDistributed(world_size)
    watch = CollectiveWatch(_open(0), {}, distributed)
    watch.install()
    assert watch.reason == ONE_PROCESS
    assert "all_reduce" not in vars(distributed)


# -- a real device -----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_times_of_a_real_device() -> None:
    model = tiny_moe.build("olmoe").to("cuda")
    ids = torch.randint(3, 90, (2, 64), device="cuda")
    with torch.no_grad():
        expected = model(ids).logits
        timing = LayerProfiler(model, find_sites(model).sites)
        timing.attach()
        torch.cuda.set_sync_debug_mode("error")
        try:
            outputs = [model(ids).logits for _ in range(40)]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
        profile = LayerProfile(timing)
        timing.detach()
    assert all(torch.equal(each, expected) for each in outputs)
    assert profile.num_forwards == 40
    for summary in profile.summaries:
        assert (summary.calls.block > 0).all()
        assert (summary.calls.experts <= summary.calls.block).all()
        assert summary.calls.expert_rows is not None
        assert set(summary.calls.expert_rows.sum(axis=1).tolist()) == {2 * 64 * 2}
    assert not timing.notes
