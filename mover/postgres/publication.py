"""One publication and one slot per migration, both named after it.

The publication is committed before the slot exists, and never made again while the slot lives: decoding
reads the catalog as of the WAL position. The slot exports no snapshot: reading tables through such a
snapshot can hide committed rows for good on a saturated server (PostgreSQL 15 to 18).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

import psycopg
from psycopg import sql

from mover.core.crash import reach
from mover.core.errors import LockNotAvailable, SlotLost
from mover.core.ids import Lsn, MigrationId, TableRef, TenantId
from mover.core.snapshot import Snapshot
from mover.core.tables import MovedTable
from mover.postgres import owner
from mover.postgres.connect import Database, Identity
from mover.postgres.locks import with_lock_timeout

# Slot creation waits for every open write transaction of the cluster; each try waits this long.
SLOT_LOCK_TIMEOUT_MS = 10_000
Say = Callable[[str], Awaitable[None]]


def name_of(migration: MigrationId) -> str:
    """The publication's and the slot's name: at most 63 bytes, unique per migration."""
    return f"mover_{migration.hex}"


async def create_publication(
    database: Database, migration: MigrationId, tables: Sequence[MovedTable], tenant: TenantId, say: Say
) -> None:
    """Publish the changes of the tenant's rows of `tables`; those that are published already are left alone.

    A table that comes later must be copied from a point after `create_slot` has returned once more.
    Locks: SHARE UPDATE EXCLUSIVE on each table, under a lock timeout: writers are not blocked."""
    name = name_of(migration)
    async with database.borrow("publication") as conn:

        async def attempt() -> None:
            cursor = await conn.execute("SELECT 1 FROM pg_publication WHERE pubname = %s", (name,))
            is_new = await cursor.fetchone() is None
            published = {TableRef(*row) for row in await (await conn.execute(_PUBLISHED, (name,))).fetchall()}
            if missing := [table for table in tables if table.source not in published]:
                # TRUNCATE ignores row filters and would be every tenant's: a trigger tells of it instead.
                # A partition's rows are its root's: the two sides need not store a row in the same partition.
                statement = sql.SQL(
                    "CREATE PUBLICATION {} FOR TABLE {}"
                    " WITH (publish = 'insert, update, delete', publish_via_partition_root = true)"
                    if is_new
                    else "ALTER PUBLICATION {} ADD TABLE {}"
                )
                parts = sql.SQL(", ").join(_filtered(table, tenant) for table in missing)
                await conn.execute(statement.format(sql.Identifier(name), parts))

        await with_lock_timeout(conn, attempt, on_wait=_waiting(say))


def _filtered(table: MovedTable, tenant: TenantId) -> sql.Composed:
    """Only columns of the replica identity can filter: else every tenant's changes are published."""
    name = sql.Identifier(table.source.schema, table.source.name)
    if table.filter_column is None:
        return sql.SQL("{}").format(name)
    return sql.SQL("{} WHERE ({} = {})").format(
        name,
        sql.Identifier(table.filter_column),
        sql.Literal(str(tenant)),
    )


async def drop_publication(database: Database, migration: MigrationId, say: Say) -> None:
    statement = sql.SQL("DROP PUBLICATION IF EXISTS {}").format(sql.Identifier(name_of(migration)))
    async with database.borrow("publication", client_min_messages="warning") as conn:

        async def attempt() -> None:
            await conn.execute(statement)

        await with_lock_timeout(conn, attempt, on_wait=_waiting(say))


async def create_slot(database: Database, migration: MigrationId, say: Say) -> Lsn:
    """The slot's starting position; makes the slot if it is not there.

    Returns only when every transaction that was running beside the slot's birth has ended: one whose
    commit record the slot may have missed must not be invisible to the first consistent point."""
    name = name_of(migration)
    async with database.borrow("slot", lock_timeout=f"{SLOT_LOCK_TIMEOUT_MS}ms") as conn:
        while (lsn := await _slot_lsn(conn, name)) is None:
            try:
                await conn.execute(_CREATE_SLOT, (name,))
            except psycopg.errors.LockNotAvailable:
                await say(f"slot: waiting for open write transactions: {await _writers(conn)}")
        await _outlive_writers(conn, say)
        return lsn


async def store_start(target: Database, identity: Identity, start: Lsn) -> None:
    """The stream's starting position as the target's progress; an existing progress is kept.

    Raises SlotLost when the slot is newer than what the target has seen: changes would be missing."""
    async with target.borrow("progress") as conn, conn.transaction():
        await owner.hold(conn, identity)
        row = await (await conn.execute(_STORE_START, (identity.stream, str(start)))).fetchone()
        if row is not None and Lsn.parse(str(row[0])) < start:
            raise SlotLost("the slot was made anew: changes in between are missing")


async def store_new_start(source: Database, target: Database, identity: Identity, start: Lsn | None) -> None:
    """The target's progress is forgotten: it begins at `start`, or at the end of the source's WAL. What is
    there is not held to be the source at any moment."""
    if start is None:
        async with source.borrow("position") as conn:
            row = await (await conn.execute(_POSITION)).fetchone()
        assert row is not None
        start = Lsn.parse(str(row[0]))
    async with target.borrow("progress", synchronous_commit="on") as conn, conn.transaction():
        await owner.hold(conn, identity)
        await conn.execute(_BEGIN_HERE, (identity.stream, str(start), None))


async def skip_ahead(database: Database, migration: MigrationId) -> None:
    """What has committed so far is not wanted: the slot, which nobody reads, need not keep it."""
    async with database.borrow("slot") as conn:
        await conn.execute(_SKIP_AHEAD, (name_of(migration),))


async def begin_here(source: Database, target: Database, identity: Identity) -> None:
    """Everything that commits on the source from now on is to be applied, and nothing that has committed so
    far; durable on the target when it returns."""
    async with source.borrow("position") as conn:
        row = await (await conn.execute(_POSITION)).fetchone()
    assert row is not None
    async with target.borrow("progress", synchronous_commit="on") as conn, conn.transaction():
        await owner.hold(conn, identity)
        await conn.execute(_BEGIN_HERE, (identity.stream, *row))
    reach("cutover.way_back")


async def applied(target: Database, identity: Identity) -> Lsn:
    """Up to where the source's changes are on the target."""
    async with target.borrow("progress") as conn:
        row = await (await conn.execute(_APPLIED, (identity.stream,))).fetchone()
    return Lsn(0) if row is None else Lsn.parse(str(row[0]))


async def drop_slot(database: Database, migration: MigrationId) -> None:
    """Ends whoever reads the slot and drops it; nothing happens if it is gone."""
    name = name_of(migration)
    async with database.borrow("slot") as conn:
        for _ in range(100):
            row = await (await conn.execute(_SLOT_READER, (name,))).fetchone()
            if row is None:
                return
            if row[0] is not None:
                await conn.execute("SELECT pg_terminate_backend(%s, 1000)", (row[0],))
            try:
                await conn.execute("SELECT pg_drop_replication_slot(%s)", (name,))
            except (psycopg.errors.ObjectInUse, psycopg.errors.UndefinedObject):
                continue  # a reader came back, or somebody else dropped it: look again
    raise LockNotAvailable(f"{database.label}: slot {name} stays in use")


async def retained_bytes(
    conn: psycopg.AsyncConnection[tuple[object, ...]], migration: MigrationId
) -> tuple[int, str] | None:
    """WAL that the slot keeps on the source, and its `wal_status`; None when there is no slot."""
    row = await (await conn.execute(_RETAINED, (name_of(migration),))).fetchone()
    return None if row is None else (int(str(row[0] or 0)), str(row[1]))


def _waiting(say: Say) -> Callable[[int], Awaitable[None]]:
    async def on_wait(number: int) -> None:
        await say(f"publication: waiting for locks on the moved tables, try {number}")

    return on_wait


async def _slot_lsn(conn: psycopg.AsyncConnection[tuple[object, ...]], name: str) -> Lsn | None:
    row = await (await conn.execute(_SLOT_LSN, (name,))).fetchone()
    return None if row is None else Lsn.parse(str(row[0]))


async def _outlive_writers(conn: psycopg.AsyncConnection[tuple[object, ...]], say: Say) -> None:
    # A snapshot lists those who run only up to the last that has ended: now one has that is younger than all.
    await conn.execute("SELECT pg_current_xact_id()")
    row = await (await conn.execute("SELECT pg_current_snapshot()::text")).fetchone()
    assert row is not None
    running = Snapshot.parse(str(row[0])).in_progress
    said = False
    for xid in sorted(running):
        while True:
            row = await (await conn.execute(_XID_STATUS, (str(xid),))).fetchone()
            if row is None or row[0] != "in progress":
                break
            if not said:
                await say(f"slot: waiting for transactions beside its birth: {await _writers(conn)}")
                said = True
            await conn.execute("SELECT pg_sleep(0.02)")


async def _writers(conn: psycopg.AsyncConnection[tuple[object, ...]]) -> str:
    """The oldest writers, for people: never a query's text."""
    rows = await (await conn.execute(_WRITERS)).fetchall()
    return ", ".join(f"pid {pid} ({app}, {age})" for pid, app, age in rows) or "none left"


_APPLIED = "SELECT applied_lsn::text FROM mover.progress WHERE migration = %s"
_CREATE_SLOT = "SELECT pg_create_logical_replication_slot(%s, 'pgoutput')"
_PUBLISHED = """
SELECT n.nspname, c.relname
  FROM pg_publication p
  JOIN pg_publication_rel r ON r.prpubid = p.oid
  JOIN pg_class c ON c.oid = r.prrelid
  JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE p.pubname = %s
"""
_SLOT_LSN = "SELECT confirmed_flush_lsn::text FROM pg_replication_slots WHERE slot_name = %s"
_SLOT_READER = "SELECT active_pid FROM pg_replication_slots WHERE slot_name = %s"
_XID_STATUS = "SELECT pg_xact_status(%s::xid8)"
_STORE_START = """
INSERT INTO mover.progress AS p (migration, applied_lsn) VALUES (%s, %s)
ON CONFLICT (migration) DO UPDATE SET applied_lsn = p.applied_lsn
RETURNING applied_lsn::text
"""
_SKIP_AHEAD = """
SELECT pg_replication_slot_advance(slot_name, pg_current_wal_lsn())
  FROM pg_replication_slots WHERE slot_name = %s AND confirmed_flush_lsn < pg_current_wal_lsn()
"""
# The position before the snapshot: what commits between the two is sent, and is in the snapshot.
_POSITION = "SELECT pg_current_wal_insert_lsn()::text, pg_current_snapshot()::text"
_BEGIN_HERE = """
INSERT INTO mover.progress (migration, applied_lsn, snapshot) VALUES (%s, %s, %s)
ON CONFLICT (migration) DO UPDATE SET applied_lsn = excluded.applied_lsn, snapshot = excluded.snapshot
"""
_RETAINED = """
SELECT pg_wal_lsn_diff(pg_current_wal_lsn(), restart_lsn), wal_status
  FROM pg_replication_slots WHERE slot_name = %s
"""
_WRITERS = """
SELECT pid, coalesce(nullif(application_name, ''), '-'), (clock_timestamp() - xact_start)::interval(0)::text
  FROM pg_stat_activity
 WHERE backend_xid IS NOT NULL AND pid <> pg_backend_pid()
 ORDER BY xact_start LIMIT 3
"""
