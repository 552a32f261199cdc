"""Queries of real sessions and recordings: against the session's own answers, and against reading every row."""

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from recorded_rows import INFOS, begin, record, write
from routing_rows import forward
from zoo.build import ALL

from moe_debugger import MoEDebugger, SessionClosedError, open_recording
from moe_debugger.errors import QueryCostError, QueryError
from moe_debugger.query import LOCAL_LIMITS, QueryResult, run_query
from moe_debugger.query.local import RecordingSource, SessionSource
from moe_debugger.query.messages import result_from_proto, result_to_proto
from moe_debugger.recording.writer import Ending, Limits, RecordingWriter, make_folder

_BOTH = [
    "experts show layer, expert, assignments, share, load, mean_gate_weight order by layer, expert",
    "experts where phase = decode show layer, expert, assignments order by layer, expert",
    "layers where token_id in (5, 6, 7, 8) show layer, tokens, effective_experts, margin",
    "tokens show step, position, token_id, layer, experts, margin order by step, layer, request, position limit 5000",
    "tokens by layer, expert show count, mean(margin)",
    "requests show request, tokens, prefill_tokens, decode_tokens order by request",
    "steps show step, layer, tokens, effective_experts, used_experts",
    "experts where mean_probability > 0 show layer, expert, mean_probability, load",
    "experts where layer = 1 show expert, mean_probability",
    "layers show layer, balancing_loss, effective_experts",
    "findings show kind, layer, expert, severity",
]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A session that was recorded from its start, and its recording."""
    folder = tmp_path_factory.mktemp("query") / "rec"
    model: Any = ALL["mixtral"].make()
    ids = torch.randint(3, 80, (3, 12), generator=torch.Generator().manual_seed(5))
    debugger = MoEDebugger(model, level="routes+tokens")
    session = debugger.start_session()
    with torch.no_grad(), session.record(folder):
        for step in range(3):
            model.generate(ids + step, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
    yield session, open_recording(folder)
    session.close()


@pytest.mark.parametrize("text", _BOTH)
def test_a_recording_answers_as_its_session(recorded: Any, text: str) -> None:
    session, recording = recorded
    of_session, of_recording = session.query(text), recording.query(text)
    assert len(of_session) > 0 or text.startswith("findings")
    assert of_session.names == of_recording.names
    for mine, theirs in zip(of_session, of_recording, strict=True):
        for one, other in zip(mine, theirs, strict=True):
            assert one == (pytest.approx(other, rel=1e-6) if isinstance(other, float) else other)


def test_experts_and_layers_are_those_of_the_session(recorded: Any) -> None:
    session, _ = recorded
    found = {(row[0], row[1]): row for row in session.query("experts show layer, expert, assignments, load")}
    for expert in session.get_expert_metrics().experts:
        assert found[expert.layer_index, expert.expert_id][2] == expert.num_assignments
        assert found[expert.layer_index, expert.expert_id][3] == pytest.approx(expert.load_ratio)
    layers = session.query("layers show layer, tokens, effective_experts, confidence, unused_experts")
    for row, stats in zip(layers, session.get_routing_stats().layers, strict=True):
        assert row[:2] == (stats.info.layer_index, stats.num_tokens)
        assert row[2] == pytest.approx(stats.effective_experts)
        assert row[3] == pytest.approx(stats.mean_top1_probability)
        assert row[4] == len(stats.unused_experts)


@pytest.mark.parametrize(
    ("text", "note"),
    [
        (
            "experts where phase = decode show expert, mean_probability",
            "`mean_probability` is missing: .* sums over all",
        ),
        ("layers where phase = decode show layer, balancing_loss", "`balancing_loss` is missing: .* sums over all"),
        ("experts where expert = 99", "there is no expert 99: the experts are 0 to 7"),
        ("tokens where layer = 1 and expert in (3, 98, 99)", "there is no expert 98, 99: the experts are 0 to 7"),
        ("layers where layer = 99", "there is no layer 99: the layers are 0 to"),
        ("requests where layer between 98 and 99", "there is no layer 98, 99: the layers are 0 to"),
        ("experts where phase = decode show expert, load", None),
        ("experts where expert = 7 or expert = 99", None),
        ("experts", None),
    ],
)
def test_what_an_answer_cannot_have_is_noted(recorded: Any, text: str, note: str | None) -> None:
    for source in recorded:
        notes = source.query(text).notes
        assert len(notes) == (note is not None)
        assert note is None or re.search(note, notes[0])


def test_ranks_of_experts_are_those_of_the_manifest(tmp_path: Path) -> None:
    owners = {0: (0, 0, 0, 0, 1, 1, 1, 1)}
    writer = RecordingWriter(make_folder(tmp_path / "rec"), begin(), Limits(), lambda: INFOS, owners)
    writer.add([forward(0)])
    writer.finish(Ending())
    found = open_recording(tmp_path / "rec").query("experts show layer, rank")
    assert [rank for layer, rank in found if layer == 0] == list(owners[0])
    assert {rank for layer, rank in found if layer == 1} == {None}


def test_tokens_by_expert_and_experts_by_token_agree_with_the_rows(recorded: Any) -> None:
    session, recording = recorded
    rows = session.decisions()
    chosen = (rows.layer_index == 1) & (rows.expert_ids == 3).any(axis=1) & ~rows.is_padding
    tokens = recording.query("tokens where layer = 1 and expert = 3 show token_id, position limit 5000")
    assert tokens.rows == list(zip(rows.token_id[chosen].tolist(), rows.position[chosen].tolist(), strict=True))
    token_id = int(rows.token_id[~rows.is_padding][0])
    own = (rows.token_id == token_id) & ~rows.is_padding
    counts = Counter(
        (int(layer), int(expert))
        for layer, experts in zip(rows.layer_index[own], rows.expert_ids[own], strict=True)
        for expert in experts
        if expert >= 0
    )
    found = session.query(f"experts where token_id = {token_id} and assignments > 0 show layer, expert, assignments")
    assert {(layer, expert): count for layer, expert, count in found} == counts


class _Words:
    """A tokenizer whose token i is " w<i>"."""

    def encode(self, text: str) -> list[int]:
        return [int(part[1:]) for part in text.split() if part[1:].isdigit()] or [0, 1, 2]

    def piece(self, token_id: int) -> bytes:
        return f" w{token_id}".encode()


def test_texts_of_tokens_need_a_tokenizer(recorded: Any) -> None:
    _, recording = recorded
    with pytest.raises(QueryError, match="the tokenizer is not known here"):
        recording.query('experts where token = " w7"')
    by_text = recording.query('tokens where token = " w7" show token_id, token, position', tokenizer=_Words())
    by_id = recording.query("tokens where token_id = 7 show token_id, position")
    assert [(row[0], row[2]) for row in by_text] == by_id.rows
    assert all(row[1] == " w7" for row in by_text)
    contained = recording.query('tokens where token contains "W1" by token', tokenizer=_Words())
    assert {row[0] for row in contained} <= {f" w{n}" for n in (1, *range(10, 20), *range(100, 200))}
    with pytest.raises(
        QueryError, match=r"is not one token of this tokenizer but 3: 0, 1, 2; .*token_id = 0"
    ) as caught:
        recording.query('experts where token = "the cat"', tokenizer=_Words())
    assert caught.value.query[caught.value.start : caught.value.end] == '"the cat"'


def test_tokens_of_the_demo_model_are_bytes(tmp_path: Path) -> None:
    folder, _ = record(tmp_path / "rec", has_tokens=True)
    recording = open_recording(folder)
    recording.manifest = recording.manifest.model_copy(
        update={"model": recording.manifest.model.model_copy(update={"name": "demo"})}
    )
    found = recording.query("tokens where token_id < 256 show token_id, token")
    assert all(row[1] == bytes([row[0]]).decode("utf-8", "backslashreplace") for row in found)
    with pytest.raises(QueryError, match="is not one token of this tokenizer but 4: 32, 116, 104, 101"):
        recording.query('experts where token = " the"')


def test_row_groups_outside_of_the_bounds_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_debugger.recording.writer._GROUP_ROWS", 20)
    write(tmp_path / "rec", [forward(index, num_tokens=20) for index in range(12)], part_rows=160)
    recording = open_recording(tmp_path / "rec")
    total = recording.manifest.num_rows
    every = recording.query("tokens limit 5000 show step, layer, position")
    assert every.num_rows_scanned == total == 480
    steps = sorted({row[0] for row in every})
    one = recording.query(f"tokens where step = {steps[1]} and layer = 0 limit 5000 show step, layer, position")
    assert one.rows == [row for row in every if row[:2] == (steps[1], 0)]
    assert one.num_rows_scanned < total / 3
    between = recording.query(f"tokens where step between {steps[0]} and {steps[1]} or layer = 9 show count")
    assert between.num_rows_scanned == total
    none = recording.query("tokens where layer = 7 show step")
    assert (len(none), none.num_rows_scanned) == (0, 0)
    assert recording.query("experts where layer = 7 show expert").rows == []


def test_the_caps_say_what_and_how_to_narrow(recorded: Any) -> None:
    session, recording = recorded
    source = RecordingSource(recording)
    total = recording.manifest.num_rows
    few = replace(LOCAL_LIMITS, max_rows=50)
    with pytest.raises(
        QueryCostError, match=rf"would read about {total} rows, and the cap is 50; narrow .*`layer = 3`"
    ):
        run_query("tokens by layer", source, few)
    # What ends with its limit is not refused for what it would not read.
    assert len(run_query("tokens limit 5", source, replace(LOCAL_LIMITS, max_rows=total))) == 5
    with pytest.raises(QueryCostError, match="has read"):
        run_query("tokens where position > 1000000 limit 5", source, few)
    with pytest.raises(QueryCostError, match=r"rows or \d+ MB of columns, and the cap is 0 MB"):
        run_query("experts", source, replace(LOCAL_LIMITS, max_bytes=1000))
    with pytest.raises(QueryCostError, match=r"stopped after .* the cap is 0 s"):
        run_query("experts", source, replace(LOCAL_LIMITS, max_seconds=0.0))
    with pytest.raises(QueryCostError, match="at most 3 are kept at a time"):
        run_query("tokens by layer, expert", source, replace(LOCAL_LIMITS, max_groups=3))
    with pytest.raises(QueryCostError, match="steps x layers"):
        run_query("steps", source, replace(LOCAL_LIMITS, max_groups=3))
    with pytest.raises(QueryError, match="more than the 100,000 rows"):
        session.query("tokens limit 100001")
    narrowed = run_query("tokens by layer", source, replace(LOCAL_LIMITS, max_rows=total))
    assert narrowed.num_rows_scanned == total


def test_without_rows_sums_answer_and_the_rest_is_said(tmp_path: Path) -> None:
    model: Any = ALL["mixtral"].make()
    ids = torch.randint(3, 80, (2, 9), generator=torch.Generator().manual_seed(1))
    with MoEDebugger(model, level="counts") as debugger, torch.no_grad():
        session = debugger.session
        assert session is not None
        with session.record(tmp_path / "rec"):
            model(input_ids=ids)
        recording = open_recording(tmp_path / "rec")
        of_session = session.query("experts show layer, expert, assignments")
        assert of_session.rows == recording.query("experts show layer, expert, assignments").rows
        assert sum(of_session["assignments"]) == 2 * 9 * 2 * len(session.layers())
        for source in (session, recording):
            for text in ("tokens", "requests", "experts where token_id = 5", "steps"):
                with pytest.raises(QueryError, match='level "counts"'):
                    source.query(text)
    with pytest.raises(SessionClosedError):
        session.query("experts")


def test_what_is_not_kept_is_said(tmp_path: Path) -> None:
    model: Any = ALL["mixtral"].make()
    ids = torch.randint(3, 80, (2, 64), generator=torch.Generator().manual_seed(1))
    with MoEDebugger(model, max_rows_bytes=4096, max_disk_bytes=0) as debugger, torch.no_grad():
        for _ in range(6):
            model(input_ids=ids)
        session = debugger.session
        assert session is not None
        statistics = session.row_statistics()
        assert statistics.num_not_kept
        counted = session.query("tokens show count")
        assert counted["count"] == (statistics.num_kept,)
        assert f"{statistics.num_not_kept:,} older rows are not kept" in counted.notes[0]
        assert not session.query("experts").notes
        assert SessionSource(session).num_rows is not None


def test_a_damaged_part_is_an_error_or_said(tmp_path: Path) -> None:
    folder, _ = record(tmp_path / "rec", has_tokens=True)
    part = folder / "rows" / "part-00000001.parquet"
    part.write_bytes(part.read_bytes()[:-20])
    recording = open_recording(folder, damaged="skip")
    result = recording.query("tokens show count")
    assert 0 < result["count"][0] < recording.manifest.num_rows
    assert any("part-00000001" in note for note in result.notes)


@pytest.mark.parametrize(
    "text",
    [
        "tokens where position = 9999",
        "experts where expert = 9999",
        "layers where layer = 9999",
        "steps where step = 9999",
        "requests where request = none",
        "findings where layer = 9999",
        "series where name = none",
    ],
)
def test_a_result_without_rows_is_read_back_from_its_message(recorded: Any, text: str) -> None:
    _, recording = recorded
    found = recording.query(text)
    assert len(found) == 0
    back = result_from_proto(result_to_proto(found))
    assert (back.names, back.rows, back.notes) == (found.names, [], found.notes)


def test_results_as_table_csv_json_and_frame(recorded: Any) -> None:
    _, recording = recorded
    result: QueryResult = recording.query("tokens limit 3 show request, layer, experts, token_id, margin")
    frame = result.to_pandas()
    assert list(frame.columns) == list(result.names)
    assert str(frame["layer"].dtype) == "Int64"
    lines = result.to_csv().splitlines()
    assert lines[0] == "request,layer,experts,token_id,margin"
    assert len(lines) == 4
    plain = result.to_dict()
    assert plain["columns"][1] == {"name": "layer", "kind": "integer", "unit": "", "values": list(result["layer"])}
    assert (plain["num_rows"], plain["is_truncated"], plain["num_matched"]) == (3, True, None)
    assert "the first 3 rows of more" in str(result)
    assert "<table>" in result._repr_html_()
