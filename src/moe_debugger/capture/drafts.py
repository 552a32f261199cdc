"""Tells drafts of assisted decoding that were rejected: the experts computed them, but they are no part of the text.

Whether a draft was accepted shows only when the model is called again with the same cache: its length is then that of
the accepted tokens. So a forward with drafts is held back until that call, and what follows it waits behind it, in
order.
"""

import threading
from collections import deque
from collections.abc import Callable

from .raw import RawForward

__all__ = ["DraftHold"]

# A text's last step is followed by no call: a few forwards later it is handed on as it is.
_MAX_HELD = 4


class DraftHold:
    """Stands before the sink of a capture.

    Args:
        sink: called with each forward, in order.
    """

    def __init__(self, sink: Callable[[RawForward], None]) -> None:
        self._sink = sink
        self._held: deque[RawForward] = deque()
        self._lock = threading.Lock()

    def offer(self, raw: RawForward) -> None:
        """Hand `raw` on, or hold it where it has drafts of which nothing is known yet."""
        if not self._held and not has_unverified(raw):
            self._sink(raw)
            return
        with self._lock:
            self._held.append(raw)
            self._drain(_MAX_HELD)

    def release(self) -> None:
        """Hand on what is held, drafts that were not verified included."""
        if self._held:
            with self._lock:
                self._drain(0)

    def _drain(self, num_allowed: int) -> None:
        while self._held and (len(self._held) > num_allowed or not has_unverified(self._held[0])):
            self._sink(self._held.popleft())


def has_unverified(raw: RawForward) -> bool:
    """Return whether a frame of `raw` has drafts that may yet be rejected."""
    return any(frame.is_unverified for frame in raw.frames)
