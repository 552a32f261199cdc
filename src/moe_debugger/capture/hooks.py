"""The hooks: they keep references and never raise into the model, wait, or change what it computes."""

import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from moe_debugger.errors import AlreadyAttachedError, InvalidInputError

from .context import RequestScope, RequestTracker, input_names, read_forward
from .discovery import Discovery, Site, find_sites
from .raw import RawForward, RawLayer
from .transfer import HostTransfer

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["Capture", "detach"]

# Experts modules that a capture watches, so that a second one is refused, also on a part of the model.
_watched: "weakref.WeakKeyDictionary[nn.Module, weakref.ref[Capture]]" = weakref.WeakKeyDictionary()
_watched_lock = threading.Lock()


class _ThreadState(threading.local):
    """What one thread of the caller is doing; models may run on several."""

    depth: int = 0
    forward: RawForward | None = None
    started_ns: int = 0
    scope: RequestScope | None = None

    def __init__(self) -> None:
        self.logits: dict[int, torch.Tensor] = {}


class Capture:
    """Watches one model.

    Args:
        model: the model; only its hooks are touched.
        sink: called with each finished forward, on the model's thread; must return at once.

    Raises:
        ModelNotSupportedError: no MoE layer of the model can be read.
        AlreadyAttachedError: another capture watches it.
    """

    def __init__(self, model: "nn.Module", sink: Callable[[RawForward], None]) -> None:
        inner = getattr(model, "_orig_mod", None)
        if inner is not None:
            raise InvalidInputError(
                f"{type(model).__name__} is a compiled model, whose hooks never fire; "
                "attach to the model before torch.compile, or pass the original one"
            )
        self.discovery: Discovery = find_sites(model)
        self._model = model
        self._sink = sink
        self._num_experts = {site.info.layer_index: site.info.num_experts for site in self.discovery.sites}
        self._handles: list[Any] = []
        self._local = _ThreadState()
        self._tracker = RequestTracker()
        self._transfer = HostTransfer()
        self._lock = threading.Lock()
        self._next_forward = 0
        self.step: int | None = None
        self.hook_ns = 0
        self.forward_ns = 0
        self.num_forwards = 0
        self.num_recomputed_calls = 0
        self.num_lost_decisions = 0
        self.problems: Counter[str] = Counter()
        self._reserve()

    @property
    def model(self) -> "nn.Module":
        """The watched model."""
        return self._model

    @property
    def next_forward_index(self) -> int:
        """The index that the next forward gets."""
        return self._next_forward

    def attach(self) -> None:
        """Install the hooks.

        Raises:
            AlreadyAttachedError: another capture has taken the model since this one was made or detached.
        """
        if self._handles:
            return
        self._reserve()
        for module in self._entries():
            names = input_names(module)
            self._handles.append(module.register_forward_pre_hook(self._enter_hook(names), with_kwargs=True))
            self._handles.append(module.register_forward_hook(self._exit_hook, with_kwargs=True, always_call=True))
        for site in self.discovery.sites:
            if site.router is not None:
                self._handles.append(site.router.register_forward_hook(self._router_hook(site.info.layer_index)))
            self._handles.append(site.experts.register_forward_pre_hook(self._experts_hook(site), with_kwargs=True))

    def detach(self) -> None:
        """Remove every hook, and let another capture watch the model."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        with _watched_lock:
            for site in self.discovery.sites:
                held = _watched.get(site.experts)
                if held is not None and held() is self:
                    del _watched[site.experts]

    @contextmanager
    def scope(self, scope: RequestScope) -> Iterator[None]:
        """Name the batch rows of the forwards that this thread runs inside."""
        outer, self._local.scope = self._local.scope, scope
        try:
            yield
        finally:
            self._local.scope = outer

    def wait_for_copies(self, raw: RawForward) -> None:
        """Wait until the tensors of `raw` are on the host; for the capture's own thread."""
        self._transfer.wait(raw)

    def _reserve(self) -> None:
        with _watched_lock:
            for site in self.discovery.sites:
                held = _watched.get(site.experts)
                if held is not None and held() not in (None, self):
                    raise AlreadyAttachedError(
                        f"{type(self._model).__name__} is watched already (module {site.info.module_name}); "
                        "call close() on the debugger that holds it, or moe_debugger.detach(model) where it was lost"
                    )
            for site in self.discovery.sites:
                _watched[site.experts] = weakref.ref(self)

    def _entries(self) -> "list[nn.Module]":
        # A caller may run the model with or without its head; the outermost one that runs opens the forward.
        base = getattr(self._model, "base_model", None)
        return [self._model] if base is None or base is self._model else [self._model, base]

    def _problem(self, text: str) -> None:
        with self._lock:
            # A model that fails in ever new ways must not fill the memory.
            if text in self.problems or len(self.problems) < 64:
                self.problems[text] += 1

    def _spent(self, started_ns: int) -> None:
        self.hook_ns += time.perf_counter_ns() - started_ns

    def _enter_hook(self, names: tuple[str, ...]) -> Callable[..., None]:
        def enter(module: "nn.Module", args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            started_ns = time.perf_counter_ns()
            local = self._local
            try:
                if _is_recomputing():
                    return
                local.depth += 1
                if local.depth > 1:
                    return
                local.started_ns = started_ns
                local.forward = None
                local.logits.clear()
                with self._lock:
                    index = self._next_forward
                    self._next_forward += 1
                local.forward, problem = read_forward(
                    {**dict(zip(names, args, strict=False)), **kwargs},
                    forward_index=index,
                    step=index if self.step is None else self.step,
                    is_training=module.training,
                    tracker=self._tracker,
                    scope=local.scope,
                )
                if problem:
                    self._problem(problem)
            except Exception as error:  # noqa: BLE001 - a hook never raises into the model
                self._problem(f"forward hook: {type(error).__name__}: {error}")
            finally:
                self._spent(started_ns)

        return enter

    def _exit_hook(self, module: "nn.Module", args: Any, kwargs: Any, output: Any) -> None:
        started_ns = time.perf_counter_ns()
        local = self._local
        try:
            if _is_recomputing():
                return
            local.depth = max(0, local.depth - 1)
            if local.depth > 0:
                return
            raw, local.forward = local.forward, None
            local.logits.clear()
            if raw is None:
                return
            raw.duration_ns = started_ns - local.started_ns
            if output is None:
                with self._lock:
                    self.num_lost_decisions += raw.num_decisions
                self._problem("a forward of the model raised; its routes so far were not kept")
                return
            self.num_forwards += 1
            self.forward_ns += raw.duration_ns
            self._finish(raw, output)
        except Exception as error:  # noqa: BLE001 - a hook never raises into the model
            self._problem(f"end of forward hook: {type(error).__name__}: {error}")
        finally:
            self._spent(started_ns)

    def _finish(self, raw: RawForward, output: Any) -> None:
        cache = getattr(output, "past_key_values", None)
        if cache is not None and raw.past_length == 0 and raw.are_ids_minted:
            # A cache that the model made itself: the next forward that brings it goes on with these requests.
            self._tracker.remember(cache, tuple(name for name in raw.request_ids if name is not None))
        missing = len(self.discovery.sites) - len({layer.layer_index for layer in raw.layers})
        if missing:
            self._problem(f"{missing} of {len(self.discovery.sites)} MoE layers were not called in a forward")
        self._transfer.start(raw, self._num_experts)
        self._sink(raw)

    def _router_hook(self, layer_index: int) -> Callable[..., None]:
        def keep_logits(module: "nn.Module", args: Any, output: Any) -> None:
            started_ns = time.perf_counter_ns()
            try:
                if _is_recomputing() or self._local.forward is None:
                    return
                logits = output[0] if isinstance(output, tuple | list) else output
                if getattr(logits, "ndim", 0) == 2 and logits.is_floating_point():
                    self._local.logits[layer_index] = logits.detach()
            except Exception as error:  # noqa: BLE001 - a hook never raises into the model
                self._problem(f"router hook of layer {layer_index}: {type(error).__name__}: {error}")
            finally:
                self._spent(started_ns)

        return keep_logits

    def _experts_hook(self, site: Site) -> Callable[..., None]:
        layer_index = site.info.layer_index
        names = input_names(site.experts)

        def keep_routes(module: "nn.Module", args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            started_ns = time.perf_counter_ns()
            try:
                if _is_recomputing():
                    self.num_recomputed_calls += 1
                    return
                local = self._local
                if len(args) >= 3:
                    expert_ids, weights = args[1], args[2]
                else:
                    inputs = {**dict(zip(names, args, strict=False)), **kwargs}
                    expert_ids, weights = inputs[names[1]], inputs[names[2]]
                raw = local.forward
                if raw is None:
                    if local.depth == 0:
                        self._problem("experts were called outside of a forward of the watched model")
                    self._lose(expert_ids)
                    return
                reason = _mismatch(expert_ids, weights, raw.num_rows * raw.num_columns)
                if reason:
                    self._problem(f"{site.info.module_name}: {reason}")
                    self._lose(expert_ids)
                    return
                logits = local.logits.pop(layer_index, None)
                if logits is not None and logits.shape[0] != expert_ids.shape[0]:
                    logits = None
                raw.layers.append(RawLayer(layer_index, expert_ids.detach(), weights.detach(), logits))
            except Exception as error:  # noqa: BLE001 - a hook never raises into the model
                self._problem(f"experts hook of layer {layer_index}: {type(error).__name__}: {error}")
            finally:
                self._spent(started_ns)

        return keep_routes

    def _lose(self, expert_ids: Any) -> None:
        with self._lock:
            self.num_lost_decisions += int(expert_ids.shape[0]) if getattr(expert_ids, "ndim", 0) else 0


def detach(model: "nn.Module") -> bool:
    """Remove every hook that a debugger left on `model`; return whether there was one.

    For a notebook whose debugger object was lost; else call its `close()`.
    """
    captures = {
        held for module in model.modules() if (reference := _watched.get(module)) and (held := reference()) is not None
    }
    for capture in captures:
        capture.detach()
    return bool(captures)


def _mismatch(expert_ids: Any, weights: Any, num_tokens: int) -> str:
    if getattr(expert_ids, "ndim", 0) != 2 or expert_ids.is_floating_point() or expert_ids.shape != weights.shape:
        return (
            f"expected integer ids and weights of one shape [tokens, k], got {_shape(expert_ids)} and {_shape(weights)}"
        )
    if expert_ids.shape[0] != num_tokens:
        return f"{expert_ids.shape[0]} routed rows in a forward of {num_tokens} tokens; which ones is not known"
    return ""


def _shape(value: Any) -> str:
    return f"{tuple(value.shape)} {value.dtype}" if hasattr(value, "dtype") else type(value).__name__


def _is_recomputing() -> bool:
    """Whether this call recomputes a forward within backward (gradient checkpointing)."""
    from torch import _C

    return bool(_C._current_graph_task_id() != -1)
