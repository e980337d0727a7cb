"""Keeps a migration's plan and what was copied at the schemas as they are.

What changes meanwhile is noticed by the stamp of the source's schemas: before every phase and wave, under
the fence, and whenever something fails. Then the migration leaves its open connections and comes back
here, as after a crash.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import cast

from mover.core.alignment import START_AGAIN, copied_anew, with_owned
from mover.core.crash import reach
from mover.core.errors import MoverError, PlanOutdated, Remedy, SchemaChanged, TableUnfit
from mover.core.ids import Side, TableRef
from mover.core.migration import Claim
from mover.core.states import Phase
from mover.core.tables import Plan
from mover.engine.site import Say, Site
from mover.ports import MoveStore

# The notes: which tables are still to be removed from the target, and what the rows were stored in when
# they were last held to be right.
COPY_ANEW, STORAGE = "copy_anew", "storage"


@dataclass
class Alignment:
    """The schemas under which one owner works; `align` comes before anything else."""

    claim: Claim
    store: MoveStore
    site: Site
    say: Say
    stamp: str = ""  # of the source's schemas when both sides were last found equal

    async def align(self, plan: Plan) -> Plan:
        """The plan as the schemas are now. Raises SchemaChanged when an operator is needed."""
        shape = plan.shape
        notes = await self.store.load_notes(self.claim)
        before = cast(dict[str, str], notes.get(STORAGE, {}))
        unfinished = {TableRef(*name) for name in cast(list[list[str]], notes.get(COPY_ANEW, []))}
        try:
            aligned = await self.site.align(shape, self.say, is_built=await self._is_built())
        except TableUnfit as error:
            await self._note_anew(unfinished | _named(error))
            raise
        changed = copied_anew(shape, aligned.shape, aligned.unfilled, before, aligned.storage)
        anew = with_owned(changed | unfinished, aligned.shape)
        if anew and Side.TARGET in shape.careful and (not shape.fresh or await self._is_begun()):
            raise SchemaChanged(
                f"{', '.join(map(str, sorted(anew)))} would have to be copied anew, while the target has"
                " triggers and foreign keys in force",
                hint=START_AGAIN,
            )
        if anew:
            await self._note_anew(anew)
        if aligned.shape != shape:
            plan = replace(plan, shape=aligned.shape)
            await self.store.save_plan(self.claim, plan)
        reach("align.planned")
        storage = {str(t.source): aligned.storage[str(t.source)] for t in aligned.shape.tables}
        if before != storage:
            await self.store.save_note(self.claim, STORAGE, storage)
        if anew:
            await self.say(f"the source's schema changed: copied anew: {', '.join(map(str, sorted(anew)))}")
            await self.site.forget_copies(aligned.shape, anew, self.say)
            await self._note_anew(())
        self.stamp = aligned.stamp
        return plan

    async def check(self, read_stamp: Callable[[], Awaitable[str]]) -> None:
        """Raises PlanOutdated when the source's schemas are not those that `align` has seen."""
        if await read_stamp() != self.stamp:
            raise PlanOutdated("the source's schemas have changed; both sides are compared anew")

    @asynccontextmanager
    async def noticing(self) -> AsyncIterator[None]:
        """An error that comes after a change of the schemas most likely comes from it."""
        try:
            yield
        except MoverError as error:
            if error.remedy not in (Remedy.ABORT, Remedy.PAUSE):
                raise
            if isinstance(error, TableUnfit):
                await self._note_anew(_named(error))
            elif await self._is_unchanged():
                raise
            raise PlanOutdated(
                f"the source's schemas have changed, and both sides are compared anew: {error}", error.where
            ) from error

    async def _is_unchanged(self) -> bool:
        """True also where the source does not tell."""
        try:
            return await self.site.schema_stamp() == self.stamp
        except MoverError:
            return True

    async def _is_built(self) -> bool:
        steps = await self.store.steps(self.claim)
        return any(step.name == Phase.INDEX and step.status == "done" for step in steps)

    async def _is_begun(self) -> bool:
        """Whether a fresh target may have some of its indexes and what follows them."""
        return any(step.name == Phase.INDEX for step in await self.store.steps(self.claim))

    async def _note_anew(self, tables: Collection[TableRef]) -> None:
        names = [[table.schema, table.name] for table in sorted(tables)]
        await self.store.save_note(self.claim, COPY_ANEW, names)


def _named(error: MoverError) -> set[TableRef]:
    return {error.where.table} if error.where.table else set()
