"""The rows of partitioned tables on their way: what changes, moves and goes in partitions, on both sides."""

from __future__ import annotations

from contextlib import asynccontextmanager

import psycopg
import pytest

from mover.core.errors import SchemaChanged
from mover.core.ids import Capture, Side
from mover.postgres import removal
from tests.integration.test_partitions import CHANGED, MEDICAL, plan_of, prepare
from tests.support.checks import assert_tenant_equal, tenant_fingerprints
from tests.support.fencing import quiet
from tests.support.rig import OTHER, TENANT, Rig, Subject, execute, rig


@asynccontextmanager
async def moving(pair, capture=Capture.WAL):
    """The medical record on both sides, guarded on the source, the tenant's rows not copied yet."""
    prepare(pair.source, TENANT, OTHER)
    prepare(pair.target, OTHER)
    plan = await plan_of(pair.source, pair.target)
    subject = Subject(plan.shape.tables, "SELECT 1", "SELECT 1")
    async with rig(pair.source, pair.target, subject=subject, capture=capture) as r:
        if capture is Capture.WAL:
            await r.fence.install([t.holding(Side.SOURCE) for t in subject.tables], "open", quiet)
        async with r.following():
            yield r


async def expect_equal(r: Rig) -> int:
    await r.follower.catch_up_once()
    return assert_tenant_equal(r.source_url, r.target_url, MEDICAL, TENANT)


NEW_VISITS = (
    "INSERT INTO app.visits (tenant_id, day, ward, patient)"
    " SELECT tenant_id, '2026-03-10', ward, id FROM app.patients"
)
MOVES = (
    # Between partitions: a deletion and an insertion, with values that an update would not send.
    "UPDATE app.visits SET day = day + 31 WHERE id % 3 = 0 AND day < '2026-02-01'",
    "UPDATE app.patients SET ward = 'south' WHERE ward = 'north' AND id < 12",
    "UPDATE app.prescriptions SET year = 4051 - year WHERE id % 2 = 0 AND kind < 'c'",
    "UPDATE app.prescriptions SET kind = 'a' WHERE year = 2026 AND kind = 'd'",
    "UPDATE app.readings SET id = md5(id::text)::uuid WHERE value > 20",
    # Within one.
    "UPDATE app.visits SET day = day + 1 WHERE day < '2026-01-20' AND id % 5 = 1",
    "UPDATE app.patients SET name = upper(name)",
    # Into and out of the tenant.
    "UPDATE app.readings SET tenant_id ="
    " CASE tenant_id WHEN '{TENANT}' THEN '{OTHER}' ELSE '{TENANT}' END::uuid WHERE value < 9",
    # The first rows of a partition.
    NEW_VISITS,
    "DELETE FROM app.visits WHERE day BETWEEN '2026-02-10' AND '2026-02-12'",
    # Told by the row, not by the key: everybody's are sent.
    "UPDATE app.results SET value = value + 1",
    "UPDATE app.results SET taken = taken + 365 WHERE value < 50 AND taken < '2026-01-01'",
    "UPDATE app.results SET tenant_id ="
    " CASE tenant_id WHEN '{TENANT}' THEN '{OTHER}' ELSE '{TENANT}' END::uuid WHERE value > 70",
    "UPDATE app.results SET taken = taken - 200, tenant_id ="
    " CASE tenant_id WHEN '{TENANT}' THEN '{OTHER}' ELSE '{TENANT}' END::uuid WHERE value BETWEEN 60 AND 70",
    "DELETE FROM app.results WHERE value < 30",
)


@pytest.mark.parametrize("small_batch", [0, 10**9], ids=["sets", "in order"])
async def test_rows_that_change_partition_arrive_once(pair, small_batch, monkeypatch, capture):
    monkeypatch.setattr("mover.postgres.apply.SMALL_BATCH", small_batch)
    async with moving(pair, capture) as r:
        await r.copy().run()
        assert await expect_equal(r) == 830
        others = others_on_the_target(r)
        for statement in MOVES:
            execute(r.source_url, statement.replace("{TENANT}", str(TENANT)).replace("{OTHER}", str(OTHER)))
            await expect_equal(r)
        with psycopg.connect(r.source_url) as conn:  # once more in one transaction
            for statement in (*MOVES[:7], *MOVES[-5:]):
                conn.execute(statement.replace("{TENANT}", str(TENANT)).replace("{OTHER}", str(OTHER)))
        await expect_equal(r)
        assert others_on_the_target(r) == others


async def test_a_partition_made_under_way_without_the_tenant_in_its_key_hinders_nobody(pair, capture):
    """Its replica identity is the key: with a row filter every update in it would fail."""
    async with moving(pair, capture) as r:
        await r.copy().run()
        others = others_on_the_target(r)
        for url in (r.source_url, r.target_url):
            execute(
                url,
                "CREATE TABLE app.results_2027 PARTITION OF app.results"
                " FOR VALUES FROM ('2027-01-01') TO ('2028-01-01')",
            )
        execute(r.source_url, "UPDATE app.results SET taken = taken + 500 WHERE value > 50")
        execute(r.source_url, "UPDATE app.results SET value = value + 1 WHERE taken > '2027-01-01'")
        await expect_equal(r)
        assert execute(r.target_url, "SELECT count(*) > 0 FROM app.results_2027") == [(True,)]
        assert others_on_the_target(r) == others


def others_on_the_target(r: Rig) -> dict:
    return tenant_fingerprints(r.target_url, MEDICAL, OTHER)


OTHERWISE = """
CREATE TABLE app.copy (LIKE app.prescriptions INCLUDING ALL) PARTITION BY RANGE (id);
CREATE TABLE app.low PARTITION OF app.copy FOR VALUES FROM (MINVALUE) TO (1000);
CREATE TABLE app.high PARTITION OF app.copy FOR VALUES FROM (1000) TO (MAXVALUE);
DROP TABLE app.prescriptions;
ALTER TABLE app.copy RENAME TO prescriptions;
"""


async def test_a_key_change_moves_a_row_between_partitions_of_the_target(pair, capture):
    """Where the sides divide a table differently, an update within a partition crosses one."""
    async with moving(pair, capture) as r:
        with psycopg.connect(r.target_url, autocommit=True) as conn:
            conn.execute(OTHERWISE)
        await r.copy().run()
        updates = "UPDATE app.prescriptions SET id = id + 1000, drug = drug || '!' WHERE year = 2025"
        execute(r.source_url, updates)
        assert await expect_equal(r) == 830
        execute(r.source_url, updates.replace("2025", "2026"))
        assert await expect_equal(r) == 830
        assert execute(r.target_url, "SELECT count(*) FROM app.low") == [(0,)]


async def test_a_truncated_partition_is_emptied_of_the_tenants_rows_only_and_in_its_place(pair, capture):
    async with moving(pair, capture) as r:
        await r.copy().run()
        others = others_on_the_target(r)
        with psycopg.connect(r.source_url) as conn:
            conn.execute("UPDATE app.readings SET value = value + 1")
            conn.execute("TRUNCATE app.readings_1")
            conn.execute(
                f"INSERT INTO app.readings SELECT '{TENANT}', gen_random_uuid(), g FROM"
                " generate_series(1, 30) g"
            )
        assert 0 < await expect_equal(r) < 830 + 30
        execute(r.source_url, "TRUNCATE app.prescriptions_2026")
        await expect_equal(r)
        assert execute(r.target_url, READ_2026, TENANT) == [(0,)]
        execute(r.source_url, "TRUNCATE app.prescriptions")
        execute(r.source_url, "TRUNCATE app.visits_2026_01, app.prescriptions CASCADE")
        await expect_equal(r)
        assert others_on_the_target(r) == others


READ_2026 = "SELECT count(*) FROM app.prescriptions_2026 WHERE tenant_id = %s"


async def test_a_half_copied_table_survives_the_truncation_of_a_partition(pair, capture):
    async with moving(pair, capture) as r:
        copy = r.copy(workers=1, wave_seconds=0)
        await copy._wave(copy._remaining({}))  # one chunk only: other tables are not there at all
        execute(r.source_url, "TRUNCATE app.readings_0, app.prescriptions_2025")
        await r.follower.catch_up_once()
        await copy.run()
        await expect_equal(r)


async def test_what_the_targets_partitions_cannot_take_stops_the_migration(pair, capture):
    async with moving(pair, capture) as r:
        await r.copy().run()
        execute(r.target_url, "ALTER TABLE app.visits DETACH PARTITION app.visits_2026_03")
        execute(r.source_url, NEW_VISITS)
        with pytest.raises(SchemaChanged, match=r"no partition of app\.visits takes a row"):
            await r.follower.catch_up_once()


async def test_the_truncation_of_a_partition_that_the_target_lacks_stops_the_migration(pair, capture):
    async with moving(pair, capture) as r:
        await r.copy().run()
        execute(r.target_url, "ALTER TABLE app.readings_2 RENAME TO another")
        execute(r.source_url, "TRUNCATE app.readings_2")
        with pytest.raises(SchemaChanged, match=r"app\.readings_2 was truncated"):
            await r.follower.catch_up_once()


async def test_a_row_of_a_missing_partition_stops_the_copy(pair, capture):
    async with moving(pair, capture) as r:
        execute(r.target_url, "DROP TABLE app.readings_2")
        with pytest.raises(SchemaChanged, match=r"no partition of app\.readings takes a row"):
            await r.copy().run()


async def test_nobodys_update_fails_in_any_partition_also_in_those_that_come_later(pair):
    """Under a row filter, an identity without the tenant would refuse every tenant's UPDATE and DELETE."""
    async with moving(pair) as r:
        await r.copy().run()
        with psycopg.connect(r.source_url, autocommit=True) as conn:
            conn.execute("CREATE TABLE app.loose (LIKE app.visits INCLUDING ALL EXCLUDING IDENTITY)")
            conn.execute(
                f"INSERT INTO app.loose SELECT '{OTHER}', g, '2026-06-01', ward, patient FROM"
                f" generate_series(9001, 9010) g, (SELECT * FROM app.visits WHERE tenant_id = '{OTHER}'"
                " LIMIT 1) v"
            )
            for statement in (CHANGED["created"], CHANGED["attached"]):
                conn.execute(statement)
                conn.execute("UPDATE app.visits SET minutes = minutes + 1")
                conn.execute(f"DELETE FROM app.visits WHERE tenant_id = '{OTHER}' AND id % 7 = 0")
            conn.execute("ALTER TABLE app.loose REPLICA IDENTITY NOTHING")
            with pytest.raises(psycopg.errors.InvalidColumnReference):
                conn.execute("UPDATE app.loose SET minutes = 5")  # what preflight refuses
        await expect_equal(r)


# Clean-up.


async def test_the_tenants_rows_are_removed_partition_by_partition_in_bounded_batches(pair, monkeypatch):
    """Rows of several partitions may have the same place; a batch by place alone would grow with them."""
    batches: list[int] = []
    one_batch = removal._one_batch

    async def counted(*arguments):
        batches.append(await one_batch(*arguments))
        return batches[-1]

    monkeypatch.setattr(removal, "BATCH_ROWS", 20)
    monkeypatch.setattr(removal, "_one_batch", counted)
    async with moving(pair) as r:
        before = tenant_fingerprints(r.source_url, MEDICAL, OTHER)
        tables = [t.holding(Side.SOURCE) for t in r.subject.tables]
        assert await removal.remove_rows(r.source, tables, TENANT, r.source.identity, quiet) == 830
        assert max(batches) == 20
        assert not any(rows.count for rows in tenant_fingerprints(r.source_url, MEDICAL, TENANT).values())
        assert tenant_fingerprints(r.source_url, MEDICAL, OTHER) == before
