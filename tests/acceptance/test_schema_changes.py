"""Schemas that change while a tenant moves: the harmless is followed, everything else waits for an operator,
and what may have changed in the rows is copied anew."""

from __future__ import annotations

import asyncio
import signal

import pytest

from tests.support.acceptance import CORE, ESTATE, Home, Scene, at, clean, holding_off, killed, until_stopped

SIGSTOP, SIGCONT = signal.SIGSTOP, signal.SIGCONT
# Of tables that the writers leave alone.
FOLLOWED = (
    "alter table {0}_crm.deals add column discount bigint",
    "create index deals_discount on {0}_crm.deals (tenant_id, discount)",
    "drop index {0}_crm.deals_open",
    "comment on table {0}_crm.deals is 'new'",
    "revoke delete on {0}_crm.deals from app",
)
REMARKS = (
    "select obj_description('realestate_crm.deals'::regclass), has_table_privilege('app', r, 'update'),"
    " has_table_privilege('app', r, 'delete') from (select 'realestate_crm.deals'::regclass as r) deals"
)
OPERATORS = (
    "alter table {0}_crm.deals add column score double precision default random()",
    "alter table {0}_crm.deals rename column notes to remarks",
    "alter table {0}_crm.companies alter column founded type timestamptz",
    "alter table {0}_crm.companies rename to firms",
    "alter table {0}_dms.tags drop column color",
    "drop table {0}_dms.document_tags",
    "create table {0}_dms.document_tags (tenant_id uuid, document_id uuid, tag_id integer,"
    " weight double precision, primary key (tenant_id, document_id, tag_id))",
    "create table {0}_crm.visits (tenant_id uuid not null, id int generated always as identity primary key)",
    "alter type {0}_crm.deal_stage add value 'parked'",
    "create unique index folders_once on {0}_dms.folders (tenant_id, id)",
)


@pytest.mark.parametrize("point", ["copy.begun", "catch_up.begun", "cutover.begun"])
async def test_a_harmless_change_is_followed(pg16, pg18, make_scene, point):
    """With the values that were written before anybody had noticed."""
    scene = make_scene(pg16, pg18)
    async with scene.frozen_at(point) as (watch, stage, workload):
        await change(scene.homes[CORE], *FOLLOWED)
        filled = fill(scene)
        watch.take_others()
        stage.send_signal(SIGCONT)
        await watch.until("completed")
    clean(workload.report())
    assert discounts(scene) == filled
    assert indexes_of_deals(scene) == {"deals_pkey", "deals_contact", "deals_discount"}
    assert scene.homes[ESTATE].execute(REMARKS) == [("new", True, False)]
    assert "column realestate_crm.deals.discount was added" in events(scene, watch.id)
    watch.check_completed()


async def test_a_change_under_the_fence_is_seen_there(pg16, pg18, make_scene):
    """Nothing is switched; the target follows, and the next attempt switches."""
    scene = make_scene(pg16, pg18)
    watch, stage = scene.watch(), scene.stage(pause_budget_ms=20_000)
    async with killed(stage):
        await stage.start(**at("cutover.closed", SIGSTOP))
        await watch.submit(stage)
        await until_stopped(stage)
        await change(scene.homes[CORE], FOLLOWED[0])
        watch.take_others()
        stage.send_signal(SIGCONT)
        await watch.until_row(lambda row: (row["error"] or {}).get("code") == "plan_outdated")
        assert watch.row["switched_at"] is None
        await watch.until("completed")
    assert discounts(scene) == {}
    watch.check_completed()


@pytest.mark.parametrize("point", ["copy.begun", "verify.done"])
async def test_an_operators_alignment_is_enough_to_go_on(pg16, pg18, make_scene, point):
    """Not before it was made; then what it may have changed in the rows is copied anew."""
    scene = make_scene(pg16, pg18)
    async with scene.frozen_at(point) as (watch, stage, workload):
        core, estate = scene.homes[CORE], scene.homes[ESTATE]
        await change(core, *OPERATORS)
        core.execute("insert into core_crm.visits select %s from generate_series(1, 50)", scene.tenant)
        core.execute("insert into core_dms.document_tags select %s, gen_random_uuid(), 1, 2", scene.tenant)
        core.execute("update core_crm.deals set stage = 'parked' where tenant_id = %s", scene.tenant)
        stage.send_signal(SIGCONT)
        for _ in range(2):
            await watch.until("paused")
            error, epoch = watch.row["error"], watch.row["epoch"]
            assert (watch.row["switched_at"], error["code"]) == (None, "schema_changed")
            assert "visits" in error["message"]
            assert error["hint"]
            assert (await stage.run("resume", watch.id))[0] == 0
            await watch.until_row(lambda row: row["epoch"] > epoch)  # noqa: B023
        await watch.until("paused")
        await change(estate, *OPERATORS)
        watch.take_others()
        assert (await stage.run("resume", watch.id))[0] == 0
        await watch.until("completed")
    clean(workload.report())
    watch.check_completed()
    assert estate.execute("select count(*) from realestate_crm.visits") == [(50,)]
    assert estate.execute("select distinct stage::text from realestate_crm.deals") == [("parked",)]


async def test_a_row_that_only_the_changed_schema_takes_pauses_instead_of_failing(pg16, pg18, make_scene):
    """The target refuses it before anybody has compared the schemas."""
    scene = make_scene(pg16, pg18)
    parked = "alter type {0}_crm.deal_stage add value 'parked'"
    async with scene.frozen_at("catch_up.begun") as (watch, stage, workload):
        await change(scene.homes[CORE], parked)
        scene.homes[CORE].execute(
            "update core_crm.deals set stage = 'parked' where tenant_id = %s", scene.tenant
        )
        stage.send_signal(SIGCONT)
        await watch.until("paused")
        assert watch.row["error"]["code"] == "schema_changed"
        assert "type realestate_crm.deal_stage" in watch.row["error"]["message"]
        await change(scene.homes[ESTATE], parked)
        assert (await stage.run("resume", watch.id))[0] == 0
        await watch.until("completed")
    clean(workload.report())
    watch.check_completed()


async def test_a_replica_identity_that_somebody_takes_away_is_put_right(pg16, pg18, make_scene):
    """What was deleted without a key in the stream is found by copying the table anew."""
    scene = make_scene(pg16, pg18, rows=500)
    core = scene.homes[CORE]
    core.execute(
        "create table core_crm.labels (tenant_id uuid not null, id int not null, name text not null,"
        " primary key (tenant_id, id), constraint label_names unique (tenant_id, name))"
    )
    core.execute("insert into core_crm.labels select %s, g, g from generate_series(1, 50) g", scene.tenant)
    watch = scene.watch()
    async with scene.daemon() as stage:
        with holding_off(core, scene.tenant):
            await watch.submit(stage)
            await watch.until_row(lambda row: row["phase"] == "cutover")
            core.execute("alter table core_crm.labels replica identity using index label_names")
            core.execute("delete from core_crm.labels where id < 10")
            await watch.until_row(lambda row: (row["error"] or {}).get("code") == "plan_outdated")
        core.execute("alter table core_crm.labels replica identity default")
        await watch.until("completed")
    watch.check_completed()


@pytest.mark.parametrize("aligned", [False, True], ids=["paused", "aligned"])
async def test_a_migration_whose_schemas_changed_can_be_called_off(pg16, pg18, make_scene, aligned):
    """In a target with other tenants, where every row has to be found."""
    scene = make_scene(pg16, pg18, shared=True)
    async with scene.frozen_at("verify.begun") as (watch, stage, workload):
        await change(scene.homes[CORE], *OPERATORS)
        stage.send_signal(SIGCONT)
        await watch.until("paused")
        if aligned:
            await change(scene.homes[ESTATE], *OPERATORS)
        watch.take_others()
        assert (await stage.run("cancel", watch.id))[0] == 0
        await watch.until("cancelled")
    clean(workload.report())
    watch.check_undone("cancelled")


async def test_rows_that_are_copied_anew_survive_the_death_of_the_daemon(pg16, pg18, make_scene):
    """What is to be copied anew was noted before the plan was brought up to date."""
    scene = make_scene(pg16, pg18)
    async with scene.frozen_at("verify.begun") as (watch, stage, workload):
        await change(scene.homes[CORE], *OPERATORS)
        stage.send_signal(SIGCONT)
        await watch.until("paused")
        await stage.kill()
        await change(scene.homes[ESTATE], *OPERATORS)
        watch.take_others()
        await stage.start(**at("align.planned"))
        assert (await stage.run("resume", watch.id))[0] == 0
        assert await stage.wait() == -signal.SIGKILL
        await stage.start()
        await watch.until("completed")
    assert workload.report().stale_reads == 0
    watch.check_completed()


async def change(home: Home, *statements: str) -> None:
    """In a thread: the writers, for whose locks it waits, work in this one's event loop."""
    for statement in statements:
        await asyncio.to_thread(home.execute, statement.format(home.vertical))


def fill(scene: Scene) -> dict[int, int]:
    """A value for half of the tenant's deals, so that it matters which."""
    return dict(
        scene.homes[CORE].execute(
            "update core_crm.deals set discount = id * 3 where tenant_id = %s and id %% 2 = 0"
            " returning id, discount",
            scene.tenant,
        )
    )


def discounts(scene: Scene) -> dict[int, int]:
    return dict(
        scene.homes[ESTATE].execute(
            "select id, discount from realestate_crm.deals where discount is not null"
        )
    )


def indexes_of_deals(scene: Scene) -> set[str]:
    found = scene.homes[ESTATE].execute(
        "select indexname from pg_indexes where schemaname = 'realestate_crm' and tablename = 'deals'"
    )
    return {name for (name,) in found}


def events(scene: Scene, migration: str) -> str:
    found = scene.platform.execute(
        "select string_agg(message, chr(10) order by id) from platform.migration_events"
        " where migration_id = %s",
        migration,
    )
    return str(found[0][0])
