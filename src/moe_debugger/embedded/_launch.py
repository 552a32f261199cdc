"""Become another program that ends when its parent does: `python -I -S _launch.py PARENT_PID PROGRAM ARGS...`.

PR_SET_PDEATHSIG must be set in the child itself. Doing it here, and not in a `preexec_fn`, keeps Python code out of
the moment between fork and exec, where a lock that a gRPC thread held would stay locked for ever.
Standard library only: this file runs by its path in an isolated interpreter.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Set the signal, undo what was inherited, and exec."""
    parent, program = int(sys.argv[1]), sys.argv[2]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != parent:
            sys.exit(1)  # the parent ended before the signal was set
    # A shell starts its background jobs with SIGINT ignored, and exec keeps that.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, set())
    os.execv(program, sys.argv[2:])  # noqa: S606 - our own argument list


if __name__ == "__main__":
    main()
