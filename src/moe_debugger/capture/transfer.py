"""Moves what the hooks kept to the host, without making the model or the device wait."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Protocol

from .raw import RawForward
from .sites import Site
from .sums import reduce_on_device

__all__ = ["CudaStreams", "DeviceStreams", "HostTransfer"]

_FRAME_TENSORS = ("position", "is_padding", "token_ids", "segment_ends")


class DeviceStreams(Protocol):
    """What the transfer needs of a device's runtime; a test gives one that only writes down what it is asked for."""

    def is_in_use(self) -> bool:
        """Return whether any tensor may lie on such a device."""
        ...

    def is_device(self, tensor: Any) -> bool:
        """Return whether a tensor lies on such a device."""
        ...

    def new_stream(self, device: Any) -> Any:
        """Return a stream of ours."""

    def after_current(self, stream: Any, device: Any) -> None:
        """Let `stream` begin with what comes next after all that the model has asked the device for so far."""

    def use(self, stream: Any) -> AbstractContextManager[Any]:
        """Return a context in which work goes to `stream`."""
        ...

    def new_pinned(self, tensor: Any) -> Any:
        """Return an empty host tensor like `tensor` that the device writes into by itself."""

    def keep_for(self, tensor: Any, stream: Any) -> None:
        """Let the allocator not hand the memory of `tensor` out again before `stream` is done with it."""

    def mark(self, stream: Any) -> Any:
        """Return an event that is over when `stream` has done all that it was asked for so far."""


class CudaStreams:
    """The runtime of CUDA, and of ROCm under the same names."""

    def is_in_use(self) -> bool:
        """See `DeviceStreams`."""
        import torch

        return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]

    def is_device(self, tensor: Any) -> bool:
        """See `DeviceStreams`."""
        return bool(tensor.is_cuda)

    def new_stream(self, device: Any) -> Any:
        """See `DeviceStreams`."""
        import torch

        return torch.cuda.Stream(device=device)  # type: ignore[no-untyped-call]

    def after_current(self, stream: Any, device: Any) -> None:
        """See `DeviceStreams`."""
        import torch

        stream.wait_stream(torch.cuda.current_stream(device))

    def use(self, stream: Any) -> AbstractContextManager[Any]:
        """See `DeviceStreams`."""
        import torch

        return torch.cuda.stream(stream)

    def new_pinned(self, tensor: Any) -> Any:
        """See `DeviceStreams`."""
        import torch

        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)

    def keep_for(self, tensor: Any, stream: Any) -> None:
        """See `DeviceStreams`."""
        tensor.record_stream(stream)

    def mark(self, stream: Any) -> Any:
        """See `DeviceStreams`."""
        import torch

        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(stream)
        return event


class HostTransfer:
    """Copies a forward's device tensors into pinned memory on a side stream; host tensors are left as they are.

    Args:
        sites: the model's MoE layers, by layer index.
        streams: the device's runtime.
    """

    def __init__(self, sites: Sequence[Site], streams: DeviceStreams | None = None) -> None:
        self._sites = sites
        self._num_ids = [site.info.num_experts + site.info.num_identity_experts for site in sites]
        self._cuda = CudaStreams() if streams is None else streams
        self._streams: dict[Any, Any] = {}
        # How the logits of a layer are read, where rows are to be reduced on the device; None = never.
        self.reduces_with: Mapping[int, str | None] | None = None

    def start(self, raw: RawForward) -> None:
        """Replace the tensors of `raw` by host tensors; `raw.copied` holds the events to wait for before reading."""
        if not self._cuda.is_in_use():
            return
        devices = {tensor.device for tensor in _tensors(raw) if self._cuda.is_device(tensor)}
        if not devices:
            return
        is_one_device = len(devices) == 1
        events = []
        for device in devices:
            stream = self._streams.get(device)
            if stream is None:
                stream = self._streams[device] = self._cuda.new_stream(device)
            given = [tensor for tensor in _tensors(raw) if tensor.device == device]
            self._cuda.after_current(stream, device)
            with self._cuda.use(stream):
                if self.reduces_with is not None and is_one_device:
                    reduce_on_device(raw, self._sites, self.reduces_with)
                for put, tensor in list(self._narrowed(raw, device)):
                    host = self._cuda.new_pinned(tensor)
                    host.copy_(tensor, non_blocking=True)
                    put(host)
                for tensor in given:
                    self._cuda.keep_for(tensor, stream)
            events.append(self._cuda.mark(stream))
        raw.copied = events

    @staticmethod
    def wait(raw: RawForward) -> None:
        """Wait, on the capture's own thread, until the copies of `raw` are done."""
        for event in raw.copied or ():
            event.synchronize()
        raw.copied = None

    def _narrowed(self, raw: RawForward, device: Any) -> Iterator[tuple[Callable[[Any], None], Any]]:
        """Yield each tensor of `raw` on `device`, ids as int16 where they fit, and how to put its host copy in place.

        Tensors that are made here belong to the stream that copies them: the allocator knows when they are free.
        """
        import torch

        for layer in raw.layers:
            for name, value in layer.tensors.items():
                if not hasattr(value, "device") or value.device != device:
                    continue
                if name == "expert_ids":
                    value = value.to(torch.int16 if self._num_ids[layer.layer_index] < 2**15 else torch.int32)
                yield partial(layer.tensors.__setitem__, name), value
        for frame in raw.frames:
            for name in _FRAME_TENSORS:
                value = getattr(frame, name)
                if value is not None and value.device == device:
                    yield partial(setattr, frame, name), value


def _tensors(raw: RawForward) -> Iterator[Any]:
    for layer in raw.layers:
        yield from (value for value in layer.tensors.values() if hasattr(value, "device"))
    for frame in raw.frames:
        yield from (value for name in _FRAME_TENSORS if (value := getattr(frame, name)) is not None)
