"""Moves what the hooks kept to the host, without making the model or the device wait."""

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

        on_device = [layer.expert_ids.device for layer in raw.layers if layer.expert_ids.is_cuda]
        if not on_device:
            return
        events = []
        for device in dict.fromkeys(on_device):
            stream = self._streams.get(device)
            if stream is None:
                stream = self._streams[device] = torch.cuda.Stream(device=device)  # type: ignore[no-untyped-call]
            narrowed: list[tuple[Any, str, Any]] = []
            for layer in raw.layers:
                if layer.expert_ids.device != device:
                    continue
                dtype = torch.int16 if num_experts[layer.layer_index] < 2**15 else torch.int32
                narrowed.append((layer, "expert_ids", layer.expert_ids.to(dtype)))
                narrowed.append((layer, "gate_weights", layer.gate_weights.to(torch.float32)))
                if layer.logits is not None:
                    narrowed.append((layer, "logits", layer.logits.to(torch.float32)))
            for name in ("position", "is_padding", "token_ids"):
                tensor = getattr(raw, name)
                if tensor is not None and tensor.device == device:
                    narrowed.append((raw, name, tensor))
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                for owner, name, tensor in narrowed:
                    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
                    host.copy_(tensor, non_blocking=True)
                    # The allocator must not hand the device memory out again before the copy is done.
                    tensor.record_stream(stream)
                    setattr(owner, name, host)
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
