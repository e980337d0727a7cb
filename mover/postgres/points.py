"""Consistent points and marks on the source: implements ports.ChangeSource."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import psycopg
from psycopg import sql

from mover.core.copying import CopiedRanges, Key
from mover.core.ids import Lsn, Side, TenantId
from mover.core.snapshot import Snapshot
from mover.core.tables import MovedTable
from mover.postgres import holdings, ranges
from mover.postgres.align import read_stamp
from mover.postgres.connect import Database
from mover.postgres.errors import translate
from mover.postgres.marks import EMIT_MARK

KEYS_PER_QUERY = 5_000
Connection = psycopg.AsyncConnection[tuple[Any, ...]]


@dataclass(frozen=True, slots=True)
class Point:
    """Implements ports.ConsistentPoint."""

    snapshot: Snapshot
    snapshot_id: str
    label: str
    conn: Connection = field(repr=False)  # holds the snapshot

    async def rows(
        self,
        table: MovedTable,
        tenant: TenantId,
        names: Sequence[str],
        values: Collection[Key],
        copied: CopiedRanges,
    ) -> AsyncGenerator[bytes]:
        ordered = sorted(values)
        for start in range(0, len(ordered), KEYS_PER_QUERY):
            query = sql.SQL("COPY (SELECT {} FROM {} AS t WHERE {} AND {} AND {}) TO STDOUT").format(
                ranges.columns(table.copied, "t"),
                holdings.named(table.source),
                holdings.is_tenants(table.holding(Side.SOURCE), "t", tenant),
                ranges.in_values(
                    "t", table.named(names), ordered[start : start + KEYS_PER_QUERY], Side.SOURCE
                ),
                ranges.in_ranges(table, "t", copied, Side.SOURCE),
            )
            with translate(self.label):
                async with reading(self.conn, query) as copy:
                    async for block in copy:
                        yield bytes(block)


@asynccontextmanager
async def reading(conn: Connection, query: sql.Composed) -> AsyncIterator[psycopg.AsyncCopy]:
    """What a COPY sends, in a savepoint: who stops in the middle cancels it, and the point stays. He has to
    close what he read from there and then, not when it is collected."""
    async with conn.transaction(), conn.cursor() as cursor, cursor.copy(query) as copy:
        yield copy


class Points:
    """Takes consistent points. Keeps one connection for marks and positions, so that both are quick."""

    def __init__(self, database: Database, conn: Connection) -> None:
        self._database, self._conn = database, conn

    @classmethod
    @asynccontextmanager
    async def open(cls, database: Database) -> AsyncIterator[Points]:
        # A mark must reach the stream at once, whatever the role's default.
        async with database.connect("marks", synchronous_commit="local") as conn:
            yield cls(database, conn)

    @asynccontextmanager
    async def consistent_point(self) -> AsyncIterator[Point]:
        """An ordinary snapshot, exported for the workers."""
        async with self._database.connect("point") as conn, conn.transaction():
            snapshot, snapshot_id = await take_snapshot(conn)
            yield Point(snapshot, snapshot_id, self._database.label, conn)

    async def snapshot(self) -> Snapshot:
        with translate(self._database.label):
            row = await (await self._conn.execute("SELECT pg_current_snapshot()::text")).fetchone()
        assert row is not None
        return Snapshot.parse(row[0])

    async def mark(self, token: str) -> None:
        with translate(self._database.label):
            await self._conn.execute(EMIT_MARK, (token,))

    async def schema_stamp(self, schemas: Collection[str], tenant_column: str) -> str:
        with translate(self._database.label):
            return await read_stamp(self._conn, schemas, tenant_column)

    async def wal_lsn(self) -> Lsn:
        with translate(self._database.label):
            cursor = await self._conn.execute("SELECT pg_current_wal_insert_lsn()::text")
            row = await cursor.fetchone()
        assert row is not None
        return Lsn.parse(row[0])


async def take_snapshot(conn: Connection) -> tuple[Snapshot, str]:
    """That of the transaction which has just begun, and its name for other sessions."""
    await conn.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
    row = await (await conn.execute("SELECT pg_current_snapshot()::text, pg_export_snapshot()")).fetchone()
    assert row is not None
    return Snapshot.parse(row[0]), row[1]
