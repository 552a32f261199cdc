"""What holds for every test."""

from collections.abc import Iterator

import pytest
import structlog


@pytest.fixture(autouse=True)
def _logging_of_its_own() -> Iterator[None]:
    """Undo what a test did to the process's logging: a later one may log to a stream that is closed by then."""
    yield
    structlog.reset_defaults()
