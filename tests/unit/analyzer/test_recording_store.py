"""The catalogue's recordings on a SQLite file."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from moe_debugger.catalogue import Catalogue, RecordingRow, upgrade
from moe_debugger.wire.ids import new_id

SESSION = new_id()


@pytest.fixture
async def catalogue(tmp_path: Path) -> AsyncIterator[Catalogue]:
    url = f"sqlite+aiosqlite:///{tmp_path}/catalogue.db"
    await upgrade(url)
    catalogue = Catalogue(url)
    yield catalogue
    await catalogue.close()


def row(session_id: str = SESSION, **values: Any) -> RecordingRow:
    fields: dict[str, Any] = {
        "tenant": "default",
        "session_name": "run",
        "owner": "a",
        "path": "/r",
        "started_at_unix_ns": 10,
        "heartbeat_at_unix_ns": 10,
        "max_bytes": 100,
        **values,
    }
    return RecordingRow(recording_id=new_id(), session_id=session_id, **fields)


async def test_a_session_has_one_recording_that_runs(catalogue: Catalogue) -> None:
    store = catalogue.recordings
    rows = [row() for _ in range(6)]
    assert sorted(await asyncio.gather(*(store.add(each) for each in rows))) == [False] * 5 + [True]
    running = await store.running("default", SESSION)
    assert running is not None
    assert await store.running("other", SESSION) is None
    assert await store.update_running(running.recording_id, "a", state="finished", ended_at_unix_ns=20) is not None
    assert await store.running("default", SESSION) is None
    assert await store.add(row(started_at_unix_ns=30))
    assert [each.started_at_unix_ns for each in await store.list("default", SESSION)] == [30, 10]
    assert await store.list("other") == []
    assert await store.get("other", running.recording_id) is None


async def test_only_the_owner_writes_and_only_while_it_runs(catalogue: Catalogue) -> None:
    store, one = catalogue.recordings, row()
    assert await store.add(one)
    assert await store.update_running(one.recording_id, "b", num_rows=5) is None
    updated = await store.update_running(one.recording_id, "a", num_rows=5)
    assert updated is not None
    assert updated.num_rows == 5
    await store.ask_to_stop(one.recording_id, 40)
    await store.ask_to_stop(one.recording_id, 90)
    kept = await store.update_running(one.recording_id, "a", heartbeat_at_unix_ns=50)
    assert kept is not None
    assert (kept.state, kept.stop_at_sequence) == ("stopping", 40)
    assert not await store.interrupt(one.recording_id, 49, ended_at_unix_ns=50)
    assert await store.interrupt(one.recording_id, 50, ended_at_unix_ns=50)
    assert await store.update_running(one.recording_id, "a", num_rows=6) is None
    assert not await store.all_running()
