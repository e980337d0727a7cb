"""The composition root: configuration -> adapters -> API, until a signal comes."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiohttp import web

from mover.config import Config
from mover.core.errors import MoverError
from mover.core.migration import MigrationRequest, Place
from mover.core.tables import Plan
from mover.log import logger
from mover.metrics import Metrics
from mover.postgres.store import open_store
from mover.web.app import make_app

SHUTDOWN_SECONDS = 2  # requests that are being answered; the whole exit may take 10
_log = logger(__name__)


async def serve(config: Config) -> None:
    """Run the daemon until SIGTERM or SIGINT."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    metrics = Metrics()
    async with open_store(
        config.platform.database_url,
        config.routing.organizations_table,
        config.configured_url,
        decision_seconds=config.engine.pause_budget_ms / 1000,
    ) as store:
        app = make_app(store, plan, config.place, config.api.tokens, metrics)
        async with listening(app, config):
            await stop.wait()
    _log.info("stopped", action="stop")


async def plan(request: MigrationRequest, source: Place, target: Place) -> Plan:
    """Preflight for a dry run."""
    raise MoverError("this daemon has no engine")


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
