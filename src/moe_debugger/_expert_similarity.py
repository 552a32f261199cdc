"""How alike the experts of a model's layer are: reads weights, and runs experts on the same tokens where asked to."""

import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_debugger._expert_units import ExpertUnits
from moe_debugger.analysis.expert_similarity import ExpertSimilarity, aligned_similarity, output_similarity
from moe_debugger.errors import InvalidInputError, ModelNotSupportedError
from moe_debugger.training.parameters import find_parameters

if TYPE_CHECKING:
    import torch
    from torch import nn

    from moe_debugger._debugger import MoEDebugger

__all__ = ["expert_similarity"]

# CKA compares all pairs of tokens.
_MAX_TOKENS = 4096


def expert_similarity(
    model: "nn.Module | MoEDebugger",
    layer: int,
    *,
    experts: Sequence[int] | None = None,
    hidden_states: Any = None,
) -> ExpertSimilarity:
    """Return how alike the routed experts of a layer are.

    Weights are compared with hidden units matched: the order of an expert's hidden units means nothing, and without
    matching equal experts can look unrelated. Outputs are compared where tokens are given, which also sees what the
    weights cannot show. A layer of 64 experts of 1,024 units takes about a quarter of an hour on two cores; name
    `experts` to compare fewer.

    Args:
        model: the model, or a debugger that watches it.
        layer: index among the model's MoE layers.
        experts: ids to compare, None = all.
        hidden_states: [n, hidden size], what the experts would be given, array or tensor; None = weights alone. Every
            expert gets every token, whatever the router says; hooks are not called.

    Raises:
        InvalidInputError: no such layer or expert, or `hidden_states` of another shape.
        ModelNotSupportedError: the layer's weights cannot be read, and no `hidden_states` are given either.
    """
    import torch

    from moe_debugger.capture import find_sites

    root = model if isinstance(model, torch.nn.Module) else model.model
    sites = {site.info.layer_index: site for site in find_sites(root).sites}
    if layer not in sites:
        raise InvalidInputError(f"the model has no MoE layer {layer}; it has {sorted(sites)}")
    site = sites[layer]
    ids = list(range(site.info.num_experts)) if experts is None else [int(expert) for expert in experts]
    wrong = [expert for expert in ids if not 0 <= expert < site.info.num_experts]
    if wrong or not ids or len(set(ids)) != len(ids):
        raise InvalidInputError(f"experts are {ids}, expected different ones of 0 to {site.info.num_experts - 1}")
    with torch.no_grad():
        try:
            units = ExpertUnits(site, root)
            result = aligned_similarity(units.of, ids, layer_index=layer, product=_product)
        except ModelNotSupportedError as error:
            if hidden_states is None:
                raise
            result = replace(_unknown(layer, ids), not_applicable=f"weights: {error}")
        if hidden_states is None:
            return result
        tokens = torch.as_tensor(np.asarray(hidden_states) if not torch.is_tensor(hidden_states) else hidden_states)
        if tokens.ndim != 2 or not 0 < len(tokens) <= _MAX_TOKENS:
            raise InvalidInputError(
                f"hidden_states have shape {tuple(tokens.shape)}, expected [n, hidden size] with n up to {_MAX_TOKENS}"
            )
        try:
            outputs = _outputs(site, root, ids, tokens)
        except ModelNotSupportedError as error:
            return replace(result, not_applicable=f"outputs: {error}")
    cosine, cka = output_similarity(outputs)
    return replace(result, output_cosine=cosine, output_cka=cka, num_tokens=len(tokens))


def _product(a: "torch.Tensor", b: "torch.Tensor") -> Any:
    return (a @ b.T).double().cpu().numpy()


def _unknown(layer: int, ids: Sequence[int]) -> ExpertSimilarity:
    nan = np.full((len(ids), len(ids)), np.nan)
    return ExpertSimilarity(layer, tuple(ids), 0, nan, nan, nan, float("nan"), False, nan, nan, 0)


def _outputs(site: Any, model: "nn.Module", ids: Sequence[int], tokens: "torch.Tensor") -> list[Any]:
    import torch

    experts = site.experts
    reference = next(experts.parameters(), None)
    if reference is not None:
        tokens = tokens.to(reference.device, reference.dtype)
    modules = _separate(site, model)
    names = list(inspect.signature(experts.forward).parameters) if not modules else []
    # Hidden states, expert ids, weights, in this order, whatever their names.
    if not modules and len(names) != 3:
        raise ModelNotSupportedError(
            f"the experts of {site.info.module_name} cannot be run one by one: their forward takes {names}"
        )
    outputs = []
    for expert in ids:
        # `forward` itself: a debugger that watches must not count these tokens.
        try:
            if modules:
                output = modules[expert].forward(tokens)
            else:
                index = torch.full((len(tokens), 1), expert, device=tokens.device)
                output = experts.forward(tokens, index, torch.ones_like(index, dtype=tokens.dtype))
        # The code of others, called in a way that it may not expect.
        except Exception as error:
            raise ModelNotSupportedError(
                f"expert {expert} of {site.info.module_name} cannot be run on its own: {type(error).__name__}: {error}"
            ) from error
        if not torch.is_tensor(output) or len(output) != len(tokens):
            raise ModelNotSupportedError(f"expert {expert} of {site.info.module_name} returned no row for each token")
        outputs.append(output.detach().flatten(1).double().cpu().numpy())
    return outputs


def _separate(site: Any, model: "nn.Module") -> "list[nn.Module]":
    """Return the module of each expert, none where they have no modules of their own."""
    found = find_parameters(site, model)
    if not found.separate:
        return []
    owners = [{id(slot.owner) for slot in slots} for slots in found.separate]
    modules: list[nn.Module] = []
    for own in owners:
        # The smallest module that holds all of an expert's parameters.
        holders = [m for m in site.experts.modules() if own <= {id(child) for child in m.modules()}]
        modules.append(min(holders, key=lambda module: sum(1 for _ in module.modules())))
    return modules
