"""When what is compared: the engine's use of the `verify` package.

Online, both sides are compared at a consistent point while the tenant keeps writing: every row the
first time, then only the rows changed since the pass before, until few enough are left to be compared
under the fence. After the switch every row is compared once more, in the snapshots taken under the
fence: the changed rows are known from the stream itself, so only that comparison is independent of it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

from mover.core.copying import Key
from mover.core.errors import CutoverAborted, VerificationFailed, Where, first_error
from mover.core.ids import TableRef, TenantId
from mover.core.tables import MovedTable
from mover.engine.follow import Follower
from mover.engine.site import SnapshotReaders
from mover.ports import ApplyTarget
from verify.compare import compare, compare_keys
from verify.ports import DigestReader
from verify.report import Verdict

# Compared within some ten milliseconds under the fence.
MAX_ROWS_UNDER_FENCE = 2_000
Dirty = Mapping[TableRef, frozenset[Key]]


@dataclass
class Verification:
    """Knows the last clean pass. Implements cutover.ports.Proof."""

    tenant: TenantId
    tables: Sequence[MovedTable]
    follower: Follower
    target: ApplyTarget
    source_readers: SnapshotReaders
    target_readers: SnapshotReaders
    on_rows: Callable[[int], None]
    on_mismatch: Callable[[int], None]  # hears how many rows differ
    # Raises when the source's schemas are not those of `tables` any more.
    check_schemas: Callable[[], Coroutine[None, None, None]]
    hint: str  # for whoever hears that they differ
    passes: int = 0
    _final: AsyncExitStack = field(default_factory=AsyncExitStack)
    _final_readers: tuple[DigestReader, DigestReader] | None = None

    async def until_small(self) -> None:
        """Passes until the rest fits under the fence. Raises VerificationFailed."""
        while not self.fits_under_fence():
            await self.one_pass()

    def fits_under_fence(self) -> bool:
        """Whether there was a clean pass, and few rows have changed since it began."""
        dirty = self.target.dirty()
        return self.passes > 0 and dirty is not None and _count(dirty) <= MAX_ROWS_UNDER_FENCE

    async def one_pass(self) -> None:
        """Compare at a consistent point: everything the first time, or when too much has changed to be
        remembered; otherwise what changed since the last pass."""
        async with AsyncExitStack() as lifetime:
            async with self.follower.hold(lifetime) as point:
                target = await lifetime.enter_async_context(self.target_readers.at_snapshot(self.tenant))
                dirty = self.target.dirty() if self.passes else None
                self.target.collect_dirty()
            source = await lifetime.enter_async_context(
                self.source_readers.at_snapshot(self.tenant, point.snapshot_id)
            )
            if dirty is None:
                await self._must_be_equal(await compare(self.tables, source, target, progress=self.on_rows))
            else:
                await self._must_be_equal(await compare_keys(self._by_table(dirty), source, target))
            self.passes += 1

    async def get_ready(self) -> None:
        await self.close()

    async def changed_rows_equal(self) -> Mapping[str, object]:
        """Under the fence; opens the snapshots that `complete` compares afterwards."""
        dirty = self.target.dirty()
        if dirty is None:
            raise CutoverAborted("too many rows have changed to be compared under the fence")
        with first_error():
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self.check_schemas(), name="schema stamp")
                source = tasks.create_task(self._enter(self.source_readers), name="source snapshot")
                target = tasks.create_task(self._enter(self.target_readers), name="target snapshot")
        self._final_readers = source.result(), target.result()
        quick = {table: keys for table, keys in self._by_table(dirty).items() if table.is_quickly_compared}
        await self._must_be_equal(await compare_keys(quick, *self._final_readers))
        return {"rows_under_fence": _count(dirty), "passes": self.passes}

    async def complete(self) -> Verdict:
        """Every row, in the snapshots taken under the fence. Raises VerificationFailed; or what
        `check_schemas` raises, where that is why the rows differ."""
        assert self._final_readers is not None
        try:
            verdict = await compare(self.tables, *self._final_readers, progress=self.on_rows)
        finally:
            await self.close()
        await self._must_be_equal(verdict)
        return verdict

    async def close(self) -> None:
        """Let the final snapshots go."""
        self._final_readers = None
        await self._final.aclose()

    async def _enter(self, readers: SnapshotReaders) -> DigestReader:
        return await self._final.enter_async_context(readers.at_snapshot(self.tenant))

    def _by_table(self, dirty: Dirty) -> dict[MovedTable, frozenset[Key]]:
        return {table: dirty[table.source] for table in self.tables if dirty.get(table.source)}

    async def _must_be_equal(self, verdict: Verdict) -> None:
        differing = [t.mismatch for t in verdict.tables if t.mismatch is not None]
        if differing:
            await self.check_schemas()  # a table that was emptied meanwhile is empty in every snapshot
            self.on_mismatch(sum(keys.count for m in differing for keys in m.keys.by_kind().values()))
            error = VerificationFailed(
                "source and target differ: " + "; ".join(map(str, differing)),
                where=Where(self.tenant, differing[0].table),
                hint=f"{self.hint} The keys are in the migration's evidence.",
            )
            error.evidence = [mismatch.evidence() for mismatch in differing]
            raise error


def _count(dirty: Dirty) -> int:
    return sum(len(keys) for keys in dirty.values())
