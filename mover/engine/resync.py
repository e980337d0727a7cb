"""What was to come from the source is lost: its slot, its WAL, or the server itself, for which a standby or a
backup stands now. The two sides are compared at consistent points, and only what differs is copied anew.

> Of what was there, only what was equal at a point counts as there, and is followed from that point on.

What is missing then is an ordinary wave's. A crash in the middle begins it again: the note that something was
lost goes last.
"""

from __future__ import annotations

from collections.abc import Collection
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from itertools import takewhile

from mover.core.alignment import START_AGAIN, with_owned
from mover.core.copying import Chunk, CopiedRanges
from mover.core.crash import reach
from mover.core.errors import CannotResynchronise, Where
from mover.core.ids import Side, TableRef, TenantId
from mover.core.tables import MovedTable
from mover.engine.flow import Flow
from mover.engine.site import Say
from mover.ports import Clock
from verify.compare import differing
from verify.leaves import KeyRange

# Between two looks at the clock; each is some 24 MB on either side.
CHUNKS_AT_ONCE = 8

Held = tuple[MovedTable, Chunk]


@dataclass
class Resync:
    """Of one flow, whose follower has begun anew and holds nothing to be there yet."""

    flow: Flow
    tenant: TenantId
    clock: Clock
    wave_seconds: float
    say: Say
    _there: dict[TableRef, list[Chunk]] = field(default_factory=dict)

    async def run(self, *, everything: bool) -> None:
        """Until each range that was copied is equal, or gone. `everything`: all of the tenant's rows are held
        to be there, also where nothing was copied."""
        held: list[Held] | None = None
        while held is None or held:
            async with AsyncExitStack() as lifetime, self.flow.follower.hold(lifetime) as point:
                await self.flow.check_schemas()
                if held is None:
                    held = await self._held(point.snapshot_id, everything)
                differ = await self._compare(held, point.snapshot_id)
                await lifetime.aclose()  # the source may vacuum again
                reach("resync.compared")
                await self._take_back(differ, held)
                copied = {table: CopiedRanges.of(chunks) for table, chunks in self._there.items()}
                self.flow.link.target.set_copied(copied)

    async def _held(self, snapshot_id: str, everything: bool) -> list[Held]:
        """What is held to be there, owners before what they own."""
        copier = self.flow.link.copier
        recorded = await copier.chunks()
        held: list[Held] = []
        for table in self.flow.shape.tables:
            chunks = recorded.get(table.source, ())
            if everything and not chunks:
                chunks = await copier.plan_chunks(table, snapshot_id, done=True)
            held += [(table, chunk) for chunk in chunks if chunk.done]
        return held

    async def _compare(self, held: list[Held], snapshot_id: str) -> list[Held]:
        """Takes from `held` what a wave has time to compare; which of it differ."""
        until_s = self.clock.monotonic() + self.wave_seconds
        link, differ = self.flow.link, list[Held]()
        async with (
            link.target_readers.at_snapshot(self.tenant) as target,
            link.source_readers.at_snapshot(self.tenant, snapshot_id) as source,
        ):
            while held:  # some at least: every wave gets on
                table, some = _next(held)
                ranges = {KeyRange(chunk.lo, chunk.hi): chunk for chunk in some}
                found = await differing(table, list(ranges), source, target, self.flow.verification.on_rows)
                differ += [(table, ranges[part]) for part in found]
                equal = [chunk for part, chunk in ranges.items() if part not in found]
                self._there.setdefault(table.source, []).extend(equal)
                if self.clock.monotonic() >= until_s:
                    break
        return differ

    async def _take_back(self, differ: Collection[Held], held: list[Held]) -> None:
        """Whose a row is, is asked of its owners: with these goes all that they own."""
        shape = self.flow.shape
        if not differ:
            return
        if Side.TARGET in shape.careful:
            raise CannotResynchronise(
                f"{_named(differ)} would have to be copied anew in part, while foreign keys and triggers are"
                " in force there",
                where=Where(self.tenant),
                hint=START_AGAIN,
            )
        whole = with_owned({t.source for t, _ in differ if t.owners or t.referenced}, shape)
        if whole:
            await self.flow.site.forget_copies(shape, whole, self.say)
            held[:] = [(table, chunk) for table, chunk in held if table.source not in whole]
            for gone in whole:
                self._there.pop(gone, None)
        parts = [(table, chunk) for table, chunk in differ if table.source not in whole]
        for table, chunk in parts:
            await self.flow.link.copier.take_back(table, chunk)
            reach("resync.taken_back")
        await self.say(f"differs, and is copied anew: {_named(differ)}")


def _next(held: list[Held]) -> tuple[MovedTable, list[Chunk]]:
    """Takes some chunks of one table."""
    table = held[0][0]
    some = [chunk for _, chunk in takewhile(lambda one: one[0] is table, held[:CHUNKS_AT_ONCE])]
    del held[: len(some)]
    return table, some


def _named(differ: Collection[Held]) -> str:
    """The tables, with how many ranges of each."""
    counts: dict[TableRef, int] = {}
    for table, _ in differ:
        counts[table.source] = counts.get(table.source, 0) + 1
    return ", ".join(f"{table} ({count} of its ranges)" for table, count in sorted(counts.items()))
