"""The weights of experts are read in every architecture but those that have no hidden units to match."""

import pytest
import torch
from zoo.build import ALL
from zoo.custom import CUSTOM

from moe_debugger._expert_units import ExpertUnits
from moe_debugger.capture import find_sites
from moe_debugger.errors import ModelNotSupportedError

pytestmark = pytest.mark.slow

# One neuron for each expert, kept in embeddings; and experts of one linear layer.
WITHOUT_UNITS = {"doge", "vitpose_backbone"}
# Read by an adapter, which this test does not register.
BY_ADAPTER = {"glam"}


@pytest.mark.parametrize("name", sorted({*ALL, *CUSTOM} - BY_ADAPTER))
def test_units_hold_every_weight_of_an_expert_but_the_bias_of_its_output(name: str) -> None:
    model = {**ALL, **CUSTOM}[name].make()
    site = find_sites(model).sites[0]
    if name in WITHOUT_UNITS:
        with pytest.raises(ModelNotSupportedError, match="compare the experts by their outputs"):
            ExpertUnits(site, model)
        return
    units = ExpertUnits(site, model)
    first, second = units.of(0), units.of(1)
    assert first.shape == second.shape
    assert len(first) == units.num_units
    assert torch.isfinite(first).all()
    assert not torch.equal(first, second)
    # Two or three numbers for each number of the token, and a bias at most for each of them.
    assert 2 * units._hidden <= first.shape[1] <= 3 * units._hidden + 3
    # Numbers are moved, none is made or lost: the sum of squares is that of the parameters that are units'.
    parts = [part for part in units._parts if part.of(0).ndim == 2 or not part.is_down]
    squares = sum(float(part.of(0).detach().float().square().sum()) for part in parts)
    assert float(first.square().sum()) == pytest.approx(squares, rel=1e-4)
