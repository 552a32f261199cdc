"""The callback for `transformers.Trainer`."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from moe_debugger._debugger import MoEDebugger
from moe_debugger._session import Session
from moe_debugger.errors import InvalidInputError

from .balance import BalanceLossReader
from .failure import FailureGuard

if TYPE_CHECKING:
    from torch import nn

__all__ = ["MoEDebuggerCallback"]

# Names in the Trainer's logs, and ours.
_LOGGED = {"loss": "loss", "learning_rate": "lr", "grad_norm": "grad_norm", "eval_loss": "eval_loss"}


class MoEDebuggerCallback(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
    """Watches the model while a `transformers.Trainer` trains it::

        callback = MoEDebuggerCallback(gradients=True)
        Trainer(model, arguments, train_dataset=data, callbacks=[callback]).train()
        callback.session.series().to_pandas()

    It attaches when training begins and takes its hooks away when it ends or fails. Forwards belong to the step that
    they lead to (`TrainerState.global_step` after it), evaluations to the last step. What was captured can be read from
    `session` until `close`, the end of a ``with callback:`` block, or the next `train`. Where several ranks train, none
    of them closes the session in the fleet, since others may still send: it ends by being silent.

    Args:
        debugger: to use; it must be of the Trainer's model. A session that is open stays the caller's: it is used, and
            not ended. None makes one when training begins.
        options: of that `MoEDebugger`, such as level, gradients, fleet and session_name. ``step_domain`` is "global"
            and ``kind`` "training" where they are not given.

    Raises:
        InvalidInputError: both a debugger and options are given.
    """

    def __init__(self, debugger: MoEDebugger | None = None, **options: Any) -> None:
        if debugger is not None and options:
            raise InvalidInputError(
                f"MoEDebuggerCallback got a debugger and {', '.join(options)}; give these to the MoEDebugger"
            )
        self._options: dict[str, Any] = {"step_domain": "global", "kind": "training", **options}
        self._owns_debugger = debugger is None
        self._debugger = debugger
        self._session: Session | None = None
        self._owns_session = False
        self._ends_session = False
        self._balance: BalanceLossReader | None = None
        self._guard: FailureGuard | None = None

    @property
    def debugger(self) -> MoEDebugger | None:
        """The debugger; None before training began, where it is made then."""
        return self._debugger

    @property
    def session(self) -> Session:
        """The session of the last training.

        Raises:
            InvalidInputError: no training has begun.
        """
        if self._session is None:
            raise InvalidInputError("there is no session before Trainer.train() has begun")
        return self._session

    def close(self) -> None:
        """Take the hooks away and free what was captured; again does nothing."""
        self._end("closed")
        if self._owns_session and self._session is not None:
            self._session.close()
        if self._owns_debugger and self._debugger is not None:
            self._debugger.close()
            self._debugger = None

    def __enter__(self) -> "MoEDebuggerCallback":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Attach to the model."""
        if self._balance is not None:  # the Trainer begins again, with a smaller batch
            self._end("training began again")
        if self._owns_session and self._session is not None:
            self._session.close()
        model: nn.Module = kwargs["model"]
        if self._owns_debugger:
            if self._debugger is not None:
                self._debugger.close()
            self._debugger = MoEDebugger(model, **self._options)
        debugger = self._debugger
        assert debugger is not None
        _check_model(debugger, model)
        self._owns_session = debugger.session is None
        self._session = debugger.session or debugger.start_session()
        self._balance = BalanceLossReader(model)
        self._ends_session = args.world_size == 1
        # A Trainer tells its callbacks nothing when it fails.
        self._guard = FailureGuard(lambda: self._end("training failed"))
        # An evaluation before the first step.
        debugger.step(int(state.global_step))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Say which step the next forwards lead to."""
        if self._balance is not None and self._debugger is not None:
            self._debugger.step(int(state.global_step) + 1)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Read the gradients: whole over all micro-batches and ranks, and clipped."""
        if self._balance is not None and self._debugger is not None and self._debugger.reads_gradients:
            self._debugger.record_gradients()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Record the balancing loss of the step's micro-batches."""
        if self._balance is None or self._debugger is None:
            return
        values = self._balance.take()
        if values:
            self._debugger.step(int(state.global_step), **values)

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        """Record what the Trainer logs."""
        if self._balance is None or self._debugger is None:
            return
        values = {
            ours: float(logs[theirs])
            for theirs, ours in _LOGGED.items()
            if logs is not None and isinstance(logs.get(theirs), int | float)
        }
        if values:
            self._debugger.step(int(state.global_step), **values)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the hooks away."""
        self._end("training ended")

    def _end(self, reason: str) -> None:
        if self._guard is not None:
            self._guard.release()
            self._guard = None
        if self._balance is None:
            return
        self._balance.detach()
        self._balance = None
        if self._owns_session and self._session is not None and not self._session.is_closed:
            self._session.stop(ends_session=self._ends_session, reason=reason)


def _check_model(debugger: MoEDebugger, model: "nn.Module") -> None:
    """Refuse a debugger that would see nothing of this training."""
    watched = debugger.model
    if not any(module is watched for module in model.modules()) and not any(
        module is model for module in watched.modules()
    ):
        raise InvalidInputError(
            f"the debugger watches a {type(watched).__name__} that is no part of the {type(model).__name__} which this "
            "Trainer trains, so it would see nothing; make it of the Trainer's model, or let the callback make one"
        )
