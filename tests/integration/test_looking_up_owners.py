"""Nobody is fooled about whose an owned row is, while owners come and go under open transactions."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import replace
from uuid import uuid4

import psycopg
import pytest

from mover.core.errors import CutoverAborted
from mover.core.ids import Capture, Epoch, Side
from mover.postgres.connect import Identity
from mover.postgres.fence import PgFence
from tests.conftest import Pair
from tests.integration.test_owned_rows import HELD, made_rig, quiet, shape_of
from tests.support.rig import OTHER, TENANT, Rig, Subject, execute, rig
from tests.support.waiting import until

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


@pytest.mark.parametrize("level", LATER)
@pytest.mark.parametrize("gone", ["the guards", "the trigger"])
async def test_a_snapshot_older_than_these_guards_is_not_trusted_for_having_seen_earlier_ones(
    pair, level, gone
):
    async with made_rig(pair, ddl(), Capture.TRIGGER) as r:
        execute(pair.source, ROWS)
        execute(pair.source, "create table app.unrelated (id int)")
        guarded = [table.holding(Side.SOURCE) for table in r.subject.shape.tables]
        with psycopg.connect(pair.source, options="-c lock_timeout=1500ms") as old:
            old.execute(f"set transaction isolation level {level}")
            old.execute("select from app.unrelated")
            if gone == "the guards":
                await r.fence.remove([], quiet)
            else:
                execute(pair.source, f"drop trigger mover_guard_{r.fence.name}_hand_over on app.documents")
            execute(pair.source, "update app.documents set tenant_id = %s where id = 2", TENANT)
            await r.fence.install(guarded, "open", quiet, captures=True)
            with pytest.raises(psycopg.errors.SerializationFailure):
                old.execute("update app.versions set note = 'late' where document = 2")


WAITING = "select count(*) from pg_stat_activity where wait_event = 'advisory'"
CHILD_FIRST = "insert into app.versions values (80, 8, 'late')"
UNDER_A_HELD_OWNER = "update app.versions set note = 'late' where document = 2"
IN_DOUBT = pytest.mark.parametrize("statement", [CHILD_FIRST, UNDER_A_HELD_OWNER], ids=["to come", "held"])
DEFERRED = "deferrable initially deferred"


@asynccontextmanager
async def closed(r: Rig) -> AsyncIterator[None]:
    await r.fence.get_ready()
    await r.fence.close(1.0)
    try:
        yield
    finally:
        await r.fence.let_go()


async def is_waiting(url: str) -> None:
    await until(lambda: execute(url, WAITING) == [(1,)])


@IN_DOUBT
async def test_who_may_write_a_row_of_the_tenants_waits_at_a_closed_fence(pair, capture, statement):
    """It may be opened again, and the owner come to the tenant after all."""
    async with made_rig(pair, ddl(DEFERRED), capture) as r, r.following():
        execute(pair.source, ROWS)
        await r.copy().run()
        with writer(pair.source) as holding, writer(pair.source) as late:
            holding.execute("select from app.documents where id = 2 for update")
            async with closed(r):
                writing = asyncio.create_task(asyncio.to_thread(late.execute, statement))
                await is_waiting(pair.source)
                await r.fence.reopen()
            await writing
            assert late.execute(HELD).fetchone() == (1,)
            holding.rollback()
            execute(pair.source, "insert into app.documents values (%s, 8, 't')", TENANT)
            await r.follower.catch_up_once()
            late.commit()
        await r.follower.catch_up_once()
        rows = "select id, note from app.versions where document = 8"
        assert execute(pair.target, rows) == execute(pair.source, rows)


@IN_DOUBT
@pytest.mark.parametrize("when", ["closing", "closed"])
async def test_who_turns_out_to_write_a_row_of_another_tenants_goes_on_when_the_tenant_has_moved(
    pair, capture, statement, when
):
    async with made_rig(pair, ddl(DEFERRED), capture) as r:
        execute(pair.source, ROWS)
        with writer(pair.source) as tenants, writer(pair.source) as holding, writer(pair.source) as other:
            holding.execute("select from app.documents where id = 2 for update")
            if when == "closing":
                tenants.execute("update app.documents set title = 'x' where id = 1")
            await r.fence.get_ready()
            closing = asyncio.create_task(r.fence.close(5.0))
            if when == "closing":
                await is_waiting(pair.source)
            else:
                await closing
            writing = asyncio.create_task(asyncio.to_thread(other.execute, statement))
            await until(lambda: execute(pair.source, WAITING) == [(2 if when == "closing" else 1,)])
            tenants.rollback()
            await closing
            await r.fence.move_away()
            await r.fence.let_go()
            await writing
            other.execute("delete from app.versions where id = 80")  # its owner never came
            other.commit()


@pytest.mark.parametrize("level", LATER)
async def test_an_owner_that_an_old_snapshot_does_not_show_is_not_taken_for_nobodys(pair, level, capture):
    """Where foreign keys are off, nothing else would stop the row."""
    async with made_rig(pair, ddl(), capture) as r:
        execute(pair.source, ROWS)
        with writer(pair.source, level) as late:
            late.execute("set local session_replication_role = replica")
            execute(pair.source, "insert into app.documents values (%s, 8, 't')", TENANT)
            async with closed(r):
                writing = asyncio.create_task(asyncio.to_thread(late.execute, CHILD_FIRST))
                await is_waiting(pair.source)
                await r.fence.move_away()
            with pytest.raises(psycopg.errors.SerializationFailure):
                await writing


@pytest.mark.parametrize("level", LATER)
async def test_an_owner_that_an_old_snapshot_does_not_show_is_not_taken_for_nobodys_after_the_move(
    pair, level, capture
):
    async with made_rig(pair, ddl(), capture) as r:
        execute(pair.source, ROWS)
        with writer(pair.source, level) as late:
            late.execute("set local session_replication_role = replica")
            execute(pair.source, "insert into app.documents values (%s, 8, 't')", TENANT)
            async with closed(r):
                await r.fence.move_away()
            with pytest.raises(psycopg.errors.SerializationFailure):
                late.execute(CHILD_FIRST)


@pytest.mark.parametrize("level", ["read committed", *LATER])
async def test_a_row_of_nobodys_is_the_tenants_once_its_owner_comes(pair, level, capture):
    """Foreign keys do not act on an update that leaves them alone, so that it waits for nobody."""
    async with made_rig(pair, ddl(), capture) as r:
        execute(pair.source, ROWS)
        orphaned = "set session_replication_role = replica; delete from app.documents where id = 2"
        with psycopg.connect(pair.source) as conn:
            conn.execute(orphaned)
        with writer(pair.source) as coming, writer(pair.source, level) as late:
            coming.execute("insert into app.documents values (%s, 2, 't')", (TENANT,))
            late.execute("update app.versions set note = 'late' where id = 20")
            coming.commit()
            with pytest.raises(CutoverAborted):
                async with closed(r):
                    pass
            late.commit()


WEAK = pytest.mark.parametrize("level", ["read uncommitted", "read committed"])


@WEAK
async def test_who_has_no_snapshot_of_his_own_keeps_nobody_from_changing_an_owner(pair, level, capture):
    async with made_rig(pair, ddl(), capture):
        execute(pair.source, ROWS)
        execute(pair.source, "update app.documents set tenant_id = %s where id = 4", TENANT)
        with writer(pair.source, level) as looking, writer(pair.source) as changing:
            looking.execute("update app.versions set note = 'late' where document = 2")
            changing.execute("update app.documents set title = 'x' where id = 2")


@WEAK
async def test_who_has_no_snapshot_of_his_own_goes_on_when_the_tenant_has_moved(pair, level, capture):
    async with made_rig(pair, ddl(DEFERRED), capture) as r:
        execute(pair.source, ROWS)
        with writer(pair.source, level) as other:
            async with closed(r):
                writing = asyncio.create_task(asyncio.to_thread(other.execute, CHILD_FIRST))
                await is_waiting(pair.source)
                await r.fence.move_away()
            await writing


async def test_where_rows_are_loaded_nobody_waits_for_whoever_holds_an_owner(pair):
    """A target's fence is closed for hours, and two of other tenants' sessions would wait for each other."""
    async with made_rig(pair, ddl(DEFERRED), Capture.WAL) as r:
        execute(pair.target, ROWS)
        fence = PgFence(r.target, TENANT, "there", Identity(r.migration, Epoch(1)), 1.0)
        await fence.install([t.holding(Side.TARGET) for t in r.subject.shape.tables], "closed", quiet)
        with writer(pair.target) as holding, writer(pair.target) as other:
            holding.execute("select from app.documents where id = 2 for update")
            other.execute(UNDER_A_HELD_OWNER)
            other.execute(CHILD_FIRST)


BEHIND_ITS_CHILD = f"""
with made as (insert into app.documents values ('{OTHER}', 800, 't'))
insert into app.versions values (8000, 800, 'n')
"""


async def test_where_rows_are_loaded_nobody_waits_whose_owner_is_made_in_the_same_statement(pair):
    async with made_rig(pair, ddl(), Capture.WAL) as r:
        execute(pair.target, ROWS)
        place = PgFence(r.target, TENANT, "there", Identity(r.migration, Epoch(1)), 1.0)
        await place.install([t.holding(Side.TARGET) for t in r.subject.shape.tables], "closed", quiet)
        execute(pair.target, BEHIND_ITS_CHILD)


async def test_where_rows_are_loaded_nobody_waits_whose_owner_is_let_go_meanwhile(pair):
    async with made_rig(pair, ddl(), Capture.WAL) as r:
        execute(pair.target, ROWS)
        place = PgFence(r.target, TENANT, "there", Identity(r.migration, Epoch(1)), 1.0)
        await place.install([t.holding(Side.TARGET) for t in r.subject.shape.tables], "closed", quiet)
        late = "update app.versions set note = (select 'late' from pg_advisory_xact_lock(document)) where {}"
        with writer(pair.target) as holding, writer(pair.target) as gate, writer(pair.target) as other:
            other.execute("set local lock_timeout = 0")
            holding.execute("select from app.documents where id = 2 for update")
            gate.execute("select pg_advisory_xact_lock(4)")
            ending = asyncio.create_task(asyncio.to_thread(other.execute, late.format("document in (2, 4)")))
            await is_waiting(pair.target)  # the row of document 2 was in doubt, and the statement goes on
            holding.rollback()
            gate.rollback()
            await ending
            other.commit()


async def test_where_the_tenant_may_come_back_nobody_waits_for_whoever_holds_an_owner(pair):
    async with made_rig(pair, ddl(DEFERRED), Capture.TRIGGER) as r:
        execute(pair.source, ROWS)
        async with closed(r):
            await r.fence.move_away()
        await r.fence.expect_return()
        with writer(pair.source) as holding, writer(pair.source) as other:
            holding.execute("select from app.documents where id = 2 for update")
            other.execute(UNDER_A_HELD_OWNER)
            other.execute(CHILD_FIRST)


LOGS = "select relname from pg_class where relkind = 'r' and starts_with(relname, 'change_log_')"


@IN_DOUBT
async def test_who_was_in_doubt_before_the_opening_is_waited_for_and_read_after_it(pair, capture, statement):
    """His transaction may end long after the tenant has begun to work here."""
    async with made_rig(pair, ddl(DEFERRED), capture) as r:
        execute(pair.target, ROWS)
        place = PgFence(r.target, TENANT, "there", Identity(r.migration, Epoch(1)), 1.0)
        guarded = [t.holding(Side.TARGET) for t in r.subject.shape.tables]
        captures = capture is Capture.TRIGGER
        await place.install(guarded, "closed", quiet, captures=captures)
        with writer(pair.target) as holding, writer(pair.target) as early:
            holding.execute("select from app.documents where id = 2 for update")
            early.execute(statement)
            assert early.execute(HELD).fetchone() == (1,)
            await place.open()
            holding.execute("update app.documents set tenant_id = %s where id = 2", (TENANT,))
            holding.execute("insert into app.documents values (%s, 8, 't')", (TENANT,))
            holding.commit()
            await place.get_ready()
            with pytest.raises(CutoverAborted):
                await place.close(0.2)
            early.commit()
            await place.close(1.0)
            await place.let_go()
        if captures:
            ((log,),) = execute(pair.target, LOGS)
            written = (
                f"select count(*) from mover.{log} where relation = 'app.versions'::regclass and part = 0"
            )
            assert execute(pair.target, written) == [(1,)]


async def test_rows_of_the_tenants_are_refused_where_they_are_loaded_whoever_holds_their_owner(pair):
    async with made_rig(pair, ddl(DEFERRED), Capture.WAL) as r:
        execute(pair.target, ROWS)
        place = PgFence(r.target, TENANT, "there", Identity(r.migration, Epoch(1)), 1.0)
        await place.install([t.holding(Side.TARGET) for t in r.subject.shape.tables], "closed", quiet)
        with writer(pair.target) as holding, writer(pair.target) as stale:
            holding.execute("select from app.documents where id = 1 for update")
            with pytest.raises(psycopg.errors.SerializationFailure):
                stale.execute("update app.pages set note = 'late' where version = 10")


TENANTS_PAGES = f"""
select p.id, p.note from app.pages p join app.versions v on v.id = p.version
  join app.documents d on d.id = v.document where d.tenant_id = '{TENANT}' order by 1
"""


async def a_page_is_written_while_its_document_changes_twice(r: Rig, late: psycopg.Connection) -> None:
    """To another one of the other tenant's, which then becomes the tenant's. Nothing may commit behind the
    fence."""
    with psycopg.connect(r.source_url, options="-c lock_timeout=500ms") as coming:
        with suppress(psycopg.errors.LockNotAvailable):
            coming.execute("update app.documents set tenant_id = %s where id = 4", (TENANT,))
    async with closed(r):
        before = execute(r.source_url, TENANTS_PAGES)
        late.commit()
        assert execute(r.source_url, TENANTS_PAGES) == before
        await r.fence.reopen()


@pytest.mark.parametrize("level", LATER)
async def test_an_owner_that_was_given_another_one_is_not_read_as_it_was(pair, level, capture):
    """Whoever did would lock the earlier one."""
    async with made_rig(pair, ddl(), capture) as r:
        execute(pair.source, ROWS)
        with writer(pair.source, level) as late:
            execute(pair.source, "update app.versions set document = 4 where id = 20")
            with pytest.raises(psycopg.errors.SerializationFailure):
                late.execute("update app.pages set note = 'late' where version = 20")
            late.rollback()
            await a_page_is_written_while_its_document_changes_twice(r, late)


SLOWLY = "IF current_setting('app.slow', true) = 'on' THEN PERFORM pg_sleep(2); END IF; RETURN false;"
FUNCTIONS = """
select pg_get_functiondef(oid) from pg_proc
 where pronamespace = 'mover'::regnamespace and starts_with(proname, 'owned_')
"""


async def test_an_owner_that_is_given_another_one_during_the_look_up_is_asked_about_again(pair, capture):
    async with made_rig(pair, ddl(), capture) as r:
        execute(pair.source, ROWS)
        for (function,) in execute(pair.source, FUNCTIONS):
            execute(pair.source, function.replace("RETURN false;", SLOWLY))
        with writer(pair.source) as late:
            late.execute("set app.slow = on")
            page = "update app.pages set note = 'late' where version = 20"
            writing = asyncio.create_task(asyncio.to_thread(late.execute, page))
            sleeping = "select count(*) from pg_stat_activity where wait_event = 'PgSleep'"
            await until(lambda: execute(pair.source, sleeping) == [(1,)])
            execute(pair.source, "update app.versions set document = 4 where id = 20")
            assert not writing.done()
            await writing
            await a_page_is_written_while_its_document_changes_twice(r, late)


WAITS_FOR_A_ROW = "select count(*) from pg_stat_activity where wait_event in ('tuple', 'transactionid')"


async def test_who_looked_does_not_deadlock_with_who_hands_the_owner_over(pair, capture):
    async with made_rig(pair, ddl(), capture):
        execute(pair.source, ROWS)
        with writer(pair.source) as looking, psycopg.connect(pair.source) as coming:
            looking.execute("update app.versions set note = 'a' where id = 20")
            rehome = "update app.documents set tenant_id = %s where id = 2"
            handing = asyncio.create_task(asyncio.to_thread(coming.execute, rehome, (TENANT,)))
            await until(lambda: execute(pair.source, WAITS_FOR_A_ROW) == [(1,)])
            looking.execute("update app.versions set note = 'b' where id = 20")
            looking.commit()
            await handing
            coming.commit()


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


COLLATED = """
create schema app;
create table app.folders (tenant_id uuid not null, code text collate "C" primary key);
create table app.labels (tenant_id uuid not null, code text primary key);
create table app.marks (
  id bigint primary key, folder text collate "C" references app.folders,
  label text references app.labels, note text
);
"""


async def test_owners_are_found_by_their_indexes_whatever_their_collations(pair, capture):
    async with made_rig(pair, COLLATED, capture):
        for table in ("folders", "labels"):
            rows = f"insert into app.{table} select %s, g::text from generate_series(1, 5000) g"
            execute(pair.source, rows, OTHER)
        execute(
            pair.source, "insert into app.marks select g, null, g::text, 'n' from generate_series(1, 5) g"
        )
        execute(pair.source, "analyze app.folders, app.labels")
        scans = "select seq_scan from pg_stat_user_tables where relname = 'labels'"
        execute(pair.source, "select pg_stat_force_next_flush()")
        before = execute(pair.source, scans)
        with psycopg.connect(pair.source) as conn:
            conn.execute("update app.marks set note = 'x'")
            conn.commit()
            conn.execute("select pg_stat_force_next_flush()")
        updates = "select n_tup_upd from pg_stat_user_tables where relname = 'marks'"
        await until(lambda: execute(pair.source, updates) == [(5,)])
        assert execute(pair.source, scans) == before


WITH_A_CAST = """
create schema app;
create type app.kind as enum ('a', 'b');
create function app.leak(app.kind) returns text language plpgsql as $$
begin
    perform set_config('app.leaked', current_user, false);
    return case $1 when 'a' then 'a' else 'b' end;
end $$;
create cast (app.kind as text) with function app.leak(app.kind);
create table app.things (tenant_id uuid not null, id app.kind primary key, note text);
"""


async def test_no_cast_of_the_applications_runs_with_the_movers_rights(pair, capture):
    async with made_rig(pair, WITH_A_CAST, capture):
        with psycopg.connect(pair.source) as conn:
            conn.execute("insert into app.things values (%s, 'a', 'n')", (TENANT,))
            conn.execute("update app.things set id = 'b'")
            assert conn.execute("select current_setting('app.leaked', true)").fetchone() in [(None,), ("",)]
            conn.rollback()


ACCENTED = """
create schema app;
create table app."döcs" (tenant_id uuid not null, code text primary key, title text);
create table app."vérs" (id bigint primary key, code text not null references app."döcs", note text);
"""


@pytest.fixture
def latin1(pair) -> Iterator[Pair]:
    name = f"latin1_{uuid4().hex[:10]}"
    execute(pair.source, f"create database {name} template template0 encoding 'LATIN1' locale 'C'")
    yield replace(pair, source=f"{pair.source.rpartition('/')[0]}/{name}")
    execute(pair.source, f"drop database {name} with (force)")


async def test_what_is_told_of_owners_and_truncations_arrives_from_another_encoding(latin1, capture):
    rows = 'select id, code from app."vérs" order by id'
    async with made_rig(latin1, ACCENTED, capture) as r, r.following():
        execute(latin1.source, "insert into app.\"döcs\" values (%s, 'café'), (%s, 'thé')", OTHER, TENANT)
        execute(latin1.source, "insert into app.\"vérs\" values (1, 'café'), (2, 'thé')")
        await r.copy().run()
        execute(latin1.source, "update app.\"döcs\" set tenant_id = %s where code = 'café'", TENANT)
        await r.follower.catch_up_once()
        assert execute(latin1.target, rows) == [(1, "café"), (2, "thé")]
        execute(latin1.source, 'truncate app."vérs"')
        await r.follower.catch_up_once()
        assert execute(latin1.target, rows) == []
