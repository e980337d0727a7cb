"""The way back: after the switch the source follows the target, and a rollback loses nothing."""

from __future__ import annotations

import signal

import psycopg
import pytest
from psycopg import sql

from mover.core.migration import Wish
from mover.demo.schema import schemas
from tests.acceptance.test_crashes import dies
from tests.support.acceptance import CORE, ESTATE, Home, Scene, at, clean, killed
from tests.support.checks import assert_tenant_equal, leftovers, tenant_fingerprints
from tests.support.waiting import until

LONG_WINDOW = dict.fromkeys(("schema", "database", "dedicated", "downgrade"), 1.0)  # hours
ROUND_TRIPS = 2
# In the order in which a return passes through them, each in a daemon of its own.
RETURNING = (
    "follow.applied",
    "return.switch.begun",
    "cutover.closed",
    "recovery.aborted",
    "cutover.proved",
    "return.deciding",
    "cutover.decided",
    "cutover.opened",
    "return.switch.done",
    "undo.stream.begun",
    "undo.source_guards.done",
    "forgotten.source",
)


@pytest.mark.parametrize("shared", [False, True], ids=["fresh", "shared"])
async def test_a_tenant_comes_back_with_what_was_written_meanwhile(pg16, pg18, make_scene, shared, capture):
    """And goes again: nothing is left that would be in the way."""
    scene = make_scene(pg16, pg18, shared=shared, capture=capture)
    async with scene.daemon(monitoring_hours=LONG_WINDOW, abandoned_hours=0) as stage:
        for _ in range(ROUND_TRIPS):
            watch = scene.watch()
            async with scene.writing() as workload:
                await watch.submit(stage)
                await watch.until("monitoring")
                await until_written(workload, 200)
                assert scene.route() == ESTATE
                assert (await stage.run("rollback", watch.id))[0] == 0
                await watch.until("rolled_back")
                assert scene.route() == CORE
                await until_written(workload, 100)
            clean(workload.report())
            await until(lambda watch=watch: leftovers(watch.target.url) == [])
            watch.check_undone("rolled_back")
            watch.close()


async def test_a_rollback_leaves_the_tombstone_of_an_earlier_departure_as_it_was(
    pg16, pg18, make_scene, capture
):
    scene = make_scene(pg16, pg18, shared=True, capture=capture)
    for source, target in ((CORE, ESTATE), (ESTATE, CORE)):
        departure = scene.watch(source, target)
        async with scene.daemon() as stage, scene.writing() as workload:
            await departure.submit(stage)
            await departure.until("completed")
        clean(workload.report())
        departure.check_completed()
    watch = scene.watch()
    async with scene.daemon("later", monitoring_hours=LONG_WINDOW, abandoned_hours=0) as stage:
        async with scene.writing() as workload:
            await watch.submit(stage)
            await watch.until("monitoring")
            assert (await stage.run("rollback", watch.id))[0] == 0
            await watch.until("rolled_back")
        clean(workload.report())
        await until(lambda: "the abandoned target is cleared" in stage.log_path.read_text())
    watch.check_undone("rolled_back")
    departure._check_tombstone()


async def test_the_source_of_a_watched_tenant_is_a_live_copy(pg16, pg18, make_scene, capture):
    scene = make_scene(pg16, pg18, capture=capture)
    watch = scene.watch()
    async with scene.daemon(monitoring_hours=LONG_WINDOW) as stage:
        async with scene.writing() as workload:
            await watch.submit(stage)
            await watch.until("monitoring")
            await until_written(workload, 100)
        clean(workload.report())
        await until(lambda: are_equal(scene))
        assert watch._read()["status"] == "monitoring"


async def test_a_return_survives_kill_9(pg16, pg18, make_scene, capture):
    scene = make_scene(pg16, pg18, shared=True, capture=capture)
    watch = scene.watch()
    stage = scene.stage(monitoring_hours=LONG_WINDOW, abandoned_hours=0, lease_seconds=1)
    async with scene.writing() as workload, killed(stage):
        await stage.start()
        await watch.submit(stage)
        await watch.until("monitoring")
        assert (await stage.run("rollback", watch.id))[0] == 0
        await stage.kill()
        for point in RETURNING:
            await stage.launch(**at(point))
            await dies(stage, watch)
        await stage.start()
        await watch.until("rolled_back")
        await until_written(workload, 50)
    clean(workload.report())
    async with scene.daemon("last", abandoned_hours=0):
        await until(lambda: leftovers(watch.target.url) == [])
    watch.check_undone("rolled_back")


async def test_a_value_that_the_source_does_not_take_ends_the_way_back_alone(pg16, pg18, make_scene):
    scene = make_scene(pg16, pg18)
    core, estate = scene.homes[CORE], scene.homes[ESTATE]
    core.execute("alter table core_crm.activities add code text unique")  # the target is empty yet
    add = "insert into {}_crm.activities (tenant_id, kind, code) values (%s, 'call', 'taken')"
    core.execute(add.format(CORE), scene.tenants[1].id)
    watch = scene.watch()
    async with scene.daemon(monitoring_hours=LONG_WINDOW) as stage:
        await watch.submit(stage)
        await watch.until("monitoring")
        estate.execute(add.format(ESTATE), scene.tenant)
        await until(lambda: leftovers_of_the_stream(estate) == [])
        code, text = await stage.run("rollback", watch.id)
        assert (code, "no way back" in text) == (3, True)
        assert watch._read()["status"] == "monitoring"


def leftovers_of_the_stream(home: Home) -> list[tuple]:
    return home.execute(
        "select slot_name from pg_replication_slots where database = current_database()"
        " union all select pubname from pg_publication"
    )


async def test_before_the_switch_a_rollback_is_a_cancellation(pg16, pg18, make_scene):
    scene = make_scene(pg16, pg18)
    async with scene.frozen_at("copy.chunk") as (watch, stage, workload):
        await scene.wish(watch, Wish.ROLLBACK)
        stage.send_signal(signal.SIGCONT)
        await watch.until("rolled_back")
    clean(workload.report())
    watch.check_undone("rolled_back")


async def test_a_rollback_that_comes_just_before_the_switch_is_not_forgotten(pg16, pg18, make_scene):
    scene = make_scene(pg16, pg18)
    async with scene.frozen_at("cutover.closed") as (watch, stage, workload):
        await scene.wish(watch, Wish.ROLLBACK)
        stage.send_signal(signal.SIGCONT)
        await watch.until("rolled_back")
        assert scene.route() == CORE
    clean(workload.report())


async def test_a_source_that_is_cleaned_is_nothing_to_come_back_to(pg16, pg18, make_scene):
    scene = make_scene(pg16, pg18)
    watch = scene.watch()
    async with scene.daemon() as stage:
        await watch.submit(stage)
        await watch.until("completed")
        code, text = await stage.run("rollback", watch.id)
        assert (code, "new migration" in text) == (3, True)
    watch.check_completed()


async def until_written(workload, count: int) -> None:
    before = workload.transactions
    await until(lambda: workload.transactions > before + count)


def are_equal(scene: Scene) -> bool:
    core, estate = scene.homes[CORE], scene.homes[ESTATE]
    names = {service: schemas(ESTATE)[service] for service in schemas(CORE)}
    there = {(schema, table): (names[schema.rpartition("_")[2]], table) for schema, table in core.tables}
    try:
        return assert_tenant_equal(core.url, estate.url, there, scene.tenant) > 0
    except AssertionError:
        return False


NEXT_LOOK = """
update platform.tenant_migrations set tombstone_check_at = now(), lease_until = null where id = %s
"""
IS_CLEARED = "select tombstone_check_at is null from platform.tenant_migrations where id = %s"


async def test_what_was_abandoned_is_not_cleared_where_the_tenant_lives_again(pg16, pg18, make_scene):
    """He came back, went again, and what the first migration has left there is due to go."""
    scene = make_scene(pg16, pg18, shared=True)
    estate = scene.homes[ESTATE]
    first, second = (scene.watch(keeps_snapshot=False) for _ in range(2))
    async with scene.daemon(monitoring_hours=LONG_WINDOW) as stage:
        await first.submit(stage)
        await first.until("monitoring")
        assert (await stage.run("rollback", first.id))[0] == 0
        await first.until("rolled_back")
        with psycopg.connect(estate.url) as conn:  # as preflight tells an operator to
            conn.execute("set session_replication_role = replica")
            conn.execute("select set_config('mover.tenant', %s, false)", (str(scene.tenant),))
            for table in estate.tables:
                delete = sql.SQL("delete from {} where tenant_id = %s").format(sql.Identifier(*table))
                conn.execute(delete, (scene.tenant,))
        await second.submit(stage)
        await second.until("monitoring")
        await until(lambda: are_equal(scene))
        rows = tenant_fingerprints(estate.url, estate.tables, scene.tenant)
        scene.platform.execute(NEXT_LOOK, first.id)
        await until(lambda: scene.platform.execute(IS_CLEARED, first.id) == [(True,)])
        assert tenant_fingerprints(estate.url, estate.tables, scene.tenant) == rows
        assert any(table.count for table in rows.values())
        await until(lambda: are_equal(scene))
