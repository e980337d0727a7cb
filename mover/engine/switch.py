"""What the engine adds to a cutover: where it is decided, and that it is never left half done."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass

from cutover.protocol import Report
from mover.core.migration import Claim, Place
from mover.ports import MoveStore

# For a cutover that is being undone or finished when the daemon is told to stop.
CANCEL_PATIENCE_S = 5.0


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
