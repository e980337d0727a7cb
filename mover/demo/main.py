"""`mover demo`: a platform with live writers, one tenant moved while they write, and the account of it."""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psycopg
from rich.console import Console
from rich.live import Live
from rich.table import Table

from mover import terminal
from mover.core.ids import Capture
from mover.core.secret import Secret
from mover.demo import rights
from mover.demo.ledger import Ledger, LedgerReport, verify_ledger
from mover.demo.places import PsycopgPlaces
from mover.demo.schema import schemas
from mover.demo.seed import Tenant, demo_tenants, prepare_database, seed_organizations, seed_services
from mover.demo.servers import PostgresServer, RedisServer
from mover.demo.stage import Stage
from mover.demo.workload import Rates, Workload, WorkloadReport
from mover.postgres.platform import initialise
from mover.web.client import ApiClient

APP_PASSWORD = "demo"
SOURCE_VERSION, TARGET_VERSION = 16, 18
VERTICAL = "realestate"
MOVER_ROLE, OWNER_ROLE = "mover", "application_owner"
# Writers run before the move begins and after it has ended, so that both sides of it are seen.
LEAD_IN_S, LEAD_OUT_S = 2.0, 3.0


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line says."""

    rows: int = 320_000  # of the tenant that moves
    tps: int = 250
    keep: bool = False
    json: bool = False
    capture: Capture = Capture.WAL  # by triggers: without logical decoding, and with ordinary roles

    @property
    def is_managed(self) -> bool:
        """Whether the servers are such as managed plans offer."""
        return self.capture is Capture.TRIGGER


@dataclass(frozen=True, slots=True)
class Outcome:
    """Everything that the summary is made of."""

    migration_id: str
    status: str
    progress: Mapping[str, Any]
    evidence: Mapping[str, Any]
    writers: WorkloadReport
    ledger: LedgerReport
    copy_seconds: float
    duration_s: float

    @property
    def pause_steps(self) -> Mapping[str, float]:
        """Milliseconds, as the daemon measured them."""
        steps: Mapping[str, float] = self.evidence.get("pause_steps_ms", {})
        return steps

    @property
    def good(self) -> bool:
        return (
            self.status == "completed"
            and self.ledger.complete
            and self.writers.client_errors == 0
            and self.evidence.get("source_root") is not None
            and self.evidence.get("source_root") == self.evidence.get("target_root")
        )

    def line(self) -> dict[str, object]:
        """The JSON line that `--json` ends with."""
        rows, size = self.progress["rows"]["done"], self.progress["bytes"]["done"]
        return {
            "migration_id": self.migration_id,
            "rows": rows,
            "bytes": size,
            "copy_rows_per_second": round(rows / self.copy_seconds) if self.copy_seconds else 0,
            "changes_applied": self.progress["changesApplied"],
            "pause_ms": asdict(self.writers.pause_ms) if self.writers.pause_ms else None,
            "client_errors": self.writers.client_errors,
            "lost_writes": self.ledger.lost,
            "duplicated_writes": self.ledger.duplicated,
            "verified": self.evidence.get("source_root") is not None
            and self.evidence.get("source_root") == self.evidence.get("target_root"),
            "source_root": self.evidence.get("source_root"),
            "target_root": self.evidence.get("target_root"),
            "duration_s": round(self.duration_s, 2),
        }


async def run(options: Options) -> bool:
    """Whether the move ended as promised."""
    console = Console(stderr=options.json)
    with tempfile.TemporaryDirectory(prefix="mover-demo-") as folder, _servers(options, console) as servers:
        console.print(f"Seeding a platform with 25 tenants, one of them with {options.rows:,} rows …")
        tenants = demo_tenants(large_rows=options.rows)
        urls = await asyncio.to_thread(_seed, servers, tenants)
        stage = Stage(
            Path(folder),
            platform_url=urls["platform"],
            verticals=_reached(options, servers, urls),
            redis_url=servers.redis.url,
            engine={
                "monitoring_hours": {"database": LEAD_OUT_S / 3600},
                "capture": options.capture.value,
            },
        )
        stage.write_config()
        async with stage.running():
            outcome = await _move(options, console, servers, urls, stage, tenants)
            _show(console, outcome, tenants[0])
            if options.json:
                print(json.dumps(outcome.line()), flush=True)
            if options.keep:
                await _keep(console, stage, urls)
        return outcome.good


@dataclass(frozen=True, slots=True)
class Servers:
    source: PostgresServer
    target: PostgresServer
    redis: RedisServer


@contextmanager
def _servers(options: Options, console: Console) -> Iterator[Servers]:
    settings = {"wal_level": "replica", "max_replication_slots": "0"} if options.is_managed else {}
    console.print(
        f"Starting PostgreSQL {SOURCE_VERSION}, PostgreSQL {TARGET_VERSION} and Redis"
        f"{', without logical decoding' if options.is_managed else ''} …"
    )
    with (
        PostgresServer(SOURCE_VERSION, settings=settings) as source,
        PostgresServer(TARGET_VERSION, settings=settings) as target,
        RedisServer() as redis,
    ):
        yield Servers(source, target, redis)


def _seed(servers: Servers, tenants: list[Tenant]) -> dict[str, str]:
    """The databases by name: the platform's own, core with everybody, and the empty vertical."""
    urls = {
        "platform": servers.source.create_database("platform"),
        "core": servers.source.create_database("core"),
        VERTICAL: servers.target.create_database(VERTICAL),
    }
    for name in ("core", VERTICAL):
        with psycopg.connect(urls[name], autocommit=True) as conn:
            prepare_database(conn, APP_PASSWORD)
    with psycopg.connect(urls["core"], autocommit=True) as conn:
        seed_services(conn, "core", tenants)
    with psycopg.connect(urls["platform"], autocommit=True) as conn:
        prepare_database(conn, APP_PASSWORD)
        seed_organizations(conn, tenants)
    asyncio.run(initialise(Secret(urls["platform"])))
    return urls


def _reached(options: Options, servers: Servers, urls: Mapping[str, str]) -> dict[str, str]:
    """The verticals' URLs for the daemon: as superuser, or by a role with the README's grants only."""
    if not options.is_managed:
        return {name: urls[name] for name in ("core", VERTICAL)}
    reached = {}
    for name, server in (("core", servers.source), (VERTICAL, servers.target)):
        with psycopg.connect(urls[name], autocommit=True) as conn:
            rights.make_role(conn, MOVER_ROLE, OWNER_ROLE, replication=False)
            rights.give_away(conn, OWNER_ROLE, schemas(name).values())
            if name == "core":
                rights.grant_on_source(conn, MOVER_ROLE, OWNER_ROLE)
            else:
                rights.grant_on_target(conn, MOVER_ROLE, OWNER_ROLE, with_tables=False)
        reached[name] = server.url(name, MOVER_ROLE)
    return reached


async def _move(
    options: Options,
    console: Console,
    servers: Servers,
    urls: Mapping[str, str],
    stage: Stage,
    tenants: list[Tenant],
) -> Outcome:
    tenant, *others = tenants
    places = PsycopgPlaces(
        Secret(servers.source.url("platform", "app", APP_PASSWORD)),
        {
            "core": Secret(servers.source.url("core", "app", APP_PASSWORD)),
            VERTICAL: Secret(servers.target.url(VERTICAL, "app", APP_PASSWORD)),
        },
    )
    ledger = Ledger()
    workload = Workload(places, tenant.id, [t.id for t in others[:3]], ledger, Rates(tps=options.tps))
    started = asyncio.get_running_loop().time()
    async with workload.running(), stage.client() as api:
        console.print(f"Writers hold {options.tps} transactions/s on {tenant.name}; moving it now.")
        await asyncio.sleep(LEAD_IN_S)
        migration = await api.submit(
            {"tenantId": str(tenant.id), "targetVertical": VERTICAL, "targetTier": "database"}
        )
        progress = await _follow(api, migration["id"], console)
        await asyncio.sleep(LEAD_OUT_S)
    duration_s = asyncio.get_running_loop().time() - started
    home = VERTICAL if progress["status"] == "completed" else "core"
    report = await asyncio.to_thread(verify_ledger, ledger, Secret(urls[home]), schemas(home), tenant.id)
    steps = {step["name"]: step for step in progress["steps"]}
    return Outcome(
        migration_id=migration["id"],
        status=progress["status"],
        progress=progress,
        evidence=_evidence(urls["platform"], migration["id"]),
        writers=workload.report(),
        ledger=report,
        copy_seconds=(steps.get("copy", {}).get("durationMs") or 0) / 1000,
        duration_s=duration_s,
    )


async def _follow(api: ApiClient, migration: str, console: Console) -> Mapping[str, Any]:
    """Show events and progress until the migration has ended."""
    with Live(console=console, refresh_per_second=4, transient=True) as live:
        async for message in api.events(migration):
            if message["type"] == "event":
                live.console.print(terminal.event_line(message))
            else:
                live.update(terminal.progress_panel(message))
    return await api.progress(migration)


def _evidence(platform_url: str, migration: str) -> Mapping[str, Any]:
    with psycopg.connect(platform_url) as conn:
        row = conn.execute(
            "SELECT progress -> 'evidence' FROM platform.tenant_migrations WHERE id = %s", (migration,)
        ).fetchone()
    return (row and row[0]) or {}


def _show(console: Console, outcome: Outcome, tenant: Tenant) -> None:
    """A summary that an operator believes: what the writers saw, and what the databases say."""
    line, writers = outcome.line(), outcome.writers
    pause = writers.pause_ms
    table = Table(title=f"{tenant.name} moved: {outcome.status}", show_header=False, title_justify="left")
    for name, value in (
        ("rows copied", f"{line['rows']:,} ({terminal.size(float(str(line['bytes'])))})"),
        ("copy", f"{line['copy_rows_per_second']:,} rows/s"),
        ("changes followed", f"{line['changes_applied']:,}"),
        ("writers", f"{writers.tps} transactions/s, at least {writers.lowest_tps} in any 5 s"),
        (
            "pause the writers saw",
            f"median {pause.p50} ms, 99 % {pause.p99} ms, longest {pause.max} ms" if pause else "none",
        ),
        ("  its steps, ms", ", ".join(f"{k} {v}" for k, v in outcome.pause_steps.items())),
        ("client errors", str(writers.client_errors)),
        ("acknowledged writes", f"{outcome.ledger.checked:,}"),
        ("  lost", str(outcome.ledger.lost)),
        ("  applied twice", str(outcome.ledger.duplicated)),
        ("root of the source", str(line["source_root"])),
        ("root of the target", str(line["target_root"])),
        ("duration", f"{line['duration_s']} s"),
    ):
        table.add_row(name, value)
    console.print(table)
    if outcome.progress["error"]:
        for step in outcome.progress["steps"]:
            console.print(f"  {step['name']}: {step['status']} {step['detail'] or ''}")
        console.print(f"[red]{outcome.progress['error']['message']}[/]")
    for error in writers.errors:
        console.print(f"[red]client error: {error}[/]")
    console.print("[green]Nothing was lost.[/]" if outcome.good else "[red]This is not what was promised.[/]")


async def _keep(console: Console, stage: Stage, urls: Mapping[str, str]) -> None:
    """Leave everything running until Ctrl-C."""
    console.print(f"API: {stage.server}  token: {stage.token}")
    for name, url in urls.items():
        console.print(f"{name}: {url}")
    console.print("Press Ctrl-C to stop.")
    await asyncio.Event().wait()
