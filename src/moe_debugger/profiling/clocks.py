"""Clocks of the profiler: the host's for what runs on it, events on the stream for what runs on a CUDA device.

Neither waits. A mark of the host's clock is a number of nanoseconds. A mark of a CUDA device is an event that was
recorded on the current stream; when it was reached is read later, once the device says that it is over.
"""

import time
from typing import Any, Protocol

__all__ = ["CudaClock", "CudaEvents", "EventRuntime", "HostClock", "clock_of"]

# A stopped device must not let events pile up.
_MAX_SPARE_EVENTS = 65_536


class EventRuntime(Protocol):
    """What a CUDA clock asks of the device's runtime; a test gives one without a device."""

    def new_event(self) -> Any:
        """Return an event that takes the time."""
        ...

    def record(self, event: Any, device: Any) -> None:
        """Put the event on the device's current stream."""
        ...

    def is_over(self, event: Any) -> bool:
        """Return at once whether the device has passed the event."""
        ...

    def elapsed_ms(self, first: Any, second: Any) -> float:
        """Return the time between two events that are over."""
        ...

    def is_capturing(self) -> bool:
        """Return whether the current stream is being captured into a graph, where no event can be timed."""
        ...


class CudaEvents:
    """torch's events; nothing here synchronises."""

    def new_event(self) -> Any:
        """Return an event that takes the time."""
        import torch

        return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]

    def record(self, event: Any, device: Any) -> None:
        """Put the event on the device's current stream."""
        import torch

        event.record(torch.cuda.current_stream(device))

    def is_over(self, event: Any) -> bool:
        """Return at once whether the device has passed the event."""
        return bool(event.query())

    def elapsed_ms(self, first: Any, second: Any) -> float:
        """Return the time between two events that are over."""
        return float(first.elapsed_time(second))

    def is_capturing(self) -> bool:
        """Return whether the current stream is being captured into a graph."""
        import torch

        return bool(torch.cuda.is_current_stream_capturing())


class HostClock:
    """Nanoseconds of the host."""

    is_device = False

    def mark(self) -> int:
        """Return now."""
        return time.perf_counter_ns()


class CudaClock:
    """Events on one device's current stream."""

    is_device = True

    def __init__(self, device: Any, runtime: EventRuntime | None = None) -> None:
        self.device = device
        self.runtime: EventRuntime = CudaEvents() if runtime is None else runtime
        self._spare: list[Any] = []

    def mark(self) -> Any:
        """Return an event at the end of what is on the stream now."""
        # pop and append of a list are atomic: threads may share the spare events.
        try:
            event = self._spare.pop()
        except IndexError:
            event = self.runtime.new_event()
        self.runtime.record(event, self.device)
        return event

    def is_over(self, mark: Any) -> bool:
        """Return at once whether the device has passed the mark."""
        return self.runtime.is_over(mark)

    def since_ns(self, first: Any, mark: Any) -> int:
        """Return nanoseconds from `first` to `mark`, which are both over."""
        return round(self.runtime.elapsed_ms(first, mark) * 1e6)

    def give_back(self, marks: list[Any]) -> None:
        """Take marks whose times were read, to use them again."""
        if len(self._spare) < _MAX_SPARE_EVENTS:
            self._spare += marks


def clock_of(device: Any, clocks: "dict[str, HostClock | CudaClock]", runtime: EventRuntime | None = None) -> Any:
    """Return the clock for modules on `device`, one for each device; `clocks` keeps them."""
    kind = getattr(device, "type", "cpu")
    name = "host" if kind != "cuda" else str(device)
    if name not in clocks:
        clocks[name] = HostClock() if name == "host" else CudaClock(device, runtime)
    return clocks[name]
