"""A read and a write of the tenant's through his route, as his application would make them, rolled back."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from psycopg import sql

from mover.core.errors import LockNotAvailable, MoverError, Unreachable
from mover.core.ids import TenantId
from mover.core.migration import Place
from mover.core.tables import MovedTable, Shape
from mover.postgres import holdings
from mover.postgres.connect import Database

TIMEOUTS = {"statement_timeout": "5s", "lock_timeout": "1s"}


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
