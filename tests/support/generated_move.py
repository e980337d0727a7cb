"""One generated example from end to end: the real engine in this process, between two live databases,
while sessions run a timeline; then plain SQL, sharing nothing with the mover, says what became of it.
"""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

from hypothesis import strategies as st
from structlog.testing import capture_logs

from mover.app import SystemClock, Workshop
from mover.config import Config
from mover.core.ids import Capture, Side, TenantId, Tier
from mover.core.migration import Claim, MigrationRequest
from mover.core.secret import Secret
from mover.core.states import Status
from mover.core.triggers import Deadlines
from mover.demo.servers import Cluster
from mover.engine import daemon, move, ordinary_roles
from mover.engine.daemon import Work
from mover.metrics import Metrics
from mover.postgres import apply, bulk
from mover.postgres.platform_pool import PlatformPool
from mover.postgres.store import Store
from tests.support.drafts import TENANT, Draw, Schema
from tests.support.ordinary_roles import KNOWS_US
from tests.support.places import Place, assert_same
from tests.support.queue import ORGANIZATIONS, platform_database
from tests.support.schemas import schemas
from tests.support.shapes import Key
from tests.support.timelines import Gate, Timeline, neighbours, seeding, timelines
from tests.support.writers import Writers

# A transaction that stands in the way of the mover's step is ended after so long.
PATIENCE_S = 0.25
EXAMPLE_TIMEOUT_S = 90
LEASE_S = 10
PLATFORM_ANSWER_S = 10
TARGETS = ("fresh", "shared", "same")


@dataclass(frozen=True)
class Tuning:
    """Where the target is, and how small the pieces are in which rows travel."""

    target: str  # fresh, shared (with a neighbour's rows), or same: other schemas of the same database
    reordered: bool  # the shared target has its columns in another order
    chunk_rows: int
    wave_s: float
    small_batch: int  # up to so many changes are applied one by one
    capture: Capture = Capture.WAL
    careful: bool = False  # foreign keys and triggers act on what the mover writes


@dataclass(frozen=True)
class Example:
    schema: Schema
    seeds: tuple[str, ...]
    neighbours: tuple[str, ...]
    timeline: Timeline
    tuning: Tuning

    def __str__(self) -> str:
        """As a script, for people."""
        lines = [*self.schema.create(), *self.seeds, "-- on the target:", *self.neighbours]
        return "\n".join(
            [f"-- {self.tuning}", *(f"{line};" for line in lines), *(str(step) for step in self.timeline)]
        )

    def __repr__(self) -> str:
        return f"<{self.tuning}>"  # the rest is in the failure's note


@st.composite
def examples(
    draw: Draw,
    target: str,
    first_key: Key,
    *,
    major: int = 16,
    rich_build: bool = False,
    owned: bool = False,
    captures: Sequence[Capture] = tuple(Capture),
    careful: Sequence[bool] = (False, False, True),
) -> Example:
    schema = draw(schemas(first_key, major=major, rich_build=rich_build, owned=owned))
    tuning = Tuning(
        target=target,
        reordered=draw(st.booleans()),
        chunk_rows=draw(st.sampled_from([1, 2, 1000])),
        wave_s=draw(st.sampled_from([0.0001, 600.0, 600.0])),
        small_batch=draw(st.sampled_from([0, 200])),
        capture=draw(st.sampled_from(captures)),
        careful=draw(st.sampled_from(careful)),
    )
    seeds = tuple(seeding(draw, schema))
    theirs = tuple(neighbours(draw, schema)) if tuning.target == "shared" else ()
    # What was truncated is copied anew, which is not possible where foreign keys are in force.
    timeline = draw(timelines(schema, truncates=not tuning.careful))
    return Example(schema, seeds, theirs, timeline, tuning)


@dataclass(frozen=True)
class Servers:
    """Three databases, which one example after the other uses."""

    source: Cluster
    target: Cluster
    source_url: str
    target_url: str
    platform_url: str
    platform: PlatformPool

    @classmethod
    @asynccontextmanager
    async def between(
        cls, source: Cluster, target: Cluster, source_url: str, target_url: str, platform_url: str
    ) -> AsyncIterator[Servers]:
        await platform_database(platform_url)
        pool = PlatformPool(Secret(platform_url), PLATFORM_ANSWER_S)
        await pool.open()
        try:
            yield cls(source, target, source_url, target_url, platform_url, pool)
        finally:
            await pool.close()

    def begin_anew(self) -> None:
        """After a failure there may be anything, on slots and in prepared transactions as well."""
        for server, url in ((self.source, self.source_url), (self.target, self.target_url)):
            name = url.rpartition("/")[2]
            server.drop_database(name)
            server.create_database(name)


async def run_example(servers: Servers, example: Example) -> None:
    """Raises AssertionError, or what went wrong, with the example's script as a note."""
    try:
        with (
            capture_logs(),
            _small_pieces(example.tuning),
            _places(servers, example) as (source, target),
        ):
            async with asyncio.timeout(EXAMPLE_TIMEOUT_S):
                with _rights(example, source):
                    await _Run(servers, example, source, target).run()
    except Exception as error:
        error.add_note(f"{servers.source.version} to {servers.target.version}\n{example}")
        error.add_note(await _story(servers))
        raise


async def _story(servers: Servers) -> str:
    """What the migration has to say of itself: one that halted is only waited for."""
    async with servers.platform.transaction() as conn:
        state = "select status, phase, error, progress ->> 'waiting_for' from platform.tenant_migrations"
        events = "select at::time, message from platform.migration_events order by at desc limit 30"
        rows = [*await (await conn.execute(state)).fetchall(), *await (await conn.execute(events)).fetchall()]
    return "\n".join(map(str, rows))


@contextmanager
def _small_pieces(tuning: Tuning) -> Iterator[None]:
    with (
        patch.object(bulk, "MIN_CHUNK_ROWS", tuning.chunk_rows),
        patch.object(bulk, "CHUNK_BYTES", 1 if tuning.chunk_rows < 1000 else bulk.CHUNK_BYTES),
        patch.object(apply, "SMALL_BATCH", tuning.small_batch),
        patch.object(daemon, "BACKOFF_S", (0.05, 1.0)),
        patch.object(move, "CUTOVER_BACKOFF_S", (0.1, 1.0)),
    ):
        yield


@contextmanager
def _places(servers: Servers, example: Example) -> Iterator[tuple[Place, Place]]:
    """The source with its rows, and the target as the example wants it; both are empty again at the end."""
    services, tuning = example.schema.services, example.tuning
    target_url = servers.source_url if tuning.target == "same" else servers.target_url
    try:
        with (
            Place.at(servers.source_url, "core", services) as source,
            Place.at(target_url, "realestate", services) as target,
        ):
            source.fill([*_made(example), *example.seeds])
            if tuning.target == "shared":
                target.fill(_made(example, reordered=tuning.reordered))
                target.move_sequences_ahead()
                target.fill(example.neighbours)
            yield source, target
            source.empty()
            target.empty()
    except BaseException:
        servers.begin_anew()
        raise


def _made(example: Example, *, reordered: bool = False) -> list[str]:
    """With triggers that know the mover, where they act on what it writes."""
    lines = example.schema.create(reordered=reordered)
    if not example.tuning.careful:
        return lines
    return [re.sub("(CREATE TRIGGER .* FOR EACH ROW)", rf"\1 {KNOWS_US}", line) for line in lines]


@contextmanager
def _rights(example: Example, source: Place) -> Iterator[None]:
    """Whether the mover may set session_replication_role; it has to, where rows are copied into a cycle of
    foreign keys that are in force."""
    tuning = example.tuning
    if not tuning.careful or (tuning.target == "shared" and source.run(CYCLE)):
        yield
        return
    with patch.object(ordinary_roles, "careful_sides", lambda facts: frozenset(Side)):
        yield


# Tables that refer to each other in a circle.
CYCLE = """
WITH RECURSIVE refers AS (
    SELECT conrelid AS child, confrelid AS parent FROM pg_constraint
     WHERE contype = 'f' AND conrelid <> confrelid
), up AS (
    SELECT child, parent FROM refers
     UNION
    SELECT up.child, r.parent FROM up JOIN refers r ON r.child = up.parent
) SELECT FROM up WHERE child = parent
"""


class GatedStore:
    """The platform's store, which lets the mover wait where the journal comes to a gate."""

    def __init__(self, store: Store, names: set[str]) -> None:
        self._store = store
        self._arrived = {name: asyncio.Event() for name in names}
        self._open = {name: asyncio.Event() for name in names}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    async def begin_step(self, claim: Claim, name: str) -> None:
        if name in self._open:
            self._arrived[name].set()
            await self._open[name].wait()
        await self._store.begin_step(claim, name)

    async def arrived(self, name: str) -> None:
        await self._arrived[name].wait()

    def open(self, name: str) -> None:
        self._open[name].set()


@dataclass
class _Run:
    """The mover and the writers of one example."""

    servers: Servers
    example: Example
    source: Place
    target: Place
    writers: Writers = field(init=False)
    others_before: dict[str, Counter[str]] = field(init=False)
    kept: dict[str, Counter[str]] = field(default_factory=dict)
    left_before: tuple[list[str], list[str]] = field(init=False)

    def __post_init__(self) -> None:
        self.writers = Writers(self.source, self.target)

    @property
    def column(self) -> str:
        return self.example.schema.tenant_column

    async def run(self) -> None:
        self.left_before = self.source.leftovers(), self.target.leftovers()
        self.others_before = self.target.rows(self.column, TENANT, others=True)
        store = self._store()
        async with self.writers.closing():
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._move(store))
                tasks.create_task(self._write(store))
        self._check_the_end()

    def _store(self) -> GatedStore:
        pool = self.servers.platform
        store = Store(pool, ORGANIZATIONS, self._config.configured_url, decision_seconds=5)
        return GatedStore(store, {step.name for step in self.example.timeline if isinstance(step, Gate)})

    @property
    def _tier(self) -> Tier:
        return Tier.SCHEMA if self.example.tuning.target == "same" else Tier.DATABASE

    @property
    def _config(self) -> Config:
        return Config.model_validate(
            {
                "platform": {"database_url": self.servers.platform_url},
                "tenancy": {"services": self.source.services, "column": self.column},
                "verticals": {
                    "core": {"database_url": self.source.url},
                    "realestate": {"database_url": self.target.url},
                },
                "engine": {
                    "monitoring_hours": {"database": 0, "schema": 0},
                    "tombstone_days": 0,
                    "copy_workers": 2,
                    "pause_budget_ms": 5000,
                    "wave_seconds": self.example.tuning.wave_s,
                    "lease_seconds": LEASE_S,
                    "capture": self.example.tuning.capture.value,
                },
            }
        )

    async def _move(self, store: GatedStore) -> None:
        """As a daemon works: claims until nothing is due."""
        config = self._config
        async with self.servers.platform.transaction() as conn:
            await conn.execute("delete from platform.tenant_migrations")
            await conn.execute("delete from auth.organizations")
            await conn.execute(
                "insert into auth.organizations (id, name, vertical, isolation_tier)"
                " values (%s, 'A', 'core', 'schema')",
                (TENANT,),
            )
        tenant = TenantId(TENANT)
        request = MigrationRequest(tenant, "realestate", self._tier, requested_by="a test")
        migration = await store.submit(request, config.place(tenant, "core", Tier.SCHEMA))
        workshop = Workshop(config, store, Metrics())  # type: ignore[arg-type]
        found = migration
        while found.status in (Status.QUEUED, Status.IN_PROGRESS, Status.MONITORING):
            if (claim := await store.claim("a test", LEASE_S)) is None:
                await asyncio.sleep(0.02)  # what failed is tried again after a back-off
                continue
            await self._work(claim, store, workshop)
            found = await store.get(str(migration.id))
        assert found.status is Status.COMPLETED, (found.status, found.phase, found.error)
        await store.release(claim)
        claim = await store.claim("a test", LEASE_S)
        assert claim is not None, "nobody looks after the tombstone"
        await self._work(claim, store, workshop)

    async def _work(self, claim: Claim, store: GatedStore, workshop: Workshop) -> None:
        await Work(claim, store, workshop.move, SystemClock(), LEASE_S, Deadlines(0, 0, 0), {}).run()  # type: ignore[arg-type]
        task = asyncio.current_task()
        if task is not None and task.cancelling():  # a stop, which the work has taken as a daemon's
            raise asyncio.CancelledError

    async def _write(self, store: GatedStore) -> None:
        for step in self.example.timeline:
            if not isinstance(step, Gate):
                await self.writers.act(step)
                continue
            await self._arrival(store, step.name)
            if step.name == "monitor":
                await self.writers.end_all()
                self._check_the_switch()
                self._check_the_fence()
                self.writers.switched = True
            if step.name == "cleanup":
                await self.writers.end_all()
                self.kept = self._rows_to_keep()
            store.open(step.name)

    async def _arrival(self, store: GatedStore, name: str) -> None:
        try:
            async with asyncio.timeout(PATIENCE_S if self.writers.is_busy else None):
                await store.arrived(name)
        except TimeoutError:
            await self.writers.end_all()
            await store.arrived(name)

    def _check_the_switch(self) -> None:
        """What the source held when the tenant left it is on the target, and nothing else is."""
        assert_same(self.source.rows(self.column, TENANT), self.target.rows(self.column, TENANT))
        if self.target.url != self.source.url:
            assert_same(self.others_before, self.target.rows(self.column, TENANT, others=True))
        theirs = self.target.sequences()
        for name, (last, called, increment) in self.source.sequences().items():
            there, there_called, _ = theirs[name]
            given = last + increment * called, there + increment * there_called
            assert given[0] * increment <= given[1] * increment, f"sequence {name} lags: {given}"

    def _check_the_fence(self) -> None:
        """Who writes the tenant's rows where they were is told that they have moved."""
        for table in self.example.schema.tables:
            if self.source.run(f"SELECT FROM {table.name} AS r WHERE {table.is_of(TENANT)}"):
                changed = f"UPDATE {table.name} AS r SET {table.unchanged} WHERE {table.is_of(TENANT)}"
                assert self.source.refuses(changed), f"the fence is open: {changed}"

    def _rows_to_keep(self) -> dict[str, Counter[str]]:
        kept = {f"source/{n}": r for n, r in self.source.rows(self.column, TENANT, others=True).items()}
        return kept | {f"target/{n}": r for n, r in self.target.rows(self.column).items()}

    def _check_the_end(self) -> None:
        assert self.writers.switched, "the timeline did not reach the switch"
        assert_same(self.kept, self._rows_to_keep())
        left_behind = self.source.rows(self.column, TENANT)
        assert not any(left_behind.values()), f"rows are left on the source: {left_behind}"
        for place, before in zip((self.source, self.target), self.left_before, strict=True):
            now = place.leftovers()
            assert now == before, f"{place.vertical}: {before} before, {now} after"
