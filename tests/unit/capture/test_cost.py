"""What watching may cost: no hook waits for a device, and memory stays within its bound."""

import gc
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from device_streams import WrittenDown
from oracle.builds import EVERY_BUILD
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from moe_debugger import MoEDebugger
from moe_debugger.capture import HostTransfer, Intake, RawForward, Site, Tap, TokenFrame
from moe_debugger.capture.drafts import DraftHold
from moe_debugger.capture.model_hooks import TapHook
from moe_debugger.capture.raw import RawLayer
from moe_debugger.capture.sums import ROW_COUNTS

# Operations whose result the host must have, or whose shape it must know, before it can go on.
_SYNCHRONISING = {
    "_local_scalar_dense", "is_nonzero", "equal", "nonzero", "nonzero_static", "masked_select", "unique_dim", "_unique",
    "_unique2", "unique_consecutive", "bincount", "histc", "argwhere", "item",
}  # fmt: skip
# Tensors of this device have no values: whoever needs one fails. It stands for a GPU where there is none.
_DEVICE = "meta"
_LEVELS = ("counts", "routes", "routes+tokens", "full")
_NAMES = ("mixtral", "deepseek_v3", "llama4_text", "switch_transformers", "longcat_flash")

Call = tuple[Any, Any, tuple[Any, ...]]


class SyncWatch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes down each operation that would make the host wait for the device."""

    def __init__(self, streams: WrittenDown) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._streams = streams
        self.found: list[str] = []
        self.num_operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        self.num_operations += 1
        tensors = [each for each in (*args, *kwargs.values()) if isinstance(each, torch.Tensor)]
        waits = name in _SYNCHRONISING or self._is_masked(name, args) or self._is_blocking_copy(name, args, kwargs)
        if waits and any(each.device.type == _DEVICE for each in tensors):
            self.found.append(name)
        if name == "copy_" and args[1].device.type == _DEVICE and not waits:
            return args[0]  # there is nothing to copy
        return func(*args, **kwargs)

    def _is_masked(self, name: str, args: Any) -> bool:
        """Indexing by a mask asks how many entries it has."""
        if not name.startswith("index") or len(args) < 2 or not isinstance(args[1], list | tuple):
            return name == "repeat_interleave" and len(args) < 2
        return any(isinstance(each, torch.Tensor) and each.dtype is torch.bool for each in args[1])

    def _is_blocking_copy(self, name: str, args: Any, kwargs: Any) -> bool:
        if name == "_to_copy":
            return args[0].device.type == _DEVICE and str(kwargs.get("device", _DEVICE)).startswith("cpu")
        if name != "copy_" or args[0].device.type == args[1].device.type:
            return False
        is_free = kwargs.get("non_blocking", len(args) > 2 and args[2])
        # Memory that is not pinned is copied through a buffer, and waited for.
        return not is_free or all(args[0] is not each for each in self._streams.pinned)


def _record(model: Any, inputs: dict[str, Any]) -> list[Call]:
    """Return the calls of our hooks in one forward, with what they were given, in order."""
    calls: list[Call] = []
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in list(hooks.items()):
                if type(hook).__module__.startswith("moe_debugger"):
                    hooks[key] = _recorder(hook, calls)
    with torch.no_grad():
        model(**inputs)
    return calls


def _recorder(hook: Any, calls: list[Call]) -> Callable[..., Any]:
    def record(module: Any, *given: Any) -> Any:
        calls.append((hook, module, given))
        return hook(module, *given)

    return record


def _on_device(value: Any) -> Any:
    return tree_map_only(torch.Tensor, lambda tensor: tensor.to(_DEVICE), value)


def _call(self: Any, calls: list[Call], place: int) -> None:
    """Call a hook, and the ones after it from inside, as calls of modules lie in each other.

    The capture tells by the frames on the stack, and by what is `self` in them, which calls are under way.
    """
    hook, _, given = calls[place]
    hook(self, *given)
    if place + 1 < len(calls):
        _call(calls[place + 1][1], calls, place + 1)


def _replay(
    debugger: MoEDebugger, inputs: dict[str, Any], planted: Tap | None = None
) -> tuple[SyncWatch, list[RawForward], list[str]]:
    """Run the hooks of a forward again, with tensors of a device that is not there.

    Returns:
        what was asked of the device, the forwards that were handed on, and what the hooks complained about.
    """
    session = debugger.session
    assert session is not None
    capture = session._capture
    with torch.no_grad():
        debugger.model(**inputs)
    session.flush()  # the logits are understood from here on
    calls = _record(debugger.model, inputs)
    streams = WrittenDown(_DEVICE)
    transfer = HostTransfer(capture.discovery.sites, streams)
    transfer.reduces_with = capture._transfer.reduces_with
    handed_on: list[RawForward] = []
    capture._transfer, capture._drafts = transfer, DraftHold(handed_on.append)
    capture.problems.clear()
    watch = SyncWatch(streams)
    moved: list[Call] = []
    for hook, module, given in calls:
        if planted is not None and isinstance(hook, TapHook) and hook._tap.completes:
            hook = TapHook(capture, capture._local, hook._site, planted, lambda values: None)
        moved.append((hook, module, _on_device(given)))
    with torch.no_grad(), watch:
        _call(moved[0][1], moved, 0)
    return watch, handed_on, list(capture.problems)


@pytest.mark.parametrize("level", _LEVELS)
@pytest.mark.parametrize("name", _NAMES)
def test_no_hook_waits_for_the_device(name: str, level: Any) -> None:
    case = EVERY_BUILD[name]
    model = case.make()
    inputs = case.inputs(model)
    with MoEDebugger(model, level=level) as debugger:
        watch, handed_on, problems = _replay(debugger, inputs)
        assert watch.found == []
        assert problems == []
        (raw,) = handed_on
        assert watch.num_operations > 0
        kept = [value for layer in raw.layers for value in layer.tensors.values() if isinstance(value, torch.Tensor)]
        assert kept
        assert {value.device.type for value in kept} == {"cpu"}, "all was copied"
        is_reducible = name != "switch_transformers"
        assert all((ROW_COUNTS in layer.tensors) == (level == "counts" and is_reducible) for layer in raw.layers)
        debugger.close()


def _item(tensor: Any) -> Any:
    return tensor.sum().item()


@pytest.mark.parametrize(
    "wait",
    [
        _item,
        lambda tensor: tensor.tolist(),
        lambda tensor: tensor.cpu(),
        lambda tensor: tensor.to("cpu", non_blocking=True),
        lambda tensor: tensor[tensor > 0],
        lambda tensor: (tensor > 0).nonzero(),
        lambda tensor: bool((tensor > 0).all()),
        lambda tensor: tensor.unique(),
        lambda tensor: torch.equal(tensor, tensor),
        lambda tensor: torch.bincount(tensor.reshape(-1)),
        lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor, non_blocking=True),
    ],
)
def test_a_hook_that_waits_for_the_device_is_found(wait: Callable[[Any], Any]) -> None:
    case = EVERY_BUILD["mixtral"]
    model: Any = case.make()

    def keep(args: Any, kwargs: Any, output: Any) -> Any:
        wait(args[1])
        return {"expert_ids": args[1], "gate_weights": args[2]}, args[1].shape[0]

    with MoEDebugger(model) as debugger:
        planted = Tap(model.model.layers[0].mlp.experts, "before", keep)
        watch, _, _ = _replay(debugger, case.inputs(model), planted)
        assert watch.found
        debugger.close()


def test_a_forward_goes_to_the_host_on_a_stream_of_its_own_and_is_waited_for_by_our_thread_alone() -> None:
    streams = WrittenDown("cpu")
    frame = TokenFrame("decoder", 2, 3, ["a", "b"], are_ids_minted=True, phases=(1, 1))
    frame.token_ids = torch.arange(6).reshape(2, 3)
    ids, weights = torch.tensor([[0, 3]] * 6), torch.rand(6, 2)
    raw = RawForward(0, 0, 0, [frame], [RawLayer(0, frame, {"expert_ids": ids, "gate_weights": weights}, 6)])
    given = [ids, weights, frame.token_ids]
    transfer = HostTransfer([_site()], streams)
    transfer.start(raw)
    assert streams.asked == ["stream", "after current", "use", "mark"]
    assert [id(each) for each in streams.kept] == [id(each) for each in given], "freed only after the copy"
    assert raw.layers[0].tensors["expert_ids"].dtype is torch.int16
    transfer.start(RawForward(1, 1, 0, [frame], []))
    assert streams.asked.count("stream") == 1
    transfer.wait(raw)
    assert streams.asked[-1] == "wait"
    assert raw.copied is None
    assert raw.layers[0].tensors["expert_ids"].tolist() == ids.tolist()
    assert raw.layers[0].tensors["gate_weights"].tolist() == weights.tolist()


def _site() -> Site:
    case = EVERY_BUILD["mixtral"]
    debugger = MoEDebugger(case.make())
    site = debugger._capture.discovery.sites[0]
    debugger.close()
    return site


# -- memory ------------------------------------------------------------------------------------------------------------


def _resident_bytes() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def _large(index: int, num_bytes: int) -> RawForward:
    frame = TokenFrame("decoder", 1, 4, ["a"], are_ids_minted=True, phases=(2,))
    tensor = torch.ones(num_bytes, dtype=torch.uint8)
    return RawForward(index, index, 0, [frame], [RawLayer(0, frame, {"expert_ids": tensor}, 4)])


def test_a_full_buffer_holds_no_more_than_its_bound_and_what_does_not_fit_is_counted() -> None:
    go_on = threading.Event()
    limit = 16 << 20

    def process(raws: Sequence[RawForward]) -> None:
        go_on.wait(30)

    intake = Intake(process, lambda raw, error: None, limit)
    before = _resident_bytes()
    num_taken = sum(intake.offer(_large(index, 1 << 20)) for index in range(400))
    grown = _resident_bytes() - before
    statistics = intake.statistics()
    assert num_taken == 16
    assert statistics.num_dropped == 4 * (400 - 16)
    assert statistics.used_bytes == statistics.peak_bytes == limit
    assert grown < 2 * limit, f"{grown >> 20} MiB for a bound of {limit >> 20} MiB"
    go_on.set()
    assert intake.flush(30)
    assert intake.statistics().used_bytes == 0
    intake.close(10)


@pytest.mark.parametrize("level", ["counts", "routes"])
def test_memory_stays_bounded_while_no_broker_answers(level: Any) -> None:
    case = EVERY_BUILD["mixtral"]
    model = case.make()
    ids = torch.randint(3, 80, (8, 128))
    limit = 2 << 20
    debugger = MoEDebugger(model, level=level, fleet="nats://127.0.0.1:1", buffer_bytes=limit, max_rows_bytes=0)
    with torch.no_grad():
        session = debugger.start_session(wait_s=0)
        for _ in range(30):
            model(ids)
        session._intake.flush(30)
        before = _resident_bytes()
        started = time.monotonic()
        for _ in range(150):
            model(ids)
        session._intake.flush(30)
        grown = _resident_bytes() - before
        statistics = session.publisher_statistics()
        performance = debugger.get_performance_metrics()
    assert time.monotonic() - started < 100
    assert statistics is not None
    assert statistics.buffer_peak_bytes <= limit
    assert performance.buffer_peak_bytes <= limit
    # Rows of 180 forwards are about 30 MB on their way to the broker; sums never fill the buffer.
    assert ("buffer_full" in performance.num_dropped) == (level == "routes")
    assert grown < 12 << 20, f"{grown >> 20} MiB more after 150 further forwards"
    debugger.close()


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)
