"""A tenant moves between two live servers while its application writes: every kind of place and way."""

from __future__ import annotations

import json

import pytest
import redis

from mover.core.ids import Capture
from mover.demo.schema import schemas
from tests.acceptance.conftest import neighbours
from tests.support.acceptance import CORE, ESTATE, Home, clean, holding_off, killed
from tests.support.checks import leftovers


@pytest.fixture(params=[("pg16", "pg18"), ("pg18", "pg16")], ids=lambda names: "-to-".join(names))
def servers(request):
    return tuple(request.getfixturevalue(name) for name in request.param)


# Each version to each other, from each source and to each target by both captures: what a capture does there
# does not depend on the version of the other side.
DIRECTIONS = (
    ("pg15", "pg16", Capture.WAL),
    ("pg15", "pg18", Capture.TRIGGER),
    ("pg16", "pg15", Capture.TRIGGER),
    ("pg16", "pg18", Capture.WAL),
    ("pg18", "pg15", Capture.WAL),
    ("pg18", "pg16", Capture.TRIGGER),
)


@pytest.fixture(params=DIRECTIONS, ids=lambda params: "{}-to-{}-{}".format(*params))
def every_direction(request):
    source, target, capture = request.param
    return request.getfixturevalue(source), request.getfixturevalue(target), capture


async def test_into_an_empty_database(every_direction, make_scene):
    source, target, capture = every_direction
    scene = make_scene(source, target, capture=capture)
    other = scene.tenants[1].id
    watch = scene.watch(writers=[other])
    with redis.Redis.from_url(scene.redis_url) as cache:
        cache.set(f"tenant:{scene.tenant}:routing", "core")
        async with scene.daemon() as stage:
            async with scene.writing(others=[other]) as workload:
                await watch.submit(stage)
                await watch.until("completed")
        assert cache.get(f"tenant:{scene.tenant}:routing") is None
    clean(workload.report())
    watch.check_completed()
    evidence = watch.row["progress"]["evidence"]
    assert evidence["source_root"] == evidence["target_root"]


async def test_into_a_database_with_other_tenants_that_write_too(servers, make_scene, capture):
    scene = make_scene(*servers, shared=True, capture=capture)
    others = [scene.tenants[1].id, neighbours()[0].id, neighbours()[1].id]
    watch = scene.watch(writers=others)
    async with scene.daemon() as stage:
        async with scene.writing(others=others) as workload:
            await watch.submit(stage)
            await watch.until("completed")
    clean(workload.report())
    watch.check_completed()


async def test_other_tenants_of_the_target_never_meet_the_values_that_the_tenant_brings(
    pg16, pg18, make_scene
):
    """The target's sequences are far behind, and go on from there while the tenant's rows arrive."""
    scene = make_scene(pg16, pg18, shared=True, first_key=0)
    neighbour = neighbours()[0].id
    watch = scene.watch(writers=[neighbour])
    async with scene.daemon() as stage:
        async with scene.writing() as workload:
            await watch.submit(stage)
            await watch.until_row(lambda row: row["phase"] == "copy")
            async with scene.writing([neighbour]) as theirs:
                await watch.until("completed")
    clean(workload.report())
    clean(theirs.report())
    watch.check_completed()


async def test_to_other_schemas_of_the_same_database(pg16, pg18, make_scene, capture):
    scene = make_scene(pg16, pg18, capture=capture)
    core = scene.homes[CORE]
    watch = scene.watch(target=Home(core.server, core.url, ESTATE, "schema"))
    async with scene.daemon() as stage:
        async with scene.writing() as workload:
            await watch.submit(stage)
            await watch.until("completed")
    clean(workload.report())
    watch.check_completed()


async def test_to_a_database_of_its_own_and_back(pg16, pg18, make_scene):
    scene = make_scene(pg16, pg18)
    estate = scene.homes[ESTATE]
    own = Home(estate.server, estate.url, ESTATE, "dedicated")
    stage = scene.stage()
    with stage.config_path.open("a") as config:
        config.write(f'\n[dedicated]\n"{scene.tenant}" = "{own.url}"\n')
    async with killed(stage):
        await stage.start()
        for watch in (scene.watch(target=own), scene.watch(ESTATE, CORE)):
            async with scene.writing() as workload:
                await watch.submit(stage)
                await watch.until("completed")
            clean(workload.report())
            watch.check_completed()


async def test_there_and_back_and_there_again(pg16, pg18, make_scene, capture):
    """The tombstone of a departure is not in the way of a return."""
    scene = make_scene(pg16, pg18, capture=capture)
    async with scene.daemon() as stage:
        for source, target in ((CORE, ESTATE), (ESTATE, CORE), (CORE, ESTATE)):
            watch = scene.watch(source, target)
            async with scene.writing() as workload:
                await watch.submit(stage)
                await watch.until("completed")
            clean(workload.report())
            watch.check_completed()


async def test_two_tenants_at_once_share_the_replica_identity(pg16, pg18, make_scene):
    scene = make_scene(pg16, pg18, shared=True)
    first, second = scene.tenants[1].id, scene.tenant
    watches = [scene.watch(tenant=first, writers=[second]), scene.watch(tenant=second, writers=[first])]
    async with scene.daemon() as stage:
        async with scene.writing([second, first]) as workload:
            with holding_off(scene.homes[CORE], second):
                for watch in watches:
                    await watch.submit(stage)
                await watches[0].until("completed")
                assert "i" in identities(scene.homes[CORE])
                await watches[1].until_row(lambda row: row["phase"] == "cutover")
                assert watches[1].row["switched_at"] is None
            await watches[1].until("completed")
    clean(workload.report())
    for watch in watches:
        watch.check_completed()
    assert identities(scene.homes[CORE]) == {"d"}


async def test_in_waves_too_short_for_a_second_chunk(pg16, pg18, make_scene, capture):
    scene = make_scene(pg16, pg18, capture=capture)
    watch = scene.watch()
    async with scene.daemon(wave_seconds=0.001) as stage:
        async with scene.writing() as workload:
            await watch.submit(stage)
            await watch.until("completed")
    clean(workload.report())
    watch.check_completed()


async def test_a_dry_run_leaves_nothing(pg16, pg18, make_scene):
    scene = make_scene(pg16, pg18)
    async with scene.daemon() as stage:
        where = ["--tenant", str(scene.tenant), "--to-vertical", ESTATE, "--to-tier", "database"]
        code, output = await stage.run("migrate", *where, "--dry-run", "--json")
    assert code == 0, output
    plan = json.loads(output)
    assert plan["refusals"] == []
    assert len(plan["tables"]) == len(scene.homes[CORE].tables)
    assert [leftovers(home.url) for home in scene.homes.values()] == [[], []]
    assert scene.homes[ESTATE].tables == []
    assert scene.platform.execute("select count(*) from platform.tenant_migrations") == [(0,)]


async def test_a_refused_migration_fails_with_every_reason_and_leaves_nothing(pg16, pg18, make_scene):
    scene = make_scene(pg16, pg18)
    watch = scene.watch()
    scene.homes[CORE].execute("create table core_dms.logs (line text)")
    scene.homes[CORE].execute("create unlogged table core_crm.visits (tenant_id uuid not null)")
    async with scene.daemon() as stage:
        await watch.submit(stage)
        await watch.until("failed")
    watch.check_undone("failed")
    assert watch.row["error"]["code"] == "refused"
    assert "core_dms.logs" in watch.row["error"]["message"]
    assert "core_crm.visits" in watch.row["error"]["message"]


def identities(home: Home) -> set[str]:
    """How the tables' rows are identified in the change stream."""
    rows = home.execute(
        "select distinct relreplident from pg_class c join pg_namespace n on n.oid = relnamespace"
        " where nspname = any(%s) and relkind = 'r'",
        list(schemas(home.vertical).values()),
    )
    return {identity for (identity,) in rows}
