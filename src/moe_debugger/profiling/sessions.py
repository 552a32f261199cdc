"""The profile of one session: the profiler beside its capture, what it gives back, and what goes to the fleet."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from moe_debugger.capture import Capture
    from moe_debugger.training.series import SeriesPoint

    from .report import LayerProfile
    from .roofline import Peak

__all__ = ["LayerProfiling"]


_MISSED = (
    "a forward ran that the profiler did not see (compiled after profiling began, or captured into a CUDA graph): not "
    "measured"
)


class _Options(Protocol):
    @property
    def layer_numbers(self) -> Mapping[int, int]: ...
    @property
    def expert_owners(self) -> Mapping[int, tuple[int, ...]]: ...
    @property
    def model_name(self) -> str: ...
    @property
    def peak(self) -> "Peak | None": ...


class LayerProfiling:
    """Times the model of `capture` until `stop`.

    Args:
        capture: whose hooks are on the model already: ours lie inside of them.
        options: of the session.

    Raises:
        ModelNotSupportedError: the model is compiled.
    """

    def __init__(self, capture: "Capture", options: _Options) -> None:
        # Loaded with the first profile: a session without one needs none of it.
        from .live import LiveProfile
        from .profiler import LayerProfiler

        self._capture = capture
        self._options = options
        self._profiler = LayerProfiler(
            capture.model, capture.discovery.sites, numbering=lambda: capture.current_forward
        )
        self._profiler.attach()
        self._num_before = capture.num_forwards
        self._live = LiveProfile(
            self._profiler,
            layer_numbers=options.layer_numbers,
            expert_owners=options.expert_owners,
            peak=options.peak,
        )

    def mark(self) -> int:
        """Return a mark for `profile(after=...)`."""
        self._profiler.settle(timeout_s=1.0)
        return self._profiler.store.num_added

    def profile(self, *, after: int = 0, peak: "Peak | None" = None) -> "LayerProfile":
        """Return the profile of the forwards since a mark; 0 = all that are kept."""
        from .report import LayerProfile

        self._profiler.settle(timeout_s=1.0)
        # The profiler's hook runs first where a forward ends, so it is never behind.
        timed = self._profiler.num_forwards + self._profiler.num_given_up
        num_missed = self._capture.num_forwards - self._num_before - timed
        profile = LayerProfile(
            self._profiler,
            layer_numbers=self._options.layer_numbers,
            expert_owners=self._options.expert_owners,
            peak=peak or self._options.peak,
            records=self._profiler.store.records(after=after),
            model_name=self._options.model_name or "model",
        )
        if num_missed > 0:
            profile.notes[_MISSED] = num_missed
        return profile

    def points(self) -> "list[SeriesPoint]":
        """Return what goes to the fleet now."""
        return self._live.points()

    def stop(self) -> None:
        """Remove the hooks; what was timed stays readable."""
        self._profiler.detach()
