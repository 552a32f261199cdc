"""The push door without a fleet: what is counted, what is left out, what is refused, and that nothing waits."""

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from unit.engines.conftest import EXPERTS, LAYERS, TOP_K, Truth

import moe_debugger
from moe_debugger import InvalidInputError, LayerInfo, SessionClosedError, Source
from moe_debugger.engines import engine_layers
from moe_debugger.v1 import routing_pb2 as pb
from moe_debugger.wire.codec import CountsColumns, LayerCountColumns


@pytest.fixture
def source() -> Iterator[Source]:
    with moe_debugger.open_source(num_layers=LAYERS, num_experts=EXPERTS, top_k=TOP_K) as source:
        yield source


def load(source: Source) -> list[list[int]]:
    return [layer.expert_counts.tolist() for layer in source.get_routing_stats().layers]


def test_routes_are_counted_kept_and_named(source: Source, truth: Truth) -> None:
    ids = truth.routes(10)
    weights = np.random.default_rng(1).random(ids.shape, np.float32)
    request = moe_debugger.new_id()
    published = source.publish_routes(
        request, ids, np.arange(10), weights, num_prompt_tokens=6, token_ids=np.arange(100, 110)
    )
    assert (published.request_id, published.num_tokens, published.num_decisions) == (request, 10, 10 * LAYERS)
    assert (published.is_taken, published.num_not_routed_tokens, dict(published.problems)) == (True, 0, {})
    assert load(source) == truth.expected()
    decisions = source.decisions()
    assert len(decisions) == 10 * LAYERS
    assert decisions.request_ids == (request,)
    for layer in range(LAYERS):
        rows = decisions.layer_index == layer
        assert np.array_equal(decisions.expert_ids[rows], ids[:, layer])
        np.testing.assert_allclose(decisions.gate_weights[rows].astype(float), weights[:, layer], rtol=1e-3)
        assert decisions.position[rows].tolist() == list(range(10))
        assert decisions.phase[rows].tolist() == [pb.PHASE_PREFILL] * 6 + [pb.PHASE_DECODE] * 4
    # The level "routes" holds no tokens.
    assert decisions.token_id is None
    metrics = source.get_expert_metrics().layer(1)
    expert = int(ids[0, 1, 0])
    expected = weights[:, 1][ids[:, 1] == expert].mean()
    assert metrics[expert].mean_gate_weight == pytest.approx(float(expected), rel=1e-5)
    assert source.account().problems == {}


def test_the_level_with_tokens_keeps_them_and_counts_keeps_no_rows(truth: Truth) -> None:
    ids = truth.routes(4)
    for level, num_rows in (("routes+tokens", 4 * LAYERS), ("counts", 0)):
        with moe_debugger.open_source(
            num_layers=LAYERS,
            num_experts=EXPERTS,
            top_k=TOP_K,
            level=level,  # type: ignore[arg-type]
        ) as source:
            source.publish_routes(None, ids, range(4), phase="decode", token_ids=[7, 8, 9, 10])
            assert load(source) == truth.expected()
            decisions = source.decisions()
            assert len(decisions) == num_rows
            if num_rows:
                assert decisions.token_id is not None
                assert decisions.token_id[:4].tolist() == [7, 8, 9, 10]


def test_cached_tokens_are_never_load_whatever_the_arrays_hold(source: Source, truth: Truth) -> None:
    # Engines differ: zeros, -1, or what the request routed that filled the cache.
    for fill in (None, 0, -1):
        ids = truth.routes(8, not_routed=5)
        if fill is not None:
            ids[:5] = fill
        published = source.publish_routes(None, ids, np.arange(8), num_prompt_tokens=6, num_cached_tokens=5)
        assert (published.num_tokens, published.num_not_routed_tokens) == (3, 5)
        assert dict(published.problems) == {}
    assert load(source) == truth.expected()
    account = source.account()
    assert (account.num_tokens, account.num_not_routed_tokens, dict(account.problems)) == (9, 15, {})
    assert set(source.decisions().position.tolist()) == {5, 6, 7}
    assert source.health().is_healthy


@pytest.mark.parametrize("fill", [0, 7, -1])
def test_rows_that_were_never_written_are_left_out_and_flagged(source: Source, truth: Truth, fill: int) -> None:
    ids = truth.routes(9, not_routed=3)
    ids[:3] = fill
    published = source.publish_routes(None, ids, np.arange(9))
    assert (published.num_tokens, published.num_not_routed_tokens) == (6, 3)
    assert load(source) == truth.expected()
    assert [number for text, number in published.problems.items() if "start of a request" in text] == [3]
    assert not source.health().is_healthy


def test_gaps_inside_a_request_are_flagged_as_such(source: Source, truth: Truth) -> None:
    ids = truth.routes(6)
    for layer in range(LAYERS):
        truth.load.subtract((layer, int(expert)) for expert in ids[4, layer])
    ids[4] = 0
    published = source.publish_routes(None, ids, np.arange(6))
    assert published.num_not_routed_tokens == 1
    assert list(published.problems) == ["tokens inside a request have no routes and were left out"]
    assert load(source) == truth.expected()
    # Told how many were cached, whatever else is missing is missing.
    published = source.publish_routes(None, ids, np.arange(6), num_cached_tokens=2)
    assert (published.num_tokens, published.num_not_routed_tokens) == (3, 3)
    assert list(published.problems) == ["tokens beyond the cached prefix have no routes and were left out"]


def test_a_layer_without_routes_has_skipped_slots_and_no_load(source: Source, truth: Truth) -> None:
    ids = truth.routes(5)
    ids[:, 1] = 0
    published = source.publish_routes(None, ids, np.arange(5), np.ones(ids.shape))
    assert published.num_tokens == 5
    assert [number for text, number in published.problems.items() if "layer 1" in text] == [5]
    expected = truth.expected()
    assert load(source) == [expected[0], [0] * EXPERTS, expected[2]]
    decisions = source.decisions()
    rows = decisions.layer_index == 1
    assert (decisions.expert_ids[rows] == -1).all()
    assert (decisions.slot_status[rows] == pb.SLOT_STATUS_SKIPPED).all()
    assert np.isnan(decisions.gate_weights[rows].astype(float)).all()


def test_single_slots_of_minus_one_are_skipped(source: Source, truth: Truth) -> None:
    ids = truth.routes(3)
    truth.load[2, int(ids[1, 2, 1])] -= 1
    ids[1, 2, 1] = -1
    source.publish_routes(None, ids, np.arange(3))
    assert load(source) == truth.expected()


def test_padding_is_kept_flagged_and_no_load(source: Source, truth: Truth) -> None:
    ids = truth.routes(6, not_routed=2)
    ids[0] = 0
    published = source.publish_routes(
        None, ids, [0, 0, 0, 1, 2, 3], is_padding=[True, True, False, False, False, False]
    )
    assert (published.num_tokens, published.num_not_routed_tokens, dict(published.problems)) == (6, 0, {})
    assert load(source) == truth.expected()
    assert [layer.num_padding_tokens for layer in source.get_routing_stats().layers] == [2] * LAYERS
    assert source.decisions().is_padding.sum() == 2 * LAYERS


def _valid() -> "npt.NDArray[np.int32]":
    return Truth(seed=5).routes(4)


def _with(value: int, *place: int) -> "npt.NDArray[np.int32]":
    ids = _valid()
    ids[place] = value
    return ids


def _twice() -> "npt.NDArray[np.int32]":
    ids = np.zeros((2, LAYERS, 3), np.int32) + np.arange(3)
    ids[1, 2] = [4, 5, 4]
    return ids


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"expert_ids": _valid().astype(float)}, "dtype float64; expected integers"),
        ({"expert_ids": [[[0, 1]], [[2]]]}, "cannot be read as an array"),
        ({"expert_ids": _valid()[:, :2]}, r"shape \(4, 2, 2\); expected \(tokens, 3 layers, 2 experts\)"),
        ({"expert_ids": _valid()[:, :, :1]}, r"shape \(4, 3, 1\)"),
        ({"expert_ids": _valid()[0]}, r"shape \(3, 2\)"),
        ({"expert_ids": _with(16, 2, 1, 0)}, r"expert_ids\[2, 1, 0\] is 16, and the layer has 16 experts"),
        ({"expert_ids": _with(-2, 2, 1, 0)}, r"expert_ids\[2, 1, 0\] is -2"),
        ({"expert_ids": _with(2**31 - 1, 0, 0, 0)}, "is 2147483647"),
        ({"expert_ids": np.zeros((4, LAYERS, TOP_K), int)}, "none of the 4 tokens has a route"),
        ({"expert_ids": np.full((4, LAYERS, TOP_K), 255)}, "none of the 4 tokens has a route"),
        ({"positions": [0, 1, 2]}, r"positions has shape \(3,\), and expert_ids has 4 tokens"),
        ({"positions": [0, 1, 1, 2]}, "positions do not rise: 1 is followed by 1"),
        ({"positions": [3, 2, 1, 0]}, "positions do not rise: 3 is followed by 2"),
        ({"positions": [-1, 0, 1, 2]}, "positions reach from -1"),
        ({"positions": [0.0, 1.0, 2.0, 3.0]}, "positions has dtype float64"),
        ({"num_expected_tokens": 5}, "4 tokens, expected 5: it is cut"),
        ({"num_expected_tokens": 3}, "4 tokens, expected 3: it is too long"),
        ({"num_cached_tokens": -1}, "num_cached_tokens is -1"),
        ({"weights": np.ones((4, LAYERS))}, "expected floats of the shape of expert_ids"),
        ({"weights": np.ones((4, LAYERS, TOP_K), int)}, "weights has dtype int64"),
        ({"weights": np.full((4, LAYERS, TOP_K), np.nan)}, "the weight of a routed slot is nan"),
        ({"phase": "thinking"}, "phase 'thinking': expected one of prefill"),
        ({"phase": ["prefill", "decode"]}, "phase has 2 values"),
        ({"token_ids": [1, 2]}, r"token_ids has shape \(2,\)"),
        ({"token_ids": [-1, 2, 3, 4]}, "expected 4 token ids"),
        ({"is_padding": [2, 0, 0, 0]}, "values that are true or false"),
        ({"request_id": "cmpl-1"}, "request_id 'cmpl-1' is not an id"),
        ({"zero_rows": "maybe"}, "zero_rows 'maybe'"),
    ],
)
def test_wrong_arrays_are_refused_and_nothing_of_them_is_taken(
    source: Source, arguments: dict[str, Any], text: str
) -> None:
    values: dict[str, Any] = {"request_id": None, "expert_ids": _valid(), "positions": np.arange(4), **arguments}
    with pytest.raises(InvalidInputError, match=text):
        source.publish_routes(**values)
    assert load(source) == [[0] * EXPERTS] * LAYERS
    account = source.account()
    assert account.num_refused_calls == 1
    assert account.problems
    health = source.capture_health()
    assert not health.is_healthy
    assert [check.name for check in health.failed][-1:] == ["drops"] or not account.num_dropped["capture_error"]


def test_a_refused_array_is_in_the_account(source: Source) -> None:
    with pytest.raises(InvalidInputError):
        source.publish_routes(None, np.zeros((4, LAYERS, TOP_K), int), np.arange(4))
    account = source.account()
    assert account.num_dropped == {"capture_error": 4 * LAYERS}
    assert not source.health().is_healthy
    assert any("capture" in finding.code for finding in source.analyze().findings)


def test_sound_routes_are_healthy_by_every_check_that_can_be_made(source: Source, truth: Truth) -> None:
    assert {check.status for check in source.capture_health().checks} == {"unknown"}
    ids = truth.routes(10)
    source.publish_routes(None, ids, np.arange(10), np.ones(ids.shape), num_cached_tokens=4)
    health = source.capture_health()
    assert health.is_healthy
    assert health.num_produced == 6 * LAYERS
    assert {check.name: (check.status, check.num_checked) for check in health.checks} == {
        "conservation": ("ok", 6 * LAYERS * TOP_K),
        "distinctness": ("ok", 6 * LAYERS),
        "range": ("ok", 6 * LAYERS * TOP_K),
        "weights": ("ok", 6 * LAYERS * TOP_K),
        "layers": ("ok", LAYERS),
        "gaps": ("unknown", 0),
        "drops": ("ok", 6 * LAYERS),
        "overhead": ("unknown", 0),
    }
    assert health.check("gaps").example
    # The same goes to the fleet with every status.
    assert source.health().checks == health.checks
    assert source.health().is_healthy


def _zeroed(*place: Any) -> "npt.NDArray[np.int32]":
    ids = _valid()
    ids[place] = 0
    return ids


@pytest.mark.parametrize(
    ("arguments", "name", "example"),
    [
        ({"expert_ids": _with(16, 2, 1, 0)}, "range", "16 experts"),
        ({"expert_ids": _with(-5, 2, 1, 0)}, "range", "is -5"),
        ({"weights": np.full((4, LAYERS, TOP_K), np.nan)}, "weights", "nan"),
        ({"num_expected_tokens": 5}, "conservation", "it is cut"),
        ({"expert_ids": np.zeros((4, LAYERS, TOP_K), int)}, "conservation", "none of the 4 tokens"),
        ({"expert_ids": _zeroed(slice(2, None))}, "conservation", "tokens inside a request"),
        ({"expert_ids": _zeroed(slice(None), 1)}, "layers", "layer 1 has no routes"),
    ],
)
def test_each_fault_fails_its_check_with_an_example(
    source: Source, arguments: dict[str, Any], name: str, example: str
) -> None:
    values: dict[str, Any] = {"request_id": None, "expert_ids": _valid(), "positions": np.arange(4), **arguments}
    with contextlib.suppress(InvalidInputError):
        source.publish_routes(**values)
    health = source.capture_health()
    assert not health.is_healthy
    assert [check.name for check in health.failed if check.name != "drops"] == [name]
    assert example in health.check(name).example
    assert any("capture" in finding.code for finding in source.analyze().findings)


def test_sums_are_checked_for_what_they_show_and_adapters_say_what_they_refuse(source: Source) -> None:
    layers = [
        LayerCountColumns(layer, EXPERTS, 0, num_tokens=8, num_padding=0, expert_counts=np.ones(EXPERTS, np.uint64))
        for layer in range(LAYERS)
    ]
    source.publish_counts(CountsColumns(0, 0, 0, 0, layers))
    checks = {check.name: check for check in source.capture_health().checks}
    assert (checks["range"].status, checks["layers"].status) == ("ok", "ok")
    assert (checks["conservation"].status, checks["conservation"].example) == (
        "unknown",
        "sums do not show single rows",
    )
    source.count_refused(3, "the engine returned nothing", example="request 7 has no routes")
    assert source.account().problems == {"the engine returned nothing": 1}
    assert source.capture_health().check("conservation").example == "request 7 has no routes"


def test_sums_with_more_slots_than_their_tokens_have_are_refused(source: Source) -> None:
    sums = LayerCountColumns(1, EXPERTS, 0, num_tokens=7, num_padding=0, expert_counts=np.ones(EXPERTS, np.uint64))
    with pytest.raises(InvalidInputError, match="16 slots of 7 tokens, which have 14 with top_k 2"):
        source.publish_counts(CountsColumns(0, 0, 0, 0, [sums]))
    assert load(source) == [[0] * EXPERTS] * LAYERS
    assert source.account().num_dropped == {"capture_error": 7}
    assert [check.name for check in source.capture_health().failed] == ["conservation", "drops"]


def test_a_call_that_cannot_be_counted_does_not_end_the_counting_of_others(
    source: Source, truth: Truth, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert source._local is not None
    with monkeypatch.context() as patched:
        patched.setattr(source._local, "_fold", lambda _: 1 / 0)
        source.publish_routes(None, Truth(seed=9).routes(2), np.arange(2))
        assert source.flush(10)
    source.publish_routes(None, truth.routes(3), np.arange(3))
    assert load(source) == truth.expected()
    assert source.account().num_dropped == {"capture_error": 2 * LAYERS}
    assert not source.capture_health().is_healthy


def test_repeated_experts_fail_distinctness() -> None:
    with moe_debugger.open_source(num_layers=LAYERS, num_experts=EXPERTS, top_k=3) as source:
        with pytest.raises(InvalidInputError):
            source.publish_routes(None, _twice(), np.arange(2))
        assert [check.name for check in source.capture_health().failed] == ["distinctness", "drops"]


def test_repeated_experts_are_refused() -> None:
    with (
        moe_debugger.open_source(num_layers=LAYERS, num_experts=EXPERTS, top_k=3) as source,
        pytest.raises(InvalidInputError, match=r"token 1, layer 2: experts \[4, 5, 4\] are not distinct"),
    ):
        source.publish_routes(None, _twice(), [0, 1])


def test_physical_replicas_are_mapped_to_logical_experts(truth: Truth) -> None:
    random = np.random.default_rng(3)
    # 20 replicas of 16 experts, placed differently in each layer.
    mapping = np.stack([random.permutation([*range(EXPERTS), *random.integers(0, EXPERTS, 4)]) for _ in range(LAYERS)])
    logical = truth.routes(30)
    physical = np.zeros_like(logical)
    for (token, layer, slot), expert in np.ndenumerate(logical):
        physical[token, layer, slot] = random.choice(np.flatnonzero(mapping[layer] == expert))
    assert physical.max() >= EXPERTS
    physical[0] = -1
    for layer in range(LAYERS):
        truth.load.subtract((layer, int(expert)) for expert in logical[0, layer])
    with moe_debugger.open_source(
        num_layers=LAYERS, num_experts=EXPERTS, top_k=TOP_K, physical_to_logical=mapping
    ) as source:
        source.publish_routes(None, physical, np.arange(30))
        assert load(source) == truth.expected()
        # The engine rebalances: the ids of before mean others now.
        source.place_replicas(np.roll(mapping, 1, axis=1))
        rolled = np.where(physical < 0, -1, (physical + 1) % 20)
        source.publish_routes(None, rolled, np.arange(30))
        assert load(source) == [[2 * number for number in row] for row in truth.expected()]
        source.place_replicas(None)
        with pytest.raises(InvalidInputError, match="pass physical_to_logical where ids are those of replicas"):
            source.publish_routes(None, physical, np.arange(30))


@pytest.mark.parametrize(
    ("mapping", "text"),
    [
        (np.zeros((2, 16), int), r"shape \(2, 16\); expected \(3 layers"),
        (np.tile(np.arange(17), (3, 1)), "reaches from 0 to 16"),
        (np.tile(np.arange(15), (3, 1)), "no replica of expert 15"),
        (np.zeros((3, 16)), "dtype float64"),
    ],
)
def test_wrong_maps_of_replicas_are_refused(mapping: Any, text: str) -> None:
    with pytest.raises(InvalidInputError, match=text):
        moe_debugger.open_source(num_layers=LAYERS, num_experts=EXPERTS, top_k=TOP_K, physical_to_logical=mapping)


def test_top_1_zeros_are_routes_unless_they_are_too_many() -> None:
    truth = Truth(top_k=1)
    with moe_debugger.open_source(num_layers=LAYERS, num_experts=EXPERTS, top_k=1) as source:
        ids = truth.routes(40)
        # One token of 40 may choose expert 0 at every layer.
        ids[7] = 0
        assert not (ids[np.arange(40) != 7] == 0).all(axis=(1, 2)).any()
        source.publish_routes(None, ids, np.arange(40))
        assert source.account().num_not_routed_tokens == 0
        assert sum(load(source)[0]) == 40
        ids[:10] = 0
        with pytest.raises(InvalidInputError, match="10 of 40 tokens have expert 0 at every layer"):
            source.publish_routes(None, ids, np.arange(40))
        with pytest.raises(InvalidInputError, match="40 of 40 tokens"):
            source.publish_routes(None, np.zeros((40, LAYERS, 1), int), np.arange(40))
        # The caller knows better, in one way or another.
        before = sum(load(source)[0])
        told = source.publish_routes(None, ids, np.arange(40), num_cached_tokens=10)
        assert (told.num_tokens, told.num_not_routed_tokens) == (30, 10)
        assert source.publish_routes(None, ids, np.arange(40), zero_rows="not_routed").num_tokens == 30
        assert source.publish_routes(None, ids, np.arange(40), zero_rows="routed").num_tokens == 40
        assert sum(load(source)[0]) == before + 30 + 30 + 40


def test_a_single_top_1_layer_may_have_a_hot_expert_0() -> None:
    with moe_debugger.open_source(num_layers=1, num_experts=4, top_k=1) as source:
        ids = np.array([0, 1, 0, 2, 0, 3, 0, 1]).reshape(8, 1, 1)
        source.publish_routes(None, ids, np.arange(8))
        assert load(source) == [[4, 2, 1, 1]]
        ids[1] = 0
        with pytest.raises(InvalidInputError, match="5 of 8"):
            source.publish_routes(None, ids, np.arange(8))


def test_layers_may_differ_in_experts_and_k() -> None:
    layers = [
        LayerInfo(0, 0, "a", "decoder", num_experts=8, top_k=2),
        LayerInfo(1, 1, "b", "decoder", num_experts=4, top_k=1),
    ]
    with moe_debugger.open_source(layers) as source:
        ids = np.array([[[0, 7], [0, -1]], [[3, 1], [3, -1]], [[0, 0], [0, 0]]])
        published = source.publish_routes(None, ids, [0, 1, 2])
        # The layer with two choices shows that the last token was never written, so the other's 0 is none either.
        assert (published.num_tokens, published.num_not_routed_tokens) == (2, 1)
        assert load(source) == [[1, 1, 0, 1, 0, 0, 0, 1], [1, 0, 0, 1]]
        ids[0, 1] = [0, 2]
        with pytest.raises(InvalidInputError, match=r"layers \[1\] have top_k 1"):
            source.publish_routes(None, ids, [0, 1, 2])
        ids[0, 1] = [4, -1]
        with pytest.raises(InvalidInputError, match=r"expert_ids\[0, 1, 0\] is 4, and the layer has 4 experts"):
            source.publish_routes(None, ids, [0, 1, 2])


def test_calls_without_weights_leave_the_mean_of_those_with_weights() -> None:
    ids = [[[0, 1]], [[1, 2]]]
    with moe_debugger.open_source(engine_layers(1, 4, 2)) as source:
        source.publish_routes(None, ids, [0, 1], [[[0.5, 0.25]], [[0.75, 1.0]]])
        source.publish_routes(None, ids, [0, 1])
        source.publish_routes(None, [[[3, 0]]], [0])
        rows = source.get_expert_metrics().experts
    assert [row.num_assignments for row in rows] == [3, 4, 2, 1]
    assert [row.mean_gate_weight for row in rows] == pytest.approx([0.5, 0.5, 1.0, np.nan], nan_ok=True)


def test_identity_experts_are_named_so_and_are_no_load() -> None:
    layers = engine_layers(1, 4, 2, num_identity_experts=2)
    with moe_debugger.open_source(layers) as source:
        source.publish_routes(None, [[[0, 4]], [[5, 1]], [[4, 5]]], [0, 1, 2], np.ones((3, 1, 2)))
        assert load(source) == [[1, 1, 0, 0]]
        decisions = source.decisions()
        identity, routed = pb.SLOT_STATUS_IDENTITY, pb.SLOT_STATUS_ROUTED
        assert decisions.slot_status.tolist() == [[routed, identity], [identity, routed], [identity, identity]]
        assert [row.mean_gate_weight for row in source.get_expert_metrics().experts[:2]] == [1.0, 1.0]
        with pytest.raises(InvalidInputError, match="is 6, and the layer has 6 experts"):
            source.publish_routes(None, [[[0, 6]]], [0])
        with pytest.raises(InvalidInputError, match="identity experts"):
            source.place_replicas([[0, 1, 2, 3]])


def test_torch_tensors_are_arrays(source: Source, truth: Truth) -> None:
    torch = pytest.importorskip("torch")
    ids = truth.routes(3)
    source.publish_routes(None, torch.from_numpy(ids), torch.arange(3), torch.ones(ids.shape))
    assert load(source) == truth.expected()
    # numpy has no bfloat16.
    weights = torch.full(ids.shape, 0.5, dtype=torch.bfloat16, requires_grad=True)
    published = source.publish_routes(None, torch.from_numpy(ids), torch.arange(3), weights)
    decisions = source.decisions()
    rows = [decisions.request_ids[index] == published.request_id for index in decisions.request_index]
    assert (decisions.gate_weights[rows] == 0.5).all()


def test_the_callers_arrays_stay_as_they_were(source: Source, truth: Truth) -> None:
    ids, weights = truth.routes(4), np.ones((4, LAYERS, TOP_K), np.float32)
    ids[0] = 0
    before = ids.copy()
    source.publish_routes(None, ids, np.arange(4), weights, num_cached_tokens=2)
    assert np.array_equal(ids, before)
    assert (weights == 1).all()


def test_a_call_that_does_not_fit_is_dropped_whole_and_counted(truth: Truth) -> None:
    ids = truth.routes(200)
    with moe_debugger.open_source(num_layers=LAYERS, num_experts=EXPERTS, top_k=TOP_K, buffer_bytes=1000) as source:
        published = source.publish_routes(None, ids, np.arange(200))
        assert not published.is_taken
        account = source.account()
        assert account.num_decisions == 200 * LAYERS
        assert account.num_dropped == {"buffer_full": 200 * LAYERS}
        assert load(source) == [[0] * EXPERTS] * LAYERS


def test_rows_are_bounded_and_counts_stay_exact(truth: Truth) -> None:
    with moe_debugger.open_source(num_layers=LAYERS, num_experts=EXPERTS, top_k=TOP_K, max_rows_bytes=20_000) as source:
        for _ in range(60):
            source.publish_routes(None, truth.routes(20), np.arange(20))
            assert source.flush(10)
        assert load(source) == truth.expected()
        assert 0 < len(source.decisions()) < 60 * 20 * LAYERS


def test_a_source_that_is_not_described_or_wrongly_so_is_refused() -> None:
    for arguments, text in [
        ({}, "not described"),
        ({"num_layers": 2, "num_experts": 8}, "not described"),
        ({"num_layers": 0, "num_experts": 8, "top_k": 2}, "num_layers is 0"),
        ({"num_layers": 1, "num_experts": 8, "top_k": 9}, "top_k is 9"),
        ({"num_layers": 1, "num_experts": 70_000, "top_k": 1}, "70000 experts"),
        ({"num_layers": 1, "num_experts": 8, "top_k": 2, "level": "full"}, "level 'full'"),
        ({"num_layers": 1, "num_experts": 8, "top_k": 2, "fleet": "http://x"}, "expected a NATS URL"),
        ({"model_layer_indices": [1, 1], "num_experts": 8, "top_k": 2}, "rising indices"),
        ({"model_layer_indices": [1, 2], "num_model_layers": 2, "num_experts": 8, "top_k": 2}, "num_model_layers is 2"),
    ]:
        with pytest.raises(InvalidInputError, match=text):
            moe_debugger.open_source(**arguments)  # type: ignore[arg-type]


def test_a_closed_source_says_so(source: Source, truth: Truth) -> None:
    source.close()
    source.close()
    with pytest.raises(SessionClosedError, match="open a new one"):
        source.publish_routes(None, truth.routes(1), [0])
    with pytest.raises(SessionClosedError):
        source.decisions()


def test_analysis_is_that_of_the_same_routes_captured(source: Source, truth: Truth) -> None:
    source.publish_routes(None, truth.routes(50), np.arange(50))
    metrics = source.analyze().metrics
    stats = source.get_routing_stats()
    assert stats.num_tokens == 50
    assert [metrics[layer].load_entropy for layer in range(LAYERS)] == pytest.approx(
        [layer.load_entropy for layer in stats.layers]
    )
