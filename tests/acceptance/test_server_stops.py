"""`pg_ctl stop -m immediate` of each server at every stage of a migration, and its start again, while the
tenant's application writes. Its own connections break, too: what it was told is there in the end, and nothing
twice."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest

from mover.core.ids import Capture
from mover.demo.servers import PostgresServer
from mover.demo.stage import Stage
from tests.acceptance.test_network_faults import (
    RETURNING,
    SIDES,
    everywhere,
    goes_on_or_says_why,
    return_begun,
    until_ended,
    until_next_point,
)
from tests.acceptance.test_rollback import LONG_WINDOW, until_written
from tests.support.acceptance import CORE, ESTATE, PLATFORM, Scene, Watch, killed, stops_at
from tests.support.checks import leftovers
from tests.support.waiting import until

ENDING = ("cleanup.begun", "removal.batch", "cleanup.identity.done")
# On each side; the rest is marked `faults`.
CHOSEN = [
    pytest.param(CORE, ("copy.chunk", "cutover.closed", "cutover.decided"), Capture.WAL, id="core"),
    pytest.param(ESTATE, ("copy.chunk", "cutover.closed", "cutover.decided"), Capture.WAL, id="realestate"),
    pytest.param(PLATFORM, ("cutover.deciding",), Capture.WAL, id="platform"),
]
ALL = [
    pytest.param(
        side,
        [point for point in everywhere(side) if point not in ENDING],
        capture,
        id=f"{side}-{capture}-everywhere",
        marks=pytest.mark.faults,
    )
    for side in SIDES
    for capture in Capture
    if capture is Capture.WAL or side == CORE  # the others do not notice how it is followed
]


@dataclass
class Stops:
    """Of the server on one side."""

    scene: Scene
    side: str
    server: PostgresServer
    watch: Watch
    stage: Stage

    async def at(self, points: Sequence[str]) -> None:
        """It stops at each of these points, where the daemon stands still, and comes back when this shows."""
        for _ in points:
            await until_next_point(self.watch, self.stage)
            saved = self.watch.row["progress"]
            if self.side == CORE:
                self.watch.thaw()
            async with self.stopped():
                self.stage.send_signal(signal.SIGCONT)
                await goes_on_or_says_why(self.side, self.watch, self.stage, saved)

    @asynccontextmanager
    async def stopped(self) -> AsyncIterator[None]:
        await asyncio.to_thread(self.server.stop_immediately)
        try:
            yield
        finally:  # other tests need it, too
            await asyncio.to_thread(self.server.come_back)


@pytest.fixture
def stops(spare_server, pg16, pg18, make_scene):
    """`stops(side, capture, **engine)`: on a scene whose platform database has a server of its own."""

    def make(side: str, capture: Capture = Capture.WAL, **engine: object) -> Stops:
        scene = make_scene(pg16, pg18, platform=spare_server, capture=capture)
        server = {CORE: pg16, ESTATE: pg18, PLATFORM: spare_server}[side]
        return Stops(scene, side, server, scene.watch(), scene.stage(**engine))

    return make


@pytest.mark.parametrize(("side", "points", "capture"), [*CHOSEN, *ALL])
async def test_a_migration_survives_a_server_that_stops(stops, side, points, capture):
    world = stops(side, capture)
    watch, stage = world.watch, world.stage
    async with killed(stage):
        async with world.scene.writing() as workload:
            await stage.start(**stops_at(*points))
            await watch.submit(stage)
            await world.at(points)
            await until_written(workload, 50)
            await until_ended(watch, "completed")
    watch.check_completed()


@pytest.mark.faults
@pytest.mark.parametrize("side", SIDES)
async def test_a_clean_up_survives_a_server_that_stops(stops, side):
    """The source's rows are compared before it stops: afterwards some are gone."""
    world = stops(side)
    watch, stage, first = world.watch, world.stage, "monitor.done"
    async with killed(stage):
        async with world.scene.writing():
            await stage.start(**stops_at(first, *ENDING))
            await watch.submit(stage)
            await watch.until_frozen(stage)
        watch.check_switched()
        async with world.scene.writing() as workload:
            stage.send_signal(signal.SIGCONT)
            await world.at(ENDING)
            await until_written(workload, 50)
            await until_ended(watch, "completed")
    watch.check_completed()


@pytest.mark.faults
@pytest.mark.parametrize("side", SIDES)
async def test_a_return_survives_a_server_that_stops(stops, side):
    world = stops(side, monitoring_hours=LONG_WINDOW, abandoned_hours=0)
    watch, stage = world.watch, world.stage
    async with killed(stage):
        async with world.scene.writing() as workload:
            await return_begun(watch, stage, workload, RETURNING)
            await world.at(RETURNING)
            await until_ended(watch, "rolled_back")
            await until_written(workload, 50)
        await until(lambda: leftovers(watch.target.url) == [])
    watch.check_undone("rolled_back")
