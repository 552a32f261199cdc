"""Reads small results from a device later, without making the training thread or the device wait."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

__all__ = ["Readout", "is_tensor"]


class Readout:
    """Vectors on their way to the host.

    The copies run on each device's current stream, behind the kernels that compute the vectors; `is_ready` asks an
    event and never waits.
    """

    def __init__(self, vectors: "Sequence[torch.Tensor]") -> None:
        import torch

        self._events: list[Any] = []
        self._hosts: list[torch.Tensor] = []
        for vector in vectors:
            vector = vector.detach()
            if not vector.is_cuda:
                # A copy: the caller's tensor may be written to before it is read.
                self._hosts.append(vector.to("cpu", copy=True))
                continue
            host = torch.empty(vector.shape, dtype=vector.dtype, pin_memory=True)
            host.copy_(vector, non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(vector.device))
            self._hosts.append(host)
            self._events.append(event)

    def is_ready(self) -> bool:
        """Return whether `values` would not wait."""
        return all(event.query() for event in self._events)

    def values(self) -> list[npt.NDArray[np.float64]]:
        """Return the vectors, waiting for them: not for the training thread."""
        for event in self._events:
            event.synchronize()
        return [host.double().reshape(-1).numpy() for host in self._hosts]


def is_tensor(value: object) -> bool:
    """Return whether `value` is a torch tensor, without importing torch."""
    return callable(getattr(value, "detach", None)) and hasattr(value, "device")
