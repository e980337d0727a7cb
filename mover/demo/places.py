"""How the demo's application reaches its databases with psycopg: connections by route, and the two
ways of following a tenant that moves, through `Router` and by hand.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import psycopg
from psycopg.pq import TransactionStatus

from cutover.router import HAS_MOVED, TRY_AGAIN, Route
from mover.core.ids import TenantId, Tier
from mover.core.secret import Secret

Connection = psycopg.AsyncConnection[tuple[Any, ...]]
Result = TypeVar("Result")
CORE = "core"
CONNECT_TIMEOUT_S = 10
RETRY_DELAY_S = 0.02
GIVE_UP_S = 60.0


class UnknownTenant(Exception):
    """There is no route for this tenant."""


@dataclass(frozen=True, slots=True)
class Session:
    """A connection to a place where a tenant lives, or lived."""

    conn: Connection
    route: Route


class PsycopgPlaces:
    """`cutover.router.Places` on psycopg; keeps idle connections.

    `urls` are the application's own, by vertical; `platform` is where the routes are.
    """

    def __init__(self, platform: Secret, urls: Mapping[str, Secret]) -> None:
        self._platform = platform
        self._urls = urls
        self._idle: defaultdict[Secret, list[Connection]] = defaultdict(list)

    async def load_route(self, tenant: TenantId) -> Route:
        async with self._connection(self._platform) as conn:
            cursor = await conn.execute(
                "select vertical, isolation_tier, database_url from auth.organizations where id = %s",
                (tenant,),
            )
            row = await cursor.fetchone()
        if row is None:
            raise UnknownTenant(str(tenant))
        vertical, tier, url = row
        return Route(vertical, Tier(tier), Secret(url) if url else None)

    @asynccontextmanager
    async def transaction(self, route: Route) -> AsyncIterator[Session]:
        """In autocommit: a single statement is a transaction; for more, open `conn.transaction()`."""
        async with self._connection(self._url(route)) as conn:
            yield Session(conn, route)

    async def warm(self, connections: int) -> None:
        """Open connections to every place that answers, as pools with a minimum size do."""
        for url in {self._platform, *self._urls.values()}:
            with contextlib.suppress(psycopg.OperationalError):
                while len(self._idle[url]) < connections:
                    self._idle[url].append(await _connect(url))

    async def close(self) -> None:
        for connections in self._idle.values():
            while connections:
                await connections.pop().close()

    def _url(self, route: Route) -> Secret:
        if route.database_url is not None:
            return route.database_url
        return self._urls[CORE if route.tier is Tier.SCHEMA else route.vertical]

    @asynccontextmanager
    async def _connection(self, url: Secret) -> AsyncIterator[Connection]:
        idle = self._idle[url]
        conn = idle.pop() if idle else await _connect(url)
        try:
            yield conn
        finally:
            if conn.info.transaction_status is TransactionStatus.IDLE:
                idle.append(conn)
            else:
                await conn.close()


async def _connect(url: Secret) -> Connection:
    return await psycopg.AsyncConnection.connect(
        url.reveal(), autocommit=True, application_name="demo writer", connect_timeout=CONNECT_TIMEOUT_S
    )


class ByHand:
    """The three lines of the contract, as an application without a router would write them."""

    def __init__(self, places: PsycopgPlaces) -> None:
        self._places = places
        self._routes: dict[TenantId, Route] = {}

    async def run(self, tenant: TenantId, work: Callable[[Session], Awaitable[Result]]) -> Result:
        deadline = asyncio.get_running_loop().time() + GIVE_UP_S
        while True:
            if tenant not in self._routes:
                self._routes[tenant] = await self._places.load_route(tenant)
            try:
                async with self._places.transaction(self._routes[tenant]) as session:
                    return await work(session)
            except psycopg.Error as error:
                moved, passing = error.sqlstate == HAS_MOVED, error.sqlstate in TRY_AGAIN
                if not (moved or passing) or asyncio.get_running_loop().time() > deadline:
                    raise
            if moved:
                refused = self._routes.pop(tenant)
                self._routes[tenant] = await self._places.load_route(tenant)
                passing = self._routes[tenant] == refused
            if passing:
                await asyncio.sleep(RETRY_DELAY_S)
