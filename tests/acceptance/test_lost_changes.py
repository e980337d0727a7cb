"""Changes that will never come, since a slot is gone or another server stands for the one before: both sides
are compared, what differs is copied anew, and nothing is lost."""

from __future__ import annotations

import asyncio
import signal

import pytest

from mover.demo.stage import Stage
from tests.acceptance.test_rollback import LONG_WINDOW, are_equal, leftovers_of_the_stream, until_written
from tests.support.acceptance import (
    CORE,
    ENDED,
    ESTATE,
    Home,
    Scene,
    Watch,
    at,
    clean,
    killed,
    until_stopped,
)
from tests.support.checks import leftovers, tenant_fingerprints
from tests.support.failover import fail_over, fail_over_to, keep_standby
from tests.support.waiting import until

DROP_SLOTS = """
select pg_terminate_backend(active_pid, 5000) from pg_replication_slots
 where database = current_database() and active;
select pg_drop_replication_slot(slot_name) from pg_replication_slots where database = current_database()
"""


@pytest.mark.parametrize("shared", [False, True], ids=["fresh", "shared"])
async def test_a_migration_goes_on_without_its_slot(pg16, pg18, make_scene, shared):
    scene = make_scene(pg16, pg18, shared=shared)
    async with scene.frozen_at("verify.begun") as (watch, stage, workload):
        await until_written(workload, 50)
        await asyncio.to_thread(drop_slots, scene.homes[CORE])
        await until_written(workload, 50)
        stage.send_signal(signal.SIGCONT)
        await watch.until("completed")
        (copied,) = said(scene, watch, "differs, and is copied anew: %")
        assert "crm.activities" in copied  # the writers write there
        assert "crm.deals" not in copied  # and do not write there
    clean(workload.report())
    watch.check_completed()


async def test_a_slot_that_is_lost_while_rows_are_copied_copies_only_what_is_missing(pg16, pg18, make_scene):
    scene = make_scene(pg16, pg18, shared=True)
    async with scene.frozen_at("copy.chunk") as (watch, stage, workload):
        await asyncio.to_thread(drop_slots, scene.homes[CORE])
        stage.send_signal(signal.SIGCONT)
        await watch.until("completed")
    clean(workload.report())
    watch.check_completed()


async def test_the_way_back_goes_on_without_its_slot(pg16, pg18, make_scene):
    scene = make_scene(pg16, pg18, shared=True)
    watch = scene.watch()
    async with scene.daemon(monitoring_hours=LONG_WINDOW, abandoned_hours=0) as stage:
        async with scene.writing() as workload:
            await watch.submit(stage)
            await watch.until("monitoring")
            await until(lambda: is_followed(scene.homes[ESTATE]))
            await asyncio.to_thread(drop_slots, scene.homes[ESTATE])
            await until_written(workload, 100)
        await until(lambda: are_equal(scene))
        assert said(scene, watch, "differs, and is copied anew: %")
        assert watch._read()["status"] == "monitoring"
        async with scene.writing() as more:
            assert (await stage.run("rollback", watch.id))[0] == 0
            await watch.until("rolled_back")
            await until_written(more, 50)
        clean(workload.report())
        clean(more.report())
        await until(lambda: leftovers(watch.target.url) == [])
    watch.check_undone("rolled_back")


@pytest.mark.parametrize("point", ["copy.chunk", "catch_up.begun"])
async def test_a_source_that_has_failed_over_is_followed_on(
    spare_server, pg18, make_scene, redis_server, point, capture
):
    """A standby that has everything, but for the slots: servers before 17 do not hand these over."""
    scene = make_scene(spare_server, pg18, platform=pg18, capture=capture)
    async with scene.frozen_at(point) as (watch, stage, workload):
        await asyncio.to_thread(fail_over, spare_server)
        await until_written(workload, 50)
        stage.send_signal(signal.SIGCONT)
        await watch.until("completed")
        (changed,) = said(scene, watch, "another server than before: %")
        assert "source" in changed
    assert workload.report().stale_reads == 0  # connections that broke are the writers' errors
    watch.check_completed()


async def test_a_target_that_has_failed_over_is_followed_back(spare_server, pg16, make_scene, capture):
    scene = make_scene(pg16, spare_server, capture=capture)
    watch = scene.watch()
    async with scene.daemon(monitoring_hours=LONG_WINDOW, abandoned_hours=0) as stage:
        async with scene.writing() as workload:
            await watch.submit(stage)
            await watch.until("monitoring")
            await asyncio.to_thread(fail_over, spare_server)
            await until_written(workload, 50)
        await until(lambda: are_equal(scene))
        (changed,) = said(scene, watch, "the way back: another server than before: %")
        assert "target" in changed
        assert (await stage.run("rollback", watch.id))[0] == 0
        await watch.until("rolled_back")
        await until(lambda: leftovers(watch.target.url) == [])
    assert workload.report().stale_reads == 0
    watch.check_undone("rolled_back")


DAMAGED = "damage_after_switch"


def rows_of(scene: Scene, home: Home) -> dict:
    return tenant_fingerprints(home.url, home.tables, scene.tenant)


async def is_halted(watch: Watch) -> None:
    await watch.until_row(lambda row: (row["error"] or {}).get("code") == DAMAGED or row["status"] in ENDED)
    assert (watch.row["status"], watch.row["error"]["code"]) == ("monitoring", DAMAGED), watch.seen


FOLLOWED = pytest.mark.parametrize("is_followed_back", [True, False], ids=["followed", "not followed"])
TINY = 1e-9  # of a gigabyte: more is kept for the way back at once


@FOLLOWED
async def test_a_target_from_before_the_switch_is_not_opened_and_costs_the_source_nothing(
    spare_server, pg16, make_scene, tmp_path, is_followed_back
):
    scene = make_scene(pg16, spare_server, shared=True)
    core, estate = scene.homes[CORE], scene.homes[ESTATE]
    watch = scene.watch(keeps_snapshot=False)
    stage = scene.stage(monitoring_hours=LONG_WINDOW)
    async with killed(stage):
        async with scene.writing() as workload:
            await stage.start(**at("cutover.begun", signal.SIGSTOP))
            await watch.submit(stage)
            await until_stopped(stage)
            await asyncio.to_thread(keep_standby, spare_server, tmp_path / "standby")
            stage.send_signal(signal.SIGCONT)
            await watch.until("monitoring")
            await until_written(workload, 50)
        await followed_or_not(scene, stage, is_followed_back)
        kept = rows_of(scene, core)
        await asyncio.to_thread(fail_over_to, spare_server, tmp_path / "standby")
        later = scene.stage("later", monitoring_hours=dict.fromkeys(LONG_WINDOW, 0.0))
        async with killed(later):
            await later.start()
            await is_halted(watch)
        assert rows_of(scene, core) == kept
        assert estate.execute("select state from mover.fence") == [("closed",)]


@FOLLOWED
async def test_a_target_that_lacks_what_was_written_there_costs_the_source_nothing(
    spare_server, pg16, make_scene, tmp_path, capture, is_followed_back
):
    scene = make_scene(pg16, spare_server, shared=True, capture=capture)
    watch = scene.watch(keeps_snapshot=False)
    stage = scene.stage(monitoring_hours=LONG_WINDOW)
    async with killed(stage):
        async with scene.writing() as workload:
            await stage.start()
            await watch.submit(stage)
            await watch.until("monitoring")
            await asyncio.to_thread(keep_standby, spare_server, tmp_path / "standby")
            await until_written(workload, 100)
        await followed_or_not(scene, stage, is_followed_back)
        kept = rows_of(scene, scene.homes[CORE])
        await asyncio.to_thread(fail_over_to, spare_server, tmp_path / "standby")
        later = scene.stage("later", monitoring_hours=dict.fromkeys(LONG_WINDOW, 0.0))
        async with killed(later):
            await later.start()
            await is_halted(watch)
        assert rows_of(scene, scene.homes[CORE]) == kept


async def test_a_source_from_before_the_switch_is_fenced_again(spare_server, pg18, make_scene, tmp_path):
    """Otherwise whoever has an old route writes beside the target."""
    scene = make_scene(spare_server, pg18, shared=True, platform=pg18)
    core = scene.homes[CORE]
    watch = scene.watch(keeps_snapshot=False)
    stage = scene.stage(monitoring_hours=LONG_WINDOW)
    async with killed(stage):
        await stage.start(**at("cutover.begun", signal.SIGSTOP))
        await watch.submit(stage)
        await until_stopped(stage)
        await asyncio.to_thread(keep_standby, spare_server, tmp_path / "standby")
        stage.send_signal(signal.SIGCONT)
        await watch.until("monitoring")
        await stage.kill()
        await asyncio.to_thread(fail_over_to, spare_server, tmp_path / "standby")
        assert core.execute("select state from mover.fence") == [("open",)]
        await stage.start()
        await is_halted(watch)
        assert core.execute("select state from mover.fence") == [("moved",)]
        watch._check_tombstone()
    for home in (core, scene.homes[ESTATE]):
        assert any(table.count for table in rows_of(scene, home).values())


async def followed_or_not(scene: Scene, stage: Stage, is_followed_back: bool) -> None:
    """No daemon lives afterwards."""
    if is_followed_back:
        await until(lambda: are_equal(scene))
        return await stage.kill()
    await stage.kill()
    giving_up = scene.stage("giving-up", monitoring_hours=LONG_WINDOW, max_retained_gb=TINY)
    async with killed(giving_up):
        await giving_up.start()
        await until(lambda: said(scene, scene.watches[-1], "there is no way back any more: %") != [])
        await until(lambda: leftovers_of_the_stream(scene.homes[ESTATE]) == [])


def drop_slots(home: Home) -> None:
    for statement in DROP_SLOTS.split(";"):
        home.execute(statement)


def is_followed(home: Home) -> bool:
    return (
        home.execute("select 1 from pg_replication_slots where database = current_database() and active")
        != []
    )


def said(scene: Scene, watch: Watch, like: str) -> list[str]:
    rows = scene.platform.execute(
        "select message from platform.migration_events where migration_id = %s and message like %s",
        watch.id,
        like,
    )
    return [message for (message,) in rows]
