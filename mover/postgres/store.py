"""The platform database behind both of its ports: `MoveStore` for the engine, `Desk` for the API."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from mover.core.ids import TableRef
from mover.core.secret import Secret
from mover.postgres.desk import DeskStore
from mover.postgres.platform import check_platform
from mover.postgres.platform_pool import PlatformPool
from mover.postgres.queue import ClaimStore, ConfiguredUrl


class Store(ClaimStore, DeskStore):
    """`configured_url` says which database the configuration alone yields for a place: such a URL is
    not stored in the route. A decision takes at most `decision_seconds`, since writers wait for it."""

    def __init__(
        self,
        pool: PlatformPool,
        organizations: TableRef,
        configured_url: ConfiguredUrl,
        decision_seconds: float,
    ) -> None:
        ClaimStore.__init__(self, pool, organizations, configured_url, decision_seconds)
        DeskStore.__init__(self, pool, organizations)


@asynccontextmanager
async def open_store(
    url: Secret,
    organizations: TableRef,
    configured_url: ConfiguredUrl,
    *,
    decision_seconds: float = 1,
    answer_seconds: float = 10,
) -> AsyncIterator[Store]:
    """Raises Unreachable, or Refused when `mover init` has to run first."""
    # One plain connection first: a pool retries in the background and would hide a wrong password.
    await check_platform(url)
    pool = PlatformPool(url, answer_seconds)
    await pool.open()
    try:
        yield Store(pool, organizations, configured_url, decision_seconds)
    finally:
        await pool.close()
