"""A small seeded platform on a test server: the demo's schemas and tenants, and the routes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import psycopg

from mover.core.secret import Secret
from mover.demo.seed import Tenant, demo_tenants, prepare_database, seed_organizations, seed_services
from mover.demo.servers import Cluster

APP_PASSWORD = "only for tests"


@dataclass(frozen=True)
class Platform:
    """One database with services, tenants and `auth.organizations`."""

    server: Cluster
    url: str  # as superuser
    tenants: Sequence[Tenant]  # the large one first

    @property
    def app_url(self) -> Secret:
        """As the application's role, on this platform's database."""
        return Secret(self.server.url(self.url.rpartition("/")[2], "app", APP_PASSWORD))


def seed_database(
    url: str, tenants: Sequence[Tenant], vertical: str = "core", first_key: int = 0, routes: bool = True
) -> None:
    """Role, reference table, both services with the tenants' rows, and the routes to them."""
    with psycopg.connect(url, autocommit=True) as conn:
        prepare_database(conn, APP_PASSWORD)
        if routes:
            seed_organizations(conn, tenants, vertical)
        seed_services(conn, vertical, tenants, first_key=first_key)


def prepare_empty(url: str) -> None:
    """A target as an operator hands it over: role and reference table, no service's schema."""
    with psycopg.connect(url, autocommit=True) as conn:
        prepare_database(conn, APP_PASSWORD)


def small_tenants(count: int = 4, rows: int = 1000) -> list[Tenant]:
    return demo_tenants(large_rows=rows, others_rows=rows, count=count)
