"""Partitioned tables: one table to the plan, the stream and the guards, whatever its partitions do."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from uuid import UUID

import psycopg
import pytest

from mover.core.alignment import Difference
from mover.core.ddl import created
from mover.core.errors import SchemaChanged
from mover.core.facts import Tenancy
from mover.core.ids import MigrationId, Side, TableRef, Tier
from mover.core.migration import Place
from mover.core.secret import Secret
from mover.core.tables import Holding
from mover.engine.preflight import judge
from mover.postgres import catalog, clone, removal
from mover.postgres.connect import Database
from mover.postgres.facts import gather
from mover.postgres.fence import PgFence
from mover.postgres.fingerprint import differences, fingerprint
from mover.postgres.points import Points
from tests.support import medical
from tests.support.checks import assert_tenant_equal, leftovers, tenant_multiset
from tests.support.fencing import CHANGES, TABLES, Fenced, fenced, quiet
from tests.support.rig import OTHER, TENANT, Rig, Subject, execute, rig

MEDICAL = {("app", name): ("app", name) for name in medical.TABLES}
SAME = {"app": "app"}
NO_TENANCY: Mapping[str, frozenset[str]] = {}


def prepare(url: str, *tenants) -> None:
    with psycopg.connect(url, autocommit=True) as conn:
        conn.execute("CREATE SCHEMA app")
        conn.execute(medical.ddl("app"))
        for tenant in tenants:
            conn.execute(medical.rows("app", tenant))
        conn.execute("ANALYZE")


async def plan_of(source: str, target: str, schemas=SAME, exempt=NO_TENANCY):
    here = Place("core", Tier.SCHEMA, Secret(source), tuple(schemas))
    there = Place("clinic", Tier.DATABASE, Secret(target), tuple(schemas.values()))
    ours, theirs = Database(Secret(source), "source"), Database(Secret(target), "target")
    return judge(await gather(ours, theirs, here, there, Tenancy("tenant_id", **exempt), TENANT))


# What the plan says of them.


async def test_a_partitioned_table_is_planned_as_one(pair):
    prepare(pair.source, TENANT, OTHER)
    execute(pair.source, "CREATE SEQUENCE app.own OWNED BY app.visits_archive.minutes")
    plan = await plan_of(pair.source, pair.target, {"app": "clinic"})
    assert plan.refusals == ()
    assert [t.source.name for t in plan.shape.tables] == [
        "patients",
        "readings",
        "results",
        "visits",
        "prescriptions",
    ]
    assert {n for n, of in plan.classes.items() if of == "tenant"} == {f"app.{n}" for n in medical.TABLES}
    assert plan.classes["app.prescriptions_2026"] == plan.classes["app.prescriptions_2026_a"] == "partition"
    assert plan.facts["replica_identity_changes"] == []
    assert [str(s.source) for s in plan.shape.sequences] == ["app.own", "app.visits_id_seq"]
    assert plan.facts["rows"] == 830
    assert [t.source.name for t in plan.shape.tables if not t.is_filtered] == ["results"]
    assert [f.code for f in plan.findings] == ["partition_unfiltered"]
    visits = plan.shape.tables[3]
    assert visits.estimated_rows == 300 and visits.estimated_bytes > 0


UNFIT = {
    "no key": (
        "create table app.bare (tenant_id uuid not null, day date not null) partition by range (day)",
        [("partition_key", "app.bare")],
    ),
    "an identity that somebody changed": (
        "alter table app.prescriptions_2026_a replica identity nothing",
        [("partition_identity", "app.prescriptions_2026_a")],
    ),
    "the root's identity": (
        "alter table app.visits replica identity nothing",
        [("partition_identity", "app.visits")],
    ),
    "a foreign table": (
        "create foreign data wrapper w; create server elsewhere foreign data wrapper w;"
        " create table app.f (tenant_id uuid not null, id int) partition by list (id);"
        " create foreign table app.f_1 partition of app.f for values in (1) server elsewhere",
        [("foreign_table", "app.f_1"), ("partition_key", "app.f")],
    ),
    "an unlogged partition": (
        "create unlogged table app.visits_2026_04 partition of app.visits"
        " for values from ('2026-04-01') to ('2026-05-01')",
        [("unlogged", "app.visits_2026_04")],
    ),
    "a partition elsewhere": (
        "create schema attic; alter table app.visits_archive set schema attic",
        [("partition_outside", "attic.visits_archive")],
    ),
    "a table elsewhere": (
        "create schema attic; alter table app.readings set schema attic",
        [("partition_outside", f"app.readings_{n}") for n in range(3)],
    ),
    "a foreign key to one partition": (
        "create table app.notes (tenant_id uuid, id int, visit bigint, day date, primary key (tenant_id, id),"
        " foreign key (tenant_id, visit, day) references app.visits_2026_01)",
        [("partition_foreign_key", "app.visits_2026_01")],
    ),
    "a foreign key of one partition": (
        "create table app.days (tenant_id uuid, day date, primary key (tenant_id, day));"
        " alter table app.visits_archive add foreign key (tenant_id, day) references app.days",
        [("partition_foreign_key", "app.visits_archive")],
    ),
    "a trigger of one partition": (
        "create function app.f() returns trigger language plpgsql as 'begin return null; end';"
        " create trigger t after delete on app.readings_0 for each row execute function app.f();"
        " alter table app.readings_0 enable always trigger t",
        [("delete_trigger", "app.readings_0")],
    ),
    "inheritance": (
        "create table app.paper (tenant_id uuid, id int, primary key (tenant_id, id));"
        " create table app.old_paper (primary key (tenant_id, id)) inherits (app.paper)",
        [("inheritance", "app.old_paper"), ("inheritance", "app.paper")],
    ),
}


@pytest.mark.parametrize("case", UNFIT)
async def test_what_cannot_move_is_refused_by_name_with_the_way_out(case, pg16, make_database):
    statements, expected = UNFIT[case]
    source, target = make_database(pg16), make_database(pg16)
    prepare(source, TENANT)
    execute(source, statements)
    plan = await plan_of(source, target, {"app": "clinic"})
    assert sorted((f.code, str(f.table)) for f in plan.refusals) == expected
    assert all(f.hint for f in plan.refusals)
    for _, table in expected:
        assert plan.classes.get(table) in ("refused", "tenant", "partition", None)


async def test_partitions_go_with_their_root_into_its_class(pg16, make_database):
    source, target = make_database(pg16), make_database(pg16)
    prepare(source, TENANT)
    execute(source, "ALTER TABLE app.readings_0 REPLICA IDENTITY NOTHING")
    exempt = {"ignore_tables": frozenset({"app.readings"})}
    plan = await plan_of(source, target, {"app": "clinic"}, exempt)
    assert plan.refusals == ()
    assert plan.classes["app.readings"] == "ignored"
    exempt = {"ignore_tables": frozenset({"app.readings_0"})}
    plan = await plan_of(source, target, {"app": "clinic"}, exempt)
    assert [f.code for f in plan.refusals] == ["partition_identity"]


async def test_values_that_are_unique_in_one_partition_only_collide_there(pg16, pg18, make_database):
    source, target = make_database(pg16), make_database(pg18)
    for url, tenant in ((source, TENANT), (target, OTHER)):
        prepare(url, tenant)
        execute(url, "CREATE UNIQUE INDEX early_notes ON app.visits_archive (notes) WHERE minutes > 5")
        execute(url, "CREATE UNIQUE INDEX ids ON app.visits (id, day)")
        execute(
            url,
            "INSERT INTO app.visits (tenant_id, day, ward, patient, notes)"
            " SELECT tenant_id, '2025-01-01'::date + g, ward, id, 'same ' || CASE WHEN g < 4 THEN g END"
            " FROM app.patients, generate_series(1, 5) g WHERE id = 1",
        )
    execute(target, "UPDATE app.visits SET id = id + 1000000")
    plan = await plan_of(source, target)
    assert [(f.code, str(f.table), f.message.split()[0]) for f in plan.refusals] == [
        ("collision", "app.visits_archive", "3")
    ]


async def test_a_partitioned_tables_size_is_its_partitions(pg16, make_database):
    url = make_database(pg16)
    prepare(url, TENANT, OTHER)
    execute(url, "CREATE TABLE app.plain (LIKE app.visits)")
    execute(url, "INSERT INTO app.plain SELECT * FROM app.visits")
    execute(url, "ANALYZE app.plain")
    async with Database(Secret(url), "source").connect("test") as conn:
        names = {"schema": "app", "column": "tenant_id", "value": str(TENANT)}
        (whole,) = await catalog.rows(conn, "table_size", name="visits", **names)
        (plain,) = await catalog.rows(conn, "table_size", name="plain", **names)
    assert whole["tuples"] == plain["tuples"] == 600
    assert whole["share"] == pytest.approx(0.5) == plain["share"]
    assert whole["bytes"] > plain["bytes"] > 0  # a partition has pages of its own


# The target's schemas.


MIGRATION = MigrationId(UUID(int=3))
KEYS = """
SELECT conname FROM pg_constraint WHERE contype = 'p' AND connamespace = 'clinic'::regnamespace
"""


@pytest.mark.parametrize("versions", [(15, 18), (16, 18), (18, 16)], ids=str)
async def test_a_clone_is_partitioned_as_the_source(versions, request, make_database):
    source, target = (
        Database(Secret(make_database(request.getfixturevalue(f"pg{version}"))), label)
        for version, label in zip(versions, ("source", "target"), strict=True)
    )
    prepare(source.url.reveal())
    schemas = {"app": "clinic"}
    for _ in range(2):
        ddl = await clone.read_ddl(source, target, schemas)
        await clone.apply_pre(target, ddl, MIGRATION)
        await clone.build_keys(target, ddl, [TableRef("clinic", "prescriptions")])
        keys = execute(target.url.reveal(), KEYS)
    for table, statements in ddl.keys.items():  # a partition's that comes first would be one of its own
        assert created(statements[0].sql).on == table
    assert {name for (name,) in keys} == {
        f"prescriptions{part}_pkey" for part in ("", "_2025", "_2026", "_2026_a", "_2026_other")
    }
    assert all(found.target is None for found in await differing(source, target, schemas))
    unattached = [s for s in ddl.post if s.type not in ("INDEX ATTACH", "FK CONSTRAINT")]
    await clone.build_rest(target, replace(ddl, post=tuple(unattached)), workers=2)
    assert all(found.target is None for found in await differing(source, target, schemas))
    for _ in range(2):
        await clone.build_rest(target, await clone.read_ddl(source, target, schemas), workers=2)
    assert await differing(source, target, schemas) == []
    assert execute(target.url.reveal(), "SELECT count(*) FROM pg_index WHERE NOT indisvalid") == [(0,)]
    # A side that was made by hand may name what the partitions have from their root as it likes.
    execute(target.url.reveal(), "ALTER INDEX clinic.visits_archive_pkey RENAME TO other_name")
    assert await differing(source, target, schemas) == []


async def differing(source: Database, target: Database, schemas: Mapping[str, str]) -> list[Difference]:
    async with source.connect("test") as ours, target.connect("test") as theirs:
        there = {name: name for name in schemas.values()}
        return differences(await fingerprint(ours, schemas), await fingerprint(theirs, there))


CHANGED = {
    "created": "CREATE TABLE app.visits_2026_04 PARTITION OF app.visits"
    " FOR VALUES FROM ('2026-04-01') TO ('2026-05-01')",
    "attached": "ALTER TABLE app.visits ATTACH PARTITION app.loose"
    " FOR VALUES FROM ('2026-05-01') TO (MAXVALUE)",
    "detached": "ALTER TABLE app.visits DETACH PARTITION app.visits_2026_03",
    "detached concurrently": "ALTER TABLE app.visits DETACH PARTITION app.visits_2026_03 CONCURRENTLY",
    "dropped": "DROP TABLE app.readings_2",
    "bounds": "ALTER TABLE app.visits DETACH PARTITION app.visits_2026_03; ALTER TABLE app.visits ATTACH"
    " PARTITION app.visits_2026_03 FOR VALUES FROM ('2026-03-01') TO ('2026-03-31')",
}


@pytest.mark.parametrize("change", CHANGED)
async def test_a_change_of_partitions_is_seen_though_the_stream_does_not_carry_it(
    change, pg16, pg18, make_database
):
    """Both by the comparison of the two sides and by the stamp that is read under the fence."""
    urls = make_database(pg16), make_database(pg18)
    source, target = Database(Secret(urls[0]), "source"), Database(Secret(urls[1]), "target")
    for url in urls:
        prepare(url)
        execute(url, "CREATE TABLE app.loose (LIKE app.visits INCLUDING ALL EXCLUDING IDENTITY)")
    async with Points.open(source) as points:
        stamp = await points.schema_stamp(["app"], "tenant_id")
        execute(urls[0], CHANGED[change])
        assert await points.schema_stamp(["app"], "tenant_id") != stamp
    found = await differing(source, target, SAME)
    assert any(any(name in str(line) for name in ("visits_2026", "loose", "readings_2")) for line in found)


# The guards.

GUARDED = """
CREATE TABLE app.visit (
    tenant_id uuid NOT NULL, id int NOT NULL, day int NOT NULL, note text, PRIMARY KEY (tenant_id, day, id)
) PARTITION BY RANGE (day);
CREATE TABLE app.visit_1 PARTITION OF app.visit FOR VALUES FROM (0) TO (10);
CREATE TABLE app.visit_2 PARTITION OF app.visit FOR VALUES FROM (10) TO (20) PARTITION BY LIST (id);
CREATE TABLE app.visit_2_rest PARTITION OF app.visit_2 DEFAULT;
"""
LATER = """
CREATE TABLE app.visit_3 PARTITION OF app.visit FOR VALUES FROM (20) TO (30);
CREATE TABLE app.loose (LIKE app.visit INCLUDING ALL);
ALTER TABLE app.visit ATTACH PARTITION app.loose FOR VALUES FROM (30) TO (40);
"""
VISIT = Holding(TableRef("app", "visit"), "tenant_id")


@pytest.fixture(params=["pg15", "pg16", "pg18"])
def url(request, make_database) -> str:
    return make_database(request.getfixturevalue(request.param))


@asynccontextmanager
async def guarded(url: str):
    async with fenced(url) as world:
        await world.ask(GUARDED)
        await world.fence.install([*TABLES, VISIT], "open", quiet)
        await world.ask(f"INSERT INTO app.visit SELECT '{TENANT}', 1, d FROM generate_series(0, 19) d")
        await world.ask(f"INSERT INTO app.visit SELECT '{OTHER}', 1, d FROM generate_series(0, 19) d")
        yield world


WRITES = (
    *(f"INSERT INTO app.visit VALUES ('{TENANT}', 9, {day})" for day in (1, 11, 21, 31)),
    *(
        f"INSERT INTO app.{table} VALUES ('{TENANT}', 9, {day})"
        for table, day in (
            ("visit_1", 1),
            ("visit_2", 11),
            ("visit_2_rest", 11),
            ("visit_3", 21),
            ("loose", 31),
        )
    ),
    f"UPDATE app.visit SET day = 25 WHERE day = 3 AND tenant_id = '{TENANT}'",
    f"UPDATE app.visit SET note = 'x' WHERE day = 3 AND tenant_id = '{TENANT}'",
    f"UPDATE app.visit SET day = 35, tenant_id = '{TENANT}' WHERE day = 3 AND tenant_id = '{OTHER}'",
    f"DELETE FROM app.visit_2 WHERE day = 13 AND tenant_id = '{TENANT}'",
)


async def test_the_guards_hold_on_every_partition_also_on_those_that_come_later(url):
    async with guarded(url) as world:
        await world.ask(LATER)
        await world.ask("GRANT ALL ON ALL TABLES IN SCHEMA app TO fence_app")
        async with world.connect() as conn:
            for write in WRITES:
                await conn.execute(f"BEGIN; {write}; ROLLBACK")
        await world.fence.install([*TABLES, VISIT], "open", quiet)
        await leave_the_place(world)
        for role in ("origin", "replica"):
            async with world.connect(session_replication_role=role) as conn:
                for write in WRITES:
                    with pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
                        await conn.execute(write)
                await conn.execute(
                    f"BEGIN; UPDATE app.visit SET day = 29 - day WHERE tenant_id = '{OTHER}' AND day < 9"
                )
                await conn.execute("ROLLBACK")


async def leave_the_place(world: Fenced) -> None:
    await world.fence.get_ready()
    await world.fence.close(lock_timeout_s=5)
    await world.fence.move_away()


@pytest.mark.parametrize(
    "change",
    [
        "ALTER TABLE app.visit_2_rest DISABLE TRIGGER USER",
        "ALTER TABLE app.visit_1 DISABLE TRIGGER USER; ALTER TABLE app.visit_1 ENABLE TRIGGER USER",
        "CREATE TABLE app.visit_3 PARTITION OF app.visit FOR VALUES FROM (20) TO (30)",
    ],
)
async def test_a_partition_without_all_guards_stops_the_cutover_until_they_are_made(url, change):
    """The last one would be truncated unseen: what tells of a truncation stands on no later partition."""
    async with guarded(url) as world:
        await world.fence.get_ready()
        await world.ask(change)
        with pytest.raises(SchemaChanged, match=r"app\.visit$"):
            await world.fence.get_ready()
        await world.fence.install([*TABLES, VISIT], "open", quiet)
        await world.fence.get_ready()


async def test_the_truncation_of_a_partition_is_told_and_fails_while_the_fence_is_closed(url):
    async with guarded(url) as world, world.connect(lock_timeout="5s") as conn:
        await world.ask(
            "ALTER TABLE app.visit OWNER TO fence_app; ALTER TABLE app.visit_1 OWNER TO fence_app;"
            "ALTER TABLE app.visit_2 OWNER TO fence_app;ALTER TABLE app.visit_2_rest OWNER TO fence_app"
        )
        for table in ("visit_1", "visit_2", "visit"):
            await conn.execute(f"TRUNCATE app.{table}")
        told = [
            json.loads(found[0])
            for (data,) in await world.ask(CHANGES, world.slot)
            if (found := re.search(rb'\["app".*\]', data)) and b"mover.truncate" in data
        ]
        assert told[0] == ["app", "visit", "app", "visit_1"]
        assert told[1:3] == [["app", "visit", "app", "visit_2"], ["app", "visit", "app", "visit_2_rest"]]
        assert ["app", "visit"] in told[3:]
        await world.fence.get_ready()
        await world.fence.close(lock_timeout_s=5)
        for table in ("visit_1", "visit_2", "visit"):
            with pytest.raises(psycopg.errors.SerializationFailure, match="is being moved"):
                await conn.execute(f"TRUNCATE app.{table}")


async def test_removing_the_guards_leaves_nothing_on_partitions_that_came_or_went(url):
    async with guarded(url) as world:
        await world.ask(LATER)
        await world.fence.install([*TABLES, VISIT], "open", quiet)
        await world.ask("ALTER TABLE app.visit DETACH PARTITION app.visit_1")
        await world.ask("ALTER TABLE app.visit DETACH PARTITION app.visit_2")
        assert any("visit_1" in left for left in leftovers(url))
        for _ in range(2):
            await world.fence.remove(quiet)
        assert [left for left in leftovers(url) if left.startswith("trigger")] == []


# The stream.


@asynccontextmanager
async def moving(pair):
    """The medical record on both sides, guarded on the source, the tenant's rows not copied yet."""
    prepare(pair.source, TENANT, OTHER)
    prepare(pair.target, OTHER)
    plan = await plan_of(pair.source, pair.target)
    subject = Subject(plan.shape.tables, "SELECT 1", "SELECT 1")
    async with rig(pair.source, pair.target, subject=subject) as r:
        fence = PgFence(r.source, TENANT, "core", r.source.identity, 5)
        await fence.install([t.holding(Side.SOURCE) for t in subject.tables], "open", quiet)
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
async def test_rows_that_change_partition_arrive_once(pair, small_batch, monkeypatch):
    monkeypatch.setattr("mover.postgres.apply.SMALL_BATCH", small_batch)
    async with moving(pair) as r:
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


async def test_a_partition_made_under_way_without_the_tenant_in_its_key_hinders_nobody(pair):
    """Its replica identity is the key: with a row filter every update in it would fail."""
    async with moving(pair) as r:
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


def others_on_the_target(r: Rig) -> list:
    return [tenant_multiset(r.target_url, *table, OTHER) for table in MEDICAL]


OTHERWISE = """
CREATE TABLE app.copy (LIKE app.prescriptions INCLUDING ALL) PARTITION BY RANGE (id);
CREATE TABLE app.low PARTITION OF app.copy FOR VALUES FROM (MINVALUE) TO (1000);
CREATE TABLE app.high PARTITION OF app.copy FOR VALUES FROM (1000) TO (MAXVALUE);
DROP TABLE app.prescriptions;
ALTER TABLE app.copy RENAME TO prescriptions;
"""


async def test_a_key_change_moves_a_row_between_partitions_of_the_target(pair):
    """Where the sides divide a table differently, an update within a partition crosses one."""
    async with moving(pair) as r:
        with psycopg.connect(r.target_url, autocommit=True) as conn:
            conn.execute(OTHERWISE)
        await r.copy().run()
        updates = "UPDATE app.prescriptions SET id = id + 1000, drug = drug || '!' WHERE year = 2025"
        execute(r.source_url, updates)
        assert await expect_equal(r) == 830
        execute(r.source_url, updates.replace("2025", "2026"))
        assert await expect_equal(r) == 830
        assert execute(r.target_url, "SELECT count(*) FROM app.low") == [(0,)]


async def test_a_truncated_partition_is_emptied_of_the_tenants_rows_only_and_in_its_place(pair):
    async with moving(pair) as r:
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


async def test_a_half_copied_table_survives_the_truncation_of_a_partition(pair):
    async with moving(pair) as r:
        copy = r.copy(workers=1, wave_seconds=0)
        await copy._wave(copy._remaining({}))  # one chunk only: other tables are not there at all
        execute(r.source_url, "TRUNCATE app.readings_0, app.prescriptions_2025")
        await r.follower.catch_up_once()
        await copy.run()
        await expect_equal(r)


async def test_what_the_targets_partitions_cannot_take_stops_the_migration(pair):
    async with moving(pair) as r:
        await r.copy().run()
        execute(r.target_url, "ALTER TABLE app.visits DETACH PARTITION app.visits_2026_03")
        execute(r.source_url, NEW_VISITS)
        with pytest.raises(SchemaChanged, match=r"no partition of app\.visits takes a row"):
            await r.follower.catch_up_once()


async def test_the_truncation_of_a_partition_that_the_target_lacks_stops_the_migration(pair):
    async with moving(pair) as r:
        await r.copy().run()
        execute(r.target_url, "ALTER TABLE app.readings_2 RENAME TO another")
        execute(r.source_url, "TRUNCATE app.readings_2")
        with pytest.raises(SchemaChanged, match=r"app\.readings_2 was truncated"):
            await r.follower.catch_up_once()


async def test_a_row_of_a_missing_partition_stops_the_copy(pair):
    async with moving(pair) as r:
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
        before = [tenant_multiset(r.source_url, *table, OTHER) for table in MEDICAL]
        tables = [t.holding(Side.SOURCE) for t in r.subject.tables]
        assert await removal.remove_rows(r.source, tables, TENANT, r.source.identity, quiet) == 830
        assert max(batches) == 20
        assert not any(tenant_multiset(r.source_url, *table, TENANT).count for table in MEDICAL)
        assert [tenant_multiset(r.source_url, *table, OTHER) for table in MEDICAL] == before
