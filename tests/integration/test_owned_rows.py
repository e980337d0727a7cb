"""Rows that are the tenant's by foreign keys: what the follower promises, under everybody's random writes."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, asynccontextmanager
from uuid import uuid4

import psycopg
import pytest

from mover.compare import Question, compare
from mover.core.errors import ApplyConflict
from mover.core.facts import Facts, Tenancy
from mover.core.ids import Capture, Side
from mover.core.secret import Secret
from mover.core.tables import Shape
from mover.engine.preflight import judge_again
from mover.postgres import catalog, identity
from mover.postgres.identity import IdentityNeed
from tests.conftest import every_combination
from tests.support import binders
from tests.support.rig import OTHER, TENANT, Rig, Subject, execute, rig


async def quiet(_: str) -> None:
    pass


async def shape_of(source_url: str, target_url: str) -> Shape:
    sides = []
    for url in (source_url, target_url):
        async with await psycopg.AsyncConnection.connect(url) as conn:
            sides.append(await catalog.read_side(conn, ["app"], "a side"))
    facts = Facts(TENANT, Tenancy("tenant_id"), {"app": "app"}, *sides, connections_wanted=0)
    shape, refusals = judge_again(facts, Shape({}, (), fresh=False))
    assert refusals == ()
    return shape


@asynccontextmanager
async def owned_rig(pair, binders_per_tenant=20, *, made=False, capture=Capture.WAL):
    """Binders on both sides, those of other tenants on the target as well; what others refer to tells of a
    change of its tenant."""
    for url in (pair.source, pair.target):
        with psycopg.connect(url) as conn:
            if not made:
                conn.execute(binders.ddl("app"))
            binders.make_ids(conn)
    with psycopg.connect(pair.source) as conn:
        binders.seed(conn, "app", [TENANT, OTHER], binders_per_tenant)
        conn.execute(binders.ON_BOTH.replace("{schema}", "app"))
    shape = await shape_of(pair.source, pair.target)
    async with AsyncExitStack() as stack:
        r = await stack.enter_async_context(
            rig(
                pair.source,
                pair.target,
                subject=Subject(shape.tables, ddl="", identity=""),
                capture=capture,
            )
        )
        await prepare(r, shape, capture)
        yield r


@asynccontextmanager
async def made_rig(pair, ddl, capture, *, careful=False):
    """Tables of the test's own, empty."""
    for url in (pair.source, pair.target):
        execute(url, ddl)
    shape = await shape_of(pair.source, pair.target)
    subject = Subject(shape.tables, ddl="", identity="", careful=careful)
    async with rig(pair.source, pair.target, subject=subject, capture=capture) as r:
        await prepare(r, shape, capture)
        yield r


async def prepare(r: Rig, shape: Shape, capture: Capture) -> None:
    """What the stream needs; guards that capture are there already."""
    if capture is Capture.WAL:
        needs = [IdentityNeed(t.source, t.identity, t.key) for t in shape.tables]
        await identity.ensure_identities(r.source, r.migration, needs, quiet)
        await r.fence.install([t.holding(Side.SOURCE) for t in shape.tables], "open", quiet)


async def differences(r) -> dict:
    """What the two sides do not have in common at a consistent point."""
    async with AsyncExitStack() as lifetime, r.follower.hold(lifetime) as point:
        with psycopg.connect(r.source_url) as source, psycopg.connect(r.target_url) as target:
            source.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
            source.execute(f"set transaction snapshot '{point.snapshot_id}'")
            ours, theirs = (binders.rows_of(conn, "app", TENANT) for conn in (source, target))
            others = binders.rows_of_others(target, "app", TENANT)
            assert sum(map(len, ours.values())) > 0
    differing = {
        t: {"missing": set(ours[t]) - set(theirs[t]), "extra": set(theirs[t]) - set(ours[t])}
        for t in ours
        if ours[t] != theirs[t]
    }
    return differing | {f"others {t}": rows for t, rows in others.items() if rows}


@every_combination
async def test_the_target_is_the_source_at_every_consistent_point(pair, capture):
    async with owned_rig(pair, capture=capture) as r, r.following():
        async with binders.changing(pair.source, "app", [TENANT, OTHER]) as committed:
            await r.copy().run()
            points = 0
            while points < 8 or committed[0] < 50:
                assert await differences(r) == {}
                points += 1
        await r.follower.catch_up_once()
        assert await differences(r) == {}


async def test_truncating_what_others_belong_to_empties_them_too(pair, capture):
    async with owned_rig(pair, binders_per_tenant=3, capture=capture) as r, r.following():
        await r.copy().run()
        execute(pair.source, "truncate app.sheets cascade")
        execute(pair.source, "insert into app.sheets (binder_id) select id from app.binders")
        await r.follower.catch_up_once()
        assert await differences(r) == {}
        execute(pair.source, "truncate app.marks")
        execute(pair.source, "truncate app.binders cascade")
        execute(pair.source, "insert into app.binders (tenant_id, code) values (%s, 'last')", TENANT)
        await r.follower.catch_up_once()
        assert await differences(r) == {}


async def test_a_subtree_comes_and_goes_with_its_binder(pair, capture):
    async with owned_rig(pair, binders_per_tenant=3, capture=capture) as r, r.following():
        await r.copy().run()
        count = "select count(*) from app.marks"
        assert execute(pair.target, count) == [(36,)]
        execute(pair.source, "update app.binders set tenant_id = %s where tenant_id = %s", TENANT, OTHER)
        await r.follower.catch_up_once()
        assert execute(pair.target, count) == [(72,)]
        assert await differences(r) == {}
        some = "(select id from app.binders order by id limit 4)"
        execute(pair.source, f"update app.binders set tenant_id = %s where id in {some}", OTHER)
        await r.follower.catch_up_once()
        assert execute(pair.target, count) == [(24,)]
        assert await differences(r) == {}


async def test_another_tenants_rows_on_the_target_are_never_touched(pair, capture):
    """Also where its keys are those of rows that leave the tenant, or never were his, on the source."""
    of_others = (
        "select s.id from app.sheets s join app.binders b on b.id = s.binder_id where b.tenant_id = %s"
    )
    async with owned_rig(pair, binders_per_tenant=3, capture=capture) as r, r.following():
        sheets = [id for (id,) in execute(pair.source, of_others, OTHER)]
        with psycopg.connect(pair.target) as conn:
            conn.execute(
                "insert into app.binders (id, tenant_id, code) overriding system value"
                " values (900001, %s, 'theirs')",
                (OTHER,),
            )
            conn.execute("insert into app.sheets (id, binder_id) select unnest(%s), 900001", (sheets,))
            conn.execute("insert into app.marks select unnest(%s::bigint[]), 'red', 1", (sheets,))
            before = binders.rows_of_others(conn, "app", TENANT)
        await r.copy().run()
        execute(pair.source, "update app.sheets set place = 7 where id = any(%s)", sheets)
        execute(pair.source, "update app.marks set weight = 7 where sheet_id = any(%s)", sheets)
        execute(pair.source, "delete from app.sheets where id = any(%s)", sheets[:2])
        execute(pair.source, "update app.binders set tenant_id = %s where id = 1", OTHER)
        await r.follower.catch_up_once()
        with psycopg.connect(pair.target) as conn:
            assert binders.rows_of_others(conn, "app", TENANT) == before
            assert not execute(pair.target, "select from app.binders where id = 1")


async def test_the_fence_holds_what_is_the_tenants_by_its_owner(pair, capture):
    """Writers of the tenant's rows hold its lock, those of other tenants' do not."""
    async with owned_rig(pair, binders_per_tenant=2, capture=capture):
        held = "select count(*) from pg_locks where locktype = 'advisory' and pid = pg_backend_pid()"
        writes = (
            "insert into app.marks select id, 'new', 1 from app.sheets where binder_id = {id}",
            "update app.sheets set place = 1 where binder_id = {id}",
            "delete from app.remarks where sheet_id in (select id from app.sheets where binder_id = {id})",
            "update app.stickers set note = 'x' from app.binders b where code = binder_code and b.id = {id}",
        )
        for tenant, locks in ((TENANT, 1), (OTHER, 0)):
            ((binder,),) = execute(
                pair.source, "select min(id) from app.binders where tenant_id = %s", tenant
            )
            for write in writes:
                with psycopg.connect(pair.source) as conn:
                    assert conn.execute(write.format(id=binder)).rowcount > 0
                    assert conn.execute(held).fetchone() == (locks,), write
                    conn.rollback()


@pytest.mark.parametrize("level", ["read committed", "repeatable read", "serializable"])
async def test_a_writer_with_an_old_snapshot_is_not_fooled_about_whose_a_row_is(pair, level, capture):
    """The sheet's binder came to the tenant after the writer's snapshot: it writes under the tenant's lock,
    or not at all."""
    async with owned_rig(pair, binders_per_tenant=2, capture=capture):
        ((binder,),) = execute(pair.source, "select min(id) from app.binders where tenant_id = %s", OTHER)
        with psycopg.connect(pair.source) as writer:
            writer.execute(f"set transaction isolation level {level}")
            writer.execute("select count(*) from app.binders")
            execute(pair.source, "update app.binders set tenant_id = %s where id = %s", TENANT, binder)
            write = "update app.marks set weight = 0 from app.sheets where id = sheet_id and binder_id = %s"
            if level == "read committed":
                writer.execute(write, (binder,))
                held = "select count(*) from pg_locks where locktype = 'advisory' and pid = pg_backend_pid()"
                assert writer.execute(held).fetchone() == (1,)
            else:
                with pytest.raises(psycopg.errors.SerializationFailure):
                    writer.execute(write, (binder,))


async def test_everything_of_the_guards_goes(pair, capture):
    async with owned_rig(pair, binders_per_tenant=2, capture=capture) as r:
        await r.fence.remove([], quiet)
        functions = "select count(*) from pg_proc where pronamespace = 'mover'::regnamespace"
        triggers = "select count(*) from pg_trigger where tgname like 'mover%'"
        assert execute(pair.source, functions) == execute(pair.source, triggers) == [(0,)]


async def test_an_application_without_rights_of_ours_writes_owned_rows(pair, capture):
    role = f"app_{uuid4().hex[:8]}"
    execute(pair.source, "alter default privileges revoke execute on functions from public")
    async with owned_rig(pair, binders_per_tenant=2, capture=capture):
        with psycopg.connect(pair.source) as conn:
            conn.execute(f"create role {role}; grant usage on schema app to {role}")
            conn.execute(f"grant select, update on all tables in schema app to {role}; set local role {role}")
            assert conn.execute("update app.sheets set place = 3").rowcount == 24
            conn.rollback()


class Uncounted:
    """A compare.Counter that nobody looks at."""

    def expect(self, rows: int) -> None: ...

    def compared(self, rows: int) -> None: ...


async def test_verify_compares_owned_rows_without_a_plan(pair, capture):
    question = Question(
        TENANT, Secret(pair.source), Secret(pair.target), {"app": "app"}, Tenancy("tenant_id")
    )
    async with owned_rig(pair, binders_per_tenant=2, capture=capture) as r, r.following():
        await r.copy().run()
        found = await compare(question, Uncounted())
        assert found.equal
        assert {t.source.name for t in found.pairing.tables} == set(binders.TABLES)
        execute(pair.target, "update app.marks set weight = -1 where kind = 'red'")
        found = await compare(question, Uncounted())
        assert [str(m.table) for m in found.verdict.mismatches] == ["app.marks"]


async def test_a_cascade_in_several_pieces_takes_every_child_with_it(pair, monkeypatch, capture):
    """The owners' deletions come first, in a piece of their own."""
    monkeypatch.setattr("mover.postgres.replication.PIECE_BYTES", 200)
    monkeypatch.setattr("mover.engine.follow_stream.BATCH_BYTES", 1)
    for url in (pair.source, pair.target):
        with psycopg.connect(url) as conn:
            conn.execute(binders.ddl("app").replace("deferrable initially deferred", ""))
    async with owned_rig(pair, binders_per_tenant=3, made=True, capture=capture) as r, r.following():
        execute(pair.source, "delete from app.labels")
        await r.copy().run()
        execute(
            pair.source,
            "delete from app.binders where id in (select id from app.binders where tenant_id = %s"
            " order by id limit 2)",
            TENANT,
        )
        await r.follower.catch_up_once()
        assert await differences(r) == {}


@pytest.mark.parametrize("level", ["read committed", "repeatable read", "serializable"])
async def test_no_owner_changes_its_parent_under_a_writer_that_looked_it_up(pair, level, capture):
    async with owned_rig(pair, binders_per_tenant=2, capture=capture):
        of = "(select min(id) from app.binders where tenant_id = %s)"
        ((sheet,),) = execute(pair.source, f"select min(id) from app.sheets where binder_id = {of}", OTHER)
        with psycopg.connect(pair.source) as writer:
            writer.execute(f"set transaction isolation level {level}")
            writer.execute("insert into app.marks values (%s, 'late', 1)", (sheet,))
            with pytest.raises(psycopg.errors.LockNotAvailable), psycopg.connect(pair.source) as mover:
                mover.execute("set local lock_timeout = '100ms'")
                mover.execute(f"update app.sheets set binder_id = {of} where id = %s", (TENANT, sheet))


@pytest.mark.parametrize("level", ["repeatable read", "serializable"])
async def test_a_writer_with_an_old_snapshot_sees_that_an_owner_changed_its_parent(pair, level, capture):
    async with owned_rig(pair, binders_per_tenant=2, capture=capture):
        of = "(select min(id) from app.binders where tenant_id = %s)"
        ((sheet,),) = execute(pair.source, f"select min(id) from app.sheets where binder_id = {of}", OTHER)
        with psycopg.connect(pair.source) as writer:
            writer.execute(f"set transaction isolation level {level}")
            writer.execute("select count(*) from app.sheets")
            execute(pair.source, f"update app.sheets set binder_id = {of} where id = %s", TENANT, sheet)
            with pytest.raises(psycopg.errors.SerializationFailure):
                writer.execute("insert into app.marks values (%s, 'late', 1)", (sheet,))


HELD = "select count(*) from pg_locks where locktype = 'advisory' and pid = pg_backend_pid()"


def sheet_of(url: str, tenant) -> int:
    ((sheet,),) = execute(
        url,
        "select min(s.id) from app.sheets s join app.binders b on b.id = binder_id where tenant_id = %s",
        tenant,
    )
    return sheet


@pytest.mark.parametrize("level", ["read committed", "repeatable read", "serializable"])
async def test_an_owner_that_others_change_meanwhile_is_in_nobodys_way(pair, level, capture):
    """Neither by a lock that the guards take, nor because a writer's snapshot is older."""
    async with owned_rig(pair, binders_per_tenant=2, capture=capture):
        sheet, patience = sheet_of(pair.source, OTHER), "-c lock_timeout=2s"
        with (
            psycopg.connect(pair.source, options=patience) as one,
            psycopg.connect(pair.source, options=patience) as two,
            psycopg.connect(pair.source, options=patience) as three,
        ):
            for conn, place in ((one, 1), (two, 2)):
                conn.execute(f"set transaction isolation level {level}")
                conn.execute("select count(*) from app.binders")
                conn.execute("insert into app.marks values (%s, %s, 1)", (sheet, f"kind {place}"))
            three.execute("update app.binders set title = 'other' where tenant_id = %s", (OTHER,))
            three.commit()
            if level == "read committed":  # older snapshots may not change the same row, mover or not
                one.execute("update app.sheets set place = 1 where id = %s", (sheet,))
            one.execute("update app.marks set weight = 2 where sheet_id = %s and kind = 'kind 1'", (sheet,))
            assert one.execute(HELD).fetchone() == two.execute(HELD).fetchone() == (0,)
            one.commit()
            two.execute("update app.marks set weight = 2 where sheet_id = %s and kind = 'kind 2'", (sheet,))
            two.commit()
        assert execute(pair.source, "select sum(weight) from app.marks where kind like 'kind %'") == [(4,)]


async def test_a_held_owner_is_not_waited_for(pair, capture):
    """What is written under it may become the tenant's: the fence waits for it. Once the tenant has left,
    nothing can, and it is let through."""
    async with owned_rig(pair, binders_per_tenant=2, capture=capture) as r:
        sheet = sheet_of(pair.source, OTHER)
        patience = "-c lock_timeout=2s"
        with psycopg.connect(pair.source) as holder, psycopg.connect(pair.source, options=patience) as writer:
            holder.execute("select from app.sheets where id = %s for update", (sheet,))
            write = "update app.marks set weight = weight + 1 where sheet_id = %s"
            assert writer.execute(write, (sheet,)).rowcount > 0
            assert writer.execute(HELD).fetchone() == (1,)
            writer.rollback()
            await r.fence.get_ready()
            await r.fence.close(1.0)
            await r.fence.move_away()
            await r.fence.let_go()
            assert writer.execute(write, (sheet,)).rowcount > 0
            writer.commit()
            with pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
                writer.execute(write, (sheet_of(pair.source, TENANT),))


_MADE_ANEW = {
    "a binder, by two statements": [
        "delete from app.binders where id = {binder}",
        "insert into app.binders (id, tenant_id, code) values ({binder}, '{to}', 'anew')",
    ],
    "a binder's number, by one statement": [
        "with old as (update app.binders set id = 700001 where id = {binder} returning id)"
        " insert into app.binders (id, tenant_id, code) select {binder}, '{to}', 'anew' from old",
    ],
    "a sheet": [
        "delete from app.sheets where id = {sheet}",
        "insert into app.sheets (id, binder_id)"
        " select {sheet}, min(id) from app.binders where tenant_id = '{to}'",
    ],
    "a sheet's number": [
        "update app.sheets set id = 700002 where id = {sheet}",
        "insert into app.sheets (id, binder_id)"
        " select {sheet}, min(id) from app.binders where tenant_id = '{to}'",
    ],
}


@pytest.mark.parametrize("statements", _MADE_ANEW.values(), ids=_MADE_ANEW)
@pytest.mark.parametrize("comes", [True, False], ids=["to the tenant", "from the tenant"])
async def test_what_waits_under_a_deferrable_key_goes_with_the_owner_made_anew(
    pair, statements, comes, capture
):
    """Labels wait for their binder, slips for their sheet, without a change of their own."""
    for url in (pair.source, pair.target):
        with psycopg.connect(url) as conn:
            conn.execute(binders.ddl("app"))
            conn.execute(
                "create table app.slips (id bigint primary key, sheet_id bigint not null"
                " references app.sheets deferrable initially deferred)"
            )
    async with owned_rig(pair, binders_per_tenant=2, made=True, capture=capture) as r, r.following():
        was, to = (OTHER, TENANT) if comes else (TENANT, OTHER)
        execute(pair.source, "insert into app.slips select id, id from app.sheets")
        execute(pair.source, "delete from app.remarks")
        await r.copy().run()
        ((binder,),) = execute(pair.source, "select min(id) from app.binders where tenant_id = %s", was)
        ((sheet,),) = execute(pair.source, "select max(id) from app.sheets where binder_id = %s", binder)
        if "app.binders" in statements[0]:
            execute(pair.source, "delete from app.slips")
        with psycopg.connect(pair.source) as conn:
            for statement in statements:
                conn.execute(statement.format(binder=binder, sheet=sheet, to=to))
        await r.follower.catch_up_once()
        assert await differences(r) == {}
        owned = (
            "select count(*) from app.slips where sheet_id = %s"
            if "app.sheets" in statements[0]
            else "select count(*) from app.labels where binder_id = %s"
        )
        number = sheet if "app.sheets" in statements[0] else binder
        assert execute(pair.source, owned, number) == [(1,)]
        assert execute(pair.target, owned, number) == [(int(comes),)]


HANDED_ON = {
    "by a change of the number": "with old as (update app.folders set id = 50 where id = 1 returning id)",
    "by a deletion": "with old as (delete from app.folders where id = 1 returning id)",
}


@pytest.mark.parametrize("careful", [False, True], ids=["replica role", "foreign keys act"])
@pytest.mark.parametrize("first", HANDED_ON.values(), ids=HANDED_ON)
@pytest.mark.parametrize("comes", [True, False], ids=["to the tenant", "from the tenant"])
async def test_what_takes_no_action_goes_with_a_number_that_one_statement_hands_on(
    pair, first, comes, careful, capture
):
    """NO ACTION is checked when the statement has ended: the papers stay, and are another tenant's."""
    ddl = """
create schema app;
create table app.folders (id bigint primary key, tenant_id uuid not null);
create table app.papers (id bigint primary key, folder_id bigint not null references app.folders, note text);
"""
    async with made_rig(pair, ddl, capture, careful=careful) as r, r.following():
        was, to = (OTHER, TENANT) if comes else (TENANT, OTHER)
        execute(pair.source, "insert into app.folders values (1, %s), (2, %s)", was, to)
        execute(pair.source, "insert into app.papers values (10, 1, 'stays'), (20, 2, '')")
        await r.copy().run()
        execute(pair.source, f"{first} insert into app.folders select 1, %s from old", to)
        await r.follower.catch_up_once()
        papers = "select p.id from app.papers p join app.folders f on f.id = folder_id"
        ours = execute(pair.source, f"{papers} where tenant_id = %s order by 1", TENANT)
        assert execute(pair.target, f"{papers} order by 1") == ours
        assert execute(pair.target, "select id from app.papers order by 1") == ours
        assert len(ours) == (2 if comes else 0)


async def test_an_owner_told_by_a_date_is_found_whatever_the_writers_datestyle(pair, capture):
    """A row trigger tells of it, and writes dates as the stream does."""
    ddl = (
        "create schema app; create table app.days (day date primary key, tenant_id uuid not null);"
        "create table app.entries (id bigint primary key, day date not null references app.days)"
    )
    async with made_rig(pair, ddl, capture) as r:
        execute(
            pair.source, "insert into app.days values ('2026-02-03', %s), ('0044-03-15 BC', %s)", OTHER, OTHER
        )
        execute(pair.source, "insert into app.entries values (1, '2026-02-03'), (2, '0044-03-15 BC')")
        async with r.following():
            await r.copy().run()
            with psycopg.connect(pair.source) as conn:
                conn.execute("set datestyle = 'German'")
                conn.execute("update app.days set tenant_id = %s", (TENANT,))
            await r.follower.catch_up_once()
            assert execute(pair.target, "select id from app.entries order by id") == [(1,), (2,)]


async def test_what_comes_to_an_owner_that_is_still_to_be_read_comes_with_it(pair, monkeypatch, capture):
    """The owner's number changed without its large value being sent, and those that refer to the new number
    arrive in later pieces of the same transaction."""
    monkeypatch.setattr("mover.postgres.replication.PIECE_BYTES", 200)
    monkeypatch.setattr("mover.engine.follow_stream.BATCH_BYTES", 1)
    ddl = (
        "create schema app; create table app.files"
        " (id bigint generated always as identity primary key, tenant_id uuid not null, body text not null);"
        "alter table app.files alter body set storage external;"
        "create table app.pages (id bigint primary key, file_id bigint not null references app.files)"
    )
    async with made_rig(pair, ddl, capture) as r:
        body = "insert into app.files (tenant_id, body) values (%s, repeat('large ', 2000))"
        execute(pair.source, body, TENANT)
        async with r.following():
            await r.copy().run()
            with psycopg.connect(pair.source) as conn:
                conn.execute("update app.files set id = default")
                conn.execute("insert into app.pages select n, id from app.files, generate_series(1, 20) n")
            await r.follower.catch_up_once()
            pages = "select p.id from app.pages p join app.files f on f.id = file_id order by p.id"
            assert execute(pair.target, pages) == execute(pair.source, pages) != []


DOCUMENTS = """
create schema app;
create table app.documents (tenant_id uuid not null, id bigint primary key, title text);
create table app.versions
    (id bigint primary key, document bigint {given} references app.documents, note text);
create table app.pages (id bigint primary key, version bigint not null references app.versions, note text);
"""
GIVEN, OPTIONAL = DOCUMENTS.format(given="not null"), DOCUMENTS.format(given="")


def expect_same_documents(pair) -> None:
    for table in ("documents", "versions", "pages"):
        content = f"select * from app.{table} order by id"
        assert execute(pair.target, content) == execute(pair.source, content)


CHILDREN_FIRST = {
    "by one statement": [
        "with made as (insert into app.documents values ('{tenant}', 1, 'x'))"
        " insert into app.versions values (10, 1, 'n')"
    ],
    "by a loader": [
        "set session_replication_role = replica",
        "insert into app.versions values (10, 1, 'n')",
        "insert into app.documents values ('{tenant}', 1, 'x')",
    ],
}


@pytest.mark.parametrize("statements", CHILDREN_FIRST.values(), ids=CHILDREN_FIRST)
async def test_a_row_that_is_made_before_its_owner_comes_with_it(pair, statements, capture):
    """Foreign keys are checked behind the statement, and in it the owner may come last."""
    async with made_rig(pair, GIVEN, capture) as r, r.following():
        await r.copy().run()
        with psycopg.connect(pair.source) as conn:
            for statement in statements:
                conn.execute(statement.format(tenant=TENANT))
        await r.follower.catch_up_once()
        assert execute(pair.target, "select id from app.versions") == [(10,)]
        expect_same_documents(pair)


async def test_a_row_that_is_nobodys_on_the_target_is_not_taken_for_the_tenants(pair, capture):
    async with made_rig(pair, OPTIONAL, capture) as r:
        await r.follower.start()
        execute(pair.source, "insert into app.documents values (%s, 1, 'x')", TENANT)
        await r.copy().run()
        execute(pair.target, "insert into app.versions values (10, null, 'a template')")
        execute(pair.source, "insert into app.versions values (10, 1, 'n')")
        with pytest.raises(ApplyConflict):
            async with asyncio.timeout(20):
                await r.follower.run()
        assert execute(pair.target, "select note from app.versions") == [("a template",)]


async def test_where_foreign_keys_are_checked_a_chain_comes_that_was_written_too(pair):
    """Each of its rows is known by itself, and by the document that came to the tenant."""
    async with made_rig(pair, GIVEN, Capture.TRIGGER, careful=True) as r, r.following():
        execute(pair.source, "insert into app.documents values (%s, 1, 'x')", OTHER)
        execute(pair.source, "insert into app.versions values (10, 1, 'n')")
        execute(pair.source, "insert into app.pages values (100, 10, 'n')")
        await r.copy().run()
        with psycopg.connect(pair.source) as conn:
            conn.execute("update app.documents set tenant_id = %s", (TENANT,))
            conn.execute("update app.versions set note = 'late'")
            conn.execute("update app.pages set note = 'late'")
        await r.follower.catch_up_once()
        expect_same_documents(pair)
