"""Keeps the target at the source by what triggers write down there: which rows changed, not how.

> Each step takes the target from the source at one snapshot to the source at a later one, exactly, whatever
> long transactions run beside it.

The rows that are written down between the two snapshots are read again under the later one.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field

from mover.core.crash import reach
from mover.core.errors import broken_off
from mover.core.ids import Lsn, new_mark
from mover.core.migration import Progress
from mover.core.snapshot import Snapshot
from mover.ports import ApplyTarget, ChangeLog, ConsistentPoint, LoggedPoint

# Between two looks: a look at nothing new costs the source four small queries.
INTERVAL_S = 0.05
FORGET_INTERVAL_S = 1.0  # each time costs the source a commit


@dataclass
class LogFollower:
    """Implements engine.follow.Follower."""

    log: ChangeLog
    target: ApplyTarget
    progress: Progress
    on_applied: Callable[[Mapping[str, int]], None] = lambda kinds: None
    _snapshot: Snapshot | None = None  # what the target is; None: nothing is copied
    _durable: Snapshot | None = None  # the same as the target has stored it
    _reached: Lsn = field(default=Lsn(0))
    _turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    _in_doubt: bool = False  # whether the target has committed the last step, nobody has told
    _ended: Exception | None = None
    _forgotten: Snapshot | None = None
    _next_at: float = 0.0  # on the event loop's clock, if nobody asks before
    _forget_at: float = 0.0

    async def start(self) -> None:
        await self._ask_the_target()
        self._ended = None

    async def _ask_the_target(self) -> None:
        self._reached, self._snapshot = await self.target.progress()
        self._durable, self._in_doubt = self._snapshot, False

    async def run(self) -> None:
        clock = asyncio.get_running_loop().time
        while True:
            await asyncio.sleep(max(0.0, self._next_at - clock()))
            async with self._turn:
                # Under the fence nothing comes after the last step: the next one would only be in the way.
                if clock() < self._next_at:
                    continue
                began = clock()
                await self._step()
            if clock() >= self._forget_at:
                await self._forget(took_s=clock() - began)

    async def reached(self, mark: str) -> None:
        """A snapshot that is taken now sees everything that committed before the mark."""
        await self.catch_up_once()

    async def catch_up_once(self) -> None:
        async with self._turn:
            await self._step()

    async def lag_bytes(self) -> int:
        return max(0, await self.log.wal_lsn() - self._reached)

    @asynccontextmanager
    async def hold(self, lifetime: AsyncExitStack) -> AsyncIterator[ConsistentPoint]:
        async with self._turn:
            await self._step()  # so that little is left
            point = await lifetime.enter_async_context(self.log.consistent_point())
            await self._settle(point)
            try:
                yield point
            except BaseException as error:
                # What the holder has put on the target is not known here: apply nothing any more.
                self._ended = broken_off(error)
                raise

    @asynccontextmanager
    async def paused(self) -> AsyncIterator[None]:
        async with self._turn:
            yield

    async def close(self) -> None:
        pass

    async def _step(self) -> None:
        if self._ended is not None:
            raise self._ended
        if self._in_doubt:  # a cutover that gave up, for one, ends whatever it waits for
            await self._ask_the_target()
        if self._snapshot is not None:
            async with self.log.next_point() as point:
                await self._settle(point)
        self._next_at = asyncio.get_running_loop().time() + INTERVAL_S

    async def _settle(self, point: LoggedPoint) -> None:
        """One target transaction, from the snapshot that it stands at to the point's."""
        reached = await self.log.wal_lsn()
        done: Mapping[str, int] = {}
        if self._snapshot is not None:
            changes = await point.changes_since(self._snapshot)
            if changes.is_empty:
                self._snapshot, self._reached = point.snapshot, reached
                return
        # What the source may lose in a crash must not be on the target.
        await self.log.mark(new_mark())
        self._in_doubt = True
        async with self.target.transaction() as transaction:
            if self._snapshot is not None:
                done = await transaction.settle(changes, point)
            await transaction.advance(reached, point.snapshot)
            reach("follow.written")
        self._in_doubt = False
        reach("follow.applied")
        self.progress.changes_applied += sum(done.values())
        self.on_applied(done)
        self._snapshot = self._durable = point.snapshot
        self._reached = reached

    async def _forget(self, took_s: float) -> None:
        """A little at a time, so that whoever waits for a turn need not wait for all of it; and no longer
        than the step took, so that steps go on."""
        clock = asyncio.get_running_loop().time
        until = clock() + max(took_s, INTERVAL_S)
        while clock() < until:
            async with self._turn:
                durable = self._durable
                if durable is None or durable is self._forgotten or not await self.log.forget(durable):
                    self._forgotten, self._forget_at = durable, clock() + FORGET_INTERVAL_S
                    break
        await self.log.make_room()
