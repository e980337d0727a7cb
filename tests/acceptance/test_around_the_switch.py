"""What else happens around the switch: wishes that come at the wrong moment, servers that are not the ones
they were, and migrations that wait without being in anybody's way."""

from __future__ import annotations

import asyncio
import signal
from uuid import UUID

import psycopg
import pytest
from psycopg import sql

from mover.core.ids import Epoch, MigrationId
from mover.core.migration import Wish
from mover.core.secret import Secret
from mover.postgres.connect import Database, Identity
from mover.postgres.fence import PgFence
from tests.support.acceptance import CORE, ESTATE, Scene, Watch, at, clean, holding_off, killed, until_stopped
from tests.support.checks import leftovers
from tests.support.waiting import until

SIGSTOP, SIGCONT = signal.SIGSTOP, signal.SIGCONT
LONG_WINDOW = {"database": 1.0}  # hours


@pytest.mark.parametrize("wish", [Wish.PAUSE, Wish.CANCEL])
async def test_a_wish_waits_for_the_outcome_of_a_cutover_that_was_left(pg16, pg18, make_scene, wish):
    """Its fence is closed: writers wait, and nobody else would open it."""
    scene = make_scene(pg16, pg18)
    watch = scene.watch()
    stage = scene.stage(lease_seconds=1)
    async with scene.writing() as workload, killed(stage):
        await stage.start(**at("cutover.closed"))
        await watch.submit(stage)
        assert await stage.wait() == -signal.SIGKILL
        await scene.wish(watch, wish)
        before = workload.transactions
        await stage.start()
        rests = {Wish.PAUSE: "paused", Wish.CANCEL: "cancelled"}[wish]
        await watch.until(rests)
        await until(lambda: workload.transactions > before + 30)
        if wish is Wish.PAUSE:
            assert await fence_of(scene, watch).state() == "open"
            assert (await stage.run("cancel", watch.id))[0] == 0
            await watch.until("cancelled")
    clean(workload.report())
    watch.check_undone("cancelled")


async def test_a_cutover_that_was_left_is_settled_before_anything_else(pg16, pg18, make_scene):
    """Also by a daemon that has no room for another migration."""
    scene = make_scene(pg16, pg18, shared=True)
    second = scene.tenants[1].id
    watch, busy = scene.watch(writers=[second]), scene.watch(tenant=second, writers=[scene.tenant])
    left = scene.stage("left", lease_seconds=1)
    full = scene.stage("full", lease_seconds=60, max_active_migrations=1)
    async with killed(left), killed(full):
        await full.start(**at("copy.begun", SIGSTOP))
        await busy.submit(full)
        await until_stopped(full)
        with holding_off(scene.homes[CORE], second):
            async with scene.writing() as workload:
                await left.start(**at("cutover.closed"))
                await watch.submit(left)
                assert await left.wait() == -signal.SIGKILL
                full.send_signal(SIGCONT)
                await watch.until("completed")
            assert busy._read()["status"] == "in_progress"
        clean(workload.report())
        watch.close()
        await busy.until("completed")
    busy.check_completed()  # the ledger of the other tenant's writers among it


async def test_a_watched_migration_leaves_its_room_to_the_next(pg16, pg18, make_scene):
    scene = make_scene(pg16, pg18, shared=True)
    second = scene.tenants[1].id
    first, next_one = scene.watch(writers=[second]), scene.watch(tenant=second, writers=[scene.tenant])
    async with scene.daemon(max_active_migrations=1, monitoring_hours=LONG_WINDOW) as stage:
        for watch in (first, next_one):
            await watch.submit(stage)
        await next_one.until("monitoring")
        await until(lambda: not next_one._read()["leased"])
        assert first._read()["status"] == "monitoring"


async def test_a_server_that_is_another_one_before_the_switch_is_compared_first(pg16, pg18, make_scene):
    """A standby that was promoted may lack what was acknowledged: nothing is switched until both sides are
    found equal again."""
    scene = make_scene(pg16, pg18)
    async with scene.frozen_at("verify.begun") as (watch, stage, workload):
        scene.platform.execute(
            "update platform.tenant_migrations set notes = jsonb_set(notes, '{servers,source}', '\"7/1\"')"
        )
        stage.send_signal(SIGCONT)
        await watch.until("completed")
        assert any(error == "server_changed" for _, _, error in watch.seen)
    clean(workload.report())
    watch.check_completed()


async def test_calling_off_frees_the_source_though_the_target_is_gone(pg16, pg18, make_scene):
    scene = make_scene(pg16, pg18)
    async with scene.frozen_at("copy.chunk") as (watch, stage, workload):
        name = scene.homes[ESTATE].url.rpartition("/")[2]
        pg18.drop_database(name)
        await scene.wish(watch, Wish.CANCEL)
        stage.send_signal(SIGCONT)
        await until(lambda: leftovers(scene.homes[CORE].url) == [])
        await watch.until_row(lambda row: "no such database" in (row["error"] or {}).get("message", ""))
        assert watch.row["status"] == "rolling_back"
        pg18.create_database(name)  # as a new and empty one, and the rest finds nothing to do
        assert (await stage.run("resume", watch.id))[0] == 0
        await watch.until("cancelled")
    assert workload.report().stale_reads == 0
    assert scene.route() == CORE


async def test_calling_a_return_off_leaves_the_tombstone_of_the_departure(pg16, pg18, make_scene):
    scene = make_scene(pg16, pg18)
    stage = scene.stage(tombstone_days=2 / 86_400)
    there, back = scene.watch(), None
    async with killed(stage):
        await stage.start()
        async with scene.writing() as workload:
            await there.submit(stage)
            await there.until("completed")
        clean(workload.report())
        await stage.kill()
        back = scene.watch(ESTATE, CORE)
        stage = scene.stage("again", tombstone_days=1)
        async with killed(stage), scene.writing() as workload:
            await stage.start(**at("copy.chunk", SIGSTOP))
            await back.submit(stage)
            await until_stopped(stage)
            await scene.wish(back, Wish.CANCEL)
            stage.send_signal(SIGCONT)
            await back.until("cancelled")
        clean(workload.report())
        back.check_undone("cancelled")
        there._check_tombstone()


async def test_a_halted_migration_keeps_no_slot_and_halts_again(pg16, pg18, make_scene):
    """Rows differ after the switch: an operator decides, and meanwhile no WAL is kept for it."""
    scene = make_scene(pg16, pg18)
    watch = scene.watch()
    stage = scene.stage()
    async with killed(stage):
        await stage.start(**at("verify.done", SIGSTOP))
        await watch.submit(stage)
        await until_stopped(stage)
        scene.lose_a_deal()
        stage.send_signal(SIGCONT)
        for _ in range(2):
            await watch.until_row(lambda row: (row["error"] or {}).get("code") == "damage_after_switch")
            await watch.until_row(lambda row: not row["leased"])
            assert scene.homes[CORE].execute("select slot_name from pg_replication_slots") == []
            scene.platform.execute("update platform.tenant_migrations set error = null")
            assert (await stage.run("resume", watch.id))[0] == 0
        await watch.until_row(lambda row: row["error"] is not None)
        assert watch.row["status"] == "monitoring"


async def test_rows_of_which_the_target_has_none_any_more_are_not_removed(pg16, pg18, make_scene):
    """A target that was made anew by mistake: the source has the last ones."""
    scene = make_scene(pg16, pg18)
    core, estate = scene.homes[CORE], scene.homes[ESTATE]
    deals = "select count(*) from core_crm.deals where tenant_id = %s"
    watch, stage = scene.watch(), scene.stage()
    async with killed(stage):
        await stage.start(**at("monitor.done", SIGSTOP))
        await watch.submit(stage)
        await until_stopped(stage)
        await watch.until("monitoring")
        before = core.execute(deals, scene.tenant)
        with psycopg.connect(estate.url) as conn:
            conn.execute("set session_replication_role = replica")
            conn.execute(f"set mover.tenant = '{scene.tenant}'")
            for schema, table in estate.tables:
                conn.execute(sql.SQL("delete from {}").format(sql.Identifier(schema, table)))
        stage.send_signal(SIGCONT)
        await watch.until_row(lambda row: (row["error"] or {}).get("code") == "damage_after_switch")
        assert core.execute(deals, scene.tenant) == before != [(0,)]


def fence_of(scene: Scene, watch: Watch) -> PgFence:
    identity = Identity(MigrationId(UUID(watch.id)), Epoch(0))
    return PgFence(Database(Secret(watch.source.url), "test", identity, 1), watch.tenant, CORE, identity, 1)


REFER = "update core_dms.documents set folder_id = %s where id = %s"
A_DOCUMENT = "select id, folder_id from core_dms.documents where tenant_id = %s order by id desc limit 1"


@pytest.mark.parametrize(
    ("point", "said"),
    [
        ("copy.begun", "documents documents_folder_id_fkey"),
        ("catch_up.begun", "1 row of the tenant in core_dms.documents"),
    ],
)
async def test_a_reference_to_another_tenants_row_that_comes_under_way_stops_the_switch(
    pg16, pg18, make_scene, point, said
):
    """On the target it would find nothing, though a foreign key says it does."""
    scene = make_scene(pg16, pg18)
    core = scene.homes[CORE]
    ((document, folder),) = core.execute(A_DOCUMENT, scene.tenant)
    ((_, theirs),) = core.execute(A_DOCUMENT, scene.tenants[1].id)
    async with scene.frozen_at(point) as (watch, stage, workload):
        await asyncio.to_thread(core.execute, REFER, theirs, document)
        stage.send_signal(SIGCONT)
        await watch.until("paused")
        assert (watch.row["switched_at"], watch.row["error"]["code"]) == (None, "dangling_references")
        assert said in watch.row["error"]["message"]
        await asyncio.to_thread(core.execute, REFER, folder, document)
        assert (await stage.run("resume", watch.id))[0] == 0
        await watch.until("completed")
    clean(workload.report())
    watch.check_completed()


async def test_a_reference_that_comes_between_two_cutover_attempts_stops_the_next(pg16, pg18, make_scene):
    scene = make_scene(pg16, pg18)
    core, watch = scene.homes[CORE], scene.watch()
    ((document, folder),) = core.execute(A_DOCUMENT, scene.tenant)
    ((_, theirs),) = core.execute(A_DOCUMENT, scene.tenants[1].id)
    async with scene.daemon() as stage:
        with holding_off(core, scene.tenant):
            await watch.submit(stage)
            await watch.until_row(lambda row: "next cutover" in (row["progress"].get("waiting_for") or ""))
            core.execute(REFER, theirs, document)
        await watch.until("paused")
        assert (watch.row["switched_at"], watch.row["error"]["code"]) == (None, "dangling_references")
        core.execute(REFER, folder, document)
        assert (await stage.run("resume", watch.id))[0] == 0
        await watch.until("completed")
    watch.check_completed()


async def test_rows_to_which_another_tenants_came_to_refer_are_not_removed(pg16, pg18, make_scene):
    """Foreign keys do not act on what the clean-up deletes: theirs would refer to nothing. What the
    tenant's own rows refer to, which nobody may change there any more, is in nobody's way."""
    scene = make_scene(pg16, pg18)
    core = scene.homes[CORE]
    ((_, folder),) = core.execute(A_DOCUMENT, scene.tenant)
    ((document, theirs),) = core.execute(A_DOCUMENT, scene.tenants[1].id)
    async with scene.frozen_at("monitor.done") as (watch, stage, workload):  # nothing flows back any more
        await watch.until_row(lambda row: row["switched_at"] is not None)
        with psycopg.connect(core.url) as conn:  # as only the mover may
            conn.execute(f"set mover.tenant = '{scene.tenant}'")
            conn.execute(
                "update core_dms.documents set folder_id = %s where folder_id = %s", (theirs, folder)
            )
        await asyncio.to_thread(core.execute, REFER, folder, document)
        stage.send_signal(SIGCONT)
        await watch.until_row(lambda row: (row["error"] or {}).get("code") == "dangling_references")
        assert "1 row of other tenants in core_dms.documents" in watch.row["error"]["message"]
        assert core.execute("select count(*) > 0 from core_dms.folders where id = %s", folder) == [(True,)]
        await asyncio.to_thread(core.execute, REFER, theirs, document)
        watch.take_others()
        await watch.until("completed")
    clean(workload.report())
    watch.check_completed()
