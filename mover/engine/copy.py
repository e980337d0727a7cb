"""Copies the tenant's rows in waves.

A wave holds the applier at a consistent point, copies chunks under that point's snapshot with several
workers, and lets the applier go on, now for the new ranges as well. So at every moment

> the target equals the source at one commit, restricted to the ranges copied so far.

A wave ends after `wave_seconds`, so that no snapshot holds back the source's vacuum for hours. Resuming
after a pause or a crash is just another wave: finished chunks stay, since each was recorded in the
transaction that wrote its rows.

A table whose rows are the tenant's by those of others is copied after these: whether a change of it concerns
the tenant is asked of the target.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass

from mover.core.copying import Chunk, CopiedRanges
from mover.core.crash import reach
from mover.core.errors import first_error
from mover.core.ids import TableRef
from mover.core.migration import Progress
from mover.core.tables import MovedTable, Shape
from mover.engine.follow import Follower
from mover.ports import ApplyTarget, Clock, Copier

Work = tuple[MovedTable, Chunk]


@dataclass
class WaveCopy:
    """Everything that copying needs; `run` returns when every row is on the target."""

    shape: Shape
    copier: Copier
    target: ApplyTarget
    follower: Follower
    progress: Progress
    clock: Clock
    workers: int
    wave_seconds: float
    build_keys: Callable[[list[MovedTable]], Awaitable[None]]
    # Raises when the tables are not those of the shape any more: the rows of one may lack values.
    check_schemas: Callable[[], Awaitable[None]]
    on_chunk: Callable[[int, int], None]

    async def run(self) -> None:
        while remaining := self._remaining(await self.copier.chunks()):
            await self._wave(remaining)

    async def load(self) -> None:
        """Tell the applier which rows are there already, before it starts."""
        chunks = await self._show_copied()
        await self.build_keys([t for t in self.shape.tables if any(c.done for c in chunks.get(t.source, ()))])

    def _remaining(self, chunks: Mapping[TableRef, Sequence[Chunk]]) -> list[Work | MovedTable]:
        """Chunks not yet copied, and tables not yet split into chunks, of tables whose owners are there.

        Where foreign keys are checked, what comes behind a table that has to wait may refer to it."""
        there = {table for table, found in chunks.items() if all(c.done for c in found)}
        remaining: list[Work | MovedTable] = []
        for table in self.shape.tables:
            if any(owner.source not in there for owner in table.owners):
                if self.shape.checks_while_copying:
                    break
                continue
            if table.source not in chunks:
                remaining.append(table)
            remaining += [(table, c) for c in chunks.get(table.source, ()) if not c.done]
        return remaining

    async def _wave(self, remaining: Sequence[Work | MovedTable]) -> None:
        touched: dict[MovedTable, None] = {}
        async with AsyncExitStack() as lifetime, self.follower.hold(lifetime) as point:
            await self.check_schemas()
            started = self.clock.monotonic()
            stages = self._stages(await self._queue(remaining, point.snapshot_id))

            async def work(queue: list[Work]) -> None:
                async with self.copier.worker(point.snapshot_id) as worker:
                    while queue:  # one chunk at least: every wave gets on
                        table, chunk = queue.pop(0)
                        touched[table] = None
                        rows, size = await worker.copy(table, chunk)
                        reach("copy.chunk")
                        self.progress.rows_done += rows
                        self.progress.bytes_done += size
                        self.on_chunk(rows, size)
                        if is_over():
                            return

            def is_over() -> bool:
                return self.clock.monotonic() - started > self.wave_seconds

            for queue in stages:
                with first_error():
                    async with asyncio.TaskGroup() as tasks:
                        for number in range(min(self.workers, max(len(queue), 1))):
                            tasks.create_task(work(queue), name=f"copy worker {number}")
                if is_over():
                    break
            await self._show_copied()
            await lifetime.aclose()  # the source may vacuum again
            # Changes find their rows by key: before they flow, the key must have its index.
            await self.build_keys(list(touched))

    async def _queue(self, remaining: Sequence[Work | MovedTable], snapshot_id: str) -> list[Work]:
        """What this wave may copy: largest tables first, so that no worker idles at the end."""
        work: list[Work] = []
        for part in remaining:
            if isinstance(part, MovedTable):
                chunks = await self.copier.plan_chunks(part, snapshot_id)
                work += [(part, chunk) for chunk in chunks]
            else:
                work.append(part)
        return sorted(work, key=lambda w: (-w[0].estimated_bytes, w[0].source, w[1].number))

    def _stages(self, work: list[Work]) -> list[list[Work]]:
        """What may be copied at the same time: one table where the target checks foreign keys, so that a
        row's parents are there before it."""
        if not self.shape.checks_while_copying:
            return [work]
        tables = [[w for w in work if w[0] is table] for table in self.shape.tables]
        return [stage for stage in tables if stage]

    async def _show_copied(self) -> Mapping[TableRef, Sequence[Chunk]]:
        chunks = await self.copier.chunks()
        self.target.set_copied({table: CopiedRanges.of(found) for table, found in chunks.items()})
        done = [c for found in chunks.values() for c in found if c.done]
        self.progress.rows_done = sum(c.rows for c in done)
        self.progress.bytes_done = sum(c.bytes for c in done)
        return chunks
