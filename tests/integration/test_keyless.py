"""Tables in which only whole rows can be told apart, and rows may be duplicates of each other.

> On the target are exactly as many copies of each of the tenant's rows as on the source.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import psycopg
import pytest

from mover.core.errors import ApplyConflict, SchemaChanged
from mover.core.facts import ColumnFacts
from mover.core.ids import Capture, Side, TableRef
from mover.core.tables import Column, MovedTable
from mover.engine.preflight import judge
from mover.postgres.digests import open_readers, verify_databases
from tests.conftest import every_combination
from tests.support.facts import column, facts, server, table
from tests.support.rig import OTHER, TENANT, Rig, Subject, execute, rig
from verify.compare import compare, compare_keys

REF = TableRef("app", "event")
COLUMNS = {
    "tenant_id": "uuid",
    "at": "date",
    "kind": "text",
    "amount": "numeric",
    "score": "double precision",
    "big": "text",
    "doc": "json",
    "spot": "point",
}
NOT_NULL = {"tenant_id", "at", "kind"}
EVENT = MovedTable(
    REF,
    REF,
    tuple(Column(n, t, t, not_null=n in NOT_NULL, collatable=t == "text") for n, t in COLUMNS.items()),
    key=(),
    tenant_column="tenant_id",
)
DDL = """
CREATE SCHEMA app;
CREATE TABLE app.event (
    tenant_id uuid NOT NULL, at date NOT NULL, kind text NOT NULL, amount numeric, score float8,
    big text, doc json, spot point
);
ALTER TABLE app.event ALTER big SET STORAGE EXTERNAL;
"""
EVENTS = Subject((EVENT,), DDL, "ALTER TABLE app.event REPLICA IDENTITY FULL")
CONTENT = """SELECT row(e.*)::text COLLATE "C" AS line, md5(big), count(*)
               FROM app.event e WHERE tenant_id = %s GROUP BY 1, 2 ORDER BY 1"""
# Values that are equal to another one in their type, and yet another value.
AMOUNTS = ("1", "1.00", None)
SCORES = ("0", "-0")
DOCS = ('{"a": 1}', '{"a":1}', None)
SPOTS = ("(0,0)", "(-0,0)", None)


def content(url: str, tenant: object = TENANT) -> list:
    return execute(url, CONTENT, tenant)


def random_row(rng: random.Random, tenant: object) -> tuple:
    big = rng.choice((None, "x" * 3000))
    day = f"2024-01-0{rng.randint(1, 2)}"
    values = (rng.choice(kind) for kind in (AMOUNTS, SCORES))
    return (tenant, day, "kind", *values, big, rng.choice(DOCS), rng.choice(SPOTS))


INSERT = "INSERT INTO app.event VALUES (%s, %s, %s, %s, %s, %s, %s, %s)"
ANY_ROW = """ctid = (SELECT ctid FROM app.event WHERE tenant_id = %s ORDER BY random() LIMIT 1
                      FOR UPDATE SKIP LOCKED)"""


def seed(url: str, rows: int, *tenants: object) -> None:
    """The same rows for each tenant."""
    with psycopg.connect(url) as conn:
        for tenant in tenants:
            rng = random.Random(1)
            conn.cursor().executemany(INSERT, [random_row(rng, tenant) for _ in range(rows)])


@asynccontextmanager
async def changing(url: str, seed: int = 0) -> AsyncIterator[list[int]]:
    """Two clients that change rows of the tenant without a pause; counts committed transactions."""
    committed = [0]

    async def client(number: int) -> None:
        rng = random.Random(f"{seed}/{number}")
        async with await psycopg.AsyncConnection.connect(url, autocommit=True) as conn:
            while True:
                async with conn.transaction():
                    for _ in range(rng.randint(1, 4)):
                        await change(conn, rng)
                committed[0] += 1

    tasks = [asyncio.create_task(client(number)) for number in range(2)]
    try:
        yield committed
    finally:
        for task in tasks:
            task.cancel()
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(result, asyncio.CancelledError), result


async def change(conn: psycopg.AsyncConnection, rng: random.Random) -> None:
    """Of one row among its equals; among them rows that enter and leave the tenant."""
    match rng.randint(0, 7):
        case 0 | 1 | 2:
            await conn.execute(INSERT, random_row(rng, TENANT))
        case 3 | 4:
            await conn.execute(f"DELETE FROM app.event WHERE {ANY_ROW}", (TENANT,))
        case 5:
            statement = f"UPDATE app.event SET amount = %s, score = -score WHERE {ANY_ROW}"
            await conn.execute(statement, (rng.choice(AMOUNTS), TENANT))
        case 6:
            statement = f"UPDATE app.event SET big = repeat('y', 3000), doc = %s WHERE {ANY_ROW}"
            await conn.execute(statement, (rng.choice(DOCS), TENANT))
        case 7:
            tenants = rng.sample((TENANT, OTHER), 2)
            await conn.execute(f"UPDATE app.event SET tenant_id = %s WHERE {ANY_ROW}", tenants)


@asynccontextmanager
async def events(pair, rows: int = 60, capture: Capture = Capture.WAL) -> AsyncIterator[Rig]:
    """Seeded source; the target has the other tenant's rows already."""
    async with rig(pair.source, pair.target, subject=EVENTS, capture=capture) as r:
        seed(pair.source, rows, TENANT, OTHER)
        seed(pair.target, rows, OTHER)
        yield r


async def test_a_live_table_without_a_key_arrives_with_its_duplicates(pair, capture):
    async with events(pair, capture=capture) as r, r.following():
        others = content(pair.target, OTHER)
        async with changing(pair.source) as committed:
            await r.copy().run()
            while committed[0] < 150:
                await r.follower.catch_up_once()
        await r.follower.catch_up_once()
        source = content(pair.source)
        assert content(pair.target) == source
        assert any(copies > 1 for _, _, copies in source)
        assert content(pair.target, OTHER) == others
        assert (await verify_databases(r.source, r.target, [EVENT], TENANT)).equal


async def test_of_equal_rows_the_same_one_goes_and_only_as_many(pair, capture):
    """Rows that are equal in every type, told apart by what they look like."""
    async with events(pair, rows=0, capture=capture) as r, r.following():
        alike = "('%s', '2024-01-01', 'kind', %s, %s, NULL, '%s', '%s')"
        looks = [
            alike % (TENANT, amount, score, doc, spot)
            for amount in ("1", "1.00")
            for score in ("0", "'-0'")
            for doc in ("[1]", "[ 1]")
            for spot in ("(0,0)", "(-0,0)")
        ]
        for _ in range(3):
            execute(pair.source, f"INSERT INTO app.event VALUES {', '.join(looks)}")
        await r.copy().run()
        for number in range(len(looks)):  # of the three that look like this, one goes and one changes
            one = '(SELECT ctid FROM app.event e ORDER BY row(e.*)::text COLLATE "C" OFFSET %s LIMIT 1)'
            execute(pair.source, f"DELETE FROM app.event WHERE ctid = {one}", number * 2)
            execute(pair.source, f"UPDATE app.event SET kind = 'z' WHERE ctid = {one}", number)
        await r.follower.catch_up_once()
        assert content(pair.target) == content(pair.source)


@every_combination
async def test_a_truncation_takes_what_came_before_it_and_leaves_what_comes_after(pair, capture):
    async with rig(pair.source, pair.target, subject=EVENTS, capture=capture) as r:
        seed(pair.source, 20, TENANT, OTHER)
        async with r.following():
            await r.copy().run()
            async with r.follower.paused():
                row = "INSERT INTO app.event (tenant_id, at, kind) VALUES (%s, '2024-01-01', %s)"
                with psycopg.connect(pair.source) as conn:
                    conn.execute(row, (TENANT, "before"))
                    conn.execute("DELETE FROM app.event WHERE kind = 'kind' AND amount IS NULL")
                    conn.execute("TRUNCATE app.event")
                    conn.execute(
                        """SELECT pg_logical_emit_message(true, 'mover.truncate', '["app", "event"]')"""
                    )
                    conn.execute(row, (TENANT, "after"))
                    conn.execute(row, (TENANT, "after"))
            await r.follower.catch_up_once()
            assert content(pair.target) == content(pair.source) != []


async def test_unique_values_may_change_hands_in_a_batch(pair, capture):
    """A unique column that allows NULL is no key."""
    unique = "ALTER TABLE app.event ADD UNIQUE (amount)"
    async with (
        rig(pair.source, pair.target, subject=replace(EVENTS, ddl=DDL + unique), capture=capture) as r,
        r.following(),
    ):
        numbered = f"SELECT '{TENANT}', 'epoch', 'k', n FROM generate_series(1, 9) n"
        execute(pair.source, f"INSERT INTO app.event {numbered}")
        await r.copy().run()
        for _ in range(2):
            execute(pair.source, "UPDATE app.event SET amount = 10 WHERE amount = 1")
            execute(pair.source, "UPDATE app.event SET amount = 1 WHERE amount = 2")
            execute(pair.source, "UPDATE app.event SET amount = 2 WHERE amount = 10")
        await r.follower.catch_up_once()
        assert content(pair.target) == content(pair.source)


@pytest.mark.parametrize("whose", [None, OTHER])
async def test_a_row_that_is_not_there_is_a_conflict_even_if_another_tenant_has_it(pair, whose, capture):
    async with events(pair, rows=0, capture=capture) as r:
        await r.follower.start()
        row = "'{}', '2024-01-01', 'kind', 1, 0, NULL, NULL, NULL"
        execute(pair.source, f"INSERT INTO app.event VALUES ({row.format(TENANT)})")
        await r.copy().run()
        changed = execute(pair.target, "DELETE FROM app.event RETURNING 1")
        if whose:
            execute(pair.target, f"INSERT INTO app.event VALUES ({row.format(whose)})")
        assert changed == [(1,)]
        execute(pair.source, "DELETE FROM app.event")
        with pytest.raises(ApplyConflict, match="found no row"):
            await r.follower.run()
        assert len(content(pair.target, OTHER)) == bool(whose)


async def test_changes_that_do_not_carry_whole_rows_are_not_guessed(pair):
    """Somebody changed the replica identity while the tenant moved."""
    async with events(pair, rows=0) as r:
        await r.follower.start()
        execute(pair.source, f"INSERT INTO app.event VALUES ('{TENANT}', '2024-01-01', 'kind', 1)")
        await r.copy().run()
        execute(pair.source, "CREATE UNIQUE INDEX own ON app.event (tenant_id, at, kind)")
        execute(pair.source, "ALTER TABLE app.event REPLICA IDENTITY USING INDEX own")
        execute(pair.source, "DELETE FROM app.event")
        with pytest.raises(SchemaChanged, match="not FULL any more"):
            await r.follower.run()
        assert len(content(pair.target)) == 1


@pytest.mark.parametrize("version", [16, 18])
def test_generated_columns_are_refused_where_the_server_refuses_everybody(version, request, make_database):
    url = make_database(request.getfixturevalue(f"pg{version}"))
    execute(url, EVENTS.ddl)
    execute(url, "ALTER TABLE app.event ADD twice numeric GENERATED ALWAYS AS (amount * 2) STORED")
    execute(url, EVENTS.identity)
    execute(url, f"CREATE PUBLICATION p FOR TABLE app.event WHERE (tenant_id = '{TENANT}')")
    generated = ColumnFacts("twice", "numeric", not_null=False, generated="s", identity="", collatable=False)
    columns = (column("id"), column("tenant_id"), generated)
    source = server(version_num=version * 10_000 + 9)
    refusals = judge(facts(table("event", columns=columns, indexes=()), source=source)).refusals
    try:
        execute(url, "UPDATE app.event SET amount = 1")
    except psycopg.errors.InvalidColumnReference:
        assert [f.code for f in refusals] == ["no_key_generated_columns"]
    else:
        assert refusals == ()


DAMAGE = {
    "a copy is missing": ("DELETE FROM app.event WHERE {}", "1 missing"),
    "a copy too many": ("INSERT INTO app.event SELECT * FROM app.event WHERE {}", "1 extra"),
    "a value that is equal": ("UPDATE app.event SET amount = 1.000 WHERE {}", "1 missing, 1 extra"),
    "a NULL": ("UPDATE app.event SET spot = NULL, doc = NULL, amount = 7 WHERE {}", "1 missing, 1 extra"),
}


@pytest.mark.parametrize("rows_per_leaf", [7, 20_000])
@pytest.mark.parametrize("damage", DAMAGE)
async def test_verification_counts_copies(pair, damage, rows_per_leaf):
    statement, expected = DAMAGE[damage]
    async with events(pair) as r:
        seed(pair.target, 60, TENANT)
        async with (
            open_readers(r.source, Side.SOURCE) as ours,
            open_readers(r.target, Side.TARGET) as theirs,
        ):

            async def mismatches() -> list[str]:
                async with ours.at_snapshot(TENANT) as source, theirs.at_snapshot(TENANT) as target:
                    whole = await compare([EVENT], source, target, rows_per_leaf=rows_per_leaf)
                    changed = await compare_keys({EVENT: [()]}, source, target)
                assert whole.source_rows == 60
                assert [str(m) for m in whole.mismatches] == [str(m) for m in changed.mismatches]
                return [str(m) for m in whole.mismatches]

            assert await mismatches() == []
            one = f"ctid = (SELECT ctid FROM app.event WHERE tenant_id = '{TENANT}' AND amount = 1 LIMIT 1)"
            execute(pair.target, statement.format(one))
            assert await mismatches() == [f"app.event: {expected}"]
