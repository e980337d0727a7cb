"""A small platform with a daemon that is a real process, live writers, and the check that follows every
migration: plain SQL and the writers' ledger, nothing of the mover's.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg
from psycopg import sql
from psycopg.rows import dict_row

from mover.core.crash import VARIABLE
from mover.core.ids import Capture, Epoch, MigrationId, TenantId
from mover.core.migration import Wish
from mover.core.secret import Secret
from mover.demo.ledger import Counted, Key, Ledger, Write, verify_ledger
from mover.demo.places import PsycopgPlaces
from mover.demo.schema import identifiers, schemas
from mover.demo.seed import Tenant
from mover.demo.servers import Cluster
from mover.demo.stage import Stage
from mover.demo.workload import Rates, Workload, WorkloadReport
from mover.postgres.connect import Database, Identity
from mover.postgres.fence import PgFence
from mover.postgres.store import open_store
from tests.support.checks import (
    Multiset,
    Table,
    connect,
    leftovers,
    multiset,
    other_tenants_fingerprint,
    tenant_fingerprints,
    tenant_tables,
)
from tests.support.platform import APP_PASSWORD
from tests.support.queue import ORGANIZATIONS

CORE, ESTATE, PLATFORM = "core", "realestate", "platform"
LEASE_S = 2.0
# Long enough to look at the source before it is cleaned.
MONITORING_S = 1.5
POLL_S = 0.02
ENDED = frozenset({"completed", "failed", "cancelled", "rolled_back"})


class TimedLedger(Ledger):
    """Knows also when each thing was written last."""

    def __init__(self) -> None:
        super().__init__()
        self.written_at: dict[Key, float] = {}

    def acknowledge(self, writes) -> None:
        super().acknowledge(writes)
        self._note_time(writes)

    def doubt(self, writes) -> None:
        super().doubt(writes)
        self._note_time(writes)

    def _note_time(self, writes: Sequence[Write]) -> None:
        for key, _ in writes:
            self.written_at[key] = time.monotonic()

    def written_since(self, tenant: TenantId, moment: float) -> dict[str, list[str]]:
        """The ids of what was written, by the kind of thing."""
        found: dict[str, list[str]] = {counted.value: [] for counted in Counted}
        for key, at in self.written_at.items():
            if key.tenant == tenant and at >= moment:
                found[key.counted.value].append(key.id)
        return found


@dataclass(frozen=True)
class Home:
    """A database in which tenants live."""

    server: Cluster
    url: str  # as superuser
    vertical: str
    tier: str = "database"

    @property
    def app_url(self) -> Secret:
        return Secret(self.server.url(self.url.rpartition("/")[2], "app", APP_PASSWORD))

    @property
    def tables(self) -> list[Table]:
        return tenant_tables(self.url, schemas(self.vertical).values())

    def execute(self, statement: str, *parameters: object) -> list[tuple[Any, ...]]:
        with psycopg.connect(self.url, autocommit=True) as conn:
            cursor = conn.execute(statement, parameters)
            return cursor.fetchall() if cursor.description else []


@dataclass
class Scene:
    """Servers' databases, tenants and writers; daemons are started on it."""

    folder: Path
    platform: Home
    homes: Mapping[str, Home]
    tenants: Sequence[Tenant]  # of core, the large one first
    redis_url: str
    capture: Capture = Capture.WAL
    ledger: TimedLedger = field(default_factory=TimedLedger)
    watches: list[Watch] = field(default_factory=list)
    workloads: int = 0
    detours: dict[str, str] = field(
        default_factory=dict
    )  # other URLs by which daemons reach homes and PLATFORM

    @property
    def tenant(self) -> TenantId:
        return self.tenants[0].id

    def stage(
        self, name: str = "daemon", *, health: Mapping[str, object] | None = None, **engine: object
    ) -> Stage:
        """A daemon that is not started yet; `engine` is laid over the section of that name."""
        hours = dict.fromkeys(("schema", "database", "dedicated", "downgrade"), MONITORING_S / 3600)
        settings = {
            "lease_seconds": LEASE_S,
            "copy_workers": 2,
            "pause_budget_ms": 3000,
            "monitoring_hours": hours,
            "capture": self.capture.value,
            **engine,
        }
        stage = Stage(
            self.folder,
            platform_url=self.detours.get(PLATFORM, self.platform.url),
            verticals={name: self.detours.get(name, home.url) for name, home in self.homes.items()},
            redis_url=self.redis_url,
            engine=settings,
            health=health or {},
            name=name,
        )
        stage.write_config()
        return stage

    @asynccontextmanager
    async def writing(
        self, tenants: Sequence[TenantId] = (), others: Sequence[TenantId] = (), tps: float = 120
    ) -> AsyncIterator[Workload]:
        """Writers on the first of `tenants` (the large one) and a few on `others`."""
        places = PsycopgPlaces(
            self.platform.app_url, {name: home.app_url for name, home in self.homes.items()}
        )
        tenant, *more = tenants or (self.tenant,)
        self.workloads += 1  # each has ids of its own
        others_tps = 20 * (len(more) + len(others))
        rates = Rates(tps=tps, clients=6, others_tps=others_tps, seed=self.workloads)
        workload = Workload(places, tenant, [*more, *others], self.ledger, rates)
        async with workload.running():
            yield workload

    def watch(
        self,
        source: str = CORE,
        target: str | Home = ESTATE,
        tenant: TenantId | None = None,
        writers: Sequence[TenantId] = (),
        *,
        keeps_snapshot: bool = True,
    ) -> Watch:
        """To be taken before anything is written; `writers` are other tenants that write meanwhile."""
        to = target if isinstance(target, Home) else self.homes[target]
        watch = Watch(self, tenant or self.tenant, self.homes[source], to, writers, keeps_snapshot)
        self.watches.append(watch)
        return watch

    def url(self, side: str) -> str:
        """That of a home, or of PLATFORM."""
        return self.platform.url if side == PLATFORM else self.homes[side].url

    def close(self) -> None:
        for watch in self.watches:
            watch.close()

    def route(self, tenant: TenantId | None = None) -> str:
        """The vertical in which the tenant lives."""
        query = "select vertical from auth.organizations where id = %s"
        ((vertical,),) = self.platform.execute(query, tenant or self.tenant)
        return vertical

    @asynccontextmanager
    async def daemon(self, name: str = "daemon", **engine: object) -> AsyncIterator[Stage]:
        """A running daemon; killed at the end of the test."""
        stage = self.stage(name, **engine)
        async with killed(stage):
            await stage.start()
            yield stage

    @asynccontextmanager
    async def frozen_at(self, point: str) -> AsyncIterator[tuple[Watch, Stage, Workload]]:
        """A migration under way, with writers, whose daemon stands still at a crash point."""
        watch, stage = self.watch(), self.stage()
        async with self.writing() as workload, killed(stage):
            await stage.start(**at(point, signal.SIGSTOP))
            await watch.submit(stage)
            await until_stopped(stage)
            yield watch, stage, workload

    def lose_a_deal(self) -> int:
        """Delete a row of the tenant on the target as only a superuser can, unseen by every trigger."""
        with psycopg.connect(self.homes[ESTATE].url) as conn:
            conn.execute("set session_replication_role = replica")
            conn.execute(sql.SQL("set mover.tenant = {}").format(sql.Literal(str(self.tenant))))
            (lost,) = conn.execute(
                "delete from realestate_crm.deals where tenant_id = %(t)s and id ="
                " (select max(id) from realestate_crm.deals where tenant_id = %(t)s) returning id",
                {"t": self.tenant},
            ).fetchone()
        return lost

    async def wish(self, watch: Watch, wish: Wish) -> None:
        """As the API does it, while no daemon runs."""
        async with open_store(Secret(self.platform.url), ORGANIZATIONS, lambda *_: None) as store:
            await store.wish(watch.id, wish, "a test")


@dataclass
class Watch:
    """One migration as the platform database tells, and what the source held at its switch."""

    scene: Scene
    tenant: TenantId
    source: Home
    target: Home
    writers: Sequence[TenantId]
    # Of the source at the switch; without it, since its server may stop, both sides are compared otherwise.
    keeps_snapshot: bool = True
    id: str = ""
    row: dict[str, Any] = field(default_factory=dict)
    seen: list[tuple[str, str | None, str | None]] = field(default_factory=list)
    waited_for: set[str] = field(default_factory=set)
    _before: dict[Home, dict[Table, Multiset]] = field(default_factory=dict)
    _leftovers_before: dict[Home, list[str]] = field(default_factory=dict)
    _unswitched_at: float = 0.0
    _frozen: psycopg.Connection | None = None
    _opening: threading.Lock = field(default_factory=threading.Lock)  # looks may be several at a time
    _freezing: threading.Lock = field(
        default_factory=threading.Lock
    )  # a look that is cancelled goes on aside
    _eye: psycopg.Connection | None = None
    _is_compared: bool = False

    def __post_init__(self) -> None:
        self._is_compared = not self.keeps_snapshot
        self.take_others()
        for home in (self.source, self.target):
            self._leftovers_before[home] = leftovers(home.url)

    def take_others(self) -> None:
        """What must stay as it is now; again after a change of the schemas."""
        self._before = {home: self._others(home) for home in (self.source, self.target)}

    async def submit(self, stage: Stage) -> str:
        async with stage.client() as api:
            migration = await api.submit(
                {
                    "tenantId": str(self.tenant),
                    "targetVertical": self.target.vertical,
                    "targetTier": self.target.tier,
                }
            )
        self.id = migration["id"]
        return self.id

    async def until(self, *statuses: str, timeout_s: float = 90) -> str:
        """Fails at once when the migration ends otherwise."""
        over = ENDED | set(statuses)
        status = await self.until_row(lambda row: row["status"] in over, timeout_s)
        assert status in statuses, (self.seen, self.row["error"])
        return status

    async def until_row(self, condition: Callable[[dict[str, Any]], bool], timeout_s: float = 90) -> str:
        """Follow the migration until `condition` holds for its row; the status then."""
        until = time.monotonic() + timeout_s
        while not condition(await self._look()):
            assert time.monotonic() < until, (self.seen, self.waited_for, self.row)
            await asyncio.sleep(POLL_S)
        return self.row["status"]

    async def until_frozen(self, stage: Stage, timeout_s: float = 60) -> None:
        """Follow the migration until its daemon stands still at a crash point."""
        await self.until_row(lambda row: is_frozen(stage) or row["status"] in ENDED, timeout_s)
        assert is_frozen(stage), (self.seen, self.row["error"])

    async def for_ever(self) -> None:
        """Follow the migration until cancelled."""
        while True:
            await self._look()
            await asyncio.sleep(POLL_S)

    async def _look(self) -> dict[str, Any]:
        began_at = time.monotonic()
        with contextlib.suppress(psycopg.OperationalError):  # the platform's server may be restarting
            self.row = await asyncio.to_thread(self._read)
            if self.row["switched_at"] is None:
                self._unswitched_at = began_at
            elif self._frozen is None and not self._is_compared:
                await asyncio.to_thread(self._freeze)
            self._remember()
        return self.row

    def _read(self) -> dict[str, Any]:
        """On a connection that stays: looks are many."""
        with self._opening:
            if self._eye is None or self._eye.closed:
                self._eye = psycopg.connect(self.scene.platform.url, autocommit=True, row_factory=dict_row)
        return self._eye.execute(
            "select status, phase, switched_at, error, owner, epoch, wish, progress,"
            " coalesce(lease_until > now(), false) as leased"
            " from platform.tenant_migrations where id = %s",
            (self.id,),
        ).fetchone()

    def _remember(self) -> None:
        error = (self.row["error"] or {}).get("code")
        state = (self.row["status"], self.row["phase"], error)
        if not self.seen or self.seen[-1] != state:
            self.seen.append(state)
        waiting = self.row["progress"].get("waiting_for")
        if waiting:
            self.waited_for.add(waiting)

    def _freeze(self) -> None:
        """Keep a snapshot of the source, which no write of the tenant reaches any more."""
        with self._freezing:
            if self._frozen is not None:
                return
            self._frozen = connect(self.source.url)
            self._frozen.execute("begin isolation level repeatable read read only")
            self._frozen.execute("select pg_current_snapshot()")
        assert self._read()["phase"] != "cleanup", "the machine was too slow to look at the source"

    @property
    def source_at_switch(self) -> psycopg.Connection:
        """Sees the source as it was when the tenant left it."""
        assert self._frozen is not None, "the switch was not seen"
        return self._frozen

    def close(self) -> None:
        self.thaw()
        if self._eye is not None:
            self._eye.close()

    def thaw(self) -> None:
        """Let go of the snapshot; while the tenant's rows are there, the next look takes one again."""
        if self._frozen is not None:
            self._frozen.close()
            self._frozen = None

    # The check after a migration.

    def check_switched(self) -> None:
        """The target has all rows that the source had, whose server may stop afterwards; call it after the
        writers that wrote around the switch."""
        self._check_nothing_but_later_writes_differs()
        self._is_compared = True

    def check_completed(self) -> None:
        """The tenant lives on the target with all its rows, and nowhere else; call it after the writers."""
        assert self.row["status"] == "completed", (self.seen, self.row["error"])
        assert self.scene.route(self.tenant) == self.target.vertical
        self._check_rows_are_gone(self.source)
        if not self._is_compared:
            self._check_nothing_but_later_writes_differs()
        self._check_ledgers(self.target)
        self._check_others()
        self._check_sequences()
        self._check_tombstone()
        assert leftovers(self.source.url, tombstone=True) == []
        if self.target.url != self.source.url:
            assert leftovers(self.target.url) == []

    def check_undone(self, status: str) -> None:
        """As if nothing had happened."""
        assert self.row["status"] == status, (self.seen, self.row["error"])
        assert self.scene.route(self.tenant) == self.source.vertical
        self._check_rows_are_gone(self.target)
        self._check_ledgers(self.source)
        self._check_others()
        for home in (self.source, self.target):
            now, before = set(leftovers(home.url)), set(self._leftovers_before[home])
            assert now == before, (now - before, before - now)

    def leaves_anything(self) -> bool:
        """Whether there is more of the mover's, or less, than before."""
        return any(set(leftovers(home.url)) != set(was) for home, was in self._leftovers_before.items())

    def sides_are_equal(self) -> bool:
        """Of this tenant, table by table; each side is read at another moment."""
        names = schemas(self.target.vertical)
        there = {(schema, table): (names[_service(schema)], table) for schema, table in self.source.tables}
        ours = tenant_fingerprints(self.source.url, there, self.tenant)
        theirs = tenant_fingerprints(self.target.url, there.values(), self.tenant)
        return any(rows.count for rows in ours.values()) and all(
            rows == theirs[there[table]] for table, rows in ours.items()
        )

    def _check_rows_are_gone(self, home: Home) -> None:
        with connect(home.url) as conn:
            for table in home.tables:
                where = sql.SQL("select count(*) from {} where tenant_id = %s").format(sql.Identifier(*table))
                assert conn.execute(where, (self.tenant,)).fetchone() == (0,), table

    def _check_nothing_but_later_writes_differs(self) -> None:
        """Every row of the source at the switch, but for what was written since, is on the target."""
        assert self._frozen is not None, "the switch was not seen"
        since = self.scene.ledger.written_since(self.tenant, self._unswitched_at)
        compared = 0
        with connect(self.target.url) as target:
            for schema, name in self.source.tables:
                ours, theirs = (
                    multiset(
                        conn,
                        (schemas(home.vertical)[_service(schema)], name),
                        *self._untouched(home, name, since),
                    )
                    for conn, home in ((self._frozen, self.source), (target, self.target))
                )
                assert ours == theirs, f"{name}: {ours} at the switch, {theirs} on the target"
                compared += ours.count
        assert compared > 0
        self.thaw()  # its locks would be in the way of the next migration

    def _untouched(self, home: Home, table: str, since: Mapping[str, list[str]]) -> tuple[sql.Composed, dict]:
        condition = sql.SQL("tenant_id = %(tenant)s and " + UNTOUCHED.get(table, "true"))
        parameters = {
            "tenant": self.tenant,
            "activities": [UUID(i) for i in since["activity"]],
            "invoices": [UUID(i) for i in since["invoice"] + since["invoice_line"]],
            "documents": [UUID(i) for i in since["document"] + since["document_revision"]],
            "contacts": [int(i) for i in since["contact_touches"]],
        }
        return condition.format(**identifiers(home.vertical)), parameters

    def _check_ledgers(self, home: Home) -> None:
        """Nothing acknowledged is lost or there twice, for the tenant and for the others that wrote."""
        self._check_ledger(self.tenant, home)
        for other in self.writers:
            self._check_ledger(other, self.scene.homes[self.scene.route(other)])

    def _check_ledger(self, tenant: TenantId, home: Home) -> None:
        report = verify_ledger(self.scene.ledger, Secret(home.url), schemas(home.vertical), tenant)
        assert report.complete, report

    def _check_others(self) -> None:
        for home in (self.source, self.target):
            before, now = self._before[home], self._others(home)
            for table, rows in now.items():
                there = before.get(table)
                assert rows == there if there and there.count else rows.count == 0, (home.vertical, table)
            assert before.keys() <= now.keys(), "tables are gone"

    def _others(self, home: Home) -> dict[Table, Multiset]:
        return other_tenants_fingerprint(home.url, home.tables, self.tenant, *self.writers)

    def _check_sequences(self) -> None:
        """What the target gives out next was never given out."""
        with connect(self.target.url) as conn:
            for schema, table, column, sequence in conn.execute(
                OWNED_SEQUENCES, [list(schemas(self.target.vertical).values())]
            ):
                query = sql.SQL("select coalesce((select max({}) from {}), 0) < nextval(%s)")
                (ahead,) = conn.execute(
                    query.format(sql.Identifier(column), sql.Identifier(schema, table)), (sequence,)
                ).fetchone()
                assert ahead, f"{sequence} lags behind {schema}.{table}.{column}"

    def _check_tombstone(self) -> None:
        """A stale route gets 25006."""
        with psycopg.connect(self.source.app_url.reveal(), autocommit=True) as conn:
            try:
                conn.execute(
                    sql.SQL("insert into {crm}.activities (tenant_id, kind) values (%s, 'stale')").format(
                        **identifiers(self.source.vertical)
                    ),
                    (self.tenant,),
                )
            except psycopg.errors.ReadOnlySqlTransaction:
                return
        raise AssertionError("the place that the tenant has left accepts its writes")


def _service(schema: str) -> str:
    return schema.rpartition("_")[2]


# The rows that no writer has touched since the switch; the parameters are ids of what was touched.
UNTOUCHED = {
    "activities": "(write_id is null or write_id <> all(%(activities)s))",
    "invoices": "(reference is null or reference <> all(%(invoices)s))",
    "invoice_lines": "not exists (select from {crm}.invoices i where i.id = invoice_id"
    " and i.reference = any(%(invoices)s))",
    "contacts": "id <> all(%(contacts)s)",
    "documents": "id <> all(%(documents)s)",
    "document_versions": "document_id <> all(%(documents)s)",
}
OWNED_SEQUENCES = """
select n.nspname, c.relname, a.attname, d.objid::regclass::text
  from pg_depend d
  join pg_class s on s.oid = d.objid and s.relkind = 'S'
  join pg_class c on c.oid = d.refobjid
  join pg_namespace n on n.oid = c.relnamespace
  join pg_attribute a on a.attrelid = c.oid and a.attnum = d.refobjsubid
 where d.classid = 'pg_class'::regclass and d.deptype in ('a', 'i') and n.nspname = any(%s)
"""


@asynccontextmanager
async def killed(stage: Stage) -> AsyncIterator[Stage]:
    """Whatever became of the daemon: none is left at the end."""
    try:
        yield stage
    finally:
        await stage.kill()


@contextmanager
def holding_off(home: Home, tenant: TenantId) -> Iterator[None]:
    """A cutover gives up as long as somebody holds what an open transaction of the tenant's holds."""
    nobody = Identity(MigrationId(tenant), Epoch(0))
    fence = PgFence(Database(Secret(home.url), "test"), tenant, home.vertical, nobody, 1)
    with psycopg.connect(home.url, autocommit=True) as conn:
        conn.execute("select pg_advisory_lock_shared(%s)", (fence.key,))
        yield


def at(point: str, number: signal.Signals = signal.SIGKILL) -> dict[str, str]:
    """The environment of a daemon that gets this signal at a crash point."""
    return {VARIABLE: f"{point}:{number.name}"}


def stops_at(*points: str) -> dict[str, str]:
    """The environment of a daemon that is frozen at each of these crash points, once."""
    return {VARIABLE: ",".join(f"{point}:{signal.SIGSTOP.name}" for point in points)}


async def until_stopped(stage: Stage, timeout_s: float = 60) -> None:
    """Until SIGSTOP has frozen the daemon."""
    async with asyncio.timeout(timeout_s):
        while not is_frozen(stage):  # noqa: ASYNC110, nobody tells us
            await asyncio.sleep(POLL_S)


def is_frozen(stage: Stage) -> bool:
    assert stage.process is not None
    assert stage.process.returncode is None, stage.log_path.read_text()[-3000:]
    return _state(stage.process.pid) == "T"


def lives(stage: Stage) -> bool:
    """Frozen or not."""
    return stage.process is not None and stage.process.returncode is None


def works(stage: Stage) -> bool:
    """Neither dead nor frozen."""
    return lives(stage) and not is_frozen(stage)


def _state(pid: int) -> str:
    with contextlib.suppress(FileNotFoundError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return "gone"


def our_backends(url: str) -> list[str]:
    """The mover's connections to this database, but for the platform's."""
    with connect(url) as conn:
        return [
            name
            for (name,) in conn.execute(
                "select application_name from pg_stat_activity"
                " where datname = current_database() and application_name like 'mover/%'"
            )
        ]


def clean(report: WorkloadReport) -> None:
    """The writers saw nothing that the contract's three lines do not hide."""
    assert report.client_errors == 0, report.errors
    assert report.stale_reads == 0
