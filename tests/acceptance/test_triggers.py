"""Rollbacks that begin by themselves."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import psycopg
import pytest

from tests.acceptance.test_lifecycle import metric
from tests.acceptance.test_lost_changes import said
from tests.acceptance.test_rollback import LONG_WINDOW
from tests.support.acceptance import (
    CORE,
    ESTATE,
    Home,
    Scene,
    Watch,
    at,
    clean,
    holding_off,
    killed,
    until_stopped,
)
from tests.support.checks import leftovers
from tests.support.proxy import proxied
from tests.support.waiting import until

SECONDS = 1 / 3600  # of an hour
AUDITED = "select action, result from platform.audit where who = 'mover' and subject = %s"


@contextmanager
def open_for_long(home: Home, scene: Scene) -> Iterator[None]:
    """A transaction that has written a row of the tenant's: no cutover can happen beside it."""
    with psycopg.connect(home.url) as conn:
        conn.execute("insert into core_crm.activities (tenant_id, kind) values (%s, 'call')", (scene.tenant,))
        yield
        conn.rollback()


def audited(scene: Scene, watch: Watch) -> list[tuple]:
    return scene.platform.execute(AUDITED, watch.id)


@pytest.mark.parametrize(
    ("setting", "trigger"),
    [("timeout_hours", "migration_timeout"), ("phase_timeout_hours", "phase_timeout")],
)
async def test_a_migration_that_takes_too_long_is_rolled_back(pg16, pg18, make_scene, setting, trigger):
    scene = make_scene(pg16, pg18)
    watch = scene.watch()
    async with (
        scene.daemon(abandoned_hours=0, **{setting: 6 * SECONDS}) as stage,
        scene.writing() as workload,
    ):
        with open_for_long(scene.homes[CORE], scene):
            await watch.submit(stage)
            await watch.until("rolling_back")
        await watch.until("rolled_back")
        assert audited(scene, watch) == [(f"rollback: {trigger}", "ok")]
        assert watch._read()["error"]["code"] == trigger
        assert metric(stage, f'mover_rollbacks_total{{trigger="{trigger}"}}') == 1
    clean(workload.report())
    watch.check_undone("rolled_back")


async def test_a_target_that_does_not_answer_frees_the_source_and_is_cleared_later(pg16, pg18, make_scene):
    scene = make_scene(pg16, pg18)
    core = scene.homes[CORE]
    watch = scene.watch()
    async with proxied(scene.homes[ESTATE].url) as proxy:
        scene.detours[ESTATE] = proxy.url
        stage = scene.stage(unreachable_minutes=0.1)
        async with scene.writing() as workload, killed(stage):
            await stage.start(**at("copy.chunk", signal.SIGSTOP))
            await watch.submit(stage)
            await until_stopped(stage)
            proxy.cut()
            stage.send_signal(signal.SIGCONT)
            await watch.until("rolling_back")
            await until(lambda: leftovers(core.url) == [])
            assert watch._read()["status"] == "rolling_back"
            proxy.restore()
            assert (await stage.run("resume", watch.id))[0] == 0
            await watch.until("rolled_back")
            assert audited(scene, watch) == [("rollback: target_db_unreachable", "ok")]
        clean(workload.report())
    watch.check_undone("rolled_back")


LOOK_NOW = "update platform.tenant_migrations set not_before = null where id = %s"
NOTE_ERROR = """update platform.tenant_migrations set error = '{"code": "schema_changed"}' where id = %s"""
TINY = 1e-9  # of a gigabyte
NO_WAY_BACK = "there is no way back any more: %"


async def test_what_is_kept_for_a_migration_is_bounded_before_the_switch(pg16, pg18, make_scene, capture):
    scene = make_scene(pg16, pg18, capture=capture)
    watch = scene.watch()
    async with scene.daemon(max_retained_gb=TINY) as stage, scene.writing() as workload:
        with holding_off(scene.homes[CORE], scene.tenant):
            await watch.submit(stage)
            await watch.until("rolled_back")
        assert audited(scene, watch) == [("rollback: too_much_retained", "ok")]
    clean(workload.report())
    watch.check_undone("rolled_back")


async def test_what_is_kept_for_a_paused_migration_is_bounded_too(pg16, pg18, make_scene, capture):
    """Nobody works on it, and what its source keeps for it grows."""
    scene = make_scene(pg16, pg18, capture=capture)
    watch = scene.watch()
    async with scene.writing() as workload:
        with holding_off(scene.homes[CORE], scene.tenant):
            async with scene.daemon() as stage:
                await watch.submit(stage)
                await watch.until_row(lambda row: row["phase"] == "cutover")
                assert (await stage.run("pause", watch.id))[0] == 0
                await watch.until("paused")
            async with scene.daemon("later", max_retained_gb=TINY):
                scene.platform.execute(LOOK_NOW, watch.id)
                await watch.until("rolled_back")
        assert audited(scene, watch) == [("rollback: too_much_retained", "ok")]
    clean(workload.report())
    watch.check_undone("rolled_back")


async def test_looking_after_a_paused_migration_leaves_its_error_and_its_status(pg16, pg18, make_scene):
    scene = make_scene(pg16, pg18)
    watch = scene.watch()
    async with proxied(scene.homes[CORE].url) as proxy:
        scene.detours[CORE] = proxy.url
        async with scene.daemon() as stage, scene.writing() as workload:
            with holding_off(scene.homes[CORE], scene.tenant):
                await watch.submit(stage)
                await watch.until_row(lambda row: row["phase"] == "cutover")
                assert (await stage.run("pause", watch.id))[0] == 0
                await watch.until("paused")
                proxy.cut()
                scene.platform.execute(NOTE_ERROR, watch.id)
                epoch = watch._read()["epoch"]
                scene.platform.execute(LOOK_NOW, watch.id)
                await until(lambda: watch._read()["epoch"] > epoch and not watch._read()["leased"])
                now = watch._read()
                assert (now["status"], now["error"]) == ("paused", {"code": "schema_changed"})
                proxy.restore()
            assert (await stage.run("resume", watch.id))[0] == 0
            await watch.until("completed")
        clean(workload.report())
    watch.check_completed()


async def test_what_is_kept_for_the_way_back_is_bounded_while_the_source_is_away(
    spare_server, pg18, make_scene
):
    """The target's disk is the other tenants', too."""
    scene = make_scene(spare_server, pg18, platform=pg18)
    watch, estate = scene.watch(keeps_snapshot=False), scene.homes[ESTATE]
    slots = "select slot_name from pg_replication_slots where database = current_database()"
    async with scene.daemon(monitoring_hours=LONG_WINDOW) as stage:
        await watch.submit(stage)
        await watch.until("monitoring")
        await until(lambda: len(estate.execute(slots)) == 1)
    await asyncio.to_thread(spare_server.stop_immediately)
    try:
        async with scene.daemon("later", monitoring_hours=LONG_WINDOW, max_retained_gb=TINY):
            await until(lambda: said(scene, watch, NO_WAY_BACK) != [])
            await until(lambda: estate.execute(slots) == [])
            assert watch._read()["status"] == "monitoring"
    finally:
        await asyncio.to_thread(spare_server.come_back)


async def test_what_is_kept_for_the_way_back_is_bounded_too(pg16, pg18, make_scene):
    """The tenant stays where he is served, and what fills that server's disk goes."""
    scene = make_scene(pg16, pg18)
    watch = scene.watch()
    async with scene.writing() as workload:
        async with scene.daemon(monitoring_hours={"database": 1.0}) as stage:
            await watch.submit(stage)
            await watch.until("monitoring")
        async with scene.daemon("later", monitoring_hours={"database": 1.0}, max_retained_gb=TINY) as stage:
            slots = "select slot_name from pg_replication_slots where database = current_database()"
            await until(lambda: said(scene, watch, NO_WAY_BACK) != [])
            assert scene.homes[ESTATE].execute(slots) == []
            (why,) = said(scene, watch, NO_WAY_BACK)
            assert "the target keeps" in why
            assert (await stage.run("rollback", watch.id))[0] == 3
            assert watch._read()["status"] == "monitoring"
    clean(workload.report())
