"""Consistent points and marks on the source: implements ports.ChangeSource."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import psycopg

from mover.core.ids import Lsn
from mover.core.snapshot import Snapshot
from mover.postgres.connect import Database
from mover.postgres.errors import translate
from mover.postgres.marks import EMIT_MARK


@dataclass(frozen=True, slots=True)
class Point:
    """Implements ports.ConsistentPoint."""

    snapshot: Snapshot
    snapshot_id: str
    mark: str


class Points:
    """Takes consistent points. Keeps one connection for marks and positions, so that both are quick."""

    def __init__(self, database: Database, conn: psycopg.AsyncConnection[tuple[Any, ...]]) -> None:
        self._database, self._conn = database, conn

    @classmethod
    @asynccontextmanager
    async def open(cls, database: Database) -> AsyncIterator[Points]:
        async with database.connect("marks") as conn:
            yield cls(database, conn)

    @asynccontextmanager
    async def consistent_point(self) -> AsyncIterator[Point]:
        """An ordinary snapshot, exported for the workers; then a mark behind all that it sees.

        A transaction is visible only after its commit record is in the WAL, so everything that the
        snapshot sees stands before the mark."""
        async with self._database.connect("point") as conn, conn.transaction():
            await conn.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
            cursor = await conn.execute("SELECT pg_current_snapshot()::text, pg_export_snapshot()")
            row = await cursor.fetchone()
            assert row is not None
            yield Point(Snapshot.parse(row[0]), row[1], await self.mark())

    async def mark(self) -> str:
        token = uuid4().hex
        with translate(self._database.label):
            await self._conn.execute(EMIT_MARK, (token,))
        return token

    async def wal_lsn(self) -> Lsn:
        with translate(self._database.label):
            cursor = await self._conn.execute("SELECT pg_current_wal_insert_lsn()::text")
            row = await cursor.fetchone()
        assert row is not None
        return Lsn.parse(row[0])
