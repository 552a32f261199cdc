"""Runs a model twice, bare and watched, and says what differs."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from oracle.builds import adapter_for
from oracle.causal import Oracle
from oracle.compare import Comparison, compare
from oracle.outcome import Impossible
from torch import nn

from moe_debugger import Decisions, MoEDebugger

__all__ = [
    "MAX_UNEXPLAINED",
    "MAX_UNSEEN",
    "Watched",
    "bare",
    "is_same",
    "observed",
    "state_of",
    "tensors_of",
    "watch",
]

# Captured weights are the model's own numbers in float32.
WEIGHT_ROUNDING = 1e-6
# Share of a contribution; Llama 4's is that of an input which the model rounded to bfloat16.
MAX_UNEXPLAINED = 0.01
# A share of the slots; more slots of weight 0 than that would leave a case unchecked.
MAX_UNSEEN = 0.1
_HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_always_called", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks",
    "_load_state_dict_pre_hooks",
)  # fmt: skip


@dataclass
class Watched:
    """What a watched run gave.

    Attributes:
        output: of the run itself.
        decisions: all rows.
        comparison: with the oracle.
    """

    output: Any
    decisions: Decisions
    comparison: Comparison


def bare(run: Callable[[nn.Module], Any], model: nn.Module) -> Any:
    """Return what `run` gives without a debugger.

    Raises:
        Impossible: it raised; nothing can be captured of what does not run.
    """
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return run(model)
    except Exception as error:
        text = " ".join(str(error).split())
        raise Impossible(f"{type(error).__name__}: {text[:200]}") from error


@contextmanager
def watch(model: nn.Module, **options: Any) -> Iterator[tuple[Oracle, MoEDebugger]]:
    """Open an oracle and a debugger on `model`, with a session."""
    with (
        torch.random.fork_rng(devices=[]),
        adapter_for(model),
        Oracle(model) as oracle,
        MoEDebugger(model, **{"level": "routes+tokens", **options}) as debugger,
    ):
        torch.manual_seed(0)
        yield oracle, debugger


def observed(model: nn.Module, run: Callable[[nn.Module], Any], *, max_unseen: float = MAX_UNSEEN) -> Watched:
    """Run a model bare, then watched, and compare.

    Args:
        model: is left as it was.
        run: calls the model; the same each time.
        max_unseen: share of slots of weight 0 above which too little is checked.

    Raises:
        Impossible: the bare run raised.
    """
    expected = bare(run, model)
    # Taken after the bare run: some of the library's models add hooks of their own at their first forward.
    before = state_of(model)
    with watch(model) as (oracle, debugger):
        output = run(model)
        assert debugger.session is not None
        decisions = debugger.session.decisions()
        problems = dict(debugger.session.get_performance_metrics().problems)
    comparison = compare(decisions, oracle.calls, weight_rounding=WEIGHT_ROUNDING)
    if problems:
        comparison.add_problem(f"the capture reports problems: {problems}")
    if not is_same(expected, output):
        comparison.add_problem("the outputs with the debugger differ from those without")
    for text in _differences(before, state_of(model)):
        comparison.add_problem(text)
    _check_oracle(comparison, max_unseen)
    return Watched(output, decisions, comparison)


def state_of(model: nn.Module) -> dict[str, Any]:
    """Return the hooks and the own attributes of every module, to be compared by name and identity."""
    state: dict[str, Any] = {}
    for name, module in model.named_modules():
        state[name] = (
            tuple(tuple(map(id, getattr(module, hooks, {}).values())) for hooks in _HOOKS),
            # Plain attributes come and go with the library; methods of the instance must not.
            frozenset(key for key, value in vars(module).items() if callable(value)),
            module.training,
        )
    return state


def tensors_of(value: Any) -> Iterator[torch.Tensor]:
    """Yield all tensors in a model's output, caches included, in a fixed order."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for key in value:
            yield from tensors_of(value[key])
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for item in value:
            yield from tensors_of(item)
    else:
        # A cache.
        for layer in getattr(value, "layers", ()):
            yield from tensors_of([getattr(layer, "keys", None), getattr(layer, "values", None)])


def is_same(first: Any, second: Any) -> bool:
    """Return whether two outputs are bit-identical; NaN equals NaN."""
    left, right = list(tensors_of(first)), list(tensors_of(second))
    return len(left) == len(right) > 0 and all(
        a.dtype == b.dtype and a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())
        for a, b in zip(left, right, strict=True)
    )


def _differences(before: dict[str, Any], after: dict[str, Any]) -> Iterator[str]:
    for name in before.keys() | after.keys():
        if before.get(name) != after.get(name):
            yield f"module {name!r} is not as it was before the debugger: hooks, methods or mode differ"


def _check_oracle(comparison: Comparison, max_unseen: float) -> None:
    """Note where the oracle itself cannot be believed."""
    if comparison.max_replay_excess > 1:
        comparison.add_problem(
            f"the replay's outputs differ from the model's by {comparison.max_replay_excess:.1f} times the rounding"
        )
    if comparison.max_unexplained > MAX_UNEXPLAINED:
        comparison.add_problem(
            f"{comparison.max_unexplained:.1e} of a contribution is no multiple of what the expert gives"
        )
    if comparison.num_unseen_slots > max_unseen * comparison.num_slots:
        comparison.add_problem(
            f"{comparison.num_unseen_slots} of {comparison.num_slots} slots have weight 0: too little is checked"
        )
