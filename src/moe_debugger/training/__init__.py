"""Training: steps, series (loss, gradient norms...) and the callback for `transformers.Trainer`.

`MoEDebuggerCallback` is imported when it is first used: it needs transformers, the rest needs numpy only.
"""

from typing import TYPE_CHECKING, Any

from .recorder import SeriesRecorder
from .series import SERIES_NAMES, SeriesPoint, SeriesStore, SeriesTable
from .step import StepScope

if TYPE_CHECKING:
    from .callback import MoEDebuggerCallback

__all__ = [
    "SERIES_NAMES",
    "MoEDebuggerCallback",
    "SeriesPoint",
    "SeriesRecorder",
    "SeriesStore",
    "SeriesTable",
    "StepScope",
]


def __getattr__(name: str) -> Any:
    if name != "MoEDebuggerCallback":
        raise AttributeError(f"module 'moe_debugger.training' has no attribute {name!r}")
    from .callback import MoEDebuggerCallback

    return MoEDebuggerCallback


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
