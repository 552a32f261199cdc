"""One torch thread: the tests share the machine. No adapter outlives its test."""

from collections.abc import Iterator

import pytest
import torch

from moe_debugger import unregister_adapter

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _no_adapters_are_left() -> Iterator[None]:
    yield
    for name in ("glam", "block", "dense", "mine"):
        unregister_adapter(name)
