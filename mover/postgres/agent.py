"""The schema `mover` in each database we touch: installed first, removed when nobody needs it."""

from __future__ import annotations

from typing import Any

import psycopg
from psycopg import sql

from mover.core.errors import Refused
from mover.core.ids import MigrationId, back_of
from mover.postgres import catalog, owner
from mover.postgres.capture import drop_log
from mover.postgres.connect import Database, Identity
from mover.sql import load

_TABLES = ("owner", "progress", "chunk")


async def install(database: Database, identity: Identity) -> None:
    """Make the schema and take ownership of the migration there. Raises Refused, LeaseLost."""
    async with database.borrow("install", client_min_messages="warning") as conn, conn.transaction():
        await conn.execute(load("agent")["make_schema"])
        await _refuse_strangers(conn, database.label)
        await conn.execute(load("agent")["install"])
        await conn.execute(load("identity_schema")["install"])
    await owner.take(database, identity)


async def _refuse_strangers(conn: psycopg.AsyncConnection[Any], label: str) -> None:
    """Preflight has looked, too, and somebody may have been quicker than we."""
    if strangers := await catalog.strangers(conn):
        raise Refused(
            f"{label}: schema mover, or something in it, belongs to {', '.join(strangers)}",
            hint="Drop it, or ALTER SCHEMA mover OWNER TO the mover's role, and what is in it.",
        )


async def is_installed(database: Database) -> bool:
    async with database.borrow("install") as conn:
        row = await (await conn.execute("SELECT to_regclass('mover.owner') IS NOT NULL")).fetchone()
        return row is not None and bool(row[0])


async def forget(database: Database, migration: MigrationId) -> None:
    """Remove the migration's rows and its logs, and the schema with the last of them."""
    if not await is_installed(database):
        return
    queries = load("agent")
    async with database.borrow("uninstall", client_min_messages="warning") as conn, conn.transaction():
        for stream in (migration, back_of(migration)):
            for table in _TABLES:
                statement = sql.SQL(queries["forget"]).format(table=sql.Identifier(table))
                await conn.execute(statement, (stream,))
            await drop_log(conn, stream)
        await conn.execute(queries["uninstall"])
