"""A detector for moe-debugger: layers in which the less used half of the experts does next to nothing."""

from collections.abc import Iterable

import numpy as np

from moe_debugger.analysis import EvidenceRow, Finding, FindingKind, Severity
from moe_debugger.analysis.plugins import DetectorView

__all__ = ["QuietHalf"]

_LIMIT = 0.05


class QuietHalf:
    """Reports layers whose less used half of the experts serves less than 5 % of the load."""

    name = "quiet-half"
    version = "1.0"

    def detect(self, view: DetectorView) -> Iterable[Finding]:
        """Yield one finding for each such layer, on as much evidence as the built-in rules ask for."""
        for index, layer in view.layers.items():
            if (
                layer.metrics.num_tokens < view.thresholds.min_tokens
                or view.num_requests < view.thresholds.min_requests
            ):
                continue
            counts = np.sort(layer.counts)
            share = float(counts[: len(counts) // 2].sum() / counts.sum())
            if share < _LIMIT:
                yield Finding(
                    kind=FindingKind.LOAD_IMBALANCE,
                    severity=Severity.INFO,
                    code="half_is_idle",
                    layer_index=index,
                    since_step=layer.first_step,
                    args={
                        "title": f"Half of layer {index} idles",
                        "summary": f"The less used half of its experts serves {share:.1%} of the load.",
                        "remedy": "Send other kinds of text before you call them idle.",
                    },
                    evidence=(EvidenceRow("share", share, f"< {_LIMIT}", sample_size=layer.metrics.num_assignments),),
                    statistic=share,
                )
