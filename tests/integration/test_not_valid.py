"""NOT NULL constraints that are NOT VALID (from PostgreSQL 18 on): the column may hold NULL all the same."""

from __future__ import annotations

from mover.core.secret import Secret
from mover.postgres import catalog
from mover.postgres.connect import Database
from tests.integration.test_alignment import SCHEMA, sides
from tests.integration.test_partitions import plan_of
from tests.support.rig import execute

UNPROVEN = """
create table {0}.lines (tenant_id uuid not null, id int, n int not null, unique (tenant_id, id));
insert into {0}.lines values (gen_random_uuid(), null, 1);
alter table {0}.lines add constraint id_given not null id not valid;
create table {0}.parts (tenant_id uuid not null, id int, n int, primary key (tenant_id, id, n))
  partition by list (n);
alter table {0}.parts add text text;
create table {0}.part_1 partition of {0}.parts for values in (1);
alter table {0}.parts add constraint text_given not null text not valid;
"""


async def test_a_column_that_may_hold_null_is_in_no_key(pg18, make_database):
    url = make_database(pg18)
    execute(url, "create schema app")
    execute(url, UNPROVEN.format("app"))
    async with Database(Secret(url), "source").connect("test") as conn:
        lines = next(r for r in await catalog.read_relations(conn, ["app"]) if r.ref.name == "lines")
    assert (lines.key, lines.not_null) == ((), {"tenant_id", "n"})
    execute(url, "delete from app.lines; alter table app.lines validate constraint id_given")
    async with Database(Secret(url), "source").connect("test") as conn:
        lines = next(r for r in await catalog.read_relations(conn, ["app"]) if r.ref.name == "lines")
    assert lines.key == ("tenant_id", "id")


async def test_a_tenant_column_that_may_hold_null_is_refused(pg18, make_database):
    source, target = make_database(pg18), make_database(pg18)
    execute(source, "create schema app; create table app.t (tenant_id uuid, id int primary key)")
    execute(source, "alter table app.t add constraint given not null tenant_id not valid")
    assert "nullable_tenant_column" in [f.code for f in (await plan_of(source, target)).refusals]


async def test_a_clone_has_the_constraint_too(pg18, make_database):
    """After the rows, as every constraint that some of them may not fulfil."""
    s = await sides(make_database, pg18, pg18, fresh=True, more=UNPROVEN)
    await s.align(is_built=False)
    await s.site.build_rest(s.shape)
    aligned = await s.align()
    await s.site.check_schemas(aligned.shape)
    there = "select count(*) from pg_constraint where contype = 'n' and not convalidated"
    assert execute(s.site.target_place.url.reveal(), there) == [(3,)]


async def test_an_older_target_that_does_not_know_them_is_refused(pg16, pg18, make_database):
    source, target = make_database(pg18), make_database(pg16)
    execute(source, (SCHEMA + UNPROVEN).format("app"))
    plan = await plan_of(source, target)
    assert {f.hint.split("; ")[0] for f in plan.refusals if f.code == "not_null_not_valid"} == {
        f"ALTER TABLE app.{table} VALIDATE CONSTRAINT {name}"
        for table, name in (("lines", "id_given"), ("parts", "text_given"), ("part_1", "text_given"))
    }
