"""Comparisons: nothing where nothing differs, at the stated rate; permuted experts are named; hindrances are said."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reported import Ids, forwards, infos, material, name, record, sampled

from moe_debugger import Diff, Recording, diff, open_recording
from moe_debugger.analysis import RowSet, align
from moe_debugger.errors import InvalidInputError, UnsupportedFormatError
from moe_debugger.recording.manifest import ModelIdentity, Topology
from moe_debugger.reporting.comparing import _compare
from moe_debugger.reporting.comparison_tests import overlap_bound
from moe_debugger.reporting.material import row_sizes
from moe_debugger.reporting.renaming import best_renaming
from moe_debugger.wire.codec import RoutingColumns

SHAPE = (8, 2)
PERMUTED = np.array([3, 0, 1, 2, 7, 4, 5, 6], np.int32)


def _choices(num: int = 24, tokens: int = 24, seed: int = 0, strength: float = 1.0) -> list[list[Ids]]:
    return [[sampled(seed + 2 * r + i, tokens, SHAPE, strength=strength) for i in range(2)] for r in range(num)]


def _open(path: Path, batches: list[RoutingColumns], **options: Any) -> Recording:
    return open_recording(record(path, batches, infos(SHAPE, SHAPE), **options))


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Recording:
    batches = forwards(_choices(), [8, 8], margin=lambda ids: np.linspace(0, 1, len(ids)).astype(np.float32))
    return _open(tmp_path_factory.mktemp("a") / "first", batches)


def test_the_same_recorded_again_does_not_differ(first: Recording, tmp_path: Path) -> None:
    found = diff(first, _open(tmp_path / "again", forwards(_choices(), [8, 8])))
    assert found.verdict == "no_difference"
    assert found.tests == ["loads", "choices"]
    assert found.p_value == 1
    assert found.verdict_text.args["alpha"] == "5"
    for layer in found.layers:
        numbers = [layer.js_bits, layer.drift_bits, layer.overlap, layer.router_rate]
        assert numbers == pytest.approx([0, 0, 1, 0])
        assert layer.num_tokens == 24 * 24
    assert (found.appeared, found.disappeared) == ([], [])
    assert [point.key for point in found.points if point.status != "same"] == []


def test_permuted_experts_are_named_although_loads_are_alike(first: Recording, tmp_path: Path) -> None:
    changed = [[layers[0], PERMUTED[layers[1]]] for layers in _choices()]
    found = diff(first, _open(tmp_path / "permuted", forwards(changed, [8, 8])))
    assert found.verdict == "different"
    same, other = found.layers
    assert (same.is_choice_different, same.renamed) == (False, None)
    assert other.is_choice_different
    assert other.renamed == dict(enumerate(PERMUTED.tolist()))
    assert other.overlap_renamed == 1
    assert "look renumbered (layers: 1" in found.verdict_text.text
    # Overlap and mismatch, token by token.
    expected = [len(set(map(int, a)) & set(map(int, PERMUTED[a]))) / 2 for layers in _choices() for a in layers[1]]
    assert other.overlap == pytest.approx(np.mean(expected))
    assert other.router_rate == pytest.approx(np.mean([value < 1 for value in expected]))
    assert sum(bucket.num_tokens for bucket in other.by_margin) == 24 * 24
    assert found.token_rate == other.router_rate


def test_a_wobble_of_few_tokens_is_no_difference(first: Recording, tmp_path: Path) -> None:
    def wobbled(ids: Ids, number: int) -> Ids:
        changed = ids.copy()
        # One slot of one token in twelve: an overlap of 0.96.
        for row in range(number % 12, len(ids), 12):
            changed[row, 1] = next(e for e in range(8) if e not in ids[row])
        return changed

    choices = [[wobbled(ids, r) for ids in layers] for r, layers in enumerate(_choices())]
    found = diff(first, _open(tmp_path / "wobbled", forwards(choices, [8, 8])))
    assert [layer.is_choice_different for layer in found.layers] == [False, False]
    assert found.layers[0].overlap == pytest.approx(1 - 1 / 24)
    assert found.layers[0].router_rate == pytest.approx(1 / 12)
    assert found.layers[0].slot_rate == pytest.approx(1 / 24)
    assert "choices" not in found.verdict_text.args.get("what", "")


def test_other_loads_are_found_without_a_common_request(first: Recording, tmp_path: Path) -> None:
    tilted = [
        [
            sampled(900 + 2 * r + i, 24, SHAPE, strength=1.0, preference=np.array([2.0 * i] + [0.0] * 7))
            for i in range(2)
        ]
        for r in range(24)
    ]
    found = diff(first, _open(tmp_path / "tilted", forwards(tilted, [8, 8], first_request=500)))
    assert found.verdict == "different"
    assert found.tests == ["loads"]
    assert [layer.is_load_different for layer in found.layers] == [False, True]
    assert [layer.overlap for layer in found.layers] == [None, None]
    changed = found.layers[1].changes[0]
    assert changed.expert_id == 0
    counts = Counter(int(e) for layers in tilted for row in layers[1] for e in row)
    assert changed.share_b == pytest.approx(counts[0] / counts.total())
    documents = next(point for point in found.points if point.key == "documents")
    assert "no request is in both" in documents.follows.text
    assert documents.remedy is not None
    text = next(point for point in found.points if point.key == "text")
    assert text.status == "unknown"


def test_findings_that_came_are_listed(first: Recording, tmp_path: Path) -> None:
    two = np.array([30.0, 30, 0, 0, 0, 0, 0, 0])
    collapsed = [[sampled(r, 80, SHAPE), sampled(r, 80, SHAPE, preference=two)] for r in range(24)]
    sound = [[sampled(r, 80, SHAPE), sampled(r + 50, 80, SHAPE)] for r in range(24)]
    a = _open(tmp_path / "sound", forwards(sound, [8, 8]))
    found = diff(a, _open(tmp_path / "collapsed", forwards(collapsed, [8, 8])))
    assert [entry.kind for entry in found.appeared if entry.severity == "critical"] == ["router_collapse"]
    assert found.disappeared == []
    back = diff(_open(tmp_path / "again", forwards(collapsed, [8, 8])), a)
    assert {entry.rule_id for entry in back.disappeared} == {entry.rule_id for entry in found.appeared}


def _point(found: Diff, key: str) -> Any:
    return next(point for point in found.points if point.key == key)


def test_other_models_are_not_compared_unless_said_to_be_one(first: Recording, tmp_path: Path) -> None:
    other = ModelIdentity(name="other", class_name="Other", config_sha256="b" * 64)
    b = _open(tmp_path / "other", forwards(_choices(), [8, 8]), model=other)
    found = diff(first, b)
    assert found.verdict == "not_comparable"
    assert found.layers == []
    assert "no other model's expert 3" in found.verdict_text.text
    assert _point(found, "model").remedy.text.startswith("record the same model")
    assert diff(first, b, same_model=True).verdict == "no_difference"


def test_only_layers_that_are_the_same_are_compared(first: Recording, tmp_path: Path) -> None:
    wide = [[layers[0], sampled(5, 24, (16, 2))] for layers in _choices()]
    folder = record(tmp_path / "wide", forwards(wide, [8, 16]), infos(SHAPE, (16, 2)))
    found = diff(first, open_recording(folder))
    assert [layer.layer_index for layer in found.layers] == [0]
    assert _point(found, "layers").status == "differs"
    none = record(tmp_path / "none", forwards([[layers[1] for layers in wide[:1]]], [16]), infos((16, 2)))
    assert diff(first, open_recording(none)).verdict == "not_comparable"


def test_an_unknown_configuration_is_compared_and_said(first: Recording, tmp_path: Path) -> None:
    b = _open(tmp_path / "unknown", forwards(_choices(), [8, 8]), model=ModelIdentity(name="x"))
    found = diff(first, b)
    assert (found.verdict, _point(found, "model").status) == ("no_difference", "unknown")


def test_sampling_topology_phases_versions_and_damage_are_said(first: Recording, tmp_path: Path) -> None:
    model = ModelIdentity(name="tiny", class_name="Tiny", config_sha256="a" * 64, versions={"torch": "9"})
    b = _open(
        tmp_path / "b", forwards(_choices(), [8, 8], phase=2), model=model, sampling_rate=0.5,
        topology=Topology(global_rank=1, world_size=2), dropped={"buffer_full": 3},
    )  # fmt: skip
    found = diff(first, b)
    for key in ("sampling", "topology", "phases", "versions", "whole"):
        point = _point(found, key)
        assert (point.key, point.status) == (key, "differs")
        assert point.remedy is not None
        assert point.a != point.b
    assert _point(found, "phases").b == "decode 100 %"


def test_training_requests_are_those_of_one_step(tmp_path: Path) -> None:
    names = [name(r % 3) for r in range(24)]
    a = _open(tmp_path / "a", forwards(_choices(), [8, 8], phase=3, requests=names))
    b = _open(tmp_path / "b", forwards(_choices(), [8, 8], phase=3, requests=names))
    found = diff(a, b)
    assert found.layers[0].num_documents_a == 24
    assert found.verdict == "no_difference"


def test_sums_and_single_requests_are_too_little(first: Recording, tmp_path: Path) -> None:
    one = _open(tmp_path / "one", forwards(_choices(1), [8, 8], first_request=77))
    found = diff(first, one)
    assert found.verdict == "insufficient_evidence"
    assert "too few for a test" in found.verdict_text.text


def test_a_recording_in_which_nothing_ran_is_said_to_have_no_rows(first: Recording, tmp_path: Path) -> None:
    empty = _open(tmp_path / "empty", [])
    for a, b, which in ((empty, first, "the first"), (first, empty, "the second"), (empty, empty, "both")):
        found = diff(a, b)
        assert found.verdict == "insufficient_evidence"
        assert [(p.key, p.follows.text) for p in found.points if p.status != "same"] == [
            ("rows", f"no rows in {which}: nothing ran while it was recorded")
        ]
        assert len(found.layers) == 2
        assert "nothing ran" in found.to_html()


def test_rows_that_were_not_read_are_no_sums(first: Recording, tmp_path: Path) -> None:
    found = diff(first, first, max_rows=0)
    assert found.verdict == "insufficient_evidence"
    assert "no rows of both were read" in found.verdict_text.text
    sums = diff(first, _open(tmp_path / "counts", [], level="counts"))
    assert "sums do not say which request" in sums.verdict_text.text


@pytest.mark.parametrize(("num", "is_enough"), [(2, False), (3, False), (5, True)])
def test_few_requests_are_too_little_wherever_no_difference_could_be_found(
    tmp_path: Path, num: int, *, is_enough: bool
) -> None:
    chosen = [np.array([[4 * side, 4 * side + 1]] * 9, np.int32) for side in (0, 1)]
    sides = [
        _open(tmp_path / str(side), forwards([[ids, ids]] * num, [8, 8], first_request=77 * side))
        for side, ids in enumerate(chosen)
    ]
    found = diff(*sides)
    assert found.verdict == ("different" if is_enough else "insufficient_evidence")
    assert ("cannot give a p-value below" in found.verdict_text.text) is not is_enough


def test_it_goes_to_json_and_back(first: Recording, tmp_path: Path) -> None:
    changed = [[layers[0], PERMUTED[layers[1]]] for layers in _choices()]
    found = diff(first, _open(tmp_path / "evil", forwards(changed, [8, 8]), session_name="<script>alert(1)</script>"))
    values = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert Diff.from_dict(values) == found
    text = found.to_html()
    assert Diff.from_dict(values).to_html() == text
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert "E0→E3" in text
    with pytest.raises(InvalidInputError):
        Diff.from_dict({**values, "format": "moe-debugger-report"})
    with pytest.raises(UnsupportedFormatError):
        Diff.from_dict({**values, "format_version": "2.0"})
    with pytest.raises(InvalidInputError):
        Diff.from_dict({**values, "verdict": "perhaps"})


@pytest.mark.parametrize("arguments", [{"alpha": 0}, {"alpha": 1}, {"num_permutations": 5}])
def test_arguments_out_of_range_are_refused(first: Recording, arguments: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError):
        diff(first, first, **arguments)


def test_an_analysis_cannot_be_compared(first: Recording) -> None:
    with pytest.raises(InvalidInputError, match="cannot be compared"):
        diff(first.analyze(), first)  # type: ignore[arg-type]


def test_the_bound_of_an_overlap_widens_with_the_layers() -> None:
    assert overlap_bound(0.9, 0.92, 0.025, 1) == pytest.approx(0.92)
    # 97.5 % of each of 10 layers together: 0.25 % each, 2.807 standard errors.
    assert overlap_bound(0.9, 0.92, 0.025, 10) == pytest.approx(0.9 + 0.02 * 2.8070 / 1.95996, abs=1e-5)
    assert overlap_bound(0.99, 0.999, 0.025, 58) == 1
    assert overlap_bound(float("nan"), 1.0, 0.05, 1) is None
    assert overlap_bound(0.5, float("nan"), 0.05, 1) is None


def test_a_renaming_is_the_pairs_that_go_together(tmp_path: Path) -> None:
    a = np.array([[0, 1], [0, 1], [2, 3], [0, 2]], np.int32)
    b = np.array([[1, 0], [1, 0], [3, 2], [1, 3]], np.int32)
    rows = []
    for ids in (a, b):
        layers = infos((4, 2))
        found = material(forwards([[ids]], [4]), layers)
        assert found.rows is not None
        rows.append(RowSet.of(found.rows, **row_sizes(dict(enumerate(layers)))))
    found_renaming = best_renaming(align(*rows), 0)
    assert found_renaming is not None
    # Three tokens have 0 of a with 1 of b; the others follow.
    assert found_renaming.new_id[0] == 1
    assert found_renaming.new_id[2] == 3
    assert found_renaming.overlap == pytest.approx(1)
    assert found_renaming.num_renamed == 4


def test_healthy_halves_differ_at_the_stated_rate_at_most() -> None:
    # 60 pairs of 10 + 10 requests that each prefer some experts; of 5 % more than 10 have a chance of 0.0003.
    layers, wrong = infos(SHAPE, SHAPE), 0
    for trial in range(60):
        choices = _choices(20, 12, seed=1000 * trial)
        a = material(forwards(choices[:10], [8, 8]), layers)
        b = material(forwards(choices[10:], [8, 8], first_request=10), layers)
        wrong += _compare(a, b, 0.05, False, 99, trial).verdict == "different"
    assert wrong <= 10
