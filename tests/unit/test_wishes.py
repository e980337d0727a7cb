"""When a daemon's work hears and obeys what an operator wishes."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

from mover.core.migration import Progress, Wish
from mover.core.states import Status
from mover.core.triggers import Deadlines
from mover.engine.daemon import Work

LEASE_S = 3600.0  # a second heartbeat is out of reach


class Clock:
    """The second in which a small migration is over does not end."""

    def monotonic(self) -> float:
        return asyncio.get_running_loop().time()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds if seconds < 0.5 else 3600)


class Platform:
    """A store with a wish that was there before the claim."""

    def __init__(self) -> None:
        self.ended_as: Status | None = None

    async def load_progress(self, claim):
        return Progress()

    async def save_progress(self, claim, progress) -> None: ...

    async def heartbeat(self, claim, lease_s):
        return Wish.CANCEL

    async def is_switched(self, claim):
        return False

    async def set_status(self, claim, status, *, error=None, outcome=None) -> None:
        self.ended_as = outcome

    async def event(self, claim, message, level="info", **facts) -> None: ...

    async def release(self, claim, after_seconds=0) -> None: ...


async def test_a_wish_from_before_the_claim_is_obeyed_as_soon_as_there_is_work_to_end():
    """Not at the next heartbeat: a small migration would be over by then."""

    async def run() -> None:
        await asyncio.Event().wait()

    assert await outcome(SimpleNamespace(run=run, may_rest=True)) is Status.CANCELLED


async def test_a_move_learns_of_a_wish_before_it_may_be_ended():
    """It settles what somebody left half-way; then no cutover must begin before it is ended."""

    async def run() -> None:
        while not move.wish_waits:  # noqa: ASYNC110, as the move itself does
            await asyncio.sleep(0)
        move.may_rest = True
        await asyncio.Event().wait()

    move = SimpleNamespace(run=run, may_rest=False, wish_waits=False)
    assert await outcome(move) is Status.CANCELLED


async def outcome(move: SimpleNamespace) -> Status | None:
    """Of a migration that somebody wished to cancel before it was claimed."""
    store = Platform()
    migration = SimpleNamespace(id="m", status=Status.IN_PROGRESS, phase=None)
    claim = SimpleNamespace(migration=migration, epoch=1)

    async def measure() -> None: ...

    async def watch_pulse(say) -> None: ...

    async def make_move(claim, progress):
        await asyncio.sleep(0)  # the first heartbeat is over before there is a move
        await asyncio.sleep(0)
        move.measure, move.site = measure, SimpleNamespace(rest=lambda: None, watch_pulse=watch_pulse)
        return move

    work = asyncio.create_task(Work(claim, store, make_move, Clock(), LEASE_S, Deadlines(0, 0, 0), {}).run())
    ended, _ = await asyncio.wait([work], timeout=5)
    work.cancel()
    assert ended
    return store.ended_as
