"""Small recordings of known forwards, made by the writer itself."""

from pathlib import Path
from typing import Any

import numpy as np
from routing_rows import forward, layer_infos

from moe_debugger import Decisions
from moe_debugger.recording.manifest import Manifest, ModelIdentity, Topology
from moe_debugger.recording.writer import Ending, Limits, RecordingWriter, make_folder
from moe_debugger.wire.codec import RoutingColumns
from moe_debugger.wire.ids import new_id

__all__ = ["INFOS", "assert_equal", "begin", "record", "write"]

INFOS = layer_infos((8, 2), (8, 2))


def begin(level: Any = "routes", **changes: Any) -> Manifest:
    """Return the manifest of a recording that begins."""
    return Manifest(
        recording_id=new_id(),
        started_at_unix_ns=1,
        session_name="test",
        level=level,
        sampling_rate=1.0,
        model=ModelIdentity(name="tiny"),
        topology=Topology(),
        **changes,
    )


def write(path: Path, batches: list[RoutingColumns], *, finishes: bool = True, **limits: Any) -> RecordingWriter:
    """Record forwards, each given to the writer by itself."""
    writer = RecordingWriter(make_folder(path), begin(), Limits(**limits), lambda: INFOS, {})
    for batch in batches:
        writer.add([batch])
        if limits:
            writer.tick()
    if finishes:
        writer.finish(Ending())
    return writer


def record(path: Path, num_forwards: int = 6, **options: Any) -> tuple[Path, list[RoutingColumns]]:
    """Make a recording with a part for each forward, and return its folder and what went in."""
    batches = [forward(index, **options) for index in range(num_forwards)]
    # Every part is old at once, so each forward has its own.
    write(path, batches, part_seconds=1e-9)
    return path, batches


def assert_equal(actual: Decisions, expected: Decisions) -> None:
    """Check that all columns are the same, with their types."""
    assert list(actual) == list(expected)
    assert actual.request_ids == expected.request_ids
    for name in expected:
        assert actual[name].dtype == expected[name].dtype, name
        np.testing.assert_array_equal(actual[name], expected[name], err_msg=name)
