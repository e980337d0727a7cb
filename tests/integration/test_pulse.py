"""Nobody waits for ever for a server that does not answer; for one that does, as long as it takes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import psycopg
import pytest

from mover.core.errors import Unreachable
from mover.core.secret import Secret
from mover.postgres import pulse
from mover.postgres.connect import Database
from mover.postgres.errors import translate
from tests.support.proxy import Proxy, proxied
from tests.support.waiting import until

SILENT_S = 0.4


@asynccontextmanager
async def watched(url: str) -> AsyncIterator[tuple[Database, Proxy, list[str | None]]]:
    """A database behind a proxy, and what the pulse has said of it."""
    said: list[str | None] = []
    async with proxied(url) as proxy:
        database = Database(Secret(proxy.url), "source", kept=2)
        watching = asyncio.create_task(pulse.watch_pulse(database, said.append))
        try:
            await until(lambda: bool(said))
            yield database, proxy, said
        finally:
            watching.cancel()
            with suppress(asyncio.CancelledError):
                await watching
            database.end_idle()


@pytest.fixture
def url(pg18, make_database, monkeypatch) -> str:
    monkeypatch.setattr(pulse, "SILENT_S", SILENT_S)
    monkeypatch.setattr(pulse, "INTERVAL_S", 0.05)
    return make_database(pg18)


async def sleep(database: Database, seconds: float) -> None:
    async with database.connect("test") as conn:
        await conn.execute("select pg_sleep(%s)", (seconds,))


async def sleep_borrowed(database: Database, seconds: float) -> None:
    async with database.borrow("test") as conn:
        await conn.execute("select pg_sleep(%s)", (seconds,))


async def sleep_in_bulk(database: Database, seconds: float) -> None:
    async with database.connect_bulk("test") as conn, conn.transaction():
        with translate("source"):
            await conn.execute(f"select pg_sleep({seconds})")


WAYS = [sleep, sleep_borrowed, sleep_in_bulk]


@pytest.mark.parametrize("way", WAYS)
async def test_whoever_waits_for_a_silent_server_is_let_go(url, way):
    async with watched(url) as (database, proxy, said):
        waiting = asyncio.create_task(way(database, 600))
        await until(lambda: asks(proxy))
        proxy.hold()
        with pytest.raises(Unreachable):
            await waiting
        await until(lambda: said[-1] == "source: the server does not answer")
        proxy.restore()
        await until(lambda: said[-1] is None)
        await way(database, 0)


@pytest.mark.parametrize("way", WAYS)
async def test_a_server_that_takes_its_time_is_waited_for(url, way):
    async with watched(url) as (database, _, said):
        await way(database, 3 * SILENT_S)
        assert set(said) == {None}


async def test_what_was_kept_idle_is_not_handed_out_by_a_silent_server(url):
    async with watched(url) as (database, proxy, said):
        await sleep_borrowed(database, 0)
        proxy.hold()
        await until(lambda: said[-1] is not None)
        proxy.restore()
        await sleep_borrowed(database, 0)


async def test_a_server_that_is_not_there_is_told_of(url):
    async with watched(url) as (_, proxy, said):
        proxy.cut()
        await until(lambda: "source: no connection" in str(said[-1]))


def asks(proxy: Proxy) -> bool:
    """Whether a statement of the test's is running."""
    with psycopg.connect(proxy.behind, autocommit=True) as conn:
        query = (
            "select count(*) from pg_stat_activity where query like 'select pg_sleep%' and state = 'active'"
        )
        return conn.execute(query).fetchone() == (1,)
