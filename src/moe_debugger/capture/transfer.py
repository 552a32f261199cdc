"""Moves what the hooks kept to the host, without making the model or the device wait."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from .raw import RawForward

__all__ = ["HostTransfer"]


class HostTransfer:
    """Copies a forward's device tensors into pinned memory on a side stream; host tensors are left as they are."""

    def __init__(self) -> None:
        self._streams: dict[Any, Any] = {}

    def start(self, raw: RawForward, num_experts: dict[int, int]) -> None:
        """Replace the tensors of `raw` by host tensors; `raw.copied` is the event to wait for before reading them."""
        import torch

        devices = {
            value.device
            for layer in raw.layers
            for value in layer.tensors.values()
            if hasattr(value, "device") and value.is_cuda
        }
        if not devices:
            return
        events = []
        for device in devices:
            stream = self._streams.get(device)
            if stream is None:
                stream = self._streams[device] = torch.cuda.Stream(device=device)  # type: ignore[no-untyped-call]
            narrowed = list(_narrowed(raw, device, num_experts))
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                for put, tensor in narrowed:
                    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
                    host.copy_(tensor, non_blocking=True)
                    # The allocator must not hand the device memory out again before the copy is done.
                    tensor.record_stream(stream)
                    put(host)
                event = torch.cuda.Event()  # type: ignore[no-untyped-call]
                event.record(stream)
            events.append(event)
        raw.copied = events

    @staticmethod
    def wait(raw: RawForward) -> None:
        """Wait, on the capture's own thread, until the copies of `raw` are done."""
        for event in raw.copied or ():
            event.synchronize()
        raw.copied = None


def _narrowed(raw: RawForward, device: Any, num_experts: dict[int, int]) -> Iterator[tuple[Callable[[Any], None], Any]]:
    """Yield each tensor of `raw` on `device`, ids as int16 where they fit, and how to put its host copy in place."""
    import torch

    for layer in raw.layers:
        for name, value in layer.tensors.items():
            if not hasattr(value, "device") or value.device != device:
                continue
            if name == "expert_ids":
                value = value.to(torch.int16 if num_experts[layer.layer_index] < 2**15 else torch.int32)
            yield partial(layer.tensors.__setitem__, name), value
    for frame in raw.frames:
        for name in ("position", "is_padding", "token_ids", "segment_ends"):
            value = getattr(frame, name)
            if value is not None and value.device == device:
                yield partial(setattr, frame, name), value
