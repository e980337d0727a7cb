"""A platform database with an empty queue and a routing table, for tests of the store and the API."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from uuid import uuid4

import psycopg
from psycopg import sql

from mover.core.ids import TableRef, TenantId, Tier
from mover.core.migration import MigrationRequest, Place
from mover.core.secret import Secret
from mover.demo.servers import PASSWORD_GROUP, Cluster
from mover.postgres.platform import initialise
from mover.postgres.store import Store, open_store

ORGANIZATIONS = TableRef("auth", "organizations")
CORE_URL = Secret("postgresql://app:planted-core@core.example/core")
ESTATE_URL = Secret("postgresql://app:planted-estate@estate.example/estate")
CORE = Place("core", Tier.SCHEMA, CORE_URL, ("core_dms",))
ESTATE = Place("realestate", Tier.DATABASE, ESTATE_URL, ("realestate_dms",))


def configured_url(tenant: TenantId, vertical: str, tier: Tier) -> Secret | None:
    """As the configuration would say: a dedicated database is known to the route alone."""
    urls = {(Tier.SCHEMA, vertical): CORE_URL, (Tier.DATABASE, "realestate"): ESTATE_URL}
    return urls.get((tier, vertical))


async def platform_database(url: str) -> None:
    await initialise(Secret(url), organizations=ORGANIZATIONS)


async def add_tenant(url: str, place: Place = CORE) -> TenantId:
    tenant = uuid4()
    async with await psycopg.AsyncConnection.connect(url) as conn:
        await conn.execute(
            "insert into auth.organizations (id, name, vertical, isolation_tier) values (%s, %s, %s, %s)",
            (tenant, "Acme", place.vertical, place.tier.value),
        )
    return TenantId(tenant)


def to_estate(tenant: TenantId, priority: int = 0) -> MigrationRequest:
    return MigrationRequest(tenant, ESTATE.vertical, ESTATE.tier, priority=priority, requested_by="ops")


@asynccontextmanager
async def store_on(url: str) -> AsyncIterator[Store]:
    """A store as a daemon of its own would have it."""
    async with open_store(Secret(url), ORGANIZATIONS, configured_url) as store:
        yield store


@contextmanager
def role_with_password(server: Cluster) -> Iterator[str]:
    """A role whom the server asks for its password, which is `right`."""
    group, role = sql.Identifier(PASSWORD_GROUP), f"role_{uuid4().hex[:8]}"
    name = sql.Identifier(role)
    with psycopg.connect(server.url(), autocommit=True) as conn:
        if not conn.execute("select from pg_roles where rolname = %s", (PASSWORD_GROUP,)).fetchall():
            conn.execute(sql.SQL("create role {}").format(group))
        conn.execute(sql.SQL("create role {} login password 'right' in role {}").format(name, group))
        yield role
        conn.execute(sql.SQL("drop role {}").format(name))
