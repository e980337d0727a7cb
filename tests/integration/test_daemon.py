"""What the daemon does with a migration whose work ends in a way that nobody foresaw."""

from __future__ import annotations

import asyncio
import contextlib

import psycopg

from mover.app import SystemClock
from mover.core.triggers import Deadlines
from mover.engine.daemon import Daemon
from tests.support.queue import CORE, add_tenant, platform_database, store_on, to_estate
from tests.support.waiting import until


class Deaf:
    """Metrics that nobody reads."""

    def active(self, count: int) -> None: ...

    def ended(self, migration, status, seconds: float) -> None: ...


async def broken(claim, progress):
    raise KeyError("planted")


async def test_a_bug_ends_a_migration_instead_of_being_met_for_ever(pg16, make_database):
    url = make_database(pg16)
    await platform_database(url)
    async with store_on(url) as store:
        await store.submit(to_estate(await add_tenant(url)), CORE)
        daemon = Daemon("one", store, broken, SystemClock(), 10, 5, Deadlines(0, 0, 0), Deaf())
        running = asyncio.create_task(daemon.run())
        # Called off after the first time; halted after the second, since it cannot be undone either.
        await until(lambda: row(url)[:-1] == ("rolling_back", "internal", True, 2, True))
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running
    assert "planted" not in row(url)[-1]


def row(url: str) -> tuple:
    with psycopg.connect(url) as conn:
        return conn.execute(
            "select status, error->>'code', not_before > now() + interval '1 year', epoch, owner is null,"
            " error::text from platform.tenant_migrations"
        ).fetchone()
