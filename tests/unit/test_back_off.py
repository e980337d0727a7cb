"""When a migration that failed is tried again."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from mover.core.errors import Unreachable
from mover.core.states import Status
from mover.core.triggers import Deadlines
from mover.engine.daemon import BACKOFF_S, HALF_DONE_S, Work
from tests.unit.test_wishes import LEASE_S, Clock, Platform

FAILURES = 9


class Queue(Platform):
    """A store that nobody wishes anything of, and that hears when the migration is due again."""

    def __init__(self) -> None:
        super().__init__()
        self.due_after_s: float | None = None

    async def heartbeat(self, claim, lease_s): ...

    async def note_error(self, claim, error) -> None: ...

    async def release(self, claim, after_seconds=0) -> None:
        self.due_after_s = after_seconds


@pytest.mark.parametrize(("may_rest", "longest_s"), [(True, BACKOFF_S[1]), (False, HALF_DONE_S)])
async def test_the_outcome_of_a_cutover_is_looked_for_again_soon(may_rest, longest_s):
    """However often that has failed: writers may be waiting for it."""
    store = Queue()

    async def run() -> None:
        raise Unreachable("the source does not answer")

    async def idle(*_) -> None: ...

    async def make_move(claim, progress):
        site = SimpleNamespace(rest=lambda: None, watch_pulse=idle)
        return SimpleNamespace(run=run, measure=idle, may_rest=may_rest, site=site)

    migration = SimpleNamespace(id="m", status=Status.IN_PROGRESS, phase=None)
    claim = SimpleNamespace(migration=migration, epoch=1)
    work = Work(claim, store, make_move, Clock(), LEASE_S, Deadlines(0, 0, 0), {"m": FAILURES})
    async with asyncio.timeout(5):
        await work.run()
    assert store.due_after_s == longest_s
