"""The profiler on every architecture: outputs as without it, every part where it is, and no note."""

from typing import Any

import pytest
import torch
from oracle.builds import EVERY_BUILD

from moe_debugger import ModelNotSupportedError
from moe_debugger.capture.discovery import find_sites
from moe_debugger.profiling import LayerProfile, LayerProfiler

pytestmark = pytest.mark.slow

# Their layers are read through an adapter, which other tests register.
_BY_ADAPTER = {"glam"}
# Blocks without a call of their own (JetMoE's routed attention), or without a token of their kind (ERNIE-VL's vision).
_UNCALLED = {"jetmoe": 0.5, "ernie4_5_vl_moe": 0.5}


@pytest.mark.parametrize("name", sorted(EVERY_BUILD))
def test_a_profiled_architecture_computes_what_it_did(name: str) -> None:
    torch.set_num_threads(1)
    case = EVERY_BUILD[name]
    model: Any = case.make().eval()
    inputs = case.inputs(model)
    try:
        sites = find_sites(model).sites
    except ModelNotSupportedError:
        assert name in _BY_ADAPTER
        return
    with torch.no_grad():
        model(**inputs)
        bare = model(**inputs)
        profiler = LayerProfiler(model, sites)
        profiler.attach()
        profiled = [model(**inputs) for _ in range(2)]
        profile = LayerProfile(profiler)
        profiler.detach()
    logits = getattr(bare, "logits", None)
    if logits is not None:
        assert all(torch.equal(each.logits, logits) for each in profiled)
    assert not profiler.notes
    assert profile.num_forwards == 2
    assert profile.spans.num_unmatched == 0
    called = [summary for summary in profile.summaries if len(summary.calls)]
    assert len(called) == len(profile.summaries) * _UNCALLED.get(name, 1)
    for summary in called:
        assert len(summary.calls) == 2
        if summary.times.layout != "whole":
            assert (summary.calls.experts > 0).all()
            assert summary.calls.expert_rows is not None
            assert not summary.times.roofline.reason
    assert len(profile.table) > 0
    assert str(profile)
