"""Every statement of the runbook, in the situation that it is written for."""

from __future__ import annotations

import asyncio
import re
import signal
from pathlib import Path
from uuid import UUID

import psycopg

from mover.core.ids import MigrationId
from mover.postgres import publication
from tests.acceptance.test_lost_changes import said
from tests.acceptance.test_rollback import until_written
from tests.support.acceptance import CORE, ESTATE, Home, Scene, Watch, at, clean, killed, until_stopped
from tests.support.waiting import until

RUNBOOK = Path(__file__).parents[2] / "docs/runbook.md"
BLOCKS = {
    name: (place, statement)
    for place, name, statement in re.findall(
        r"^<!-- on the (\w+): (\w+) -->\n```sql\n(.*?)^```$", RUNBOOK.read_text(), re.DOTALL | re.MULTILINE
    )
}
LOOKS = (
    "first_look",
    "last_steps",
    "last_events",
    "who_is_in_the_way",
    "forgotten_prepared",
    "what_slots_keep",
    "the_fence",
    "who_holds_the_fence",
    "what_differs",
    "the_route",
)
ACTS = {"drop_the_slot", "the_damage_is_mended", "end_its_lease", "abort_by_hand", "reopen_by_hand"}


def run(name: str, watch: Watch) -> list[tuple]:
    """As psql would: the last result."""
    place, text = BLOCKS[name]
    home: Home = {"platform": watch.scene.platform, "source": watch.source, "target": watch.target}[place]
    slot = publication.name_of(MigrationId(UUID(watch.id)))
    for variable, value in (("id", watch.id), ("tenant", watch.tenant), ("slot", slot)):
        text = text.replace(f":'{variable}'", f"'{value}'")
    with psycopg.connect(home.url, autocommit=True) as conn:
        cursor = conn.execute(text)
        rows = []
        while True:
            rows = cursor.fetchall() if cursor.description else rows
            if not cursor.nextset():
                return rows


def test_every_statement_of_the_runbook_is_tried():
    assert set(LOOKS) | ACTS == set(BLOCKS)
    assert RUNBOOK.read_text().count("```sql") == len(BLOCKS)


async def test_the_first_looks_tell_what_a_migration_does(pg16, pg18, make_scene):
    scene = make_scene(pg16, pg18)
    async with scene.frozen_at("cutover.closed") as (watch, stage, workload):
        found = {name: await asyncio.to_thread(run, name, watch) for name in LOOKS}
        assert found["first_look"][0][:2] == ("in_progress", "cutover")
        assert ("cutover", "running") in {(name, status) for name, status, *_ in found["last_steps"]}
        assert found["last_events"]
        assert [(state, str(tenant)) for tenant, _, state, *_ in found["the_fence"]] == [
            ("closed", str(watch.tenant))
        ]
        assert any(name.endswith("/hold") for _, name, *_ in found["who_holds_the_fence"])
        assert found["what_slots_keep"][0][1:3] == (True, "reserved")
        assert found["the_route"] == [("core", "schema")]
        stage.send_signal(signal.SIGCONT)
        await watch.until("completed")
    assert workload.report().stale_reads == 0


async def test_a_slot_that_is_dropped_by_hand_is_made_good(pg16, pg18, make_scene):
    scene = make_scene(pg16, pg18)
    async with scene.frozen_at("catch_up.begun") as (watch, stage, workload):
        await asyncio.to_thread(run, "drop_the_slot", watch)
        assert await asyncio.to_thread(run, "what_slots_keep", watch) == []
        await until_written(workload, 20)
        stage.send_signal(signal.SIGCONT)
        await watch.until("completed")
        assert said(scene, watch, "differs, and is copied anew: %")
    clean(workload.report())
    watch.check_completed()


async def test_a_daemon_that_hangs_is_relieved(pg16, pg18, make_scene):
    scene = make_scene(pg16, pg18)
    watch = scene.watch()
    hung, other = scene.stage("hung", lease_seconds=600), scene.stage("other")
    async with killed(hung), killed(other), scene.writing() as workload:
        await hung.start(**at("copy.chunk", signal.SIGSTOP))
        await watch.submit(hung)
        await until_stopped(hung)
        await other.start()
        await asyncio.to_thread(run, "end_its_lease", watch)
        await watch.until("completed")
    clean(workload.report())
    watch.check_completed()


async def test_writers_that_wait_are_freed_by_hand_and_the_migration_goes_on_later(pg16, pg18, make_scene):
    scene = make_scene(pg16, pg18)
    watch, stage = scene.watch(), scene.stage(lease_seconds=1)
    async with killed(stage), scene.writing() as workload:
        await stage.start(**at("cutover.proved"))
        await watch.submit(stage)
        assert await stage.wait() == -signal.SIGKILL
        before = workload.transactions
        assert (await asyncio.to_thread(run, "abort_by_hand", watch)) == [(3,)]
        assert (await asyncio.to_thread(run, "reopen_by_hand", watch)) == [(1,)]
        await until(lambda: workload.transactions > before + 50)
        await stage.start()
        await watch.until("completed")
    clean(workload.report())
    watch.check_completed()


async def test_damage_that_is_mended_lets_the_migration_go_on(pg16, pg18, make_scene):
    scene = make_scene(pg16, pg18)
    watch, stage = scene.watch(), scene.stage()
    core, estate = scene.homes[CORE], scene.homes[ESTATE]
    async with killed(stage):
        await stage.start(**at("verify.done", signal.SIGSTOP))
        await watch.submit(stage)
        await until_stopped(stage)
        lost = scene.lose_a_deal()
        stage.send_signal(signal.SIGCONT)
        await watch.until_row(lambda row: (row["error"] or {}).get("code") == "damage_after_switch")
        await watch.until_row(lambda row: not row["leased"])
        ((shown,),) = run("what_differs", watch)
        assert str(lost) in shown
        mend(core, estate, scene, lost)
        run("the_damage_is_mended", watch)
        assert (await stage.run("resume", watch.id))[0] == 0
        await watch.until("completed")
    watch.check_completed()


def mend(core: Home, estate: Home, scene: Scene, lost: int) -> None:
    """The operator brings the row that is missing, as the tenant's application would."""
    with psycopg.connect(core.url) as source, psycopg.connect(estate.url) as target:
        columns = "tenant_id, id, contact_id, stage::text, amount, expected_on, probability, notes"
        query = f"select {columns} from core_crm.deals where tenant_id = %s and id = %s"
        row = source.execute(query, (scene.tenant, lost)).fetchone()
        target.execute("insert into realestate_crm.deals values (%s, %s, %s, %s, %s, %s, %s, %s)", row)
