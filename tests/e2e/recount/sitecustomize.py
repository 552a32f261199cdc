"""An independent recount, taken inside the model: it shares no code with the capture.

Python imports a module of this name at start, wherever its folder is on PYTHONPATH. It replaces the forward of
transformers' Mixtral experts by one that first counts what the experts were given, and writes one JSON line a forward:

    {"requests": {"<request id>": {"tokens": n, "counts": [[per expert] per layer]}}}

Which batch row belongs to which request is what the generation engine says when it calls the model.
"""

import functools
import importlib.abc
import importlib.machinery
import json
import os
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

FOLDER = os.environ.get("MOE_TEST_RECOUNT_DIR")


class _Recount:
    """State of one process. One thread runs the model, so nothing is locked."""

    def __init__(self) -> None:
        self.rows: list[str] = []
        self.valid: Any = None
        self.layers: dict[int, list[Any]] = {}
        self.order: dict[int, int] = {}

    def begin(self, model: Any, kwargs: dict[str, Any]) -> None:
        if not self.order:
            experts = [module for module in model.modules() if type(module).__name__ == "MixtralExperts"]
            self.order = {id(module): index for index, module in enumerate(experts)}
        batch, length = kwargs["input_ids"].shape
        mask = kwargs.get("attention_mask")
        import torch

        self.valid = torch.ones(batch, length, dtype=torch.bool) if mask is None else mask[:, -length:].bool().cpu()
        self.layers = {}

    def experts(self, module: Any, top_k_index: Any) -> None:
        self.layers[self.order[id(module)]] = [top_k_index.detach().cpu(), module.num_experts]

    def end(self) -> None:
        import torch

        batch, length = self.valid.shape
        requests: dict[str, Any] = {}
        for row in range(batch):
            # Each batch row is length consecutive rows of the flattened [batch * length, k] indices.
            counts = []
            for layer in sorted(self.layers):
                ids, num_experts = self.layers[layer]
                chosen = ids[row * length : (row + 1) * length][self.valid[row]].reshape(-1)
                counts.append(torch.bincount(chosen, minlength=num_experts).tolist())
            name = self.rows[row] if row < len(self.rows) else "?"
            requests[name] = {"tokens": int(self.valid[row].sum()), "counts": counts}
        with open(f"{FOLDER}/{os.getpid()}.jsonl", "a") as out:
            out.write(json.dumps({"requests": requests}) + "\n")


def _patch_mixtral(module: ModuleType) -> None:
    recount = _Recount()
    experts_class, model_class = module.MixtralExperts, module.MixtralForCausalLM
    experts_forward, model_forward = experts_class.forward, model_class.forward

    @functools.wraps(experts_forward)
    def counted_experts(self: Any, hidden_states: Any, top_k_index: Any, *args: Any, **kwargs: Any) -> Any:
        recount.experts(self, top_k_index)
        return experts_forward(self, hidden_states, top_k_index, *args, **kwargs)

    @functools.wraps(model_forward)
    def counted_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        if args:
            kwargs["input_ids"], args = args[0], args[1:]
        recount.begin(self, kwargs)
        output = model_forward(self, *args, **kwargs)
        recount.end()
        return output

    experts_class.forward, model_class.forward = counted_experts, counted_model
    _note_rows(recount)


def _note_rows(recount: _Recount) -> None:
    """Listen to the engine's own words for the rows of its next forward."""
    from moe_debugger import MoEDebugger

    said = MoEDebugger.requests

    def requests(self: Any, request_ids: Sequence[str], *args: Any, **kwargs: Any) -> Any:
        recount.rows = list(request_ids)
        return said(self, request_ids, *args, **kwargs)

    MoEDebugger.requests = requests  # type: ignore[assignment, method-assign]


class _AfterImport(importlib.abc.MetaPathFinder):
    """Patches one module once its own loader has run it."""

    name = "transformers.models.mixtral.modeling_mixtral"

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            _patch_mixtral(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if FOLDER:
    sys.meta_path.insert(0, _AfterImport())
