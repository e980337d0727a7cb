"""The fence at one place: guards on the tables, the state, and the lock that makes writers wait.

Implements cutover.ports.Fence. The SQL and its reasons stand in `mover/sql/fence.sql`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any

import psycopg
from psycopg import sql

from mover.core.crash import reach
from mover.core.errors import (
    CutoverAborted,
    LeaseLost,
    LockNotAvailable,
    MoverError,
    Remedy,
    SchemaChanged,
    Unreachable,
)
from mover.core.ids import TableRef, TenantId, new_mark
from mover.core.tables import Holding
from mover.postgres import owner
from mover.postgres.connect import Database, Identity
from mover.postgres.errors import translate
from mover.postgres.guards import UNGUARDED, Connection, Guards, Say
from mover.sql import load

# A transaction open for longer than this when the cutover begins is waited for outside the fence.
MAX_HOLDER_AGE_S = 0.5
# For the lock of a table that somebody keeps for himself, before the fence is closed.
READY_LOCK_S = 1
_HOLD = "hold"


class WrongState(MoverError):
    """The fence is in a state that this step of the protocol cannot have left behind."""

    code, remedy = "wrong_state", Remedy.HALT


class PgFence:
    """One tenant's fence in one vertical's schemas of one database."""

    def __init__(
        self,
        database: Database,
        tenant: TenantId,
        vertical: str,
        identity: Identity,
        hold_s: float,
    ) -> None:
        """A session that holds the tenant ends by itself when it was idle for `hold_s`."""
        self._database, self._tenant, self._vertical = database, tenant, vertical
        self._identity, self._hold_s = identity, hold_s
        digest = hashlib.md5(f"{tenant}/{vertical}".encode(), usedforsecurity=False).digest()
        self.name = digest.hex()[:16]
        self.key = int.from_bytes(digest[:8], "big", signed=True)
        self._guards = self._guards_of()
        self._guarded_tables: tuple[Holding, ...] = ()
        self._hold: AsyncExitStack | None = None
        self._holder: Connection | None = None
        self._stray_pid: int | None = None

    def _guards_of(self, *, captures: bool = False, is_filled: bool = False) -> Guards:
        place = (self.name, self.key, self._tenant, self._identity, self._hold_s)
        return Guards(*place, captures=captures, is_filled=is_filled)

    async def install(
        self, tables: Sequence[Holding], state: str, say: Say, *, captures: bool = False
    ) -> None:
        """Guards on `tables`, the fence beginning in `state`: "open", or "closed" where rows are loaded;
        repeatable. `captures`: they write down what they let pass."""
        self._guards = self._guards_of(captures=captures, is_filled=state == "closed")
        async with self._database.borrow("guard", client_min_messages="warning") as conn:
            async with conn.transaction():
                await owner.hold(conn, self._identity)
                await self._guards.make_functions(conn, tables)
                await conn.execute(load("fence")["record"], self._facts() | {"state": state})
            done = await self._guards.standing(conn)
            for holding in tables:
                found = done.get(holding.table, UNGUARDED)
                if not self._guards.suffices(found, holding):
                    if found.telling and found.captures != captures:
                        await self._guards.stop_telling(conn, holding.table, say)
                    await self._guards.guard(conn, holding, say)
        self._guarded_tables = tuple(tables)

    async def remove(self, tables: Sequence[Holding], say: Say) -> None:
        """Guards, functions and row; nothing happens if they are gone.

        At a place that the tenant had left before this migration, and did not come back to, the earlier
        tombstone stands again instead, on `tables`."""
        async with self._database.borrow("guard", client_min_messages="warning") as conn:
            found = await (await conn.execute("SELECT to_regclass('mover.fence') IS NOT NULL")).fetchone()
            if found is None or not found[0]:
                return
            row = await self._row(conn)
            if row is not None:
                migration, state, tombstone_of = row
                if migration != self._identity.migration:
                    # Somebody else's: a later migration's, or an earlier one's that we failed to take over.
                    await conn.execute(load("fence")["correct"], self._facts())
                    return
                if tombstone_of is not None and state != "open":
                    return await self._hand_back(conn, tables, say)
            for table in await self._guards.standing(conn):
                await self._guards.unguard(conn, table, say)
            async with conn.transaction():
                await owner.hold(conn, self._identity)
                await self._guards.drop_functions(conn)
                await conn.execute("DELETE FROM mover.fence WHERE name = %s", (self.name,))

    async def keep_tombstone(self, tables: Sequence[Holding], say: Say) -> None:
        """Where the tenant's rows are gone, only what refuses his writes stays: nothing tells or writes down
        anything, and nothing can be written to owned tables that the guards of their owners would let pass,
        so that they need none of their own, which would stand in the way of ALTER TABLE."""
        async with self._database.borrow("guard", client_min_messages="warning") as conn:
            if await self._state_on(conn) == "moved":  # else a later migration has taken the place over
                await self._refuse_only(conn, tables, say)

    async def _refuse_only(self, conn: Connection, tables: Sequence[Holding], say: Say) -> None:
        self._guards = self._guards_of()
        standing = await self._guards.standing(conn)
        for holding in tables:
            found = standing.get(holding.table)
            if found is None:
                continue
            if holding.tenant_column is None:
                await self._guards.unguard(conn, holding.table, say)
                continue
            if found.telling:
                await self._guards.stop_telling(conn, holding.table, say)
            if found.captures or found.spares_ours:
                await self._guards.guard(conn, replace(holding, referenced=()), say)
        async with conn.transaction():
            await owner.hold(conn, self._identity)
            await self._guards.drop_helpers(conn)

    async def stop_capturing(self, tables: Sequence[Holding]) -> None:
        """Where the tenant has left, nobody gets past the guards to write anything down; nor will he if he
        comes back. Elsewhere they do until they are gone."""
        async with self._database.borrow("guard") as conn:
            if await self._state_on(conn) == "moved":
                async with conn.transaction():
                    await owner.hold(conn, self._identity)
                    await self._guards.let_pass_only(conn, tables)

    async def _hand_back(self, conn: Connection, tables: Sequence[Holding], say: Say) -> None:
        """The earlier migration's tombstone stands again as it was, for that migration to look after."""
        async with conn.transaction():
            await owner.hold(conn, self._identity)
            await self._change_on(conn, ("closed", "aborted", "moved"), "moved")
        await self._refuse_only(conn, tables, say)
        async with conn.transaction():
            await owner.hold(conn, self._identity)
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
                lock_timeout=f"{READY_LOCK_S}s",
                idle_session_timeout=hold,
                idle_in_transaction_session_timeout=hold,
            )
        )
        try:
            with translate(self._database.label):
                missing = await self._weakly_guarded(self._holder)
                await self._warm_up(self._holder)
        except LockNotAvailable as error:  # what the triggers say is not read beside ACCESS EXCLUSIVE
            raise CutoverAborted("somebody holds the lock of a table that is to be fenced") from error
        if missing:
            raise SchemaChanged(
                f"{self._database.label}: the guard is gone or disabled on {', '.join(map(str, missing))}",
                hint="Somebody changed its triggers; resume, and they are made again.",
            )

    async def _warm_up(self, conn: Connection) -> None:
        """What the pause executes, without effect: a new session has to read the catalog and to plan."""
        await self._holders(conn)
        await conn.execute(load("fence")["altering"], {"triggers": self._guards.names}, prepare=True)
        await self._transition(conn, (), "closed")

    async def close(self, lock_timeout_s: float) -> str:
        if self._holder is None:
            raise CutoverAborted("the holding session is not open")
        mark = new_mark()
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
        reach("cutover.locked")
        await self._refuse_altered(conn)
        cursor = await self._transition(conn, ("open",), "closed", mark)
        if await cursor.fetchone() is None:
            await self._explain(conn, ("open",))

    async def _refuse_altered(self, conn: Connection) -> None:
        """Whoever takes our triggers away, or lets them sleep, writes past them and holds no lock of the
        tenant's; until he commits, the catalog does not show it. Called under the lock."""
        cursor = await conn.execute(load("fence")["altering"], {"triggers": self._guards.names}, prepare=True)
        found = [table for (table,) in await cursor.fetchall()]
        found = found or [str(table) for table in await self._weakly_guarded(conn)]
        if found:
            await conn.execute("SELECT pg_advisory_unlock_all()")
            raise CutoverAborted(f"somebody alters, or has altered, {', '.join(found)}")

    async def _weakly_guarded(self, conn: Connection) -> list[TableRef]:
        standing = await self._guards.standing(conn)
        return sorted(
            holding.table
            for holding in self._guarded_tables
            if not self._guards.suffices(standing.get(holding.table, UNGUARDED), holding)
        )

    async def reopen(self) -> None:
        await self._change(("closed", "aborted"), "open")

    async def expect_return(self) -> None:
        """moved -> closed: the tenant may come back here."""
        await self._change(("moved",), "closed")

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
            "opened": f"mover.opened_{self.name}",
        }

    def _object(self, kind: str) -> sql.Identifier:
        return sql.Identifier("mover", f"{kind}_{self.name}")


_HAND_BACK = """
UPDATE mover.fence SET migration = tombstone_of, tombstone_of = NULL
 WHERE name = %s AND migration = %s AND tombstone_of IS NOT NULL
"""
