"""The block of one training step: `with debugger.step(n) as step:`."""

from collections.abc import Callable, Mapping
from typing import Any, SupportsFloat

from .optimizer_watch import OptimizerWatch

__all__ = ["StepScope"]


class StepScope:
    """What `MoEDebugger.step` returns: forwards inside its `with` block belong to the step.

    What runs after the block, such as an evaluation, belongs to the same step until the next one is named.

    Attributes:
        n: the global step.
    """

    def __init__(
        self,
        n: int,
        *,
        enter: Callable[[int], OptimizerWatch | None],
        record: Callable[[int, Mapping[str, Any]], None],
        leave: Callable[[int], None],
    ) -> None:
        self.n = n
        self._enter = enter
        self._record = record
        self._leave = leave
        self._watch: OptimizerWatch | None = None

    def record(self, **series: SupportsFloat) -> None:
        """Record values of this step: numbers, or tensors of one element, which are read later without waiting.

        Raises:
            InvalidInputError: a value is no number.
        """
        self._record(self.n, series)

    def __enter__(self) -> "StepScope":
        self._watch = self._enter(self.n)
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        watch, self._watch = self._watch, None
        if watch is not None:
            watch.remove()
        # A step that failed has no gradients, or half of them.
        if kind is None and not (watch is not None and watch.has_read):
            self._leave(self.n)
