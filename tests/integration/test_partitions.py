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
from mover.core.ids import Capture, MigrationId, TableRef, Tier
from mover.core.migration import Place
from mover.core.secret import Secret
from mover.core.tables import Holding
from mover.engine.preflight import judge
from mover.postgres import catalog, clone
from mover.postgres.connect import Database
from mover.postgres.facts import gather
from mover.postgres.fingerprint import differences, fingerprint
from mover.postgres.points import Points
from tests.support import medical
from tests.support.checks import leftovers
from tests.support.fencing import CHANGES, TABLES, Fenced, fenced, quiet
from tests.support.rig import OTHER, TENANT, execute

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
    return judge(await gather(ours, theirs, here, there, Tenancy("tenant_id", **exempt), TENANT, Capture.WAL))


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
            await world.fence.remove([*TABLES, VISIT], quiet)
        assert [left for left in leftovers(url) if left.startswith("trigger")] == []


# The stream.
