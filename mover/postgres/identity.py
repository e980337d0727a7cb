"""Replica identities that cover the tenant column, without which a row filter makes UPDATE and DELETE
fail for every tenant, and the columns by which owned rows refer to a table.

Recorded before they are changed; the last migration that uses one restores it.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

import psycopg
from psycopg import sql
from psycopg.rows import dict_row

from mover.core.crash import reach
from mover.core.errors import Conflict, LockNotAvailable, SchemaChanged, Where
from mover.core.facts import Relation
from mover.core.ids import MigrationId, TableRef
from mover.postgres import catalog, owner
from mover.postgres.connect import Database
from mover.postgres.locks import with_lock_timeout
from mover.sql import load

Connection = psycopg.AsyncConnection[Any]
Row = dict[str, Any]
Say = Callable[[str], Awaitable[None]]

# A concurrent build blocks nobody while it waits for old transactions, so that it may wait for longer
# than a lock that others queue behind.
BUILD_LOCK_TIMEOUT_MS = 300_000
BUILD_TRIES = 30
_TURN_TRIES = 600
_TURN_PAUSE_S = 0.5


@dataclass(frozen=True, slots=True)
class IdentityNeed:
    """A table whose changes must carry `columns`, the key among them; whole rows without a key."""

    table: TableRef
    columns: tuple[str, ...]
    key: tuple[str, ...]

    @property
    def index_name(self) -> str:
        """The same for every migration, since they share it; in the table's own schema."""
        digest = hashlib.blake2b(f"{self.table.schema}\0{self.table.name}".encode(), digest_size=8)
        return f"mover_ri_{digest.hexdigest()}"


async def ensure_identities(
    database: Database, migration: MigrationId, needs: Iterable[IdentityNeed], say: Say
) -> None:
    """Give each table an identity that covers what it needs. Repeatable; never blocks writers for longer
    than a lock timeout. Raises LockNotAvailable when long transactions stay in the way."""
    async with database.connect("identity") as conn:
        for need in needs:
            async with _turn(conn, need.table, say):
                await _ensure(conn, database, migration, need, say)


async def _ensure(
    conn: Connection, database: Database, migration: MigrationId, need: IdentityNeed, say: Say
) -> None:
    relation = await _relation(conn, need.table)
    recorded = await _one(conn, "recorded", need.table)
    if recorded is None and relation.identity_covers(need.columns):
        return
    candidate = relation.identity_candidate(need.columns)
    our_index = need.index_name if need.key and candidate is None else None
    async with conn.transaction():
        await _hold(conn, database)
        state = await _state(conn, need.table)
        await _run(
            conn,
            "record",
            need.table,
            old_identity=state["replica_identity"],
            old_index=state["identity_index"],
            our_index=our_index,
        )
        await _run(conn, "use", need.table, migration=migration)
    reach("identity.recorded")
    if relation.identity_covers(need.columns):
        return
    if our_index is not None:
        await _build(conn, need, say)
    reach("identity.built")
    index = candidate.name if candidate else our_index
    chosen = sql.SQL("USING INDEX {}").format(sql.Identifier(index)) if index else sql.SQL("FULL")
    await _alter(conn, database, need.table, chosen, say)


async def _build(conn: Connection, need: IdentityNeed, say: Say) -> None:
    """The index, CONCURRENTLY; what a failed build left is dropped first, CONCURRENTLY as well: both
    wait for old transactions, and nobody waits for them."""
    create = sql.SQL("CREATE UNIQUE INDEX CONCURRENTLY {} ON {} ({})").format(
        sql.Identifier(need.index_name),
        _named(need.table),
        sql.SQL(", ").join(sql.Identifier(c) for c in need.columns),
    )
    drop = sql.SQL("DROP INDEX CONCURRENTLY {}").format(sql.Identifier(need.table.schema, need.index_name))

    async def attempt() -> None:
        valid = (await _state(conn, need.table))["indexes"].get(need.index_name)
        if valid is False:
            await conn.execute(drop)
        if valid is not True:
            if named := await blockers():
                await say(f"index on {need.table}: waiting for {named}")
            await conn.execute(create)

    async def blockers() -> str:
        holders = await (await conn.execute(load("identity")["blockers"])).fetchall()
        return ", ".join(f"{application} (pid {pid}, {age:.0f} s)" for pid, application, age in holders)

    async def on_wait(number: int) -> None:
        await say(f"index on {need.table}, try {number}: waiting for {await blockers() or 'locks'}")

    await with_lock_timeout(
        conn, attempt, lock_timeout_ms=BUILD_LOCK_TIMEOUT_MS, tries=BUILD_TRIES, on_wait=on_wait
    )


async def _alter(
    conn: Connection, database: Database, table: TableRef, identity: sql.Composable, say: Say
) -> None:
    statement = sql.SQL("ALTER TABLE {} REPLICA IDENTITY {}").format(_named(table), identity)

    async def attempt() -> None:
        async with conn.transaction():
            await _hold(conn, database)
            await conn.execute(statement)

    await with_lock_timeout(conn, attempt, on_wait=_waiting(say, table))


async def release_identities(database: Database, migration: MigrationId, say: Say) -> None:
    """Stop using the identities; restore those that nobody uses any more. Repeatable.

    Raises Conflict while a publication of ours still filters a table by its tenant column."""
    async with database.connect("identity") as conn:
        if not await _is_installed(conn):
            return
        used = await (
            await conn.execute(load("identity")["used_tables"], {"migration": migration})
        ).fetchall()
        for schema, name in used:
            table = TableRef(schema, name)
            async with _turn(conn, table, say):
                await _release(conn, database, migration, table, say)


async def _release(
    conn: Connection, database: Database, migration: MigrationId, table: TableRef, say: Say
) -> None:
    async def attempt() -> None:
        async with conn.transaction():
            await _hold(conn, database)
            others = await _one(conn, "stop_using", table, migration=migration)
            if others is not None and others["count"] == 0:
                await _restore(conn, table)

    await with_lock_timeout(conn, attempt, on_wait=_waiting(say, table))


async def _restore(conn: Connection, recorded_as: TableRef) -> None:
    """Within one transaction: the old identity is back, our index is gone, the record too."""
    recorded = await _one(conn, "recorded", recorded_as)
    table = await _carrier(conn, recorded_as, recorded)
    state = await _one(conn, "table_state", table, topic="catalog")
    if recorded is not None and state is not None:
        publications = await _all(conn, "our_publications", table)
        if publications:
            raise Conflict(
                f"publication {publications[0]['name']} still needs the replica identity of {table}",
                where=Where(table=table),
            )
        await conn.execute(
            sql.SQL("ALTER TABLE {} REPLICA IDENTITY {}").format(_named(table), _old(recorded, state))
        )
        if recorded["our_index"] is not None:
            index = sql.Identifier(table.schema, recorded["our_index"])
            await conn.execute(sql.SQL("DROP INDEX IF EXISTS {}").format(index))
    await _run(conn, "forget", recorded_as)


async def _carrier(conn: Connection, recorded_as: TableRef, recorded: Row | None) -> TableRef:
    """The table under the name that it has by now, if it carries an index of ours."""
    index = recorded and recorded["our_index"]
    found = await _one(conn, "carrier", recorded_as, index=index) if index else None
    return TableRef(found["schema"], found["relation"]) if found else recorded_as


def _old(recorded: Row, state: Row) -> sql.Composable:
    """The identity to restore; an index that somebody dropped meanwhile leaves the default."""
    if recorded["old_identity"] == "i" and recorded["old_index"] in state["indexes"]:
        return sql.SQL("USING INDEX {}").format(sql.Identifier(recorded["old_index"]))
    return sql.SQL({"f": "FULL", "n": "NOTHING"}.get(recorded["old_identity"], "DEFAULT"))


@asynccontextmanager
async def _turn(conn: Connection, table: TableRef, say: Say) -> AsyncIterator[None]:
    for number in range(_TURN_TRIES):
        if (await _one(conn, "take_turn", table) or {}).get("pg_try_advisory_lock"):
            break
        if number == 0:
            await say(f"replica identity of {table}: waiting for another migration")
        await asyncio.sleep(_TURN_PAUSE_S)
    else:
        raise LockNotAvailable(f"another migration keeps changing the replica identity of {table}")
    try:
        yield
    finally:
        with suppress(psycopg.OperationalError):  # the end of the connection ends the turn as well
            await _run(conn, "end_turn", table)


async def _relation(conn: Connection, table: TableRef) -> Relation:
    relation = await catalog.read_relation(conn, table)
    if relation is None:
        raise SchemaChanged(f"table {table} is gone", where=Where(table=table))
    return relation


async def _state(conn: Connection, table: TableRef) -> Row:
    state = await _one(conn, "table_state", table, topic="catalog")
    if state is None:
        raise SchemaChanged(f"table {table} is gone", where=Where(table=table))
    return state


async def _is_installed(conn: Connection) -> bool:
    row = await (await conn.execute("SELECT to_regclass('mover.replica_identity') IS NOT NULL")).fetchone()
    return row is not None and bool(row[0])


async def _hold(conn: Connection, database: Database) -> None:
    if database.identity is not None:
        await owner.hold(conn, database.identity)


def _named(table: TableRef) -> sql.Identifier:
    return sql.Identifier(table.schema, table.name)


def _waiting(say: Say, table: TableRef) -> Callable[[int], Awaitable[None]]:
    async def on_wait(number: int) -> None:
        await say(f"replica identity of {table}: waiting for a lock, try {number}")

    return on_wait


async def _run(conn: Connection, query: str, table: TableRef, **parameters: Any) -> None:
    named = {"schema": table.schema, "name": table.name, **parameters}
    await conn.execute(load("identity")[query], named)


async def _all(
    conn: Connection, query: str, table: TableRef, *, topic: str = "identity", **parameters: Any
) -> list[Row]:
    async with conn.cursor(row_factory=dict_row) as cursor:
        await cursor.execute(load(topic)[query], {"schema": table.schema, "name": table.name, **parameters})
        return await cursor.fetchall()


async def _one(
    conn: Connection, query: str, table: TableRef, *, topic: str = "identity", **parameters: Any
) -> Row | None:
    found = await _all(conn, query, table, topic=topic, **parameters)
    return found[0] if found else None
