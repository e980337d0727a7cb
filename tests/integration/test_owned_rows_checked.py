"""Owned rows on a target where foreign keys act on what we write. What is kept:

> Outside a transaction the target is the source at some snapshot, and no foreign key's action on the target
> has an effect that the source did not have.
"""

from __future__ import annotations

import asyncio
import random
from contextlib import asynccontextmanager, suppress

import psycopg
import pytest

from mover.core.errors import ApplyConflict
from mover.postgres import change_log
from tests.integration.test_owned_rows import differences, made_rig, prepare, shape_of
from tests.support import binders
from tests.support.rig import OTHER, TENANT, Subject, execute, rig


@pytest.fixture(autouse=True)
def in_small_pieces(monkeypatch):
    """What is written down is read in several, between which the point is asked other things."""
    monkeypatch.setattr(change_log, "BATCH_ROWS", 20)


# Links have the tenant column, and refer to owned papers from outside; papers refer to each other.
PAPERS = """
create schema app;
create table app.folders (id bigint primary key, tenant_id uuid not null, code text not null unique);
create table app.papers (
    id bigint primary key,
    folder_id bigint not null references app.folders on delete cascade on update cascade,
    after bigint references app.papers on delete {action},
    note text
);
create table app.stamps (
    id bigint primary key,
    paper_id bigint references app.papers on delete set null on update cascade,
    folder_code text references app.folders (code) on delete set null on update cascade
);
create table app.links (
    tenant_id uuid not null,
    id bigint primary key,
    paper_id bigint default 100 references app.papers on delete {action} on update cascade
);
"""
ROWS = """
insert into app.folders values (1, '{tenant}', 'one'), (2, '{tenant}', 'two'), (3, '{other}', 'three');
insert into app.papers values (100, 2, null, ''), (101, 1, 100, ''), (102, 2, 101, ''), (103, 3, null, '');
insert into app.stamps values (1000, 101, null), (1001, null, 'one'), (1002, 102, 'two'), (1003, 103, null);
insert into app.links values ('{tenant}', 10, 101), ('{tenant}', 11, 102), ('{tenant}', 12, null);
"""
CONTENT = {
    "folders": "select f::text from app.folders f where tenant_id = %(tenant)s order by 1",
    "papers": "select p::text from app.papers p join app.folders f on f.id = p.folder_id"
    " where f.tenant_id = %(tenant)s order by 1",
    "stamps": "select s::text from app.stamps s where exists (select from app.folders f"
    " where f.tenant_id = %(tenant)s and (f.code = s.folder_code"
    " or f.id = (select folder_id from app.papers p where p.id = s.paper_id))) order by 1",
    "links": "select l::text from app.links l where tenant_id = %(tenant)s order by 1",
}


def rows_of(url: str) -> dict[str, list]:
    with psycopg.connect(url) as conn:
        return {table: conn.execute(query, {"tenant": TENANT}).fetchall() for table, query in CONTENT.items()}


@asynccontextmanager
async def papers_rig(pair, capture, action="cascade", rows=ROWS):
    """Copied, and followed."""
    async with made_rig(pair, PAPERS.format(action=action), capture, careful=True) as r:
        execute(pair.source, rows.format(tenant=TENANT, other=OTHER))
        async with r.following():
            await r.copy().run()
            assert rows_of(pair.target) == rows_of(pair.source)
            yield r


def at_once(url: str, *statements: str) -> None:
    """In one transaction."""
    with psycopg.connect(url) as conn:
        for statement in statements:
            conn.execute(statement.format(tenant=TENANT, other=OTHER))


async def expect_same(pair, r) -> None:
    await r.follower.catch_up_once()
    assert rows_of(pair.target) == rows_of(pair.source)


ACTIONS = ("cascade", "set null", "set default", "no action", "restrict")


@pytest.mark.parametrize("action", ACTIONS)
async def test_what_refers_to_rows_that_are_read_again_stays_as_it_is(pair, capture, action):
    """A folder leaves the tenant and comes back: nothing of what hangs on it has changed."""
    async with papers_rig(pair, capture, action) as r:
        at_once(
            pair.source,
            "update app.folders set tenant_id = '{other}' where id = 1",
            "update app.papers set note = 'late' where id = 101",
            "update app.folders set tenant_id = '{tenant}' where id = 1",
        )
        await expect_same(pair, r)


@pytest.mark.parametrize("action", ACTIONS)
async def test_a_subtree_comes_and_goes_with_its_owner(pair, capture, action):
    async with papers_rig(pair, capture, action) as r:
        at_once(
            pair.source,
            "update app.links set paper_id = null where paper_id = 101",
            "update app.papers set after = null where after = 101",
            "update app.folders set tenant_id = '{other}' where id = 1",
            "update app.folders set tenant_id = '{tenant}' where id = 3",
            "insert into app.links values ('{tenant}', 20, 103)",
        )
        await expect_same(pair, r)
        assert execute(pair.target, "select id from app.papers order by id") == [(100,), (102,), (103,)]
        at_once(
            pair.source,
            "update app.folders set tenant_id = '{tenant}'",
            "update app.links set paper_id = 101 where id = 10",
        )
        await expect_same(pair, r)


HISTORIES = {
    "a paper goes to another folder": ["update app.papers set folder_id = 2 where id = 101"],
    "a paper goes to another tenant's folder": [
        "update app.links set paper_id = null",
        "update app.papers set after = null where id = 102",
        "update app.papers set folder_id = 3 where id = 101",
    ],
    "a paper comes from another tenant's folder": [
        "update app.papers set folder_id = 1, after = 102 where id = 103",
        "insert into app.links values ('{tenant}', 21, 103)",
    ],
    "a folder is deleted": [
        "update app.links set paper_id = 100",
        "update app.papers set after = null where id = 102",
        "delete from app.folders where id = 1",
    ],
    "folders are deleted one by one": [
        "update app.links set paper_id = null",
        "update app.papers set after = null",
        "delete from app.folders where id = 2",
        "insert into app.folders values (2, '{other}', 'anew')",
        "delete from app.folders where id = 1",
    ],
    "a folder's code changes": ["update app.folders set code = code || '+' where id < 3"],
    "a stamp moves from folder to paper": [
        "update app.stamps set folder_code = null, paper_id = 100 where id = 1001"
    ],
    "a folder is made with all below it": [
        "insert into app.folders values (4, '{tenant}', 'four')",
        "insert into app.papers values (104, 4, 101, '')",
        "insert into app.stamps values (1004, 104, 'four')",
        "insert into app.links values ('{tenant}', 22, 104)",
    ],
    "folders come and go and those who stay change": [
        "update app.folders set tenant_id = '{tenant}' where id = 3",
        "insert into app.papers values (104, 3, 103, ''), (105, 1, 104, '')",
        "update app.links set paper_id = 105 where id = 12",
        "update app.papers set after = 105 where id = 103",
        "insert into app.folders values (5, '{other}', 'five')",
        "insert into app.papers values (106, 5, null, '')",
    ],
    "a folder is given a number that another had": [
        "update app.folders set id = 9 where id = 1",
        "insert into app.folders values (1, '{other}', 'anew')",
    ],
    "a table is emptied": ["truncate app.papers cascade", "insert into app.papers values (107, 1, null, '')"],
    "a folder leaves, and all is emptied": [
        "update app.folders set tenant_id = '{other}' where id = 1",
        "truncate app.papers cascade",
        "insert into app.papers values (107, 2, null, ''), (108, 1, null, '')",
        "insert into app.links values ('{tenant}', 23, 107)",
    ],
}


@pytest.mark.parametrize("one_by_one", [True, False], ids=["one by one", "as sets"])
@pytest.mark.parametrize("history", HISTORIES.values(), ids=HISTORIES)
async def test_the_target_becomes_what_the_source_became(pair, capture, history, one_by_one, monkeypatch):
    if not one_by_one:
        monkeypatch.setattr("mover.postgres.apply.SMALL_BATCH", 0)
    async with papers_rig(pair, capture) as r:
        at_once(pair.source, *history)
        await expect_same(pair, r)
        at_once(pair.source, "update app.papers set note = note || '!'")
        await expect_same(pair, r)


async def test_a_row_that_would_be_acted_upon_without_having_changed_stops_the_migration(pair, capture):
    """A link to another tenant's paper cannot be where foreign keys are checked."""
    async with papers_rig(pair, capture) as r:
        before = rows_of(pair.target)
        at_once(pair.source, "update app.folders set tenant_id = '{other}' where id = 1")
        with pytest.raises(ApplyConflict):
            async with asyncio.timeout(20):
                await r.follower.catch_up_once()
        assert rows_of(pair.target) == before


async def test_nothing_is_taken_along_by_a_row_that_goes_to_another_tenants_owner(pair, capture):
    """On the source it has not been deleted, and what refers to it is still there."""
    ddl = """
create schema app;
create table app.folders (id bigint primary key, tenant_id uuid not null);
create table app.papers (id bigint primary key, folder_id bigint not null references app.folders);
create table app.links
    (tenant_id uuid not null, id bigint primary key, paper_id bigint references app.papers on delete cascade);
"""
    async with made_rig(pair, ddl, capture, careful=True) as r, r.following():
        execute(pair.source, "insert into app.folders values (1, %s), (2, %s)", TENANT, OTHER)
        execute(pair.source, "insert into app.papers values (10, 1)")
        execute(pair.source, "insert into app.links values (%s, 100, 10)", TENANT)
        await r.copy().run()
        execute(pair.source, "update app.papers set folder_id = 2")
        with pytest.raises(ApplyConflict):
            async with asyncio.timeout(20):
                await r.follower.catch_up_once()
        assert execute(pair.target, "select id from app.links") == [(100,)]


@pytest.mark.parametrize("wave_seconds", [0.0, 600.0])
async def test_what_refers_to_owned_rows_is_copied_behind_them(pair, capture, wave_seconds):
    async with made_rig(pair, PAPERS.format(action="cascade"), capture, careful=True) as r, r.following():
        execute(pair.source, ROWS.format(tenant=TENANT, other=OTHER))
        await r.copy(wave_seconds=wave_seconds).run()
        await expect_same(pair, r)


@asynccontextmanager
async def binders_rig(pair, capture):
    for url in (pair.source, pair.target):
        with psycopg.connect(url) as conn:
            conn.execute(binders.ddl("app"))
            binders.make_ids(conn)
    with psycopg.connect(pair.source) as conn:
        binders.seed(conn, "app", [TENANT, OTHER], 20)
    shape = await shape_of(pair.source, pair.target)
    subject = Subject(shape.tables, ddl="", identity="", careful=True)
    async with rig(pair.source, pair.target, subject=subject, capture=capture) as r:
        await prepare(r, shape, capture)
        yield r


async def test_the_target_is_the_source_at_every_consistent_point(pair, capture):
    async with binders_rig(pair, capture) as r, r.following():
        async with binders.changing(pair.source, "app", [TENANT, OTHER], 1, 0.1) as committed:
            await r.copy().run()
            points = 0
            while points < 4 or committed[0] < 50:
                assert await differences(r) == {}
                points += 1
        await r.follower.catch_up_once()
        assert await differences(r) == {}


@pytest.mark.parametrize("are_made", [True, False], ids=["keys made", "keys not made yet"])
@pytest.mark.parametrize("seed", range(2))
async def test_any_history_between_two_points_ends_as_on_the_source(pair, capture, seed, are_made):
    rng = random.Random(seed)
    async with binders_rig(pair, capture) as r, r.following():
        await r.copy().run()
        if not are_made:  # as on a fresh target before its indexes are built
            drop_foreign_keys(pair.target)
        async with await psycopg.AsyncConnection.connect(pair.source, autocommit=True) as conn:
            for _ in range(20):
                for _ in range(rng.randint(1, 3)):
                    with suppress(psycopg.errors.IntegrityError):
                        await binders.change_once(conn, "app", [TENANT, OTHER], rng, rehoming=0.3)
                assert await differences(r) == {}


def drop_foreign_keys(url: str) -> None:
    with psycopg.connect(url) as conn:
        found = conn.execute(
            "select format('alter table %s drop constraint %I', conrelid::regclass, conname)"
            " from pg_constraint where contype = 'f' and connamespace = 'app'::regnamespace"
        ).fetchall()
        for (statement,) in found:
            conn.execute(statement)


async def test_a_transaction_in_several_pieces_is_read_at_a_point_from_where_it_has_to_be(
    pair, monkeypatch, capture
):
    monkeypatch.setattr("mover.postgres.replication.PIECE_BYTES", 200)
    monkeypatch.setattr("mover.engine.follow_stream.BATCH_BYTES", 1)
    async with papers_rig(pair, capture) as r:
        at_once(
            pair.source,
            "insert into app.papers select n, 1, 101, 'many' from generate_series(200, 250) n",
            "update app.folders set tenant_id = '{tenant}' where id = 3",
            "insert into app.folders values (6, '{tenant}', 'six')",
            "insert into app.papers select n, 6, 103, 'many' from generate_series(300, 350) n",
            "update app.papers set folder_id = 6 where id between 200 and 225",
            "delete from app.papers where id between 220 and 240",
            "update app.links set paper_id = 301",
        )
        await expect_same(pair, r)


@pytest.mark.parametrize(
    "crossing",
    [
        "update app.papers set folder_id = 2 where id = 3",
        "update app.papers set folder_id = 3 where id = 4",
        "update app.folders set tenant_id = '{tenant}' where id = 3",
        "update app.folders set tenant_id = '{other}' where id = 4",
    ],
    ids=["a paper comes", "a paper leaves", "a folder comes", "a folder leaves"],
)
async def test_rows_exchange_unique_values_while_others_come_or_leave(pair, capture, crossing):
    ddl = """
create schema app;
create table app.folders (id bigint primary key, tenant_id uuid not null);
create table app.papers
    (id bigint primary key, folder_id bigint not null references app.folders, place int not null unique);
"""
    papers = "select p::text from app.papers p join app.folders f on f.id = folder_id where tenant_id = %s"
    async with made_rig(pair, ddl, capture, careful=True) as r:
        folders = "insert into app.folders values (1, %s), (2, %s), (3, %s), (4, %s)"
        execute(pair.source, folders, TENANT, TENANT, OTHER, TENANT)
        execute(pair.source, "insert into app.papers select n, n, n from generate_series(1, 4) n")
        async with r.following():
            await r.copy().run()
            at_once(
                pair.source,
                "update app.papers set place = -1 where id = 1",
                "update app.papers set place = 1 where id = 2",
                "update app.papers set place = 2 where id = 1",
                crossing,
            )
            await r.follower.catch_up_once()
        found = execute(pair.target, f"{papers} order by 1", TENANT)
        assert found == execute(pair.source, f"{papers} order by 1", TENANT) != []


async def test_a_row_with_an_identity_beside_its_key_keeps_what_hangs_on_it(pair, capture):
    ddl = """
create schema app;
create table app.folders
    (id bigint primary key, tenant_id uuid not null, number int generated always as identity, note text);
create table app.papers
    (id bigint primary key, folder_id bigint not null references app.folders on delete cascade);
"""
    async with made_rig(pair, ddl, capture, careful=True) as r:
        execute(pair.source, "insert into app.folders values (1, %s)", TENANT)
        execute(pair.source, "insert into app.papers values (10, 1)")
        async with r.following():
            await r.copy().run()
            execute(pair.source, "update app.folders set note = 'x'")
            await r.follower.catch_up_once()
        assert execute(pair.target, "select * from app.folders") == execute(
            pair.source, "select * from app.folders"
        )
        assert execute(pair.target, "select id from app.papers") == [(10,)]
