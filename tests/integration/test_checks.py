"""The checks themselves: they must see what they are trusted to see."""

import psycopg
import pytest

from tests.support.checks import (
    assert_tenant_equal,
    leftovers,
    mapped,
    other_tenants_fingerprint,
    tenant_multiset,
    tenant_tables,
)

TENANT, OTHER = "00000000-0000-0000-0000-00000000000a", "00000000-0000-0000-0000-00000000000b"
SCHEMA = """
create schema {0}; create type {0}.mood as enum ('good', 'bad');
create table {0}.t (tenant_id uuid not null, id int primary key, mood {0}.mood, note text);
insert into {0}.t values ('{1}', 1, 'good', null), ('{1}', 2, 'bad', ''), ('{2}', 3, 'bad', 'x');
"""


@pytest.fixture
def sides(pg16, make_database):
    urls = make_database(pg16), make_database(pg16)
    for url, schema in zip(urls, ("core_a", "other_a"), strict=True):
        execute(url, SCHEMA.format(schema, TENANT, OTHER))
    return urls


def execute(url, statement):
    with psycopg.connect(url, autocommit=True) as conn:
        conn.execute(statement)


def tables_of(source):
    return mapped(tenant_tables(source, ["core_a"]), {"core_a": "other_a"})


def test_equal_rows_are_equal_whatever_their_order_and_their_types_schema(sides):
    source, target = sides
    execute(target, "update other_a.t set note = note where id = 1")
    assert assert_tenant_equal(source, target, tables_of(source), TENANT) == 2


@pytest.mark.parametrize(
    "change",
    [
        "update other_a.t set note = '' where id = 1",
        "update other_a.t set mood = 'good' where id = 2",
        "delete from other_a.t where id = 2",
        f"insert into other_a.t values ('{TENANT}', 4, 'bad', 'more')",
        "alter table other_a.t add more int",
    ],
)
def test_a_difference_is_seen(sides, change):
    source, target = sides
    execute(target, change)
    with pytest.raises(AssertionError, match="differs"):
        assert_tenant_equal(source, target, tables_of(source), TENANT)


def test_other_tenants_rows_have_a_fingerprint_of_their_own(sides):
    source, _ = sides
    before = other_tenants_fingerprint(source, [("core_a", "t")], TENANT)
    execute(source, f"update core_a.t set note = 'moved' where tenant_id = '{TENANT}'")
    assert other_tenants_fingerprint(source, [("core_a", "t")], TENANT) == before
    execute(source, f"update core_a.t set note = 'touched' where tenant_id = '{OTHER}'")
    assert other_tenants_fingerprint(source, [("core_a", "t")], TENANT) != before


def test_a_missing_table_is_an_error_not_an_empty_set(sides):
    with pytest.raises(AssertionError, match="not there"):
        tenant_multiset(sides[0], "core_a", "missing", TENANT)


def test_every_kind_of_leftover_is_found_and_a_tombstone_is_told_apart(sides):
    source, _ = sides
    assert leftovers(source) == []
    execute(
        source,
        """
        create schema mover; create table mover.fence (tenant uuid);
        create function mover.guard() returns trigger language plpgsql as 'begin return null; end';
        create trigger mover_guard after insert on core_a.t for each row execute function mover.guard()
        """,
    )
    assert {line.split(":")[0] for line in leftovers(source)} == {"schema", "relation", "function", "trigger"}
    assert leftovers(source, tombstone=True) == []
    execute(source, "create unique index mover_identity on core_a.t (tenant_id, id)")
    execute(source, "alter table core_a.t replica identity full")
    execute(source, "create publication p")
    execute(source, "select pg_create_logical_replication_slot('p', 'pgoutput')")
    execute(source, "begin; select pg_advisory_xact_lock(1); prepare transaction 'p'")
    with psycopg.connect(source, application_name="mover/x/1/copy"):
        kinds = {line.split(":")[0] for line in leftovers(source, tombstone=True)}
    assert kinds == {
        "relation",
        "replica identity",
        "publication",
        "slot",
        "advisory lock",
        "prepared transaction",
        "backend",
    }
