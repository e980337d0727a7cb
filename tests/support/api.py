"""The API on a free port, before a real platform database."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from aiohttp import web

from mover.config import Config, Role, Token
from mover.core.ids import TableRef
from mover.core.migration import MigrationRequest, Place
from mover.core.tables import Finding, MovedTable, Plan, Shape
from mover.metrics import Metrics
from mover.postgres.store import Store
from mover.web.app import make_app
from tests.support.queue import CORE_URL, ESTATE_URL

TOKENS = {role: f"planted-{role}" for role in Role}
TABLE = MovedTable(
    TableRef("core_dms", "documents"), TableRef("realestate_dms", "documents"), (), ("id",), "tenant_id", 12
)
PLAN = Plan(
    Shape({"core_dms": "realestate_dms"}, (TABLE,)),
    (Finding("no_tenant_column", "which and why", "what to do", TableRef("core_dms", "logs")),),
    {"core_dms.documents": "tenant", "core_dms.logs": "refused"},
    {"source_version": 160004},
)


@dataclass(frozen=True)
class Running:
    url: str
    store: Store
    metrics: Metrics


def config_for(platform_url: str) -> Config:
    tokens = [
        {"name": f"the {role}", "role": role, "sha256": hashlib.sha256(token.encode()).hexdigest()}
        for role, token in TOKENS.items()
    ]
    return Config.model_validate(
        {
            "platform": {"database_url": platform_url},
            "api": {"listen": "127.0.0.1:0", "tokens": tokens},
            "tenancy": {"services": ["dms"]},
            "verticals": {
                "core": {"database_url": CORE_URL.reveal()},
                "realestate": {"database_url": ESTATE_URL.reveal()},
                "health": {},
            },
        }
    )


async def planner(request: MigrationRequest, source: Place, target: Place) -> Plan:
    return PLAN


@asynccontextmanager
async def api_on(store: Store, config: Config) -> AsyncIterator[Running]:
    metrics = Metrics()
    tokens: tuple[Token, ...] = config.api.tokens
    app = make_app(store, planner, config.place, tokens, metrics, poll_seconds=0.02)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        host, port = runner.addresses[0][:2]
        yield Running(f"http://{host}:{port}", store, metrics)
    finally:
        await runner.cleanup()
