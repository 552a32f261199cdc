"""`moe-debugger plan`: the verdict, its files, and what cannot be planned."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from reported import forwards, infos, record

from moe_debugger.planning import Placement

SHAPE = (8, 2)
Run = Callable[..., tuple[str, str]]


def recorded(path: Path, *, hot: float, num: int = 120) -> Path:
    """Record `num` forwards of 64 tokens; experts 0 and 1, neighbours on one rank, are preferred by `hot`."""
    choices = []
    for index in range(num):
        rng = np.random.default_rng(index)
        preference = np.where(np.arange(8) < 2, hot, 0.0)
        scores = preference + rng.gumbel(size=(64, 8))
        choices.append([np.argsort(-scores, axis=1)[:, :2].astype(np.int32)])
    return record(path, forwards(choices, [8]), infos(SHAPE))


def test_hot_neighbours_are_set_apart_and_the_placement_is_written(run: Run, tmp_path: Path) -> None:
    folder, plan, placement = recorded(tmp_path / "rec", hot=2.0), tmp_path / "plan.json", tmp_path / "new.json"
    _, err = run("plan", folder, "--ranks", 4, "--json", plan, "--placement", placement, "--workload", folder)
    assert "new.json" in err
    made = json.loads(plan.read_text())
    chosen = made["candidates"][made["recommended"]]
    assert chosen["verdict"] == "helps"
    assert chosen["held_out"]["gain_lower"] > 0.1
    assert [other["window"] for other in chosen["other_workloads"]] == ["rec"]
    new = Placement.from_dict(json.loads(placement.read_text()))
    slots = np.asarray(new.physical_to_logical)[0].reshape(4, -1).tolist()
    assert not any({0, 1} <= set(rank) for rank in slots)
    # With that placement running there is nothing left to gain.
    out, _ = run("plan", folder, "--ranks", 4, "--current", placement)
    assert "change nothing" in out


def test_even_load_is_left_alone(run: Run, tmp_path: Path) -> None:
    folder, placement = recorded(tmp_path / "rec", hot=0.0), tmp_path / "new.json"
    out, err = run("plan", folder, "--ranks", 4, "--placement", placement)
    assert "change nothing" in out
    assert "was not written" in err
    assert not placement.exists()
    assert json.loads(run("plan", folder, "--ranks", 4, "--json", "-")[0])["recommended"] is None


def test_what_is_whole_of_a_damaged_recording_is_planned_on(run: Run, tmp_path: Path) -> None:
    folder = recorded(tmp_path / "rec", hot=2.0)
    (folder / "layers-00000000.parquet").unlink()
    assert "--damaged" in run("plan", folder, "--ranks", 4, code=1)[1]
    out, err = run("plan", folder, "--ranks", 4, "--damaged")
    assert "helps" in out
    assert "layers-00000000.parquet is missing" in err


def test_what_cannot_be_planned_is_said(run: Run, tmp_path: Path) -> None:
    folder = recorded(tmp_path / "rec", hot=0.0, num=4)
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    assert (
        "broken.json cannot be read as a placement" in run("plan", folder, "--ranks", 4, "--current", broken, code=1)[1]
    )
    # Four forwards, none of them decoding: an answer, but no verdict on the loads.
    assert "not_enough_steps" in run("plan", folder, "--ranks", 4)[0]
    assert (
        "has no loads of --phase train; it has rows of"
        in run("plan", folder, "--ranks", 4, "--phase", "train", code=1)[1]
    )
    counted = record(tmp_path / "counts", [], infos(SHAPE), level="counts")
    assert "at level 'counts'" in run("plan", counted, "--ranks", 4, code=1)[1]
    empty = record(tmp_path / "empty", [], infos(SHAPE))
    assert "has no rows: nothing ran while it was recorded" in run("plan", empty, "--ranks", 4, code=1)[1]
    assert "rec" in run("plan", tmp_path / "missing", "--ranks", 4, code=1)[1]
