"""Cloning a rich schema between versions: equal fingerprints, whatever is interrupted."""

from __future__ import annotations

from uuid import UUID, uuid4

import psycopg
import pytest

from mover.core.errors import LeaseLost, Refused
from mover.core.ids import Epoch, MigrationId, TableRef, TenantId
from mover.core.ownership import holdings_in
from mover.core.secret import Secret
from mover.postgres import agent, catalog, clone, owner, pg_dump
from mover.postgres.connect import Database, Identity
from mover.postgres.fingerprint import differences, fingerprint
from tests.support.rich_schema import RICH_SCHEMA, RICH_SCHEMAS, ROLES

TENANT = TenantId(UUID(int=1))
TARGETS = {name: name for name in RICH_SCHEMAS.values()}
PAIRS = [("pg16", "pg18"), ("pg18", "pg16"), ("pg15", "pg18"), ("pg18", "pg18")]


@pytest.fixture
def sides(request, make_database):
    urls = [make_database(request.getfixturevalue(name)) for name in request.param]
    for url in urls:
        run(url, ROLES)
    run(urls[0], RICH_SCHEMA)
    return [Database(Secret(url), label) for url, label in zip(urls, ("source", "target"), strict=True)]


every_pair = pytest.mark.parametrize("sides", PAIRS, ids="-to-".join, indirect=True)
one_pair = pytest.mark.parametrize("sides", PAIRS[:1], ids="-to-".join, indirect=True)


def run(url, statements):
    with psycopg.connect(url, autocommit=True) as conn:
        conn.execute(statements)


def ask(database, query):
    with psycopg.connect(database.url.reveal(), autocommit=True) as conn:
        return conn.execute(query).fetchall()


async def differing(source, target):
    async with source.connect("test") as ours, target.connect("test") as theirs:
        found = differences(await fingerprint(ours, RICH_SCHEMAS), await fingerprint(theirs, TARGETS))
        return [str(difference) for difference in found]


async def cloned(source, target, migration):
    read = await clone.read_ddl(source, target, RICH_SCHEMAS)
    await clone.apply_pre(target, read, migration)
    return read


@every_pair
async def test_a_clone_has_an_equal_fingerprint(sides):
    source, target = sides
    read = await cloned(source, target, MigrationId(uuid4()))
    await clone.build_rest(target, read, workers=2)
    assert await differing(source, target) == []
    async with source.connect("test") as ours, target.connect("test") as theirs:
        mine, copy = await fingerprint(ours, RICH_SCHEMAS), await fingerprint(theirs, TARGETS)
    assert mine.digest == copy.digest
    assert len(mine.lines) > 60
    run(target.url.reveal(), "insert into realestate_dms.folders (tenant_id) values (gen_random_uuid())")
    run(target.url.reveal(), "select * from realestate_dms.titles(); select realestate_dms.slug('A')")


@one_pair
async def test_comments_and_privileges_come_along(sides):
    source, target = sides
    read = await cloned(source, target, MigrationId(uuid4()))
    await clone.build_rest(target, read, workers=1)
    assert ask(
        target,
        "select obj_description('realestate_dms.documents'::regclass),"
        " obj_description('realestate_dms.documents_by_slug'::regclass),"
        " has_table_privilege('rich_app', 'realestate_dms.documents', 'insert'),"
        " has_schema_privilege('rich_app', 'realestate_dms', 'usage'),"
        " (select count(*) from pg_statistic_ext where stxname = 'document_stats')",
    ) == [("it's about core_dms.documents; really", "by slug", True, True, 1)]


@one_pair
async def test_indexes_and_foreign_keys_wait_for_the_load(sides):
    source, target = sides
    read = await cloned(source, target, MigrationId(uuid4()))
    indexes = "select count(*) from pg_indexes where schemaname like 'realestate%'"
    assert ask(target, indexes) == [(0,)]
    documents = TableRef("realestate_dms", "documents")
    await clone.build_keys(target, read, [documents])
    await clone.build_keys(target, read, [documents])
    assert ask(target, "select indexname from pg_indexes where schemaname like 'realestate%'") == [
        ("documents_pkey",)
    ]


@one_pair
async def test_a_unique_key_is_built_before_changes_flow(sides):
    """Where there is no primary key: a constraint or an index."""
    source, target = sides
    run(
        source.url.reveal(),
        """create table core_dms.by_constraint (a int not null, b int not null, c int unique, unique (a, b));
           create table core_dms.by_index (a int not null, c int);
           create unique index larger on core_dms.by_index (a, c);
           create unique index smaller on core_dms.by_index (a);
           create table core_dms.by_nothing (a int primary key deferrable, c int unique)""",
    )
    read = await cloned(source, target, MigrationId(uuid4()))
    tables = [TableRef("realestate_dms", name) for name in ("by_constraint", "by_index", "by_nothing")]
    unique = """select c.relname from pg_index join pg_class c on c.oid = indexrelid
                 where indrelid::regclass::text like 'realestate_dms.by%' order by 1"""
    for _ in range(2):
        await clone.build_keys(target, read, tables)
        assert ask(target, unique) == [("by_constraint_a_b_key",), ("smaller",)]
    await clone.build_rest(target, read, workers=2)
    assert len(ask(target, unique)) == 6
    assert await differing(source, target) == []


@one_pair
async def test_every_half_may_be_repeated(sides):
    source, target = sides
    migration = MigrationId(uuid4())
    for _ in range(2):
        read = await cloned(source, target, migration)
    half = clone.ClonedDdl(read.comments, read.pre, read.keys, read.post[: len(read.post) // 2])
    await clone.build_rest(target, half, workers=2)
    for _ in range(2):
        await clone.build_rest(target, await clone.read_ddl(source, target, RICH_SCHEMAS), workers=2)
    assert await differing(source, target) == []


@one_pair
async def test_a_failed_clone_leaves_nothing(sides):
    source, target = sides
    read = await clone.read_ddl(source, target, RICH_SCHEMAS)
    broken = clone.ClonedDdl(
        read.comments, (*read.pre, clone.Statement("CREATE TABLE realestate_dms.x (a no_type)")), {}, ()
    )
    with pytest.raises(Exception, match="SQLSTATE 42704"):
        await clone.apply_pre(target, broken, MigrationId(uuid4()))
    assert target_schemas(target) == []


def target_schemas(target):
    return ask(target, "select nspname from pg_namespace where nspname like 'realestate%'")


async def drop(target, migration):
    return await clone.drop_clone(target, TARGETS, migration, await held(target), TENANT)


async def held(target):
    async with target.connect("test") as conn:
        relations = await catalog.read_relations(conn, TARGETS)
    return holdings_in(relations, [], "tenant_id", lambda _: False)


@one_pair
async def test_only_schemas_that_the_migration_made_are_dropped(sides):
    source, target = sides
    migration = MigrationId(uuid4())
    read = await cloned(source, target, migration)
    run(target.url.reveal(), f"insert into realestate_dms.folders (tenant_id) values ('{TENANT}')")
    assert not await drop(target, MigrationId(uuid4()))
    assert len(target_schemas(target)) == 2
    assert await drop(target, migration)
    assert await drop(target, migration)
    assert target_schemas(target) == []

    run(target.url.reveal(), "create schema realestate_dms")
    with pytest.raises(Refused, match="realestate_dms is already on target"):
        await clone.apply_pre(target, read, migration)


@one_pair
@pytest.mark.parametrize(
    "row",
    [
        "insert into realestate_dms.folders (tenant_id) values (gen_random_uuid())",
        "insert into realestate_dms.countries values ('de', 'Germany')",
    ],
    ids=["another-tenants", "reference"],
)
async def test_a_clone_with_somebody_elses_rows_is_never_dropped(sides, row):
    source, target = sides
    migration = MigrationId(uuid4())
    await cloned(source, target, migration)
    run(target.url.reveal(), row)
    for _ in range(2):
        assert not await drop(target, migration)
    assert len(target_schemas(target)) == 2


@one_pair
async def test_a_kept_clone_has_its_own_comment_and_is_not_dropped(sides):
    source, target = sides
    migration = MigrationId(uuid4())
    await cloned(source, target, migration)
    await clone.keep_clone(target, TARGETS, migration)
    assert not await drop(target, migration)
    assert ask(
        target,
        "select obj_description(oid, 'pg_namespace') from pg_namespace"
        " where nspname like 'realestate%' order by nspname",
    ) == [(None,), ("documents; core_dms.x stays in a comment",)]


@one_pair
async def test_an_owner_that_was_replaced_makes_nothing(sides):
    source, target = sides
    migration = MigrationId(uuid4())
    stale = Database(target.url, "target", identity=Identity(migration, Epoch(1)))
    await agent.install(stale, stale.identity)
    read = await cloned(source, stale, migration)
    await owner.take(target, Identity(migration, Epoch(2)))
    for step in (
        clone.build_rest(stale, read, workers=1),
        clone.drop_clone(stale, TARGETS, migration, await held(stale), TENANT),
        clone.keep_clone(stale, TARGETS, migration),
    ):
        with pytest.raises(LeaseLost):
            await step
    assert ask(target, "select count(*) from pg_indexes where schemaname like 'realestate%'") == [(0,)]
    assert await drop(target, migration)


@one_pair
async def test_our_own_objects_are_not_cloned(sides):
    source, target = sides
    run(
        source.url.reveal(),
        """
        create schema mover;
        create function mover.guard() returns trigger language plpgsql as 'begin return null; end';
        create trigger mover_guard after insert on core_dms.documents
          for each row execute function mover.guard();
        alter table core_dms.documents enable always trigger mover_guard;
        create unique index mover_ri_0 on core_dms.documents (tenant_id, id);
        alter table core_dms.documents replica identity using index mover_ri_0;
        """,
    )
    read = await cloned(source, target, MigrationId(uuid4()))
    await clone.build_rest(target, read, workers=2)
    assert ask(target, "select relname from pg_class where relname like 'mover%'") == []
    assert ask(target, "select tgname from pg_trigger where tgname like 'mover%'") == []
    assert await differing(source, target) == []


@one_pair
async def test_privileges_of_roles_that_the_target_lacks_are_left_out(sides):
    source, target = sides
    role = f"only_here_{uuid4().hex[:8]}"
    run(source.url.reveal(), f"create role {role}; grant select on core_dms.folders to {role}")
    try:
        await cloned(source, target, MigrationId(uuid4()))
    finally:
        run(source.url.reveal(), f"drop owned by {role}; drop role {role}")
    assert ask(target, "select to_regclass('realestate_dms.folders') is not null") == [(True,)]


@one_pair
async def test_differences_are_named(sides):
    source, target = sides
    read = await cloned(source, target, MigrationId(uuid4()))
    await clone.build_rest(target, read, workers=2)
    run(
        target.url.reveal(),
        """
        alter table realestate_dms.folders add column extra text;
        alter table realestate_dms.documents alter price set default 1;
        drop index realestate_dms.documents_by_slug;
        """,
    )
    assert await differing(source, target) == [
        "column realestate_dms.documents.price differs:"
        " source has `numeric(12,2) default 0.00`, target has `numeric(12,2) default 1`",
        "column realestate_dms.folders.extra is on the target only",
        "index realestate_dms.documents_by_slug is missing on the target",
    ]


async def test_a_missing_pg_dump_names_what_to_install(tmp_path):
    with pytest.raises(Refused, match="pg_dump 99 or newer is needed") as refusal:
        await pg_dump.find(99, [tmp_path])
    assert "postgresql-client-99" in refusal.value.hint


@one_pair
async def test_the_password_is_not_among_the_arguments_of_pg_dump(sides, tmp_path):
    source, _ = sides
    seen = tmp_path / "seen"
    program = tmp_path / "pg_dump"
    program.write_text(
        "#!/bin/sh\n"
        'if [ "$1" = --version ]; then echo "pg_dump (PostgreSQL) 98.0"; exit; fi\n'
        f'echo "$@" > {seen}; echo "$PGPASSWORD" >> {seen}; echo "-- nothing"\n'
    )
    program.chmod(0o755)
    url = source.url.reveal().replace("postgresql://postgres@", "postgresql://postgres:planted-secret@")
    assert "planted-secret" in url
    database = Database(Secret(url), "source")
    await pg_dump.run(await pg_dump.find(98, [tmp_path]), database, ["core_dms"], "pre-data")
    arguments, password = seen.read_text().splitlines()
    assert password == "planted-secret"
    assert "planted-secret" not in arguments
