"""Level "counts": sums equal those of the rows, however and wherever they are made."""

from typing import Any

import numpy as np
import pytest
import torch
from device_streams import WrittenDown
from oracle.builds import EVERY_BUILD, adapter_for
from tiny_moe import build

from moe_debugger import MoEDebugger, Session, new_id
from moe_debugger.analysis import RoutingState
from moe_debugger.capture import HostTransfer
from moe_debugger.capture.sums import ROW_COUNTS

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")

_ACCOUNT = (
    "num_tokens", "num_padding", "num_dropped_slots", "num_skipped_slots", "num_identity_slots", "num_unused_slots",
    "num_probability_tokens", "first_step", "last_step",
)  # fmt: skip


def reduces(session: Session) -> list[int]:
    """Have the host's tensors treated as those of a device, and return the layers that are reduced, as they come."""
    capture = session._capture
    known = capture._transfer.reduces_with
    transfer = HostTransfer(capture.discovery.sites, WrittenDown("cpu"))
    transfer.reduces_with = known
    reduced: list[int] = []
    start = transfer.start

    def started(raw: Any) -> None:
        # Only what was settled by now is reduced, as where a device is slower than the capture's thread.
        session._intake.flush(10)
        start(raw)
        reduced.extend(layer.layer_index for layer in raw.layers if ROW_COUNTS in layer.tensors)

    transfer.start = started  # type: ignore[method-assign]
    capture._transfer = transfer
    return reduced


def _state(session: Session) -> RoutingState:
    session.flush()
    assert session._counted is not None
    return session._counted.state


def assert_same(sums: RoutingState, rows: RoutingState) -> None:
    """Compare all that sums hold with the same of rows."""
    assert list(sums.layers) == list(rows.layers)
    for index, layer in rows.layers.items():
        mine = sums.layers[index]
        assert mine.counts.tolist() == layer.counts.tolist(), index
        for name in _ACCOUNT:
            assert getattr(mine, name) == getattr(layer, name), (index, name)
        np.testing.assert_allclose(mine.mean_probability, layer.mean_probability, rtol=2e-5, atol=3e-6)
    assert sums.phase_tokens.sum() == max(layer.num_tokens for layer in rows.layers.values()) or len(sums.layers) > 1


@pytest.mark.parametrize("name", list(EVERY_BUILD))
def test_sums_of_every_architecture_equal_those_of_its_rows(name: str) -> None:
    case = EVERY_BUILD[name]
    model = case.make()
    inputs = case.inputs(model)
    states = []
    with torch.no_grad(), adapter_for(model):
        for level in ("routes", "counts"):
            with MoEDebugger(model, level=level) as debugger:
                session = debugger.session
                assert session is not None
                if level == "counts":
                    reduces(session)
                for _ in range(2):
                    model(**inputs)
                states.append(_state(session))
                assert session.capture_health().is_healthy, session.capture_health()
    assert_same(states[1], states[0])


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "llama4_text", "zaya", "longcat_flash"])
def test_rows_are_reduced_before_they_are_copied_once_their_logits_are_understood(name: str) -> None:
    model = EVERY_BUILD[name].make()
    ids, mask = torch.randint(3, 80, (3, 25)), torch.ones(3, 25, dtype=torch.int64)
    mask[1, :9] = 0
    states = []
    with torch.no_grad():
        for level in ("routes", "counts"):
            with MoEDebugger(model, level=level) as debugger:
                session = debugger.session
                assert session is not None
                reduced = reduces(session)
                model(input_ids=ids, attention_mask=mask)
                assert reduced == [], "the weights of the first forward tell how the logits are read"
                model(input_ids=ids, attention_mask=mask)
                layers = [layer.layer_index for layer in session.layers()]
                assert sorted(reduced) == (layers if level == "counts" else [])
                model(input_ids=ids[:, :1])
                assert sorted(reduced) == (layers if level == "counts" else []), "a few ids are less than their counts"
                states.append(_state(session))
    assert_same(states[1], states[0])


@pytest.mark.parametrize("is_reduced", [False, True])
def test_sums_know_dummies_samples_and_phases_of_rows(is_reduced: bool) -> None:
    model = build("mixtral")
    ids = torch.randint(3, 90, (4, 12))
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    names = [[new_id(), new_id(), None, new_id()] for _ in range(3)]
    states, left_out = [], []
    with torch.no_grad():
        for level in ("routes", "counts"):
            with MoEDebugger(model, level=level, sampling_rate=0.5) as debugger:
                session = debugger.session
                assert session is not None
                if is_reduced and level == "counts":
                    reduces(session)
                for step in range(3):
                    with debugger.requests(names[step], phase=["prefill", "decode", "prefill", "decode"]):
                        model(ids, attention_mask=mask)
                states.append(_state(session))
                left_out.append(debugger.get_performance_metrics().num_dropped)
                assert session.capture_health().is_healthy
    assert left_out[0] == left_out[1]
    assert_same(states[1], states[0])
    assert states[1].phase_tokens.tolist() == states[0].phase_tokens.tolist()


@pytest.mark.parametrize("is_reduced", [False, True])
def test_an_id_that_the_layer_does_not_have_turns_the_sums_red(is_reduced: bool) -> None:
    model = build("mixtral")
    ids = torch.randint(3, 90, (2, 12))
    with torch.no_grad(), MoEDebugger(model, level="counts") as debugger:
        session = debugger.session
        assert session is not None
        model(ids)
        session.flush()
        if is_reduced:
            reduces(session)
        transfer = session._capture._transfer
        start = transfer.start

        def planted(raw: Any) -> None:
            broken = raw.layers[1].tensors["expert_ids"] = raw.layers[1].tensors["expert_ids"].clone()
            broken[3, 0], broken[4, 1], broken[5, 0] = 8, 1000, -5
            start(raw)

        transfer.start = planted  # type: ignore[method-assign]
        model(ids)
        check = session.capture_health().check("range")
        assert check.num_violations == 3
        assert "layer 1, forward 1: 3 slots have an expert that the layer does not have" in check.example
        assert [check.name for check in session.capture_health().failed if check.name != "overhead"] == ["range"]
        layers = _state(session).layers
        assert [layer.num_assignments for layer in layers.values()] == [2 * 48, 2 * 48 - 3, 2 * 48]
