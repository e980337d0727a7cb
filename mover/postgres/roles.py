"""What our sessions may leave out of force on a server, and what they mind where they may not.

With `session_replication_role = replica` neither the application's triggers and rules nor foreign keys act
on what we write. A role that may not set it goes the careful way:

> What a trigger or a foreign key's action did on the source arrives as rows of its own; on our side it must
> have no other effect than these rows.

On a target of our own the triggers are out of force inside our transactions only, so nothing has to be put
back after a crash; where others work, preflight has refused them. Foreign keys are checked all the time:
parents come first and go last, and what is DEFERRABLE is checked when a transaction ends.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, LiteralString

import psycopg
from psycopg import sql

from mover.core.ids import TableRef, TenantId
from mover.sql import load

Connection = psycopg.AsyncConnection[Any]


def settings(tenant: TenantId, *, careful: bool) -> Mapping[str, str]:
    """Of a session that writes the tenant's rows: our guards know it by `mover.tenant`."""
    ours = {"mover.tenant": str(tenant)}
    return ours if careful else {"session_replication_role": "replica", **ours}


class Forces:
    """What one transaction of the careful way on the target has put out of force, or off.

    `own_target`: the schemas were made by us, and nobody else works there yet."""

    def __init__(self, conn: Connection, *, own_target: bool) -> None:
        self._conn, self._own_target = conn, own_target
        self._seen: set[TableRef] = set()
        self._triggers: list[tuple[TableRef, str]] = []
        self._foreign_keys: list[tuple[TableRef, str]] | None = None

    async def leave_out(self, tables: Collection[TableRef]) -> None:
        """Before the transaction's first change of each of `tables`: their triggers, and those of tables
        that foreign keys' actions reach from them. Locks: SHARE ROW EXCLUSIVE on those that have any."""
        new = set(tables) - self._seen
        if new and not self._seen:
            await self._conn.execute(_DEFERRED)
        self._seen |= new
        if not new or not self._own_target:
            return
        cursor = await self._conn.execute(load("roles")["triggers"], _names(new))
        found = [(TableRef(schema, table), name) for schema, table, name in await cursor.fetchall()]
        await self._alter("DISABLE TRIGGER {}", found)
        if found:
            await self._conn.execute(_DEFERRED)
        self._triggers += found

    async def postpone_checks(self) -> bool:
        """The last resort, where no order satisfies what is checked behind each statement: foreign keys are
        checked when the transaction ends. Locks: ACCESS EXCLUSIVE on the tables that have any."""
        if not self._own_target or self._foreign_keys is not None:
            return False
        cursor = await self._conn.execute(load("roles")["checked_at_once"], _names(self._seen))
        found = [(TableRef(schema, table), name) for schema, table, name in await cursor.fetchall()]
        await self._alter("ALTER CONSTRAINT {} DEFERRABLE", found)
        await self._conn.execute(_DEFERRED)
        self._foreign_keys = found
        return True

    async def put_back(self) -> None:
        """At the end of the transaction."""
        await self._alter("ALTER CONSTRAINT {} NOT DEFERRABLE", self._foreign_keys or [])
        await self._alter("ENABLE TRIGGER {}", self._triggers)

    async def _alter(self, action: LiteralString, named: Sequence[tuple[TableRef, str]]) -> None:
        statements = [
            sql.SQL("ALTER TABLE {} {}").format(
                sql.Identifier(table.schema, table.name), sql.SQL(action).format(sql.Identifier(name))
            )
            for table, name in named
        ]
        if statements:
            await self._conn.execute(_IMMEDIATE)  # no check may be pending on a table that is altered
            await self._conn.execute(sql.SQL("; ").join(statements))


_DEFERRED, _IMMEDIATE = "SET CONSTRAINTS ALL DEFERRED", "SET CONSTRAINTS ALL IMMEDIATE"


@dataclass(frozen=True, slots=True)
class ActingKey:
    """A foreign key that acts on the rows of `child` when what they refer to goes."""

    child: TableRef
    columns: Sequence[str]
    referenced: Sequence[str]


async def acting_keys(conn: Connection, table: TableRef) -> list[ActingKey]:
    rows = await (await conn.execute(load("roles")["acting_keys"], _names([table]))).fetchall()
    return [
        ActingKey(TableRef(schema, name), columns, referenced) for schema, name, referenced, columns in rows
    ]


async def acted_upon(
    conn: Connection,
    table: TableRef,
    keys: Sequence[ActingKey],
    chosen: sql.Composable,
    spared: Mapping[TableRef, sql.Composable],
) -> bool:
    """Whether one of the foreign keys would act on other rows, but those `spared` of their tables (`c`), if
    the `chosen` ones of `table` (`t`) went."""
    if not keys:
        return False
    acting = [
        sql.SQL("EXISTS (SELECT FROM {} AS c JOIN {} AS t ON {} WHERE {} AND NOT ({}))").format(
            sql.Identifier(key.child.schema, key.child.name),
            sql.Identifier(table.schema, table.name),
            sql.SQL(" AND ").join(
                sql.SQL("{} = {}").format(sql.Identifier("c", mine), sql.Identifier("t", theirs))
                for mine, theirs in zip(key.columns, key.referenced, strict=True)
            ),
            chosen,
            spared.get(key.child, sql.SQL("false")),
        )
        for key in keys
    ]
    row = await (await conn.execute(sql.SQL("SELECT {}").format(sql.SQL(" OR ").join(acting)))).fetchone()
    return bool(row and row[0])


async def unique_columns(conn: Connection, table: TableRef) -> list[list[str]]:
    """Of each unique index of the table."""
    return [
        row[0]
        for row in await (await conn.execute(load("roles")["unique_columns"], _names([table]))).fetchall()
    ]


async def refers_to_itself(conn: Connection, table: TableRef) -> bool:
    return (table, table) in await _foreign_keys(conn, [table])


async def children_first(
    conn: Connection, tables: Collection[TableRef]
) -> list[tuple[tuple[TableRef, ...], bool]]:
    """`tables` in groups, so that no row of a group is referred to by what is left of the groups behind it;
    and whether a group has to go in one statement, since its rows may refer to each other."""
    keys = await _foreign_keys(conn, tables)
    groups: list[tuple[tuple[TableRef, ...], bool]] = []
    left = sorted(tables)
    while left:
        parents = {parent for child, parent in keys if child in left and child != parent}
        free = [table for table in left if table not in parents]
        groups += [((table,), (table, table) in keys) for table in free]
        if not free:
            return [*groups, (tuple(left), True)]
        left = [table for table in left if table in parents]
    return groups


async def _foreign_keys(conn: Connection, tables: Collection[TableRef]) -> set[tuple[TableRef, TableRef]]:
    """The child and the parent of each foreign key among `tables`."""
    rows = await (await conn.execute(load("roles")["foreign_keys"], _names(tables))).fetchall()
    return {(TableRef(*row[:2]), TableRef(*row[2:])) for row in rows}


def _names(tables: Collection[TableRef]) -> dict[str, list[str]]:
    return {"schemas": [t.schema for t in tables], "names": [t.name for t in tables]}
