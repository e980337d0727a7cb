"""Reading must not destroy: a snapshot taken from a slot can hide other tenants' committed rows for good.

A slot's snapshot knows a commit from the WAL, before the commit log does. Whoever reads a row through it
in between marks the row as aborted, in the table itself. On a saturated server with real flushes that
happens within seconds; the same reading through our consistent points must never do it.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from pathlib import Path
from uuid import uuid4

import psycopg
import pytest
from psycopg import sql

from mover.core.ids import Epoch, MigrationId, Side
from mover.core.secret import Secret
from mover.demo.servers import PostgresServer
from mover.engine.verify import Verification
from mover.postgres.connect import Database, Identity
from mover.postgres.digests import open_readers
from tests.support.rig import DDL, ITEM, OTHER, TENANT, Rig, rig

CLIENTS = 40
SECONDS = 60  # of copying and verifying while others write
PROOF_SECONDS, PROOF_ATTEMPTS = 10, 6  # of reading through slots; one attempt loses some hundred rows
FIRST_ID = 1_000_000_000
RECENT_BLOCKS = 50  # where rows that are being committed lie
WRITE = f"insert into app.item (tenant_id, id, name) values ('{OTHER}', nextval('app.others'), 'x');\n"
READ = """
begin isolation level repeatable read;
set transaction snapshot {snapshot};
select count(*) from app.item where ctid >= {first};
commit
"""

Connection = psycopg.AsyncConnection
TakenSnapshot = Callable[[Connection], AbstractAsyncContextManager[str]]


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    """Flushes like a real one: rows are at risk while their clients wait for each other's flush."""
    with PostgresServer(16, settings={"shared_buffers": "128MB", "synchronous_commit": "on"}) as started:
        yield started


class Writers:
    """pgbench's clients, all of them other tenants."""

    def __init__(self, process: asyncio.subprocess.Process, url: str) -> None:
        self._process, self._url = process, url

    @property
    def writing(self) -> bool:
        return self._process.returncode is None

    async def lost(self) -> int:
        """Rows that pgbench has committed and that a query does not see."""
        output = (await self._process.communicate())[0].decode()
        assert self._process.returncode == 0, output
        found = re.search(r"actually processed: (\d+)", output)
        assert found, output
        committed = int(found[1])
        assert committed > 1000 * CLIENTS, "the server was not saturated"
        query = "select count(*) from app.item where tenant_id = %s and id >= %s"
        async with await Connection.connect(self._url) as conn:
            (visible,) = await (await conn.execute(query, (OTHER, FIRST_ID))).fetchone()
        return committed - visible


@asynccontextmanager
async def others_writing(
    server: PostgresServer, url: str, seconds: int, folder: Path
) -> AsyncIterator[Writers]:
    script = folder / "insert.sql"
    script.write_text(WRITE)
    process = await asyncio.create_subprocess_exec(
        *(server.binary("pgbench"), "--no-vacuum", "-c", str(CLIENTS), "-j", "2", "-T", str(seconds)),
        *("-f", script, url),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        yield Writers(process, url)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def execute(url: str, *statements: str) -> None:
    async with await Connection.connect(url, autocommit=True) as conn:
        for statement in statements:
            await conn.execute(statement)


@asynccontextmanager
async def slots_snapshot(conn: Connection) -> AsyncIterator[str]:
    """What must never be read through."""
    name = sql.Identifier(f"proof_{uuid4().hex}")
    create = sql.SQL("CREATE_REPLICATION_SLOT {} TEMPORARY LOGICAL pgoutput (SNAPSHOT 'export')")
    (_, _, snapshot, _) = await (await conn.execute(create.format(name))).fetchone()
    yield snapshot
    await conn.execute(sql.SQL("DROP_REPLICATION_SLOT {}").format(name))


@asynccontextmanager
async def ordinary_snapshot(conn: Connection) -> AsyncIterator[str]:
    """As our consistent points take it."""
    await conn.execute("begin isolation level repeatable read")
    (snapshot,) = await (await conn.execute("select pg_export_snapshot()")).fetchone()
    yield snapshot
    await conn.execute("rollback")


async def rows_lost(
    server: PostgresServer, url: str, folder: Path, taken_snapshot: TakenSnapshot
) -> tuple[int, int]:
    """Read what has just been written, through snapshot after snapshot: (snapshots, rows lost)."""
    count, first = 0, 0
    async with (
        others_writing(server, url, PROOF_SECONDS, folder) as writers,
        await replication_connection(url) as exporting,
        await Connection.connect(url, autocommit=True) as reading,
    ):
        while writers.writing:
            async with taken_snapshot(exporting) as snapshot:
                # in one turn, since the commit log is about to be written
                await reading.execute(sql.SQL(READ).format(snapshot=snapshot, first=f"({first},0)"))
            size = await reading.execute("select pg_relation_size('app.item') / 8192")
            first = max(0, (await size.fetchone())[0] - RECENT_BLOCKS)
            count += 1
        return count, await writers.lost()


async def replication_connection(url: str) -> Connection:
    """For SQL and replication commands; it knows no prepared statements."""
    return await Connection.connect(f"{url}?replication=database", autocommit=True, prepare_threshold=None)


@pytest.fixture
def busy_database(server, make_database) -> str:
    return make_database(server)


async def test_reading_through_a_slots_snapshot_loses_committed_rows(server, busy_database, tmp_path):
    """The proof that the tests below can fail."""
    await execute(busy_database, DDL, f"create sequence app.others start {FIRST_ID} cache 100")
    snapshots = lost = 0
    for _ in range(PROOF_ATTEMPTS):
        taken, lost = await rows_lost(server, busy_database, tmp_path, slots_snapshot)
        snapshots += taken
        if lost:
            break
        await execute(busy_database, "truncate app.item")
    print(f"{lost} committed rows lost by reading through {snapshots} snapshots of slots")
    assert lost, f"{snapshots} snapshots of slots lost nothing: the tests below prove nothing here"


async def test_the_same_reading_through_ordinary_snapshots_loses_nothing(server, busy_database, tmp_path):
    await execute(busy_database, DDL, f"create sequence app.others start {FIRST_ID} cache 100")
    snapshots, lost = await rows_lost(server, busy_database, tmp_path, ordinary_snapshot)
    assert snapshots > 100
    assert lost == 0


async def test_copying_and_verifying_under_saturating_writers_loses_nothing(
    server, busy_database, pg18, make_database, tmp_path
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
        async with others_writing(server, busy_database, SECONDS, tmp_path) as writers:
            while writers.writing:
                await r.copy().run()
                verification.passes = 0  # everything once more
                await verification.one_pass()
                assert len(r.target_rows()) == len(r.source_rows())
                r.writer.set_copied({})
                await execute(target, "truncate app.item", "delete from mover.chunk")
                rounds += 1
            assert await writers.lost() == 0
        following.cancel()
    print(f"{rounds} rounds of copying and verifying")
    assert rounds >= 10


@asynccontextmanager
async def verifying(r: Rig) -> AsyncIterator[Verification]:
    identity = Identity(MigrationId(uuid4()), Epoch(1))
    async with AsyncExitStack() as stack:
        source, target = [
            await stack.enter_async_context(open_readers(Database(Secret(url), side, identity), side))
            for url, side in ((r.source_url, Side.SOURCE), (r.target_url, Side.TARGET))
        ]
        yield Verification(
            tenant=TENANT,
            tables=[ITEM],
            follower=r.follower,
            target=r.writer,
            source_readers=source,
            target_readers=target,
            on_rows=lambda rows: None,
            on_mismatch=lambda rows: None,
        )
