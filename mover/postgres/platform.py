"""`mover init`: creates and upgrades schema `platform` from the numbered files, under one lock."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import psycopg
from psycopg import sql
from psycopg.rows import dict_row

from mover.core.errors import Refused
from mover.core.ids import TableRef
from mover.core.secret import Secret
from mover.postgres.errors import translate
from mover.postgres.platform_pool import LABEL, Connection, conninfo
from mover.postgres.urls import why_unreachable
from mover.sql import NumberedFile, load, load_numbered

TIMEOUT_S = 120
_QUERIES = load("platform_schema")
_HINT = "Run `mover init --config FILE`."


async def initialise(url: Secret, *, organizations: TableRef | None = None) -> tuple[str, ...]:
    """Bring schema `platform` up to date, and create the routing table if it is named.

    Returns the migrations that had to be applied. Safe beside other runs, and to repeat."""
    async with _connection(url) as conn, conn.transaction():
        await conn.execute(_QUERIES["lock_schema"])
        await conn.execute(_QUERIES["create_journal"])
        applied = [await _apply(conn, file) for file in await _missing(conn)]
        if organizations is not None:
            await _create_organizations(conn, organizations)
    return tuple(applied)


async def check_platform(url: Secret) -> None:
    """Raises Unreachable, or Refused when the schema is not this release's."""
    async with _connection(url) as conn:
        await check_schema_version(conn)


async def check_schema_version(conn: Connection) -> None:
    """Raises Refused when the schema is not this release's."""
    wanted = load_numbered("platform_schema")[-1].version
    row = await (await conn.execute(_QUERIES["has_journal"])).fetchone()
    if row is None or not row["present"]:
        raise Refused("the platform database has no schema `platform` yet", hint=_HINT)
    found = await _version(conn)
    if found < wanted:
        raise Refused(f"schema `platform` is at version {found}, this release needs {wanted}", hint=_HINT)
    if found > wanted:
        raise _newer(found)


async def missing_route_columns(url: Secret, organizations: TableRef) -> tuple[str, ...] | None:
    """Columns that the routing table lacks; None when there is no such table."""
    async with _connection(url) as conn:
        parameters = {"schema": organizations.schema, "name": organizations.name}
        rows = await (await conn.execute(_QUERIES["route_columns"], parameters)).fetchall()
    found = {row["attname"] for row in rows}
    wanted = ("id", "vertical", "isolation_tier", "database_url", "updated_at")
    return tuple(name for name in wanted if name not in found) if found else None


@asynccontextmanager
async def _connection(url: Secret) -> AsyncIterator[Connection]:
    with translate(LABEL):
        async with asyncio.timeout(TIMEOUT_S), await _connect(url) as conn:
            yield conn


async def _connect(url: Secret) -> Connection:
    try:
        return await psycopg.AsyncConnection[dict[str, Any]].connect(
            **conninfo(url, "init"), autocommit=True, row_factory=dict_row
        )
    except psycopg.OperationalError as error:
        raise await why_unreachable(url, LABEL, error) from error


async def _missing(conn: Connection) -> tuple[NumberedFile, ...]:
    files = load_numbered("platform_schema")
    version = await _version(conn)
    if version > files[-1].version:
        raise _newer(version)
    return tuple(file for file in files if file.version > version)


async def _version(conn: Connection) -> int:
    row = await (await conn.execute(_QUERIES["version"])).fetchone()
    return int(row["version"]) if row else 0


async def _apply(conn: Connection, file: NumberedFile) -> str:
    await conn.execute(file.text)
    await conn.execute(_QUERIES["record_version"], {"version": file.version, "name": file.name})
    return f"{file.version:04}_{file.name}"


async def _create_organizations(conn: Connection, table: TableRef) -> None:
    names = {
        "schema": sql.Identifier(table.schema),
        "organizations": sql.Identifier(table.schema, table.name),
    }
    await conn.execute(sql.SQL(_QUERIES["create_organizations_schema"]).format(**names))
    await conn.execute(sql.SQL(_QUERIES["create_organizations"]).format(**names))


def _newer(version: int) -> Refused:
    return Refused(
        f"schema `platform` is at version {version}, newer than this release knows",
        hint="Install the release that upgraded it, or a later one.",
    )
