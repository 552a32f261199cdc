"""The example of a detector plug-in, installed as a package, in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "detector-plugin"
# Requests that mostly use experts 0 to 3 of 8; a detector that raises is registered beside the good one.
PROGRAM = """
import json
import numpy as np
from moe_debugger import analyze

rng = np.random.default_rng(0)
scores = rng.random((4000, 8))
scores[:, :4] += 5
rows = {
    "layer_index": np.zeros(4000, np.int64),
    "expert_ids": np.argsort(-scores, axis=1)[:, :2].astype(np.int32),
    "request_id": [f"request {i // 50}" for i in range(4000)],
}
found = analyze(rows, num_experts=8, top_k=2)
print(json.dumps({
    "codes": [finding.code for finding in found.findings],
    "titles": [finding.args.get("title", "") for finding in found.findings],
    "problems": found.problems,
    "note": found.false_alarm_note,
}))
"""


def run(path: str) -> dict[str, list[str]]:
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error", "-c", PROGRAM]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    answer: dict[str, list[str]] = json.loads(done.stdout)
    return answer


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the example was installed, without a network."""
    target = tmp_path_factory.mktemp("installed")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index"]
    command += ["--no-deps", "--no-build-isolation", "--target", str(target), str(EXAMPLE)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return target


def test_an_installed_detector_is_found_and_named(installed: Path) -> None:
    with_plugin, without = run(str(installed)), run("")
    assert "quiet-half.half_is_idle" in with_plugin["codes"]
    assert "Half of layer 0 idles" in with_plugin["titles"]
    assert with_plugin["problems"] == []
    assert "findings of plug-ins (quiet-half 1.0) are not part of this rate" in with_plugin["note"]
    # Everything else is as without it.
    assert [code for code in with_plugin["codes"] if "." not in code] == without["codes"]
    assert "plug-in" not in without["note"]


def test_a_broken_detector_is_a_problem_and_no_failure(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("raise RuntimeError('no')\n")
    info = tmp_path / "broken-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[moe_debugger.detectors]\nbroken = broken:Broken\n")
    both = run(os.pathsep.join([str(installed), str(tmp_path)]))
    assert "quiet-half.half_is_idle" in both["codes"]
    assert "problems with plug-ins (1): detector plug-in 'broken'" in both["note"]
    assert both["problems"] == [
        "detector plug-in 'broken' (broken:Broken, of broken 1.0) could not be loaded: RuntimeError: no"
    ]
