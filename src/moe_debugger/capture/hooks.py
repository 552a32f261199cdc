"""The hooks: they keep references and never raise into the model, wait, or change what it computes."""

import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from moe_debugger.errors import AlreadyAttachedError

from .compiled import Receivers, is_compiling, reset_compiled_code
from .context import (
    CacheLength,
    RequestScope,
    RequestTracker,
    fallback_frame,
    input_names,
    read_frame,
    traced_inputs,
)
from .discovery import Discovery, find_sites
from .raw import RawForward, RawLayer, TokenFrame
from .sites import Kept, Site, Tap
from .transfer import HostTransfer

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Capture", "detach"]

# Experts modules that a capture watches, so that a second one is refused, also on a part of the model.
_watched: "weakref.WeakKeyDictionary[nn.Module, weakref.ref[Capture]]" = weakref.WeakKeyDictionary()
_watched_lock = threading.Lock()
_MAX_PROBLEMS = 64


class _ThreadState(threading.local):
    """What one thread of the caller is doing; models may run on several."""

    depth: int = 0
    forward: RawForward | None = None
    started_ns: int = 0
    scope: RequestScope | None = None
    is_training: bool = False

    def __init__(self) -> None:
        self.outer: dict[str, Any] = {}
        self.frames: dict[str, TokenFrame] = {}
        # Stacks whose tokens could not be read because of an error of ours: their rows are lost, not guessed.
        self.broken: set[str] = set()
        self.minted: dict[int, tuple[str, ...]] = {}
        self.parts: dict[int, tuple[dict[str, Any], int]] = {}

    def clear(self) -> None:
        self.forward = None
        self.outer = {}
        self.frames = {}
        self.broken = set()
        self.minted = {}
        self.parts = {}


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
        # A compiled model wraps the one whose layers are watched; its own call, which is not traced, opens the forward.
        self._wrapper = model if getattr(model, "_orig_mod", None) is not None else None
        model = getattr(model, "_orig_mod", None) or model
        self.discovery: Discovery = find_sites(model)
        self._model = model
        self._sink = sink
        self._num_experts = {
            site.info.layer_index: site.info.num_experts + site.info.num_identity_experts
            for site in self.discovery.sites
        }
        self._layers_of: dict[str, list[int]] = {}
        for site in self.discovery.sites:
            self._layers_of.setdefault(site.root, []).append(site.info.layer_index)
        self._handles: list[Any] = []
        self._receivers = Receivers()
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
        for module, root in self._entries():
            names = input_names(getattr(module, "_orig_mod", module))
            enter, leave = self._enter_hook(names, root), self._exit_hook()
            self._handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
            self._handles.append(module.register_forward_hook(leave, with_kwargs=True, always_call=True))
        for site in self.discovery.sites:
            for tap in site.taps:
                if tap.moment == "before":
                    hook = self._before_hook(site, tap)
                    self._handles.append(tap.module.register_forward_pre_hook(hook, with_kwargs=True))
                else:
                    self._handles.append(
                        tap.module.register_forward_hook(self._after_hook(site, tap), with_kwargs=True)
                    )
        reset_compiled_code()

    def detach(self) -> None:
        """Remove every hook, and let another capture watch the model."""
        if self._handles:
            for handle in self._handles:
                handle.remove()
            self._handles.clear()
            self._receivers.close()
            reset_compiled_code()
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

    def _entries(self) -> "list[tuple[nn.Module, str | None]]":
        """Return the modules whose call may open a forward, with the stack's name where they are one.

        A caller may run the whole model, the model without its head, or one stack (`generate` runs an encoder alone):
        the outermost one that runs opens the forward.
        """
        modules = dict(self._model.named_modules())
        roots = {id(modules[root]): root for root in self._layers_of if root in modules}
        entries: dict[int, tuple[nn.Module, str | None]] = {}
        for module in (
            self._model,
            getattr(self._model, "base_model", None),
            *(modules.get(r) for r in self._layers_of),
        ):
            if module is not None:
                entries.setdefault(id(module), (module, roots.get(id(module))))
        return list(entries.values())

    def _problem(self, text: str) -> None:
        with self._lock:
            # A model that fails in ever new ways must not fill the memory.
            if text in self.problems or len(self.problems) < _MAX_PROBLEMS:
                self.problems[text] += 1

    def _spent(self, started_ns: int) -> None:
        self.hook_ns += time.perf_counter_ns() - started_ns

    def _enter_hook(self, names: tuple[str, ...], root: str | None) -> Callable[..., None]:
        def received(values: dict[str, Any]) -> None:
            # Compiled code brings the tensors of the inputs and the length of the cache, but not the cache itself.
            is_training, length = bool(values.pop("is_training")), values.pop("past_length")
            if length >= 0:
                values["past_key_values"] = CacheLength(length)
            self._enter(values, root, is_training=is_training)

        deliver = self._receivers.add(received)

        def enter(module: "nn.Module", args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs = {**dict(zip(names, args, strict=False)), **kwargs}
            if is_compiling():
                deliver(traced_inputs(inputs, is_training=module.training))
            else:
                self._enter(inputs, root, is_training=module.training)

        return enter

    def _enter(self, inputs: dict[str, Any], root: str | None, *, is_training: bool) -> None:
        started_ns = time.perf_counter_ns()
        local = self._local
        try:
            if _is_recomputing():
                return
            local.depth += 1
            if local.depth == 1:
                self._open(local, inputs, started_ns, is_training=is_training)
            if root is not None and local.forward is not None:
                self._add_frame(local, inputs, root)
        except Exception as error:  # noqa: BLE001 - a hook never raises into the model
            self._problem(f"forward hook: {type(error).__name__}: {error}")
        finally:
            self._spent(started_ns)

    def _open(self, local: _ThreadState, inputs: dict[str, Any], started_ns: int, *, is_training: bool) -> None:
        local.clear()
        local.started_ns = started_ns
        local.outer = inputs
        local.is_training = is_training
        with self._lock:
            index = self._next_forward
            self._next_forward += 1
        local.forward = RawForward(
            forward_index=index,
            step=index if self.step is None else self.step,
            captured_at_unix_ns=time.time_ns(),
        )

    def _add_frame(self, local: _ThreadState, inputs: dict[str, Any], root: str) -> None:
        assert local.forward is not None
        stack = self.discovery.sites[self._layers_of[root][0]].info.stack
        if stack == "vision":
            return  # Patches: their number is known only at the layers.
        local.broken.add(root)
        frame, problem = read_frame(
            inputs,
            local.outer,
            stack=stack,
            is_training=local.is_training,
            tracker=self._tracker,
            scope=local.scope,
            minted=local.minted,
        )
        local.broken.discard(root)
        if problem:
            self._problem(problem)
        if frame is not None:
            local.frames[root] = frame
            local.forward.frames.append(frame)

    def _exit_hook(self) -> Callable[..., None]:
        # What compiled code made is not seen: only that the forward ended.
        deliver = self._receivers.add(lambda values: self._exit(values))

        def leave(module: "nn.Module", args: Any, kwargs: Any, output: Any) -> None:
            if is_compiling():
                deliver({})
            else:
                self._exit(output)

        return leave

    def _exit(self, output: Any) -> None:
        started_ns = time.perf_counter_ns()
        local = self._local
        try:
            if _is_recomputing():
                return
            local.depth = max(0, local.depth - 1)
            if local.depth > 0:
                return
            raw, minted = local.forward, local.minted
            local.clear()
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
            self._finish(raw, minted, output)
        except Exception as error:  # noqa: BLE001 - a hook never raises into the model
            self._problem(f"end of forward hook: {type(error).__name__}: {error}")
        finally:
            self._spent(started_ns)

    def _finish(self, raw: RawForward, minted: dict[int, tuple[str, ...]], output: Any) -> None:
        # What the model made itself carries these requests on: its cache, or an encoder's output.
        for name in ("past_key_values", "last_hidden_state"):
            carrier = getattr(output, name, None)
            for frame in raw.frames:
                ids = minted.get(frame.num_rows)
                if carrier is not None and frame.are_ids_minted and ids and frame.past_length == 0:
                    self._tracker.remember(carrier, ids)
        self._note_unseen(raw)
        self._transfer.start(raw, self._num_experts)
        self._sink(raw)

    def _note_unseen(self, raw: RawForward) -> None:
        """Compare the tokens that each stack was given with those that were seen at its MoE layers."""
        seen: dict[int, int] = {}
        for layer in raw.layers:
            seen[layer.layer_index] = seen.get(layer.layer_index, 0) + layer.num_rows
        by_stack = {frame.stack: frame.num_tokens for frame in raw.frames}
        for site in self.discovery.sites:
            index = site.info.layer_index
            if index not in seen and site.info.stack in by_stack:
                raw.unseen[index] = by_stack[site.info.stack]
        # A pool of experts that got no token of its kind is called by no one: its sibling saw them all.
        pools = {self.discovery.sites[index].pool for index in seen}
        raw.unseen = {i: n for i, n in raw.unseen.items() if self.discovery.sites[i].pool not in pools - {""}}
        if raw.unseen:
            names = [self.discovery.sites[index].info.module_name for index in raw.unseen]
            self._problem(
                f"{len(names)} of {len(self.discovery.sites)} MoE layers were not called in a forward "
                f"({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
            )

    def _before_hook(self, site: Site, tap: Tap) -> Callable[..., None]:
        deliver = self._deliver(site, tap)

        def hook(module: "nn.Module", args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if is_compiling():
                deliver(tap.keep(args, kwargs, None))
            else:
                self._keep(site, tap, args, kwargs, None)

        return hook

    def _after_hook(self, site: Site, tap: Tap) -> Callable[..., None]:
        deliver = self._deliver(site, tap)

        def hook(module: "nn.Module", args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if is_compiling():
                deliver(tap.keep(args, kwargs, output))
            else:
                self._keep(site, tap, args, kwargs, output)

        return hook

    def _deliver(self, site: Site, tap: Tap) -> Callable[[Kept | None], None]:
        def received(values: dict[str, Any]) -> None:
            num_rows = values.pop("num_rows")
            self._run(site, tap, lambda: (values, num_rows), ())

        send = self._receivers.add(received)

        def deliver(kept: Kept | None) -> None:
            if kept is not None:
                send({**kept[0], "num_rows": kept[1]})

        return deliver

    def _keep(self, site: Site, tap: Tap, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self._run(site, tap, lambda: tap.keep(args, kwargs, output), args if output is None else (output,))

    def _run(self, site: Site, tap: Tap, keep: Callable[[], Kept | None], shown: tuple[Any, ...]) -> None:
        started_ns = time.perf_counter_ns()
        try:
            if _is_recomputing():
                self.num_recomputed_calls += tap.completes
                return
            local, index = self._local, site.info.layer_index
            kept = keep()
            if kept is None:
                local.parts.pop(index, None)
                self._problem(f"{site.info.module_name}: {_unexpected(shown)}")
                return
            tensors, num_rows = kept
            if local.forward is None:
                if tap.completes:
                    self._lose(num_rows)
                    if local.depth == 0:
                        self._problem("experts were called outside of a forward of the watched model")
                return
            if index in local.parts:
                before, rows_before = local.parts.pop(index)
                tensors, num_rows = {**before, **tensors}, max(num_rows, rows_before)
            if not tap.completes:
                local.parts[index] = (tensors, num_rows)
                return
            frame = self._frame_of(local, site, num_rows, shown, has_subset="row_mask" in tensors)
            if frame is not None:
                local.forward.layers.append(RawLayer(index, frame, tensors, num_rows))
            else:
                self._lose(num_rows)
        except Exception as error:  # noqa: BLE001 - a hook never raises into the model
            self._problem(f"{site.info.module_name}: {type(error).__name__}: {error}")
        finally:
            self._spent(started_ns)

    def _frame_of(
        self, local: _ThreadState, site: Site, num_rows: int, args: tuple[Any, ...], *, has_subset: bool
    ) -> TokenFrame | None:
        forward = local.forward
        assert forward is not None
        if site.root in local.broken:
            return None
        frame = local.frames.get(site.root)
        if frame is not None and (frame.num_tokens == num_rows or (has_subset and num_rows < frame.num_tokens)):
            return frame
        if frame is not None and site.info.stack != "vision":
            self._problem(
                f"{site.info.module_name}: {num_rows} routed rows in a forward of {frame.num_tokens} tokens; "
                "which ones is not known"
            )
            return None
        frame = fallback_frame(
            num_rows,
            args[0] if args else None,
            forward.frames,
            stack=site.info.stack,
            is_training=local.is_training,
            minted=local.minted,
        )
        local.frames[site.root] = frame
        forward.frames.append(frame)
        return frame

    def _lose(self, num_rows: int) -> None:
        with self._lock:
            self.num_lost_decisions += num_rows


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


def _unexpected(given: tuple[Any, ...]) -> str:
    shown = given[0] if len(given) == 1 and isinstance(given[0], tuple | list) else given
    return f"the call does not look as expected of this layer: got {', '.join(_shape(value) for value in shown)}"


def _shape(value: Any) -> str:
    return f"{tuple(value.shape)} {value.dtype}" if hasattr(value, "dtype") else type(value).__name__


def _is_recomputing() -> bool:
    """Whether this call recomputes a forward within backward (gradient checkpointing)."""
    from torch import _C

    return bool(_C._current_graph_task_id() != -1)
