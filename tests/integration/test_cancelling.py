"""Who cancels a statement does not stop the whole process."""

from __future__ import annotations

import asyncio
import time

import psycopg
import pytest

from mover.core.secret import Secret
from mover.postgres.connect import Database
from tests.support.proxy import proxied
from tests.support.waiting import until

FREEZE_S = 0.5


async def test_a_server_that_does_not_answer_keeps_only_who_asks_it(pg18, make_database):
    url = make_database(pg18)
    async with proxied(url) as proxy:
        sleeping = asyncio.create_task(sleep(Database(Secret(proxy.url), "source")))
        await until(lambda: sleepers(url) == 1)
        proxy.hold()
        sleeping.cancel()
        longest_s, last = 0.0, time.monotonic()
        while not sleeping.done():
            await asyncio.wait([sleeping], timeout=0.01)
            longest_s, last = max(longest_s, time.monotonic() - last), time.monotonic()
        assert longest_s < FREEZE_S


@pytest.mark.parametrize("server", ["pg16", "pg18"])
async def test_what_is_cancelled_ends_on_the_server(request, make_database, server):
    url = make_database(request.getfixturevalue(server))
    sleeping = asyncio.create_task(sleep(Database(Secret(url), "source")))
    await until(lambda: sleepers(url) == 1)
    sleeping.cancel()
    with pytest.raises(asyncio.CancelledError):
        await sleeping
    await until(lambda: sleepers(url) == 0)


async def sleep(database: Database) -> None:
    async with database.connect("test") as conn:
        await conn.execute("select pg_sleep(600)")


def sleepers(url: str) -> int:
    with psycopg.connect(url, autocommit=True) as conn:
        query = (
            "select count(*) from pg_stat_activity where datname = current_database()"
            " and query = 'select pg_sleep(600)' and state = 'active'"
        )
        return conn.execute(query).fetchone()[0]
