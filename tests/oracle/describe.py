"""What the capture says of each build, read from a tiny model after one forward."""

from dataclasses import dataclass

import numpy as np
import torch
from oracle.builds import EVERY_BUILD, adapter_for

from moe_debugger import Decisions, MoEDebugger
from moe_debugger.v1 import routing_pb2 as pb

__all__ = ["Description", "describe"]


@dataclass(frozen=True)
class Description:
    """One architecture as its tiny build shows it; values that differ between layers are joined by "or".

    Attributes:
        kind: "decoder", "vision", ...
        adapters: how the layers are read.
        modules: paths of the layers, a number shown as "*".
        num_experts, top_k, num_shared, num_identity: of a layer, in the tiny build.
        scoring: functions of the routers.
        weight_meaning: what a weight does.
        block_scale: what the experts' sum is multiplied by afterwards; empty where nothing.
        captured: which columns hold something.
        note: of the build.
    """

    kind: str
    adapters: str
    modules: str
    num_experts: str
    top_k: str
    num_shared: str
    num_identity: str
    scoring: str
    weight_meaning: str
    block_scale: str
    captured: str
    note: str


def describe(name: str) -> Description:
    """Build `name`, run one forward under a debugger, and return what its layers and columns say."""
    build = EVERY_BUILD[name]
    model = build.make()
    with adapter_for(model), MoEDebugger(model, level="full") as debugger, torch.no_grad():
        model(**build.inputs(model))
        assert debugger.session is not None
        layers, decisions = debugger.session.layers(), debugger.session.decisions()
    scales = [f"{layer.block_scale:g}" for layer in layers if layer.block_scale != 1]
    return Description(
        kind=build.kind,
        adapters=_joined([layer.adapter for layer in layers]),
        modules=_joined([_path(layer.module_name) for layer in layers], ", "),
        num_experts=_joined([layer.num_experts for layer in layers]),
        top_k=_joined([layer.top_k for layer in layers]),
        num_shared=_joined([layer.num_shared_experts for layer in layers]),
        num_identity=_joined([layer.num_identity_experts for layer in layers]),
        scoring=_joined([layer.scoring_function for layer in layers]),
        weight_meaning=_joined([layer.weight_meaning for layer in layers]),
        block_scale=_joined(scales),
        captured=_captured(decisions),
        note=build.note,
    )


def _captured(decisions: Decisions) -> str:
    parts = ["ids", "weights"]
    if decisions.logits is not None and np.isfinite(decisions.logits.astype(np.float32)).any():
        parts.append("logits")
    if np.isfinite(decisions.top1_probability).any():
        parts.append("router statistics")
    if np.isfinite(decisions.margin).any():
        parts.append("margin")
    if getattr(decisions, "intended_expert_ids", None) is not None:
        parts.append("intended ids")
    for status, text in (
        (pb.SLOT_STATUS_DROPPED, "dropped"),
        (pb.SLOT_STATUS_SKIPPED, "skipped"),
        (pb.SLOT_STATUS_IDENTITY, "identity"),
    ):
        if (decisions.slot_status == status).any():
            parts.append(f"{text} slots")
    return ", ".join(parts)


def _joined(values: list[object] | list[str] | list[int], separator: str = " or ") -> str:
    return separator.join(dict.fromkeys(str(value) for value in values))


def _path(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split("."))
