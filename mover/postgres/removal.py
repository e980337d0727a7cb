"""Removing a tenant's rows from a side that is left, or whose move was called off.

Always scoped to the tenant, in batches with a pause between them, each in a transaction that holds the
owner row. Repeatable: what is gone is gone.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import psycopg
from psycopg import sql

from mover.core.crash import reach
from mover.core.ids import TableRef, TenantId
from mover.core.tables import Holding
from mover.postgres import holdings, owner, roles
from mover.postgres.connect import Database, Identity

BATCH_ROWS = 5_000
# The pause after a batch, as a share of the time it took: other tenants get the larger part.
REST_SHARE = 0.5
Say = Callable[[str], Awaitable[None]]


async def remove_rows(
    database: Database,
    tables: Sequence[Holding],
    tenant: TenantId,
    identity: Identity,
    say: Say,
    *,
    careful: bool = False,
) -> int:
    """Delete the tenant's rows of `tables` (parents first, owners before what they own), children first.

    `careful`: foreign keys are in force."""
    removed = 0
    held = {holding.table: holding for holding in tables}
    async with _connection(database, tenant, careful) as conn:
        groups = [((holding.table,), False) for holding in reversed(tables)]
        for group, at_once in await roles.children_first(conn, held) if careful else groups:
            own = [held[table] for table in group]
            if at_once:
                count = await _whole(conn, own, tenant, identity)
            else:
                count = await _in_batches(conn, own[0], tenant, identity)
            if count:
                names = ", ".join(map(str, group))
                await say(f"removed {count} rows from {names} on the {database.label}")
            removed += count
    return removed


async def holds_rows(database: Database, tables: Sequence[Holding], tenant: TenantId) -> bool:
    """Whether any of `tables` has a row of the tenant's. Reads only."""
    async with database.borrow("removal") as conn:
        for holding in tables:
            statement = sql.SQL("SELECT EXISTS (SELECT FROM {} AS t WHERE {})").format(
                holdings.named(holding.table), holdings.is_tenants(holding, "t", tenant)
            )
            row = await (await conn.execute(statement)).fetchone()
            if row is not None and row[0]:
                return True
    return False


async def _in_batches(
    conn: psycopg.AsyncConnection[tuple[Any, ...]],
    holding: Holding,
    tenant: TenantId,
    identity: Identity,
) -> int:
    """Partition by partition: a row's place is its own in its partition only."""
    count = 0
    for part in await _parts(conn, holding.table):
        while batch := await _one_batch(conn, replace(holding, table=part), tenant, identity):
            count += batch
    return count


async def _whole(
    conn: psycopg.AsyncConnection[tuple[Any, ...]],
    tables: Sequence[Holding],
    tenant: TenantId,
    identity: Identity,
) -> int:
    """Rows that may refer to each other, in one statement: foreign keys are checked when it ends.

    Locks: ROW EXCLUSIVE and the tenant's rows, which nobody writes any more."""
    deletes = [
        sql.SQL("{} AS (DELETE FROM {} AS t WHERE {} RETURNING 1)").format(
            sql.Identifier(f"d{number}"),
            holdings.named(holding.table),
            holdings.is_tenants(holding, "t", tenant),
        )
        for number, holding in enumerate(tables)
    ]
    counts = [
        sql.SQL("(SELECT count(*) FROM {})").format(sql.Identifier(f"d{number}"))
        for number in range(len(tables))
    ]
    statement = sql.SQL("WITH {} SELECT {}").format(sql.SQL(", ").join(deletes), sql.SQL(" + ").join(counts))
    async with conn.transaction():
        await owner.hold(conn, identity)
        row = await (await conn.execute(statement)).fetchone()
        assert row is not None
    reach("removal.batch")
    return int(row[0])


@asynccontextmanager
async def _connection(
    database: Database, tenant: TenantId, careful: bool
) -> AsyncIterator[psycopg.AsyncConnection[tuple[Any, ...]]]:
    settings = roles.settings(tenant, careful=careful)
    async with database.connect("removal", **settings, lock_timeout="5s") as conn:
        yield conn


async def _parts(conn: psycopg.AsyncConnection[tuple[Any, ...]], table: TableRef) -> list[TableRef]:
    """The tables that store the rows of `table`: its partitions, or itself."""
    name = sql.Identifier(table.schema, table.name).as_string(None)
    cursor = await conn.execute(_PARTS, {"table": name})
    return [TableRef(*found) for found in await cursor.fetchall()]


async def _one_batch(
    conn: psycopg.AsyncConnection[tuple[Any, ...]],
    holding: Holding,
    tenant: TenantId,
    identity: Identity,
) -> int:
    """Locks: ROW EXCLUSIVE and the batch's rows, for one batch."""
    statement = sql.SQL(
        "DELETE FROM {table} AS t WHERE {tenants} AND t.ctid = ANY (ARRAY("
        "SELECT t.ctid FROM {table} AS t WHERE {tenants} LIMIT {rows}))"
    ).format(
        table=holdings.named(holding.table),
        tenants=holdings.is_tenants(holding, "t", tenant),
        rows=sql.Literal(BATCH_ROWS),
    )
    loop = asyncio.get_running_loop()
    started = loop.time()
    async with conn.transaction():
        await owner.hold(conn, identity)
        cursor = await conn.execute(statement)
    reach("removal.batch")
    if cursor.rowcount == BATCH_ROWS:
        await asyncio.sleep((loop.time() - started) * REST_SHARE)
    return cursor.rowcount


_PARTS = """
SELECT n.nspname, c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE c.relkind = 'r' AND coalesce(pg_partition_root(c.oid), c.oid) = %(table)s::regclass
 ORDER BY 1, 2
"""
