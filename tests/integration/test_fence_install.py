"""How guards come to a shared table, go again, and what stays where a tenant has left."""

from __future__ import annotations

import asyncio
from uuid import uuid4

import psycopg
import pytest

from mover.core.errors import SchemaChanged
from mover.core.ids import Epoch, MigrationId
from mover.postgres import agent
from mover.postgres.connect import Identity
from mover.postgres.fence import PgFence
from mover.sql import load
from tests.support.fencing import OTHER, TABLES, TENANT, Fenced, fenced, insert, quiet

OBJECTS = """
SELECT 'trigger', tgname::text FROM pg_trigger WHERE tgname LIKE 'mover%%'
UNION ALL SELECT 'function', proname::text FROM pg_proc WHERE pronamespace = to_regnamespace('mover')
UNION ALL SELECT 'sequence', relname::text FROM pg_class
 WHERE relnamespace = to_regnamespace('mover') AND relkind = 'S'
UNION ALL SELECT 'fence', name FROM mover.fence
UNION ALL SELECT 'lock', objid::text FROM pg_locks WHERE locktype = 'advisory'
 ORDER BY 1, 2
"""


@pytest.fixture(params=["pg16", "pg18"])
def url(request, make_database) -> str:
    return make_database(request.getfixturevalue(request.param))


async def write(world: Fenced) -> None:
    async with world.connect(statement_timeout="5s") as conn:
        await insert(conn, "written", 0)


async def leave_the_place(world: Fenced) -> None:
    await world.fence.get_ready()
    await world.fence.close(lock_timeout_s=5)
    await world.fence.move_away()


async def next_migration(world: Fenced) -> PgFence:
    """The fence of another migration of this tenant, here."""
    identity = Identity(MigrationId(uuid4()), Epoch(1))
    database = world.database(migration=identity.migration)
    await agent.install(database, identity)
    return world.fence_of(database)


async def refused_as_moved(world: Fenced) -> bool:
    try:
        await write(world)
    except psycopg.errors.ReadOnlySqlTransaction:
        return True
    return False


async def test_removing_leaves_nothing_and_both_may_be_repeated(url):
    async with fenced(url) as world:
        made = await world.ask(OBJECTS)
        assert {kind for kind, _ in made} == {"fence", "function", "sequence", "trigger"}
        await world.fence.install(TABLES, "open", quiet)
        assert await world.ask(OBJECTS) == made
        for _ in range(2):
            await world.fence.remove(TABLES, quiet)
            assert await world.ask(OBJECTS) == []
        await write(world)


async def test_installing_again_keeps_the_state(url):
    async with fenced(url) as world:
        await leave_the_place(world)
        await world.fence.install(TABLES, "open", quiet)
        assert await world.fence.state() == "moved"
        assert await refused_as_moved(world)


async def test_an_installation_that_was_cut_off_is_finished(url):
    async with fenced(url) as world:
        made = await world.ask(OBJECTS)
        await world.ask(f"DROP TRIGGER mover_guard_{world.fence.name}_update ON app.item")
        await world.fence.install(TABLES, "open", quiet)
        assert await world.ask(OBJECTS) == made


async def test_a_guard_that_somebody_disabled_stops_the_cutover_and_is_made_again(url):
    async with fenced(url) as world:
        await world.ask("ALTER TABLE app.item DISABLE TRIGGER USER; ALTER TABLE app.item ENABLE TRIGGER USER")
        with pytest.raises(SchemaChanged, match=r"app\.item$"):
            await world.fence.get_ready()
        await world.fence.install(TABLES, "open", quiet)
        await world.fence.get_ready()


async def test_nobody_queues_behind_an_installation_for_longer_than_its_lock_timeout(url):
    tries: list[str] = []

    async def say(text: str) -> None:
        tries.append(text)

    async with fenced(url) as world, world.connect() as long, world.connect(statement_timeout="1s") as other:
        await world.fence.remove(TABLES, quiet)
        await long.execute("BEGIN")
        await insert_other(long)
        installing = asyncio.create_task(world.fence.install(TABLES, "open", say))
        while len(tries) < 3:
            await insert_other(other)
        await long.execute("COMMIT")
        await installing
        await leave_the_place(world)
        assert await refused_as_moved(world)


async def insert_other(conn: psycopg.AsyncConnection) -> None:
    await conn.execute("INSERT INTO app.item (tenant_id, note) VALUES (%s, 'other')", (OTHER,))


async def called_for_a_row_of_ours(world: Fenced) -> bool:
    """Whether a guard is called, if only to return at once."""
    load = "EXPLAIN (ANALYZE, COSTS OFF) INSERT INTO app.item (tenant_id, note) VALUES (%s, 'copied')"
    async with world.database().connect("apply", **{"mover.tenant": str(TENANT)}) as conn:
        plan = await (await conn.execute(load, (TENANT,))).fetchall()
    return "Trigger mover_guard" in str(plan)


async def test_the_movers_own_sessions_write_behind_a_closed_fence(url):
    async with fenced(url, state="closed") as world:
        assert not await called_for_a_row_of_ours(world), "each row that is loaded would queue an event"
        assert "copied" in await world.notes()


async def test_the_movers_own_sessions_write_where_the_tenant_has_left(url):
    async with fenced(url) as world:
        await leave_the_place(world)
        assert await called_for_a_row_of_ours(world), "a longer condition is everybody's cost"
        assert "copied" in await world.notes()


async def test_no_guard_is_called_for_what_is_loaded_where_a_tenant_comes_back(url):
    async with fenced(url) as world:
        await leave_the_place(world)
        target = await next_migration(world)
        await target.install(TABLES, "closed", quiet)
        assert not await called_for_a_row_of_ours(world)


async def test_a_tenant_that_comes_back_is_served_and_its_tombstone_is_gone(url):
    async with fenced(url) as world:
        await leave_the_place(world)
        target = await next_migration(world)
        await target.install(TABLES, "closed", quiet)
        assert await target.state() == "closed"
        await target.open()
        await write(world)
        await target.remove(TABLES, quiet)
        assert await world.ask(OBJECTS) == []
        await write(world)


@pytest.mark.parametrize("captures", [False, True], ids=["plain", "writing down"])
async def test_a_tenant_that_does_not_come_back_after_all_is_refused_as_before(url, captures):
    """Whatever the guards were to do for the way back."""
    async with fenced(url) as world:
        await leave_the_place(world)
        made = await world.ask(OBJECTS)
        for _ in range(2):
            target = await next_migration(world)
            await target.install(TABLES, "closed", quiet)
            await target.install(TABLES, "closed", quiet, captures=captures)
            for _ in range(2):
                await target.remove(TABLES, quiet)
            assert await world.ask(OBJECTS) == made
            assert await refused_as_moved(world)
            assert await called_for_a_row_of_ours(world), "a longer condition is everybody's cost"


async def test_a_takeover_that_failed_behind_the_state_leaves_the_tombstone_refusing(url):
    """The state that writers read does not come back with the transaction."""
    async with fenced(url) as world:
        await leave_the_place(world)
        target = await next_migration(world)
        with psycopg.connect(url) as conn:
            conn.execute(load("fence")["record"], target._facts() | {"state": "closed"})
            conn.rollback()
        await target.remove(TABLES, quiet)
        assert await refused_as_moved(world)


async def test_an_earlier_migration_cannot_remove_what_a_later_one_needs(url):
    async with fenced(url) as world:
        made = await world.ask(OBJECTS)
        later = await next_migration(world)
        await later.install(TABLES, "open", quiet)
        await world.fence.remove(TABLES, quiet)
        assert await world.ask(OBJECTS) == made
