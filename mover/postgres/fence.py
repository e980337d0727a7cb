"""The fence at one place: guards on the tables, the state, and the lock that makes writers wait.

Implements cutover.ports.Fence. The SQL and its reasons stand in `mover/sql/fence.sql`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from typing import Any
from uuid import uuid4

import psycopg
from psycopg import sql

from mover.core.errors import CutoverAborted, LeaseLost, LockNotAvailable, MoverError
from mover.core.ids import TableRef, TenantId
from mover.postgres.connect import Database, Identity
from mover.postgres.errors import translate
from mover.postgres.locks import with_lock_timeout
from mover.sql import load

# A writer that meets a closed fence without a living owner gets a retryable error after this.
GUARD_WAIT_MS = 10_000
# A transaction open for longer than this when the cutover begins is waited for outside the fence.
MAX_HOLDER_AGE_S = 0.5
_DEFINITIONS = ("insert", "update", "delete", "truncate")
Say = Callable[[str], Awaitable[None]]


class PgFence:
    """One tenant's fence in one vertical's schemas of one database."""

    def __init__(
        self, database: Database, tenant: TenantId, vertical: str, identity: Identity, hold_s: float
    ) -> None:
        """A session that holds the tenant ends by itself when it was idle for `hold_s`."""
        self._database, self._tenant, self._vertical = database, tenant, vertical
        self._identity, self._hold_s = identity, hold_s
        digest = hashlib.md5(f"{tenant}/{vertical}".encode(), usedforsecurity=False).digest()
        self.name = digest.hex()[:16]
        self.key = int.from_bytes(digest[:8], "big", signed=True)
        self._hold: AsyncExitStack | None = None
        self._holder: psycopg.AsyncConnection[tuple[Any, ...]] | None = None

    async def install(self, tables: Sequence[tuple[TableRef, str]], state: str, say: Say) -> None:
        """Guards on `tables` (each with its tenant column), the fence beginning in `state`; repeatable."""
        async with self._database.connect("guard", client_min_messages="warning") as conn:
            await conn.execute(self._sql("install"))
            await conn.execute(load("fence")["record"], self._facts() | {"state": state})
            done = await self._guarded(conn)
            for table, column in tables:
                if table not in done:
                    await self._guard(conn, table, column, say)

    async def remove(self, say: Say) -> None:
        """Guards, functions and row; nothing happens if they are gone."""
        async with self._database.connect("guard", client_min_messages="warning") as conn:
            row = await (await conn.execute("SELECT to_regclass('mover.fence') IS NOT NULL")).fetchone()
            if row is None or not row[0] or await self._belongs_to_another(conn):
                return
            for table in await self._guarded(conn):
                await self._unguard(conn, table, say)
            async with conn.transaction():
                await conn.execute(self._sql("uninstall"))
                await conn.execute("DELETE FROM mover.fence WHERE name = %s", (self.name,))

    async def get_ready(self) -> None:
        """Open the holding session: it ends by itself, and its lock with it, should this process freeze."""
        await self._release()
        hold = f"{self._hold_s * 1000:.0f}ms"
        self._hold = AsyncExitStack()
        self._holder = await self._hold.enter_async_context(
            self._database.connect(
                "hold",
                synchronous_commit="on",
                idle_session_timeout=hold,
                idle_in_transaction_session_timeout=hold,
            )
        )

    async def close(self, lock_timeout_s: float) -> str:
        old = [pid for pid, age in await self._writers() if age > MAX_HOLDER_AGE_S]
        if old:
            raise CutoverAborted(
                f"transactions that wrote the tenant's rows are open: pids {', '.join(map(str, old))}",
                hint="They are waited for outside the fence; the cutover is tried again.",
            )
        mark = uuid4().hex
        try:
            await self._close(self._ready_holder(), lock_timeout_s, mark)
        except LockNotAvailable as error:
            await self._release()
            raise CutoverAborted("writers did not end in time; nothing happened") from error
        except BaseException:
            await self._release()
            raise
        return mark

    async def _close(
        self, conn: psycopg.AsyncConnection[tuple[Any, ...]], lock_timeout_s: float, mark: str
    ) -> None:
        with translate(self._database.label):
            timeout = sql.Literal(f"{lock_timeout_s * 1000:.0f}ms")
            await conn.execute(sql.SQL("SET lock_timeout = {}").format(timeout))
            await conn.execute("SELECT pg_advisory_lock(%s)", (self.key,))
            # The transaction takes the lock itself as well: should the session die before it
            # commits, no writer slips in behind the mark.
            async with conn.pipeline(), conn.transaction():
                await conn.execute("SELECT pg_advisory_xact_lock(%s)", (self.key,))
                cursor = await self._transition(conn, ("open",), "closed", mark)
            if await cursor.fetchone() is None:
                raise LeaseLost("the fence is not ours to close")

    async def reopen(self) -> None:
        await self._change(("closed", "aborted"), "open")
        await self._release()

    async def open(self) -> None:
        await self._change(("closed", "aborted"), "open")

    async def move_away(self) -> None:
        await self._change(("closed",), "moved")
        await self._release()

    async def abort(self) -> bool:
        """Nobody may open this place any more; False when it is open already."""
        try:
            await self._change(("closed",), "aborted")
        except WrongState:
            if await self.state() == "open":
                return False
            raise
        return True

    async def close_again(self) -> None:
        """aborted -> closed: ready for another attempt."""
        await self._change(("aborted",), "closed")

    async def state(self) -> str:
        async with self._database.connect("fence") as conn:
            row = await (await conn.execute(load("fence")["state"], self._facts())).fetchone()
            return str(row[0]) if row else "absent"

    async def refused_writes(self) -> int:
        """How many writes the guard has refused since it was installed."""
        statement = sql.SQL("SELECT CASE WHEN is_called THEN last_value ELSE 0 END FROM {}")
        async with self._database.connect("fence") as conn:
            row = await (await conn.execute(statement.format(self._object("refused")))).fetchone()
            return int(row[0]) if row else 0

    async def _change(self, old: tuple[str, ...], new: str) -> None:
        """On the holding session while it lives, else on a new one. Raises WrongState."""
        if self._holder is not None:
            try:
                with translate(self._database.label):
                    return await self._change_on(self._holder, old, new)
            except MoverError as error:
                if isinstance(error, WrongState):
                    raise
                await self._release()  # it died; the state in the database is what counts
        async with self._database.connect("fence", synchronous_commit="on") as conn:
            await self._change_on(conn, old, new)

    async def _change_on(
        self, conn: psycopg.AsyncConnection[tuple[Any, ...]], old: tuple[str, ...], new: str
    ) -> None:
        cursor = await self._transition(conn, old, new)
        if await cursor.fetchone() is None:
            row = await (await conn.execute(load("fence")["state"], self._facts())).fetchone()
            found = str(row[0]) if row else "absent"
            if found != new:  # otherwise an earlier try of ours got there
                raise WrongState(f"{self._database.label}: the fence is {found}, not {' or '.join(old)}")

    async def _transition(
        self, conn: psycopg.AsyncConnection[tuple[Any, ...]], old: tuple[str, ...], new: str, mark: str = ""
    ) -> psycopg.AsyncCursor[tuple[Any, ...]]:
        facts = self._facts() | {"old": list(old), "new": new, "mark": mark}
        return await conn.execute(load("fence")["transition"], facts)

    def _ready_holder(self) -> psycopg.AsyncConnection[tuple[Any, ...]]:
        if self._holder is None:
            raise CutoverAborted("the holding session is not open")
        return self._holder

    async def _writers(self) -> list[tuple[int, float]]:
        """Open transactions that have written the tenant's rows: (backend pid, age in seconds)."""
        cursor = await self._ready_holder().execute(load("fence")["holders"], {"key": self.key})
        return [(int(pid), float(age or 0)) for pid, _, age in await cursor.fetchall()]

    async def _release(self) -> None:
        """End the holding session, and with it the lock."""
        hold, self._hold, self._holder = self._hold, None, None
        if hold is not None:
            await hold.aclose()

    def _facts(self) -> dict[str, object]:
        return {
            "name": self.name,
            "tenant": self._tenant,
            "vertical": self._vertical,
            "epoch": self._identity.epoch,
            "migration": self._identity.migration,
            "sequence": f"mover.state_{self.name}",
        }

    def _object(self, kind: str) -> sql.Identifier:
        return sql.Identifier("mover", f"{kind}_{self.name}")

    def _sql(self, query: str, **more: sql.Composable) -> sql.Composed:
        """A query of fence.sql with this place's names; texts in it are hexadecimal or uuids."""
        names = {f"{kind}_sequence": sql.SQL(f"{kind}_{self.name}") for kind in ("state", "refused")}
        names |= {
            f"{kind}_function": sql.SQL(f"{kind}_{self.name}") for kind in ("guard", "truncate", "wait")
        }
        triggers = {f"{op}_trigger": sql.Identifier(f"mover_guard_{self.name}_{op}") for op in _DEFINITIONS}
        constants = {
            "key": sql.Literal(self.key),
            "wait_ms": sql.Literal(GUARD_WAIT_MS),
            "tenant": sql.SQL(str(self._tenant)),
        }
        return sql.SQL(load("fence")[query]).format(**(names | triggers | constants | more))

    async def _belongs_to_another(self, conn: psycopg.AsyncConnection[tuple[Any, ...]]) -> bool:
        """Whether a later migration took this place's fence over."""
        cursor = await conn.execute("SELECT migration FROM mover.fence WHERE name = %s", (self.name,))
        row = await cursor.fetchone()
        return row is not None and row[0] != self._identity.migration

    async def _guarded(self, conn: psycopg.AsyncConnection[tuple[Any, ...]]) -> set[TableRef]:
        trigger = {"trigger": f"mover_guard_{self.name}_insert"}
        cursor = await conn.execute(load("fence")["guarded"], trigger)
        return {TableRef(schema, name) for schema, name in await cursor.fetchall()}

    async def _guard(
        self, conn: psycopg.AsyncConnection[tuple[Any, ...]], table: TableRef, column: str, say: Say
    ) -> None:
        statement = self._sql(
            "guard_table",
            table=sql.Identifier(table.schema, table.name),
            column=sql.Identifier(column),
            tenant=sql.Literal(str(self._tenant)),
        )
        await self._under_lock_timeout(conn, statement, table, say)

    async def _unguard(
        self, conn: psycopg.AsyncConnection[tuple[Any, ...]], table: TableRef, say: Say
    ) -> None:
        statement = self._sql("unguard_table", table=sql.Identifier(table.schema, table.name))
        await self._under_lock_timeout(conn, statement, table, say)

    async def _under_lock_timeout(
        self,
        conn: psycopg.AsyncConnection[tuple[Any, ...]],
        statement: sql.Composed,
        table: TableRef,
        say: Say,
    ) -> None:
        async def attempt() -> None:
            async with conn.transaction():
                await conn.execute(statement)

        async def on_wait(number: int) -> None:
            await say(f"guard: waiting for a lock on {table}, try {number}")

        await with_lock_timeout(conn, attempt, on_wait=on_wait)


class WrongState(MoverError):
    """A compare-and-swap on the fence found another state."""

    code = "wrong_state"
