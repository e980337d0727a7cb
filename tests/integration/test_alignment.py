"""What a change of the source's schemas means for a migration that has begun: the target follows, or an
operator is needed."""

from __future__ import annotations

from dataclasses import dataclass
from uuid import uuid4

import psycopg
import pytest

from mover.core.alignment import copied_anew
from mover.core.errors import PlanOutdated, SchemaChanged
from mover.core.facts import Tenancy
from mover.core.ids import Epoch, MigrationId, TableRef, TenantId, Tier
from mover.core.migration import Place
from mover.core.secret import Secret
from mover.core.tables import Shape
from mover.engine.site import Aligned
from mover.postgres.connect import Identity
from mover.postgres.site import PgSite
from tests.support.rig import execute

TENANT = TenantId(uuid4())
SCHEMA = """
create schema {0};
create type {0}.stage as enum ('lead', 'won');
create function {0}.touch() returns trigger language plpgsql as 'begin return new; end';
create table {0}.deals (
  tenant_id uuid not null, id bigint primary key, stage {0}.stage not null default 'lead', notes text,
  amount numeric(12, 2) check (amount >= 0)
);
create index deals_stage on {0}.deals (tenant_id, stage);
create trigger deals_touch before update on {0}.deals for each row execute function {0}.touch();
create table {0}.keyless (tenant_id uuid not null, line text);
alter table {0}.keyless replica identity full;
create domain {0}.percent as integer default 0;
"""
DEALS = TableRef("core_crm", "deals")


@dataclass
class Sides:
    """A migration whose shape was planned; `change` comes afterwards."""

    site: PgSite
    shape: Shape
    stamp: str
    said: list[str]

    def on(self, side: str, change: str) -> None:
        url, schema = (
            (self.site.source_place.url, "core_crm")
            if side == "source"
            else (self.site.target_place.url, "estate_crm")
        )
        execute(url.reveal(), change.format(schema))

    async def say(self, text: str) -> None:
        self.said.append(text)

    async def align(self, *, is_built: bool = True) -> Aligned:
        return await self.site.align(self.shape, self.say, is_built=is_built)


async def sides(
    make_database, pg16, pg18, *, fresh: bool = False, more: str = "", on_target: str = "select"
) -> Sides:
    source, target = make_database(pg16), make_database(pg18)
    execute(source, (SCHEMA + more).format("core_crm"))
    execute(target, on_target)
    if not fresh:
        execute(target, (SCHEMA + more).format("estate_crm"))
    execute(source, "insert into core_crm.deals values (%s, 1)", TENANT)
    return await planned(source, target)


async def planned(source: str, target: str) -> Sides:
    """Both sides are as they shall be when the migration is planned."""
    site = PgSite(
        tenant=TENANT,
        identity=Identity(MigrationId(uuid4()), Epoch(1)),
        source_place=Place("core", Tier.SCHEMA, Secret(source), ("core_crm",)),
        target_place=Place("estate", Tier.DATABASE, Secret(target), ("estate_crm",)),
        tenancy=Tenancy("tenant_id"),
        workers=1,
        connections=10,
        budget_s=1,
    )
    plan = await site.preflight()
    assert plan.refusals == ()
    await site.take_over()
    await site.clone_schemas(plan.shape)
    return Sides(site, plan.shape, await site.schema_stamp(), [])


HARMLESS = {
    "a nullable column": "alter table {0}.deals add column score integer",
    "a column of the schema's own type": 'alter table {0}.deals add column "Old Stage" {0}.stage',
    "an index": "create index deals_notes on {0}.deals (lower(notes)) where notes <> '{{}}'",
    "a column and its index": "alter table {0}.deals add score integer;"
    " create index deals_score on {0}.deals (score)",
}


@pytest.mark.parametrize("change", HARMLESS.values(), ids=HARMLESS)
async def test_a_harmless_change_is_made_on_the_target_too(make_database, pg16, pg18, change):
    s = await sides(make_database, pg16, pg18)
    s.on("source", change)
    with pytest.raises(PlanOutdated):
        await s.site.check_schemas(s.shape)
    aligned = await s.align()
    assert copied_anew(s.shape, aligned.shape, aligned.unfilled, {}, aligned.storage) == frozenset()
    assert s.said
    await s.site.check_schemas(aligned.shape)


OPERATORS = {
    "a column with a constant default": (
        "alter table {0}.deals add column score integer default 5",
        "deals.score",
    ),
    "a column with another default": (
        "alter table {0}.deals add column at timestamptz default now()",
        "deals.at",
    ),
    "a column whose default went again": (
        "alter table {0}.deals add column score integer default 5;"
        " alter table {0}.deals alter score drop default",
        "deals.score",
    ),
    "a column of a domain": ("alter table {0}.deals add column score {0}.percent", "deals.score"),
    "a column that may not be NULL": (
        "alter table {0}.deals add column score integer not null default 5",
        "deals.score",
    ),
    "a generated column": (
        "alter table {0}.deals add column twice numeric generated always as (amount * 2) stored",
        "deals.twice",
    ),
    "a column of rows without a key": ("alter table {0}.keyless add column note text", "keyless.note"),
    "a dropped column": ("alter table {0}.deals drop column notes", "deals.notes"),
    "a renamed column": ("alter table {0}.deals rename column notes to remarks", "deals.remarks"),
    "a retyped column": ("alter table {0}.deals alter column amount type numeric(14, 4)", "deals.amount"),
    "a dropped table": ("drop table {0}.deals", "deals"),
    "a renamed table": ("alter table {0}.deals rename to offers", "offers"),
    "a new table": ("create table {0}.visits (tenant_id uuid not null, id int primary key)", "visits"),
    "a value of an enum": ("alter type {0}.stage add value 'lost'", "stage"),
    "a constraint": ("alter table {0}.deals add constraint deals_notes check (notes <> '')", "deals_notes"),
    "a constraint that went": (
        "alter table {0}.deals drop constraint deals_amount_check",
        "deals_amount_check",
    ),
    "a unique index": ("create unique index deals_once on {0}.deals (tenant_id, notes)", "deals_once"),
    "a trigger": ("alter table {0}.deals disable trigger deals_touch", "deals_touch"),
    "a trigger's function": (
        "create or replace function {0}.touch() returns trigger language plpgsql as 'begin return null; end'",
        "touch",
    ),
}


@pytest.mark.parametrize(("change", "named"), OPERATORS.values(), ids=OPERATORS)
async def test_any_other_change_needs_an_operator(make_database, pg16, pg18, change, named):
    s = await sides(make_database, pg16, pg18)
    s.on("source", change)
    for attempt in (lambda: s.site.check_schemas(s.shape), s.align):
        with pytest.raises(SchemaChanged) as raised:
            await attempt()
        assert not isinstance(raised.value, PlanOutdated)
        assert named in str(raised.value)
        assert raised.value.hint
    assert await s.site.schema_stamp() != s.stamp
    assert s.said == []


COPIED_ANEW = {
    "a column with a default": ("alter table {0}.deals add column score integer default 5", {"deals"}),
    "a column whose default went again": (
        "alter table {0}.deals add column score integer default 5;"
        " alter table {0}.deals alter score drop default",
        {"deals"},
    ),
    "a nullable column": ("alter table {0}.deals add column score integer", set()),
    "a column of rows without a key": ("alter table {0}.keyless add column note text", {"keyless"}),
    "a dropped column": ("alter table {0}.deals drop column notes", {"deals"}),
    "a renamed column": ("alter table {0}.deals rename column notes to remarks", {"deals"}),
    "a retyped column": ("alter table {0}.deals alter column amount type numeric(14, 4)", {"deals"}),
    "a dropped table": ("drop table {0}.deals", {"deals"}),
    "a renamed table": ("alter table {0}.deals rename to offers", {"deals", "offers"}),
    "a new table": ("create table {0}.visits (tenant_id uuid not null, id int primary key)", {"visits"}),
    "a value of an enum": ("alter type {0}.stage add value 'lost'", set()),
    "a unique index": ("create unique index deals_once on {0}.deals (tenant_id, notes)", set()),
    "a column that may be NULL now": ("alter table {0}.deals alter column stage drop not null", set()),
    "a table made anew": (
        "drop table {0}.keyless; create table {0}.keyless (tenant_id uuid not null, line text);"
        " alter table {0}.keyless replica identity full",
        {"keyless"},
    ),
    "a type that came back": (
        "alter table {0}.deals alter amount type numeric(12, 0);"
        " alter table {0}.deals alter amount type numeric(12, 2)",
        {"deals"},
    ),
}


@pytest.mark.parametrize(("change", "tables"), COPIED_ANEW.values(), ids=COPIED_ANEW)
async def test_once_both_sides_are_aligned_what_may_be_wrong_is_copied_anew(
    make_database, pg16, pg18, change, tables
):
    s = await sides(make_database, pg16, pg18)
    before = await s.align()
    assert before.shape == s.shape
    s.on("source", change)
    s.on("target", change)
    assert await s.site.schema_stamp() != s.stamp
    now = await s.align()
    anew = copied_anew(s.shape, now.shape, now.unfilled, before.storage, now.storage)
    assert {table.name for table in anew} == tables
    planned = {t.source.name: [c.name for c in t.columns] for t in now.shape.tables}
    there = execute(
        s.site.source_place.url.reveal(),
        "select c.relname, array_agg(attname::text order by attnum) from pg_attribute a"
        " join pg_class c on c.oid = attrelid where c.relnamespace = 'core_crm'::regnamespace"
        " and c.relkind = 'r' and attnum > 0 and not attisdropped group by 1",
    )
    assert planned == dict(there)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("alter table {0}.deals drop constraint deals_pkey, add primary key (tenant_id, id)", "key"),
        ("create table {0}.notes (id int primary key)", "has no column tenant_id"),
    ],
    ids=["another key", "a table that cannot be moved"],
)
async def test_where_a_migration_cannot_go_on_an_aligned_target_does_not_help(
    make_database, pg16, pg18, change, reason
):
    s = await sides(make_database, pg16, pg18)
    s.on("source", change)
    s.on("target", change)
    for _ in range(2):
        with pytest.raises(SchemaChanged, match=reason) as raised:
            await s.align()
        assert raised.value.hint


async def test_what_others_put_on_a_shared_target_is_left_there(make_database, pg16, pg18):
    s = await sides(make_database, pg16, pg18)
    s.on("target", "create index theirs on {0}.deals (notes)")
    await s.site.check_schemas(s.shape)
    await s.align()
    found = execute(s.site.target_place.url.reveal(), "select to_regclass('estate_crm.theirs') is not null")
    assert found == [(True,)]


async def test_a_fresh_target_is_compared_completely_only_once_it_is_built(make_database, pg16, pg18):
    s = await sides(make_database, pg16, pg18, fresh=True)
    s.on("source", "alter table {0}.deals add score integer; create view {0}.won as select 1 as one")
    aligned = await s.align(is_built=False)
    assert [t for t in s.said if "deals.score" in t]
    await s.site.build_rest(aligned.shape)
    with pytest.raises(SchemaChanged, match="won"):
        await s.site.check_schemas(aligned.shape)
    s.on("target", "create view {0}.won as select 1 as one")
    s.on("source", "drop index {0}.deals_stage")
    await s.align()
    found = execute(s.site.target_place.url.reveal(), "select to_regclass('estate_crm.deals_stage')")
    assert found == [(None,)]


async def test_what_does_not_concern_rows_leaves_the_stamp_alone(make_database, pg16, pg18):
    s = await sides(make_database, pg16, pg18)
    s.on(
        "source",
        "create index more on {0}.deals (notes); comment on table {0}.deals is 'x'; analyze {0}.deals",
    )
    s.on("source", "insert into {0}.deals values (gen_random_uuid(), 2)")
    with psycopg.connect(s.site.source_place.url.reveal(), autocommit=True) as conn:
        conn.execute("vacuum core_crm.deals")
    assert await s.site.schema_stamp() == s.stamp
    s.on("source", "truncate {0}.deals")
    assert await s.site.schema_stamp() != s.stamp


@pytest.mark.parametrize("change", ["enable", "force"])
async def test_row_security_that_may_hide_rows_changes_the_stamp(make_database, pg16, pg18, change):
    s = await sides(make_database, pg16, pg18)
    s.on("source", f"alter table {{0}}.deals {change} row level security")
    assert await s.site.schema_stamp() != s.stamp
