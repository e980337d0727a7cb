"""Connections do their work whatever an operator has set as defaults for the role or the database, and
whoever has worked on them before."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

import psycopg
import pytest
from psycopg import sql

from mover.core.errors import Refused
from mover.core.secret import Secret
from mover.postgres import idle
from mover.postgres.connect import PINNED, Database
from tests.support.waiting import until

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


def set_defaults(url: str) -> None:
    name = sql.Identifier(url.rpartition("/")[2])
    with psycopg.connect(url, autocommit=True) as conn:
        for setting, value in DEFAULTS.items():
            statement = sql.SQL("alter database {} set {} = {}")
            conn.execute(statement.format(name, sql.Identifier(setting), sql.Literal(value)))


async def test_defaults_of_the_database_do_not_reach_our_connections(pg18, make_database):
    url = make_database(pg18)
    set_defaults(url)
    database = Database(Secret(url), "source")
    async with database.connect("test") as conn, psycopg.AsyncRawCursor(conn) as cursor:
        await cursor.execute(SHOW, [list(DEFAULTS)])
        assert dict(await cursor.fetchall()) == UNTOUCHED
    async with database.connect_bulk("test") as bulk:
        assert dict(await bulk.fetch(SHOW, list(DEFAULTS))) == UNTOUCHED


def backends(url: str) -> list[str]:
    """The purposes of our connections to this database."""
    with psycopg.connect(url, autocommit=True) as conn:
        query = (
            "select split_part(application_name, '/', 3) from pg_stat_activity"
            " where datname = current_database() and application_name like 'mover/%'"
        )
        return sorted(purpose for (purpose,) in conn.execute(query))


def end_backends(url: str) -> None:
    with psycopg.connect(url, autocommit=True) as conn:
        conn.execute(
            "select pg_terminate_backend(pid, 5000) from pg_stat_activity"
            " where datname = current_database() and application_name like 'mover/%'"
        )


@pytest.fixture
def url(pg18, make_database):
    return make_database(pg18)


@contextmanager
def keeping(url: str, **options: int) -> Iterator[Database]:
    """A database that keeps connections open between two pieces of work."""
    database = Database(Secret(url), "source", kept=2, **options)
    try:
        yield database
    finally:
        database.end_idle()


async def pid(database: Database, purpose: str = "test") -> int:
    """Which backend serves the next one who borrows."""
    async with database.borrow(purpose) as conn:
        return conn.info.backend_pid


async def test_a_borrowed_connection_serves_the_next_one_under_another_name(url):
    with keeping(url) as database:
        first = await pid(database, "guard")
        async with database.borrow("slot") as conn:
            assert conn.info.backend_pid == first
            assert backends(url) == ["slot"]


async def test_two_who_borrow_at_once_have_connections_of_their_own(url):
    with keeping(url) as database:
        async with database.borrow("guard") as one, database.borrow("slot") as other:
            assert one.info.backend_pid != other.info.backend_pid
        assert backends(url) == ["guard", "slot"]


OTHERWISE = {
    "extra_float_digits": "0",
    "DateStyle": "German",
    "IntervalStyle": "sql_standard",
    "TimeZone": "Asia/Tokyo",
    "bytea_output": "escape",
    "client_encoding": "LATIN1",
    "lc_monetary": "POSIX",
    "statement_timeout": "7s",
    "lock_timeout": "7s",
    "idle_in_transaction_session_timeout": "7s",
    "idle_session_timeout": "7s",
    "default_transaction_isolation": "serializable",
    "default_transaction_read_only": "on",
    "row_security": "on",
    "search_path": "public",
    "client_min_messages": "error",
    "synchronous_commit": "off",
}


@pytest.mark.parametrize("server", ["pg16", "pg18"])
async def test_no_setting_reaches_the_next_one_who_borrows(request, make_database, server):
    url = make_database(request.getfixturevalue(server))
    assert OTHERWISE.keys() >= PINNED.keys()
    with keeping(url) as database:
        async with database.connect("test") as conn:
            new = await settings(conn)
        async with database.borrow("test", lock_timeout="5s", client_min_messages="warning") as conn:
            first = conn.info.backend_pid
            assert await settings(conn) == new | {"lock_timeout": "5s", "client_min_messages": "warning"}
            for name, value in OTHERWISE.items():
                await conn.execute("select set_config(%s, %s, false)", (name, value))
            assert not (await settings(conn)).items() & new.items()
        async with database.borrow("test") as conn:
            assert conn.info.backend_pid == first
            assert await settings(conn) == new


async def test_no_timeout_of_a_database_reaches_a_borrowed_connection(url):
    set_defaults(url)
    with keeping(url) as database:
        for _ in range(2):
            async with database.borrow("test") as conn, psycopg.AsyncRawCursor(conn) as cursor:
                await cursor.execute(SHOW, [list(DEFAULTS)])
                assert dict(await cursor.fetchall()) == UNTOUCHED


async def settings(conn: psycopg.AsyncConnection) -> dict[str, str]:
    return {
        name: (await (await conn.execute("select current_setting(%s)", (name,))).fetchone())[0]
        for name in OTHERWISE
    }


async def test_a_connection_that_ended_while_idle_is_not_handed_out(url):
    with keeping(url) as database:
        async with database.borrow("guard") as one, database.borrow("slot") as other:
            before = {one.info.backend_pid, other.info.backend_pid}
        end_backends(url)
        assert await pid(database) not in before
        assert len(backends(url)) == 1


async def test_who_borrows_hears_what_a_new_connection_would_say(pg16, make_database):
    url = make_database(pg16)
    with keeping(url) as database:
        await pid(database)
        pg16.drop_database(url.rpartition("/")[2])
        with pytest.raises(Refused, match="there is no such database"):
            await pid(database)


class Failed(Exception):
    """What a borrower may raise."""


async def test_a_connection_on_which_something_failed_is_closed(url):
    with keeping(url) as database:
        with pytest.raises(Failed):
            async with database.borrow("guard") as conn:
                raise Failed
        assert conn.closed


async def test_a_connection_in_a_transaction_is_closed(url):
    with keeping(url) as database:
        async with database.borrow("guard") as conn:
            await conn.execute("begin")
        assert conn.closed


async def test_a_borrower_who_is_cancelled_leaves_no_connection(url):
    with keeping(url) as database:

        async def work() -> None:
            async with database.borrow("guard") as conn:
                await conn.execute("select pg_sleep(60)")

        task = asyncio.create_task(work())
        await until_backends(url, ["guard"])
        task.cancel()
        await asyncio.wait([task])
        end_backends(url)  # PostgreSQL notices a closed connection when it has something to say
        assert await pid(database)


async def test_nothing_stays_open_after_the_end_of_the_work(url):
    with keeping(url) as database:
        async with database.borrow("slot"):
            await pid(database, "guard")
            database.end_idle()
            await until_backends(url, ["slot"])
        async with database.borrow("guard") as conn:
            pass
        assert conn.closed


async def test_an_idle_connection_is_closed_after_some_time(url, monkeypatch):
    monkeypatch.setattr(idle, "KEPT_S", 0.01)
    with keeping(url) as database:
        await pid(database)
        await until_backends(url, [])


async def test_no_more_stay_open_than_shall(url):
    with keeping(url) as database:
        async with database.borrow("a") as a, database.borrow("b") as b, database.borrow("c") as c:
            pass
        assert [conn.closed for conn in (c, b, a)] == [False, False, True]


async def test_idle_connections_count_among_those_that_may_be_open(url):
    with keeping(url, limit=3) as database:
        async with database.borrow("guard"), database.borrow("slot"):
            pass
        async with database.connect("point"), database.connect_bulk("copy"):
            await until_backends(url, ["copy", "guard", "point"])
            async with database.external("dump"):
                await until_backends(url, ["copy", "point"])


async def until_backends(url: str, purposes: list[str]) -> None:
    """A backend goes a little after its connection."""
    await until(lambda: backends(url) == purposes)
