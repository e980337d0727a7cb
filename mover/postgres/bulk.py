"""Chunks from a snapshot of the source into the target: COPY's bytes pass through, never decoded.

A chunk's rows and its journal line (`mover.chunk`) commit in one target transaction, which holds the
owner row: a chunk is there exactly once, whoever died.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from itertools import pairwise
from typing import Any

import asyncpg
from psycopg import sql

from mover.core.copying import Chunk, Key
from mover.core.crash import reach
from mover.core.errors import Unreachable, first_error
from mover.core.ids import Side, TableRef, TenantId
from mover.core.tables import MovedTable, Shape
from mover.postgres import holdings, owner, ranges, roles
from mover.postgres.connect import Database, Identity
from mover.postgres.errors import translate

CHUNK_BYTES = 24 << 20  # about a second of work: what a crash repeats
MIN_CHUNK_ROWS, MAX_CHUNK_ROWS = 1_000, 200_000
BLOCK_BYTES = 256 << 10  # COPY hands out rows one by one: coalesce before writing
QUEUE_BLOCKS = 8


class BulkCopier:
    """Implements ports.Copier."""

    def __init__(
        self, source: Database, target: Database, shape: Shape, tenant: TenantId, identity: Identity
    ) -> None:
        self._source, self._target = source, target
        self._shape, self._tenant, self._identity = shape, tenant, identity

    async def plan_chunks(
        self, table: MovedTable, snapshot_id: str, *, done: bool = False
    ) -> Sequence[Chunk]:
        bounds = [] if await self._is_whole(table) else await self._bounds(table, snapshot_id)
        edges: list[Key | None] = [None, *bounds, None]
        chunks = [Chunk(n, lo, hi, done) for n, (lo, hi) in enumerate(pairwise(edges), start=1)]
        async with self._target.borrow("chunks") as conn, conn.transaction():
            await owner.hold(conn, self._identity)
            for chunk in chunks:
                line = (chunk.number, _array(chunk.lo), _array(chunk.hi), done)
                await conn.execute(_RECORD_CHUNK, (*self._key(table.source), *line))
        reach("copy.planned")
        return chunks

    async def take_back(self, table: MovedTable, chunk: Chunk) -> None:
        """Locks: ROW EXCLUSIVE and the chunk's rows."""
        statement = sql.SQL("DELETE FROM {} AS t WHERE {} AND {}").format(
            holdings.named(table.target),
            holdings.is_tenants(table.holding(Side.TARGET), "t", self._tenant),
            ranges.in_range(table, "t", chunk.lo, chunk.hi, Side.TARGET),
        )
        settings = roles.settings(self._tenant, careful=Side.TARGET in self._shape.careful)
        async with self._target.connect("chunks", **settings) as conn, conn.transaction():
            await owner.hold(conn, self._identity)
            await conn.execute(statement)
            await conn.execute(_CHUNK_GONE, (*self._key(table.source), chunk.number))

    async def chunks(self) -> Mapping[TableRef, Sequence[Chunk]]:
        found: dict[TableRef, list[Chunk]] = {}
        async with self._target.borrow("chunks") as conn:
            rows = await (await conn.execute(_READ_CHUNKS, (self._identity.stream,))).fetchall()
        for schema, name, number, lo, hi, done, count, size in rows:
            chunk = Chunk(number, lo and tuple(lo), hi and tuple(hi), done, count, size)
            found.setdefault(TableRef(schema, name), []).append(chunk)
        return found

    @asynccontextmanager
    async def worker(self, snapshot_id: str) -> AsyncIterator[BulkWorker]:
        settings = roles.settings(self._tenant, careful=Side.TARGET in self._shape.careful)
        async with (
            self._source.connect_bulk("copy") as source,
            self._target.connect_bulk("copy", **settings) as target,
        ):
            await _import_snapshot(source, snapshot_id)
            yield BulkWorker(self, source, target)
            await source.execute("ROLLBACK")

    def query(self, table: MovedTable, chunk: Chunk) -> str:
        """The rows of one chunk; in key order where the target maintains indexes meanwhile."""
        in_any_order = self._shape.fresh or not table.key
        order = sql.SQL("") if in_any_order else sql.SQL(" ORDER BY {}")
        return (
            sql.SQL("SELECT {} FROM {} AS t WHERE {} AND {}{}")
            .format(
                ranges.columns(table.copied, "t"),
                holdings.named(table.source),
                holdings.is_tenants(table.holding(Side.SOURCE), "t", self._tenant),
                ranges.in_range(table, "t", chunk.lo, chunk.hi, Side.SOURCE),
                order.format(ranges.order_key(table, "t")),
            )
            .as_string(None)
        )

    async def commit_chunk(
        self, target: asyncpg.Connection[Any], table: MovedTable, chunk: Chunk, rows: int, size: int
    ) -> None:
        key = self._key(table.source)
        await target.execute(_CHUNK_DONE, *key, chunk.number, rows, size)

    async def hold_owner(self, target: asyncpg.Connection[Any]) -> None:
        await owner.hold_bulk(target, self._identity)

    def labels(self) -> tuple[str, str]:
        return self._source.label, self._target.label

    async def _is_whole(self, table: MovedTable) -> bool:
        """Whether one statement has to bring all rows: each may refer to any other of them."""
        if not self._shape.checks_while_copying:
            return False
        async with self._target.borrow("chunks") as conn:
            return await roles.refers_to_itself(conn, table.target)

    async def _bounds(self, table: MovedTable, snapshot_id: str) -> list[Key]:
        """Keys that split the tenant's rows into chunks of about CHUNK_BYTES; none without a key."""
        if not table.key:
            return []
        width = table.estimated_bytes // max(table.estimated_rows, 1) or 200
        per_chunk = min(max(CHUNK_BYTES // width, MIN_CHUNK_ROWS), MAX_CHUNK_ROWS)
        key = ranges.order_key(table, "t")
        texts = sql.SQL(", ").join(sql.SQL("t.{}::text").format(sql.Identifier(name)) for name in table.key)
        query = sql.SQL(
            "SELECT {texts} FROM (SELECT {names}, row_number() OVER (ORDER BY {key}) AS {n}"
            " FROM {table} AS t WHERE {tenant}) AS t"
            " WHERE mod({n}, {per_chunk}) = 0 ORDER BY {n}"
        ).format(
            texts=texts,
            names=ranges.columns(table.key_columns, "t"),
            key=key,
            n=sql.Identifier(table.spare("mover_n")),
            table=holdings.named(table.source),
            tenant=holdings.is_tenants(table.holding(Side.SOURCE), "t", self._tenant),
            per_chunk=sql.Literal(per_chunk),
        )
        async with self._source.borrow("chunks") as conn, conn.transaction():
            await conn.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
            await conn.execute(sql.SQL("SET TRANSACTION SNAPSHOT {}").format(sql.Literal(snapshot_id)))
            rows = await (await conn.execute(query)).fetchall()
        return [tuple(row) for row in rows]

    def _key(self, table: TableRef) -> tuple[Any, str, str]:
        return self._identity.stream, table.schema, table.name


class BulkWorker:
    """One pair of connections that copies chunk after chunk; implements ports.ChunkWorker."""

    def __init__(
        self, copier: BulkCopier, source: asyncpg.Connection[Any], target: asyncpg.Connection[Any]
    ) -> None:
        self._copier, self._source, self._target = copier, source, target
        self._target_ended = asyncio.Event()
        target.add_termination_listener(lambda _: self._target_ended.set())

    async def copy(self, table: MovedTable, chunk: Chunk) -> tuple[int, int]:
        pipe = _Pipe()
        async with self._target.transaction():
            await self._copier.hold_owner(self._target)
            with first_error():
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(self._read(table, chunk, pipe), name=f"copy out {table.source}")
                    writing = tasks.create_task(self._write(table, pipe), name=f"copy in {table.target}")
                    watching = tasks.create_task(self._watch_target(), name="watch target")
                    writing.add_done_callback(lambda _: watching.cancel())
            rows = int(writing.result().removeprefix("COPY "))
            await self._copier.commit_chunk(self._target, table, chunk, rows, pipe.size)
            reach("copy.chunk_written")
        return rows, pipe.size

    async def _read(self, table: MovedTable, chunk: Chunk, pipe: _Pipe) -> None:
        with translate(self._copier.labels()[0]):
            await self._source.copy_from_query(self._copier.query(table, chunk), output=pipe.put)
        await pipe.end()

    async def _write(self, table: MovedTable, pipe: _Pipe) -> str:
        with translate(self._copier.labels()[1]):
            status: str = await self._target.copy_to_table(
                table.target.name,
                schema_name=table.target.schema,
                columns=[c.name for c in table.copied],
                source=pipe.blocks(),
            )
        return status

    async def _watch_target(self) -> None:
        """When the connection breaks, asyncpg goes on waiting until it may write again: for ever."""
        await self._target_ended.wait()
        raise Unreachable(f"{self._copier.labels()[1]}: the connection broke during COPY")


class _Pipe:
    """A bounded queue of coalesced blocks between COPY TO and COPY FROM."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[bytes | None] = asyncio.Queue(QUEUE_BLOCKS)
        self._parts: list[bytes] = []
        self._waiting = 0
        self.size = 0

    async def put(self, data: bytes) -> None:
        self._parts.append(data)
        self._waiting += len(data)
        if self._waiting >= BLOCK_BYTES:
            await self._flush()

    async def end(self) -> None:
        await self._flush()
        await self._queue.put(None)

    async def blocks(self) -> AsyncIterator[bytes]:
        while (block := await self._queue.get()) is not None:
            yield block

    async def _flush(self) -> None:
        if self._parts:
            self.size += self._waiting
            block = b"".join(self._parts)
            self._parts, self._waiting = [], 0
            await self._queue.put(block)


async def _import_snapshot(conn: asyncpg.Connection[Any], snapshot_id: str) -> None:
    await conn.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
    statement = sql.SQL("SET TRANSACTION SNAPSHOT {}").format(sql.Literal(snapshot_id))
    await conn.execute(statement.as_string(None))


def _array(bound: Key | None) -> list[str] | None:
    return None if bound is None else list(bound)


_RECORD_CHUNK = """
INSERT INTO mover.chunk (migration, schema_name, table_name, number, lo, hi, done)
VALUES (%s, %s, %s, %s, %s, %s, %s)
"""
_CHUNK_GONE = """
UPDATE mover.chunk SET done = false, rows = 0, bytes = 0
 WHERE migration = %s AND schema_name = %s AND table_name = %s AND number = %s
"""
_READ_CHUNKS = """
SELECT schema_name, table_name, number, lo, hi, done, rows, bytes FROM mover.chunk
 WHERE migration = %s ORDER BY schema_name, table_name, number
"""
_CHUNK_DONE = """
UPDATE mover.chunk SET done = true, rows = $5, bytes = $6
 WHERE migration = $1 AND schema_name = $2 AND table_name = $3 AND number = $4
"""
