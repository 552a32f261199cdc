"""torch.compile: what the compiled model captures is what the experts of the plain model, with the same weights, did.

An oracle inside compiled code would be compiled with it, so it watches the plain model. Compiled code rounds elsewhere,
which is the only difference that is allowed.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from oracle.builds import EVERY_BUILD, adapter_for
from oracle.causal import Oracle
from oracle.compare import Comparison, compare
from oracle.matrix import forward_of
from oracle.observe import bare, is_same, state_of
from oracle.outcome import Impossible
from oracle.registry import register_mode
from torch import nn
from zoo.build import Build

from moe_debugger import MoEDebugger

INDUCTOR = ("mixtral", "deepseek_v3", "gpt_oss")
# What other kernels, and another order of the same sums, make of a float32 weight.
_ROUNDING = {"aot_eager": 1e-5, "inductor": 1e-4}


@register_mode("compile, attached before")
def attached_before(build: Build) -> Comparison:
    """By aot_eager; as one graph where the bare model allows it."""
    return _attached_before(build.name, "aot_eager", _is_whole(build))


@register_mode("compile, attached after")
def attached_after(build: Build) -> Comparison:
    """The compiled model has run before the debugger came, and runs on when it has gone."""
    is_whole = _is_whole(build)
    expected = _bare(build.name, "aot_eager", is_whole)
    model = build.make()
    given = build.inputs(model)
    before = state_of(model)
    with _fresh_compiler():
        compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=is_whole)
        forward_of(compiled, given)
        result = _watched(build, model, compiled, expected, _ROUNDING["aot_eager"])
        if not is_same(expected, forward_of(compiled, given)):
            result.add_problem("after the debugger, the outputs differ from those of the bare compiled model")
    if before != state_of(model):
        result.add_problem("the model's hooks, methods or modes are not as they were before the debugger")
    return result


@register_mode("compile, fullgraph")
def fullgraph(build: Build) -> Comparison:
    """`fullgraph=True`: the debugger must not break the graph."""
    return _attached_before(build.name, "aot_eager", True)


@register_mode("compile, inductor", families=INDUCTOR)
def inductor(build: Build) -> Comparison:
    """Compiled to machine code, as torch does by default."""
    return _attached_before(build.name, "inductor", True)


@cache
def _attached_before(name: str, backend: str, is_whole: bool) -> Comparison:
    expected = _bare(name, backend, is_whole)
    build = EVERY_BUILD[name]
    model = build.make()
    with _fresh_compiler():
        compiled: Any = torch.compile(model, backend=backend, fullgraph=is_whole)
        return _watched(build, model, compiled, expected, _ROUNDING[backend])


def _watched(build: Build, model: nn.Module, compiled: Any, expected: Any, rounding: float) -> Comparison:
    """Compare two forwards of a compiled model with those of a plain one."""
    plain = build.make()
    given = build.inputs(model)
    with Oracle(plain) as oracle:
        for _ in range(2):
            forward_of(plain, given)
    with adapter_for(model), MoEDebugger(model, level="routes+tokens") as debugger:
        # The second time it runs what it compiled the first time.
        outputs = [forward_of(compiled, given) for _ in range(2)]
        assert debugger.session is not None
        decisions = debugger.session.decisions()
        problems = debugger.get_performance_metrics().problems
    result = compare(decisions, oracle.calls, weight_rounding=rounding)
    if problems:
        result.add_problem(f"the capture reports problems: {problems}")
    if not all(is_same(expected, output) for output in outputs):
        result.add_problem("the outputs with the debugger differ from those of the bare compiled model")
    return result


def _is_whole(build: Build) -> bool:
    try:
        _bare(build.name, "aot_eager", True)
    except Impossible:
        return False
    return True


def _bare(name: str, backend: str, is_whole: bool) -> Any:
    """Return what the compiled model gives without a debugger.

    Raises:
        Impossible: it does not compile so.
    """
    output = _outputs_or_error(name, backend, is_whole)
    if isinstance(output, Impossible):
        raise Impossible(str(output))
    return output


@cache
def _outputs_or_error(name: str, backend: str, is_whole: bool) -> Any:
    build = EVERY_BUILD[name]
    model = build.make()
    given = build.inputs(model)

    def run(model: Any) -> Any:
        compiled: Any = torch.compile(model, backend=backend, fullgraph=is_whole)
        return forward_of(compiled, given)

    with _fresh_compiler():
        try:
            return bare(run, model)
        except Impossible as error:
            return error


@contextmanager
def _fresh_compiler() -> Iterator[None]:
    """Forget all compiled code, and what torch and the library's code have to say about being compiled."""
    torch._dynamo.reset()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch._dynamo.reset()
