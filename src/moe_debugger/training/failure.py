"""Notices that a running `Trainer.train` fails, of which a Trainer tells its callbacks nothing."""

import functools
import sys
from collections.abc import Callable
from typing import Any

__all__ = ["FailureGuard"]

# What `Trainer.train` calls after `on_train_begin`, one after another: whatever raises, raises in one of them.
_PHASES = ("_run_epoch", "_evaluate", "_finalize_training")


class FailureGuard:
    """Calls `failed` where the Trainer, in whose `on_train_begin` this is made, raises before `release`.

    The methods of that one Trainer object are covered, not those of its class. Where none is found, as in a loop of
    one's own that calls callbacks, nothing is watched.

    Args:
        failed: called once, while the error is on its way.
    """

    def __init__(self, failed: Callable[[], None]) -> None:
        self._failed: Callable[[], None] | None = failed
        self._trainer = _running_trainer()
        self._covered: list[str] = []
        for name in _PHASES:
            method = getattr(self._trainer, name, None)
            if callable(method) and name not in vars(self._trainer):
                setattr(self._trainer, name, self._watched(method))
                self._covered.append(name)

    @property
    def is_watching(self) -> bool:
        """Whether a Trainer was found."""
        return bool(self._covered)

    def release(self) -> None:
        """Leave the Trainer as it was."""
        for name in self._covered:
            vars(self._trainer).pop(name, None)
        self._covered.clear()
        self._trainer = None

    def _watched(self, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                return method(*args, **kwargs)
            except BaseException:
                # One phase may call another: the innermost says it.
                failed, self._failed = self._failed, None
                if failed is not None:
                    failed()
                raise

        return call


def _running_trainer() -> Any:
    from transformers import Trainer

    frame = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, Trainer):
            return owner
        frame = frame.f_back  # type: ignore[assignment]
    return None
