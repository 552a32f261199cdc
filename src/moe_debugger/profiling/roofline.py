"""The roofline of expert weights: how many bytes of them a step touches, how much it computes with them. Pure numpy."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_debugger.errors import InvalidInputError

__all__ = ["Peak", "Roofline", "RooflinePoints", "roofline_of"]

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Peak:
    """What the machine could do.

    Attributes:
        gflops: 10^9 operations per second, a multiply-add as two.
        gbps: 10^9 bytes per second, read from memory.
        source: how it was found, in words.

    Raises:
        InvalidInputError: a value is not finite and above 0.
    """

    gflops: float
    gbps: float
    source: str = "given"

    def __post_init__(self) -> None:
        if not (0 < self.gflops < math.inf and 0 < self.gbps < math.inf):
            raise InvalidInputError(
                f"peak of {self.gflops} GFLOP/s and {self.gbps} GB/s: expected finite numbers above 0 for both"
            )

    @property
    def ridge(self) -> float:
        """Operations per byte from which on the machine is bound by computing."""
        return self.gflops / self.gbps

    def attainable(self, intensity: Floats) -> Floats:
        """Return GFLOP/s that the machine could reach at an arithmetic intensity."""
        return np.minimum(self.gflops, intensity * self.gbps)


@dataclass(frozen=True, slots=True)
class RooflinePoints:
    """r calls of the experts of one layer, or of a whole step.

    Attributes:
        step, forward_index: [r].
        record: [r] position of the forward among those of the profile.
        distinct_experts: [r] experts with any row (of a step: summed over its layers).
        active_bytes: [r] distinct experts x bytes of one expert's weights.
        flops: [r] rows in experts x operations of one row.
        seconds: [r] time in the experts.
    """

    step: npt.NDArray[np.int64]
    record: npt.NDArray[np.int64]
    forward_index: npt.NDArray[np.int64]
    distinct_experts: Floats
    active_bytes: Floats
    flops: Floats
    seconds: Floats

    def __len__(self) -> int:
        return len(self.step)

    @property
    def intensity(self) -> Floats:
        """[r] operations per byte of active weights."""
        return _ratio(self.flops, self.active_bytes)

    @property
    def gbps(self) -> Floats:
        """[r] achieved: active bytes over time, 10^9 bytes per second."""
        return _ratio(self.active_bytes, self.seconds) / 1e9

    @property
    def gflops(self) -> Floats:
        """[r] achieved: operations over time, 10^9 per second."""
        return _ratio(self.flops, self.seconds) / 1e9


@dataclass(frozen=True, slots=True)
class Roofline:
    """The roofline of one layer (or all layers, `layer_index` -1): medians over its points.

    Attributes:
        points: one for each call (layer) or forward (all layers).
        peak: None where none was given or measured.
        reason: why there are no points; empty where there are.
    """

    layer_index: int
    points: RooflinePoints
    peak: Peak | None = None
    reason: str = ""

    def median(self, name: str) -> float:
        """Return the median of a field of the points; NaN without points."""
        values = np.asarray(getattr(self.points, name), np.float64)
        values = values[np.isfinite(values)]
        return float(np.median(values)) if len(values) else float("nan")

    @property
    def shares(self) -> Floats:
        """[r] achieved over attainable GFLOP/s at the same intensity; NaN where unknown, empty without a peak."""
        if self.peak is None:
            return np.zeros(0)
        return _ratio(self.points.gflops, self.peak.attainable(self.points.intensity))

    @property
    def attained_share(self) -> float:
        """Median of the shares; NaN without any."""
        known = self.shares[np.isfinite(self.shares)]
        return float(np.median(known)) if len(known) else float("nan")

    @property
    def side(self) -> str:
        """ "memory" or "compute": which part of the roof lies above the median intensity; empty where unknown.

        Whether that is the limit is another question, which `find_bottlenecks` answers.
        """
        intensity = self.median("intensity")
        if self.peak is None or not np.isfinite(intensity):
            return ""
        return "memory" if intensity < self.peak.ridge else "compute"

    def to_dict(self) -> dict[str, Any]:
        """Return the medians as plain values."""
        names = ("distinct_experts", "active_bytes", "flops", "seconds", "intensity", "gbps", "gflops")
        return {
            "layer_index": self.layer_index,
            "num_points": len(self.points),
            **{name: self.median(name) for name in names},
            "attained_share": self.attained_share,
            "side": self.side,
            "peak": None if self.peak is None else asdict(self.peak),
            "reason": self.reason,
        }


def roofline_of(
    *,
    step: npt.ArrayLike,
    record: npt.ArrayLike,
    forward_index: npt.ArrayLike,
    expert_rows: npt.ArrayLike,
    seconds: npt.ArrayLike,
    expert_bytes: float,
    flops_per_row: float,
) -> RooflinePoints:
    """Return the points of one layer.

    Args:
        step, record, forward_index: [r].
        expert_rows: [r, E] rows of each expert.
        seconds: [r] time in the experts.
        expert_bytes: weights of one expert.
        flops_per_row: operations of one row in one expert.
    """
    rows = np.asarray(expert_rows, np.float64)
    distinct = (rows > 0).sum(axis=1).astype(np.float64)
    return RooflinePoints(
        step=np.asarray(step, np.int64),
        record=np.asarray(record, np.int64),
        forward_index=np.asarray(forward_index, np.int64),
        distinct_experts=distinct,
        active_bytes=distinct * expert_bytes,
        flops=rows.sum(axis=1) * flops_per_row,
        seconds=np.asarray(seconds, np.float64),
    )


def _ratio(above: Floats, below: Floats) -> Floats:
    found: Floats = np.full(len(above), np.nan)
    np.divide(above, below, out=found, where=below > 0)
    return found
