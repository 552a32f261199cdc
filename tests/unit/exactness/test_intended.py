"""Where capacity drops tokens, or a library's code differs from its router, both are kept: intended and executed.

The intention is defined here anew from the routers' logits, taken inside their forward.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from oracle.builds import EVERY_BUILD, adapter_for
from torch import nn

from moe_debugger import Decisions, MoEDebugger
from moe_debugger.v1 import routing_pb2 as pb


@contextmanager
def _outputs_of(model: nn.Module, suffix: str) -> Iterator[dict[str, Any]]:
    """Collect what the modules whose name ends with `suffix` return, without hooks."""
    outputs: dict[str, Any] = {}
    modules = {name: module for name, module in model.named_modules() if name.endswith(suffix)}

    def wrapped(name: str, original: Any) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            outputs[name] = original(*args, **kwargs)
            return outputs[name]

        return forward

    for name, module in modules.items():
        module.__dict__["forward"] = wrapped(name, module.forward)
    try:
        yield outputs
    finally:
        for module in modules.values():
            del module.__dict__["forward"]


def _run(name: str, suffix: str) -> tuple[Decisions, dict[str, Any]]:
    build = EVERY_BUILD[name]
    model = build.make()
    with adapter_for(model), _outputs_of(model, suffix) as outputs, MoEDebugger(model) as debugger, torch.no_grad():
        model(**build.inputs(model))
        assert debugger.session is not None
        return debugger.session.decisions(), outputs


def _layer(decisions: Decisions, name: str) -> tuple[Any, Any, Any]:
    index = next(index for index, module_name in decisions.module_names.items() if module_name == name)
    rows = decisions.layer_index == index
    assert decisions.intended_expert_ids is not None
    return decisions.expert_ids[rows], decisions.slot_status[rows], decisions.intended_expert_ids[rows]


def test_switch_intends_the_best_expert_and_drops_what_is_over_its_capacity() -> None:
    decisions, outputs = _run("switch_transformers", "mlp.router")
    assert len(outputs) == 4
    for router, (_, _, logits) in outputs.items():
        best = logits.argmax(-1)
        # Capacity 1: the first token of a text that wants an expert gets it.
        is_first = torch.stack([torch.tensor([t not in row[:i] for i, t in enumerate(row)]) for row in best.tolist()])
        ids, status, intended = _layer(decisions, router.removesuffix(".router"))
        assert np.array_equal(intended[:, 0], best.reshape(-1).numpy())
        assert np.array_equal(ids[:, 0], torch.where(is_first, best, -1).reshape(-1).numpy())
        expected = torch.where(is_first, pb.SLOT_STATUS_ROUTED, pb.SLOT_STATUS_DROPPED)
        assert np.array_equal(status[:, 0], expected.reshape(-1).numpy())
        assert not bool(is_first.all())


def test_nllb_intends_its_two_best_experts_though_the_library_computes_others() -> None:
    decisions, outputs = _run("nllb_moe", "ffn.router")
    assert len(outputs) == 4
    for router, (_, gates, _) in outputs.items():
        ids, _, intended = _layer(decisions, router.removesuffix(".router"))
        for row, gate in enumerate(gates):
            assert {int(e) for e in intended[row] if e >= 0} == set(gate.nonzero().reshape(-1).tolist()), (router, row)
        assert set(ids[ids >= 0].tolist()) <= {0, 1}
        assert len(set(intended[intended >= 0].tolist())) > 2


def test_glam_intends_the_two_choices_of_each_token() -> None:
    decisions, outputs = _run("glam", "feed_forward.router")
    assert len(outputs) == 2
    for router, routing in outputs.items():
        ids, status, intended = _layer(decisions, router.removesuffix(".router"))
        assert np.array_equal(np.sort(intended), np.sort(routing.chosen.numpy()))
        assert np.array_equal((ids >= 0).sum(-1), routing.routing_map.sum(-1).numpy())
        assert np.array_equal(status == pb.SLOT_STATUS_DROPPED, ids < 0)
        assert (ids < 0).any()
