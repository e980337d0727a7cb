"""The application's side of a cutover: run a transaction where the tenant lives, and again where it
lives now when it has moved meanwhile. Knows no driver: an error tells by its `sqlstate`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from mover.core.ids import TenantId, Tier
from mover.core.secret import Secret
from mover.ports import Clock

HAS_MOVED = "25006"  # read_only_sql_transaction: the tenant has left this place
TRY_AGAIN = frozenset({"40001", "40P01"})  # nothing was committed, and the place may well be right

Session = TypeVar("Session")
SessionIn = TypeVar("SessionIn", contravariant=True)
SessionOut = TypeVar("SessionOut", covariant=True)
Result = TypeVar("Result", covariant=True)


@dataclass(frozen=True, slots=True)
class Route:
    """Where a tenant lives. `database_url` None means: by tier and vertical."""

    vertical: str
    tier: Tier
    database_url: Secret | None = None


class Places(Protocol[SessionOut]):
    """What the router needs of the application's driver."""

    async def load_route(self, tenant: TenantId) -> Route:
        """Read the route from where it is written; raises when there is no such tenant."""
        ...

    def transaction(self, route: Route) -> AbstractAsyncContextManager[SessionOut]:
        """Lend a connection for one transaction, which is committed when the block has ended, and rolled
        back when the block raises. The commit's error too must leave with its `sqlstate`."""
        ...


class Work(Protocol[SessionIn, Result]):
    """One transaction's statements; called again from the start after a refusal."""

    def __call__(self, session: SessionIn, /) -> Awaitable[Result]: ...


@dataclass(frozen=True, slots=True)
class Patience:
    """How a router caches and retries."""

    cache_s: float = 30.0  # bounds how long reads can go to a place that was left unnoticed
    first_delay_s: float = 0.005
    longest_delay_s: float = 0.5
    give_up_s: float = 60.0  # longer than a take-over of the mover, within which 40001 is the answer

    def delay_s(self, retry: int) -> float:
        return min(self.longest_delay_s, self.first_delay_s * 2.0 ** min(retry, 16))


class EventLoopClock:
    """The running event loop's time."""

    def monotonic(self) -> float:
        return asyncio.get_running_loop().time()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


@dataclass
class _Entry:
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)  # one load of a route at a time
    route: Route | None = None
    loaded_at: float = 0.0
    invalidations: int = 0


class Router(Generic[Session]):
    """Cached routes, invalidation and retry for Python applications.

    Only transactions that certainly were not committed are run again. A connection that breaks is
    the caller's to handle, as without a router: nobody can know what became of its transaction.
    """

    def __init__(
        self, places: Places[Session], patience: Patience | None = None, clock: Clock | None = None
    ) -> None:
        self._places = places
        self._patience = patience or Patience()
        self._clock: Clock = clock or EventLoopClock()
        self._entries: dict[TenantId, _Entry] = {}

    async def run(self, tenant: TenantId, work: Work[Session, Result]) -> Result:
        """What `work` returned in the transaction that was committed.

        Raises the last refusal when the tenant's place cannot be settled in time."""
        deadline = self._clock.monotonic() + self._patience.give_up_s
        retry = 0
        while True:
            route = await self.route(tenant)
            try:
                async with self._places.transaction(route) as session:
                    return await work(session)
            except Exception as error:
                if not _is_refusal(error) or self._clock.monotonic() >= deadline:
                    raise
                moved = _sqlstate(error) == HAS_MOVED
            if moved:
                self.invalidate(tenant, refused=route)
            if not moved or await self.route(tenant) == route:
                # The new route may take a moment to be seen, and a dead mover to be replaced.
                await self._clock.sleep(self._patience.delay_s(retry))
                retry += 1

    async def route(self, tenant: TenantId) -> Route:
        """From the cache; else loaded, once for all who ask at the same time."""
        entry = self._entries.setdefault(tenant, _Entry())
        cached = self._cached(entry)
        if cached is not None:
            return cached
        async with entry.lock:
            cached = self._cached(entry)
            return cached if cached is not None else await self._load(tenant, entry)

    def invalidate(self, tenant: TenantId, refused: Route | None = None) -> None:
        """Forget the tenant's route; with `refused` only while it is still that one, so that many
        refusals of one move cause one load."""
        entry = self._entries.get(tenant)
        if entry is None or (refused is not None and entry.route != refused):
            return
        entry.route = None
        entry.invalidations += 1

    def invalidate_all(self) -> None:
        for tenant in self._entries:
            self.invalidate(tenant)

    async def follow(self, moved: AsyncIterator[TenantId | None]) -> None:
        """Invalidate the tenants that are announced; None says that announcements may have been
        missed. Returns when they end; meant for a task of its own."""
        async for tenant in moved:
            if tenant is None:
                self.invalidate_all()
            else:
                self.invalidate(tenant)

    def _cached(self, entry: _Entry) -> Route | None:
        expired = self._clock.monotonic() - entry.loaded_at > self._patience.cache_s
        return None if expired else entry.route

    async def _load(self, tenant: TenantId, entry: _Entry) -> Route:
        invalidations, loaded_at = entry.invalidations, self._clock.monotonic()
        route = await self._places.load_route(tenant)
        if entry.invalidations == invalidations:  # else it may have been read before the change
            entry.route, entry.loaded_at = route, loaded_at
        return route


def _sqlstate(error: Exception) -> str | None:
    """psycopg's and asyncpg's errors carry it."""
    return getattr(error, "sqlstate", None)


def _is_refusal(error: Exception) -> bool:
    state = _sqlstate(error)
    return state == HAS_MOVED or state in TRY_AGAIN
