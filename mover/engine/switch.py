"""What the engine adds to a cutover: where it is decided, and that it is never left half done."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field

import structlog

from cutover.protocol import Report
from mover.core.errors import MoverError
from mover.core.migration import Claim, Place
from mover.ports import Clock, MoveStore

log = structlog.get_logger()

# For a cutover that is being undone or finished when the daemon is told to stop.
CANCEL_PATIENCE_S = 5.0
# Between two lines of the log that tell of a fence that is held.
ALARM_INTERVAL_S = 10.0


@dataclass(frozen=True, slots=True)
class RouteDecision:
    """Implements cutover.ports.Decision on the platform database."""

    store: MoveStore
    claim: Claim
    source: Place
    target: Place

    async def switch(self, evidence: Mapping[str, object]) -> None:
        await self.store.decide(self.claim, self.source, self.target, evidence)

    async def is_switched(self) -> bool:
        return await self.store.is_switched(self.claim)


@dataclass(frozen=True, slots=True)
class ReturnDecision:
    """The same for the way back of that migration."""

    store: MoveStore
    claim: Claim
    source: Place
    target: Place

    async def switch(self, evidence: Mapping[str, object]) -> None:
        await self.store.decide_return(self.claim, self.source, self.target, evidence)

    async def is_switched(self) -> bool:
        return await self.store.is_returned(self.claim)


async def to_the_end(work: Coroutine[None, None, Report]) -> Report:
    """A cancellation waits for a cutover that has begun: it ends or undoes itself within its budget."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task], timeout=CANCEL_PATIENCE_S)
        task.cancel()  # then the next owner settles it
        await asyncio.wait([task], timeout=CANCEL_PATIENCE_S / 5)
        if task.done() and not task.cancelled():
            task.exception()  # seen: what was undone has said why in the journal
        raise


@dataclass
class FenceAlarm:
    """Tells that a fence is held, where nobody can be told by the platform database: it does not answer."""

    clock: Clock
    show: Callable[[float], None]
    _since: float = field(init=False)
    _told_at: float = field(init=False)

    def __post_init__(self) -> None:
        self._since = self._told_at = self.clock.monotonic()

    def still(self, why: MoverError) -> None:
        now = self.clock.monotonic()
        self.show(now - self._since)
        if now - self._told_at >= ALARM_INTERVAL_S:
            self._told_at = now
            log.error(
                "the fence is held", action="fence_held", seconds=round(now - self._since), error=str(why)
            )

    def over(self) -> None:
        self.show(0.0)
