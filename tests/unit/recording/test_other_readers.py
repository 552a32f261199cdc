"""pandas, DuckDB and polars read the files, and find in them what was captured."""

from collections import Counter
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pytest
from recorded_rows import INFOS, record, write
from routing_rows import forward, rows_one_by_one

from moe_debugger import Decisions, open_recording
from moe_debugger.recording.writer import Ending
from moe_debugger.training.series import NO_INDEX, SeriesPoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("others") / "rec"
    record(path, num_forwards=6, num_tokens=20, has_tokens=True, has_logits=True)
    return path


@pytest.fixture(scope="module")
def expected(folder: Path) -> Decisions:
    return Decisions([forward(i, num_tokens=20, has_tokens=True, has_logits=True) for i in range(6)], INFOS)


@pytest.fixture(scope="module")
def loads() -> Counter[tuple[int, int]]:
    """Assignments of valid tokens by layer and expert, counted row by row."""
    counted: Counter[tuple[int, int]] = Counter()
    for row in rows_one_by_one([forward(i, num_tokens=20, has_tokens=True, has_logits=True) for i in range(6)]):
        if not row["is_padding"]:
            counted.update((row["layer_index"], expert) for expert in row["expert_ids"])
    return counted


def test_pandas_reads_rows(folder: Path, expected: Decisions, loads: Counter[tuple[int, int]]) -> None:
    frame = pd.read_parquet(folder / "rows")
    assert len(frame) == len(expected) == 240
    for name in ("step", "forward_index", "phase", "position", "token_id", "is_padding", "layer_index", "rank"):
        np.testing.assert_array_equal(frame[name], expected[name], err_msg=name)
    assert frame["request_id"].tolist() == expected.request_id.tolist()
    np.testing.assert_array_equal(np.stack(list(frame["expert_ids"])), expected.expert_ids)
    np.testing.assert_array_equal(np.stack(list(frame["gate_weights"])), expected.gate_weights)
    exploded = frame[~frame["is_padding"]].explode("expert_ids")
    counted = exploded.groupby(["layer_index", "expert_ids"], observed=True).size()
    assert {key: int(number) for key, number in counted.items()} == loads


def test_duckdb_reads_rows(folder: Path, expected: Decisions, loads: Counter[tuple[int, int]]) -> None:
    with duckdb.connect() as db:
        found = db.execute(
            "SELECT layer_index, expert, count(*) FROM (SELECT layer_index, unnest(expert_ids) AS expert "
            "FROM read_parquet(?) WHERE NOT is_padding) GROUP BY ALL",
            [str(folder / "rows/*.parquet")],
        ).fetchall()
        assert {(layer, expert): number for layer, expert, number in found} == loads
        rows = db.execute(
            "SELECT step, request_id, position, expert_ids, logits FROM read_parquet(?) WHERE layer_index = 1 "
            "ORDER BY forward_index, position",
            [str(folder / "rows/*.parquet")],
        ).fetchall()
    of_layer = expected.layer_index == 1
    assert [row[0] for row in rows] == expected.step[of_layer].tolist()
    assert [row[1] for row in rows] == expected.request_id[of_layer].tolist()
    assert [row[3] for row in rows] == expected.expert_ids[of_layer].tolist()
    assert expected.logits is not None
    assert [row[4] for row in rows] == expected.logits[of_layer].astype(np.float32).tolist()


def test_polars_reads_rows(folder: Path, expected: Decisions, loads: Counter[tuple[int, int]]) -> None:
    scan = pl.scan_parquet(folder / "rows/*.parquet")
    frame = scan.collect()
    assert frame.height == len(expected)
    for name in ("step", "phase", "position", "token_id", "is_padding", "layer_index", "margin"):
        np.testing.assert_array_equal(frame[name].to_numpy(), expected[name], err_msg=name)
    assert frame["expert_ids"].to_list() == expected.expert_ids.tolist()
    assert frame["request_id"].cast(pl.String).to_list() == expected.request_id.tolist()
    counted = (
        scan.filter(~pl.col("is_padding")).explode("expert_ids").group_by("layer_index", "expert_ids").len().collect()
    )
    assert {(layer, expert): number for layer, expert, number in counted.iter_rows()} == loads


def test_all_three_read_layers_and_series(tmp_path: Path) -> None:
    writer = write(tmp_path / "rec", [forward(0)], finishes=False)
    writer.add_series([SeriesPoint(step, "loss", NO_INDEX, False, np.array([step / 4])) for step in range(5)])
    writer.add_series([SeriesPoint(0, "expert_gradient_norm", 1, True, np.arange(8) / 2)])
    writer.finish(Ending())
    parts = {entry.kind: tmp_path / "rec" / entry.path for entry in open_recording(tmp_path / "rec").manifest.parts}
    layers, series = pd.read_parquet(parts["layers"]), pd.read_parquet(parts["series"])
    assert layers["num_experts"].tolist() == [8, 8]
    assert series[series["name"] == "loss"]["value"].tolist() == [0, 0.25, 0.5, 0.75, 1]
    with duckdb.connect() as db:
        query = "SELECT expert_id, value FROM read_parquet(?) WHERE layer_index = 1 ORDER BY expert_id"
        assert db.execute(query, [str(parts["series"])]).fetchall() == [(each, each / 2) for each in range(8)]
        assert db.execute("SELECT sum(top_k) FROM read_parquet(?)", [str(parts["layers"])]).fetchone() == (4,)
    assert pl.read_parquet(parts["series"])["value"].sum() == 2.5 + 14
    assert pl.read_parquet(parts["layers"])["module_name"].cast(pl.String).to_list() == [x.module_name for x in INFOS]
