"""Replica identities: made without blocking writers, shared by migrations, restored by the last."""

from __future__ import annotations

import asyncio
import threading
from uuid import uuid4

import psycopg
import pytest

from mover.core.errors import Conflict, LockNotAvailable
from mover.core.ids import MigrationId, TableRef
from mover.core.secret import Secret
from mover.postgres import identity
from mover.postgres.connect import Database
from mover.postgres.identity import IdentityNeed, ensure_identities, release_identities
from mover.postgres.locks import with_lock_timeout
from mover.sql import load

DOCUMENTS = TableRef("core_dms", "documents")
NEED = IdentityNeed(DOCUMENTS, ("tenant_id", "id"), ("id",))
FIRST, SECOND = MigrationId(uuid4()), MigrationId(uuid4())
SCHEMA = """
create schema mover;
create schema core_dms;
create table core_dms.documents (id bigint primary key, tenant_id uuid not null, code text not null);
insert into core_dms.documents select n, gen_random_uuid(), n::text from generate_series(1, 50) n;
"""


@pytest.fixture
def database(make_database, pg16):
    url = make_database(pg16)
    with psycopg.connect(url, autocommit=True) as conn:
        conn.execute(SCHEMA)
        conn.execute(load("identity_schema")["install"])
    return Database(Secret(url), "source")


@pytest.fixture
def said():
    return []


@pytest.fixture
def say(said):
    async def listen(text):
        said.append(text)

    return listen


def client(database, **options):
    return psycopg.connect(database.url.reveal(), autocommit=True, **options)


def identity_of(database):
    """Replica identity and the index behind it, and the indexes of the table with their validity."""
    with client(database) as conn:
        return conn.execute(
            """
            select c.relreplident, (select indexrelid::regclass::text from pg_index
                                     where indrelid = c.oid and indisreplident),
                   array(select i.indexrelid::regclass || case when i.indisvalid then '' else ' INVALID' end
                           from pg_index i where i.indrelid = c.oid order by 1)
              from pg_class c where c.oid = 'core_dms.documents'::regclass
            """
        ).fetchone()


OURS = f"core_dms.{NEED.index_name}"
BEFORE = ("d", None, ["core_dms.documents_pkey"])
CHANGED = ("i", OURS, ["core_dms.documents_pkey", OURS])


async def test_an_index_on_tenant_and_key_becomes_the_identity_and_goes_again(database, say):
    for _ in range(2):
        await ensure_identities(database, FIRST, [NEED], say)
        assert identity_of(database) == CHANGED
    with client(database) as conn:
        conn.execute("create publication p for table core_dms.documents where (tenant_id is not null)")
        conn.execute("update core_dms.documents set code = 'x' where id = 1")
        conn.execute("drop publication p")
    for _ in range(2):
        await release_identities(database, FIRST, say)
        assert identity_of(database) == BEFORE


async def test_the_last_of_several_migrations_restores_it(database, say):
    await ensure_identities(database, FIRST, [NEED], say)
    await ensure_identities(database, SECOND, [NEED], say)
    await release_identities(database, FIRST, say)
    assert identity_of(database) == CHANGED
    await release_identities(database, SECOND, say)
    assert identity_of(database) == BEFORE
    with client(database) as conn:
        assert conn.execute("select count(*) from mover.replica_identity").fetchone() == (0,)


async def test_migrations_that_prepare_together_build_one_index(database, say):
    migrations = [MigrationId(uuid4()) for _ in range(3)]
    async with asyncio.TaskGroup() as group:
        for migration in migrations:
            group.create_task(ensure_identities(database, migration, [NEED], say))
    assert identity_of(database) == CHANGED
    async with asyncio.TaskGroup() as group:
        for migration in migrations:
            group.create_task(release_identities(database, migration, say))
    assert identity_of(database) == BEFORE


@pytest.mark.parametrize("before", ["nothing", "using index documents_code_key"])
async def test_whatever_identity_was_there_comes_back(database, say, before):
    with client(database) as conn:
        conn.execute("alter table core_dms.documents add unique (code)")
        conn.execute(f"alter table core_dms.documents replica identity {before}")
    there = identity_of(database)
    await ensure_identities(database, FIRST, [NEED], say)
    assert identity_of(database)[:2] == ("i", OURS)
    await release_identities(database, FIRST, say)
    assert identity_of(database) == there


async def test_full_identity_is_left_alone(database, say):
    with client(database) as conn:
        conn.execute("alter table core_dms.documents replica identity full")
    await ensure_identities(database, FIRST, [NEED], say)
    assert identity_of(database) == ("f", None, ["core_dms.documents_pkey"])


async def test_an_existing_unique_index_is_used_and_kept(database, say):
    with client(database) as conn:
        conn.execute("create unique index theirs on core_dms.documents (id, tenant_id)")
        conn.execute("create unique index partly on core_dms.documents (tenant_id, id) where id > 0")
    await ensure_identities(database, FIRST, [NEED], say)
    assert identity_of(database)[:2] == ("i", "core_dms.theirs")
    await release_identities(database, FIRST, say)
    assert identity_of(database) == (
        "d",
        None,
        ["core_dms.documents_pkey", "core_dms.partly", "core_dms.theirs"],
    )


async def test_a_primary_key_with_the_tenant_needs_nothing(database, say):
    with client(database) as conn:
        conn.execute("alter table core_dms.documents drop constraint documents_pkey")
        conn.execute("alter table core_dms.documents add primary key (tenant_id, id)")
    await ensure_identities(
        database, FIRST, [IdentityNeed(DOCUMENTS, ("tenant_id", "id"), ("tenant_id", "id"))], say
    )
    assert identity_of(database) == BEFORE


@pytest.mark.parametrize("before", ["default", "nothing", "full"])
async def test_without_a_key_it_is_the_whole_row_until_the_last_migration_ends(database, say, before):
    need = IdentityNeed(DOCUMENTS, ("tenant_id",), ())
    with client(database) as conn:
        conn.execute("alter table core_dms.documents drop constraint documents_pkey")
        conn.execute(f"alter table core_dms.documents replica identity {before}")
    for migration in (FIRST, SECOND):
        await ensure_identities(database, migration, [need], say)
        assert identity_of(database) == ("f", None, [])
    with client(database) as conn:
        conn.execute("create publication p for table core_dms.documents where (tenant_id is not null)")
        conn.execute("update core_dms.documents set code = 'x'")
        conn.execute("drop publication p")
    await release_identities(database, FIRST, say)
    assert identity_of(database) == ("f", None, [])
    await release_identities(database, SECOND, say)
    assert identity_of(database) == (before[0], None, [])


async def test_a_unique_key_without_the_tenant_gets_an_index_with_it(database, say):
    with client(database) as conn:
        conn.execute("alter table core_dms.documents drop constraint documents_pkey")
        conn.execute("create unique index codes on core_dms.documents (code)")
    await ensure_identities(database, FIRST, [IdentityNeed(DOCUMENTS, ("tenant_id", "code"), ("code",))], say)
    assert identity_of(database) == ("i", OURS, ["core_dms.codes", OURS])
    await release_identities(database, FIRST, say)
    assert identity_of(database) == ("d", None, ["core_dms.codes"])


async def test_an_invalid_leftover_is_replaced(database, say):
    with client(database) as conn:
        conn.execute(
            "insert into core_dms.documents select 99, tenant_id, 'x' from core_dms.documents limit 1"
        )
        with pytest.raises(psycopg.errors.UniqueViolation):
            conn.execute(
                f"create unique index concurrently {NEED.index_name} on core_dms.documents (tenant_id)"
            )
    assert identity_of(database)[2][-1] == f"{OURS} INVALID"
    await ensure_identities(database, FIRST, [NEED], say)
    assert identity_of(database) == CHANGED


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(identity, "BUILD_LOCK_TIMEOUT_MS", 100)
    monkeypatch.setattr(identity, "BUILD_TRIES", 2)


@pytest.mark.usefixtures("impatient")
async def test_a_build_behind_a_long_transaction_names_it_and_succeeds_after_it(database, say, said):
    with client(database, application_name="nightly report") as long, long.transaction():
        long.execute("update core_dms.documents set code = 'y' where id = 2")
        with pytest.raises(LockNotAvailable):
            await ensure_identities(database, FIRST, [NEED], say)
        assert all("nightly report (pid" in text for text in said)
    await ensure_identities(database, FIRST, [NEED], say)
    assert identity_of(database) == CHANGED


@pytest.mark.usefixtures("impatient")
async def test_what_a_build_that_gave_up_left_is_removed(database, say):
    with client(database) as long, long.transaction():
        long.execute("update core_dms.documents set code = 'y' where id = 2")
        with pytest.raises(LockNotAvailable):
            await ensure_identities(database, FIRST, [NEED], say)
        assert identity_of(database)[2][-1] == f"{OURS} INVALID"
    await release_identities(database, FIRST, say)
    assert identity_of(database) == BEFORE


async def test_a_crash_after_the_record_is_undone(database, say):
    with client(database) as conn:
        conn.execute(
            "insert into mover.replica_identity values ('core_dms', 'documents', 'd', null, %s)",
            (NEED.index_name,),
        )
        conn.execute("insert into mover.replica_identity_user values ('core_dms', 'documents', %s)", (FIRST,))
    await release_identities(database, FIRST, say)
    assert identity_of(database) == BEFORE
    with client(database) as conn:
        assert conn.execute("select count(*) from mover.replica_identity").fetchone() == (0,)


async def test_a_table_dropped_meanwhile_is_forgotten(database, say):
    await ensure_identities(database, FIRST, [NEED], say)
    with client(database) as conn:
        conn.execute("drop table core_dms.documents")
    await release_identities(database, FIRST, say)
    with client(database) as conn:
        assert conn.execute("select count(*) from mover.replica_identity").fetchone() == (0,)


async def test_it_stays_while_a_publication_of_ours_needs_it(database, say):
    await ensure_identities(database, FIRST, [NEED], say)
    with client(database) as conn:
        conn.execute("create publication mover_x for table core_dms.documents where (tenant_id is not null)")
    with pytest.raises(Conflict, match="mover_x still needs"):
        await release_identities(database, FIRST, say)
    assert identity_of(database) == CHANGED


async def test_writers_never_wait_longer_than_the_lock_timeout(database, say, said):
    """The reader's lock keeps ALTER TABLE waiting; a writer behind it must get through in between."""
    await ensure_identities(database, FIRST, [NEED], say)
    waiting, wrote = threading.Event(), threading.Event()

    async def listen(text):
        waiting.set()
        if wrote.is_set():
            reader.rollback()

    def write():
        waiting.wait(30)
        with client(database, options="-c statement_timeout=2000") as conn:
            conn.execute("update core_dms.documents set code = 'z' where id = 3")
        wrote.set()

    reader = psycopg.connect(database.url.reveal())
    reader.execute("select count(*) from core_dms.documents")
    writer = threading.Thread(target=write)
    writer.start()
    await release_identities(database, FIRST, listen)
    writer.join()
    reader.close()
    assert wrote.is_set()
    assert identity_of(database) == BEFORE


async def test_lock_timeouts_nest(database):
    async def setting(conn):
        return (await (await conn.execute("show lock_timeout")).fetchone())[0]

    async with database.connect("test") as conn:

        async def outer():
            await with_lock_timeout(conn, lambda: setting(conn))
            return await setting(conn)

        assert await with_lock_timeout(conn, outer, lock_timeout_ms=700) == "700ms"
        assert await setting(conn) == "0"
