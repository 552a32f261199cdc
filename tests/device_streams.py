"""Runtimes of devices that are not there, for the code that copies from a device."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


class WrittenDown:
    """A runtime that does nothing and writes down what it was asked for.

    Args:
        device_type: type of the device whose tensors it takes for its own.
    """

    def __init__(self, device_type: str) -> None:
        self.device_type = device_type
        self.asked: list[str] = []
        self.pinned: list[torch.Tensor] = []
        self.kept: list[torch.Tensor] = []

    def is_in_use(self) -> bool:
        return True

    def is_device(self, tensor: Any) -> bool:
        return bool(tensor.device.type == self.device_type)

    def new_stream(self, device: Any) -> Any:
        self.asked.append("stream")
        return object()

    def after_current(self, stream: Any, device: Any) -> None:
        self.asked.append("after current")

    def use(self, stream: Any) -> AbstractContextManager[Any]:
        self.asked.append("use")
        return nullcontext()

    def new_pinned(self, tensor: Any) -> Any:
        self.pinned.append(torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu"))
        return self.pinned[-1]

    def keep_for(self, tensor: Any, stream: Any) -> None:
        self.kept.append(tensor)

    def mark(self, stream: Any) -> Any:
        self.asked.append("mark")
        return Event(self)


class Event:
    """An event that is over at once."""

    def __init__(self, owner: WrittenDown) -> None:
        self._owner = owner

    def synchronize(self) -> None:
        self._owner.asked.append("wait")
