"""verify.ports on SQL: reads one side's rows of a tenant under one snapshot and hashes their COPY text.

The proof must not share a mistake with what it proves: nothing here is used by the copy or the apply.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import asyncpg
from psycopg import sql

from mover.core.ids import Side, TenantId
from mover.core.tables import MovedTable
from mover.postgres.connect import Database
from mover.postgres.digest_queries import BYTEWISE_COLUMNS, DigestQueries, queries_of
from mover.postgres.errors import translate
from verify.compare import Fingerprints, compare
from verify.digest import Digest, LeafDigest, LeafHasher
from verify.leaves import WHOLE, Key, KeyRange, Part
from verify.report import Verdict

WORKERS = 2
# Plans must be cheap, and the same while statistics are young: keys are looked up one by one in an index.
# Neither parallel workers nor the JIT compiler may take the server's cores from other tenants.
SETTINGS: Mapping[str, str] = {
    "enable_hashjoin": "off",
    "enable_mergejoin": "off",
    "jit": "off",
    "max_parallel_workers_per_gather": "0",
    "work_mem": "16MB",
}


@dataclass
class DigestReaders:
    """Open connections to one side, from which snapshots are read, one after the other."""

    database: Database
    side: Side
    connections: Sequence[asyncpg.Connection[Any]]
    # Composed once and kept over all snapshots, so that the check under the fence need not ask again.
    queries: dict[MovedTable, DigestQueries] = field(default_factory=dict)
    # By table, the columns in our order: looked up once, so that a later snapshot need not.
    bytewise: dict[MovedTable, frozenset[str]] = field(default_factory=dict)

    @asynccontextmanager
    async def at_snapshot(
        self, tenant: TenantId, snapshot_id: str | None = None
    ) -> AsyncIterator[SnapshotReader]:
        """All connections under the exported snapshot `snapshot_id`, or under a new one of their own."""
        try:
            with translate(self.database.label):
                leader, *others = self.connections
                snapshot_id = await _begin(leader, snapshot_id)
                for other in others:
                    await _begin(other, snapshot_id)
            yield SnapshotReader(self, tenant)
        finally:
            for connection in self.connections:
                await _end(connection)


@asynccontextmanager
async def open_readers(
    database: Database, side: Side, workers: int = WORKERS
) -> AsyncIterator[DigestReaders]:
    """Connect `workers` times; to be done before a pause, not inside it."""
    async with AsyncExitStack() as stack:
        connections = [
            await stack.enter_async_context(database.connect_bulk("verify", **SETTINGS))
            for _ in range(workers)
        ]
        yield DigestReaders(database, side, connections)


class SnapshotReader:
    """A verify.ports.DigestReader."""

    def __init__(self, readers: DigestReaders, tenant: TenantId) -> None:
        self._readers = readers
        self._tenant = tenant
        self._idle: asyncio.LifoQueue[_Session] = asyncio.LifoQueue()
        for connection in readers.connections:
            self._idle.put_nowait(_Session(connection))

    async def seekable(self, table: MovedTable) -> bool:
        async with self._session() as session:
            return (await self._queries_of(table, session)).seekable

    async def boundaries(self, table: MovedTable, within: KeyRange, rows_per_leaf: int) -> list[Key]:
        async with self._session() as session:
            queries = await self._queries_of(table, session)
            await session.allow_scans(within == WHOLE)
            rows = await session.connection.fetch(queries.boundaries(within, rows_per_leaf))
        return [tuple(row) for row in rows]

    async def digest(self, table: MovedTable, part: Part) -> LeafDigest:
        hasher = LeafHasher()

        async def hash_piece(text: bytes) -> None:
            hasher.update(text)

        async with self._session() as session:
            queries = await self._queries_of(table, session)
            await session.allow_scans(part == WHOLE)
            status = await session.connection.copy_from_query(queries.rows(part), output=hash_piece)
        return hasher.finish(rows=int(status.removeprefix("COPY ")))

    async def row_digests(self, table: MovedTable, part: Part) -> Mapping[Key, Digest]:
        async with self._session() as session:
            queries = await self._queries_of(table, session)
            await session.allow_scans(part == WHOLE)
            rows = await session.connection.fetch(queries.row_digests(part))
        return {tuple(row[:-1]): row[-1] for row in map(tuple, rows)}

    async def column_digests(self, table: MovedTable, keys: Sequence[Key]) -> Mapping[Key, Sequence[Digest]]:
        async with self._session() as session:
            queries = await self._queries_of(table, session)
            width = len(queries.table.key)
            await session.allow_scans(False)
            rows = await session.connection.fetch(queries.column_digests(keys))
        return {tuple(row[:width]): row[width:] for row in map(tuple, rows)}

    @asynccontextmanager
    async def _session(self) -> AsyncIterator[_Session]:
        session = await self._idle.get()
        try:
            with translate(self._readers.database.label):
                yield session
        finally:
            self._idle.put_nowait(session)

    async def _queries_of(self, table: MovedTable, session: _Session) -> DigestQueries:
        side, bytewise = self._readers.side, self._readers.bytewise
        if table not in bytewise:
            name = table.source if side is Side.SOURCE else table.target
            quoted = sql.Identifier(name.schema, name.name).as_string(None)
            columns = await session.connection.fetch(BYTEWISE_COLUMNS, quoted)
            bytewise[table] = frozenset(column for (column,) in columns)
        return queries_of(table, side, self._tenant, bytewise[table])


async def verify_databases(
    source: Database,
    target: Database,
    tables: Sequence[MovedTable],
    tenant: TenantId,
    fingerprints: Fingerprints | None = None,
    *,
    workers: int = WORKERS,
    progress: Callable[[int], None] | None = None,
) -> Verdict:
    """Compare all of the tenant's rows, each side under a snapshot of its own, taken now."""
    async with (
        open_readers(source, Side.SOURCE, workers) as ours,
        open_readers(target, Side.TARGET, workers) as theirs,
        ours.at_snapshot(tenant) as source_now,
        theirs.at_snapshot(tenant) as target_now,
    ):
        return await compare(tables, source_now, target_now, fingerprints=fingerprints, progress=progress)


@dataclass
class _Session:
    """A connection inside its transaction."""

    connection: asyncpg.Connection[Any]
    scans_tables: bool = True  # what enable_seqscan is

    async def allow_scans(self, allowed: bool) -> None:
        """One leaf of many must never scan the table; a whole table may be scanned."""
        if allowed is not self.scans_tables:
            word = "on" if allowed else "off"
            await self.connection.execute("SELECT set_config('enable_seqscan', $1, true)", word)
            self.scans_tables = allowed


async def _begin(connection: asyncpg.Connection[Any], snapshot_id: str | None) -> str:
    """Under `snapshot_id`, or under a new snapshot; which one."""
    begin = sql.SQL("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
    if snapshot_id is None:
        await connection.execute(begin.as_string(None))
        return str(await connection.fetchval("SELECT pg_export_snapshot()"))
    import_snapshot = sql.SQL("{}; SET TRANSACTION SNAPSHOT {}").format(begin, sql.Literal(snapshot_id))
    await connection.execute(import_snapshot.as_string(None))
    return snapshot_id


async def _end(connection: asyncpg.Connection[Any]) -> None:
    """A connection that cannot even roll back is dead: what broke it has been raised already."""
    with suppress(asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, OSError):
        await connection.execute("ROLLBACK")
