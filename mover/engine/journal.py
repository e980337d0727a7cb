"""One migration's journal: what its phases and steps have come to, and what people are told meanwhile."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

import structlog

from mover.core.crash import reach
from mover.core.errors import LeaseLost, MoverError
from mover.core.migration import Claim, Progress
from mover.core.states import PHASES, Phase
from mover.core.triggers import Trigger
from mover.ports import Clock, MoveStore

log = structlog.get_logger()


async def ask_for_rollback(store: MoveStore, claim: Claim, trigger: Trigger, why: str) -> None:
    """As an operator would; nothing where that is asked for already, or cannot be."""
    if await store.trigger(claim, trigger, why):
        await store.event(claim, f"rollback asked by {trigger}: {why}", "error")


@dataclass(frozen=True, slots=True)
class Journal:
    """That of one claim's work."""

    claim: Claim
    store: MoveStore
    progress: Progress
    clock: Clock
    phase_took: Callable[[Phase, float], None]

    def was_reached(self, phase: Phase) -> bool:
        """Whether an earlier owner had begun `phase`."""
        reached = self.claim.migration.phase
        return reached is not None and PHASES.index(reached) >= PHASES.index(phase)

    @asynccontextmanager
    async def phase(self, phase: Phase) -> AsyncIterator[None]:
        """One that an earlier owner had passed is only checked again."""
        started = self.clock.monotonic()
        if not self.was_reached(phase) or self.claim.migration.phase is phase:
            await self.store.enter_phase(self.claim, phase)
        if not self.was_reached(phase):
            self.progress.phase_worked_s = 0.0
        structlog.contextvars.bind_contextvars(phase=phase.value)
        looking_again = phase is Phase.MONITOR and self.claim.migration.phase is phase
        if not looking_again:
            await self.say(f"{phase}: begins")
        async with self.line(phase.value):
            yield
        seconds = self.clock.monotonic() - started
        self.phase_took(phase, seconds)
        if not looking_again:
            await self.say(f"{phase}: done in {seconds:.1f} s")

    async def step(self, name: str, action: Callable[..., Awaitable[None]], *arguments: object) -> None:
        async with self.line(name):
            await action(*arguments)

    @asynccontextmanager
    async def line(self, name: str) -> AsyncIterator[None]:
        """Written before the world changes."""
        self.progress.waiting_for = None
        await self.store.begin_step(self.claim, name)
        reach(f"{name}.begun")
        try:
            yield
        except LeaseLost:
            raise
        except MoverError as error:
            with suppress(MoverError):  # the first error is the one that counts
                await self.store.end_step(self.claim, name, detail=str(error), ok=False)
            raise
        reach(f"{name}.done")
        self.progress.waiting_for = None
        await self.store.end_step(self.claim, name)

    async def is_done(self, name: str) -> bool:
        """Whether it has the step as done."""
        return any(step.name == name and step.status == "done" for step in await self.store.steps(self.claim))

    async def is_begun(self, name: str) -> bool:
        """Whether it has the step at all, however it ended."""
        return any(step.name == name for step in await self.store.steps(self.claim))

    async def wait_for(self, reason: str) -> None:
        """Nothing moves until somebody else does: shown in the status until the next step."""
        self.progress.waiting_for = reason
        await self.say(reason)

    async def say(self, message: str, level: str = "info") -> None:
        """To whoever watches the migration, and to the log."""
        log.log(logging.getLevelNamesMapping()[level.upper()], message, action="event")
        await self.store.event(self.claim, message, level)
