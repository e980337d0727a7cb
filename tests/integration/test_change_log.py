"""What triggers write down, and what of it is new between two snapshots."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from uuid import uuid4

import psycopg
import pytest

from mover.core.errors import ApplyConflict, PlanOutdated, Unreachable
from mover.core.ids import Capture, MigrationId, TableRef
from mover.core.tables import Column, MovedTable
from mover.engine import follow_log
from mover.postgres import agent, change_log
from mover.postgres.capture import Capture as Capturing
from mover.postgres.capture import log_bytes
from mover.postgres.errors import translate
from tests.support.rig import OTHER, TENANT, Rig, Subject, execute, rig
from tests.support.waiting import until

TRIGGER = Capture.TRIGGER


def log_of(r: Rig) -> str:
    return f"mover.change_log_{r.migration.hex}"


def entries(r: Rig) -> int:
    ((count,),) = execute(r.source_url, f"SELECT count(*) FROM {log_of(r)}")
    return count


async def expect_equal(r: Rig) -> None:
    await r.follower.catch_up_once()
    assert r.target_rows() == r.source_rows()


async def new_entries(r: Rig) -> int:
    """How many the next step would read."""
    follower = r.follower
    async with follower.log.next_point() as point:
        changes = await point.changes_since(follower._snapshot)
        return sum([len(batch) async for batch in changes.rows(r.writer._tables.all_copied)])


async def test_only_the_tenants_rows_are_written_down_and_none_of_ours(pair):
    async with rig(pair.source, pair.target, rows=50, capture=TRIGGER) as r:
        execute(pair.source, "UPDATE app.item SET name = 'x' WHERE tenant_id = %s", OTHER)
        assert entries(r) == 0
        with psycopg.connect(pair.source) as conn:
            conn.execute(f"SET mover.tenant = '{TENANT}'")
            conn.execute("DELETE FROM app.item WHERE id = 1")
        assert entries(r) == 0
        execute(pair.source, "UPDATE app.item SET name = 'x' WHERE id = 2")
        execute(pair.source, "UPDATE app.item SET id = 2000 WHERE id = 3")
        execute(pair.source, "UPDATE app.item SET tenant_id = %s WHERE id = 4", OTHER)
        written = execute(pair.source, f"SELECT value[1]::int FROM {log_of(r)} ORDER BY 1")
        assert written == [(2,), (3,), (4,), (2000,)]


async def test_a_source_that_ends_while_it_is_read_is_named(pair):
    """Not the target, on whose connections the work goes on around it."""
    async with rig(pair.source, pair.target, rows=5, capture=TRIGGER) as r:
        with pytest.raises(Unreachable, match=r"^source"), translate("target"):
            async with r.follower.log.next_point() as point:
                execute(pair.source, "SELECT pg_terminate_backend(%s, 5000)", point.conn.info.backend_pid)


async def test_a_transaction_that_stays_open_holds_nothing_up_and_is_not_forgotten(pair):
    """Nor do entries that its snapshot keeps from being removed cost the next steps anything."""
    async with rig(pair.source, pair.target, rows=200, capture=TRIGGER) as r:
        await r.follower.start()
        with psycopg.connect(pair.source) as elsewhere, psycopg.connect(pair.source) as ours:
            elsewhere.execute("CREATE TABLE app.another (id int)")
            elsewhere.execute("UPDATE app.item SET name = 'o' WHERE tenant_id = %s", (OTHER,))
            ours.execute("UPDATE app.item SET name = 'late' WHERE id BETWEEN 1 AND 5")
            await r.copy().run()
            for number in range(5):
                execute(pair.source, "UPDATE app.item SET amount = %s WHERE id BETWEEN 101 AND 200", number)
                await expect_equal(r)
                assert await new_entries(r) == 0
            kept = entries(r)
            await r.follower.log.forget(r.follower._durable)
            assert entries(r) == kept > 0  # a step back may still need them
            ours.commit()
            assert await new_entries(r) == 5
            await expect_equal(r)
            assert [row[1] for row in r.target_rows()[:5]] == ["late"] * 5
            elsewhere.rollback()
        execute(pair.source, "UPDATE app.item SET amount = 9 WHERE id = 7")
        await expect_equal(r)
        await r.follower.log.forget(r.follower._durable)
        assert entries(r) <= 1


async def test_the_log_takes_no_more_room_however_long_it_is_written(pair, monkeypatch):
    monkeypatch.setattr(follow_log, "FORGET_INTERVAL_S", 0.0)
    monkeypatch.setattr(change_log, "VACUUM_ROWS", 1000)
    sizes = []

    def write_a_round() -> None:
        for _ in range(2):
            execute(pair.source, "UPDATE app.item SET amount = amount + 1 WHERE tenant_id = %s", TENANT)

    async with rig(pair.source, pair.target, capture=TRIGGER) as r, r.source.borrow("test") as conn:
        write_a_round()
        one_round = await log_bytes(conn, r.migration)
        async with r.following():
            await r.copy().run()
            for _ in range(12):
                write_a_round()
                await until(lambda: entries(r) == 0)
                sizes.append(await log_bytes(conn, r.migration))
    # One that is written, one that is forgotten and not vacuumed yet, and one of odds and ends: which of the
    # two comes first makes a page more or less.
    assert max(sizes) <= 3 * one_round, (one_round, sizes)


async def test_a_follower_goes_on_from_what_the_target_has_stored(pair):
    async with rig(pair.source, pair.target, rows=100, capture=TRIGGER) as r:
        await r.follower.start()
        await r.copy().run()
        execute(pair.source, "UPDATE app.item SET name = 'first' WHERE id = 1")
        await r.follower.catch_up_once()
        execute(pair.source, "UPDATE app.item SET name = 'second' WHERE id = 2")
        await r.follower.start()
        await expect_equal(r)


PLACES = (
    "CREATE SCHEMA app; CREATE TABLE app.item (tenant_id uuid NOT NULL, id bigint PRIMARY KEY,"
    " place int NOT NULL UNIQUE, note text)"
)
PLACED = MovedTable(
    TableRef("app", "item"),
    TableRef("app", "item"),
    (
        Column("tenant_id", "uuid", "uuid", not_null=True),
        Column("id", "bigint", "bigint", not_null=True),
        Column("place", "integer", "integer", not_null=True),
        Column("note", "text", "text"),
    ),
    ("id",),
    "tenant_id",
)
CIRCLES = {
    "two rows": ["1, 2", "2, 1"],
    "three rows": ["1, 2", "2, 3", "3, 1"],
    "a chain": ["1, 2", "2, 3", "3, 900"],
}


@pytest.mark.parametrize("moves", CIRCLES.values(), ids=CIRCLES)
@pytest.mark.parametrize("rows", [1, 400], ids=["alone", "among many"])
async def test_unique_values_may_change_hands_between_two_snapshots(pair, moves, rows):
    async with rig(pair.source, pair.target, subject=Subject((PLACED,), PLACES, ""), capture=TRIGGER) as r:
        execute(pair.source, f"INSERT INTO app.item SELECT '{TENANT}', n, n FROM generate_series(1, 500) n")
        await r.follower.start()
        await r.copy().run()
        with psycopg.connect(pair.source) as conn:
            conn.execute("UPDATE app.item SET place = -place WHERE id < 10")
            for move in moves:
                conn.execute("UPDATE app.item SET place = {1} WHERE id = {0}".format(*move.split(", ")))
            conn.execute("UPDATE app.item SET place = -place WHERE place < 0")
            conn.execute("UPDATE app.item SET note = 'x' WHERE id > %s", (500 - rows,))
        await r.follower.catch_up_once()
        content = "SELECT * FROM app.item ORDER BY id"
        assert execute(pair.target, content) == execute(pair.source, content)


async def test_a_step_of_many_batches_ends_equal(pair, monkeypatch):
    monkeypatch.setattr("mover.postgres.change_log.BATCH_ROWS", 50)
    async with rig(pair.source, pair.target, rows=400, capture=TRIGGER) as r:
        await r.follower.start()
        await r.copy().run()
        with psycopg.connect(pair.source) as conn:
            conn.execute("UPDATE app.item SET name = 'x' WHERE id % 2 = 0")
            conn.execute("DELETE FROM app.item WHERE id % 3 = 0")
            conn.execute("UPDATE app.item SET id = id + 5000 WHERE id % 5 = 0")
        await expect_equal(r)


@pytest.mark.parametrize(
    ("ddl", "write"),
    [
        ("RENAME COLUMN id TO number", "UPDATE app.item SET name = 'x' WHERE number = 1"),
        ("ADD COLUMN extra text", "UPDATE app.item SET extra = 'x' WHERE id = 1"),
    ],
    ids=["a key column renamed", "a column added"],
)
async def test_a_changed_schema_breaks_no_write_and_makes_the_plan_be_looked_at_again(pair, ddl, write):
    """Before anything of it is lost."""
    async with rig(pair.source, pair.target, rows=20, capture=TRIGGER) as r:
        await r.follower.start()
        await r.copy().run()
        execute(pair.source, f"ALTER TABLE app.item {ddl}")
        execute(pair.source, write)
        with pytest.raises(PlanOutdated):
            await r.follower.catch_up_once()


async def test_another_tenants_row_on_the_target_is_an_error_and_stays(pair):
    async with rig(pair.source, pair.target, rows=20, capture=TRIGGER) as r:
        await r.follower.start()
        await r.copy().run()
        execute(pair.target, "INSERT INTO app.item VALUES (%s, 777, 'theirs')", OTHER)
        execute(pair.source, "INSERT INTO app.item VALUES (%s, 777, 'ours')", TENANT)
        with pytest.raises(Exception, match="unique"):
            await r.follower.catch_up_once()
        assert execute(pair.target, "SELECT name FROM app.item WHERE id = 777") == [("theirs",)]


async def test_everything_of_the_capture_goes_with_the_guards_and_the_log_with_the_migration(pair):
    async def quiet(_: str) -> None:
        pass

    async with rig(pair.source, pair.target, rows=20, capture=TRIGGER) as r:
        functions = "SELECT proname FROM pg_proc WHERE pronamespace = 'mover'::regnamespace"
        assert any(name.startswith("capture_") for (name,) in execute(pair.source, functions))
        await r.fence.remove([], quiet)
        assert execute(pair.source, functions) == []
        assert entries(r) == 0
        await agent.forget(r.source, r.migration)
        assert execute(pair.source, "SELECT to_regclass(%s)", log_of(r)) == [(None,)]


async def test_an_application_without_rights_of_ours_is_written_down_and_its_settings_do_not_matter(pair):
    """Nor do they change what is written."""
    async with rig(pair.source, pair.target, rows=20, capture=TRIGGER) as r:
        with psycopg.connect(pair.source) as conn:
            role = f"app_{r.migration.hex[:8]}"
            conn.execute(f"CREATE ROLE {role}; GRANT USAGE ON SCHEMA app TO {role}")
            conn.execute(f"GRANT SELECT, UPDATE ON app.item TO {role}; SET LOCAL ROLE {role}")
            conn.execute("SET LOCAL search_path = app; SET LOCAL datestyle = 'German'")
            conn.execute("UPDATE item SET name = 'y' WHERE id = 5")
            conn.execute("RESET ROLE")
            assert conn.execute(f"SELECT value FROM {log_of(r)}").fetchall() == [(["5"],)]
            conn.rollback()


def test_a_long_table_name_makes_no_longer_a_function_name():
    made = Capturing("0123456789abcdef", None).function(TableRef("s" * 63, "t" * 63), "delete")
    assert len(made.as_string(None)) <= 63


class Unanswered:
    """A target that commits a transaction, and whose answer does not arrive."""

    def __init__(self, target) -> None:
        self._target = target

    def __getattr__(self, name):
        return getattr(self._target, name)

    @asynccontextmanager
    async def transaction(self):
        async with self._target.transaction() as transaction:
            yield transaction
        raise TimeoutError


async def test_a_step_whose_answer_was_lost_is_not_made_twice(pair):
    """Rows without a key would be there twice."""
    table = MovedTable(
        TableRef("app", "note"),
        TableRef("app", "note"),
        (Column("tenant_id", "uuid", "uuid", not_null=True), Column("note", "text", "text")),
        (),
        "tenant_id",
    )
    ddl = "CREATE SCHEMA app; CREATE TABLE app.note (tenant_id uuid NOT NULL, note text)"
    async with rig(pair.source, pair.target, subject=Subject((table,), ddl, ""), capture=TRIGGER) as r:
        await r.follower.start()
        await r.copy().run()
        execute(pair.source, "INSERT INTO app.note VALUES (%s, 'once')", TENANT)
        r.follower.target = Unanswered(r.writer)
        with pytest.raises(TimeoutError):
            await r.follower.catch_up_once()
        r.follower.target = r.writer
        await r.follower.catch_up_once()
        assert execute(pair.target, "SELECT note FROM app.note") == [("once",)]


FAMILY = """
CREATE SCHEMA app;
CREATE TABLE app.parent (tenant_id uuid NOT NULL, id int PRIMARY KEY, name text NOT NULL UNIQUE);
CREATE TABLE app.child (
    tenant_id uuid NOT NULL, id int PRIMARY KEY,
    parent int NOT NULL REFERENCES app.parent ON DELETE CASCADE ON UPDATE CASCADE,
    place int NOT NULL UNIQUE
);
CREATE TABLE app.toy (
    tenant_id uuid NOT NULL, id int PRIMARY KEY, child int NOT NULL REFERENCES app.child ON DELETE CASCADE
);
"""


MOVING = [
    *(  # the children of parent 1
        f"UPDATE app.child SET place = {new}, parent = 5 WHERE place = {old}"
        for old, new in ((27, 99), (18, 27), (9, 18))
    ),
    "DELETE FROM app.parent WHERE id = 1",
]


def family(name: str, *more: str) -> MovedTable:
    columns = {"tenant_id": "uuid", "id": "integer", **dict.fromkeys(more, "integer"), "name": "text"}
    if more:
        del columns["name"]
    table = TableRef("app", name)
    shown = tuple(Column(n, t, t, not_null=True) for n, t in columns.items())
    return MovedTable(table, table, shown, ("id",), "tenant_id")


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE app.parent SET id = 100 - id",
        "UPDATE app.parent SET id = id + 50",
        "WITH gone AS (DELETE FROM app.parent WHERE id = 1 RETURNING *)"
        " INSERT INTO app.parent SELECT tenant_id, 77, name || '' FROM gone",
        "UPDATE app.child SET parent = 3 - parent WHERE parent < 3",
        "UPDATE app.parent SET name = CASE id WHEN 1 THEN 'new' ELSE 'p' || id - 1 END",
        # Children move from a parent that goes, and their places along a chain; their toys do not change.
        "; ".join(MOVING),
        "; ".join(f"UPDATE app.parent SET name = 'p{n + 1}' WHERE id = {n}" for n in range(9, 0, -1)),
    ],
)
@pytest.mark.parametrize("fresh", [True, False], ids=["fresh target", "beside other tenants"])
async def test_where_foreign_keys_act_on_what_we_write_an_order_is_found(pair, statement, fresh):
    """A parent with a new number takes the unique name of the old one, with whom the children would go."""
    subject = Subject(
        (family("parent"), family("child", "parent", "place"), family("toy", "child")),
        FAMILY,
        "",
        careful=True,
    )
    async with rig(pair.source, pair.target, subject=subject, capture=TRIGGER) as r:
        for rows in (
            "parent SELECT %s, n, 'p' || n FROM generate_series(1, 9) n",
            "child SELECT %s, n, mod(n, 9) + 1, n FROM generate_series(1, 30) n",
            "toy SELECT %s, n, n FROM generate_series(1, 30) n",
        ):
            execute(pair.source, f"INSERT INTO app.{rows}", TENANT)
        await r.follower.start()
        await r.copy().run()
        r.writer._own_target = fresh  # which gets its foreign keys after the copy
        before = content_of_family(pair.target)
        execute(pair.source, statement)
        await r.follower.catch_up_once()
        assert content_of_family(pair.target) == content_of_family(pair.source) != before


@pytest.mark.parametrize("hangs", [False, True], ids=["nothing hangs on one", "rows hang on both"])
async def test_unique_values_that_rows_exchange_where_foreign_keys_act_are_never_lost(pair, hangs):
    subject = Subject((family("parent"), family("child", "parent", "place")), FAMILY, "", careful=True)
    async with rig(pair.source, pair.target, subject=subject, capture=TRIGGER) as r:
        execute(pair.source, "INSERT INTO app.parent VALUES (%s, 1, 'a'), (%s, 2, 'b')", TENANT, TENANT)
        for parent in (1, 2) if hangs else (1,):
            execute(pair.source, "INSERT INTO app.child VALUES (%s, %s, %s, %s)", TENANT, *[parent] * 3)
        await r.follower.start()
        await r.copy().run()
        before = content_of_family(pair.target)
        for id, name in ((1, "x"), (2, "a"), (1, "b")):
            execute(pair.source, "UPDATE app.parent SET name = %s WHERE id = %s", name, id)
        if hangs:
            with pytest.raises(ApplyConflict, match="fit in no order"):
                await r.follower.catch_up_once()
            assert content_of_family(pair.target) == before
        else:
            await r.follower.catch_up_once()
            assert content_of_family(pair.target) == content_of_family(pair.source) != before


def content_of_family(url: str) -> list:
    return [execute(url, f"SELECT * FROM app.{table} ORDER BY id") for table in ("parent", "child", "toy")]


async def test_a_publication_of_all_tables_keeps_nobody_from_forgetting(pair):
    execute(pair.source, "CREATE PUBLICATION everything FOR ALL TABLES")
    async with rig(pair.source, pair.target, rows=50, capture=TRIGGER) as r:
        await r.follower.start()
        await r.copy().run()
        execute(pair.source, "UPDATE app.item SET name = 'x' WHERE id = 1")
        await expect_equal(r)
        assert not await r.follower.log.forget(r.follower._durable)


async def test_how_large_the_log_is_can_be_seen(pair):
    async with rig(pair.source, pair.target, rows=2000, capture=TRIGGER) as r:
        async with r.source.borrow("test") as conn:
            empty = await log_bytes(conn, r.migration)
            execute(pair.source, "UPDATE app.item SET amount = 0 WHERE tenant_id = %s", TENANT)
            assert await log_bytes(conn, r.migration) > empty + 2000 * 60
            assert await log_bytes(conn, MigrationId(uuid4())) == 0


@pytest.mark.parametrize(
    ("careful", "count", "width"),
    [(False, 1500, 200), (True, 250, 1200)],
    ids=["by the replica role", "where foreign keys act"],
)
async def test_unique_values_may_change_hands_in_a_step_of_any_size(pair, careful, count, width, monkeypatch):
    """More than one piece, and more than the network holds: what is read is given up in the middle."""
    monkeypatch.setattr(change_log, "BATCH_ROWS", 100)
    subject = Subject((PLACED,), PLACES, "", careful=careful)
    async with rig(pair.source, pair.target, subject=subject, capture=TRIGGER) as r:
        fill = "INSERT INTO app.item SELECT %s, n, n, repeat(md5(n::text), %s) FROM generate_series(1, %s) n"
        execute(pair.source, fill, TENANT, width, count)
        await r.follower.start()
        await r.copy().run()
        with psycopg.connect(pair.source) as conn:
            conn.execute("UPDATE app.item SET place = -place")
            conn.execute("UPDATE app.item SET place = 1 + mod(-place, %s)", (count,))
        async with asyncio.timeout(30):
            await r.follower.catch_up_once()
        content = "SELECT * FROM app.item ORDER BY id"
        assert execute(pair.target, content) == execute(pair.source, content)


UNUSUALLY_EQUAL = [
    "INSERT INTO app.item VALUES (%(tenant)s, 'new', 'x')",
    "UPDATE app.item SET code = 'NEW' WHERE code = 'new'",
    "UPDATE app.item SET code = upper(code) WHERE code = 'old1'",
    "UPDATE app.item SET code = upper(code) WHERE code = 'old2'",
    "DELETE FROM app.item WHERE code = 'old2'",
]


async def test_a_key_in_two_spellings_that_are_the_same_is_one_row(pg15, make_database):
    """Of the servers at hand only one has a collation under which they are."""
    source, target = make_database(pg15), make_database(pg15)
    ddl = (
        "CREATE SCHEMA app; CREATE COLLATION app.ci (provider = icu, locale = 'und-u-ks-level2',"
        " deterministic = false); CREATE TABLE app.item (tenant_id uuid NOT NULL,"
        " code text COLLATE app.ci PRIMARY KEY, note text)"
    )
    columns = (
        Column("tenant_id", "uuid", "uuid", not_null=True),
        Column("code", "text", "text", not_null=True, collatable=True),
        Column("note", "text", "text"),
    )
    item = TableRef("app", "item")
    subject = Subject((MovedTable(item, item, columns, ("code",), "tenant_id"),), ddl, "")
    async with rig(source, target, subject=subject, capture=TRIGGER) as r:
        execute(source, "INSERT INTO app.item SELECT %s, 'old' || n FROM generate_series(1, 20) n", TENANT)
        await r.follower.start()
        await r.copy().run()
        for statement in UNUSUALLY_EQUAL:
            execute(source, statement.replace("%(tenant)s", f"'{TENANT}'"))
        await r.follower.catch_up_once()
        content = 'SELECT code, note FROM app.item ORDER BY code COLLATE "C"'
        assert execute(target, content) == execute(source, content)
        assert ("NEW", "x") in execute(source, content)
