"""The fence's triggers on the tables of one place: guards that make writers of the tenant's rows ask its
state, and those that tell of owners that change.

The SQL and its reasons stand in `mover/sql/fence.sql`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import psycopg
from psycopg import sql

from mover.core.ids import TableRef, TenantId
from mover.core.tables import Holding
from mover.postgres import owner
from mover.postgres.connect import Identity
from mover.postgres.holdings import is_owned, named, owning_columns
from mover.postgres.locks import with_lock_timeout
from mover.sql import load

# A writer that meets a closed fence without a living owner gets a retryable error after this, or after
# this many times the pause budget: a pause that goes well must never refuse.
GUARD_WAIT_MS = 10_000
GUARD_WAIT_BUDGETS = 3
_GUARDING = ("insert", "update", "delete", "truncate")
_TELLING = ("rehome", "rekey", "vacate")
Connection = psycopg.AsyncConnection[tuple[Any, ...]]
Say = Callable[[str], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Found:
    """The triggers of one place on one table that always fire."""

    is_guarded: bool  # all four, also on its partitions
    telling: int  # of changes of owners

    def suffices(self, holding: Holding) -> bool:
        return self.is_guarded and self.telling >= len(_telling(holding))


Standing: TypeAlias = Mapping[TableRef, Found]


class Guards:
    """Those of the place `name`, whose lock is `key`."""

    def __init__(self, name: str, key: int, tenant: TenantId, identity: Identity, hold_s: float) -> None:
        self._name, self._key, self._tenant, self._identity = name, key, tenant, identity
        self._wait_ms = max(GUARD_WAIT_MS, round(hold_s * 1000 * GUARD_WAIT_BUDGETS))

    async def make_functions(self, conn: Connection) -> None:
        await conn.execute(self._sql("install"))

    async def standing(self, conn: Connection) -> Standing:
        """The tables that carry triggers of this place, a partitioned one before its partitions, whose row
        triggers go with it."""
        facts = {
            "guarding": [self._trigger(kind) for kind in _GUARDING],
            "telling": [self._trigger(kind) for kind in _TELLING],
        }
        cursor = await conn.execute(load("fence")["guarded"], facts)
        return {
            TableRef(schema, name): Found(is_guarded, telling)
            for schema, name, is_guarded, telling in await cursor.fetchall()
        }

    async def guard(self, conn: Connection, holding: Holding, say: Say) -> None:
        table = holding.table
        if holding.tenant_column is None:
            await self._make_owned_function(conn, holding)
        await self._under_lock_timeout(
            conn, self._sql("guard_table", table=named(table), **self._conditions(holding)), table, say
        )
        if _telling(holding):
            await self._tell_of_changes(conn, holding, say)
        names = {"schema": table.schema, "name": table.name}
        for found in await (await conn.execute(load("fence")["partitions"], names)).fetchall():
            partition = TableRef(*found)
            statement = self._sql("guard_partition", table=named(partition))
            await self._under_lock_timeout(conn, statement, partition, say)

    async def unguard(self, conn: Connection, table: TableRef, say: Say) -> None:
        statement = self._sql("unguard_table", table=named(table))
        await self._under_lock_timeout(conn, statement, table, say)

    async def stop_telling(self, conn: Connection, table: TableRef, say: Say) -> None:
        statement = self._sql("stop_telling", table=named(table))
        await self._under_lock_timeout(conn, statement, table, say)

    async def drop_owned_functions(self, conn: Connection) -> None:
        """After the triggers that call them; in the caller's transaction."""
        facts = {"prefix": self._owned_prefix}
        for (function,) in await (await conn.execute(load("fence")["owned_functions"], facts)).fetchall():
            await conn.execute(self._sql("drop_owned_function", function=sql.SQL(function)))

    async def drop_functions(self, conn: Connection) -> None:
        """After the last trigger; in the caller's transaction."""
        await self.drop_owned_functions(conn)
        await conn.execute(self._sql("uninstall"))

    def _conditions(self, holding: Holding) -> dict[str, sql.Composable]:
        """Whether a row that is inserted, updated or deleted is the tenant's, before or after."""
        if holding.tenant_column is not None:
            column, tenant = sql.Identifier(holding.tenant_column), sql.Literal(str(self._tenant))
            new, old = (sql.SQL(f"{row}.{{}} = {{}}").format(column, tenant) for row in ("NEW", "OLD"))
            return {"inserted": new, "updated": sql.SQL("({} OR {})").format(old, new), "deleted": old}
        function = sql.Identifier("mover", self._owned_function(holding))
        new_values, old_values = (_values(row, owning_columns(holding)) for row in ("NEW", "OLD"))
        new, old = (sql.SQL("{}({})").format(function, values) for values in (new_values, old_values))
        updated = sql.SQL("({} OR ROW({}) IS DISTINCT FROM ROW({}) AND {})").format(
            new, old_values, new_values, old
        )
        return {"inserted": new, "updated": updated, "deleted": old}

    async def _make_owned_function(self, conn: Connection, holding: Holding) -> None:
        columns = owning_columns(holding)
        parameters = sql.SQL(", ").join(
            sql.SQL("{}.{}%TYPE").format(named(holding.table), sql.Identifier(column)) for column in columns
        )
        arguments = {column: sql.SQL(f"${number}") for number, column in enumerate(columns, start=1)}
        statement = self._sql(
            "owned_function",
            owned_function=sql.Identifier(self._owned_function(holding)),
            parameters=parameters,
            owned=is_owned(holding, arguments, self._tenant, lock=True),
        )
        async with conn.transaction():
            await owner.hold(conn, self._identity)
            await conn.execute(statement)

    def _owned_function(self, holding: Holding) -> str:
        table = hashlib.md5(str(holding.table).encode(), usedforsecurity=False).hexdigest()
        return f"{self._owned_prefix}{table[:16]}"

    @property
    def _owned_prefix(self) -> str:
        return f"owned_{self._name}_"

    async def _tell_of_changes(self, conn: Connection, holding: Holding, say: Say) -> None:
        assert holding.tenant_column is not None
        table = holding.table
        names = sorted({name for referenced in holding.referenced for name in referenced})
        facts = {"schema": table.schema, "name": table.name, "names": names}
        found = await (await conn.execute(load("fence")["column_numbers"], facts)).fetchall()
        parts = {
            "table": named(table),
            "column": sql.Identifier(holding.tenant_column),
            "numbers": sql.SQL(", ").join(sql.Literal(str(number)) for (number,) in found),
            "old_values": _values("OLD", names),
            "new_values": _values("NEW", names),
        }
        queries = ["tell_of_rehoming", *(["tell_of_vacating"] if holding.deferred else [])]
        for query in queries:
            await self._under_lock_timeout(conn, self._sql(query, **parts), table, say)

    async def _under_lock_timeout(
        self, conn: Connection, statement: sql.Composed, table: TableRef, say: Say
    ) -> None:
        async def attempt() -> None:
            async with conn.transaction():
                await owner.hold(conn, self._identity)
                await conn.execute(statement)

        async def on_wait(number: int) -> None:
            await say(f"guard: waiting for a lock on {table}, try {number}")

        await with_lock_timeout(conn, attempt, on_wait=on_wait)

    def _trigger(self, kind: str) -> str:
        return f"mover_guard_{self._name}_{kind}"

    def _sql(self, query: str, **more: sql.Composable) -> sql.Composed:
        """A query of fence.sql with this place's names; texts in it are hexadecimal or uuids."""
        names = {f"{kind}_sequence": sql.SQL(f"{kind}_{self._name}") for kind in ("state", "refused")}
        names |= {
            f"{kind}_function": sql.SQL(f"{kind}_{self._name}")
            for kind in ("guard", "truncate", "wait", "tell")
        }
        triggers = {
            f"{kind}_trigger": sql.Identifier(self._trigger(kind)) for kind in (*_GUARDING, *_TELLING)
        }
        constants = {
            "key": sql.Literal(self._key),
            "wait_ms": sql.Literal(self._wait_ms),
            "tenant": sql.SQL(str(self._tenant)),
            "tenant_value": sql.Literal(str(self._tenant)),
        }
        return sql.SQL(load("fence")[query]).format(**(names | triggers | constants | more))


def _telling(holding: Holding) -> tuple[str, ...]:
    """The triggers that tell of changes of a tenant table's rows to which owned rows refer."""
    if holding.tenant_column is None or not holding.referenced:
        return ()
    return _TELLING if holding.deferred else _TELLING[:1]


def _values(row: str, names: Iterable[str]) -> sql.Composed:
    return sql.SQL(", ").join(sql.SQL(f"{row}.{{}}").format(sql.Identifier(name)) for name in names)
