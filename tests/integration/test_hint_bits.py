"""Reading must not destroy: a snapshot taken from a slot can hide other tenants' committed rows for good.

A slot's snapshot knows a commit from the WAL, before the commit log does. Whoever reads a row through it
in between marks the row as aborted, in the table itself. On a saturated server with real flushes that
happens within seconds; the same reading through our consistent points must never do it.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from tempfile import NamedTemporaryFile

import psycopg
import pytest
from psycopg import sql

from mover.demo.servers import PostgresServer
from tests.support.comparing import verifying
from tests.support.rig import DDL, OTHER, rig

CLIENTS = 40
SECONDS = 60  # of copying and verifying while others write
READERS = 6
PROOF_SECONDS, PROOF_ATTEMPTS = 8, 6  # of reading through slots; one attempt loses up to some hundred rows
FIRST_ID = 1_000_000_000
WRITE = f"insert into app.item (tenant_id, id, name) values ('{OTHER}', nextval('app.others'), 'x');"
# What has just been written lies in the last blocks.
LAST_BLOCKS = "select greatest(0, pg_relation_size('app.item') / 8192 - 50) as first \\gset"
READ = "select count(*) from app.item where ctid >= '(:first,0)';"
BEGIN = "begin isolation level repeatable read read only;"
THROUGH_A_SLOT = f"""
{LAST_BLOCKS}
{BEGIN}
CREATE_REPLICATION_SLOT proof_:client_id TEMPORARY LOGICAL pgoutput (SNAPSHOT 'use');
{READ}
commit;
DROP_REPLICATION_SLOT proof_:client_id;
"""
ORDINARILY = f"""
{LAST_BLOCKS}
{BEGIN}
{READ}
commit;
"""

Connection = psycopg.AsyncConnection


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    """Flushes like a real one: rows are at risk while their clients wait for each other's flush."""
    with PostgresServer(16, settings={"shared_buffers": "128MB", "synchronous_commit": "on"}) as started:
        yield started


class Bench:
    """pgbench with one script, in several clients."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @property
    def running(self) -> bool:
        return self._process.returncode is None

    async def transactions(self) -> int:
        """How many were done when the time was over."""
        output = (await self._process.communicate())[0].decode()
        found = re.search(r"actually processed: (\d+)", output)
        assert self._process.returncode == 0 and found, output
        return int(found[1])


@asynccontextmanager
async def pgbench(
    server: PostgresServer, url: str, script: str, clients: int, seconds: int
) -> AsyncIterator[Bench]:
    with NamedTemporaryFile("w", suffix=".sql") as file:
        file.write(script + "\n")
        file.flush()
        process = await asyncio.create_subprocess_exec(
            *(server.binary("pgbench"), "--no-vacuum", "-c", str(clients), "-j", "2", "-T", str(seconds)),
            *("-f", file.name, url),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        try:
            yield Bench(process)
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()


@asynccontextmanager
async def others_writing(server: PostgresServer, url: str, seconds: int) -> AsyncIterator[Bench]:
    async with pgbench(server, url, WRITE, CLIENTS, seconds) as bench:
        yield bench


async def lost(url: str, writers: Bench) -> int:
    """Rows that pgbench has committed and that a query does not see."""
    committed = await writers.transactions()
    assert committed > 100 * CLIENTS, "the server was not saturated"
    query = "select count(*) from app.item where tenant_id = %s and id >= %s"
    async with await Connection.connect(url) as conn:
        (visible,) = await (await conn.execute(query, (OTHER, FIRST_ID))).fetchone()
    return committed - visible


async def execute(url: str, *statements: str | sql.Composed) -> None:
    async with await Connection.connect(url, autocommit=True) as conn:
        for statement in statements:
            await conn.execute(statement)


async def read_while_others_write(server: PostgresServer, url: str, script: str) -> tuple[int, int]:
    """How many snapshots were read through, and how many rows were lost by that."""
    as_walsender = f"{url}?replication=database"
    async with (
        others_writing(server, url, PROOF_SECONDS) as writers,
        pgbench(server, as_walsender, script, READERS, PROOF_SECONDS) as readers,
    ):
        return await readers.transactions(), await lost(url, writers)


@pytest.fixture
def busy_database(server, make_database) -> str:
    return make_database(server)


async def test_reading_through_a_slots_snapshot_loses_committed_rows(server, busy_database):
    """The proof that the tests below can fail."""
    await execute(busy_database, DDL, f"create sequence app.others start {FIRST_ID} cache 100")
    snapshots = rows = 0
    for _ in range(PROOF_ATTEMPTS):
        taken, rows = await read_while_others_write(server, busy_database, THROUGH_A_SLOT)
        snapshots += taken
        if rows:
            break
        await execute(busy_database, "truncate app.item")
    print(f"{rows} committed rows lost by reading through {snapshots} snapshots of slots")
    assert rows, f"{snapshots} snapshots of slots lost nothing: the tests below prove nothing here"


async def test_the_same_reading_through_ordinary_snapshots_loses_nothing(server, busy_database):
    await execute(busy_database, DDL, f"create sequence app.others start {FIRST_ID} cache 100")
    snapshots, rows = await read_while_others_write(server, busy_database, ORDINARILY)
    assert snapshots > 100
    assert rows == 0


async def test_copying_and_verifying_under_saturating_writers_loses_nothing(
    server, busy_database, pg18, make_database
):
    # Every reading of ours passes over everybody's rows, also those that are being committed.
    for scan in ("indexscan", "indexonlyscan", "bitmapscan"):
        database = sql.Identifier(busy_database.rpartition("/")[2])
        off = sql.SQL("alter database {} set {} = off").format(database, sql.Identifier(f"enable_{scan}"))
        await execute(busy_database, off)
    target, rounds = make_database(pg18), 0
    async with rig(busy_database, target) as r, verifying(r) as verification, asyncio.TaskGroup() as tasks:
        await execute(busy_database, f"create sequence app.others start {FIRST_ID} cache 100")
        await r.follower.start()
        following = tasks.create_task(r.follower.run())
        async with others_writing(server, busy_database, SECONDS) as writers:
            while writers.running:
                await r.copy().run()
                verification.passes = 0  # everything once more
                await verification.one_pass()
                assert len(r.target_rows()) == len(r.source_rows())
                r.writer.set_copied({})
                await execute(target, "truncate app.item", "delete from mover.chunk")
                rounds += 1
            assert await lost(busy_database, writers) == 0
        following.cancel()
    print(f"{rounds} rounds of copying and verifying")
    assert rounds >= 10
