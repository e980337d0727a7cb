"""From the switch on, the way back: the source follows the target, until it is cleaned or the tenant returns.

> While a migration is monitored its source is what the target was a moment ago, so that going back loses
> nothing.

What it needs is there before the switch. It begins under the fence (`set`): what the mover itself has
written to the target stands before that, and what the tenant writes there behind it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

from mover.core.copying import CopiedRanges
from mover.core.errors import DamageAfterSwitch, KeepsTooMuch, NoWayBack, PlanOutdated
from mover.core.ids import Lsn, Side
from mover.core.migration import Claim, Progress
from mover.core.plan_codec import decode_plan, encode_plan
from mover.core.tables import Finding, Plan, Shape
from mover.engine.flow import Flow, open_flow
from mover.engine.journal import Journal
from mover.engine.losses import (
    DAMAGE,
    KEPT,
    LOST_BACK,
    changed_server,
    is_lost,
    note_changed_servers,
    noting_loss,
)
from mover.engine.observer import Observer
from mover.engine.site import Site
from mover.ports import MoveStore

NOTE = "way_back"  # its plan, kept before anything is made for it
NOT_BEGUN = (Lsn(0), None)
GIVEN_UP = "way_back_given_up"
STILL_THERE = "The tenant is served by the target, and nothing is removed from the source."
EVERYTHING = CopiedRanges(((None, None),))


@dataclass
class WayBack:
    """That of one claim's migration; `site` is the migration's. Implements cutover.ports.Gate."""

    claim: Claim
    store: MoveStore
    site: Site
    journal: Journal
    progress: Progress
    observer: Observer
    restore: Callable[[Flow], Awaitable[None]]  # makes both sides equal again after changes were lost
    _plan: Plan | None = None  # as it is noted
    _stamp: str = ""  # of the target's schemas when both sides were last found equal

    async def prepare(self, shape: Shape) -> None:
        """Before the switch, outside the fence: what the way back of `shape` needs. May be repeated."""
        plan = await self._plan_anew(shape)
        for finding in plan.findings:
            await self.journal.say(f"the way back: {finding.message}", "warning")
        if plan.refusals:
            return
        back, step, wait_for = self.site.back(), self.journal.step, self.journal.wait_for
        await step("back.identity", back.identify_rows, plan.shape, wait_for)
        await step("back.guards", back.guard_departure, plan.shape, wait_for)
        await step("back.stream", back.publish, plan.shape, wait_for)

    async def skip_ahead(self) -> None:
        """Before each attempt: the target need not keep what we have written there so far."""
        if (shape := await self.shape()) is not None:
            await self.site.back().skip_ahead(shape)

    async def set(self) -> None:
        if self._plan is not None and not self._plan.refusals:  # nothing is read under the fence for it
            await self.site.back().begin_here()

    async def shape(self) -> Shape | None:
        """That of the way back, if there is one."""
        plan = await self._noted()
        return None if plan is None or plan.refusals else plan.shape

    @asynccontextmanager
    async def open(self, shape: Shape) -> AsyncIterator[Flow]:
        """The source goes on where it had got to; `shape` is that of the way there.

        Raises SchemaChanged while the two sides' schemas differ."""
        plan = await self._plan_anew(shape)
        if plan.refusals:
            reasons = "; ".join(finding.message for finding in plan.refusals)
            raise NoWayBack(f"there is no way back: {reasons}", hint=plan.refusals[0].hint)
        async with noting_loss(self.store, self.claim, LOST_BACK):
            lost = await self._has_lost(plan.shape)
            async with self._flow(plan.shape) as flow:
                there = {} if lost else {table.source: EVERYTHING for table in plan.shape.tables}
                flow.link.target.set_copied(there)
                if await flow.link.target.progress() == NOT_BEGUN:
                    raise NoWayBack("there is no way back: it did not begin with the switch")
                await flow.follower.start()
                if lost:
                    await self.restore(flow)
                yield flow

    def _flow(self, shape: Shape) -> AbstractAsyncContextManager[Flow]:
        back, tenant = self.site.back(), self.claim.migration.tenant
        return open_flow(back, shape, tenant, self.progress, self.observer, self._check, STILL_THERE)

    async def _has_lost(self, shape: Shape) -> bool:
        """Whether changes will never come; then those that come begin anew.

        Raises DamageAfterSwitch where the target may lack what the source has of it; nothing is removed."""
        if server := await changed_server(self.store, self.claim, self.site, Side.TARGET):
            if not await self.site.back().has_all_that_was_applied(server[0]):
                why = "another server stands for the target, which may lack rows that are on the source"
                await self.store.save_note(self.claim, DAMAGE, why)
                raise DamageAfterSwitch(why, hint=KEPT)
        if changed := await note_changed_servers(self.store, self.claim, self.site, LOST_BACK):
            await self.journal.say(f"the way back: {changed}", "warning")
        if not await is_lost(self.store, self.claim, LOST_BACK):
            return False
        back, step, wait_for = self.site.back(), self.journal.step, self.journal.wait_for
        await step("back.identity", back.identify_rows, shape, wait_for)
        await step("back.stream_anew", back.begin_anew, shape, wait_for)
        return True

    async def check_kept(self, limit_bytes: float) -> None:
        """Raises KeepsTooMuch when the target keeps more for it than that; 0 is no limit."""
        kept = await self.site.back().kept_for_us()
        if kept.is_more_than(limit_bytes):
            raise KeepsTooMuch(f"the target keeps {kept} for the way back")

    async def remove(self, prefix: str) -> None:
        """What `prepare` has made, but for guards; the steps in the journal begin with `prefix`."""
        if (plan := await self._noted()) is not None:
            back, step, wait_for = self.site.back(), self.journal.step, self.journal.wait_for
            await step(f"{prefix}.back_stream", back.stop_stream, plan.shape, wait_for)
            await step(f"{prefix}.back_identity", back.restore_identity, plan.shape, wait_for)

    async def give_up(self, why: str) -> None:
        """There is none any more: nobody keeps WAL or a log for it.

        First it is noted: one that is half removed must not be opened again, since a publication without its
        identities stops everybody's updates."""
        if (plan := await self._noted()) is not None and not plan.refusals:
            given_up = Finding(GIVEN_UP, why, "Move the tenant back with a new migration.")
            self._plan = replace(plan, findings=(*plan.findings, given_up))
            await self.store.save_note(self.claim, NOTE, encode_plan(self._plan))
            await self.remove("monitor")

    async def finish_giving_up(self) -> None:
        """What an owner who died has left of one that was given up."""
        plan = await self._noted()
        if plan is not None and any(finding.code == GIVEN_UP for finding in plan.findings):
            if not await self.journal.is_done("monitor.back_identity"):
                await self.remove("monitor")

    async def _plan_anew(self, shape: Shape) -> Plan:
        self._stamp = await self.site.back().schema_stamp()
        known = await self.shape()
        plan = await self.site.plan_back(shape, known.capture if known else None)
        if plan != await self._noted():
            await self.store.save_note(self.claim, NOTE, encode_plan(plan))
        self._plan = plan
        return plan

    async def _noted(self) -> Plan | None:
        if self._plan is None:
            found = (await self.store.load_notes(self.claim)).get(NOTE)
            self._plan = None if found is None else decode_plan(cast(dict[str, Any], found))
        return self._plan

    async def _check(self, read_stamp: Callable[[], Awaitable[str]]) -> None:
        if await read_stamp() != self._stamp:
            raise PlanOutdated("the target's schemas have changed; both sides are compared anew")
