"""Captured by triggers, a move waits for nobody's transaction but for those that have written the tenant's
rows, and for these only before the switch. A slot's creation waits for whoever has written anything."""

from __future__ import annotations

import signal

import psycopg

from mover.core.ids import Capture
from tests.support.acceptance import CORE, ESTATE, clean

TOUCH = "update core_dms.folders set name = name || ' again' where tenant_id = %s"


async def test_transactions_of_others_may_stay_open_for_the_whole_move(pg16, pg18, make_scene):
    scene = make_scene(pg16, pg18, capture=Capture.TRIGGER)
    core, other = scene.homes[CORE], scene.tenants[1].id
    with psycopg.connect(core.url) as elsewhere, psycopg.connect(core.url) as beside:
        elsewhere.execute("create table public.elsewhere ()")
        elsewhere.execute("select count(*) from core_dms.folders")
        async with scene.frozen_at("copy.begun") as (watch, stage, workload):
            beside.execute(TOUCH, (other,))
            stage.send_signal(signal.SIGCONT)
            await watch.until_row(lambda row: row["switched_at"])
            assert not any("next cutover" in reason for reason in watch.waited_for)
            beside.rollback()
            elsewhere.rollback()
            await watch.until("completed")
    clean(workload.report())
    watch.check_completed()


async def test_the_switch_waits_for_a_transaction_that_has_written_the_tenants_rows(pg16, pg18, make_scene):
    scene = make_scene(pg16, pg18, capture=Capture.TRIGGER)
    core = scene.homes[CORE]
    with psycopg.connect(core.url) as writer:
        async with scene.frozen_at("copy.begun") as (watch, stage, workload):
            writer.execute(TOUCH, (scene.tenant,))
            stage.send_signal(signal.SIGCONT)
            await watch.until_row(lambda row: "next cutover" in (row["progress"].get("waiting_for") or ""))
            assert watch.row["switched_at"] is None
            writer.commit()
            await watch.until("completed")
    clean(workload.report())
    watch.check_completed()
    names = "select count(*) from realestate_dms.folders where tenant_id = %s and name not like '%% again'"
    assert scene.homes[ESTATE].execute(names, scene.tenant) == [(0,)]
