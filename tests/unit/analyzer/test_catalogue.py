"""The catalogue on a SQLite file: migrations, names, closing, tenants."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy.ext.asyncio import create_async_engine

from moe_debugger.catalogue import Base, Catalogue, upgrade
from moe_debugger.errors import InvalidInputError
from moe_debugger.wire.ids import new_id


@pytest.fixture
async def url(tmp_path: Path) -> str:
    url = f"sqlite+aiosqlite:///{tmp_path}/catalogue.db"
    await upgrade(url)
    return url


@pytest.fixture
async def catalogue(url: str) -> AsyncIterator[Catalogue]:
    catalogue = Catalogue(url)
    yield catalogue
    await catalogue.close()


async def test_migrations_give_the_schema_of_the_models(url: str) -> None:
    await upgrade(url)  # a second time changes nothing
    engine = create_async_engine(url)
    async with engine.connect() as connection:
        differences = await connection.run_sync(
            lambda sync: compare_metadata(MigrationContext.configure(sync), Base.metadata)
        )
    await engine.dispose()
    assert differences == []


async def test_open_session_joins_the_open_one_of_its_name_only(catalogue: Catalogue) -> None:
    first = await catalogue.open_session("default", "run", model_name="m")
    again = await catalogue.open_session("default", "run", model_name="m")
    elsewhere = await catalogue.open_session("other", "run", model_name="m")
    assert (first.joined, again.joined, elsewhere.joined) == (False, True, False)
    assert again.session_id == first.session_id != elsewhere.session_id
    assert await catalogue.close_session(first.session_id, 5, "test")
    assert not await catalogue.close_session(first.session_id, 6, "test")
    fresh = await catalogue.open_session("default", "run", model_name="m")
    assert not fresh.joined
    assert fresh.session_id != first.session_id


async def test_open_session_gives_one_session_to_sources_that_ask_at_once(catalogue: Catalogue) -> None:
    opened = await asyncio.gather(*(catalogue.open_session("default", "run") for _ in range(8)))
    assert len({one.session_id for one in opened}) == 1
    assert sum(not one.joined for one in opened) == 1


@pytest.mark.parametrize("name", ["x" * 129, "a\nb", "\x00"])
async def test_open_session_refuses_a_bad_name(catalogue: Catalogue, name: str) -> None:
    with pytest.raises(InvalidInputError, match="session name"):
        await catalogue.open_session("default", name)


async def test_open_session_refuses_another_model_and_a_name_that_must_be_new(catalogue: Catalogue) -> None:
    await catalogue.open_session("default", "run", model_name="a")
    with pytest.raises(InvalidInputError, match="open with the model 'a'"):
        await catalogue.open_session("default", "run", model_name="b")
    with pytest.raises(InvalidInputError, match="open already"):
        await catalogue.open_session("default", "run", must_be_new=True)


async def test_close_leaves_a_session_that_was_seen_meanwhile(catalogue: Catalogue) -> None:
    opened = await catalogue.open_session("default", "run")
    seen = 2**62
    await catalogue.touch_sessions({opened.session_id: seen})
    await catalogue.touch_sessions({opened.session_id: 7})  # never backwards
    assert not await catalogue.close_session(opened.session_id, seen, "idle", unseen_since_unix_ns=seen - 1)
    assert await catalogue.close_session(opened.session_id, seen, "idle", unseen_since_unix_ns=seen)


async def test_a_source_brings_back_a_session_that_the_catalogue_lost(catalogue: Catalogue) -> None:
    session_id, source_id = new_id(), new_id()
    for _ in range(2):
        await catalogue.record_source(
            "default",
            session_id,
            source_id,
            manifest=b"manifest",
            model_name="m",
            model_type="mixtral",
            started_at_unix_ns=1,
        )
    row = await catalogue.get_session("default", session_id)
    assert row is not None
    assert row.model_name == "m"
    assert await catalogue.get_session("other", session_id) is None
    assert await catalogue.get_manifest("default", session_id, source_id) == b"manifest"
    assert await catalogue.get_manifest("other", session_id, source_id) is None
    assert [one.session_id for one in await catalogue.list_sessions("default")] == [session_id]
