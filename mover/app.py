"""The composition root: configuration -> adapters -> API, until a signal comes."""

from __future__ import annotations

import asyncio
import functools
import os
import signal
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from uuid import UUID

from aiohttp import web

from mover.cache import RoutingCache
from mover.config import Config
from mover.core.errors import MoverError, first_error
from mover.core.ids import Capture, Epoch, MigrationId, TenantId
from mover.core.migration import Claim, MigrationRequest, Place, Progress
from mover.core.tables import Plan
from mover.core.triggers import Deadlines
from mover.engine.daemon import Daemon
from mover.engine.move import Limits, Move
from mover.log import logger
from mover.metrics import Metrics, MetricsObserver
from mover.postgres.connect import Identity
from mover.postgres.site import BESIDE_WORKERS, KEPT_CONNECTIONS, PgSite
from mover.postgres.store import Store, open_store
from mover.probes import ConfiguredProbes
from mover.web.app import make_app

SHUTDOWN_SECONDS = 2  # requests that are being answered
EXIT_SECONDS = 9  # whoever stops us may use force after 10
SOURCE_URL = "source_url"  # the note that keeps it
_log = logger(__name__)


async def serve(config: Config) -> None:
    """Run the daemon until SIGTERM or SIGINT; migrations rest at a safe point and can be resumed."""
    stop, loop = asyncio.Event(), asyncio.get_running_loop()

    def end() -> None:
        stop.set()
        loop.call_later(EXIT_SECONDS, _leave)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, end)
    await run(config, stop)


def _leave() -> None:
    """A server that does not answer keeps us: as if we were killed, which does no harm anywhere."""
    _log.warning("stopped without waiting for a server that does not answer", action="stop")
    os._exit(0)


async def run(config: Config, stop: asyncio.Event) -> None:
    """The API and the engine, until `stop` is set."""
    metrics = Metrics()
    async with open_store(
        config.platform.database_url,
        config.routing.organizations_table,
        config.configured_url,
        decision_seconds=config.engine.pause_budget_ms / 1000,
    ) as store:
        workshop = Workshop(config, store, metrics)
        app = make_app(store, workshop.plan, config.place, config.api.tokens, metrics)
        async with listening(app, config):
            with first_error():
                async with asyncio.TaskGroup() as tasks:
                    engine = tasks.create_task(workshop.daemon().run(), name="engine")
                    await stop.wait()
                    engine.cancel()
    _log.info("stopped", action="stop")


class SystemClock:
    """Implements ports.Clock; not by the loop's own time, which uvloop keeps in whole milliseconds."""

    def monotonic(self) -> float:
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


@dataclass(frozen=True, slots=True)
class Workshop:
    """Plugs the adapters into the engine."""

    config: Config
    store: Store
    metrics: Metrics

    def daemon(self) -> Daemon:
        engine = self.config.engine
        return Daemon(
            name=f"{socket.gethostname()}/{os.getpid()}",
            store=self.store,
            make_move=self.move,
            clock=SystemClock(),
            lease_s=engine.lease_seconds,
            max_active=engine.max_active_migrations,
            deadlines=Deadlines(
                whole_s=engine.timeout_hours * 3600,
                phase_s=engine.phase_timeout_hours * 3600,
                unreachable_s=engine.unreachable_minutes * 60,
            ),
            metrics=MetricsObserver(self.metrics),
        )

    async def plan(self, request: MigrationRequest, source: Place, target: Place) -> Plan:
        """Preflight for a dry run: reads both sides, changes nothing."""
        nobody = Identity(MigrationId(UUID(int=0)), Epoch(0))
        return await self._site(request.tenant, nobody, source, target).preflight()

    async def move(self, claim: Claim, progress: Progress) -> Move:
        """Everything that one claim needs. The route may have been switched by an earlier owner."""
        m = claim.migration
        source = await self._source_place(claim)
        target = self.config.place(m.tenant, m.target_vertical, m.target_tier)
        engine = self.config.engine
        return Move(
            claim=claim,
            source=source,
            target=target,
            store=self.store,
            site=self._site(m.tenant, Identity(m.id, claim.epoch), source, target, KEPT_CONNECTIONS),
            cache=RoutingCache(
                self.config.routing.redis_url,
                self.config.routing.cache_key.format(tenant_id=m.tenant),
                m.tenant,
            ),
            limits=Limits(
                copy_workers=min(engine.copy_workers, engine.max_connections_per_database - BESIDE_WORKERS),
                wave_seconds=engine.wave_seconds,
                pause_budget_s=engine.pause_budget_ms / 1000,
                tombstone_s=engine.tombstone_days * 86_400,
                abandoned_s=engine.abandoned_hours * 3_600,
                max_retained_bytes=engine.max_retained_gb * (1 << 30),
                health_interval_s=self.config.health.interval_seconds,
                health_failures=self.config.health.failures,
                monitoring_s=self.config.monitoring_seconds(m.source_tier, m.target_tier),
            ),
            clock=SystemClock(),
            observer=MetricsObserver(self.metrics),
            probes=ConfiguredProbes(self.config.health, m.tenant, functools.partial(self._route, m.tenant)),
            progress=progress,
        )

    async def _route(self, tenant: TenantId) -> Place:
        return self.config.place(tenant, *await self.store.where_is(tenant))

    async def _source_place(self, claim: Claim) -> Place:
        """By the configuration, or by the route's own URL: that is kept, since the switch replaces it."""
        m = claim.migration
        notes = await self.store.load_notes(claim)
        if SOURCE_URL not in notes:
            _, _, route_url = await self.store.where_is(m.tenant)
            await self.store.save_note(claim, SOURCE_URL, route_url)
            notes[SOURCE_URL] = route_url
        url = notes[SOURCE_URL]
        return self.config.place(m.tenant, m.source_vertical, m.source_tier, str(url) if url else None)

    def _site(
        self, tenant: TenantId, identity: Identity, source: Place, target: Place, kept: int = 0
    ) -> PgSite:
        engine = self.config.engine
        return PgSite(
            tenant=tenant,
            identity=identity,
            source_place=source,
            target_place=target,
            tenancy=self.config.tenancy.rules,
            workers=min(engine.copy_workers, engine.max_connections_per_database - BESIDE_WORKERS),
            connections=engine.max_connections_per_database,
            budget_s=engine.pause_budget_ms / 1000,
            kept=kept,
            capture=None if engine.capture == "auto" else Capture(engine.capture),
        )


@asynccontextmanager
async def listening(app: web.Application, config: Config) -> AsyncIterator[None]:
    """The API on its address; raises MoverError when that is taken."""
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=SHUTDOWN_SECONDS)
    await runner.setup()
    try:
        host, port = config.api.address
        try:
            await web.TCPSite(runner, host, port).start()
        except OSError as error:
            raise MoverError(
                f"cannot listen on {config.api.listen} ({error.strerror})", hint="Set [api] listen."
            ) from error
        _log.info("listening", action="start", address=list(runner.addresses[0][:2]))
        yield
    finally:
        await runner.cleanup()
