"""How `up` hears that it should stop."""

import contextlib
import signal
from collections.abc import Iterator
from threading import Event
from types import FrameType

__all__ = ["stop_on_signals"]


@contextlib.contextmanager
def stop_on_signals(is_stopping: Event, is_hurried: Event) -> Iterator[None]:
    """Set `is_stopping` at the first SIGINT, SIGTERM or SIGHUP, and `is_hurried` too at the next.

    SIGINT is heard also where it was inherited as ignored (a shell's background job). An ignored SIGHUP stays so:
    that is how `nohup` asks a program to outlive its terminal.
    """

    def handle(_number: int, _frame: FrameType | None) -> None:
        if is_stopping.is_set():
            is_hurried.set()
        is_stopping.set()

    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
