"""The two sides' schemas while a tenant moves: what differs now, and the changes that the target follows."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Set
from dataclasses import dataclass
from typing import Any

import psycopg
from psycopg import sql
from psycopg.rows import dict_row

from mover.core.alignment import Difference
from mover.core.facts import Facts, Tenancy
from mover.core.ids import TableRef, TenantId
from mover.postgres import catalog, fingerprint, owner
from mover.postgres.connect import Database, Identity
from mover.postgres.identity import BUILD_LOCK_TIMEOUT_MS, BUILD_TRIES, Say
from mover.postgres.locks import OnWait, with_lock_timeout
from mover.sql import load

Connection = psycopg.AsyncConnection[Any]


@dataclass(frozen=True, slots=True)
class Look:
    """Both sides at a glance; `stamp` was read before everything else."""

    stamp: str
    differences: tuple[Difference, ...]
    unfilled: Set[tuple[TableRef, str]]  # the source's columns, where the target's are so as well
    storage: Mapping[str, str]  # of the source's tables
    facts: Facts


async def look(
    source: Database, target: Database, schemas: Mapping[str, str], tenancy: Tenancy, tenant: TenantId
) -> Look:
    async with source.borrow("compare") as ours, target.borrow("compare") as theirs:
        stamp = await read_stamp(ours, schemas, tenancy.column)
        there = {schema: schema for schema in schemas.values()}
        found = fingerprint.differences(
            await fingerprint.fingerprint(ours, schemas), await fingerprint.fingerprint(theirs, there)
        )
        storage = await _rows(ours, "storage", schemas)
        return Look(
            stamp=stamp,
            differences=tuple(found),
            unfilled=await _unfilled(ours, theirs, schemas),
            storage={f"{row['schema']}.{row['name']}": row["text"] for row in storage},
            facts=Facts(
                tenant,
                tenancy,
                schemas,
                await catalog.read_side(ours, schemas, source.label),
                await catalog.read_side(theirs, schemas.values(), target.label),
                connections_wanted=0,
            ),
        )


async def read_stamp(conn: Connection, schemas: Collection[str], tenant_column: str) -> str:
    """Another whenever something in the source's schemas changed on which rows depend; quick to read."""
    (row,) = await _rows(conn, "stamp", schemas, column=tenant_column)
    return str(row["md5"])


async def _unfilled(
    ours: Connection, theirs: Connection, schemas: Mapping[str, str]
) -> frozenset[tuple[TableRef, str]]:
    """On the source. A column that the target does not have yet will be so there, too."""
    there = {
        (TableRef(row["schema"], row["relation"]), row["name"]): row["unfilled"]
        for row in await _rows(theirs, "unfilled", schemas.values())
    }
    return frozenset(
        (TableRef(row["schema"], row["relation"]), row["name"])
        for row in await _rows(ours, "unfilled", schemas)
        if row["unfilled"]
        and there.get((TableRef(schemas[row["schema"]], row["relation"]), row["name"]), True)
    )


async def forget_chunks(target: Database, identity: Identity, tables: Collection[TableRef]) -> None:
    """These tables (of the source) count as not copied; repeatable."""
    names = [[t.schema for t in tables], [t.name for t in tables]]
    async with target.borrow("chunks") as conn, conn.transaction():
        await owner.hold(conn, identity)
        await conn.execute(load("alignment")["forget_chunks"], (identity.stream, *names))


async def follow(target: Database, identity: Identity, changes: Collection[Difference], say: Say) -> None:
    """Make on the target what `core.alignment` found harmless. Repeatable.

    A column takes ACCESS EXCLUSIVE for an instant, under a lock timeout; an index is built, or dropped,
    CONCURRENTLY, so that it holds up no other tenant."""
    async with target.borrow("align", client_min_messages="warning") as conn:
        for change in changes:
            on_wait = _waiting(say, change)
            if change.kind == "column":
                await _add_column(conn, identity, change, on_wait)
            else:
                await _change_index(conn, identity, change, on_wait)
            verb = "dropped" if change.source is None else "added"
            await say(f"the source's schema changed: {change.key} was {verb} on the target, too")


async def _add_column(conn: Connection, identity: Identity, change: Difference, on_wait: OnWait) -> None:
    schema, table, column = change.names
    statement = sql.SQL("ALTER TABLE {} ADD COLUMN IF NOT EXISTS {} {}").format(
        sql.Identifier(schema, table), sql.Identifier(column), _trusted(change.source)
    )

    async def attempt() -> None:
        async with conn.transaction():
            await owner.hold(conn, identity)
            await conn.execute(statement)

    await with_lock_timeout(conn, attempt, on_wait=on_wait)


async def _change_index(conn: Connection, identity: Identity, change: Difference, on_wait: OnWait) -> None:
    """Only a valid index counts as being there: what a build left that failed is dropped first."""
    drop = sql.SQL("DROP INDEX CONCURRENTLY IF EXISTS {}").format(sql.Identifier(*change.names))

    async def attempt() -> None:
        async with conn.transaction():
            await owner.hold(conn, identity)
        await conn.execute(drop)
        if change.source is not None:
            _, _, definition = change.source.partition("CREATE INDEX ")
            await conn.execute(sql.SQL("CREATE INDEX CONCURRENTLY {}").format(_trusted(definition)))

    await with_lock_timeout(
        conn, attempt, lock_timeout_ms=BUILD_LOCK_TIMEOUT_MS, tries=BUILD_TRIES, on_wait=on_wait
    )


def _trusted(text: str | None) -> sql.SQL:
    """A type or a definition as the source's catalog deparsed it."""
    assert text
    return sql.SQL(text)


def _waiting(say: Say, change: Difference) -> OnWait:
    async def on_wait(number: int) -> None:
        await say(f"{change.key}: waiting for a lock on the target, try {number}")

    return on_wait


async def _rows(
    conn: Connection, query: str, schemas: Collection[str], **parameters: object
) -> list[dict[str, Any]]:
    async with conn.cursor(row_factory=dict_row) as cursor:
        await cursor.execute(load("alignment")[query], {"schemas": list(schemas), **parameters})
        return await cursor.fetchall()
