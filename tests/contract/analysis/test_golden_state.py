"""States stored by an earlier build still read; a file is added with a format version, never changed."""

from pathlib import Path

import pytest

from moe_debugger.analysis.state import LayerShape, RoutingState

# Three tokens, one of them padding: experts [0, 1], [2, -1]; the second slots dropped and skipped.
GOLDEN = Path(__file__).parent / "v1" / "routing_state.bin"


def test_a_state_of_major_1_reads_and_goes_on() -> None:
    state = RoutingState.from_bytes(GOLDEN.read_bytes())
    layer = state.layers[0]
    assert layer.shape == LayerShape(0, 4, 2)
    assert layer.counts.tolist() == [1, 0, 1, 0]
    assert (layer.num_tokens, layer.num_padding, layer.num_dropped_slots) == (2, 1, 1)
    # That version had one number for skipped, identity and unused slots.
    assert (layer.num_unused_slots, layer.num_skipped_slots, layer.num_identity_slots) == (1, 0, 0)
    assert (layer.first_step, layer.last_step, layer.num_fingerprints) == (3, 3, 2)
    assert layer.router_entropy.mean == 0.75
    assert state.token_classes.sum() == 2
    assert state.merge(state).layers[0].counts.tolist() == [2, 0, 2, 0]
    assert RoutingState.from_bytes(state.to_bytes()) == state


# Three tokens in steps 3, 3, 4 through four experts and an identity one, the last one padding.
@pytest.mark.parametrize("major", [2, 3, 4, 5, 6])
def test_a_state_of_a_later_major_reads_and_goes_on(major: int) -> None:
    state = RoutingState.from_bytes((GOLDEN.parent / f"routing_state_{major}.bin").read_bytes())
    layer = state.layers[0]
    assert layer.shape == LayerShape(0, 4, 2, 1)
    assert layer.counts.tolist() == [1, 1, 1, 0]
    assert (layer.num_tokens, layer.num_padding, layer.num_identity_slots) == (2, 1, 1)
    assert layer.router_entropy.mean == 0.75
    # Of tokens with 2 and 1 routed slots; up to major 3 it was not kept, and is that of as equal ones as can be.
    assert layer.squared_loads == 5
    # Up to major 4 one table stood for all layers, and workloads had no requests.
    assert (state.phase_tokens.sum(), state.token_classes.sum()) == (2, 2)
    assert layer.workloads.num_tokens.tolist() == ([2] if major >= 5 else [])
    assert (state.num_requests, len(state.request_sample)) == (1, 1 if major >= 6 else 0)
    # Up to major 5 sums stood for all requests at once.
    assert layer.router_entropy.by_group()[0].tolist() == ([1.5] if major >= 6 else [])
    assert layer.dropped.num_values == (2 if major >= 6 else 0)
    if major == 2:
        # That version kept no history, and what is merged with it has none either.
        assert layer.load_series is None
    else:
        assert layer.load_series is not None
        assert layer.load_series.first_steps.tolist() == [3]
        assert layer.token_sample is not None
        assert sorted(layer.token_sample.expert_ids.tolist()) == [[-1, 2], [0, 1]]
    again = state.merge(state)
    assert again.layers[0].counts.tolist() == [2, 2, 2, 0]
    assert RoutingState.from_bytes(again.to_bytes()) == again
