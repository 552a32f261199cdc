"""One fleet for the tests that only use it; tests that break a fleet start their own."""

from collections.abc import Iterator

import pytest
from e2e.fleet import Fleet


@pytest.fixture(scope="session")
def fleet() -> Iterator[Fleet]:
    """A whole fleet with the demo model, started by the command that users run."""
    running = Fleet()
    try:
        running.wait_until_ready()
        yield running
    finally:
        running.close()
