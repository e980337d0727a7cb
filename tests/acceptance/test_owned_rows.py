"""A whole migration of tables without the tenant column, whose rows are the tenant's by foreign keys, while
rows of all tenants change, and whose they are."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

import psycopg
import pytest

from tests.support import binders
from tests.support.acceptance import CORE, ESTATE, at, holding_off, killed
from tests.support.ordinary_roles import make_triggers_know_us, ordinary_roles


def prepare(scene, *, shared: bool) -> None:
    with psycopg.connect(scene.homes[CORE].url) as conn:
        conn.execute(binders.ddl("core_dms"))
        binders.make_ids(conn)
        binders.seed(conn, "core_dms", [tenant.id for tenant in scene.tenants[:3]])
    if shared:
        with psycopg.connect(scene.homes[ESTATE].url) as conn:
            neighbours = [t for (t,) in conn.execute("select distinct tenant_id from realestate_dms.folders")]
            conn.execute(binders.ddl("realestate_dms"))
            binders.seed(conn, "realestate_dms", neighbours, first_id=700_000)


def changing(scene):
    tenants = [tenant.id for tenant in scene.tenants[:3]]
    return binders.changing(scene.homes[CORE].url, "core_dms", tenants, clients=1, rehoming=0.02)


def rows_of_others(scene) -> dict:
    with psycopg.connect(scene.homes[CORE].url) as source:
        return binders.rows_of_others(source, "core_dms", scene.tenant)


def check_moved(scene, watch, others: dict) -> None:
    """The tenant's rows are on the target as they were at the switch, and no longer on the source; those of
    others are as they were when nobody wrote any more."""
    with psycopg.connect(scene.homes[CORE].url) as source, psycopg.connect(scene.homes[ESTATE].url) as target:
        at_switch = binders.rows_of(watch.source_at_switch, "core_dms", scene.tenant)
        assert binders.rows_of(target, "realestate_dms", scene.tenant) == at_switch
        assert sum(map(len, at_switch.values())) > 0
        assert not any(binders.rows_of(source, "core_dms", scene.tenant).values())
        assert binders.rows_of_others(source, "core_dms", scene.tenant) == others
    watch.check_completed()
    with psycopg.connect(scene.homes[CORE].url) as source:  # the tombstone stands, and in nobody's way
        source.execute("alter table core_dms.binders alter code type varchar(99)")
        source.execute("drop table core_dms.sheets cascade")
        source.rollback()


@pytest.mark.parametrize("shared", [False, True], ids=["fresh target", "beside other tenants"])
async def test_owned_rows_move_with_those_that_own_them(make_scene, pg16, pg18, shared, capture):
    scene = make_scene(pg16, pg18, shared=shared, capture=capture)
    prepare(scene, shared=shared)
    watch = scene.watch()
    async with scene.daemon() as stage:
        await move_while_changing(scene, watch, stage)


async def move_while_changing(scene, watch, stage) -> None:
    async with changing(scene) as committed:
        await watch.submit(stage)
        await watch.until("monitoring", "completed")
    watch.take_others()
    others = rows_of_others(scene)
    await watch.until("completed")
    assert committed[0] > 0
    check_moved(scene, watch, others)


@pytest.mark.parametrize("shared", [False, True], ids=["fresh target", "beside other tenants"])
async def test_owned_rows_move_by_ordinary_roles(make_scene, pg16, pg18, shared, capture):
    """Foreign keys and their actions are in force on what is written, and removed."""
    scene = make_scene(pg16, pg18, shared=shared, capture=capture)
    if shared:
        make_triggers_know_us(scene)
    prepare(scene, shared=shared)
    watch = scene.watch()
    with ordinary_roles(scene) as roles:
        async with killed(roles.stage()) as stage:
            await stage.start()
            await move_while_changing(scene, watch, stage)


@pytest.mark.parametrize("point", ["copy.chunk", "follow.applied", "removal.batch"])
async def test_a_killed_daemon_takes_owned_rows_up_where_they_were(make_scene, pg16, pg18, point, capture):
    scene = make_scene(pg16, pg18, capture=capture)
    prepare(scene, shared=False)
    watch, stage = scene.watch(), scene.stage()
    async with AsyncExitStack() as daemons:
        async with changing(scene), killed(stage):
            await stage.start(**at(point))
            await watch.submit(stage)
            watching = asyncio.create_task(watch.for_ever())
            assert stage.process is not None
            await stage.process.wait()
            watching.cancel()
            await daemons.enter_async_context(scene.daemon("second"))
            await watch.until("monitoring", "completed")
        watch.take_others()
        others = rows_of_others(scene)
        await watch.until("completed")
    check_moved(scene, watch, others)


@pytest.mark.parametrize(
    "renamed",
    ["", "the source", "both sides"],
    ids=["as planned", "renamed on the source", "renamed on both"],
)
@pytest.mark.parametrize("shared", [False, True], ids=["fresh target", "beside other tenants"])
async def test_cancelling_leaves_no_owned_rows_behind(make_scene, pg16, pg18, shared, renamed):
    scene = make_scene(pg16, pg18, shared=shared)
    prepare(scene, shared=shared)
    watch = scene.watch()
    schemas = {CORE: "core_dms", ESTATE: "realestate_dms"}
    places = {"": [], "the source": [CORE], "both sides": [CORE, ESTATE]}[renamed]
    async with scene.daemon() as stage:
        with holding_off(scene.homes[CORE], scene.tenant):
            await watch.submit(stage)
            await watch.until_row(lambda row: row["phase"] == "cutover")
            for place in places:
                rename(scene.homes[place].url, schemas[place])
            async with stage.client() as api:
                await api.act(watch.id, "cancel")
            await watch.until("cancelled")
    for place in places:
        rename(scene.homes[place].url, schemas[place], back=True)
    if shared:
        with psycopg.connect(scene.homes[ESTATE].url) as target:
            assert not any(binders.rows_of(target, "realestate_dms", scene.tenant).values())
    watch.check_undone("cancelled")


def rename(url: str, schema: str, *, back: bool = False) -> None:
    """An owned table, and in it the column that says whose a row is."""
    there = ["table {schema}.sheets rename to pages", "table {schema}.pages rename binder_id to folder_id"]
    again = ["table {schema}.pages rename folder_id to binder_id", "table {schema}.pages rename to sheets"]
    with psycopg.connect(url) as conn:
        if conn.execute("select to_regnamespace(%s)", (schema,)).fetchone() != (None,):
            for change in again if back else there:
                conn.execute(f"alter {change.format(schema=schema)}")
