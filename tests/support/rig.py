"""The data path without the engine: one table on two sides, changes followed between them, writers on the
source."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from uuid import UUID, uuid4

import psycopg

from mover.core.ids import Capture, Epoch, MigrationId, Side, TableRef, TenantId
from mover.core.migration import Progress
from mover.core.secret import Secret
from mover.core.tables import Column, MovedTable, Shape
from mover.engine.copy import WaveCopy
from mover.engine.follow import Follower
from mover.engine.follow_log import LogFollower
from mover.engine.follow_stream import StreamFollower
from mover.postgres import agent, publication
from mover.postgres.bulk import BulkCopier
from mover.postgres.change_log import PgChangeLog
from mover.postgres.connect import Database, Identity
from mover.postgres.fence import PgFence
from mover.postgres.points import Points
from mover.postgres.replication import WalStream
from mover.postgres.writer import Writer

TENANT = TenantId(UUID(int=1))
OTHER = TenantId(UUID(int=2))

DDL = """
CREATE SCHEMA app;
CREATE TABLE app.item (
    tenant_id uuid NOT NULL,
    id bigint NOT NULL,
    name text COLLATE "C",
    amount numeric,
    big text,
    PRIMARY KEY (id)
);
"""
IDENTITY = """
CREATE UNIQUE INDEX item_identity ON app.item (tenant_id, id);
ALTER TABLE app.item REPLICA IDENTITY USING INDEX item_identity;
ALTER TABLE app.item ALTER big SET STORAGE EXTERNAL;
"""
ITEM = MovedTable(
    source=TableRef("app", "item"),
    target=TableRef("app", "item"),
    columns=(
        Column("tenant_id", "uuid", "uuid", not_null=True),
        Column("id", "bigint", "bigint", not_null=True),
        Column("name", "text", "text", collatable=True),
        Column("amount", "numeric", "numeric"),
        Column("big", "text", "text", collatable=True),
    ),
    key=("id",),
    tenant_column="tenant_id",
    estimated_rows=1,
    estimated_bytes=100 << 20,  # so wide that a chunk has the fewest rows, 1000
)
CONTENT = "SELECT id, name, amount::text, md5(big) FROM app.item WHERE tenant_id = %s ORDER BY id"


@dataclass(frozen=True)
class Subject:
    """What moves, and how it is made: `ddl` on both sides, `identity` on the source."""

    tables: tuple[MovedTable, ...] = (ITEM,)
    ddl: str = DDL
    identity: str = IDENTITY
    careful: bool = False  # the target's foreign keys and triggers act on what we write

    @property
    def shape(self) -> Shape:
        careful = frozenset({Side.TARGET} if self.careful else ())
        return Shape({"app": "app"}, self.tables, fresh=False, careful=careful)


ITEMS = Subject()


class RealClock:
    def monotonic(self) -> float:
        return asyncio.get_running_loop().time()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


@dataclass
class Rig:
    source_url: str
    target_url: str
    subject: Subject
    source: Database
    target: Database
    migration: MigrationId
    follower: Follower
    writer: Writer
    copier: BulkCopier
    stream: WalStream | None
    fence: PgFence

    @property
    def slot(self) -> str:
        return publication.name_of(self.migration)

    @asynccontextmanager
    async def following(self) -> AsyncIterator[asyncio.Task]:
        """The follower runs from where the target stands."""
        await self.follower.start()
        task = asyncio.create_task(self.follower.run())
        try:
            yield task
        finally:
            task.cancel()
            await asyncio.wait([task])

    def copy(self, **options) -> WaveCopy:
        settings = {"workers": 2, "wave_seconds": 600.0, **options}

        async def build_keys(tables):
            pass

        async def unchanged():
            pass

        return WaveCopy(
            shape=self.subject.shape,
            copier=self.copier,
            target=self.writer,
            follower=self.follower,
            progress=self.follower.progress,
            clock=RealClock(),
            build_keys=build_keys,
            check_schemas=unchanged,
            on_chunk=lambda rows, size: None,
            **settings,
        )

    def source_rows(self, snapshot_id: str | None = None) -> list:
        return rows_of(self.source_url, snapshot_id)

    def target_rows(self) -> list:
        return rows_of(self.target_url)


def rows_of(url: str, snapshot_id: str | None = None) -> list:
    """The tenant's rows by a query that shares nothing with the mover."""
    with psycopg.connect(url) as conn:
        conn.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        if snapshot_id:
            conn.execute(f"SET TRANSACTION SNAPSHOT '{snapshot_id}'")
        return conn.execute(CONTENT, (TENANT,)).fetchall()


def execute(url: str, statement: str, *parameters: object) -> list:
    """In a connection and transaction of its own; the rows, if there are any."""
    with psycopg.connect(url, autocommit=True) as conn:
        cursor = conn.execute(statement, parameters or None)
        return cursor.fetchall() if cursor.description else []


def seed(url: str, rows: int) -> None:
    with psycopg.connect(url, autocommit=True) as conn:
        for tenant, first in ((TENANT, 1), (OTHER, 10_000_001)):
            conn.execute(
                "INSERT INTO app.item SELECT %s, g, 'name ' || g, g * 1.10, repeat(md5(g::text), 100)"
                " FROM generate_series(%s::bigint, %s::bigint) g",
                (tenant, first, first + rows - 1),
            )


@asynccontextmanager
async def rig(
    source_url: str,
    target_url: str,
    rows: int = 500,
    subject: Subject = ITEMS,
    capture: Capture = Capture.WAL,
) -> AsyncIterator[Rig]:
    """Seeded source, empty target, and publication and slot or capturing guards; everything is dropped with
    the databases."""
    identity = Identity(MigrationId(uuid4()), Epoch(1))
    source = Database(Secret(source_url), "source", identity, limit=20)
    target = Database(Secret(target_url), "target", identity, limit=20)
    with psycopg.connect(source_url, autocommit=True) as conn:
        conn.execute(subject.ddl)
        conn.execute(subject.identity)
    with psycopg.connect(target_url, autocommit=True) as conn:
        conn.execute(subject.ddl)
    if subject.tables == (ITEM,):
        seed(source_url, rows)
    await agent.install(source, identity)
    await agent.install(target, identity)

    async def say(text: str) -> None:
        pass

    shape = replace(subject.shape, capture=capture)
    fence = PgFence(source, TENANT, "v", identity, 1.0)
    follower: Follower
    stream: WalStream | None = None
    async with AsyncExitStack() as stack:
        points = await stack.enter_async_context(Points.open(source))
        writer = await stack.enter_async_context(Writer.open(target, shape, TENANT, identity))
        if capture is Capture.TRIGGER:
            holdings = sorted((t.holding(Side.SOURCE) for t in shape.tables), key=lambda h: h.depth)
            await fence.install(holdings, "open", say, captures=True)
            log = await stack.enter_async_context(PgChangeLog.open(source, points, shape, TENANT, identity))
            follower = LogFollower(log, writer, Progress())
        else:
            await publication.create_publication(source, identity.migration, shape.tables, TENANT, say)
            start = await publication.create_slot(source, identity.migration, say)
            await publication.store_start(target, identity, start)
            name = publication.name_of(identity.migration)
            stream = WalStream(source, name, name)
            stack.push_async_callback(publication.drop_slot, source, identity.migration)
            stack.push_async_callback(stream.close)
            follower = StreamFollower(stream, points, writer, Progress())
        copier = BulkCopier(source, target, shape, TENANT, identity)
        migration = identity.migration
        yield Rig(
            source_url,
            target_url,
            subject,
            source,
            target,
            migration,
            follower,
            writer,
            copier,
            stream,
            fence,
        )


@asynccontextmanager
async def hammering(url: str, clients: int = 2, seed: int = 0) -> AsyncIterator[list[int]]:
    """Clients that change the tenant's rows without a pause; the list counts committed transactions."""
    committed = [0]

    async def client(number: int) -> None:
        random_source = random.Random(f"{seed}/{number}")
        async with await psycopg.AsyncConnection.connect(url, autocommit=True) as conn:
            while True:
                try:
                    await _transaction(conn, random_source, number)
                    committed[0] += 1
                except (psycopg.errors.UniqueViolation, psycopg.errors.DeadlockDetected):
                    pass

    tasks = [asyncio.create_task(client(number)) for number in range(clients)]
    try:
        yield committed
    finally:
        for task in tasks:
            task.cancel()
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(result, asyncio.CancelledError), result


async def _transaction(conn: psycopg.AsyncConnection, rng: random.Random, number: int) -> None:
    """A few random statements, among them subtransactions, key changes and changes of tenant, both with
    and without a value of `big` that the stream carries."""
    async with conn.transaction():
        if rng.random() < 0.3:
            await conn.execute("SET LOCAL synchronous_commit = off")
        for _ in range(rng.randint(1, 4)):
            id = rng.randint(1, 600)
            match rng.randint(0, 7):
                case 0:
                    await conn.execute("DELETE FROM app.item WHERE id = %s", (id,))
                case 1 | 2:
                    async with conn.transaction():
                        await conn.execute(
                            "INSERT INTO app.item VALUES (%s, %s, %s, %s, %s) ON CONFLICT DO NOTHING",
                            (TENANT, id, f"n{number}\t\\", rng.random(), "x" * rng.randint(0, 9000)),
                        )
                case 3:
                    await conn.execute(
                        "UPDATE app.item SET id = %s, big = CASE WHEN %s THEN big || '' ELSE big END"
                        " WHERE id = %s AND NOT EXISTS (SELECT FROM app.item WHERE id = %s)",
                        (id + 5000, rng.random() < 0.5, id, id + 5000),
                    )
                case 4:
                    owner = rng.choice((TENANT, OTHER))
                    await conn.execute(
                        "UPDATE app.item SET tenant_id = %s, big = CASE WHEN %s THEN upper(big) ELSE big END"
                        " WHERE id = %s",
                        (owner, rng.random() < 0.9, id),
                    )
                case _:
                    await conn.execute(
                        "UPDATE app.item SET amount = coalesce(amount, 0) + 1, name = NULL WHERE id = %s",
                        (id,),
                    )
