"""Applies changes to the target: implements ports.ApplyTarget.

> Outside a running transaction the target is the source at some commit, exactly, restricted to the
> copied ranges.

Every transaction locks the owner row first, so that a daemon that lost its lease commits nothing.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import psycopg

from mover.core.copying import CopiedRanges, Key
from mover.core.ids import Lsn, Side, TableRef, TenantId
from mover.core.snapshot import Snapshot
from mover.core.tables import Shape
from mover.postgres import owner, roles
from mover.postgres.checked import Checked
from mover.postgres.connect import Database, Identity
from mover.postgres.errors import translate
from mover.postgres.moved import MovedTables
from mover.postgres.settle import Settling

Connection = psycopg.AsyncConnection[tuple[Any, ...]]


class Writer:
    """One connection to the target that applies what the follower gives it."""

    def __init__(
        self, database: Database, shape: Shape, tenant: TenantId, identity: Identity, conn: Connection
    ) -> None:
        self._database, self._identity, self._conn = database, identity, conn
        self._tables, self._own_target = MovedTables(shape, tenant), shape.fresh

    @classmethod
    @asynccontextmanager
    async def open(
        cls, database: Database, shape: Shape, tenant: TenantId, identity: Identity
    ) -> AsyncIterator[Writer]:
        """Connect and make the staging tables."""
        settings = {
            **roles.settings(tenant, careful=Side.TARGET in shape.careful),
            "synchronous_commit": "on",  # what we confirm to the slot must survive a crash here
            "client_min_messages": "warning",
        }
        async with database.connect("apply", **settings) as conn:
            writer = cls(database, shape, tenant, identity, conn)
            for merge in writer._tables.merges.values():
                if merge.can_stage:
                    await conn.execute(merge.create_stage)
            yield writer

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Settling]:
        async with AsyncExitStack() as stack:
            stack.enter_context(translate(self._database.label))
            await stack.enter_async_context(self._conn.transaction())
            await owner.hold(self._conn, self._identity)
            if not self._tables.careful:
                yield Settling(self._tables, self._conn, self._identity)
                return
            forces = roles.Forces(self._conn, own_target=self._own_target)
            yield Checked(self._tables, self._conn, self._identity, forces)
            await forces.put_back()

    async def progress(self) -> tuple[Lsn, Snapshot | None]:
        with translate(self._database.label):
            cursor = await self._conn.execute(_READ_PROGRESS, (self._identity.stream,))
            row = await cursor.fetchone()
        if row is None:
            return Lsn(0), None
        return Lsn.parse(row[0]), Snapshot.parse(row[1]) if row[1] else None

    def set_copied(self, ranges: Mapping[TableRef, CopiedRanges]) -> None:
        self._tables.set_copied(ranges)

    def collect_dirty(self) -> None:
        self._tables.collect_dirty()

    def dirty(self) -> Mapping[TableRef, frozenset[Key]] | None:
        return self._tables.dirty()


_READ_PROGRESS = "SELECT applied_lsn::text, snapshot FROM mover.progress WHERE migration = %s"
