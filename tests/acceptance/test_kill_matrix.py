"""Every crash point: the daemon is killed there, or stands still there and comes back when another one has
gone on. Whatever happens, and whenever: the ledger is complete, nothing is there twice, both sides are
equal, other tenants are untouched, and nothing is left behind.

A point that is not passed would make the daemon live on: the test would fail.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest

from mover.core.ids import Capture
from mover.core.migration import Wish
from mover.demo.stage import Stage
from mover.engine.losses import LOST, LOST_BACK
from tests.acceptance.test_rollback import LONG_WINDOW
from tests.conftest import every_combination
from tests.support.acceptance import Home, Scene, Watch, at, clean, lives, until_stopped
from tests.support.checks import leftovers
from tests.support.crash_points import (
    CANCELLING,
    ENDING,
    GIVING_UP,
    OF_THE_STREAM,
    PREPARING,
    RESYNCHRONISING,
    RESYNCHRONISING_BACK,
    RETURN_IS_COMPARED,
    RETURNING,
    SWITCHING,
    TOMBSTONE,
    TRANSFERRING,
)
from tests.support.waiting import until

pytestmark = pytest.mark.kill

LEASE_S = 600  # an owner that died or stands still is relieved by the test, not by time
REACH_TIMEOUT_S = 60
RELIEVE = "update platform.tenant_migrations set lease_until = now(), not_before = null where id = %s"
IS_OVER = """
select status in ('completed', 'cancelled', 'rolled_back')
       and coalesce(tombstone_check_at > now() + '1 minute', true)
  from platform.tenant_migrations where id = %s
"""
TOLD = "select facts from platform.migration_events where migration_id = %s"
LOSE = (
    "update platform.tenant_migrations set notes = notes || jsonb_build_object(%s::text, true) where id = %s"
)
TINY, SECONDS = 1e-9, 1 / 86_400  # of a gigabyte; of a day


@pytest.fixture(params=[signal.SIGKILL, signal.SIGSTOP], ids=["killed", "zombie"])
def blow(request: pytest.FixtureRequest) -> signal.Signals:
    return request.param


@dataclass
class Chain:
    """One migration, and the daemons that own it one after the other."""

    scene: Scene
    watch: Watch
    blow: signal.Signals
    tasks: asyncio.TaskGroup
    engine: dict[str, object] = field(default_factory=dict)
    stages: list[Stage] = field(default_factory=list)
    watching: asyncio.Task[None] | None = None

    async def begin(self, point: str | None = None) -> None:
        """The migration is asked for; its first owner gets as far as `point`, or goes on."""
        stage = self._stage()
        await stage.start(**(at(point, self.blow) if point else {}))
        await self.watch.submit(stage)
        self.watching = self.tasks.create_task(self.watch.for_ever())
        if point:
            await self._struck(stage)

    async def meet(self, points: Sequence[str]) -> None:
        """An owner for each point, who gets there and no further."""
        for point in points:
            if self.scene.capture is Capture.WAL or point not in OF_THE_STREAM:
                await self._relieved_by(self._stage(), at(point, self.blow))
                await self._struck(self.stages[-1])
                await self._awaken(self.stages[-2])

    async def go_on(self, *statuses: str) -> Stage:
        """By an owner to whom nothing happens, until the status is one of these."""
        stage = self._stage()
        if await self._relieved_by(stage, {}):
            await self._awaken(self.stages[-2])
        await self.watch.until(*statuses)
        return stage

    async def wish(self, wish: Wish) -> None:
        await self.scene.wish(self.watch, wish)

    def lose(self, note: str) -> None:
        """As if the slot were gone: nobody knows what the other side lacks."""
        self.scene.platform.execute(LOSE, note, self.watch.id)

    async def until_nothing_is_left(self, home: Home) -> None:
        """By whoever looks next; a lease need not run out."""

        def is_clean() -> bool:
            self.scene.platform.execute(RELIEVE, self.watch.id)
            return leftovers(home.url) == []

        await until(is_clean)

    async def end(self) -> None:
        for stage in self.stages:
            await stage.kill()
        if self.watching is not None:
            self.watching.cancel()

    def _stage(self) -> Stage:
        name = f"daemon{len(self.stages)}"
        self.stages.append(stage := self.scene.stage(name, lease_seconds=LEASE_S, **self.engine))
        return stage

    async def _relieved_by(self, stage: Stage, environment: dict[str, str]) -> bool:
        """False where the one before died or froze after its last word: nobody claims it any more."""
        epoch = self.watch._read()["epoch"]
        self.scene.platform.execute(RELIEVE, self.watch.id)
        await stage.launch(**environment)
        if self._is_over():
            return False
        await until(lambda: self.watch._read()["epoch"] > epoch or stage.process.returncode is not None)
        return True

    def _is_over(self) -> bool:
        ((over,),) = self.scene.platform.execute(IS_OVER, self.watch.id)
        return over

    async def _awaken(self, zombie: Stage) -> None:
        """It learns that somebody else has gone on, and changes nothing."""
        if not lives(zombie):
            return
        zombie.send_signal(signal.SIGCONT)
        await until(lambda: "lease_lost" in zombie.log_path.read_text())
        await zombie.kill()  # it would claim other migrations, and this one when its lease is ended

    async def _struck(self, stage: Stage) -> None:
        try:
            if self.blow is signal.SIGSTOP:
                return await until_stopped(stage, REACH_TIMEOUT_S)
            async with asyncio.timeout(REACH_TIMEOUT_S):
                code = await stage.wait()
        except TimeoutError as error:
            raise AssertionError(f"not reached: {self._state_of(stage)}") from error
        assert code == -self.blow, self._state_of(stage)

    def _state_of(self, stage: Stage) -> object:
        return stage.name, self.watch.row, self.watch.seen, stage.log_path.read_text()[-3000:]


@every_combination
@pytest.mark.parametrize("shared", [False, True], ids=["fresh", "shared"])
@pytest.mark.parametrize(
    "points",
    [PREPARING, TRANSFERRING, SWITCHING, ENDING],
    ids=["preparing", "transferring", "switching", "ending"],
)
async def test_a_migration_completes(pg16, pg18, make_scene, points, shared, capture, blow):
    async with chain(make_scene(pg16, pg18, shared=shared, capture=capture), blow) as made:
        await made.begin(points[0])
        await made.meet(points[1:])
        await made.go_on("completed")
    made.watch.check_completed()


@every_combination
async def test_a_tombstone_goes(pg16, pg18, make_scene, capture, blow):
    scene = make_scene(pg16, pg18, capture=capture)
    async with chain(scene, blow, tombstone_days=SECONDS) as made:
        await made.begin()
        await made.watch.until("completed")
        await made.stages[0].kill()
        await made.meet(TOMBSTONE)
        await made.go_on("completed")
        await made.until_nothing_is_left(made.watch.source)


@every_combination
@pytest.mark.parametrize("shared", [False, True], ids=["fresh", "shared"])
async def test_a_migration_that_is_called_off_leaves_nothing(pg16, pg18, make_scene, shared, capture, blow):
    async with chain(make_scene(pg16, pg18, shared=shared, capture=capture), blow) as made:
        await made.begin("cutover.closed")
        await made.wish(Wish.CANCEL)
        await made.meet([p for p in CANCELLING if shared or p != "removal.batch"])
        await made.go_on("cancelled")
    made.watch.check_undone("cancelled")


@every_combination
@pytest.mark.parametrize("points", [RETURNING, *[[each] for each in RETURN_IS_COMPARED]], ids=lambda p: p[0])
async def test_a_tenant_comes_back(pg16, pg18, make_scene, points, capture, blow):
    scene = make_scene(pg16, pg18, shared=True, capture=capture)
    async with chain(scene, blow, monitoring_hours=LONG_WINDOW, abandoned_hours=0) as made:
        await made.begin()
        await made.watch.until("monitoring")
        await made.wish(Wish.ROLLBACK)
        await made.stages[0].kill()
        await made.meet(points)
        await made.go_on("rolled_back")
        await made.until_nothing_is_left(made.watch.target)
    made.watch.check_undone("rolled_back")
    told = {name for facts in scene.platform.execute(TOLD, made.watch.id) for name in facts[0]}
    assert {"alert", "billing"} <= told


@every_combination
async def test_lost_changes_are_made_good(pg16, pg18, make_scene, capture, blow):
    async with chain(make_scene(pg16, pg18, shared=True, capture=capture), blow) as made:
        await made.begin("verify.begun")
        made.lose(LOST)
        await made.meet(RESYNCHRONISING)
        await made.go_on("completed")
    made.watch.check_completed()


@every_combination
async def test_lost_changes_are_made_good_on_the_way_back(pg16, pg18, make_scene, capture, blow):
    scene = make_scene(pg16, pg18, shared=True, capture=capture)
    async with chain(scene, blow, monitoring_hours=LONG_WINDOW, abandoned_hours=0) as made:
        await made.begin()
        await made.watch.until("monitoring")
        await made.stages[0].kill()
        made.lose(LOST_BACK)
        await made.meet(RESYNCHRONISING_BACK)
        await made.wish(Wish.ROLLBACK)
        await made.go_on("rolled_back")
        await made.until_nothing_is_left(made.watch.target)
    made.watch.check_undone("rolled_back")


@every_combination
async def test_a_way_back_that_keeps_too_much_is_given_up(pg16, pg18, make_scene, capture, blow):
    scene = make_scene(pg16, pg18, capture=capture)
    async with chain(scene, blow, monitoring_hours=LONG_WINDOW) as made:
        await made.begin()
        await made.watch.until("monitoring")
        await made.stages[0].kill()
        made.engine["max_retained_gb"] = TINY
        await made.meet(GIVING_UP)
        made.engine["monitoring_hours"] = {"database": 0.0}
        await made.go_on("completed")
    made.watch.check_completed()


@asynccontextmanager
async def chain(scene: Scene, blow: signal.Signals, **engine: object) -> AsyncIterator[Chain]:
    """Under writers of the tenant, and of another one who stays."""
    other = scene.tenants[1].id
    watch = scene.watch(writers=[other])
    async with scene.writing(others=[other]) as workload, asyncio.TaskGroup() as tasks:
        made = Chain(scene, watch, blow, tasks, dict(engine))
        try:
            yield made
        finally:
            await made.end()
    clean(workload.report())
