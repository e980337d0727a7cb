"""Both sides reached by roles with just the grants that the README lists: no superuser, and no right to set
session_replication_role, so that triggers and foreign keys are in force while a tenant moves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from mover.core.migration import Wish
from mover.demo.stage import Stage
from tests.support.acceptance import CORE, ESTATE, Scene, Watch, at, killed
from tests.support.ordinary_roles import Gardener, Roles, make_triggers_know_us, ordinary_roles, plant

REACH_TIMEOUT_S = 120


@asynccontextmanager
async def gardening(scene: Scene) -> AsyncIterator[Gardener]:
    """Until the source refuses, which it has to do in the end."""
    gardener = Gardener(scene.homes[CORE], scene.tenant)
    writing = asyncio.create_task(gardener.work())
    try:
        yield gardener
        async with asyncio.timeout(20):
            await writing
    finally:
        writing.cancel()
        await asyncio.wait([writing])


async def move(scene: Scene, roles: Roles, *crashes: str) -> None:
    """With a daemon that dies at each of the points, and is started again."""
    watch, stage = scene.watch(), roles.stage()
    async with gardening(scene) as gardener, killed(stage):
        for number, point in enumerate(crashes):
            await stage.start(**at(point))
            if number == 0:
                await watch.submit(stage)
            await dies(stage, watch)
        await stage.start()
        if not crashes:
            await watch.submit(stage)
        await watch.until("completed")
    watch.check_completed()
    assert gardener.transactions > 20


async def dies(stage: Stage, watch: Watch) -> None:
    """Until the crash point has killed the daemon; meanwhile the migration is watched."""
    watching = asyncio.create_task(watch.for_ever())
    try:
        async with asyncio.timeout(REACH_TIMEOUT_S):
            assert await stage.wait() < 0
    finally:
        watching.cancel()
        await asyncio.wait([watching])


def definitions(scene: Scene, vertical: str) -> list[tuple[str, ...]]:
    """Foreign keys and triggers, whatever the schema is called."""
    found = scene.homes[vertical].execute(
        "select c.relname, k.conname, pg_get_constraintdef(k.oid), k.convalidated::text from pg_constraint k"
        " join pg_class c on c.oid = k.conrelid"
        " where contype = 'f' and c.relnamespace::regnamespace::text <> 'mover'"
        " union all select c.relname, tgname, pg_get_triggerdef(t.oid), tgenabled::text from pg_trigger t"
        " join pg_class c on c.oid = t.tgrelid where not tgisinternal and tgname not like 'mover%%'"
        " order by 1, 2"
    )
    return [tuple(text.replace(f"{vertical}_", "") for text in row) for row in found]


@pytest.mark.parametrize(
    ("source", "target", "shared"),
    [("pg18", "pg16", False), ("pg16", "pg18", True)],
    ids=["18 to a fresh 16", "16 to a shared 18"],
)
async def test_a_tenant_moves_while_triggers_and_foreign_keys_are_in_force(
    source, target, shared, request, make_scene, capture
):
    servers = request.getfixturevalue(source), request.getfixturevalue(target)
    scene = make_scene(*servers, shared=shared, rows=500, capture=capture)
    if shared:
        make_triggers_know_us(scene)
    plant(scene, shared=shared)
    with ordinary_roles(scene) as roles:
        await move(scene, roles)
        assert definitions(scene, CORE) == definitions(scene, ESTATE)


@pytest.mark.parametrize(
    ("shared", "crashes"),
    [
        (False, ("index.begun", "follow.applied", "cutover.proved")),
        (True, ("copy.chunk", "removal.batch")),
    ],
)
async def test_a_daemon_that_dies_on_the_careful_way_is_followed_by_one_that_ends_it(
    pg16, pg18, make_scene, shared, crashes, capture
):
    scene = make_scene(pg16, pg18, shared=shared, rows=500, capture=capture)
    if shared:
        make_triggers_know_us(scene)
    plant(scene, shared=shared)
    with ordinary_roles(scene) as roles:
        await move(scene, roles, *crashes)
        assert definitions(scene, CORE) == definitions(scene, ESTATE)


async def test_rows_that_refer_to_each_other_are_removed_when_a_move_is_called_off(pg16, pg18, make_scene):
    scene = make_scene(pg16, pg18, shared=True, rows=500)
    make_triggers_know_us(scene)
    plant(scene, shared=True)
    with ordinary_roles(scene) as roles:
        watch, stage = scene.watch(), roles.stage()
        async with killed(stage):
            await stage.start(**at("verify.done"))
            await watch.submit(stage)
            await dies(stage, watch)
            await scene.wish(watch, Wish.CANCEL)
            await stage.start()
            await watch.until("cancelled")
        watch.check_undone("cancelled")


async def test_what_would_act_twice_is_refused_with_both_ways_out(pg16, pg18, make_scene):
    scene = make_scene(pg16, pg18, shared=True, rows=200)
    core, estate = scene.homes[CORE], scene.homes[ESTATE]
    core.execute(
        "create trigger gone after delete on core_crm.deals for each row execute function core_dms.touch()"
    )
    for home in (core, estate):
        dms = f"{home.vertical}_dms"
        home.execute(f"alter table {dms}.tags add first_document uuid references {dms}.documents")
        home.execute(f"alter table {dms}.documents add best_tag int")
        home.execute(
            f"alter table {dms}.documents add foreign key (tenant_id, best_tag) references {dms}.tags"
        )
        home.execute(f"create rule kept as on delete to {dms}.folders do instead nothing")
    estate.execute(
        "create trigger gone after delete on realestate_crm.deals for each row"
        " execute function realestate_dms.touch()"
    )
    with ordinary_roles(scene) as roles:
        async with killed(roles.stage()) as stage:
            await stage.start()
            async with stage.client() as api:
                plan = await api.submit(
                    {
                        "tenantId": str(scene.tenant),
                        "targetVertical": ESTATE,
                        "targetTier": "database",
                        "dryRun": True,
                    }
                )
        codes = sorted({refusal["code"] for refusal in plan["refusals"]})
        assert codes == ["foreign_key_cycle_checked", "rule", "trigger_fires_twice", "trigger_on_clean_up"]
        for refusal in plan["refusals"]:
            assert "GRANT SET ON PARAMETER session_replication_role" in refusal["hint"]
        grant = 'grant set on parameter session_replication_role to "{}"'
        for vertical, home in scene.homes.items():
            home.execute(grant.format(roles.names[vertical]))
        async with killed(roles.stage()) as stage:
            watch = scene.watch()
            await stage.start()
            await watch.submit(stage)
            await watch.until("completed")
        watch.check_completed()
