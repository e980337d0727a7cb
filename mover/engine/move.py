"""A migration from beginning to end. Read `Move` top to bottom: it is the algorithm.

Every phase may be entered again after a crash: it asks the world what is done, and the journal was
written before the world changed.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field

from cutover.ports import Cache, Gate
from cutover.protocol import Ends, Report, World, cut_over, recover
from mover.core.crash import reach
from mover.core.errors import (
    ApplyConflict,
    CannotResynchronise,
    CutoverAborted,
    DamageAfterSwitch,
    KeepsTooMuch,
    MoverError,
    OutcomeUnknown,
    PlanOutdated,
    Refused,
    Remedy,
    ServerChanged,
    VerificationFailed,
    first_error,
)
from mover.core.ids import Side
from mover.core.migration import Claim, Place, Progress
from mover.core.states import Phase, Status
from mover.core.tables import MovedTable, Plan, Shape
from mover.core.triggers import Trigger
from mover.engine.align import Alignment
from mover.engine.copy import WaveCopy
from mover.engine.figures import Figures
from mover.engine.flow import Flow, open_flow
from mover.engine.follow import Follower
from mover.engine.health import Health, Probes
from mover.engine.journal import Journal, ask_for_rollback
from mover.engine.losses import (
    DAMAGE,
    KEPT,
    LOST,
    LOST_BACK,
    changed_server,
    found_again,
    is_lost,
    note_changed_servers,
    noting_loss,
)
from mover.engine.observer import Observer
from mover.engine.preflight import refusal
from mover.engine.resync import Resync
from mover.engine.site import Site
from mover.engine.switch import FenceAlarm, ReturnDecision, RouteDecision, to_the_end
from mover.engine.verify import Verification
from mover.engine.way_back import WayBack
from mover.ports import Clock, MoveStore

# The stream is caught up when a mark passes through it within this share of the pause budget.
DRAIN_SHARE = 0.2
# After an aborted attempt writers get this long before the next one; doubled up to the second number.
CUTOVER_BACKOFF_S = (1.0, 30.0)
# Between two looks whether a wish that was heard can be obeyed: a small migration is over in a second.
WISH_S = 0.05
# The rest of a window that is waited for on the spot, and the time between looks at a longer one.
MONITOR_INTERVAL_S = 5.0
MONITOR_LOOK_S = 60.0
# Between two looks at what is kept for a migration that is paused.
PAUSED_LOOK_S = 60.0
TOMBSTONE_INTERVAL_S = 3600.0
# Between two comparisons of a source that follows its target.
COMPARE_INTERVAL_S = 60.0
NOTHING_SWITCHED = "Nothing was switched."
RETURN = "return.switch"  # the step in which a tenant is brought back
ERROR_RATE_BEFORE = "error_rate_before"  # the switch: a note
TRIGGER = "trigger"  # the note of what has asked for the rollback
SETTLE_INTERVAL_S = 0.2


@dataclass(frozen=True, slots=True)
class Limits:
    """What an operator has set."""

    copy_workers: int
    wave_seconds: float
    pause_budget_s: float
    monitoring_s: float
    tombstone_s: float
    abandoned_s: float  # what a tenant who came back has left on the target is kept for so long
    max_retained_bytes: float  # by a slot of ours, before we give up
    health_interval_s: float
    health_failures: int  # bad looks in a row, before the tenant is brought back


@dataclass
class Move:
    """One claim's work on one migration."""

    claim: Claim
    source: Place
    target: Place
    store: MoveStore
    site: Site
    cache: Cache
    limits: Limits
    clock: Clock
    observer: Observer
    probes: Probes
    progress: Progress = field(default_factory=Progress)
    flow: Flow | None = None  # while rows flow, there or back
    journal: Journal = field(init=False)
    alignment: Alignment = field(init=False)
    way_back: WayBack = field(init=False)
    # On the clock that never jumps, whatever the host's calendar says.
    switched_at_s: float | None = field(default=None, init=False)
    # False while writers may be waiting for the outcome of a cutover: no wish is obeyed meanwhile.
    may_rest: bool = field(init=False)
    # True when a wish was heard, which ends this task: no cutover begins before it has.
    wish_waits: bool = field(default=False, init=False)
    _figures: Figures = field(init=False)

    def __post_init__(self) -> None:
        self.journal = Journal(self.claim, self.store, self.progress, self.clock, self.observer.phase_took)
        self.may_rest = not self.journal.was_reached(Phase.CUTOVER)
        self.alignment = Alignment(self.claim, self.store, self.site, self.journal.say)
        self.way_back = WayBack(
            self.claim, self.store, self.site, self.journal, self.progress, self.observer, self._restore
        )
        self._figures = Figures(self.progress, self.clock)
        if (ago_s := self.claim.switched_ago_s) is not None:
            self.switched_at_s = self.clock.monotonic() - ago_s

    async def run(self) -> Status:
        """From where the journal stands to `completed`, or to the next look at the monitoring window."""
        if self.claim.migration.status is Status.MONITORING:
            await self._bound_the_way_back()
        if self.journal.was_reached(Phase.CUTOVER) and await self._settle_earlier():
            plan = await self._stored_plan()
        else:
            async with noting_loss(self.store, self.claim, LOST):
                plan = await self._begin()
                await self._transfer(plan.shape)
        is_over = self.journal.was_reached(Phase.CLEANUP)
        if not is_over and not await self._monitor(plan.shape):
            return Status.MONITORING
        await self._clean_up(plan.shape)
        return Status.COMPLETED

    async def undo(self) -> Status:
        """Remove everything we made. Before the switch the source never noticed; after it the tenant comes
        back first. Ends as `outcome` says."""
        plan = await self.store.load_plan(self.claim)
        has_returned = plan is not None and await self._returns(plan.shape)
        if plan is not None:
            await self.journal.say("undoing: removing everything this migration made")
            if has_returned:
                await self.journal.step("return.target_ownership", self.site.own_target)
                await self.way_back.remove("return")
            await self._clear_source(plan.shape)
            if not has_returned:
                await self._clear_target(plan.shape)
        self.site.rest()
        outcome = self.claim.migration.outcome or Status.CANCELLED
        asked_by = Trigger.OPERATOR.value if outcome is Status.ROLLED_BACK else None
        trigger = (await self.store.load_notes(self.claim)).get(TRIGGER, asked_by)
        if has_returned:
            await self.store.tombstone(self.claim, 0, self.limits.abandoned_s)
        if trigger is not None:  # rather twice than never: nobody comes back to it once it has ended
            await self._tell_of_rollback(str(trigger))
        await self.store.set_status(self.claim, outcome, error=self.claim.migration.error)
        reach("undone")
        if trigger is not None:
            self.observer.rolled_back(str(trigger))
        return outcome

    async def _tell_of_rollback(self, trigger: str) -> None:
        """To those who look for alerts among the events, and those who bill."""
        m = self.claim.migration
        facts = {"alert": "rolled_back", "severity": "high", "trigger": trigger, "tenant": str(m.tenant)}
        await self.store.event(self.claim, f"rolled back: {trigger}", "warning", **facts)
        if m.switched_at is not None:
            said = f"charged since {m.switched_at:%Y-%m-%d %H:%M} for {self.target}: to be refunded"
            refund = {"billing": "refund", "since": m.switched_at.isoformat(), "tier": m.target_tier.value}
            await self.store.event(self.claim, said, **refund)

    async def clear_abandoned(self) -> None:
        """Nobody has needed what the tenant had left on the target when he came back."""
        shape, step = (await self._stored_plan()).shape, self.journal.step
        await step("undo.target_ownership", self.site.own_target)
        # Under the guards, which say whose the place is: a later migration may have brought the tenant there.
        if await self.site.target_fence.state() == "moved":
            await step("undo.target_rows", self.site.remove_target_rows, shape, self.journal.say)
        await step("undo.target_guards", self.site.unguard_target, shape, self.journal.wait_for)
        await step("undo.forget_target", self.site.forget_target)
        self.site.rest()
        await self.store.end_tombstone(self.claim)
        await self.journal.say("the abandoned target is cleared: nothing of ours is left")
        await self.store.release(self.claim)

    async def _returns(self, shape: Shape) -> bool:
        """Whether the tenant was served by the target; he is back at the source then.

        Raises DamageAfterSwitch when it is not asked for that he comes back."""
        if await self.journal.is_done(RETURN):
            return True
        if not await self.journal.is_begun(RETURN) and not await self._is_served_by_target():
            return False
        if self.claim.migration.outcome is not Status.ROLLED_BACK:
            raise DamageAfterSwitch("the tenant is served by the target: nothing is removed there")
        await self._come_back(shape)
        return True

    async def _is_served_by_target(self) -> bool:
        """The target's fence has the last word, where a cutover was tried and the target still answers;
        it was asked already when the undoing has got past the source's."""
        journal = self.journal
        if journal.was_reached(Phase.CUTOVER) and not await journal.is_done("undo.reopen"):
            try:
                return await self._settle_earlier()
            except Refused as error:  # the database is gone, or does not let us in: it serves nobody
                if await self.store.is_switched(self.claim):
                    raise
                await journal.say(f"undoing without the target: {error}", "warning")
        return await self.store.is_switched(self.claim)

    async def look_after_paused(self) -> None:
        """Nobody works on it, and what is kept for it grows until its server's disk is full."""
        kept = await self.site.kept_for_us()
        if kept.is_more_than(self.limits.max_retained_bytes):
            why = f"paused, and the source keeps {kept} for it"
            await ask_for_rollback(self.store, self.claim, Trigger.RETAINED, why)
        await self.store.release(self.claim, PAUSED_LOOK_S)

    async def watch_tombstone(self) -> None:
        """A completed migration's guard on the source goes when nobody has met it for long enough."""
        refused = await self.site.refused_writes()
        quiet_s = await self.store.tombstone(self.claim, refused, self._tombstone_interval_s)
        if quiet_s >= self.limits.tombstone_s:
            plan = await self._stored_plan()
            await self.site.remove_tombstone(plan.shape, self.journal.wait_for)
            reach("tombstone.removed")
            self.site.rest()
            await self.store.end_tombstone(self.claim)
            await self.journal.say("the tombstone on the source is removed: nothing of ours is left")
        await self.store.release(self.claim)

    async def _settle_earlier(self) -> bool:
        """A cutover whose owner died comes before anything else: writers may be waiting for its outcome.

        Says whether the tenant was switched."""
        await self.site.take_over()
        if self.journal.was_reached(Phase.CLEANUP):  # then the target was open, and its fence may be gone
            return True
        if self.switched_at_s is not None:
            await self._must_have_been_opened()
            await self._fence_again()
        switched = await self._settle(self._ends)
        self.may_rest = True
        return switched

    async def _must_have_been_opened(self) -> None:
        """A target from before the switch is not opened: what was written since is on the source at best.

        Raises DamageAfterSwitch."""
        changed = await changed_server(self.store, self.claim, self.site, Side.TARGET)
        if changed and (state := await self.site.target_fence.state()) != "open":
            raise DamageAfterSwitch(
                f"another server stands for the target: {changed[0]} then, {changed[1]} now; it is from"
                f" before the switch, for its fence is {state}",
                hint="Restore the target from later. The source keeps its rows, and what it has followed.",
            )

    async def _fence_again(self) -> None:
        """A source from before the switch knows nothing of it: the tenant could write on both sides."""
        fence = self.site.source_fence
        if await fence.state() != "open":
            return
        why = "the source, from before the switch, was open: what was written there since is on it alone"
        await self.store.save_note(self.claim, DAMAGE, why)  # first: once it is fenced nothing tells of it
        await self.journal.say(why, "error")
        try:
            await fence.get_ready()
            await fence.close(self.limits.pause_budget_s)
            await fence.move_away()
        finally:
            await fence.let_go()

    async def _begin(self) -> Plan:
        """The phases before rows flow; a plan that was stored is kept."""
        plan = await self.store.load_plan(self.claim)
        if plan is None:
            async with self.journal.phase(Phase.PREFLIGHT):
                plan = await self.site.preflight()
                if plan.refusals:
                    raise refusal(plan)
                await self.store.save_plan(self.claim, plan)
                reach("plan.saved")
                for finding in plan.findings:
                    await self.journal.say(finding.message, "warning")
        self.progress.capture = plan.shape.capture.value
        async with self.journal.phase(Phase.PROVISION):
            await self.site.provision()
        async with self.journal.phase(Phase.PREPARE):
            return await self._prepare(plan)

    async def _stored_plan(self) -> Plan:
        plan = await self.store.load_plan(self.claim)
        if plan is None:
            raise MoverError("the migration has no stored plan")
        return plan

    async def _prepare(self, plan: Plan) -> Plan:
        """Says the plan as the schemas are now."""
        step, wait_for = self.journal.step, self.journal.wait_for
        await step("prepare.servers", self._know_servers)
        await step("prepare.ownership", self.site.take_over)
        await step("prepare.schemas", self.site.clone_schemas, plan.shape)
        async with self.journal.line("prepare.alignment"):
            plan = await self.alignment.align(plan)
        shape = plan.shape
        await step("prepare.identity", self.site.identify_rows, shape, wait_for)
        await step("prepare.sequences", self.site.reserve_sequences, shape)
        await step("prepare.guards", self.site.guard, shape, wait_for)
        if await is_lost(self.store, self.claim, LOST):
            await step("prepare.stream_anew", self.site.begin_anew, shape, wait_for)
        await step("prepare.stream", self.site.publish, shape, wait_for)
        return plan

    async def _know_servers(self) -> None:
        if changed := await note_changed_servers(self.store, self.claim, self.site, LOST):
            await self.journal.say(changed, "warning")

    async def _must_be_the_same_servers(self) -> None:
        if changed := await note_changed_servers(self.store, self.claim, self.site, LOST):
            raise ServerChanged(changed)

    async def _transfer(self, shape: Shape) -> None:
        """Rows flow: copy, follow, prove, switch. One follower serves all four."""
        tenant, check = self.claim.migration.tenant, self.alignment.check
        async with self._showing(
            open_flow(self.site, shape, tenant, self.progress, self.observer, check, NOTHING_SWITCHED)
        ) as flow:
            follower, verification = flow.follower, flow.verification
            copy = self._copy_of(flow, self.progress)
            self._show_totals(shape)
            async with self.alignment.noticing():
                await copy.load()
                if lost := await is_lost(self.store, self.claim, LOST):
                    flow.link.target.set_copied({})
                await follower.start()
                with first_error():
                    async with asyncio.TaskGroup() as tasks:
                        following = tasks.create_task(follower.run(), name="follower")
                        async with self.journal.phase(Phase.COPY):
                            if lost:
                                await self._resynchronise(flow)
                                await found_again(self.store, self.claim, LOST)
                            await copy.run()
                        async with self.journal.phase(Phase.INDEX):
                            await follower.catch_up_once()  # foreign keys: with what has been corrected
                            async with follower.paused():
                                await self.site.build_rest(shape)
                                await self.site.check_schemas(shape)
                        async with self.journal.phase(Phase.CATCH_UP):
                            await self._catch_up(follower)
                            await verification.check_schemas()
                        async with self.journal.phase(Phase.VERIFY):
                            await verification.until_small()
                        async with self.journal.phase(Phase.CUTOVER):
                            await self.way_back.prepare(shape)
                            await self._note_error_rate()
                            await self._cut_over(flow)
                        following.cancel()
            self.flow = None
            await self._compare_completely(verification)

    async def _note_error_rate(self) -> None:
        """What later ones are held against."""
        await self.store.save_note(self.claim, ERROR_RATE_BEFORE, await self.probes.error_rate())

    @asynccontextmanager
    async def _showing(self, opened: AbstractAsyncContextManager[Flow]) -> AsyncIterator[Flow]:
        """While it is open, its lag is that of the migration."""
        async with opened as self.flow:
            try:
                yield self.flow
            finally:
                self.flow = None

    @property
    def _ends(self) -> Ends:
        return Ends(
            source=self.site.source_fence,
            target=self.site.target_fence,
            decision=RouteDecision(self.store, self.claim, self.source, self.target),
            cache=self.cache,
            clock=self.clock,
        )

    @property
    def _ends_of_return(self) -> Ends:
        return Ends(
            source=self.site.target_fence,
            target=self.site.source_fence,
            decision=ReturnDecision(self.store, self.claim, self.source, self.target),
            cache=self.cache,
            clock=self.clock,
        )

    def _world(self, ends: Ends, flow: Flow, gate: Gate | None) -> World:
        return World(
            source=ends.source,
            target=ends.target,
            decision=ends.decision,
            cache=ends.cache,
            clock=ends.clock,
            drain=flow.follower,
            proof=flow.verification,
            sequences=flow.sequences,
            gate=gate,
        )

    async def _resynchronise(self, flow: Flow, *, everything: bool = False) -> None:
        """What the target holds of the source is what it held when changes were lost."""
        await self.journal.say("changes are lost: both sides are compared, and what differs is copied anew")
        resync = Resync(
            flow, self.claim.migration.tenant, self.clock, self.limits.wave_seconds, self.journal.say
        )
        await resync.run(everything=everything)

    async def _restore(self, flow: Flow) -> None:
        """The source has missed changes of the target that it follows."""
        async with self.journal.line("back.resynchronise"):
            await self._resynchronise(flow, everything=True)
            await self._copy_of(flow, Progress()).run()
            await found_again(self.store, self.claim, LOST_BACK)  # until then not everything is there

    def _show_totals(self, shape: Shape) -> None:
        self.progress.rows_total = sum(t.estimated_rows for t in shape.tables)
        self.progress.bytes_total = sum(t.estimated_bytes for t in shape.tables)

    def _copy_of(self, flow: Flow, progress: Progress) -> WaveCopy:
        shape = flow.shape

        async def build_keys(tables: list[MovedTable]) -> None:
            await self.site.build_keys(shape, tables)

        return WaveCopy(
            shape=shape,
            copier=flow.link.copier,
            target=flow.link.target,
            follower=flow.follower,
            progress=progress,
            clock=self.clock,
            workers=self.limits.copy_workers,
            wave_seconds=self.limits.wave_seconds,
            build_keys=build_keys,
            check_schemas=flow.check_schemas,
            on_chunk=self.observer.chunk_copied,
        )

    async def _catch_up(self, follower: Follower) -> None:
        """Until what commits now is on the target within a small part of the pause budget."""
        while True:
            started = self.clock.monotonic()
            await follower.catch_up_once()
            if self.clock.monotonic() - started < self.limits.pause_budget_s * DRAIN_SHARE:
                return

    async def _cut_over(self, flow: Flow) -> None:
        """The tenant goes to the target."""

        async def get_ready() -> None:
            await self._must_be_the_same_servers()
            await self.site.check_schemas(flow.shape)
            await self.site.carry_remarks(flow.shape, self.journal.say)
            await self.site.check_references(flow.shape, self.journal.say)
            await self.way_back.skip_ahead()

        report = await self._attempt(flow, self._ends, self.way_back, get_ready)
        self.switched_at_s = self.clock.monotonic()
        if report is not None:
            await self._switched(report)

    async def _attempt(
        self, flow: Flow, ends: Ends, gate: Gate | None, get_ready: Callable[[], Awaitable[None]]
    ) -> Report | None:
        """Cutovers until one fits the budget; an attempt that does not leaves no trace. The report is None
        where only the outcome is known."""
        world, verification = self._world(ends, flow, gate), flow.verification
        backoff, longest = CUTOVER_BACKOFF_S
        while True:
            await get_ready()
            await verification.check_schemas()
            await self._catch_up(flow.follower)
            await verification.until_small()
            await verification.one_pass()  # what changes from here on is compared inside the pause
            while self.wish_waits:
                await self.clock.sleep(WISH_S)
            self.may_rest = False
            try:
                report = await to_the_end(cut_over(world, self.limits.pause_budget_s))
            except CutoverAborted as error:
                self.may_rest = True
                await verification.close()  # the next pass takes the same connections
                self.observer.cutover("aborted", None)
                self.progress.waiting_for = f"the next cutover attempt: {error}"
                await self.journal.say(f"cutover: {error}; trying again in {backoff:.0f} s", "warning")
                await self.clock.sleep(backoff)
                self.progress.waiting_for = None
                backoff = min(backoff * 2, longest)
            except OutcomeUnknown:
                switched = await self._settle(ends)
                self.may_rest = True
                if switched:
                    return None
                await verification.close()
            else:
                self.may_rest = True
                return report

    async def _settle(self, ends: Ends) -> bool:
        """The decision's answer was lost: the fence stays closed until the platform database tells."""
        held = FenceAlarm(self.clock, self.observer.fence_held)
        while True:
            try:
                switched = await recover(ends)
            except MoverError as error:
                if error.remedy is not Remedy.RETRY:
                    raise
                held.still(error)
                self.progress.waiting_for = f"the outcome of a cutover: {error}"
                await self.clock.sleep(SETTLE_INTERVAL_S)
            else:
                held.over()
                self.progress.waiting_for = None
                return switched

    async def _switched(self, report: Report) -> None:
        self.progress.pause_ms = report.pause_ms
        self.progress.evidence |= {**report.evidence, "pause_steps_ms": dict(report.steps_ms)}
        self.observer.cutover("switched", report.pause_ms)
        await self.journal.say(
            f"switched to {self.target}: pause {report.pause_ms:.0f} ms, {report.steps_ms}"
        )

    async def _compare_completely(self, verification: Verification) -> None:
        """Every row once more, independent of the stream; the source is kept if they differ."""
        await self.store.begin_step(self.claim, "cutover.complete_comparison")
        try:
            verdict = await verification.complete()
        except PlanOutdated as error:
            await self.store.end_step(self.claim, "cutover.complete_comparison", detail=str(error), ok=False)
            await self.journal.say(f"not compared completely after the switch: {error}", "warning")
            return
        except VerificationFailed as error:
            await self.store.end_step(self.claim, "cutover.complete_comparison", detail=str(error), ok=False)
            self.progress.evidence["mismatches"] = list(error.evidence)
            await self.store.save_progress(self.claim, self.progress)
            await self.store.save_note(self.claim, DAMAGE, str(error))
            return
        self.progress.evidence |= {
            "source_root": verdict.source_root,
            "target_root": verdict.target_root,
            "source_rows": verdict.source_rows,
            "target_rows": verdict.target_rows,
        }
        await self.store.save_progress(self.claim, self.progress)
        detail = f"{verdict.source_rows} rows equal, root {verdict.source_root}"
        await self.store.end_step(self.claim, "cutover.complete_comparison", detail=detail)
        await self.journal.say(f"verified: {detail}")

    async def _monitor(self, shape: Shape) -> bool:
        """The window before the source is cleaned, which follows the target meanwhile; False when it is not
        over yet.

        The forward stream is over. For a long window the claim is given back once, to be taken again as one
        of the migrations that are watched, which leave room for others. Raises DamageAfterSwitch."""
        async with self.journal.phase(Phase.MONITOR):
            if not await self.journal.is_done("monitor.stop_stream"):
                await self.journal.step("monitor.keep_target", self.site.keep_target, shape)
                await self.journal.step(
                    "monitor.stop_stream", self.site.stop_stream, shape, self.journal.wait_for
                )
                if "source_root" not in self.progress.evidence:
                    await self.journal.say("no complete comparison after the switch, only before", "warning")
            if damage := (await self.store.load_notes(self.claim)).get(DAMAGE):
                await self.way_back.give_up("the comparison after the switch found a difference")
                raise DamageAfterSwitch(
                    f"after the switch: {damage}",
                    hint=KEPT,
                )
            await self._count_refused()
            left = self.progress.eta_seconds = round(self._window_left(), 1)
            if left > MONITOR_INTERVAL_S and self.claim.migration.status is not Status.MONITORING:
                await self.store.release(self.claim)
                return False
            await self.way_back.finish_giving_up()
            if await self.way_back.shape() is not None:
                await self._keep_the_way_back(shape)
            if (left := self._window_left()) > MONITOR_INTERVAL_S:
                await self.store.release(self.claim, min(left, MONITOR_LOOK_S))
                return False
            await self.clock.sleep(max(0.0, left))
        return True

    async def _keep_the_way_back(self, shape: Shape) -> None:
        """Until the window is over the source follows the target; compared now and again, and at the end."""
        try:
            await self.way_back.check_kept(self.limits.max_retained_bytes)
            await self._follow_back(shape)
        except (ApplyConflict, KeepsTooMuch, CannotResynchronise) as error:
            # Above all values that are unique among all tenants, of whom the target does not know all.
            await self.way_back.give_up(f"the source could not follow: {error}")
            await self.journal.say(f"there is no way back any more: {error}", "error")
        except VerificationFailed as error:
            await self.store.save_note(self.claim, DAMAGE, str(error))
            await self.way_back.give_up("the source and the target that it follows differ")
            raise

    async def _bound_the_way_back(self) -> None:
        """Asks the target alone, which serves others, too: it does not fill while the source is away."""
        if await self.way_back.shape() is None:
            return
        try:
            await self.way_back.check_kept(self.limits.max_retained_bytes)
        except KeepsTooMuch as error:
            await self.site.own_target()
            await self.way_back.give_up(str(error))
            await self.journal.say(f"there is no way back any more: {error}", "error")

    async def _follow_back(self, shape: Shape) -> None:
        async with self._showing(self.way_back.open(shape)) as flow:
            with first_error():
                async with asyncio.TaskGroup() as tasks:
                    following = tasks.create_task(flow.follower.run(), name="follower")
                    looking = tasks.create_task((await self._health(shape)).watch(), name="health")
                    while (left := self._window_left()) > 0:
                        self.progress.eta_seconds = round(left, 1)
                        await self._count_refused()
                        await self.way_back.check_kept(self.limits.max_retained_bytes)
                        await flow.verification.one_pass()
                        await self.clock.sleep(min(self._window_left(), COMPARE_INTERVAL_S))
                    await flow.verification.one_pass()
                    looking.cancel()
                    following.cancel()

    async def _health(self, shape: Shape) -> Health:
        """Of the tenant where he is served, while he could come back."""

        async def ask(why: str) -> None:
            await ask_for_rollback(self.store, self.claim, Trigger.ERROR_RATE, why)

        before = (await self.store.load_notes(self.claim)).get(ERROR_RATE_BEFORE)
        probes = self.probes.watching(shape, None if before is None else float(str(before)))
        return Health(probes, self.clock, self.limits.health_interval_s, self.limits.health_failures, ask)

    async def _come_back(self, shape: Shape) -> None:
        """The same cutover with the roles swapped: from the target to the source, with whatever the tenant
        has written since he left."""
        was_begun, ends = await self.journal.is_begun(RETURN), self._ends_of_return
        await self.site.take_over()
        self.may_rest = False
        await self.store.enter_phase(self.claim, Phase.CUTOVER)  # what is left half-way is taken up first
        async with self.journal.line(RETURN):
            home = self.site.source_fence
            if was_begun and await home.state() != "moved" and await self._settle(ends):
                return
            async with self._showing(self.way_back.open(shape)) as flow:
                with first_error():
                    async with asyncio.TaskGroup() as tasks:
                        following = tasks.create_task(flow.follower.run(), name="follower")
                        try:
                            report = await self._attempt(flow, ends, None, home.expect_return)
                        except VerificationFailed:
                            await home.move_away()  # whoever still comes here learns where the tenant is
                            raise
                        following.cancel()
                if report is not None:
                    await self._has_returned(report)
                    async with self.journal.line("return.complete_comparison"):
                        await flow.verification.complete()

    async def _has_returned(self, report: Report) -> None:
        self.progress.evidence |= {
            "return_pause_ms": report.pause_ms,
            "return_pause_steps_ms": dict(report.steps_ms),
        }
        self.observer.cutover("returned", report.pause_ms)
        await self.journal.say(f"back at {self.source}: pause {report.pause_ms:.0f} ms, {report.steps_ms}")

    async def _count_refused(self) -> None:
        """Writes that stale routes still send to the source."""
        refused = await self.site.refused_writes()
        self.observer.writes_refused(refused - self.progress.refused_writes)
        self.progress.refused_writes = refused

    async def _clean_up(self, shape: Shape) -> None:
        step, say, wait_for = self.journal.step, self.journal.say, self.journal.wait_for
        async with self.journal.phase(Phase.CLEANUP):
            await self.way_back.remove("cleanup")
            # What others refer to would be gone without a word: foreign keys do not act on what we remove.
            await self.site.check_others_references(shape, say)
            if not await self.journal.is_done("cleanup.source_rows"):
                await step("cleanup.last_check", self._must_be_served_by_target, shape)
            await step("cleanup.source_rows", self.site.remove_source_rows, shape, say)
            await step("cleanup.tombstone", self.site.keep_tombstone, shape, wait_for)
            # Only now: the index that it needed finds the tenant's rows for the deletes, too.
            await step("cleanup.identity", self.site.restore_identity, shape, wait_for)
            await step("cleanup.target_guards", self.site.unguard_target, shape, wait_for)
            await step("cleanup.forget_source", self.site.forget_source)
            await step("cleanup.forget_target", self.site.forget_target)
        refused = await self.site.refused_writes()
        self.site.rest()
        await self.store.tombstone(self.claim, refused, self._tombstone_interval_s)
        reach("tombstone.noted")
        await self.store.set_status(self.claim, Status.COMPLETED)
        reach("completed")

    async def _must_be_served_by_target(self, shape: Shape) -> None:
        """The source's rows may be the last ones. Raises DamageAfterSwitch."""
        if changed := await changed_server(self.store, self.claim, self.site, Side.TARGET):
            why = f"another server stands for the target: {changed[0]} then, {changed[1]} now"
        elif (state := await self.site.target_fence.state()) != "open":
            why = f"the target's fence is {state}"
        elif not await self.site.holds_rows(shape, Side.TARGET) and await self.site.holds_rows(
            shape, Side.SOURCE
        ):
            why = "the target has no row of the tenant's any more"
        else:
            return
        raise DamageAfterSwitch(
            f"the source is not cleaned: {why}",
            hint="The source keeps its rows. Resume once the tenant is served by the target again.",
        )

    async def _clear_source(self, shape: Shape) -> None:
        """Depends on nothing but the source, so that it is free again whatever became of the target."""
        step, wait_for = self.journal.step, self.journal.wait_for
        await step("undo.source_ownership", self.site.own_source)
        await step("undo.reopen", self.site.reopen_source)
        await step("undo.stream", self.site.stop_stream, shape, wait_for)
        await step("undo.source_guards", self.site.unguard_source, shape, wait_for)
        await step("undo.identity", self.site.restore_identity, shape, wait_for)
        await step("undo.forget_source", self.site.forget_source)

    async def _clear_target(self, shape: Shape) -> None:
        step = self.journal.step
        await step("undo.target_ownership", self.site.own_target)
        await self.way_back.remove("undo")
        await step("undo.target_guards", self.site.unguard_target, shape, self.journal.wait_for)
        await step("undo.target_rows", self.site.remove_target_rows, shape, self.journal.say)
        await step("undo.forget_target", self.site.forget_target)

    @property
    def _tombstone_interval_s(self) -> float:
        return min(TOMBSTONE_INTERVAL_S, self.limits.tombstone_s)

    async def measure(self) -> None:
        """Bring the progress' live figures up to date; called beside `run`, about once a second."""
        if (flow := self.flow) is None:
            self.progress.lag_bytes = self.progress.lag_seconds = None
            return
        self._figures.note(await flow.follower.lag_bytes())
        kept = await flow.site.kept_for_us()
        lag_bytes, lag_seconds = self.progress.lag_bytes or 0, self.progress.lag_seconds or 0.0
        self.observer.measured(self.claim.migration, lag_bytes, lag_seconds, kept)
        if warning := self._figures.warning(kept):
            await self.journal.say(warning, "warning")
        if (
            self.claim.migration.status is Status.IN_PROGRESS
            and self.switched_at_s is None
            and kept.is_more_than(self.limits.max_retained_bytes)
        ):
            await ask_for_rollback(
                self.store, self.claim, Trigger.RETAINED, f"the source keeps {kept} for us"
            )

    def _window_left(self) -> float:
        """Seconds until the source may be cleaned."""
        if self.switched_at_s is None:  # an earlier owner's cutover has just been settled
            self.switched_at_s = self.clock.monotonic()
        return self.limits.monitoring_s - (self.clock.monotonic() - self.switched_at_s)
