"""Nobody is fooled about whose an owned row is, while owners come and go under open transactions."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

import psycopg
import pytest

from mover.core.ids import Capture
from tests.integration.test_owned_rows import HELD, made_rig, shape_of
from tests.support.rig import OTHER, TENANT, Subject, execute, rig

DDL = """
create schema app;
create table app.documents (tenant_id uuid not null, id bigint primary key, title text);
create table app.versions (
  id bigint primary key, document bigint not null references app.documents {key}, note text
);
create table app.pages (id bigint primary key, version bigint not null references app.versions, note text);
"""
ROWS = f"""
insert into app.documents select (array['{TENANT}', '{OTHER}'])[1 + (g + 1) % 2]::uuid, g, 't'
  from generate_series(1, 4) g;
insert into app.versions select 10 * g, g, 'n' from generate_series(1, 4) g;
insert into app.pages select 10 * g, g, 'n' from generate_series(10, 40, 10) g;
"""
LATER = ("repeatable read", "serializable")


def ddl(key: str = "") -> str:
    return DDL.format(key=key)


@contextmanager
def writer(url: str, level: str = "read committed") -> Iterator[psycopg.Connection]:
    """An open transaction, with its snapshot, that waits for no lock for long."""
    with psycopg.connect(url, options="-c lock_timeout=1500ms -c statement_timeout=20s") as conn:
        conn.execute(f"set transaction isolation level {level}")
        conn.execute("select count(*) from app.documents")
        yield conn
        conn.rollback()


def owners(url: str) -> int:
    """What the guards remember of owners that came to the tenant: 1 none, 2 some."""
    find = "select relname from pg_class where relkind = 'S' and starts_with(relname, 'owners_')"
    ((name,),) = execute(url, find)
    return execute(url, f"select last_value from mover.{name}")[0][0]


async def test_who_gives_an_owner_another_owner_waits_for_those_who_looked(pair, capture):
    """The next owner may come to the tenant later, and is in no lock of theirs."""
    async with made_rig(pair, ddl(), capture):
        execute(pair.source, ROWS)
        with writer(pair.source) as looking, writer(pair.source) as changing:
            looking.execute("update app.pages set note = 'late' where version = 20")
            with pytest.raises(psycopg.errors.LockNotAvailable):
                changing.execute("update app.versions set document = 4 where id = 20")


@pytest.mark.parametrize("level", LATER)
async def test_a_snapshot_older_than_the_guards_is_not_trusted(pair, level):
    """By triggers: for the stream, indexes are made first, which waits for older snapshots."""
    for url in (pair.source, pair.target):
        execute(url, ddl())
    execute(pair.source, ROWS)
    shape = await shape_of(pair.source, pair.target)
    subject = Subject(shape.tables, ddl="", identity="")
    with writer(pair.source, level) as old:
        execute(pair.source, "update app.documents set tenant_id = %s where id = 2", TENANT)
        async with rig(pair.source, pair.target, subject=subject, capture=Capture.TRIGGER):
            with pytest.raises(psycopg.errors.SerializationFailure):
                old.execute("update app.versions set note = 'late' where document = 2")
            old.rollback()


async def test_under_a_closed_fence_a_held_owner_is_waited_for(pair, capture):
    """It may be opened again, and the owner come to the tenant after all."""
    async with made_rig(pair, ddl(), capture) as r:
        execute(pair.source, ROWS)
        with writer(pair.source) as holding, writer(pair.source) as looking:
            holding.execute("select from app.documents where id = 2 for update")
            await r.fence.get_ready()
            await r.fence.close(1.0)
            with pytest.raises(psycopg.errors.LockNotAvailable):
                looking.execute("update app.versions set note = 'late' where document = 2")
            await r.fence.reopen()
            await r.fence.let_go()


@pytest.mark.parametrize("has_come", [False, True], ids=["no owner has come", "an owner has come"])
@pytest.mark.parametrize(
    ("key", "statement"),
    [
        ("deferrable initially deferred", "insert into app.versions values (80, 8, 'n')"),
        ("", "insert into app.versions select n, 8, pg_sleep(n - 80)::text from generate_series(80, 81) n"),
    ],
    ids=["deferred", "in one statement"],
)
async def test_a_row_whose_owner_is_made_by_somebody_else_is_the_tenants(
    pair, key, statement, has_come, capture
):
    async with made_rig(pair, ddl(key), capture) as r, r.following():
        execute(pair.source, ROWS)
        await r.copy().run()
        if has_come:
            execute(pair.source, "update app.documents set tenant_id = %s where id = 4", TENANT)
        with writer(pair.source) as early:
            inserting = asyncio.create_task(asyncio.to_thread(early.execute, statement))
            if key:
                await inserting
            execute(pair.source, "insert into app.documents values (%s, 8, 't')", TENANT)
            await r.follower.catch_up_once()
            await inserting
            assert early.execute(HELD).fetchone() == (1,)
            early.commit()
        await r.follower.catch_up_once()
        rows = "select id from app.versions where document = 8 order by id"
        assert execute(pair.target, rows) == execute(pair.source, rows) != []


async def test_what_changes_owners_within_a_tenant_is_in_nobodys_way(pair, capture):
    async with made_rig(pair, ddl(), capture):
        execute(pair.source, ROWS)
        execute(pair.source, "update app.versions set document = 3 where id = 10")
        assert owners(pair.source) == 1
        with writer(pair.source, "repeatable read") as old:
            execute(pair.source, "update app.documents set title = 'new' where id = 2")
            old.execute("update app.versions set note = 'n' where document = 2")
            old.commit()
        execute(pair.source, "update app.versions set document = 3 where id = 20")
        assert owners(pair.source) == 2
