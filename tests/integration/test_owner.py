"""The epoch: what an old owner has begun, it cannot commit after a new one took over."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from uuid import uuid4

import asyncpg
import psycopg
import pytest

from mover.core.errors import LeaseLost, LockNotAvailable, Refused
from mover.core.ids import Epoch, MigrationId
from mover.core.secret import Secret
from mover.postgres import agent, owner
from mover.postgres.connect import Database, Identity


@pytest.fixture(params=["pg16", "pg18"])
def url(request, make_database) -> str:
    return make_database(request.getfixturevalue(request.param))


def database(url: str, identity: Identity) -> Database:
    return Database(Secret(url), "target", identity)


async def installed(url: str) -> Identity:
    identity = Identity(MigrationId(uuid4()), Epoch(1))
    await agent.install(database(url, identity), identity)
    await ask(url, "CREATE TABLE chunk (number int)")
    return identity


def successor(identity: Identity) -> Identity:
    return replace(identity, epoch=Epoch(identity.epoch + 1))


async def ask(url: str, statement: str) -> list[tuple]:
    async with await psycopg.AsyncConnection.connect(url, autocommit=True) as conn:
        cursor = await conn.execute(statement)
        return await cursor.fetchall() if cursor.description else []


@asynccontextmanager
async def nameless(url: str) -> AsyncIterator[psycopg.AsyncConnection]:
    """A session of the old owner that nobody finds by its name, as behind a pooler."""
    async with await psycopg.AsyncConnection.connect(url) as conn:
        yield conn


async def test_take_ends_the_old_owners_sessions_and_their_transactions(url):
    old = await installed(url)
    async with database(url, old).connect("apply") as conn, database(url, old).connect_bulk("copy") as bulk:
        await conn.execute("BEGIN")
        await owner.hold(conn, old)
        await conn.execute("INSERT INTO public.chunk VALUES (1)")
        transaction = bulk.transaction()
        await transaction.start()
        await owner.hold_bulk(bulk, old)
        await bulk.execute("INSERT INTO public.chunk VALUES (2)")
        new = successor(old)
        await owner.take(database(url, new), new)
        with pytest.raises(psycopg.OperationalError):
            await conn.execute("COMMIT")
        with pytest.raises((asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError)):
            await transaction.commit()
    assert await ask(url, "SELECT * FROM public.chunk") == []


async def test_take_waits_for_a_transaction_that_holds_the_epoch(url):
    """It may still commit, so the new owner must not begin before it has ended."""
    old = await installed(url)
    new = successor(old)
    async with nameless(url) as zombie:
        await owner.hold(zombie, old)
        await zombie.execute("INSERT INTO public.chunk VALUES (1)")
        taking = asyncio.create_task(owner.take(database(url, new), new))
        while not await ask(url, "SELECT 1 FROM pg_locks WHERE NOT granted"):
            assert not taking.done()
        await zombie.commit()
        await taking
        assert await ask(url, "SELECT * FROM public.chunk") == [(1,)]
        with pytest.raises(LeaseLost):
            await owner.hold(zombie, old)


async def test_take_gives_up_rather_than_begin_beside_a_suspended_transaction(url, monkeypatch):
    monkeypatch.setattr(owner, "TAKE_TIMEOUT", "200ms")
    old = await installed(url)
    new = successor(old)
    async with nameless(url) as zombie:
        await owner.hold(zombie, old)
        with pytest.raises(LockNotAvailable):
            await owner.take(database(url, new), new)
        await zombie.rollback()
        await owner.take(database(url, new), new)


async def test_reading_the_epoch_without_its_lock_would_let_a_chunk_in_twice(url):
    """What the lock is for: the same transaction with a plain SELECT commits after the take-over."""
    old = await installed(url)
    new = successor(old)
    async with nameless(url) as zombie:
        await zombie.execute("SELECT 1 FROM mover.owner WHERE epoch = %s", (old.epoch,))
        await zombie.execute("INSERT INTO public.chunk VALUES (1)")
        await owner.take(database(url, new), new)
        async with database(url, new).connect("copy") as conn, conn.transaction():
            await owner.hold(conn, new)
            await conn.execute("INSERT INTO public.chunk VALUES (1)")
        await zombie.commit()
    assert await ask(url, "SELECT * FROM public.chunk") == [(1,), (1,)]


async def test_an_owner_who_waits_for_a_take_over_finds_that_it_lost(url):
    old = await installed(url)
    async with nameless(url) as new, nameless(url) as zombie:
        await new.execute("UPDATE mover.owner SET epoch = 2")
        holding = asyncio.create_task(owner.hold(zombie, old))
        while not await ask(url, "SELECT 1 FROM pg_locks WHERE NOT granted"):
            assert not holding.done()
        await new.commit()
        with pytest.raises(LeaseLost):
            await holding


async def test_a_zombie_that_takes_over_itself_is_refused_and_harms_nobody(url):
    old = await installed(url)
    new = successor(old)
    await owner.take(database(url, new), new)
    async with database(url, new).connect("apply") as conn:
        with pytest.raises(LeaseLost):
            await owner.take(database(url, old), old)
        async with conn.transaction():
            await owner.hold(conn, new)
        await owner.take(database(url, new), new)
        await owner.hold(conn, new)


async def test_epochs_of_several_digits_are_compared_as_numbers(url):
    old = replace(await installed(url), epoch=Epoch(9))
    new = replace(old, epoch=Epoch(10))
    await owner.take(database(url, old), old)
    async with database(url, new).connect("apply") as conn:
        await owner.take(database(url, new), new)
        with pytest.raises(LeaseLost):
            await owner.take(database(url, old), old)
        await owner.hold(conn, new)


async def test_a_schema_that_somebody_else_has_made_is_not_ours(url):
    """His triggers would run with our rights, and he could drop our guards."""
    somebody, ours = f"somebody_{uuid4().hex[:8]}", f"mover_{uuid4().hex[:8]}"
    name = url.rpartition("/")[2]
    for role in (somebody, ours):
        await ask(url, f"CREATE ROLE {role} LOGIN")
        await ask(url, f"GRANT CREATE ON DATABASE {name} TO {role}")
    theirs = url.replace("postgres@", f"{somebody}@")
    await ask(theirs, "CREATE SCHEMA mover")
    await ask(theirs, "GRANT ALL ON SCHEMA mover TO public")
    await ask(theirs, "CREATE TABLE mover.owner (migration uuid PRIMARY KEY, epoch bigint NOT NULL)")
    await ask(theirs, "GRANT ALL ON mover.owner TO public")
    identity = Identity(MigrationId(uuid4()), Epoch(1))
    install = functools.partial(agent.install, database(url.replace("postgres@", f"{ours}@"), identity))
    with pytest.raises(Refused, match=somebody):
        await install(identity)
    await ask(url, f"ALTER SCHEMA mover OWNER TO {ours}")
    with pytest.raises(Refused, match=somebody):
        await install(identity)
    await ask(url, f"ALTER TABLE mover.owner OWNER TO {ours}")
    await install(identity)
    await ask(url, f"DROP OWNED BY {somebody}, {ours} CASCADE")
    for role in (somebody, ours):
        await ask(url, f"DROP ROLE {role}")
