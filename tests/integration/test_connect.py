"""Connections do their work whatever an operator has set as defaults for the role or the database."""

from __future__ import annotations

import psycopg
from psycopg import sql

from mover.core.secret import Secret
from mover.postgres.connect import Database

# Each would end a wave, a comparison or the fence's holder in the middle, or change a value's text.
DEFAULTS = {
    "statement_timeout": "10ms",
    "lock_timeout": "10ms",
    "idle_in_transaction_session_timeout": "10ms",
    "idle_session_timeout": "10ms",
    "transaction_timeout": "10ms",
    "default_transaction_read_only": "on",
    "extra_float_digits": "0",
}
UNTOUCHED = {name: "0" for name in DEFAULTS if name.endswith("timeout")} | {
    "default_transaction_read_only": "off",
    "extra_float_digits": "1",
}
SHOW = "select name, setting from pg_settings where name = any($1)"


async def test_defaults_of_the_database_do_not_reach_our_connections(pg18, make_database):
    url = make_database(pg18)
    name = sql.Identifier(url.rpartition("/")[2])
    with psycopg.connect(url, autocommit=True) as conn:
        for setting, value in DEFAULTS.items():
            statement = sql.SQL("alter database {} set {} = {}")
            conn.execute(statement.format(name, sql.Identifier(setting), sql.Literal(value)))
    database = Database(Secret(url), "source")
    async with database.connect("test") as conn, psycopg.AsyncRawCursor(conn) as cursor:
        await cursor.execute(SHOW, [list(DEFAULTS)])
        assert dict(await cursor.fetchall()) == UNTOUCHED
    async with database.connect_bulk("test") as bulk:
        assert dict(await bulk.fetch(SHOW, list(DEFAULTS))) == UNTOUCHED
