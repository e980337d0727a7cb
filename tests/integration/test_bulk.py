"""Copying in chunks: every row exactly once, whatever the key's type and whoever dies."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from uuid import uuid4

import psycopg
import pytest

from mover.core.copying import Chunk
from mover.core.errors import ApplyConflict, LeaseLost, Unreachable
from mover.core.ids import Epoch, MigrationId, TableRef
from mover.core.secret import Secret
from mover.core.tables import Column, MovedTable, Shape
from mover.postgres import agent
from mover.postgres.bulk import BulkCopier, BulkWorker
from mover.postgres.connect import Database, Identity
from tests.support.rig import OTHER, TENANT, execute
from tests.support.waiting import until

REF = TableRef("app", "item")


def table(*key: Column) -> MovedTable:
    tenant = Column("tenant_id", "uuid", "uuid", not_null=True)
    columns = (tenant, *key, Column("note", "text", "text"))
    names = tuple(column.name for column in key)
    # So wide, as far as the plan knows, that chunks are as small as they get: 1000 rows.
    return MovedTable(REF, REF, columns, names, "tenant_id", estimated_rows=1, estimated_bytes=100 << 20)


@dataclass
class Case:
    """A table by its key: `values` gives the key's columns for a number g."""

    key: tuple[Column, ...]
    values: str

    @property
    def ddl(self) -> str:
        columns = ", ".join(f'"{c.name}" {DDL_OF.get(c.source_type, c.source_type)}' for c in self.key)
        names = ", ".join(f'"{c.name}"' for c in self.key)
        return (
            "CREATE SCHEMA app; CREATE TABLE app.item"
            f" (tenant_id uuid NOT NULL, {columns}, note text, PRIMARY KEY ({names}))"
        )

    @property
    def table(self) -> MovedTable:
        return table(*self.key)


def column(name: str, kind: str) -> Column:
    return Column(name, kind, kind, not_null=True, collatable=kind in ("text", "character varying(40)"))


# The copy path knows a column's type, not its collation.
DDL_OF = {"text": 'text COLLATE "{collation}"'}
CASES = {
    "bigint": Case((column("id", "bigint"),), "g * 7 - 9000"),
    "uuid": Case((column("id", "uuid"),), "md5(g::text)::uuid"),
    "text": Case(
        (column("id", "text"),),
        "chr(mod(g, 3) * 32 + 65) || E'\\'é\\\\' || repeat('ä', mod(g, 4)) || g",
    ),
    "composite": Case((column("a", "text"), column("b", "integer")), "'group ' || mod(g, 5), -g"),
    "numeric and date": Case(
        (column("n", "numeric"), column("Da%y", "date")), "mod(g, 3) / 3.0, date '2000-01-01' + g"
    ),
}


@dataclass
class Copying:
    source_url: str
    target_url: str
    source: Database
    table: MovedTable
    identity: Identity
    copier: BulkCopier

    @asynccontextmanager
    async def worker(self) -> AsyncIterator[BulkWorker]:
        async with self.snapshot() as snapshot_id, self.copier.worker(snapshot_id) as worker:
            yield worker

    @asynccontextmanager
    async def snapshot(self) -> AsyncIterator[str]:
        async with self.source.connect("point") as conn, conn.transaction():
            await conn.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
            row = await (await conn.execute("SELECT pg_export_snapshot()")).fetchone()
            yield row[0]

    async def plan(self) -> list[Chunk]:
        async with self.snapshot() as snapshot_id:
            return list(await self.copier.plan_chunks(self.table, snapshot_id))

    async def recorded(self) -> list[Chunk]:
        return list((await self.copier.chunks())[REF])

    def rows(self, url: str) -> list:
        return execute(url, "SELECT t::text FROM app.item t WHERE tenant_id = %s ORDER BY 1", TENANT)


@asynccontextmanager
async def copying(
    source_url: str, target_url: str, case: Case, rows: int, note: str = "'n'"
) -> AsyncIterator:
    collation = execute(source_url, NON_C_COLLATION)[0][0]
    for url in (source_url, target_url):
        execute(url, case.ddl.format(collation=collation))
    insert(source_url, case, 1, rows, note)
    execute(
        source_url,
        f"INSERT INTO app.item SELECT %s, {case.values} FROM generate_series(90001, 90500) g",
        OTHER,
    )
    identity = Identity(MigrationId(uuid4()), Epoch(1))
    source = Database(Secret(source_url), "source", identity, limit=10)
    target = Database(Secret(target_url), "target", identity, limit=10)
    await agent.install(target, identity)
    copier = BulkCopier(source, target, Shape({}, (case.table,), fresh=False), TENANT, identity)
    yield Copying(source_url, target_url, source, case.table, identity, copier)


NON_C_COLLATION = """
SELECT collname FROM pg_collation WHERE collprovider <> 'd' AND collname NOT IN ('C', 'POSIX', 'ucs_basic')
   AND collencoding IN (-1, pg_char_to_encoding('UTF8'))
 ORDER BY collname <> 'en-x-icu', collname <> 'und-x-icu', collname LIMIT 1
"""


def insert(url: str, case: Case, first: int, last: int, note: str = "'n'") -> None:
    execute(
        url,
        f"INSERT INTO app.item SELECT %s, {case.values}, {note}"
        " FROM generate_series(%s::integer, %s::integer) g",
        TENANT,
        first,
        last,
    )


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
async def test_chunks_cover_every_row_exactly_once(case, pair):
    async with copying(pair.source, pair.target, case, rows=3500) as c:
        planned = await c.plan()
        assert len(planned) == 4
        # Rows that come later belong to one of the chunks, too: below, between and above.
        insert(pair.source, case, -2000, 0)
        insert(pair.source, case, 3501, 4200)
        async with c.worker() as worker:
            for chunk in reversed(planned):  # the primary key refuses a row that comes twice
                rows, size = await worker.copy(c.table, chunk)
                assert rows > 0 and size > rows
        assert c.rows(pair.target) == c.rows(pair.source)
        assert len(c.rows(pair.target)) == 6201
        recorded = await c.recorded()
        assert all(chunk.done for chunk in recorded)
        assert sum(chunk.rows for chunk in recorded) == 6201
        assert execute(pair.target, "SELECT count(*) FROM app.item WHERE tenant_id = %s", OTHER) == [(0,)]


async def test_a_tenant_without_rows_is_one_empty_chunk(pair):
    async with copying(pair.source, pair.target, CASES["bigint"], rows=0) as c:
        (chunk,) = await c.plan()
        assert (chunk.lo, chunk.hi) == (None, None)
        async with c.worker() as worker:
            assert await worker.copy(c.table, chunk) == (0, 0)
        assert [chunk.done for chunk in await c.recorded()] == [True]


@pytest.mark.parametrize("side", ["source", "target"])
async def test_a_backend_that_dies_within_a_chunk_leaves_nothing_of_it(pair, side):
    async with copying(pair.source, pair.target, CASES["bigint"], 900, note=WIDE) as c:
        (chunk,) = await c.plan()
        with pytest.raises(Unreachable, match=side):
            async with c.worker() as worker:
                with stopped_halfway(pair.target):
                    task = asyncio.create_task(worker.copy(c.table, chunk))
                    await until(lambda: waits_halfway(pair.target))
                    end_copy(getattr(pair, side))
                await task
        await expect_nothing(c)
        async with c.worker() as worker:
            await worker.copy(c.table, chunk)
        assert c.rows(pair.target) == c.rows(pair.source)


async def test_a_cancelled_chunk_leaves_nothing_of_it(pair):
    async with copying(pair.source, pair.target, CASES["bigint"], 900, note=WIDE) as c:
        (chunk,) = await c.plan()
        with pytest.raises(asyncio.CancelledError):
            async with c.worker() as worker:
                with stopped_halfway(pair.target):
                    task = asyncio.create_task(worker.copy(c.table, chunk))
                    await until(lambda: waits_halfway(pair.target))
                    task.cancel()
                    await asyncio.wait([task])
                await task
        await until(lambda: backends(pair.target) == backends(pair.source) == 0)
        await expect_nothing(c)


async def test_a_zombie_copies_nothing(pair):
    async with copying(pair.source, pair.target, CASES["bigint"], 10) as c:
        (chunk,) = await c.plan()
        async with c.worker() as worker:
            execute(pair.target, "UPDATE mover.owner SET epoch = epoch + 1")
            with pytest.raises(LeaseLost):
                await worker.copy(c.table, chunk)
        with pytest.raises(LeaseLost):
            await c.plan()
        await expect_nothing(c)


async def test_another_tenants_row_with_the_same_key_is_a_conflict(pair):
    async with copying(pair.source, pair.target, CASES["bigint"], 10) as c:
        (chunk,) = await c.plan()
        execute(pair.target, "INSERT INTO app.item SELECT %s, 7 * 5 - 9000, 'theirs'", OTHER)
        async with c.worker() as worker:
            with pytest.raises(ApplyConflict):
                await worker.copy(c.table, chunk)
        await expect_nothing(c)
        assert execute(pair.target, "SELECT note FROM app.item") == [("theirs",)]


async def expect_nothing(c: Copying) -> None:
    assert c.rows(c.target_url) == []
    assert not any(chunk.done for chunk in await c.recorded())


WIDE = "repeat(md5(g::text), 2000)"  # 900 rows are far more than all buffers between the servers hold
HALFWAY = 2222


def stopped_halfway(url: str):
    """Rows are copied into `app.item` up to the 300th of them, which waits for us."""
    execute(
        url,
        f"""
        CREATE FUNCTION app.wait() RETURNS trigger LANGUAGE plpgsql AS
            'BEGIN PERFORM pg_advisory_xact_lock({HALFWAY}); RETURN NEW; END';
        CREATE TRIGGER wait BEFORE INSERT ON app.item FOR EACH ROW
            WHEN (NEW.id = 300 * 7 - 9000) EXECUTE FUNCTION app.wait();
        ALTER TABLE app.item ENABLE ALWAYS TRIGGER wait;
        """,
    )
    conn = psycopg.connect(url, autocommit=True)
    conn.execute("SELECT pg_advisory_lock(%s)", (HALFWAY,))
    return conn


def waits_halfway(url: str) -> bool:
    query = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND objid = %s AND NOT granted"
    return execute(url, query, HALFWAY) == [(1,)]


def end_copy(url: str) -> None:
    query = """SELECT pg_terminate_backend(pid) FROM pg_stat_activity
                WHERE application_name ~ '/copy$' AND datname = current_database()"""
    execute(url, query)


def backends(url: str) -> int:
    query = """SELECT count(*) FROM pg_stat_activity
                WHERE application_name ~ '/copy$' AND datname = current_database()"""
    return execute(url, query)[0][0]
