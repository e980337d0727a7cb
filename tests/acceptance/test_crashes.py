"""kill -9 of the daemon at every named moment of a migration, each time followed by a restart, while the
tenant's application writes: the migration completes, and nothing is lost.

A crash point that the way does not pass would make the daemon live on: the test would fail.
"""

from __future__ import annotations

import asyncio
import signal
import time

import pytest

from mover.config import Engine
from mover.core.ids import Capture
from mover.core.migration import Wish
from mover.demo.stage import Stage
from tests.support.acceptance import Watch, at, clean, killed

# A dead daemon's migration is claimed again after so long.
LEASE_S = 1.0
# The daemon needs this to be up and to get there.
REACH_TIMEOUT_S = 60

PREPARING = (
    "preflight.begun",
    "preflight.done",
    "provision.done",
    "prepare.ownership.done",
    "prepare.schemas.begun",
    "prepare.schemas.done",
    "identity.recorded",
    "identity.built",
    "prepare.identity.done",
    "prepare.sequences.done",
    "guards.target",
    "prepare.guards.done",
    "stream.published",
    "stream.slot",
    "prepare.done",
)
TRANSFERRING = (
    "copy.begun",
    "copy.chunk",
    "follow.applied",
    "copy.done",
    "index.done",
    "catch_up.done",
    "verify.done",
)
SWITCHING = (
    "cutover.begun",
    "cutover.closed",
    "recovery.aborted",
    "cutover.proved",
    "cutover.deciding",
    "cutover.decided",
    "cutover.opened",
)
ENDING = (
    "cutover.done",
    "monitor.begun",
    "monitor.keep_target.done",
    "monitor.stop_stream.done",
    "monitor.done",
    "removal.batch",
    "cleanup.source_rows.done",
    "cleanup.identity.done",
    "cleanup.target_guards.done",
    "forgotten.source",
    "forgotten.target",
    "cleanup.done",
)
UNDOING = (
    "undo.stream.begun",
    "undo.stream.done",
    "undo.source_guards.done",
    "undo.identity.done",
    "forgotten.source",
    "undo.target_guards.done",
    "undo.target_rows.done",
    "forgotten.target",
)


# What only the stream needs is not reached by triggers.
OF_THE_STREAM = {"identity.recorded", "identity.built", "stream.published", "stream.slot"}


@pytest.mark.parametrize(
    ("points", "shared"),
    [(PREPARING, False), (TRANSFERRING, True), (SWITCHING, False), (ENDING, True)],
    ids=["while preparing", "while rows flow", "while switching", "while ending"],
)
async def test_a_migration_survives_kill_9(pg16, pg18, make_scene, points, shared, capture):
    scene = make_scene(pg16, pg18, shared=shared, capture=capture)
    points = [p for p in points if capture is Capture.WAL or p not in OF_THE_STREAM]
    other = scene.tenants[1].id
    watch = scene.watch(writers=[other])
    stage = scene.stage(lease_seconds=LEASE_S)
    async with scene.writing(others=[other]) as workload:
        first, *more = points
        async with killed(stage):
            await stage.start(**at(first))
            await watch.submit(stage)
            await dies(stage, watch)
            for point in more:
                await stage.launch(**at(point))
                await dies(stage, watch)
            await stage.start()
            await watch.until("completed")
    clean(workload.report())
    watch.check_completed()


@pytest.mark.parametrize("shared", [False, True], ids=["empty target", "shared target"])
async def test_calling_a_migration_off_survives_kill_9(pg16, pg18, make_scene, shared, capture):
    scene = make_scene(pg16, pg18, shared=shared, capture=capture)
    watch = scene.watch()
    stage = scene.stage(lease_seconds=LEASE_S)
    async with scene.writing() as workload, killed(stage):
        await stage.start(**at("cutover.closed"))
        await watch.submit(stage)
        await dies(stage, watch)
        await scene.wish(watch, Wish.CANCEL)
        for point in UNDOING:
            await stage.launch(**at(point))
            await dies(stage, watch)
        await stage.start()
        await watch.until("cancelled")
    clean(workload.report())
    watch.check_undone("cancelled")


TAKE_OVER_S = 10


async def test_a_dead_daemons_migration_is_taken_over_within_ten_seconds(pg16, pg18, make_scene):
    """As daemons are configured when nobody says otherwise."""
    scene = make_scene(pg16, pg18)
    watch = scene.watch()
    lease = Engine().lease_seconds
    first, second = scene.stage("first", lease_seconds=lease), scene.stage("second", lease_seconds=lease)
    async with scene.writing() as workload, killed(first), killed(second):
        await first.start(**at("copy.begun"))
        await watch.submit(first)
        await dies(first, watch)
        died_at = time.monotonic()
        await second.start()
        await watch.until_row(lambda row: row["epoch"] == 2, timeout_s=TAKE_OVER_S)
        assert time.monotonic() - died_at < TAKE_OVER_S
        await watch.until("completed")
    clean(workload.report())
    watch.check_completed()


async def dies(stage: Stage, watch: Watch) -> None:
    """Until the crash point has killed the daemon; meanwhile the migration is watched."""
    async with asyncio.TaskGroup() as tasks:
        watching = tasks.create_task(watch.for_ever())
        await asyncio.wait([living := tasks.create_task(stage.wait())], timeout=REACH_TIMEOUT_S)
        watching.cancel()
        if not living.done():
            stage.send_signal(signal.SIGTERM)
    assert living.result() == -signal.SIGKILL, (watch.seen, stage.log_path.read_text()[-3000:])
