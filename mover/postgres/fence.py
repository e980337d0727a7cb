"""The fence at one place: guards on the tables, the state, and the lock that makes writers wait.

Implements cutover.ports.Fence. The SQL and its reasons stand in `mover/sql/fence.sql`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from typing import Any, TypeAlias
from uuid import uuid4

import psycopg
from psycopg import sql

from mover.core.errors import (
    CutoverAborted,
    LeaseLost,
    LockNotAvailable,
    MoverError,
    Remedy,
    SchemaChanged,
    Unreachable,
)
from mover.core.ids import TableRef, TenantId
from mover.core.tables import Holding
from mover.postgres import owner
from mover.postgres.connect import Database, Identity
from mover.postgres.errors import translate
from mover.postgres.holdings import is_owned, named, owning_columns
from mover.postgres.locks import with_lock_timeout
from mover.sql import load

# A writer that meets a closed fence without a living owner gets a retryable error after this, or after
# this many times the pause budget: a pause that goes well must never refuse.
GUARD_WAIT_MS = 10_000
GUARD_WAIT_BUDGETS = 3
# A transaction open for longer than this when the cutover begins is waited for outside the fence.
MAX_HOLDER_AGE_S = 0.5
_DEFINITIONS = ("insert", "update", "delete", "truncate", "rehome")
_HOLD = "hold"
Connection = psycopg.AsyncConnection[tuple[Any, ...]]
Say = Callable[[str], Awaitable[None]]


class WrongState(MoverError):
    """The fence is in a state that this step of the protocol cannot have left behind."""

    code, remedy = "wrong_state", Remedy.HALT


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
        self._guarded_tables: tuple[Holding, ...] = ()
        self._hold: AsyncExitStack | None = None
        self._holder: Connection | None = None
        self._stray_pid: int | None = None

    async def install(self, tables: Sequence[Holding], state: str, say: Say) -> None:
        """Guards on `tables`, the fence beginning in `state`; repeatable."""
        async with self._database.borrow("guard", client_min_messages="warning") as conn:
            async with conn.transaction():
                await owner.hold(conn, self._identity)
                await conn.execute(self._sql("install"))
                await conn.execute(load("fence")["record"], self._facts() | {"state": state})
            done = await self._guards(conn)
            for holding in tables:
                if not _is_guarded(holding, done):
                    await self._guard(conn, holding, say)
        self._guarded_tables = tuple(tables)

    async def remove(self, say: Say) -> None:
        """Guards, functions and row; nothing happens if they are gone.

        At a place that the tenant had left before this migration, and did not come back to, the earlier
        tombstone stands again instead."""
        async with self._database.borrow("guard", client_min_messages="warning") as conn:
            found = await (await conn.execute("SELECT to_regclass('mover.fence') IS NOT NULL")).fetchone()
            if found is None or not found[0]:
                return
            row = await self._row(conn)
            if row is not None:
                migration, state, tombstone_of = row
                if migration != self._identity.migration:
                    return  # a later migration has taken the place over
                if tombstone_of is not None and state != "open":
                    return await self._hand_back(conn)
            for table in await self._guards(conn):
                await self._unguard(conn, table, say)
            async with conn.transaction():
                await owner.hold(conn, self._identity)
                await self._drop_owned_functions(conn)
                await conn.execute(self._sql("uninstall"))
                await conn.execute("DELETE FROM mover.fence WHERE name = %s", (self.name,))

    async def _hand_back(self, conn: Connection) -> None:
        """The earlier migration's tombstone stands again, for that migration to look after."""
        async with conn.transaction():
            await owner.hold(conn, self._identity)
            await self._change_on(conn, ("closed", "aborted", "moved"), "moved")
            await conn.execute(_HAND_BACK, (self.name, self._identity.migration))

    async def get_ready(self) -> None:
        """Open the holding session: it ends by itself, and its lock with it, should this process freeze."""
        await self.let_go()
        hold = f"{self._hold_s * 1000:.0f}ms"
        self._hold = AsyncExitStack()
        self._holder = await self._hold.enter_async_context(
            self._database.connect(
                _HOLD,
                synchronous_commit="on",
                idle_session_timeout=hold,
                idle_in_transaction_session_timeout=hold,
            )
        )
        with translate(self._database.label):
            guards = await self._guards(self._holder)
            await self._warm_up(self._holder)
        if missing := sorted(h.table for h in self._guarded_tables if not _is_guarded(h, guards)):
            raise SchemaChanged(
                f"{self._database.label}: the guard is gone or disabled on {', '.join(map(str, missing))}",
                hint="Somebody changed its triggers; resume, and they are made again.",
            )

    async def _warm_up(self, conn: Connection) -> None:
        """What the pause executes, without effect: a new session has to read the catalog and to plan."""
        await self._holders(conn)
        await self._transition(conn, (), "closed")

    async def close(self, lock_timeout_s: float) -> str:
        if self._holder is None:
            raise CutoverAborted("the holding session is not open")
        mark = uuid4().hex
        try:
            with translate(self._database.label):
                await self._refuse_old_holders(self._holder)
                await self._close(self._holder, lock_timeout_s, mark)
        except LockNotAvailable as error:
            raise CutoverAborted("writers did not end in time; nothing happened") from error
        except (CutoverAborted, LeaseLost, WrongState):
            raise
        except BaseException:
            self._stray_pid = self._holder.info.backend_pid  # it may still be about to close
            raise
        return mark

    async def _refuse_old_holders(self, conn: Connection) -> None:
        old = [who for who, age_s in await self._holders(conn) if age_s > MAX_HOLDER_AGE_S]
        if old:
            raise CutoverAborted(
                f"transactions that wrote the tenant's rows are open: {', '.join(old)}",
                hint="They are waited for outside the fence; the cutover is tried again.",
            )

    async def _holders(self, conn: Connection) -> list[tuple[str, float]]:
        """Transactions that have written the tenant's rows, and how long they have been open."""
        cursor = await conn.execute(load("fence")["holders"], {"key": self.key}, prepare=True)
        return [(who or "one that has just ended", float(age or 0)) for who, age in await cursor.fetchall()]

    async def _close(self, conn: Connection, lock_timeout_s: float, mark: str) -> None:
        timeout = f"{lock_timeout_s * 1000:.0f}ms"
        await conn.execute("SELECT set_config('lock_timeout', %s, false)", (timeout,))
        # Not pipelined with what follows: should we freeze while waiting, the session ends with the
        # fence open. It holds the lock until after the commit, so that no writer slips in behind the mark.
        await conn.execute("SELECT pg_advisory_lock(%s)", (self.key,))
        cursor = await self._transition(conn, ("open",), "closed", mark)
        if await cursor.fetchone() is None:
            await self._explain(conn, ("open",))

    async def reopen(self) -> None:
        await self._change(("closed", "aborted"), "open")

    async def open(self) -> None:
        await self._change(("closed", "aborted"), "open")

    async def move_away(self) -> None:
        await self._change(("closed",), "moved")

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
        async with self._database.borrow("fence") as conn:
            return await self._state_on(conn)

    async def refused_writes(self) -> int:
        """How many writes the guard has refused since it was installed."""
        statement = sql.SQL("SELECT CASE WHEN is_called THEN last_value ELSE 0 END FROM {}")
        async with self._database.borrow("fence") as conn:
            row = await (await conn.execute(statement.format(self._object("refused")))).fetchone()
            return int(row[0]) if row else 0

    async def let_go(self) -> None:
        """End the holding session, and with it the lock; the state stays."""
        hold, self._hold, self._holder = self._hold, None, None
        if hold is not None:
            await hold.aclose()

    async def _change(self, old: tuple[str, ...], new: str) -> None:
        """On the holding session while it lives, else on a new one. Raises WrongState, LeaseLost."""
        if self._holder is not None and self._stray_pid is None:
            pid = self._holder.info.backend_pid
            try:
                with translate(self._database.label):
                    return await self._change_on(self._holder, old, new)
            except MoverError as error:
                if error.remedy is not Remedy.RETRY:
                    raise
                self._stray_pid = pid  # it died; the state in the database is what counts
        await self.let_go()
        async with self._database.connect("fence", synchronous_commit="on") as conn:
            await self._end_stray(conn)
            await self._change_on(conn, old, new)

    async def _change_on(self, conn: Connection, old: tuple[str, ...], new: str) -> None:
        """Repeatable, so `new` counts as an old state: an earlier try may have got there."""
        cursor = await self._transition(conn, (*old, new), new)
        if await cursor.fetchone() is None:
            await self._explain(conn, old)

    async def _explain(self, conn: Connection, old: tuple[str, ...]) -> None:
        """Raises what a change that came to nothing means."""
        await owner.hold(conn, self._identity)
        found = await self._state_on(conn)
        raise WrongState(f"{self._database.label}: the fence is {found}, not {' or '.join(old)}")

    async def _end_stray(self, conn: Connection) -> None:
        """A session that we lost in the middle may still be about to close the fence: end it first."""
        if self._stray_pid is None:
            return
        facts = {"pid": self._stray_pid, "application_name": self._identity.application_name(_HOLD)}
        row = await (await conn.execute(load("fence")["end_session"], facts)).fetchone()
        if row is not None and not row[0]:
            raise Unreachable(f"{self._database.label}: the lost holding session does not end")
        self._stray_pid = None

    async def _transition(
        self, conn: Connection, old: tuple[str, ...], new: str, mark: str = ""
    ) -> psycopg.AsyncCursor[tuple[Any, ...]]:
        facts = self._facts() | {"old": list(old), "new": new, "mark": mark}
        return await conn.execute(load("fence")["transition"], facts, prepare=True)

    async def _row(self, conn: Connection) -> tuple[Any, ...] | None:
        """(migration, state, tombstone_of), whoever's the place is now."""
        return await (await conn.execute(load("fence")["row"], {"name": self.name})).fetchone()

    async def _state_on(self, conn: Connection) -> str:
        row = await self._row(conn)
        return str(row[1]) if row and row[0] == self._identity.migration else "absent"

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
            f"{kind}_function": sql.SQL(f"{kind}_{self.name}")
            for kind in ("guard", "truncate", "wait", "rehome")
        }
        triggers = {f"{op}_trigger": sql.Identifier(f"mover_guard_{self.name}_{op}") for op in _DEFINITIONS}
        constants = {
            "key": sql.Literal(self.key),
            "wait_ms": sql.Literal(max(GUARD_WAIT_MS, round(self._hold_s * 1000 * GUARD_WAIT_BUDGETS))),
            "tenant": sql.SQL(str(self._tenant)),
        }
        return sql.SQL(load("fence")[query]).format(**(names | triggers | constants | more))

    async def _guards(self, conn: Connection) -> _Guards:
        """The tables that carry our triggers, whether one tells of rehoming, and whether all others are
        there; each always fires. A partitioned table comes before its partitions, whose row triggers go with
        it."""
        triggers = [f"mover_guard_{self.name}_{op}" for op in _DEFINITIONS]
        facts = {"triggers": triggers, "rehome": f"mover_guard_{self.name}_rehome"}
        cursor = await conn.execute(load("fence")["guarded"], facts)
        return {
            TableRef(schema, name): (whole, rehoming)
            for schema, name, rehoming, whole in await cursor.fetchall()
        }

    async def _guard(self, conn: Connection, holding: Holding, say: Say) -> None:
        table = holding.table
        if holding.tenant_column is None:
            await self._make_owned_function(conn, holding)
        statement = self._sql(
            "guard_table",
            table=named(table),
            tenant=sql.Literal(str(self._tenant)),
            **self._conditions(holding),
        )
        await self._under_lock_timeout(conn, statement, table, say)
        if holding.tenant_column is not None and holding.referenced:
            await self._guard_rehoming(conn, holding, holding.tenant_column, say)
        names = {"schema": table.schema, "name": table.name}
        for found in await (await conn.execute(load("fence")["partitions"], names)).fetchall():
            partition = TableRef(*found)
            statement = self._sql("guard_partition", table=named(partition))
            await self._under_lock_timeout(conn, statement, partition, say)

    def _conditions(self, holding: Holding) -> dict[str, sql.Composable]:
        """Whether a row that is inserted, updated or deleted is the tenant's, before or after."""
        if holding.tenant_column is not None:
            column, tenant = sql.Identifier(holding.tenant_column), sql.Literal(str(self._tenant))
            new, old = (sql.SQL(f"{row}.{{}} = {{}}").format(column, tenant) for row in ("NEW", "OLD"))
            return {"inserted": new, "updated": sql.SQL("({} OR {})").format(old, new), "deleted": old}
        function = sql.Identifier("mover", self._owned_function(holding))
        new_values, old_values = (
            sql.SQL(", ").join(
                sql.SQL(f"{row}.{{}}").format(sql.Identifier(c)) for c in owning_columns(holding)
            )
            for row in ("NEW", "OLD")
        )
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
        return f"owned_{self.name}_"

    async def _drop_owned_functions(self, conn: Connection) -> None:
        facts = {"prefix": self._owned_prefix}
        for (function,) in await (await conn.execute(load("fence")["owned_functions"], facts)).fetchall():
            await conn.execute(self._sql("drop_owned_function", function=sql.SQL(function)))

    async def _guard_rehoming(self, conn: Connection, holding: Holding, column: str, say: Say) -> None:
        table = holding.table
        names = sorted({name for referenced in holding.referenced for name in referenced})
        facts = {"schema": table.schema, "name": table.name, "names": names}
        found = await (await conn.execute(load("fence")["column_numbers"], facts)).fetchall()
        statement = self._sql(
            "guard_rehoming",
            table=named(table),
            column=sql.Identifier(column),
            tenant=sql.Literal(str(self._tenant)),
            numbers=sql.SQL(", ").join(sql.Literal(str(number)) for (number,) in found),
        )
        await self._under_lock_timeout(conn, statement, table, say)

    async def _unguard(self, conn: Connection, table: TableRef, say: Say) -> None:
        statement = self._sql("unguard_table", table=named(table))
        await self._under_lock_timeout(conn, statement, table, say)

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


_Guards: TypeAlias = Mapping[TableRef, tuple[bool, bool]]


def _is_guarded(holding: Holding, guards: _Guards) -> bool:
    is_whole, tells_of_rehoming = guards.get(holding.table, (False, False))
    return is_whole and (tells_of_rehoming or not holding.referenced or holding.tenant_column is None)


_HAND_BACK = """
UPDATE mover.fence SET migration = tombstone_of, tombstone_of = NULL
 WHERE name = %s AND migration = %s AND tombstone_of IS NOT NULL
"""
