"""The fence's triggers on the tables of one place: guards that make writers of the tenant's rows ask its
state, and those that tell of owners that change; or, with capture by triggers, write down every change.

The SQL and its reasons stand in `mover/sql/fence.sql`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import psycopg
from psycopg import sql

from mover.core.ids import TableRef, TenantId
from mover.core.tables import Holding, Tie
from mover.postgres import capture, owner
from mover.postgres.capture import Capture
from mover.postgres.connect import Identity
from mover.postgres.holdings import is_tenants, named, owning_columns
from mover.postgres.locks import with_lock_timeout
from mover.sql import load

# A writer that meets a closed fence without a living owner gets a retryable error after this, or after
# this many times the pause budget: a pause that goes well must never refuse.
GUARD_WAIT_MS = 10_000
GUARD_WAIT_BUDGETS = 3
_GUARDING = ("insert", "update", "delete", "truncate")
_TELLING = ("rehome", "rekey", "vacate", "hand_over")
Connection = psycopg.AsyncConnection[tuple[Any, ...]]
Say = Callable[[str], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Found:
    """The triggers of one place on one table that always fire."""

    is_guarded: bool  # all four, also on its partitions
    telling: int  # of changes of owners, or of keys
    captures: bool  # they write down what they let pass
    spares_ours: bool  # no event is queued for the rows that the mover writes


UNGUARDED = Found(is_guarded=False, telling=0, captures=False, spares_ours=False)
Standing: TypeAlias = Mapping[TableRef, Found]


class Guards:
    """Those of the place `name`, whose lock is `key`; `captures`: they write down what they let pass;
    `is_filled`: the mover loads rows here."""

    def __init__(
        self,
        name: str,
        key: int,
        tenant: TenantId,
        identity: Identity,
        hold_s: float,
        *,
        captures: bool,
        is_filled: bool,
    ) -> None:
        self._name, self._key, self._tenant, self._identity = name, key, tenant, identity
        self._wait_ms = max(GUARD_WAIT_MS, round(hold_s * 1000 * GUARD_WAIT_BUDGETS))
        self._capture = Capture(name, identity.stream)
        self._captures, self._is_filled = captures, is_filled

    async def make_functions(self, conn: Connection, tables: Iterable[Holding]) -> None:
        """In the caller's transaction."""
        await conn.execute(self._sql("install"))
        await self._make_guard_function(conn, self._names["guard_function"], self._let_pass())
        if self._captures:
            await self._capture.make_log(conn)
        elif any(map(self._telling, tables)):
            await conn.execute(self._sql("tell_function"))
        for holding in tables:
            await self._make_functions_of(conn, holding)
        told = self._capture.told if self._captures else sql.SQL(load("fence")["truncate_in_stream"])
        await conn.execute(self._sql("truncate_function", told=told))

    async def _make_functions_of(self, conn: Connection, holding: Holding) -> None:
        """Owners come first."""
        is_owned = holding.tenant_column is None
        if is_owned:
            await self._make_owned_function(conn, holding)
        ours = self._conditions(holding)
        let_pass = {kind: self._let_pass(ours[kind] if is_owned else None) for kind in ours}
        if self._captures:
            await self._capture.make_functions(conn, holding, self._names, let_pass)
        elif is_owned:
            for kind in ours:
                await self._make_guard_function(conn, self._called(holding, kind), let_pass[kind])

    async def _make_guard_function(
        self, conn: Connection, function: sql.Composable, let_pass: sql.Composable
    ) -> None:
        await conn.execute(self._sql("guard_function", function=function, let_pass=let_pass))

    def _let_pass(self, ours: sql.Composable | None = None) -> sql.Composed:
        """`ours`: what tells whether the row is the tenant's, where that is not certain."""
        if ours is None:
            return self._sql("let_pass", moved=self._sql("refuse"))
        moved = self._sql("refuse_if_ours", ours=ours)
        return self._sql("let_pass_in_doubt", moved=moved, ours=ours)

    async def let_pass_only(self, conn: Connection, tables: Iterable[Holding]) -> None:
        """The functions that write down what they let pass do so no more, and guard as before; in the
        caller's transaction, locking nothing of the application's."""
        for holding in tables:
            ours = self._conditions(holding) if holding.tenant_column is None else {}
            for kind in self._conditions(holding):
                function = self._capture.function(holding.table, kind)
                await self._make_guard_function(conn, function, self._let_pass(ours.get(kind)))
        await conn.execute(self._sql("truncate_function", told=sql.SQL("NULL")))
        await self.stop_capturing(conn)

    async def stop_capturing(self, conn: Connection) -> None:
        """Where nobody gets past the guards any more: nothing of ours depends on columns for it; in the
        caller's transaction, locking nothing of the application's."""
        await self._drop(conn, [self._capture.row_prefix])

    def suffices(self, found: Found, holding: Holding) -> bool:
        return (
            found.is_guarded
            and found.captures == self._captures
            and (found.spares_ours or not self._is_filled)
            and found.telling >= len(self._telling(holding))
        )

    def _telling(self, holding: Holding) -> tuple[str, ...]:
        """The triggers that tell of changes beside those that guard."""
        handing_over = ("hand_over",) if holding.referenced else ()
        if self._captures:
            return handing_over
        if holding.tenant_column is None or not holding.referenced:
            return handing_over
        return ("rehome", *_vacating(holding), *handing_over)

    @property
    def names(self) -> list[str]:
        """Of all triggers of this place."""
        return [self._trigger(kind) for kind in (*_GUARDING, *_TELLING)]

    async def standing(self, conn: Connection) -> Standing:
        """The tables that carry triggers of this place, a partitioned one before its partitions, whose row
        triggers go with it."""
        facts = {
            "guarding": [self._trigger(kind) for kind in _GUARDING],
            "telling": [self._trigger(kind) for kind in _TELLING],
        }
        cursor = await conn.execute(load("fence")["guarded"], facts)
        return {TableRef(schema, name): Found(*found) for schema, name, *found in await cursor.fetchall()}

    async def guard(self, conn: Connection, holding: Holding, say: Say) -> None:
        table = holding.table
        conditions = self._conditions(holding)
        if holding.tenant_column is None:
            conditions = {kind: _or_in_doubt(condition) for kind, condition in conditions.items()}
        if self._is_filled or holding.tenant_column is None:
            conditions = {kind: self._of_others(condition) for kind, condition in conditions.items()}
        called = {f"{kind}_function": self._called(holding, kind) for kind in conditions}
        named_conditions = {f"{kind}_condition": condition for kind, condition in conditions.items()}
        statement = self._sql("guard_table", table=named(table), **named_conditions, **called)
        await self._under_lock_timeout(conn, statement, table, say)
        if not self._captures and holding.tenant_column is not None and holding.referenced:
            await self._tell_of_changes(conn, holding, say)
        if holding.referenced:
            await self._tell_of_handing_over(conn, holding, say)
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

    async def drop_helpers(self, conn: Connection) -> None:
        """All but what plain guards call, after the triggers that call it; in the caller's transaction."""
        for view in await (
            await conn.execute(load("fence")["views"], {"prefix": self._view_prefix})
        ).fetchall():
            await conn.execute(self._sql("drop_view", view=sql.Identifier(*view)))
        capturing = [self._capture.prefix, self._capture.row_prefix]
        kinds = ("tell", "owned", "hold", "ours", "hand_over")
        of_tables = [*(f"{kind}_{self._name}" for kind in kinds), f"guard_{self._name}_"]
        await self._drop(conn, [*capturing, *of_tables])

    async def drop_functions(self, conn: Connection) -> None:
        """After the last trigger; in the caller's transaction."""
        await self.drop_helpers(conn)
        await conn.execute(self._sql("uninstall"))

    async def _drop(self, conn: Connection, prefixes: Iterable[str]) -> None:
        for function in await capture.functions(conn, prefixes):
            await conn.execute(self._sql("drop_function", function=function))

    def _called(self, holding: Holding, kind: str) -> sql.Composable:
        """The function that the table's trigger calls."""
        if self._captures:
            return self._capture.function(holding.table, kind)
        if holding.tenant_column is None:
            return sql.Identifier(f"{self._of('guard', holding.table)}_{kind}")
        return self._names["guard_function"]

    def _conditions(self, holding: Holding) -> dict[str, sql.Composable]:
        """Whether a row that is inserted, updated or deleted is the tenant's, before or after; by the kind of
        the trigger. Of an owned row: NULL where it is in doubt."""
        if holding.tenant_column is not None:
            column, tenant = sql.Identifier(holding.tenant_column), sql.Literal(str(self._tenant))
            new, old = (sql.SQL(f"{row}.{{}} = {{}}").format(column, tenant) for row in ("NEW", "OLD"))
            either = sql.SQL("{} = ANY (ARRAY[OLD.{}, NEW.{}])").format(tenant, column, column)
            return {"insert": new, "update": either, "delete": old}
        function = sql.Identifier("mover", self._of("owned", holding.table))
        new_values, old_values = (_values(row, owning_columns(holding)) for row in ("NEW", "OLD"))
        refers_anew = sql.SQL("ROW({}) IS DISTINCT FROM ROW({})").format(old_values, new_values)
        inserted = sql.SQL("{}({}, true)").format(function, new_values)
        deleted = sql.SQL("{}({}, false)").format(function, old_values)
        updated = sql.SQL("({}({}, true) OR {anew} AND {})").format(
            function, new_values, deleted, anew=refers_anew
        )
        return {"insert": inserted, "update": updated, "delete": deleted}

    def _of_others(self, condition: sql.Composable) -> sql.Composed:
        """The condition, for sessions that are not the mover's."""
        asked = "current_setting('mover.tenant', true) IS DISTINCT FROM {tenant_value} AND {condition}"
        return sql.SQL(asked).format(**self._names, condition=condition)

    async def _make_owned_function(self, conn: Connection, holding: Holding) -> None:
        columns = owning_columns(holding)
        parameters = sql.SQL(", ").join(
            sql.SQL("{}.{}%TYPE").format(named(holding.table), sql.Identifier(column)) for column in columns
        )
        asked = [
            self._sql(
                "owned_by",
                owner_view=await self._make_owner_view(conn, holding, tie),
                chosen=_chosen(tie, columns, await _collations(conn, tie)),
                refers=_refers(tie, columns),
                is_owned=sql.Literal(tie.parent.tenant_column is None),
                owner_oid=sql.Literal(await capture.oid_of(conn, tie.parent.table)),
                hand_over_function=sql.Literal(f"mover.{self._of('hand_over', tie.parent.table)}"),
            )
            for tie in holding.ties
        ]
        function = sql.Identifier(self._of("owned", holding.table))
        ties = sql.SQL("\n").join(asked)
        await conn.execute(
            self._sql("owned_function", owned_function=function, parameters=parameters, ties=ties)
        )

    async def _make_owner_view(self, conn: Connection, holding: Holding, tie: Tie) -> sql.Identifier:
        referenced, table, ours = _aliased(tie.referenced), named(tie.parent.table), self._looks_up(tie)
        oid = await capture.oid_of(conn, tie.parent.table)
        name = f"{self._view_prefix}{capture.digest(holding.table, oid, tie, ours.as_string(None))}"
        found = await (await conn.execute(load("fence")["views"], {"prefix": name})).fetchall()
        view = sql.Identifier(name)
        if not found:
            parts = {"owner_view": view, "referenced": referenced, "ours": ours, "table": table}
            await conn.execute(self._sql("owner_view", **parts))
        return view

    def _looks_up(self, tie: Tie) -> sql.Composed:
        """Whether the owner `o` is the tenant's, for a look-up that locks what it depends on."""
        if tie.parent.tenant_column is not None:
            return is_tenants(tie.parent, "o", self._tenant)
        function = sql.Identifier("mover", self._of("owned", tie.parent.table))
        return sql.SQL("{}({}, false)").format(function, _values("o", owning_columns(tie.parent)))

    def _of(self, kind: str, table: TableRef) -> str:
        """The name of one table's function of that kind."""
        return f"{kind}_{self._name}_{capture.digest(table)}"

    @property
    def _view_prefix(self) -> str:
        return f"owner_{self._name}_"

    async def _tell_of_handing_over(self, conn: Connection, holding: Holding, say: Say) -> None:
        """A row with the tenant column is handed over when it comes to the tenant. Another may be later, with
        an owner that those who look now do not lock."""
        table, whose = holding.table, capture.whose(holding)
        itself = sql.SQL(" AND ").join(
            sql.SQL("o.{0} = ($1).{0}").format(sql.Identifier(name)) for name in holding.referenced[0]
        )
        given = sql.SQL(", ").join(sql.SQL("($1).{0} AS {0}").format(sql.Identifier(n)) for n in whose)
        ours = sql.SQL("{} FROM (SELECT {}) AS r").format(is_tenants(holding, "r", self._tenant), given)
        kinds = ("hold", "ours", "hand_over")
        names = {f"{kind}_function": sql.Identifier(self._of(kind, table)) for kind in kinds}
        parts = {"table": named(table), **names}
        async with conn.transaction():
            await owner.hold(conn, self._identity)
            function = {"function": f"mover.{self._of('hand_over', table)}"}
            for (uncalled,) in await (await conn.execute(load("fence")["uncalled"], function)).fetchall():
                await conn.execute(self._sql("drop_function", function=sql.SQL(uncalled)))
            is_owned = sql.Literal(holding.tenant_column is None)
            made = self._sql("hand_over_function", itself=itself, ours=ours, is_owned=is_owned, **parts)
            await conn.execute(made)
        arrives = sql.SQL("true") if holding.tenant_column is None else self._conditions(holding)["insert"]
        old_values, new_values = (_values(row, whose) for row in ("OLD", "NEW"))
        statement = self._sql(
            "hand_over", old_values=old_values, new_values=new_values, arrives=arrives, **parts
        )
        await self._under_lock_timeout(conn, statement, table, say)

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
        for kind in ("rehome", *_vacating(holding)):
            await self._under_lock_timeout(conn, self._sql(f"tell_of_{kind}", **parts), table, say)

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
        """A query of fence.sql with this place's names."""
        return sql.SQL(load("fence")[query]).format(**(self._names | more))

    @cached_property
    def _names(self) -> dict[str, sql.Composable]:
        """Texts in them are hexadecimal or uuids."""
        names = {
            f"{kind}_sequence": sql.SQL(f"{kind}_{self._name}")
            for kind in ("state", "refused", "opened", "owners", "parents")
        }
        names |= {
            f"{kind}_function": sql.SQL(f"{kind}_{self._name}")
            for kind in ("guard", "ask", "refuse", "truncate", "wait", "tell")
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
        return {**names, **triggers, **constants}


def _or_in_doubt(condition: sql.Composable) -> sql.Composed:
    return sql.SQL("({}) IS NOT FALSE").format(condition)


def _aliased(names: Sequence[str]) -> sql.Composed:
    return sql.SQL(", ").join(
        sql.SQL("o.{} AS {}").format(sql.Identifier(name), _key(n)) for n, name in enumerate(names, start=1)
    )


def _chosen(tie: Tie, columns: Sequence[str], collations: Sequence[sql.Composable]) -> sql.Composed:
    """The owner that the function's parameters, which are `columns`, refer to. All parameters of a function
    have one collation; indexes are found by that of their column."""
    return sql.SQL(" AND ").join(
        sql.SQL("{} = {}{}").format(_key(n), sql.SQL(f"${columns.index(name) + 1}"), collation)
        for n, (name, collation) in enumerate(zip(tie.columns, collations, strict=True), start=1)
    )


async def _collations(conn: Connection, tie: Tie) -> list[sql.Composable]:
    """Of the columns referred to; nothing where the type has none."""
    facts = {"relation": await capture.oid_of(conn, tie.parent.table), "names": list(tie.referenced)}
    found = await (await conn.execute(load("fence")["collations"], facts)).fetchall()
    return [sql.SQL(" COLLATE {}").format(sql.Identifier(*c)) if c[0] else sql.SQL("") for c in found]


def _refers(tie: Tie, columns: Sequence[str]) -> sql.Composed:
    """Whether they refer to any at all."""
    return sql.SQL(" AND ").join(sql.SQL(f"${columns.index(name) + 1} IS NOT NULL") for name in tie.columns)


def _key(number: int) -> sql.Identifier:
    return sql.Identifier(f"key_{number}")


def _vacating(holding: Holding) -> tuple[str, ...]:
    """The triggers that tell which values others' rows gave up, for which the tenant's may wait."""
    kinds = {"update": "rekey", "delete": "vacate"}
    return tuple(kind for event, kind in kinds.items() if event in holding.awaited)


def _values(row: str, names: Iterable[str]) -> sql.Composed:
    return sql.SQL(", ").join(sql.SQL(f"{row}.{{}}").format(sql.Identifier(name)) for name in names)
