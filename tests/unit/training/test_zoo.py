"""Which parameters are an expert's, a router's and a selection bias, on the architectures of transformers."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from zoo.build import ALL

from moe_debugger import MoEDebugger

pytestmark = pytest.mark.filterwarnings("ignore")
# Parameters inside of what holds the experts that are of all of them together.
OF_NO_EXPERT = {"jetmoe": ("bias",), "muse_spark": ("post_expert_norm.weight",)}
# The bare model cannot train, or returns no output with a gradient.
CANNOT_TRAIN = ("doge", "vitpose_backbone")


def _backward(name: str) -> nn.Module:
    model = ALL[name].make().train().requires_grad_(True)
    output = model(**ALL[name].inputs(model))
    tensors = [one for one in output.values() if torch.is_tensor(one) and one.is_floating_point() and one.requires_grad]
    torch.stack([one.float().pow(2).mean() for one in tensors]).sum().backward()  # type: ignore[no-untyped-call]
    return model


@pytest.mark.parametrize("name", sorted(set(ALL) - set(CANNOT_TRAIN)))
def test_the_experts_norms_are_all_of_their_gradient_and_nothing_else(name: str) -> None:
    model = _backward(name)
    parameters = dict(model.named_parameters())
    with MoEDebugger(model, gradients=True) as debugger:
        debugger.step(1)
        debugger.record_gradients()
        session = debugger.session
        assert session is not None
        series = session.series()
        sites = debugger._capture.discovery.sites
    for site in sites:
        index = site.info.layer_index
        of_router = {id(one) for one in ([] if site.router is None else site.router.parameters())}
        held: dict[str, Any] = dict(site.experts.named_parameters())
        gradients = [
            one.grad.double().pow(2).sum().item()
            for path, one in held.items()
            if one.grad is not None
            and id(one) not in of_router
            and "shared" not in path
            and path not in OF_NO_EXPERT.get(name, ())
        ]
        norms = series.select("expert_gradient_norm", layer_index=index).value
        assert len(norms) == site.info.num_experts
        assert np.nansum(norms**2) == pytest.approx(sum(gradients), rel=1e-4)
        is_reached = any(one.grad is not None for one in held.values())
        assert np.isnan(norms).all() != is_reached
        assert np.isfinite(series.select("router_weight_norm", layer_index=index).value).all()
    biases = [
        path
        for path in [*parameters, *dict(model.named_buffers())]
        if any(word in path for word in ("correction_bias", "expert_bias", "balancing_biases"))
    ]
    assert bool(biases) == ("selection_bias_min" in series.names())
