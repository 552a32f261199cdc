"""The hooks: they keep references and never raise into the model, wait, or change what it computes."""

import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeGuard

from moe_debugger.errors import AlreadyAttachedError

from .buffers import copy_written, copy_written_layers
from .compiled import Receivers, reset_compiled_code
from .context import (
    CacheLength,
    RequestScope,
    RequestTracker,
    fallback_frame,
    input_names,
    read_frame,
)
from .discovery import Discovery, find_sites
from .drafts import DraftHold
from .model_hooks import EnterHook, LeaveHook, TapHook
from .open_calls import OpenForward, ThreadState
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
_MAX_NAMES = 3
# What torch calls the task that runs backward where none does.
_NO_TASK = -1


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
        from torch import _C

        # A compiled model wraps the one whose layers are watched; its own call, which is not traced, opens the forward.
        self._wrapper = model if getattr(model, "_orig_mod", None) is not None else None
        model = getattr(model, "_orig_mod", None) or model
        self.discovery: Discovery = find_sites(model)
        self._model = model
        self._drafts = DraftHold(sink)
        self._layers_of: dict[str, list[int]] = {}
        for site in self.discovery.sites:
            self._layers_of.setdefault(site.root, []).append(site.info.layer_index)
        self._handles: list[Any] = []
        self._tap_hooks: dict[int, list[TapHook]] = {}
        # Layers whose tensors are written again within a forward, so that they are copied in the hook.
        self._copied_at_once: set[int] = set()
        self._receivers = Receivers()
        self._local = ThreadState()
        # A task is under way where a call recomputes a forward within backward (gradient checkpointing).
        self._current_graph_task: Callable[[], int] = _C._current_graph_task_id
        self._tracker = RequestTracker()
        self._transfer = HostTransfer(self.discovery.sites)
        self._lock = threading.Lock()
        self._next_forward = 0
        self.step: int | None = None
        # False where a session's level has no token ids; those of a batch are kept all the same, to tell ended texts.
        self.keeps_token_ids = True
        self.hook_ns = 0
        self.forward_ns = 0
        self.num_forwards = 0
        self.num_recomputed_calls = 0
        self.num_lost_decisions = 0
        self.problems: Counter[str] = Counter()
        if self.discovery.unreadable:
            self.problems[_unreadable_text(self.discovery)] = 1
        self._reserve()
        # The hooks do not keep a capture alive; where everyone lost it, they go with it.
        self._unhook = weakref.finalize(self, _unhook, self._handles, self._receivers)
        self._unhook.atexit = False

    @property
    def model(self) -> "nn.Module":
        """The watched model."""
        return self._model

    @property
    def next_forward_index(self) -> int:
        """The index that the next forward gets."""
        return self._next_forward

    @property
    def current_forward(self) -> tuple[int, int] | None:
        """Index and step of the forward that runs on this thread; None where none does."""
        forward = self._local.forward
        return None if forward is None or forward.raw is None else (forward.raw.forward_index, forward.raw.step)

    def attach(self) -> None:
        """Install the hooks.

        Raises:
            AlreadyAttachedError: another capture has taken the model since this one was made or detached.
        """
        if self._handles:
            return
        self._reserve()
        for module, root in self._entries():
            self._add_entry(module, root)
        self._tap_hooks.clear()
        for site in self.discovery.sites:
            for tap in site.taps:
                self._add_tap(site, tap)
        reset_compiled_code()

    def detach(self) -> None:
        """Remove every hook, and let another capture watch the model."""
        _unhook(self._handles, self._receivers)
        self._drafts.release()
        # Where a hook of someone else closes the debugger amid a forward, that forward never ends for us.
        self._abandon(self._local.abandon(), "the capture ended amid a forward of the model")
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

    def reduce_rows_with(self, scoring: Mapping[int, str | None] | None) -> None:
        """Have rows reduced to sums on their device, with how each layer's logits are read; None = copy the rows."""
        self._transfer.reduces_with = scoring

    def release(self) -> None:
        """Hand on the forwards that wait for the verification of their drafts."""
        self._drafts.release()

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

        A caller may run the whole model, the one inside a wrapper, the model without its head, or one stack (`generate`
        runs an encoder alone): the outermost one that runs opens the forward.
        """
        modules = dict(self._model.named_modules(remove_duplicate=False))
        roots = {id(modules[root]): root for root in self._layers_of if root in modules}
        found = [self._model, getattr(self._model, "base_model", None)]
        for root in self._layers_of:
            parts = root.split(".")
            found += [modules.get(".".join(parts[:length])) for length in range(1, len(parts) + 1)]
        return list({id(each): (each, roots.get(id(each))) for each in found if _is_module(each)}.values())

    def _add_entry(self, module: "nn.Module", root: str | None) -> None:
        deliver_enter = self._receivers.add(
            _weakly(self, lambda capture, values: capture._receive(module, values, root))
        )
        # What compiled code made is not seen: only that the forward ended.
        deliver_leave = self._receivers.add(_weakly(self, lambda capture, values: capture.leave(module, values)))
        enter = EnterHook(self, input_names(getattr(module, "_orig_mod", module)), root, deliver_enter)
        leave = LeaveHook(self, deliver_leave)
        self._handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
        self._handles.append(module.register_forward_hook(leave, with_kwargs=True, always_call=True))

    def _add_tap(self, site: Site, tap: Tap) -> None:
        def received(capture: "Capture", values: dict[str, Any]) -> None:
            num_rows = values.pop("num_rows")
            capture.receive(site, tap, values, num_rows)

        hook = TapHook(self, self._local, site, tap, self._receivers.add(_weakly(self, received)))
        if site.info.layer_index in self._copied_at_once:
            hook.reads_at_once()
        self._tap_hooks.setdefault(site.info.layer_index, []).append(hook)
        if tap.moment == "before":
            self._handles.append(tap.module.register_forward_pre_hook(hook, with_kwargs=True))
        else:
            self._handles.append(tap.module.register_forward_hook(hook, with_kwargs=True))

    def _problem(self, text: str) -> None:
        with self._lock:
            # A model that fails in ever new ways must not fill the memory.
            if text in self.problems or len(self.problems) < _MAX_PROBLEMS:
                self.problems[text] += 1

    def _spent(self, started_ns: int) -> None:
        self.hook_ns += time.perf_counter_ns() - started_ns

    def _receive(self, entry: object, values: dict[str, Any], root: str | None) -> None:
        # Compiled code brings the tensors of the inputs and the length of the cache, but not the cache itself.
        is_training, length = bool(values.pop("is_training")), values.pop("past_length")
        if length >= 0:
            values["past_key_values"] = CacheLength(length)
        self.enter(entry, values, root, None, is_training=is_training)

    def enter(
        self, entry: object, inputs: dict[str, Any], root: str | None, caller: FrameType | None, *, is_training: bool
    ) -> None:
        """Open a forward where none is under way on this thread, and read the tokens where the module is a stack.

        Args:
            entry: the module that is called.
            inputs: by name.
            root: name of the stack that the module is; None = it is none.
            caller: the frame that runs the module's hooks; None in compiled code.
            is_training: the module's mode.
        """
        started_ns = time.perf_counter_ns()
        try:
            if self._current_graph_task() != _NO_TASK:
                return
            forward, is_new, abandoned = self._local.begin(entry, caller, started_ns)
            self._abandon(abandoned, "a forward of the model was interrupted; its routes so far were not kept")
            if is_new:
                self._open(forward, inputs, is_training=is_training)
            if root is not None and forward.raw is not None:
                self._add_frame(forward, inputs, root)
        except Exception as error:  # noqa: BLE001 - a hook never raises into the model
            self._problem(f"forward hook: {type(error).__name__}: {error}")
        finally:
            self._spent(started_ns)

    def _open(self, forward: OpenForward, inputs: dict[str, Any], *, is_training: bool) -> None:
        forward.outer = inputs
        forward.is_training = is_training
        forward.is_batched = _is_batched()
        with self._lock:
            index = self._next_forward
            self._next_forward += 1
        forward.raw = RawForward(
            forward_index=index,
            step=index if self.step is None else self.step,
            captured_at_unix_ns=time.time_ns(),
        )

    def _abandon(self, forwards: list[OpenForward], why: str) -> None:
        for forward in forwards:
            self._settle(forward)
            self._lose(0 if forward.raw is None else forward.raw.num_decisions)
            self._problem(why)

    def _add_frame(self, forward: OpenForward, inputs: dict[str, Any], root: str) -> None:
        assert forward.raw is not None
        # What was seen so far belongs to the tokens so far.
        self._settle(forward)
        stack = self.discovery.sites[self._layers_of[root][0]].info.stack
        if stack == "vision":
            return  # Patches: their number is known only at the layers.
        forward.broken.add(root)
        frame, problem = read_frame(
            inputs,
            forward.outer,
            stack=stack,
            is_training=forward.is_training,
            tracker=self._tracker,
            scope=self._local.scope,
            minted=forward.minted,
            keeps_token_ids=self.keeps_token_ids,
        )
        forward.broken.discard(root)
        if problem:
            self._problem(problem)
        if frame is not None:
            frame.root = root
            forward.frames[root] = frame
            forward.raw.frames.append(frame)

    def leave(self, entry: object, output: Any) -> None:
        """Hand the forward on where its outermost call ends.

        Args:
            entry: the module whose call ends.
            output: what it returned; anything in compiled code.
        """
        started_ns = time.perf_counter_ns()
        try:
            if self._current_graph_task() != _NO_TASK:
                return
            forward, is_error = self._local.end(entry)
            if forward is None:
                return
            self._settle(forward)
            raw = forward.raw
            if raw is None:
                return
            raw.duration_ns = started_ns - forward.started_ns
            if is_error:
                self._abandon([forward], "a forward of the model raised; its routes so far were not kept")
                return
            if forward.is_batched:
                text = "a forward under torch.func.vmap is not captured: its tensors cannot be read outside of it"
                self._abandon([forward], text)
                return
            self.num_forwards += 1
            self.forward_ns += raw.duration_ns
            self._finish(forward, raw, output)
        except Exception as error:  # noqa: BLE001 - a hook never raises into the model
            self._problem(f"end of forward hook: {type(error).__name__}: {error}")
        finally:
            self._spent(started_ns)

    def _finish(self, forward: OpenForward, raw: RawForward, output: Any) -> None:
        # What the model made itself carries these requests on: its cache, or an encoder's output.
        for name in ("past_key_values", "last_hidden_state"):
            carrier = getattr(output, name, None)
            for frame in raw.frames:
                ids = forward.minted.get(frame.num_rows)
                if carrier is not None and frame.are_ids_minted and ids and frame.past_length == 0:
                    self._tracker.remember(carrier, ids)
        self._note_unseen(forward, raw)
        self._own_written(raw)
        self._transfer.start(raw)
        self._drafts.offer(raw)

    def _own_written(self, raw: RawForward) -> None:
        """Copy what the next forward may overwrite; layers that a later one overwrote are lost, and copied at once."""
        layers = copy_written_layers(raw.layers)
        if not layers:
            return
        raw.layers = [layer for layer in raw.layers if not any(layer is each for each in layers)]
        self._lose(sum(layer.num_rows for layer in layers))
        for layer in layers:
            self._copied_at_once.add(layer.layer_index)
            for hook in self._tap_hooks.get(layer.layer_index, ()):
                hook.reads_at_once()
            self._problem(
                f"{self.discovery.sites[layer.layer_index].info.module_name}: its routes lie in a buffer that another "
                "layer wrote into before the forward ended; they were not kept, and are copied at once from now on"
            )

    def _note_unseen(self, forward: OpenForward, raw: RawForward) -> None:
        """Compare the tokens that each stack was given with those that were seen at its MoE layers."""
        seen = {layer.layer_index for layer in raw.layers}
        if len(seen) == len(self.discovery.sites):
            return
        for site in self.discovery.sites:
            index = site.info.layer_index
            if index not in seen and site.root in forward.frames:
                raw.unseen[index] = forward.frames[site.root].num_tokens
        # A pool of experts that got no token of its kind is called by no one: its sibling saw them all.
        pools = {self.discovery.sites[index].pool for index in seen}
        raw.unseen = {i: n for i, n in raw.unseen.items() if self.discovery.sites[i].pool not in pools - {""}}
        if raw.unseen:
            names = [self.discovery.sites[index].info.module_name for index in raw.unseen]
            self._problem(
                f"{len(names)} of {len(self.discovery.sites)} MoE layers were not called in a forward "
                f"({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
            )

    def keep(self, site: Site, tap: Tap, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        """Keep what a tap picks from a call of its module.

        Args:
            site: the layer.
            tap: which of its taps.
            args, kwargs: of the call.
            output: what it returned; None before the call.
        """
        started_ns = time.perf_counter_ns()
        try:
            if self._current_graph_task() != _NO_TASK:
                self.num_recomputed_calls += tap.completes
                return
            self._pick(self._local.forward, site, tap, args, kwargs, output)
        except Exception as error:  # noqa: BLE001 - a hook never raises into the model
            self._problem(f"{site.info.module_name}: {type(error).__name__}: {error}")
        finally:
            self._spent(started_ns)

    def _settle(self, forward: OpenForward) -> None:
        """Keep what the taps picked from the calls that were noted."""
        noted, forward.noted = forward.noted, []
        self.hook_ns, forward.hook_ns = self.hook_ns + forward.hook_ns, 0
        for site, tap, args, output, graph_task in noted:
            if graph_task != _NO_TASK:
                self.num_recomputed_calls += tap.completes
                continue
            try:
                self._pick(forward, site, tap, (None, *args), {}, output)
            except Exception as error:  # noqa: BLE001 - one layer's fault is not the others'
                self._problem(f"{site.info.module_name}: {type(error).__name__}: {error}")

    def _pick(
        self,
        forward: OpenForward | None,
        site: Site,
        tap: Tap,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        output: Any,
    ) -> None:
        shown = args if output is None else (output,)
        kept = tap.keep(args, kwargs, output)
        if kept is not None:
            self._keep(forward, site, tap, kept, shown)
            return
        if forward is not None:
            forward.parts.pop(site.info.layer_index, None)
        self._problem(f"{site.info.module_name}: {_unexpected(shown)}")

    def receive(self, site: Site, tap: Tap, tensors: dict[str, Any], num_rows: int) -> None:
        """Keep what a tap picked in compiled code.

        Args:
            site: the layer.
            tap: which of its taps.
            tensors: what it picked, by name.
            num_rows: how many rows were routed.
        """
        started_ns = time.perf_counter_ns()
        try:
            if self._current_graph_task() != _NO_TASK:
                self.num_recomputed_calls += tap.completes
                return
            self._keep(self._local.forward, site, tap, (tensors, num_rows), ())
        except Exception as error:  # noqa: BLE001 - a hook never raises into the model
            self._problem(f"{site.info.module_name}: {type(error).__name__}: {error}")
        finally:
            self._spent(started_ns)

    def _keep(self, forward: OpenForward | None, site: Site, tap: Tap, kept: Kept, shown: tuple[Any, ...]) -> None:
        index = site.info.layer_index
        tensors, num_rows = kept
        if index in self._copied_at_once:
            copy_written(tensors)
        if forward is None or forward.raw is None:
            if tap.completes:
                self._lose(num_rows)
                if forward is None:
                    self._problem(
                        "experts were called outside of a forward of the watched model: their tokens are not known "
                        "(call the model, or give the debugger the part that is called)"
                    )
            return
        parts = forward.parts.pop(index, None)
        if parts is not None:
            before, rows_before = parts
            # These were made for this call alone, and are nobody else's.
            before.update(tensors)
            tensors, num_rows = before, max(num_rows, rows_before)
        elif tap.completes and site.is_shared:
            return  # Experts that several layers share: this call is of a layer whose own router was just seen.
        if not tap.completes:
            forward.parts[index] = (tensors, num_rows)
            return
        frame = self._frame_of(forward, site, num_rows, shown, has_subset="row_mask" in tensors)
        if frame is not None:
            forward.raw.layers.append(RawLayer(index, frame, tensors, num_rows))
        else:
            self._lose(num_rows)

    def _frame_of(
        self, forward: OpenForward, site: Site, num_rows: int, args: tuple[Any, ...], *, has_subset: bool
    ) -> TokenFrame | None:
        assert forward.raw is not None
        if site.root in forward.broken:
            return None
        frame = forward.frames.get(site.root)
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
            forward.raw.frames,
            stack=site.info.stack,
            is_training=forward.is_training,
            scope=self._local.scope,
            minted=forward.minted,
        )
        frame.root = site.root
        forward.frames[site.root] = frame
        forward.raw.frames.append(frame)
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


def _unhook(handles: list[Any], receivers: Receivers) -> None:
    """Remove hooks, and have torch compile again without them."""
    if not handles:
        return
    for handle in handles:
        handle.remove()
    handles.clear()
    receivers.close()
    reset_compiled_code()


def _weakly(capture: Capture, call: Callable[[Capture, dict[str, Any]], None]) -> Callable[[dict[str, Any]], None]:
    """Return a function that calls `call` as long as the capture is there."""
    reference = weakref.ref(capture)

    def received(values: dict[str, Any]) -> None:
        held = reference()
        if held is not None:
            call(held, values)

    return received


def _is_module(value: Any) -> "TypeGuard[nn.Module]":
    from torch import nn

    return isinstance(value, nn.Module)


def _unreadable_text(discovery: Discovery) -> str:
    shown = "; ".join(f"{name}: {reason}" for name, reason in discovery.unreadable[:_MAX_NAMES])
    more = f" and {len(discovery.unreadable) - _MAX_NAMES} more" if len(discovery.unreadable) > _MAX_NAMES else ""
    return (
        f"{len(discovery.unreadable)} MoE-like modules cannot be read and are not captured ({shown}{more}); "
        "say how they are read with an adapter (moe_debugger.Adapter)"
    )


def _unexpected(given: tuple[Any, ...]) -> str:
    shown = given[0] if len(given) == 1 and isinstance(given[0], tuple | list) else given
    return f"the call does not look as expected of this layer: got {', '.join(_shape(value) for value in shown)}"


def _shape(value: Any) -> str:
    return f"{tuple(value.shape)} {value.dtype}" if hasattr(value, "dtype") else type(value).__name__


def _is_batched() -> bool:
    """Whether torch.func.vmap runs this call: every tensor then stands for a batch of them, and ends with it."""
    from torch import _C

    functorch: Any = getattr(_C, "_functorch")  # noqa: B009  (torch's stubs do not have it)
    level = functorch.peek_interpreter_stack()
    return level is not None and level.key() == functorch.TransformType.Vmap
