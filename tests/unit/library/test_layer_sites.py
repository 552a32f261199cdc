"""A layer of routed attention is told apart from the MLP of the same model layer on the wire."""

import pytest

from moe_debugger import _debugger, source
from moe_debugger.capture import LayerInfo


@pytest.mark.parametrize("site", ["attention", "mlp"])
def test_a_description_says_what_is_routed(site: str) -> None:
    info = LayerInfo(
        layer_index=1,
        model_layer_index=0,
        module_name="model.layers.0.x",
        stack="decoder",
        num_experts=4,
        top_k=2,
        site=site,  # type: ignore[arg-type]
    )
    assert _debugger._description(info, []).site == site
    assert source._description(info).site == site
