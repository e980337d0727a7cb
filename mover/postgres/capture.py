"""Capture by triggers, on the side of whoever writes: the log, and the functions that write to it.

The SQL and its reasons stand in `mover/sql/capture.sql`; `change_log` reads what was written.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import psycopg
from psycopg import sql

from mover.core.ids import MigrationId, TableRef
from mover.core.tables import Holding
from mover.postgres.holdings import named, owning_columns
from mover.sql import load

Connection: TypeAlias = psycopg.AsyncConnection[tuple[Any, ...]]
# What an entry says; above KEY: the number of the columns referred to, from 1.
KEY: Final = 0
EMPTIED: Final = -1
GONE: Final = -2
CAME: Final = -3
HOME: Final = -4  # no entry: whose the row is, and what others refer to it by
_SETTINGS: Final = (
    "SET datestyle = 'ISO, MDY' SET intervalstyle = 'postgres' SET timezone = 'UTC'"
    " SET extra_float_digits = 1 SET bytea_output = 'hex' SET lc_monetary = 'C'"
)
Entry: TypeAlias = tuple[int, str]  # what is written down, of the row OLD or NEW


def log_of(migration: MigrationId) -> sql.Identifier:
    return sql.Identifier(f"change_log_{migration.hex}")


def index_of(migration: MigrationId) -> sql.Identifier:
    return sql.Identifier(f"change_log_{migration.hex}_new")


def digest(*of: object) -> str:
    """A short name for a table, or for whatever else is meant, whatever its own."""
    return hashlib.md5("/".join(map(repr, of)).encode(), usedforsecurity=False).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Capture:
    """What the guards of the place `name` write down for one migration."""

    name: str
    migration: MigrationId

    @property
    def told(self) -> sql.Composed:
        """What a TRUNCATE trigger does."""
        return sql.SQL(
            "INSERT INTO mover.{} (xid, relation, part, value) VALUES (pg_current_xact_id(), root, {},"
            " CASE WHEN root <> TG_RELID THEN ARRAY[TG_TABLE_SCHEMA, TG_TABLE_NAME]::text[] END)"
        ).format(log_of(self.migration), sql.Literal(EMPTIED))

    async def make_log(self, conn: Connection) -> None:
        log, index = log_of(self.migration), index_of(self.migration)
        names = {"log": log, "index": index, "name": sql.Literal(f"mover.{log.as_string(None)}")}
        await conn.execute(sql.SQL(load("capture")["make_log"]).format(**names))

    async def make_functions(
        self,
        conn: Connection,
        holding: Holding,
        constants: Mapping[str, sql.Composable],
        let_pass: Mapping[str, sql.Composable],
    ) -> None:
        """Those that the triggers of one table call, by the triggers' kinds; in the caller's transaction."""
        row_functions = {part: self._row_function(holding.table, part) for part in _parts(holding)}
        oid = await oid_of(conn, holding.table)
        is_plain = await _are_plain(conn, oid, holding)
        for part, columns in _parts(holding).items():
            values = [_as_text(sql.SQL("($1).{}").format(sql.Identifier(c)), is_plain) for c in columns]
            values = values or [_as_text(sql.SQL("($1)").format(), is_plain)]
            parts = {
                "function": row_functions[part],
                "table": named(holding.table),
                "values": sql.SQL("ARRAY[{}]").format(sql.SQL(", ").join(values)),
            }
            await conn.execute(sql.SQL(load("capture")["row_function"]).format(**parts))
        settings = sql.SQL("" if is_plain else _SETTINGS)
        for kind, writes in _writes(holding).items():
            parts = {
                **constants,
                "let_pass": let_pass[kind],
                "function": self.function(holding.table, kind),
                "settings": settings,
                "writes": sql.SQL("; ").join(self._write(holding.table, oid, write) for write in writes),
            }
            await conn.execute(sql.SQL(load("capture")["capture_function"]).format(**parts))

    def _write(self, table: TableRef, oid: int, write: Write) -> sql.Composed:
        entries = sql.SQL(", ").join(
            sql.SQL("(pg_current_xact_id(), {}, {}, mover.{}({}))").format(
                sql.Literal(oid),
                sql.Literal(part),
                self._row_function(table, part),
                sql.SQL("NEW" if which == "NEW" else "OLD"),
            )
            for part, which in write.entries
        )
        log = log_of(self.migration)
        if write.if_changed is None:
            return sql.SQL(load("capture")["capture_write"]).format(log=log, entries=entries)
        return sql.SQL(load("capture")["capture_write_if_changed"]).format(
            log=log, entries=entries, row_function=self._row_function(table, write.if_changed)
        )

    def function(self, table: TableRef, kind: str) -> sql.Identifier:
        return sql.Identifier(f"{self.prefix}{digest(table)}_{kind}")

    @property
    def prefix(self) -> str:
        return f"capture_{self.name}_"

    @property
    def row_prefix(self) -> str:
        return f"row_{self.name}_"

    def _row_function(self, table: TableRef, part: int) -> sql.Identifier:
        of = "whole" if part in (GONE, CAME) else "home" if part == HOME else str(part)
        return sql.Identifier(f"{self.row_prefix}{digest(table)}_{of}")


def _as_text(value: sql.Composed, is_plain: bool) -> sql.Composed:
    """As the type's output function writes it: what is no type of the server's may have a cast of somebody
    else's, which would run with our rights."""
    if is_plain:
        return sql.SQL("{}::text").format(value)
    return sql.SQL("CASE WHEN {0} IS DISTINCT FROM NULL THEN format('%s', {0}) END").format(value)


def whose(holding: Holding) -> tuple[str, ...]:
    """The columns that say whose the row is."""
    return (holding.tenant_column,) if holding.tenant_column else owning_columns(holding)


def _homing_columns(holding: Holding) -> tuple[str, ...]:
    """These, and those by which others refer to it."""
    below = (name for names in holding.referenced for name in names)
    return tuple(dict.fromkeys((*whose(holding), *below)))


def _parts(holding: Holding) -> dict[int, Sequence[str]]:
    """What is written of a row, by its number: of no columns, the whole row."""
    if not holding.key:
        return {GONE: ()}
    below = dict(enumerate(holding.referenced, start=1))
    return {KEY: holding.key, **below, **({HOME: _homing_columns(holding)} if below else {})}


@dataclass(frozen=True, slots=True)
class Write:
    """What a trigger writes at once, if need be only where a part of the row has changed."""

    entries: Sequence[Entry]
    if_changed: int | None = None


def _writes(holding: Holding) -> dict[str, list[Write]]:
    """By the kind of the trigger."""
    if not holding.key:
        gone, came = (GONE, "OLD"), (CAME, "NEW")
        return {"insert": [Write([came])], "update": [Write([gone, came])], "delete": [Write([gone])]}
    below = range(1, len(holding.referenced) + 1)
    update = [Write([(KEY, "NEW")]), Write([(KEY, "OLD")], if_changed=KEY)]
    if below:
        # Those that refer to the row come or go with it, without a change of their own.
        update.append(Write([(part, row) for part in below for row in ("OLD", "NEW")], if_changed=HOME))
    return {
        # Rows may be there before the one that they refer to: under a DEFERRABLE foreign key, or where one
        # statement makes both.
        "insert": [Write([(KEY, "NEW"), *((part, "NEW") for part in below)])],
        "update": update,
        "delete": [Write([(KEY, "OLD"), *((part, "OLD") for part in below)])],
    }


async def _are_plain(conn: Connection, oid: int, holding: Holding) -> bool:
    """Whether what is written of a row is the same whatever the writer's settings."""
    names = {name for columns in _parts(holding).values() for name in columns}
    if not holding.key:
        return False
    facts = {"relation": oid, "names": list(names)}
    row = await (await conn.execute(load("capture")["are_plain"], facts)).fetchone()
    return row is not None and bool(row[0])


async def oid_of(conn: Connection, table: TableRef) -> int:
    row = await (await conn.execute(_OID, (table.schema, table.name))).fetchone()
    assert row is not None
    return int(row[0])


async def functions(conn: Connection, prefixes: Iterable[str]) -> list[sql.SQL]:
    """Of our schema, those whose names begin so, each with its parameters."""
    found: list[sql.SQL] = []
    for prefix in prefixes:
        cursor = await conn.execute(load("fence")["functions"], {"prefix": prefix})
        found += [sql.SQL(function) for (function,) in await cursor.fetchall()]
    return found


async def log_bytes(conn: Connection, migration: MigrationId) -> int:
    """With its index; 0 where there is none."""
    name = f"mover.{log_of(migration).as_string(None)}"
    row = await (await conn.execute(load("capture")["log_bytes"], {"name": name})).fetchone()
    return int(row[0]) if row else 0


async def drop_log(conn: Connection, migration: MigrationId) -> None:
    """In the caller's transaction."""
    await conn.execute(sql.SQL(load("capture")["drop_log"]).format(log=log_of(migration)))


_OID = "SELECT format('%%I.%%I', %s::text, %s::text)::regclass::oid"
