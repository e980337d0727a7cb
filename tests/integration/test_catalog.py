"""Facts and judgement against real servers: what is read is what is there, and what is refused is right."""

from __future__ import annotations

from uuid import UUID, uuid4

import psycopg
import pytest

from mover.core.errors import Unreachable
from mover.core.facts import Tenancy
from mover.core.ids import Capture, MigrationId, TableRef, TenantId, Tier
from mover.core.migration import Place
from mover.core.secret import Secret
from mover.core.tables import SequenceRef
from mover.engine.preflight import judge
from mover.postgres import clone
from mover.postgres.connect import Database
from mover.postgres.facts import gather
from tests.support.rich_schema import RICH_SCHEMA, RICH_SCHEMAS, ROLES

TENANT = TenantId(UUID(int=1))
OTHER = TenantId(UUID(int=2))
TENANCY = Tenancy("tenant_id", reference_tables=frozenset({"core_dms.countries"}))
ROWS = f"""
insert into core_dms.countries values ('de', 'Germany'), ('fr', 'France');
insert into core_dms.folders (id, tenant_id, title)
  select gen_random_uuid(), t, t::text from unnest(array['{TENANT}', '{OTHER}']::uuid[]) t;
insert into core_dms.documents (tenant_id, folder_id, title, mail)
  select tenant_id, id, 'title ' || n, 'm' || n || '@x' from core_dms.folders, generate_series(1, 20) n;
insert into core_crm.notes (tenant_id, document_id, line)
  select tenant_id, id, 1 from core_dms.documents;
"""


def run(database, statements):
    with psycopg.connect(database.url.reveal(), autocommit=True) as conn:
        conn.execute(statements)


@pytest.fixture
def sides(make_database, pg16, pg18):
    found = [Database(Secret(make_database(s)), label) for s, label in ((pg16, "source"), (pg18, "target"))]
    for database in found:
        run(database, ROLES)
    run(found[0], RICH_SCHEMA)
    run(found[0], ROWS)
    return found


async def facts_of(source, target, tenancy=TENANCY, tenant=TENANT, schemas=RICH_SCHEMAS):
    here = Place("core", Tier.SCHEMA, source.url, tuple(schemas))
    there = Place("realestate", Tier.DATABASE, target.url, tuple(schemas.values()))
    return await gather(source, target, here, there, tenancy, tenant, Capture.WAL)


async def plan_of(source, target, **options):
    return judge(await facts_of(source, target, **options))


def codes(plan):
    return sorted(f.code for f in plan.refusals)


async def fill_target(source, target):
    """The target's schemas with the same other tenant's rows."""
    read = await clone.read_ddl(source, target, RICH_SCHEMAS)
    migration = MigrationId(uuid4())
    await clone.apply_pre(target, read, migration)
    await clone.build_rest(target, read, workers=1)
    await clone.keep_clone(target, RICH_SCHEMAS.values(), migration)
    moved = ROWS.replace("core_", "realestate_").replace(f"'{TENANT}', ", "")
    run(target, moved + "update realestate_dms.documents set number = default;")


async def test_a_fresh_target_gets_a_plan(sides):
    plan = await plan_of(*sides)
    assert plan.refusals == ()
    assert {f.code for f in plan.findings} == {"materialized_view", "schema_in_literal"}
    assert [str(t.source) for t in plan.shape.tables] == [
        'core_dms.Odd "Names"',
        "core_dms.folders",
        "core_dms.documents",
        "core_crm.notes",
    ]
    assert plan.shape.fresh
    assert plan.classes["core_dms.countries"] == "reference"
    assert plan.classes["core_dms.totals"] == "ignored"
    assert "core_dms.drafts" not in plan.classes
    assert plan.facts["rows"] == 41
    assert plan.facts["replica_identity_changes"] == [
        'core_dms.Odd "Names"',
        "core_dms.documents",
        "core_dms.folders",
    ]


async def test_columns_and_keys_are_described_for_both_sides(sides):
    plan = await plan_of(*sides)
    documents, notes = plan.shape.tables[2:]
    columns = {c.name: c for c in documents.columns}
    assert columns["moods"].source_type == "core_dms.mood[]"
    assert columns["moods"].target_type == "realestate_dms.mood[]"
    assert columns["price"].target_type == "numeric(12,2)"
    assert columns["slug"].generated and columns["slug"] not in documents.copied
    assert columns["number"].identity_always and not columns["id"].identity_always
    assert columns["title"].collatable and not columns["tenant_id"].collatable
    assert columns["title"].not_null and not columns["mail"].not_null
    assert notes.key == ("tenant_id", "document_id", "line")
    assert (documents.estimated_rows, notes.estimated_rows) == (20, 20)
    assert documents.estimated_bytes > 0
    folders = plan.shape.tables[1]
    assert "dropped_one" not in {c.name for c in folders.columns}


async def test_sequences_of_moved_tables_and_free_ones_are_moved(sides):
    run(sides[0], "alter table core_dms.countries add column n serial")
    plan = await plan_of(*sides)
    assert plan.shape.sequences == tuple(
        SequenceRef(TableRef("core_dms", name), TableRef("realestate_dms", name))
        for name in ('Odd "Names"_Id_seq', "documents_id_seq", "documents_number_seq", "free_numbers")
    )


async def test_an_unknown_tenant_is_refused(sides):
    plan = await plan_of(*sides, tenant=TenantId(UUID(int=77)))
    assert codes(plan) == ["unknown_tenant"]


async def test_every_unfit_table_is_refused_by_name_at_once(sides):
    run(
        sides[0],
        """
        create table core_dms.nobodys (id int primary key);
        create table core_dms.versions (id int primary key, document bigint references core_dms.documents);
        create table core_dms.version_pages (page int, version int references core_dms.versions);
        create table core_dms.keyless (tenant_id uuid not null);
        create table core_dms.loose (id int primary key, tenant_id uuid);
        create table core_dms.numbered (id int primary key, tenant_id int not null);
        create unlogged table core_dms.volatile (id int primary key, tenant_id uuid not null);
        create table core_dms.parents (tenant_id uuid, id int, primary key (tenant_id, id));
        create table core_dms.parts (tenant_id uuid, id int, primary key (tenant_id, id))
          partition by hash (tenant_id);
        create table core_dms.part_0 partition of core_dms.parts for values with (modulus 1, remainder 0);
        create table core_dms.heirs () inherits (core_dms.parents);
        create schema elsewhere;
        create table elsewhere.links (id int primary key, document bigint references core_dms.documents);
        create publication theirs for table core_dms.documents (id, title);
        """,
    )
    try:
        plan = await plan_of(*sides)
    finally:
        run(sides[0], "drop publication theirs")
    assert sorted((f.code, str(f.table)) for f in plan.refusals) == [
        ("inheritance", "core_dms.heirs"),
        ("inheritance", "core_dms.parents"),
        ("no_tenant_column", "core_dms.nobodys"),
        ("nullable_tenant_column", "core_dms.loose"),
        ("owned_table", "core_dms.version_pages"),
        ("publication", "core_dms.documents"),
        ("referenced_from_outside", "core_dms.documents"),
        ("tenant_column_type", "core_dms.numbered"),
        ("unlogged", "core_dms.volatile"),
    ]
    assert all(f.hint for f in plan.refusals)
    assert ("no_key", "core_dms.keyless") in [(f.code, str(f.table)) for f in plan.findings]
    hints = {f.code: f.hint for f in plan.refusals}
    assert 'tenancy.reference_tables += ["core_dms.nobodys"]' in hints["no_tenant_column"]


async def test_a_plain_role_is_told_every_grant_that_it_lacks(sides, pg16, pg18):
    source, target = sides
    role = f"plain_{uuid4().hex[:8]}"
    for database in sides:
        run(database, f"create role {role} login")
    run(source, f"grant usage on schema core_dms, core_crm to {role}")
    try:
        plain = [
            Database(Secret(d.url.reveal().replace("postgres@", f"{role}@")), d.label)
            for d in (source, target)
        ]
        plan = await plan_of(*plain)
        assert set(codes(plan)) == {
            "no_replication",
            "no_create",
            "no_create_in_schema",
            "no_privilege",
            "not_owner",
            "row_security",
        }
        hints = {f.hint for f in plan.findings}
        assert f'ALTER ROLE "{role}" REPLICATION;' in hints
        assert f'GRANT SET ON PARAMETER session_replication_role TO "{role}";' in hints
        assert f'GRANT "postgres" TO "{role}";' in hints
    finally:
        for database in sides:
            run(database, f"drop owned by {role}; drop role {role}")


async def test_a_role_that_cannot_refer_to_the_targets_tables_is_told_the_grant(sides):
    source, target = sides
    role = f"plain_{uuid4().hex[:8]}"
    run(source, "create schema auth; create table auth.organizations (id uuid primary key)")
    run(source, "insert into auth.organizations select distinct tenant_id from core_dms.folders")
    run(source, "alter table core_dms.folders add foreign key (tenant_id) references auth.organizations")
    run(target, "create schema auth; create table auth.organizations (id uuid primary key)")
    run(target, f"create role {role} login")
    try:
        plain = Database(Secret(target.url.reveal().replace("postgres@", f"{role}@")), target.label)
        plan = await plan_of(source, plain)
        (lacking,) = [f for f in plan.refusals if f.code == "no_privilege_on_parent"]
        assert lacking.message.startswith(f"role {role} lacks REFERENCES, SELECT on auth.organizations")
        run(target, lacking.hint)
        assert "no_privilege_on_parent" not in codes(await plan_of(source, plain))
    finally:
        run(target, f"drop owned by {role}; drop role {role}")


async def test_references_that_the_target_lacks_are_refused(sides):
    source, target = sides
    run(
        source,
        """
        create schema auth;
        create table auth.organizations (id uuid primary key);
        insert into auth.organizations select distinct tenant_id from core_dms.folders;
        alter table core_dms.folders add foreign key (tenant_id) references auth.organizations;
        update core_dms.documents set country = 'de';
        """,
    )
    plan = await plan_of(source, target)
    assert codes(plan) == ["reference_table_missing", "references_missing"]
    assert "1 value of core_dms.documents (country)" in plan.refusals[1].message

    run(target, "create schema auth; create table auth.organizations (id uuid primary key)")
    plan = await plan_of(source, target)
    assert codes(plan) == ["references_missing", "references_missing"]

    run(target, f"insert into auth.organizations values ('{TENANT}')")
    run(source, "update core_dms.documents set country = null")
    assert (await plan_of(source, target)).refusals == ()


async def test_rows_that_refer_across_tenants_are_refused(sides):
    source, target = sides
    run(
        source,
        f"""
        update core_dms.documents
           set folder_id = (select id from core_dms.folders where tenant_id = '{OTHER}')
         where tenant_id = '{TENANT}' and title = 'title 1';
        update core_dms.documents
           set folder_id = (select id from core_dms.folders where tenant_id = '{TENANT}')
         where tenant_id = '{OTHER}' and title in ('title 2', 'title 3');
        """,
    )
    plan = await plan_of(source, target)
    assert codes(plan) == ["cross_tenant_reference", "cross_tenant_reference"]
    assert [f.message.split(" in ")[0] for f in plan.refusals] == [
        "1 row of the tenant",
        "2 rows of other tenants",
    ]


async def test_a_target_with_other_tenants_rows_is_fine(sides):
    source, target = sides
    await fill_target(source, target)
    run(target, "update realestate_crm.notes set document_id = document_id; ")
    run(target, "alter table realestate_crm.notes drop constraint notes_document_id_fkey")
    run(source, "alter table core_crm.notes drop constraint notes_document_id_fkey")
    run(target, "update realestate_dms.documents set id = id + 1000")
    plan = await plan_of(source, target)
    assert plan.refusals == ()
    assert not plan.shape.fresh


async def test_colliding_keys_are_counted(sides):
    source, target = sides
    await fill_target(source, target)
    run(
        source,
        "create unique index slug_once on core_dms.documents (lower(title)) where title = 'title 7'"
        " and draft",
    )
    run(
        target,
        "create unique index slug_once on realestate_dms.documents (lower(title))"
        " where title = 'title 7' and draft",
    )
    run(
        source,
        f"""
        delete from core_crm.notes;
        update core_dms.documents
           set draft = title = 'title 7', id = 500 + substr(title, 7)::int where tenant_id = '{TENANT}';
        """,
    )
    run(
        target,
        """
        delete from realestate_crm.notes;
        update realestate_dms.documents set draft = title = 'title 7', id = 502 + substr(title, 7)::int;
        """,
    )
    plan = await plan_of(source, target)
    assert [(f.code, f.message.split(" of ")[0], f.message.split("(")[1]) for f in plan.refusals] == [
        ("collision", "18 values", "index documents_pkey)"),
        ("collision", "1 value", "index slug_once)"),
    ]


async def test_the_tenants_own_rows_on_the_target_are_refused(sides):
    source, target = sides
    await fill_target(source, target)
    run(target, f"insert into realestate_dms.folders (tenant_id) values ('{TENANT}')")
    plan = await plan_of(source, target)
    assert "tenant_already_there" in codes(plan)


async def test_a_different_target_is_refused_with_its_differences(sides):
    source, target = sides
    await fill_target(source, target)
    run(target, "alter table realestate_dms.folders add column extra text")
    plan = await plan_of(source, target)
    refusal = next(f for f in plan.refusals if f.code == "target_differs")
    assert "column realestate_dms.folders.extra is on the target only" in refusal.message


async def test_a_target_with_some_of_the_schemas_is_refused(sides):
    run(sides[1], "create schema realestate_crm")
    plan = await plan_of(*sides)
    assert "target_incomplete" in codes(plan)


async def test_a_target_that_another_migration_is_still_making_is_refused(sides):
    source, target = sides
    read = await clone.read_ddl(source, target, RICH_SCHEMAS)
    await clone.apply_pre(target, read, MigrationId(uuid4()))
    assert codes(await plan_of(source, target)) == ["target_in_the_making"]


async def test_the_same_place_is_refused(sides):
    source, _ = sides
    plan = await plan_of(source, source, schemas={name: name for name in RICH_SCHEMAS})
    assert "same_place" in codes(plan)


async def test_other_schemas_of_the_same_database_are_fine(sides):
    source, _ = sides
    assert (await plan_of(source, source)).refusals == ()


async def test_old_transactions_are_warned_of(sides, monkeypatch):
    monkeypatch.setattr("mover.postgres.catalog.LONG_TRANSACTION_S", 0)
    source, target = sides
    with psycopg.connect(source.url.reveal(), application_name="nightly report") as conn:
        conn.execute("select 1")
        plan = await plan_of(source, target)
    warning = next(f for f in plan.findings if f.code == "long_transactions")
    assert warning.warning and "nightly report" in warning.message


async def test_a_missing_extension_is_refused(sides):
    source, target = sides
    with psycopg.connect(source.url.reveal()) as conn:
        (extension,) = conn.execute(
            "select name from pg_available_extensions where name in ('citext', 'vector') limit 1"
        ).fetchone()
    run(source, f"create extension {extension}; alter table core_dms.folders add column c {extension}")
    assert codes(await plan_of(source, target)) == ["extension_missing"]


async def test_a_server_that_is_down_is_unreachable(sides):
    down = Database(Secret("postgresql://postgres@127.0.0.1:1/x"), "target")
    with pytest.raises(Unreachable, match="target"):
        await facts_of(sides[0], down)


OWNED = """
create table core_dms.pages (id int primary key, document bigint not null references core_dms.documents);
insert into core_dms.pages select id * 10 + n, id from core_dms.documents, generate_series(1, 3) n;
create table core_dms.stamps (id int primary key, page int references core_dms.pages,
                              document bigint references core_dms.documents);
insert into core_dms.stamps select id, id, null from core_dms.pages;
insert into core_dms.stamps values (-1, null, null), (-2, null, null);
analyze core_dms.pages, core_dms.stamps, core_dms.documents;
"""


async def test_owned_tables_are_planned_behind_their_owners(sides):
    run(sides[0], OWNED)
    plan = await plan_of(*sides)
    assert codes(plan) == []
    tables = {t.source.name: t for t in plan.shape.tables}
    assert [name for name in tables if name in ("documents", "pages", "stamps")] == [
        "documents",
        "pages",
        "stamps",
    ]
    assert (tables["pages"].estimated_rows, tables["stamps"].estimated_rows) == (60, 60)
    assert {owner.source.name for owner in tables["stamps"].owners} == {"pages", "documents"}
    assert {plan.classes[f"core_dms.{name}"] for name in ("pages", "stamps")} == {"owned"}
    (orphans,) = [f.message for f in plan.findings if f.code == "orphans"]
    assert orphans.startswith("2 rows of core_dms.stamps")


async def test_what_an_owned_table_holds_is_estimated_where_it_cannot_be_counted(sides, monkeypatch):
    async def too_slow(*_):
        return None

    run(sides[0], OWNED)
    monkeypatch.setattr("mover.postgres.facts._Server.bounded", too_slow)
    rows = (await facts_of(*sides)).rows[TableRef("core_dms", "pages")]
    assert not rows.exact
    assert 0 < rows.rows <= 180


async def test_an_owned_row_that_is_two_tenants_is_refused(sides):
    run(sides[0], OWNED)
    run(
        sides[0],
        f"insert into core_dms.stamps values (-3, (select min(p.id) from core_dms.pages p join"
        f" core_dms.documents d on d.id = p.document where d.tenant_id <> '{TENANT}'),"
        f" (select min(id) from core_dms.documents where tenant_id = '{TENANT}'))",
    )
    plan = await plan_of(*sides)
    assert codes(plan) == ["cross_tenant_reference"]


async def test_owners_told_by_texts_that_are_equal_without_being_the_same_are_refused(make_database, pg15):
    """The server of this version is the one that is built with ICU."""
    sides = [Database(Secret(make_database(pg15)), label) for label in ("source", "target")]
    run(
        sides[0],
        "create schema core_dms; create collation core_dms.any_case"
        " (provider = icu, locale = 'und-u-ks-level2', deterministic = false);"
        "create table core_dms.labels"
        " (name text collate core_dms.any_case primary key, tenant_id uuid not null);"
        "create table core_dms.labelled (id int primary key, label text not null references core_dms.labels)",
    )
    plan = await plan_of(*sides, schemas={"core_dms": "realestate_dms"})
    (refusal,) = [f for f in plan.refusals if f.table == TableRef("core_dms", "labelled")]
    assert refusal.code == "owned_table"
    assert "may be written differently" in refusal.message


async def test_keys_of_different_collations_are_joined_or_refused_by_name(sides):
    """PostgreSQL compares them in a foreign key, but not without being told how elsewhere."""
    run(
        sides[0],
        'create table core_dms.labels (name text collate "C.utf8" primary key, tenant_id uuid not null);'
        'create table core_dms.labelled (id int primary key, label text collate "C" not null'
        " references core_dms.labels);"
        "create table core_dms.printed (id int primary key, tenant_id uuid not null,"
        ' label text collate "C" not null references core_dms.labels);'
        f"insert into core_dms.labels values ('mine', '{TENANT}');"
        f"insert into core_dms.printed values (1, '{OTHER}', 'mine')",
    )
    plan = await plan_of(*sides)
    found = {str(f.table): f for f in plan.refusals}
    assert codes(plan) == ["cross_tenant_reference", "owned_table"]
    assert "another collation" in found["core_dms.labelled"].message
    assert found["core_dms.printed"].message.startswith("1 row of other tenants")
