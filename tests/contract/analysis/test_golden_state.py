"""States stored by an earlier build still read; a file is added with a format version, never changed."""

from pathlib import Path

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
