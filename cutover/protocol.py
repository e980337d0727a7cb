"""The fenced cutover, top to bottom.

Invariants, whatever dies and whenever:
- at most one side accepts the tenant's writes;
- nothing commits for the tenant between the mark and the opening of the target;
- switched implies drained, verified, and the fence held;
- it is decided once: "the target is open" and "the route is switched" never contradict each other.

Until the decision has been sent, everything is undone by reopening the source. Once it may have
committed, the only way is forward: the source stays closed until the outcome is known.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from cutover.ports import Cache, Decision, Drain, Fence, Gate, Proof, Sequences, TargetFence
from mover.core.crash import reach
from mover.core.errors import (
    CutoverAborted,
    LockNotAvailable,
    MoverError,
    OutcomeUnknown,
    Remedy,
    first_error,
)
from mover.ports import Clock

# Share of the budget that in-flight writers may use to end.
LOCK_SHARE = 0.3
# Between tries of something that must succeed before the tenant can write again.
RETRY_S = 0.1


@dataclass(slots=True)
class Stopwatch:
    """How long each step of the pause took, in milliseconds."""

    clock: Clock
    steps_ms: dict[str, float] = field(default_factory=dict)

    @asynccontextmanager
    async def step(self, name: str) -> AsyncIterator[None]:
        started = self.clock.monotonic()
        try:
            yield
        finally:
            self.steps_ms[name] = round((self.clock.monotonic() - started) * 1000, 2)


@dataclass(frozen=True, slots=True)
class Ends:
    """What settling a cutover touches."""

    source: Fence
    target: TargetFence
    decision: Decision
    cache: Cache
    clock: Clock


@dataclass(frozen=True, slots=True)
class World(Ends):
    """What a cutover touches. The gate is None where nothing is to flow back."""

    drain: Drain
    proof: Proof
    sequences: Sequences
    gate: Gate | None


@dataclass(frozen=True, slots=True)
class Report:
    """What happened, for the status, the journal and the metrics."""

    pause_ms: float
    steps_ms: Mapping[str, float]
    evidence: Mapping[str, object]


async def cut_over(world: World, budget_s: float) -> Report:
    """Move the tenant's writes from source to target within `budget_s` of pause, or not at all.

    Raises CutoverAborted, VerificationFailed or what stood in the way: then the source serves as before.
    Raises OutcomeUnknown when the decision's answer was lost: then only `recover` may go on."""
    watch = Stopwatch(world.clock)
    try:
        for part in (world.proof, world.sequences, world.target, world.source):
            await part.get_ready()
        await world.drain.catch_up_once()  # so that little is left, and nothing under way to be waited for
        started = world.clock.monotonic()
        evidence = await _close_and_prove(world, budget_s, watch)
        async with watch.step("decide"):
            await _decide(world, evidence)
        await _finish(world, watch)
        pause_ms = round((world.clock.monotonic() - started) * 1000, 2)
        await world.cache.invalidate()
        reach("cutover.flushed")
    finally:
        await world.source.let_go()
        await world.target.let_go()
    return Report(pause_ms, dict(watch.steps_ms), evidence)


async def recover(ends: Ends) -> bool:
    """Settle a cutover whose owner died in the middle; says whether the tenant was switched.

    The new owner's epoch already keeps the old one from deciding or opening. The target's fence is
    the arbiter: aborted first, then nobody can open it behind our back. A target that is open has been
    decided for, whatever the platform remembers: then the route follows it."""
    aborted = await ends.target.abort()
    reach("recovery.aborted")
    if not aborted:
        await ends.decision.switch({"recovered": "the target was open"})
    elif not await ends.decision.is_switched():
        await ends.source.reopen()
        reach("recovery.reopened")
        await ends.target.close_again()
        return False
    await _finish(ends, Stopwatch(ends.clock))
    await ends.cache.invalidate()
    reach("cutover.flushed")
    return True


async def _close_and_prove(world: World, budget_s: float, watch: Stopwatch) -> Mapping[str, object]:
    """All that can still be undone; undone by reopening when it fails or the budget is spent."""
    try:
        async with asyncio.timeout(budget_s):
            async with watch.step("close"):
                mark = await world.source.close(budget_s * LOCK_SHARE)
            reach("cutover.closed")
            return await _prove(world, mark, watch)
    except TimeoutError:
        await _undo(world)
        raise CutoverAborted(f"the pause budget of {budget_s:.1f} s was spent: {watch.steps_ms}") from None
    except LockNotAvailable as error:
        await _undo(world)
        raise CutoverAborted(f"under the fence: {error}") from error
    except BaseException:
        await _undo(world)
        raise


async def _undo(world: World) -> None:
    """Tried until it is done: nobody else lets the tenant write again while we live."""
    await _until_done(world, world.source.reopen)


async def _prove(world: World, mark: str, watch: Stopwatch) -> Mapping[str, object]:
    """Under the fence: everything is on the target, equal, its sequences are ahead, and the way back begins
    behind it."""
    async with watch.step("drain"):
        await world.drain.reached(mark)
        reach("cutover.drained")
    async with watch.step("verify"):
        with first_error():
            async with asyncio.TaskGroup() as tasks:
                equal = tasks.create_task(world.proof.changed_rows_equal(), name="changed rows")
                tasks.create_task(world.sequences.carry_over(), name="sequences")
                if world.gate is not None:
                    tasks.create_task(world.gate.set(), name="gate")
    return equal.result()


async def _decide(world: World, evidence: Mapping[str, object]) -> None:
    """The point of no return. An error that says "certainly not" undoes; after any other, also a
    cancellation, the source stays closed until `recover` knows."""
    try:
        reach("cutover.proved")
        await world.decision.switch(evidence)
        reach("cutover.decided")
    except OutcomeUnknown:
        raise
    except MoverError:
        await _undo(world)
        raise


async def _finish(ends: Ends, watch: Stopwatch) -> None:
    """Decided: open the target, then tell the waiting writers. Tried until it is done."""
    async with watch.step("open"):
        await _until_done(ends, ends.target.open)
    reach("cutover.opened")
    async with watch.step("release"):
        await _until_done(ends, ends.source.move_away)
    reach("cutover.released")


async def _until_done(ends: Ends, action: Callable[[], Awaitable[None]]) -> None:
    """Repeats what may only succeed. A lost lease ends it: the new owner goes on from here."""
    while True:
        try:
            return await action()
        except MoverError as error:
            if error.remedy is not Remedy.RETRY:
                raise
            await ends.clock.sleep(RETRY_S)
