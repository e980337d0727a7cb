"""The routing cache in Redis: copies of the route that applications keep. Implements cutover.ports.Cache."""

from __future__ import annotations

from dataclasses import dataclass

import redis.asyncio as redis
import structlog

from mover.core.ids import TenantId
from mover.core.secret import Secret

log = structlog.get_logger()

CHANNEL = "mover.routing"
TIMEOUT_S = 2.0


@dataclass(frozen=True, slots=True)
class RoutingCache:
    """Deletes a tenant's key and tells whoever listens on `mover.routing`.

    The cache is never a reason to fail: a router with a stale route is refused with 25006 and reloads."""

    url: Secret | None
    key: str
    tenant: TenantId

    async def invalidate(self) -> None:
        if self.url is None:
            return
        try:
            async with redis.from_url(self.url.reveal(), socket_timeout=TIMEOUT_S) as client:
                await client.delete(self.key)
                await client.publish(CHANNEL, str(self.tenant))
        except (redis.RedisError, OSError) as error:
            log.warning("the routing cache was not flushed", action="cache", error=type(error).__name__)
