"""Comments and privileges that operators change on the source while a tenant moves to a fresh target."""

from __future__ import annotations

from tests.integration.test_alignment import Sides, sides
from tests.support.applications.objects import objects
from tests.support.rig import execute

ROLES = """
do $$ begin
  if not exists (select from pg_roles where rolname = 'remarks_app') then
    create role remarks_app; create role remarks_guest;
  end if;
end $$;
"""
CHANGES = (
    "comment on table {0}.deals is 'it''s a deal; \\'",
    "comment on column {0}.deals.notes is 'x'",
    "comment on index {0}.deals_stage is 'by stage'",
    "comment on constraint deals_amount_check on {0}.deals is 'no debts'",
    "comment on trigger deals_touch on {0}.deals is 'touched'",
    "comment on function {0}.touch() is 'touches'",
    "comment on type {0}.stage is 'of a deal'",
    "comment on domain {0}.percent is null",
    "comment on constraint \"Not On It\" on domain {0}.percent is 'small'",
    "comment on view {0}.\"Won ON it\" is 'won'",
    "comment on column {0}.\"Won ON it\".one is '1'",
    "comment on sequence {0}.numbers is 'of deals'",
    "grant select, update on {0}.deals to remarks_app with grant option",
    "grant update (notes), references (id) on {0}.deals to remarks_guest",
    "grant usage on schema {0} to public",
    "grant execute on function {0}.wipe(bigint, {0}.stage) to remarks_app",
    "revoke execute on function {0}.touch() from public",
    "grant usage on sequence {0}.numbers to remarks_app",
    "revoke usage on type {0}.stage from public",
    'grant select on {0}."Won ON it" to public',
    "revoke select on {0}.keyless from remarks_app",
    "revoke grant option for insert on {0}.keyless from remarks_app",
)
MORE = """
create sequence {0}.numbers;
create view {0}."Won ON it" as select 1 as one;
create function {0}.wipe(bigint, {0}.stage) returns void language sql as '';
revoke execute on function {0}.wipe from public;
alter domain {0}.percent add constraint "Not On It" check (value < 101);
comment on domain {0}.percent is 'of a hundred';
grant select, insert on {0}.keyless to remarks_app with grant option;
"""
GUESTS_READ = "alter default privileges grant select on tables to remarks_guest"
TABLES = ("table {0}.deals", "table {0}.keyless", 'view {0}."Won ON it"')


async def moving(make_database, pg16, pg18) -> Sides:
    """To a target that is built already."""
    for server in (pg16, pg18):
        execute(server.url(), ROLES)
    s = await sides(make_database, pg16, pg18, fresh=True, more=MORE)
    await s.site.build_rest(s.shape)
    return s


def remarks_of(url: str, schema: str) -> set[tuple[str, ...]]:
    return {
        tuple(part.replace(schema, "{0}") for part in each)
        for each in objects(url, [schema])
        if not each[1].startswith("schema") or each[0] != "comment"
    }


def both(s: Sides) -> tuple[set[tuple[str, ...]], set[tuple[str, ...]]]:
    ours, theirs = s.site.source_place.url.reveal(), s.site.target_place.url.reveal()
    return remarks_of(ours, "core_crm"), remarks_of(theirs, "estate_crm")


async def test_the_target_has_them_as_the_source_has_them_now(make_database, pg16, pg18):
    s = await moving(make_database, pg16, pg18)
    before, theirs = both(s)
    assert before == theirs
    for change in CHANGES:
        s.on("source", change)
    await s.site.carry_remarks(s.shape, s.say)
    ours, theirs = both(s)
    assert ours == theirs != before
    s.said.clear()
    await s.site.carry_remarks(s.shape, s.say)
    assert s.said == []


async def test_what_the_target_gives_by_itself_stays(make_database, pg16, pg18):
    """By default privileges, or to somebody of whom the source has never heard, as an owner."""
    execute(pg16.url(), ROLES)
    execute(pg18.url(), ROLES)
    s = await sides(make_database, pg16, pg18, more=MORE, fresh=True, on_target=GUESTS_READ)
    s.on("source", "revoke select on {0}.keyless from remarks_app")
    await s.site.build_rest(s.shape)
    await s.site.carry_remarks(s.shape, s.say)
    ours, theirs = both(s)
    assert theirs - ours == {("privilege", t, "SELECT to remarks_guest") for t in TABLES}


async def test_one_that_cannot_be_carried_over_is_said_and_stops_nothing(make_database, pg16, pg18):
    s = await moving(make_database, pg16, pg18)
    s.on("target", "grant usage on schema {0} to public")
    s.on("target", "set role remarks_app; grant select on {0}.keyless to remarks_guest")
    s.on("source", "revoke select on {0}.keyless from remarks_app")
    s.on("source", "comment on table {0}.keyless is 'still'")
    await s.site.carry_remarks(s.shape, s.say)
    assert (
        'not carried over to the target: REVOKE SELECT ON TABLE estate_crm.keyless FROM "remarks_app"'
        in s.said
    )
    assert ("comment", "table {0}.keyless", "still") in both(s)[1]


async def test_a_target_of_others_keeps_its_own(make_database, pg16, pg18):
    s = await sides(make_database, pg16, pg18)
    s.on("source", "comment on table {0}.deals is 'ours'")
    await s.site.carry_remarks(s.shape, s.say)
    assert s.said == []
    assert not {each for each in both(s)[1] if each[0] == "comment"}
