"""What holds for every test."""

import signal
from collections.abc import Iterator

import pytest
import structlog

# Processes that the tests start inherit it where whoever started the tests ignores it (nohup), and `up` respects that.
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def _logging_of_its_own() -> Iterator[None]:
    """Undo what a test did to the process's logging: a later one may log to a stream that is closed by then."""
    yield
    structlog.reset_defaults()
