"""Stopping and going on: signals, wishes, several daemons, servers that fail, and damage that is found."""

from __future__ import annotations

import asyncio
import signal
import socket
import time
import urllib.request

import pytest

from mover.core.migration import Wish
from mover.demo.stage import Stage
from tests.support.acceptance import (
    CORE,
    ESTATE,
    LEASE_S,
    Scene,
    at,
    clean,
    holding_off,
    killed,
    our_backends,
    until_stopped,
)
from tests.support.waiting import until

SIGSTOP, SIGCONT, SIGTERM = signal.SIGSTOP, signal.SIGCONT, signal.SIGTERM
EXIT_S = 10


@pytest.mark.parametrize("point", ["copy.chunk", "catch_up.begun", "cutover.closed"])
async def test_sigterm_ends_the_daemon_and_nothing_is_done_twice(pg16, pg18, make_scene, point):
    scene = make_scene(pg16, pg18)
    async with scene.frozen_at(point) as (watch, stage, workload):
        stage.send_signal(SIGTERM)
        stage.send_signal(SIGCONT)
        began = time.monotonic()
        assert await stage.wait() == 0
        assert time.monotonic() - began < EXIT_S
        await watch.until_row(lambda row: not row["leased"], timeout_s=1)
        await writers_go_on(workload)

        copied = chunks(scene)
        assert copied
        if watch.row["switched_at"] is None:
            await stage.start(**at("copy.done", SIGSTOP))
            await until_stopped(stage)
            assert copied <= chunks(scene), "a chunk that was there was copied again"
            stage.send_signal(SIGCONT)
        else:
            await stage.start()
        await watch.until("completed")
    clean(workload.report())
    watch.check_completed()


async def test_a_paused_migration_rests_and_goes_on(pg16, pg18, make_scene):
    scene = make_scene(pg16, pg18)
    async with scene.frozen_at("copy.chunk") as (watch, stage, workload):
        await scene.wish(watch, Wish.PAUSE)
        stage.send_signal(SIGCONT)
        await watch.until("paused")
        await watch.until_row(lambda row: not row["leased"])
        await until(lambda: [our_backends(home.url) for home in scene.homes.values()] == [[], []])
        assert slots(scene) == [False]
        await writers_go_on(workload)
        assert (await stage.run("resume", watch.id))[0] == 0
        await watch.until("completed")
    clean(workload.report())
    watch.check_completed()


async def test_pause_resume_and_cancel_by_command(pg16, pg18, make_scene):
    scene = make_scene(pg16, pg18)
    watch = scene.watch()
    async with scene.daemon() as stage, scene.writing() as workload:
        with holding_off(scene.homes[CORE], scene.tenant):
            await watch.submit(stage)
            await watch.until_row(
                lambda row: "next cutover attempt" in str(row["progress"].get("waiting_for"))
            )
            assert (await stage.run("pause", watch.id))[0] == 0
            await watch.until("paused")
            assert (await stage.run("resume", watch.id))[0] == 0
            await watch.until_row(lambda row: row["phase"] == "cutover" and row["status"] == "in_progress")
            assert (await stage.run("cancel", watch.id))[0] == 0
            await watch.until("cancelled")
        code, output = await stage.run("cancel", watch.id)
        assert code == 3
        assert "cancelled" in output
    clean(workload.report())
    watch.check_undone("cancelled")


@pytest.mark.parametrize(("point", "shared"), [("prepare.schemas.done", False), ("copy.chunk", True)])
async def test_a_cancelled_migration_leaves_nothing(pg16, pg18, make_scene, point, shared):
    scene = make_scene(pg16, pg18, shared=shared)
    async with scene.frozen_at(point) as (watch, stage, workload):
        await scene.wish(watch, Wish.CANCEL)
        stage.send_signal(SIGCONT)
        await watch.until("cancelled")
    clean(workload.report())
    watch.check_undone("cancelled")


async def test_a_switched_migration_cannot_be_cancelled(pg16, pg18, make_scene):
    scene = make_scene(pg16, pg18)
    watch = scene.watch()
    async with scene.daemon(monitoring_hours={"database": 6 / 3600}) as stage:
        async with scene.writing() as workload:
            await watch.submit(stage)
            await watch.until("monitoring")
            code, output = await stage.run("cancel", watch.id)
            assert code == 3
            assert "monitoring" in output
            assert "already served by the target" in output
            await watch.until("completed")
    clean(workload.report())
    watch.check_completed()


async def test_two_daemons_share_a_queue_and_one_takes_over_from_the_other(pg16, pg18, make_scene):
    scene = make_scene(pg16, pg18, shared=True)
    first, second = scene.tenants[1].id, scene.tenant
    watches = [scene.watch(tenant=first, writers=[second]), scene.watch(tenant=second, writers=[first])]
    one, two = (scene.stage(name, max_active_migrations=1) for name in ("one", "two"))
    async with scene.writing([second, first]) as workload, killed(one), killed(two):
        with holding_off(scene.homes[CORE], first), holding_off(scene.homes[CORE], second):
            await asyncio.gather(one.start(), two.start())
            for watch in watches:
                await watch.submit(one)
                await watch.until_row(lambda row: row["phase"] == "cutover")
            owners = {watch.row["owner"]: watch for watch in watches}
            assert owners.keys() == {owner_name(one), owner_name(two)}
            assert {watch.row["epoch"] for watch in watches} == {1}
            orphan = owners[owner_name(one)]
            await one.kill()
            died = time.monotonic()
        other = owners[owner_name(two)]
        # One at a time: the other's own migration ends first.
        await other.until("completed")
        await orphan.until_row(lambda row: row["owner"] == owner_name(two))
        assert orphan.row["epoch"] == 2
        assert time.monotonic() - died < 60
        await orphan.until("completed")
    clean(workload.report())
    for watch in watches:
        watch.check_completed()


@pytest.mark.parametrize("point", ["copy.chunk", "cutover.deciding", "monitor.begun"])
async def test_a_daemon_that_slept_through_its_lease_does_no_harm(pg16, pg18, make_scene, point):
    scene = make_scene(pg16, pg18)
    watch = scene.watch()
    sleeper, heir = scene.stage("sleeper"), scene.stage("heir")
    async with scene.writing() as workload, killed(sleeper), killed(heir):
        await sleeper.start(**at(point, SIGSTOP))
        await watch.submit(sleeper)
        await until_stopped(sleeper)
        await heir.start()
        await watch.until_row(lambda row: row["epoch"] == 2, timeout_s=LEASE_S + 10)
        sleeper.send_signal(SIGCONT)
        await watch.until("completed")
        await until(lambda: "another daemon took over" in sleeper.log_path.read_text())
        assert watch.row["epoch"] == 2
    clean(workload.report())
    watch.check_completed()


async def test_a_walsender_that_ends_is_started_again(pg16, pg18, make_scene):
    scene = make_scene(pg16, pg18)
    async with scene.frozen_at("catch_up.begun") as (watch, stage, workload):
        scene.homes[CORE].execute(
            "select pg_terminate_backend(active_pid) from pg_replication_slots"
            " where database = current_database() and active_pid is not null"
        )
        stage.send_signal(SIGCONT)
        await watch.until("completed")
    assert any("trying again" in reason for reason in watch.waited_for)
    assert "unreachable" in {error for _, _, error in watch.seen}
    clean(workload.report())
    watch.check_completed()


async def test_a_target_that_restarts_is_waited_for(pg16, pg18, make_scene):
    scene = make_scene(pg16, pg18)
    watch = scene.watch()
    stage = scene.stage()
    async with killed(stage):
        async with scene.writing() as workload:
            await stage.start(**at("copy.chunk", SIGSTOP))
            await watch.submit(stage)
            await until_stopped(stage)
            await asyncio.to_thread(pg18.restart)
            stage.send_signal(SIGCONT)
            await watch.until_row(lambda row: row["error"] is not None or row["phase"] == "verify")
            await watch.until("completed")
    assert any("trying again" in reason for reason in watch.waited_for)
    assert "unreachable" in {error for _, _, error in watch.seen}
    # The writers' own idle connections to the target broke as well: that is theirs to handle.
    assert workload.report().stale_reads == 0
    watch.check_completed()


async def test_a_platform_database_that_restarts_is_waited_for(spare_server, pg16, pg18, make_scene):
    scene = make_scene(pg16, pg18, platform=spare_server)
    watch = scene.watch()
    stage = scene.stage()
    async with killed(stage):
        async with scene.writing():
            await stage.start(**at("copy.chunk", SIGSTOP))
            await watch.submit(stage)
            await until_stopped(stage)
            await asyncio.to_thread(spare_server.restart)
            stage.send_signal(SIGCONT)
            await watch.until("completed")
    watch.check_completed()


async def test_a_row_that_is_missing_on_the_target_stops_the_migration(pg16, pg18, make_scene):
    scene = make_scene(pg16, pg18)
    async with scene.frozen_at("index.begun") as (watch, stage, workload):
        lost = scene.lose_a_deal()
        stage.send_signal(SIGCONT)
        await watch.until("failed")
        assert metric(stage, "mover_integrity_failures_total") == 1
        assert metric(stage, "mover_verify_mismatches_total") == 1
    clean(workload.report())
    watch.check_undone("failed")
    error = watch.row["error"]
    assert (error["code"], error["table"]) == ("verification_failed", "core_crm.deals")
    (mismatch,) = watch.row["progress"]["evidence"]["mismatches"]
    assert str(lost) in str(mismatch["missing"]["keys"])


async def test_damage_that_only_the_comparison_after_the_switch_sees_keeps_the_source(pg16, pg18, make_scene):
    scene = make_scene(pg16, pg18)
    async with scene.frozen_at("verify.done") as (watch, stage, workload):
        scene.lose_a_deal()
        stage.send_signal(SIGCONT)
        await watch.until_row(lambda row: row["error"] is not None)
        assert (watch.row["status"], watch.row["error"]["code"]) == ("monitoring", "damage_after_switch")
        assert metric(stage, "mover_integrity_failures_total") == 1
        await watch.until_row(lambda row: not row["leased"])
        kept = scene.homes[CORE].execute(
            "select count(*) from core_crm.deals where tenant_id = %s", scene.tenant
        )
        there = scene.homes[ESTATE].execute(
            "select count(*) from realestate_crm.deals where tenant_id = %s", scene.tenant
        )
        assert kept[0][0] == there[0][0] + 1
    clean(workload.report())


async def writers_go_on(workload, transactions: int = 30) -> None:
    enough = workload.transactions + transactions
    await until(lambda: workload.transactions >= enough)


def chunks(scene: Scene) -> set[tuple]:
    """The copied chunks, each with the transaction that wrote it."""
    return set(
        scene.homes[ESTATE].execute(
            "select schema_name, table_name, number, rows, xmin::text from mover.chunk where done"
        )
    )


def slots(scene: Scene) -> list[bool]:
    """For each slot on the source, whether somebody reads it."""
    found = scene.homes[CORE].execute(
        "select active from pg_replication_slots where database = current_database()"
    )
    return [active for (active,) in found]


def owner_name(stage: Stage) -> str:
    assert stage.process is not None
    return f"{socket.gethostname()}/{stage.process.pid}"


def metric(stage: Stage, name: str) -> float:
    with urllib.request.urlopen(f"{stage.server}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    return next(float(line.split()[-1]) for line in lines if line.startswith(name))
