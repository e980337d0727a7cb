"""Scenes: databases cloned from templates that are seeded once, on two servers of different versions."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from pathlib import Path

import psycopg
import pytest

from mover.core.ids import Capture
from mover.core.secret import Secret
from mover.demo.seed import Tenant, demo_tenants, prepare_database, seed_organizations, seed_services
from mover.demo.servers import Cluster, PostgresServer, RedisServer
from mover.postgres.platform import initialise
from tests.conftest import MakeDatabase
from tests.support.acceptance import CORE, ESTATE, Home, Scene
from tests.support.generated_move import Servers
from tests.support.platform import APP_PASSWORD, prepare_empty, seed_database

MakeScene = Callable[..., Scene]
Templates = dict[tuple[str, str], str]
ROWS = 5000
# Of the tenants that live in the shared target.
NEIGHBOURS_ROWS, NEIGHBOURS_FIRST_KEY = 500, 1_000_000


def core_tenants(rows: int = ROWS) -> list[Tenant]:
    return demo_tenants(large_rows=rows, others_rows=rows, count=4)


def neighbours() -> list[Tenant]:
    """With ordinals of their own: keys are never the same as those of core's tenants."""
    tenants = demo_tenants(large_rows=NEIGHBOURS_ROWS, others_rows=NEIGHBOURS_ROWS, count=3, seed=2)
    return [replace(tenant, ordinal=tenant.ordinal + 20) for tenant in tenants]


@pytest.fixture
def spare_server() -> Iterator[Cluster]:
    """To be named before `make_scene`, so that it outlives the databases on it."""
    with PostgresServer(16, fsync=False) as server:
        yield server


@pytest.fixture(scope="session")
def between() -> Callable[[Cluster, Cluster], AbstractAsyncContextManager[Servers]]:
    """`between(source, target)`: databases for generated moves, the same ones for every test."""
    made: dict[tuple[str, str], str] = {}

    def url(server: Cluster, name: str) -> str:
        if (server.url(), name) not in made:
            made[server.url(), name] = server.create_database(name)
        return made[server.url(), name]

    def opened(source: Cluster, target: Cluster) -> AbstractAsyncContextManager[Servers]:
        urls = url(source, "generated"), url(target, "generated_target"), url(target, "generated_platform")
        return Servers.between(source, target, *urls)

    return opened


@pytest.fixture(scope="session")
def templates() -> Iterator[Templates]:
    yield {}


@pytest.fixture
def make_scene(
    make_database: MakeDatabase, templates: Templates, redis_server: RedisServer, tmp_path: Path
) -> Iterator[MakeScene]:
    """`make_scene(source, target)`: core with its tenants, and the vertical's database, empty or not."""

    def clone(server: Cluster, kind: str, fill: Callable[[str], None]) -> str:
        if (server.url(), kind) not in templates:
            name = f"template_{kind}"
            fill(server.create_database(name))
            templates[server.url(), kind] = name
        return make_database(server, templates[server.url(), kind])

    def make(
        source: Cluster,
        target: Cluster,
        *,
        shared: bool = False,
        rows: int = ROWS,
        first_key: int = NEIGHBOURS_FIRST_KEY,
        platform: Cluster | None = None,
        capture: Capture = Capture.WAL,
    ) -> Scene:
        tenants = core_tenants(rows)
        core = Home(
            source, clone(source, f"core_{rows}", lambda url: seed_core(url, tenants)), CORE, "schema"
        )
        estate = clone(target, "empty", prepare_empty)
        if shared:
            estate = clone(target, f"estate_{first_key}", lambda url: seed_estate(url, first_key))
        of_platform = platform or source
        store = Home(
            of_platform, clone(of_platform, f"platform_{rows}", lambda url: seed_platform(url, tenants)), ""
        )
        homes = {CORE: core, ESTATE: Home(target, estate, ESTATE)}
        scenes.append(Scene(tmp_path, store, homes, tenants, redis_server.url, capture))
        return scenes[-1]

    scenes: list[Scene] = []
    yield make
    for scene in scenes:
        scene.close()


def seed_core(url: str, tenants: list[Tenant]) -> None:
    seed_database(url, tenants, CORE, routes=False)


def seed_estate(url: str, first_key: int) -> None:
    with psycopg.connect(url, autocommit=True) as conn:
        prepare_database(conn, APP_PASSWORD)
        seed_services(conn, ESTATE, neighbours(), seed=2, first_key=first_key)


def seed_platform(url: str, tenants: list[Tenant]) -> None:
    with psycopg.connect(url, autocommit=True) as conn:
        prepare_database(conn, APP_PASSWORD)
        seed_organizations(conn, tenants, CORE)
        seed_organizations(conn, neighbours(), ESTATE)
        conn.execute(
            "update auth.organizations set isolation_tier = 'database' where vertical = %s", (ESTATE,)
        )
    with ThreadPoolExecutor(1) as aside:  # the test's own loop is running
        aside.submit(lambda: asyncio.run(initialise(Secret(url)))).result()
