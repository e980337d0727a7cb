"""The daemon: claims migrations, works on several at a time, renews their leases, obeys wishes.

Pause, SIGTERM and a lost lease are the same mechanism: the migration's task is cancelled, every
transaction is whole or absent, and the journal tells the next owner where to go on.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Protocol

import structlog

from mover.core.crash import reach
from mover.core.errors import Conflict, LeaseLost, MoverError, Remedy, VerificationFailed
from mover.core.migration import Claim, Migration, Progress, Wish
from mover.core.states import Status
from mover.core.triggers import Deadlines, Trigger, overdue
from mover.engine.journal import ask_for_rollback
from mover.engine.move import PAUSED_LOOK_S, TRIGGER, WISH_S, Move
from mover.engine.switch import CANCEL_PATIENCE_S
from mover.ports import Clock, MoveStore

log = structlog.get_logger()

POLL_S = 0.5
PROGRESS_S = 1.0
# Migrations whose source follows their target, or that are paused, beside those that are being moved.
MAX_WATCHED = 50
# Heartbeats per lease: two may be lost before another daemon takes over.
HEARTBEATS_PER_LEASE = 4
BACKOFF_S = (1.0, 60.0)
# The longest back-off where a cutover broke off: writers may be waiting for its outcome.
HALF_DONE_S = 3.0
RELEASE_PATIENCE_S = 3.0
CANCEL_AGAIN_S = CANCEL_PATIENCE_S + 1.0
# A migration whose promise may be broken is not touched again before an operator looks.
HALTED_S = 10 * 365 * 86_400.0

MoveMaker = Callable[[Claim, Progress], Awaitable[Move]]


class DaemonMetrics(Protocol):
    """Hears how many migrations are worked on, and how each ended."""

    def active(self, count: int) -> None: ...

    def ended(self, migration: Migration, status: Status, seconds: float) -> None: ...


@dataclass
class Daemon:
    """Works on the queue until `run` is cancelled."""

    name: str
    store: MoveStore
    make_move: MoveMaker
    clock: Clock
    lease_s: float
    max_active: int
    deadlines: Deadlines
    metrics: DaemonMetrics
    _active: dict[str, asyncio.Task[None]] = field(default_factory=dict)
    _watched: set[str] = field(default_factory=set)  # those of them that only have to be looked after
    _failures: dict[str, int] = field(default_factory=dict)

    async def run(self) -> None:
        """Claim and work; cancelling it stops every migration at a safe point and ends the leases."""
        try:
            while True:
                await self._claim_what_is_due()
                await self.clock.sleep(POLL_S)
        finally:
            for task in self._active.values():
                task.cancel()
            await asyncio.gather(*self._active.values(), return_exceptions=True)

    async def _claim_what_is_due(self) -> None:
        """As many as there is room for; a cutover that was left half-way never waits for room."""
        while True:
            watched = len(self._watched)
            moves, watches = len(self._active) - watched < self.max_active, watched < MAX_WATCHED
            try:
                claim = await self.store.claim(self.name, self.lease_s, moves=moves, watches=watches)
            except MoverError as error:
                log.warning("the queue does not answer", action="claim", error=str(error))
                return
            if claim is None:
                return
            key = str(claim.migration.id)
            task = asyncio.create_task(self._work(claim), name=f"migration {key}")
            self._active[key] = task
            if claim.migration.status in (Status.MONITORING, Status.PAUSED):
                self._watched.add(key)
            self.metrics.active(len(self._active))
            task.add_done_callback(functools.partial(self._done, key))

    def _done(self, key: str, task: asyncio.Task[None]) -> None:
        if self._active.get(key) is task:  # it may have been claimed again after its lease ran out
            del self._active[key]
            self._watched.discard(key)
        self.metrics.active(len(self._active))
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a migration's task failed", action="failed", exc_info=error, migration=key)

    async def _work(self, claim: Claim) -> None:
        migration = claim.migration
        structlog.contextvars.bind_contextvars(migration=str(migration.id), tenant=str(migration.tenant))
        log.info("claimed", action="claim", epoch=claim.epoch, status=migration.status.value)
        reach("claimed")
        work = Work(
            claim, self.store, self.make_move, self.clock, self.lease_s, self.deadlines, self._failures
        )
        try:
            await work.run()
            if work.ended not in (None, Status.MONITORING):
                began = migration.started_at or migration.created_at
                self.metrics.ended(migration, work.ended, (datetime.now(UTC) - began).total_seconds())
        except LeaseLost:
            log.warning("another daemon took over", action="lease_lost")
        except MoverError as error:
            # the platform database is away: the lease runs out and somebody claims it again
            log.warning("left for later", action="left", error=str(error))


@dataclass
class Work:
    """One claim: the migration's task beside its heartbeat."""

    claim: Claim
    store: MoveStore
    make_move: MoveMaker
    clock: Clock
    lease_s: float
    deadlines: Deadlines
    failures: dict[str, int]
    progress: Progress = field(default_factory=Progress)
    ended: Status | None = None
    _wish: Wish | None = None
    _move: Move | None = None
    _began_at: float = 0.0

    async def run(self) -> None:
        """Work until the migration rests, and leave it so that any daemon can go on."""
        self.progress = await self.store.load_progress(self.claim)
        self.progress.waiting_for = None
        self._began_at = self.clock.monotonic()
        task = asyncio.create_task(self._attempt(), name="attempt")
        heart = asyncio.create_task(self._beat(task), name="heartbeat")
        eyes = asyncio.create_task(self._watch(), name="measure")
        pulse = asyncio.create_task(self._feel_pulse(), name="pulse")
        with suppress(asyncio.CancelledError):  # the daemon stops: like a wish, but without one
            await asyncio.wait([task, heart], return_when=asyncio.FIRST_COMPLETED)
        await asyncio.gather(*(_end(each) for each in (task, heart, eyes)))
        await _end(pulse)  # last: it frees the others from a server that does not answer
        if not heart.cancelled() and (error := heart.exception()):
            raise error
        if task.cancelled():
            with suppress(TimeoutError):  # otherwise the lease runs out by itself
                async with asyncio.timeout(RELEASE_PATIENCE_S):
                    await self._obey()
        elif error := task.exception():
            raise error

    async def _attempt(self) -> None:
        migration = self.claim.migration
        try:
            self._move = move = await self.make_move(self.claim, self.progress)
            try:
                match migration.status:
                    case Status.ROLLING_BACK:
                        self.ended = await move.undo()
                    case Status.PAUSED:
                        await move.look_after_paused()
                    case Status.COMPLETED:
                        await move.watch_tombstone()
                    case Status.ROLLED_BACK:
                        await move.clear_abandoned()
                    case _:
                        self.ended = await move.run()
            finally:
                move.site.rest()
            self.failures.pop(str(migration.id), None)
            await self._save()
        except LeaseLost:
            raise
        except MoverError as error:
            await self._after(error)
        except Exception as error:
            # A bug of ours must not become a migration that is claimed again and again for ever.
            unexpected = MoverError(
                f"internal error: {type(error).__name__}", hint="The daemon's log has the trace."
            )
            unexpected.__cause__ = error
            await self._after(unexpected)

    async def _after(self, error: MoverError) -> None:
        """What the error's remedy says, and nothing else."""
        log.error(
            "stopped",
            action="stopped",
            code=error.code,
            remedy=error.remedy.value,
            error=str(error),
            exc_info=error if error.__cause__ is not None else None,
        )
        if self.claim.migration.status is Status.PAUSED:  # its own error stays, and is the operator's
            return await self.store.release(self.claim, PAUSED_LOOK_S)
        if isinstance(error, VerificationFailed):
            self.progress.evidence["mismatches"] = list(error.evidence)
        await self._save()
        await self.store.event(self.claim, str(error), "error", code=error.code, hint=error.hint or "")
        facts = describe(error)
        undoing = self.claim.migration.status is Status.ROLLING_BACK
        if await self._was_wished_meanwhile():
            await self.store.note_error(self.claim, facts)
            return await self._obey()
        match error.remedy:
            case Remedy.RETRY:
                await self._try_later(error)
            case Remedy.PAUSE if self.claim.migration.status is Status.MONITORING:
                await self._try_later(error)  # the tenant is served: it waits for the operator by itself
            case Remedy.PAUSE if not undoing:
                await self.store.set_status(self.claim, Status.PAUSED, error=facts)
                await self.store.release(self.claim)
            case Remedy.ABORT if not undoing and not await self.store.is_switched(self.claim):
                if isinstance(error, VerificationFailed):
                    await self.store.save_note(self.claim, TRIGGER, Trigger.INTEGRITY.value)
                await self.store.set_status(
                    self.claim, Status.ROLLING_BACK, error=facts, outcome=Status.FAILED
                )
                await self.store.release(self.claim)
            case _:
                await self.store.note_error(self.claim, facts)
                await self.store.release(self.claim, HALTED_S)

    async def _was_wished_meanwhile(self) -> bool:
        """What failed may fail again and again before a wish is heard: it is asked for here, too."""
        self._wish = await self.store.heartbeat(self.claim, self.lease_s)
        rests = self._move is None or self._move.may_rest
        if self._wish is None or not rests:
            return False
        return self._wish is Wish.ROLLBACK or not await self.store.is_switched(self.claim)

    async def _try_later(self, error: MoverError) -> None:
        key = str(self.claim.migration.id)
        self.failures[key] = self.failures.get(key, 0) + 1
        first, longest = BACKOFF_S
        delay = min(HALF_DONE_S if self._is_half_done else longest, first * 2 ** (self.failures[key] - 1))
        self._pass_time(delay)
        attempt_s = self.clock.monotonic() - self._began_at
        # What has lasted longer has got on meanwhile.
        failed_s = self.progress.failing_s + attempt_s if attempt_s < longest else 0
        self.progress.failing_s = failed_s + delay
        self.progress.waiting_for = f"{error}; trying again in {delay:.0f} s"
        await self._save()
        await self.store.note_error(self.claim, describe(error))
        await self._ask_if_overdue()
        await self._ask_without_target()
        await self.store.release(self.claim, delay)

    @property
    def _is_half_done(self) -> bool:
        return self._move is not None and not self._move.may_rest

    def _pass_time(self, seconds: float) -> None:
        self.progress.worked_s += seconds
        self.progress.phase_worked_s += seconds

    async def _ask_if_overdue(self) -> None:
        """Ask for a rollback where the switch takes too long to come."""
        if self.claim.migration.status is Status.IN_PROGRESS and (
            found := overdue(self.progress, self.deadlines)
        ):
            await ask_for_rollback(self.store, self.claim, *found)

    async def _ask_without_target(self) -> None:
        longest = self.deadlines.unreachable_s
        if not 0 < longest < self.progress.failing_s or self.claim.migration.status is not Status.IN_PROGRESS:
            return
        if self._move is not None and not await self._move.site.target_answers():
            why = f"the target has not answered for {self.progress.failing_s / 60:.1f} minutes"
            await ask_for_rollback(self.store, self.claim, Trigger.TARGET_UNREACHABLE, why)

    async def _obey(self) -> None:
        """The task was cancelled: by a wish, or because the daemon stops."""
        await self._save()
        switched = self._wish is not None and await self.store.is_switched(self.claim)
        rests = self._move is None or self._move.may_rest
        if self._wish is not None and not rests:
            await self.store.event(
                self.claim, f"{self._wish} waits: the outcome of the cutover comes first", "warning"
            )
        elif self._wish is Wish.ROLLBACK:
            await self._roll_back()
        elif switched:
            await self.store.event(
                self.claim, f"{self._wish} came after the switch and is ignored", "warning"
            )
        elif self._wish is Wish.PAUSE:
            await self.store.set_status(self.claim, Status.PAUSED)
        elif self._wish is Wish.CANCEL:
            await self.store.set_status(self.claim, Status.ROLLING_BACK, outcome=Status.CANCELLED)
        await self.store.release(self.claim)
        log.info("released", action="release", wish=self._wish and self._wish.value)

    async def _roll_back(self) -> None:
        try:
            await self.store.set_status(self.claim, Status.ROLLING_BACK, outcome=Status.ROLLED_BACK)
        except Conflict as error:
            await self.store.event(self.claim, f"rollback came too late: {error}", "warning")

    async def _beat(self, task: asyncio.Task[None]) -> None:
        """Renew the lease, show progress, hear wishes. Losing the lease ends the work at once."""
        beat_every = self.lease_s / HEARTBEATS_PER_LEASE
        renewed = beat_at = self.clock.monotonic()
        while True:
            if self.clock.monotonic() >= beat_at:
                try:
                    self._wish = await self.store.heartbeat(self.claim, self.lease_s)
                    renewed = self.clock.monotonic()
                except LeaseLost:
                    raise
                except MoverError as error:
                    if self.clock.monotonic() - renewed > self.lease_s:
                        raise LeaseLost("the lease ran out while the platform database was away") from error
                beat_at = self.clock.monotonic() + beat_every
            if self._wish is not None and self._move is not None:
                self._move.wish_waits = True
                # A cutover that somebody left half-way is settled before any wish is obeyed.
                if self._move.may_rest:
                    task.cancel()
                    return
            await self.clock.sleep(WISH_S if self._wish is not None else min(PROGRESS_S, beat_every))

    async def _watch(self) -> None:
        """Show progress, and whether it takes too long; apart from the heartbeat, which must not wait for
        source or target."""
        looked_at = self.clock.monotonic()
        while True:
            now = self.clock.monotonic()
            self._pass_time(now - looked_at)
            looked_at = now
            try:
                await self._ask_if_overdue()
                await self._save()
                if self._move is not None:
                    await self._move.measure()
            except MoverError as error:
                log.debug("progress not saved", action="progress", error=str(error))
            await self.clock.sleep(PROGRESS_S)

    async def _feel_pulse(self) -> None:
        """While a server does not answer the status says so, and nobody waits for it for ever."""
        while (move := self._move) is None:
            await self.clock.sleep(WISH_S)
        trouble: str | None = None

        def show(found: str | None) -> None:
            nonlocal trouble
            if self.progress.waiting_for in (None, trouble):
                self.progress.waiting_for = trouble = found

        await move.site.watch_pulse(show)

    async def _save(self) -> None:
        await self.store.save_progress(self.claim, self.progress)


async def _end(task: asyncio.Task[None]) -> None:
    """Cancel it, and again later: a connection that breaks while it is being cancelled takes the
    cancellation's place. Not before its time, which would tear a cutover that is ending itself."""
    if not task.cancelling():
        task.cancel()
    while not task.done():
        await asyncio.wait([task], timeout=CANCEL_AGAIN_S)
        task.cancel()


def describe(error: MoverError) -> Mapping[str, str]:
    """The API's error object."""
    facts = {"code": error.code, "message": str(error), "hint": error.hint}
    where = {"tenant": error.where.tenant, "table": error.where.table, "lsn": error.where.lsn}
    return {key: str(value) for key, value in (facts | where).items() if value is not None}
