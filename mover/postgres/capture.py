"""Capture by triggers, on the side of whoever writes: the log, and the functions that write to it.

The SQL and its reasons stand in `mover/sql/capture.sql`; `change_log` reads what was written.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
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
Entry: TypeAlias = tuple[int, str]  # what is written down, of the row OLD or NEW


def log_of(migration: MigrationId) -> sql.Identifier:
    return sql.Identifier(f"change_log_{migration.hex}")


def index_of(migration: MigrationId) -> sql.Identifier:
    return sql.Identifier(f"change_log_{migration.hex}_new")


def digest(table: TableRef) -> str:
    """A short name for a table, whatever its own."""
    return hashlib.md5(str(table).encode(), usedforsecurity=False).hexdigest()[:16]


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
        self, conn: Connection, holding: Holding, constants: dict[str, sql.Composable]
    ) -> None:
        """Those that the triggers of one table call; in the caller's transaction."""
        for part, columns in _parts(holding).items():
            values = [sql.SQL("($1).{}::text").format(sql.Identifier(column)) for column in columns]
            values = values or [sql.SQL("($1)::text").format()]
            parts = {
                "function": self._row_function(holding.table, part),
                "table": named(holding.table),
                "values": sql.SQL("ARRAY[{}]").format(sql.SQL(", ").join(values)),
            }
            await conn.execute(sql.SQL(load("capture")["row_function"]).format(**parts))
        oid = await oid_of(conn, holding.table)
        for kind, entries in _entries(holding).items():
            written = sql.SQL(", ").join(
                sql.SQL("(pg_current_xact_id(), {}, {}, mover.{}({}))").format(
                    sql.Literal(oid),
                    sql.Literal(part),
                    self._row_function(holding.table, part),
                    sql.SQL("NEW" if which == "NEW" else "OLD"),
                )
                for part, which in entries
            )
            parts = {
                **constants,
                "function": self.function(holding.table, kind),
                "log": log_of(self.migration),
                "entries": written,
            }
            await conn.execute(sql.SQL(load("capture")["capture_function"]).format(**parts))

    def function(self, table: TableRef, kind: str) -> sql.Identifier:
        return sql.Identifier(f"{self.prefix}{digest(table)}_{kind}")

    @property
    def prefix(self) -> str:
        return f"capture_{self.name}_"

    @property
    def row_prefix(self) -> str:
        return f"row_{self.name}_"

    def _row_function(self, table: TableRef, part: int) -> sql.Identifier:
        of = "whole" if part in (GONE, CAME) else str(part)
        return sql.Identifier(f"{self.row_prefix}{digest(table)}_{of}")


def telling(holding: Holding) -> tuple[str, ...]:
    """The triggers beside those that guard, by kind."""
    return tuple(kind for kind in ("rekey", "rehome") if kind in _entries(holding))


def whose(holding: Holding) -> tuple[str, ...]:
    """The columns that say whose the row is."""
    return (holding.tenant_column,) if holding.tenant_column else owning_columns(holding)


def homing_columns(holding: Holding) -> tuple[str, ...]:
    """These, and those by which others refer to it."""
    below = (name for names in holding.referenced for name in names)
    return tuple(dict.fromkeys((*whose(holding), *below)))


def _parts(holding: Holding) -> dict[int, Sequence[str]]:
    """What is written of a row, by its number: of no columns, the whole row."""
    if not holding.key:
        return {GONE: ()}
    return {KEY: holding.key, **dict(enumerate(holding.referenced, start=1))}


def _entries(holding: Holding) -> dict[str, list[Entry]]:
    """What each kind of trigger writes."""
    if not holding.key:
        gone, came = (GONE, "OLD"), (CAME, "NEW")
        return {"insert": [came], "update": [gone, came], "delete": [gone]}
    below = range(1, len(holding.referenced) + 1)
    entries: dict[str, list[Entry]] = {
        # Rows may be there before the one that they refer to: under a DEFERRABLE foreign key, or where one
        # statement makes both.
        "insert": [(KEY, "NEW"), *((part, "NEW") for part in below)],
        "update": [(KEY, "NEW")],
        "delete": [(KEY, "OLD"), *((part, "OLD") for part in below)],
        "rekey": [(KEY, "OLD")],
    }
    if below:
        entries["rehome"] = [(part, row) for part in below for row in ("OLD", "NEW")]
    return entries


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
