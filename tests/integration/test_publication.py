"""Publication and slot: made in that order, and patient with other people's transactions."""

from __future__ import annotations

import asyncio
import re
from uuid import uuid4

import psycopg
import pytest

from mover.core.errors import SlotLost
from mover.core.ids import Epoch, MigrationId
from mover.core.secret import Secret
from mover.postgres import publication
from mover.postgres.connect import Database, Identity
from mover.postgres.publication import name_of
from mover.postgres.writer import Writer
from tests.integration.test_follow import a_commit_that_no_snapshot_sees_yet
from tests.support.rig import ITEMS, TENANT, execute, rig
from tests.support.waiting import until


async def test_a_slot_waits_for_open_writers_and_says_for_whom(pair, monkeypatch):
    """Theirs may be in any database of the cluster; they are only waited for."""
    monkeypatch.setattr(publication, "SLOT_LOCK_TIMEOUT_MS", 100)
    migration = MigrationId(uuid4())
    source = Database(Secret(pair.source), "source", Identity(migration, Epoch(1)))
    elsewhere = pair.source_server.url("postgres")
    said: list[str] = []

    async def say(text: str) -> None:
        said.append(text)

    with psycopg.connect(elsewhere, application_name="import job") as writer:
        writer.execute("SELECT pg_current_xact_id()")
        pid = writer.info.backend_pid
        creating = asyncio.create_task(publication.create_slot(source, migration, say))
        await until(lambda: len(said) >= 2)
        assert not creating.done()
        assert re.search(rf"waiting for open write transactions: .*pid {pid} \(import job, ", said[0])
    start = await creating
    assert await publication.create_slot(source, migration, say) == start  # found, not made anew
    await publication.drop_slot(source, migration)


WAITS_FOR_A_WRITER = """
SELECT count(*) FROM pg_stat_activity
 WHERE datname = current_database() AND query LIKE '%%create_logical%%' AND wait_event = 'transactionid'
"""


async def test_a_slot_waits_for_the_youngest_commit_that_no_snapshot_lists(pair):
    """It hangs for a standby beside the slot's birth: no slot sends it, and the copy would not see it."""
    async with rig(pair.source, pair.target) as r:
        await publication.drop_slot(r.source, r.migration)
        said: list[str] = []

        async def say(text: str) -> None:
            said.append(text)

        async def is_held_up() -> None:
            await until(lambda: execute(pair.source, WAITS_FOR_A_WRITER) == [(1,)])

        with psycopg.connect(pair.source) as first, psycopg.connect(pair.source) as second:
            first.execute("SELECT pg_current_xact_id()")
            creating = asyncio.create_task(publication.create_slot(r.source, r.migration, say))
            await is_held_up()
            second.execute("SELECT pg_current_xact_id()")
            first.rollback()
            await is_held_up()
            async with a_commit_that_no_snapshot_sees_yet(pair.source):
                second.rollback()
                await until(lambda: creating.done() or any("beside its birth" in text for text in said))
                assert not creating.done()
        await creating


async def test_a_slot_that_was_made_anew_is_never_taken_for_the_old_one(pair):
    """Whatever happened between the two would be missing."""
    async with rig(pair.source, pair.target) as r:
        await publication.drop_slot(r.source, r.migration)
        execute(pair.source, "UPDATE app.item SET amount = 1")

        async def say(text: str) -> None:
            pass

        start = await publication.create_slot(r.source, r.migration, say)
        with pytest.raises(SlotLost):
            await publication.store_start(r.target, r.follower.target._identity, start)


async def test_the_row_filter_is_the_tenants_and_nothing_is_published_but_rows(pair):
    async with rig(pair.source, pair.target) as r:
        ((inserts, updates, deletes, truncates),) = execute(
            pair.source,
            "SELECT pubinsert, pubupdate, pubdelete, pubtruncate FROM pg_publication WHERE pubname = %s",
            name_of(r.migration),
        )
        assert (inserts, updates, deletes, truncates) == (True, True, True, False)
        filters = execute(
            pair.source,
            "SELECT rowfilter FROM pg_publication_tables WHERE pubname = %s",
            name_of(r.migration),
        )
        assert len(filters) == 1 and str(TENANT) in filters[0][0]


async def test_what_is_confirmed_to_the_slot_is_flushed_whatever_the_default(pair):
    """Otherwise a crash of the target would lose rows that the source has let go."""
    name = pair.target.rpartition("/")[2]
    execute(pair.target, f"ALTER DATABASE {name} SET synchronous_commit = off")
    identity = Identity(MigrationId(uuid4()), Epoch(1))
    execute(pair.target, ITEMS.ddl)
    async with Writer.open(
        Database(Secret(pair.target), "target", identity), ITEMS.shape, TENANT, identity
    ) as writer:
        cursor = await writer._conn.execute("SHOW synchronous_commit")
        assert await cursor.fetchone() == ("on",)
