"""Taps inside compiled code: what a hook keeps leaves the graph through an operator of our own.

While torch.compile traces a model, its hooks are traced with it: Python that looks at clocks and threads would break
the graph, and under ``fullgraph=True`` the model's own call would fail. So a traced hook only picks its tensors and
hands them to one operator, which compiled code calls like any other. The operator says that it writes to a counter:
without a visible effect a compiler removes it. It changes no tensor of the model.
"""

import itertools
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

__all__ = ["Receivers", "is_exporting", "pack", "reset_compiled_code", "unpack"]

# (tensors by name, plain numbers by name)
Receive = Callable[[dict[str, Any]], None]

_receivers: dict[int, Receive] = {}
_next_key = itertools.count(1)
_lock = threading.Lock()


def is_exporting() -> bool:
    """Return whether torch.export traces: what it makes goes elsewhere, and must hold no operator of ours."""
    from torch import compiler

    return compiler.is_exporting()


class Receivers:
    """The ends of one capture's taps; what arrives after `close` is ignored."""

    def __init__(self) -> None:
        self._keys: list[int] = []

    def add(self, receive: Receive) -> Callable[[Mapping[str, Any]], None]:
        """Return a function that traced code may call, and whose argument `receive` gets when the code runs."""
        key = next(_next_key)
        with _lock:
            _receivers[key] = receive
        self._keys.append(key)
        send, counter = _operator()

        def deliver(values: Mapping[str, Any]) -> None:
            tensors, names, numbers = pack(values)
            send(counter, tensors, names, numbers, key)

        return deliver

    def close(self) -> None:
        """Forget all ends."""
        with _lock:
            for key in self._keys:
                _receivers.pop(key, None)
        self._keys.clear()


def pack(values: Mapping[str, Any]) -> tuple[list[Any], str, list[int]]:
    """Return the tensors, the names and the numbers of `values`, as an operator takes them.

    A name is followed by ":n" where its value is a number, and by ":*" where it is a list of numbers, which comes last.
    """
    import torch

    tensors: list[Any] = []
    numbers: list[int] = []
    tail: list[int] = []
    names: list[str] = []
    for name, value in values.items():
        if isinstance(value, list | tuple):
            names.append(name + ":*")
            tail = list(value)
        elif isinstance(value, torch.Tensor):
            names.append(name)
            tensors.append(value)
        else:
            names.append(name + ":n")
            numbers.append(value)
    return tensors, ",".join(names), numbers + tail


def unpack(tensors: Sequence[Any], names: str, numbers: Sequence[int]) -> dict[str, Any]:
    """Return what `pack` was given."""
    values: dict[str, Any] = {}
    left, rest = list(tensors), list(numbers)
    fields = names.split(",") if names else []
    for name in fields:
        if name.endswith(":n"):
            values[name[:-2]] = rest.pop(0)
        elif not name.endswith(":*"):
            values[name] = left.pop(0)
    for name in fields:
        if name.endswith(":*"):
            values[name[:-2]] = rest
    return values


def reset_compiled_code() -> bool:
    """Make torch compile again what it compiled so far; return whether its compiler was ever loaded.

    Compiled code does not look whether hooks came or went since (torch skips those guards), so hooks that are placed
    after compilation would silently never fire, and removed ones would stay.
    """
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is None:
        return False
    dynamo.reset()
    return True


@cache
def _operator() -> tuple[Any, Any]:
    import torch

    @torch.library.custom_op("moe_debugger::tap", mutates_args={"counter"})
    def tap(counter: torch.Tensor, tensors: list[torch.Tensor], names: str, numbers: list[int], key: int) -> None:
        counter.add_(1)
        receive = _receivers.get(key)
        if receive is not None:
            # A copy: compiled code writes other values into the same memory as soon as it thinks that we have read it.
            receive(unpack([tensor.clone() for tensor in tensors], names, numbers))

    @tap.register_fake
    def _(counter: Any, tensors: Any, names: str, numbers: Any, key: int) -> None:
        return None

    return tap, torch.zeros((), dtype=torch.int64)
