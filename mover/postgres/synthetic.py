"""A read and a write of the tenant's through his route, as his application would make them, rolled back."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import psycopg
from psycopg import sql

from mover.core.errors import LockNotAvailable, MoverError, Unreachable
from mover.core.ids import TenantId
from mover.core.migration import Place
from mover.core.tables import MovedTable, Shape
from mover.postgres import holdings
from mover.postgres.connect import Database

TIMEOUTS = {"statement_timeout": "5s", "lock_timeout": "1s"}
READ_ONLY = "25006"  # the database's own setting, and what guards of a place say that a tenant has left
# Nobody may come in; no such database, schema or table; no right to it; no room; the server itself.
# https://www.postgresql.org/docs/current/errcodes-appendix.html
UNUSABLE = ("28", "3D", "3F", "42P01", "42501", "53", "58", "XX")


@dataclass(frozen=True, slots=True)
class SyntheticProbe:
    """Implements engine.health.Probe. `shape` is that of the way there: he is served at its targets."""

    tenant: TenantId
    shape: Shape
    route: Callable[[], Awaitable[Place]]

    async def look(self) -> str | None:
        place = await self.route()
        try:
            await self._read_and_write(Database(place.url, f"probe at {place}"))
        except (Unreachable, LockNotAvailable):  # cannot tell: so many other reasons have these
            raise
        except MoverError as error:
            if not _is_the_places(error.__cause__):
                raise
            return f"the tenant cannot write where he is served: {error}"
        return None

    async def _read_and_write(self, database: Database) -> None:
        """The fence's guards are met as by anybody: a session of the mover's would pass them."""
        table = next((t for t in self.shape.tables if t.tenant_column is not None), None)
        if table is None:
            return
        async with database.connect_plainly("probe", **TIMEOUTS) as conn:
            await conn.execute("BEGIN")
            await conn.execute(self._touch(table))
            await conn.execute("ROLLBACK")

    def _touch(self, table: MovedTable) -> sql.Composed:
        """Locks: ROW EXCLUSIVE, and one row that nobody else has locked, until it is rolled back at once."""
        name, column = holdings.named(table.target), sql.Identifier(table.tenant_column or "")
        return sql.SQL(
            "UPDATE {table} SET {column} = {column} WHERE {column} = {tenant} AND (tableoid, ctid) ="
            " (SELECT tableoid, ctid FROM {table} WHERE {column} = {tenant} LIMIT 1 FOR UPDATE SKIP LOCKED)"
        ).format(table=name, column=column, tenant=sql.Literal(str(self.tenant)))


def _is_the_places(error: BaseException | None) -> bool:
    """Whether it says something of the place, and not of the application's triggers, policies or constraints,
    which may want more of a session than ours knows, and wanted it on the source, too."""
    if not isinstance(error, psycopg.Error):
        return False
    state, is_in_a_function = error.sqlstate or "", error.diag.context is not None
    return state == READ_ONLY or (state.startswith(UNUSABLE) and not is_in_a_function)
