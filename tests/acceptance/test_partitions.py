"""A tenant whose medical record is partitioned moves between two live servers while it is written."""

from __future__ import annotations

import asyncio
import random
from datetime import date, timedelta

import psycopg
import pytest

from mover.core.ids import TenantId
from mover.demo.schema import schemas
from tests.support import medical
from tests.support.acceptance import CORE, ESTATE, Home, Scene, holding_off

JANUARY = date(2026, 1, 1)
# Every patient who changes ward takes all visits along: more of them, and nobody keeps up with the writer.
MOST_VISITS = 200


@pytest.fixture(params=[("pg16", "pg18"), ("pg18", "pg16")], ids=lambda names: "-to-".join(names))
def servers(request):
    return tuple(request.getfixturevalue(name) for name in request.param)


def schema_of(home: Home) -> str:
    return schemas(home.vertical)["dms"]


def add_records(scene: Scene) -> None:
    """In the year 2025 only the moved tenant has prescriptions, so that it may truncate them."""
    core, other = scene.homes[CORE], scene.tenants[1].id
    schema = schema_of(core)
    with psycopg.connect(core.url, autocommit=True) as conn:
        conn.execute(medical.ddl(schema))
        conn.execute(f"grant all on all tables in schema {schema} to app")
        for tenant in (scene.tenant, other):
            conn.execute(medical.rows(schema, tenant))
        conn.execute(f"delete from {schema}.prescriptions where year = 2025 and tenant_id = %s", (other,))


class Doctor:
    """Writes one transaction after the other until the place refuses, and knows what was acknowledged."""

    def __init__(self, home: Home, tenant: TenantId, seed: int) -> None:
        self.home, self.tenant = home, tenant
        self.random = random.Random(seed)
        self.visits: dict[int, date] = {}
        self.transactions = 0

    async def work(self) -> None:
        async with await psycopg.AsyncConnection.connect(
            self.home.app_url.reveal(), options=f"-c search_path={schema_of(self.home)}"
        ) as conn:
            while True:
                try:
                    await self._one(conn)
                except psycopg.errors.ReadOnlySqlTransaction:
                    return
                except (psycopg.errors.SerializationFailure, psycopg.errors.DeadlockDetected):
                    await conn.rollback()

    async def _one(self, conn: psycopg.AsyncConnection) -> None:
        visits = dict(self.visits)
        for _ in range(self.random.randint(1, 3)):
            await self._write(conn, visits)
        await conn.commit()
        self.visits = visits
        self.transactions += 1

    async def _write(self, conn: psycopg.AsyncConnection, visits: dict[int, date]) -> None:
        kind, number = self.random.randrange(11), self.random.randint(1, 30)
        named = {"t": self.tenant, "n": number, "day": JANUARY + timedelta(self.random.randrange(90))}
        if kind == 0 and self.transactions == 40:
            await conn.execute("truncate prescriptions_2025")
        elif (kind < 3 and len(visits) <= MOST_VISITS) or not visits:
            cursor = await conn.execute(NEW_VISIT, named)
            visits[(await cursor.fetchone())[0]] = named["day"]
        elif kind == 3:  # most of them change partition
            named["id"] = self.random.choice([*visits])
            await conn.execute(
                "update visits set day = %(day)s where tenant_id = %(t)s and id = %(id)s", named
            )
            visits[named["id"]] = named["day"]
        elif kind == 4 or len(visits) > MOST_VISITS:
            named["id"] = self.random.choice([*visits])
            await conn.execute("delete from visits where tenant_id = %(t)s and id = %(id)s", named)
            del visits[named["id"]]
        else:
            await conn.execute(MOVES[kind - 5], named)


NEW_VISIT = """
insert into visits (tenant_id, day, ward, patient, notes)
select tenant_id, %(day)s, ward, id, repeat('x', 3000) from patients where tenant_id = %(t)s and id = %(n)s
returning id
"""
MOVES = (
    "update patients set ward = case ward when 'south' then 'north' else 'south' end"
    " where tenant_id = %(t)s and id = %(n)s",
    "update readings set id = gen_random_uuid(), value = value + 1 where tenant_id = %(t)s"
    " and id = (select id from readings where tenant_id = %(t)s order by value, id limit 1)",
    "update prescriptions set kind = case kind when 'a' then 'z' else 'a' end, drug = drug || '.'"
    " where tenant_id = %(t)s and id %% 30 = %(n)s",
    "insert into results values (gen_random_uuid(), %(day)s, %(t)s, %(n)s, repeat('y', 300))",
    "update results set taken = taken + 200, value = value + 1 where tenant_id = %(t)s and value = %(n)s"
    " and taken < '2026-03-01'",
    "delete from results where tenant_id = %(t)s and value = %(n)s and taken > '2026-06-01'",
)


async def test_there_and_back_while_rows_change_partition(servers, make_scene):
    scene = make_scene(*servers)
    add_records(scene)
    async with scene.daemon() as stage:
        for seed, (source, target) in enumerate([(CORE, ESTATE), (ESTATE, CORE)]):
            watch = scene.watch(source, target)
            doctor = Doctor(scene.homes[source], scene.tenant, seed)
            writing = asyncio.create_task(doctor.work())
            try:
                await watch.submit(stage)
                await watch.until("completed")
                async with asyncio.timeout(20):
                    await writing
            finally:
                writing.cancel()
            watch.check_completed()
            assert doctor.transactions > 40
            assert_kept(scene.homes[target], doctor)


def assert_kept(home: Home, doctor: Doctor) -> None:
    found = home.execute(
        f"select id, day from {schema_of(home)}.visits where tenant_id = %s and id = any(%s)",
        doctor.tenant,
        [*doctor.visits],
    )
    assert dict(found) == doctor.visits


async def test_a_partition_that_goes_pauses_the_migration_before_the_switch(pg16, pg18, make_scene):
    """A detachment takes rows away that the stream does not tell of."""
    scene = make_scene(pg16, pg18)
    add_records(scene)
    core, estate = scene.homes[CORE], scene.homes[ESTATE]
    core.execute("truncate core_dms.prescriptions")
    core.execute("delete from core_dms.visits_2026_01 where tenant_id <> %s", scene.tenant)
    detach = "alter table {}.visits detach partition {}.visits_2026_01"
    watch = scene.watch()
    async with scene.daemon() as stage:
        with holding_off(core, scene.tenant):
            await watch.submit(stage)
            await watch.until_row(lambda row: row["phase"] == "cutover")
            core.execute(detach.format(*["core_dms"] * 2))
        await watch.until("paused")
        assert (watch.row["switched_at"], watch.row["error"]["code"]) == (None, "schema_changed")
        assert "visits_2026_01" in watch.row["error"]["message"]
        estate.execute(detach.format(*["realestate_dms"] * 2))
        assert (await stage.run("resume", watch.id))[0] == 0
        await watch.until("completed")
    watch.check_completed()


async def test_a_partition_whose_changes_lose_their_keys_is_copied_anew(pg16, pg18, make_scene):
    """Its replica identity tells the tenant, but not the row: the stream's deletes find nothing."""
    scene = make_scene(pg16, pg18)
    add_records(scene)
    core = scene.homes[CORE]
    core.execute("create unique index readings_values on core_dms.readings_0 (tenant_id, value)")
    watch = scene.watch()
    async with scene.daemon() as stage:
        with holding_off(core, scene.tenant):
            await watch.submit(stage)
            await watch.until_row(lambda row: row["phase"] == "cutover")
            core.execute("alter table core_dms.readings_0 replica identity using index readings_values")
            core.execute("delete from core_dms.readings_0 where tenant_id = %s and value < 20", scene.tenant)
        await watch.until("paused")
        assert (watch.row["switched_at"], watch.row["error"]["code"]) == (None, "schema_changed")
        assert "core_dms.readings_0" in watch.row["error"]["message"]
        core.execute("alter table core_dms.readings_0 replica identity default")
        assert (await stage.run("resume", watch.id))[0] == 0
        await watch.until("completed")
    watch.check_completed()
