"""Applying changes to a target: in sets or in source order, exactly, and to the tenant's rows only."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from uuid import uuid4

import pytest
import uvloop
from hypothesis import HealthCheck, given, settings

from mover.core.changes import (
    UNCHANGED,
    Change,
    Delete,
    Insert,
    Relation,
    RelationColumn,
    Row,
    Truncated,
    Update,
)
from mover.core.copying import CopiedRanges
from mover.core.errors import ApplyConflict, LeaseLost, MoverError, SchemaChanged, Unreachable
from mover.core.ids import Epoch, Lsn, MigrationId, TableRef
from mover.core.secret import Secret
from mover.core.tables import Column, MovedTable, Shape
from mover.postgres import agent, owner
from mover.postgres.connect import Database, Identity
from mover.postgres.writer import Writer
from tests.support.histories import histories
from tests.support.rig import OTHER, TENANT, execute

REF = TableRef("app", "item")
T, O = (str(tenant).encode() for tenant in (TENANT, OTHER))  # noqa: E741
EVERYTHING = CopiedRanges(((None, None),))
DDL = "CREATE SCHEMA app; CREATE TABLE app.item (tenant_id uuid NOT NULL, id {}, big text, note text {})"
WAYS = pytest.mark.parametrize("way", ["as sets", "in order"])


@pytest.fixture
def url(make_database, pg16) -> str:
    return make_database(pg16)


@pytest.fixture(autouse=True)
def way_of_applying(request, monkeypatch) -> None:
    """How many changes are a small batch decides the way."""
    way = request.node.callspec.params.get("way") if hasattr(request.node, "callspec") else None
    if way is not None:
        monkeypatch.setattr("mover.postgres.apply.SMALL_BATCH", 0 if way == "as sets" else 1_000_000)


def table(*columns: Column, key: tuple[str, ...] = ("id",)) -> MovedTable:
    tenant = Column("tenant_id", "uuid", "uuid", not_null=True)
    return MovedTable(REF, REF, (tenant, *columns), key, "tenant_id")


ITEM = table(
    Column("id", "text", "text", not_null=True, collatable=True),
    Column("big", "text", "text", collatable=True),
    Column("note", "text", "text", collatable=True),
)


def relation(*names: str, key: Sequence[str] = ("id",), oid: int = 1, type_oid: int = 25) -> Relation:
    columns = (RelationColumn(n, n in ("tenant_id", *key), type_oid, -1) for n in names)
    return Relation(oid, REF, "i", tuple(columns))


ROW = relation("tenant_id", "id", "big", "note")


def insert(*values: object, tenant: bytes = T) -> Insert:
    return Insert(ROW, [tenant, *map(value, values)])


def update(*values: object, old: object = None) -> Update:
    return Update(ROW, None if old is None else [T, value(old), None, None], [T, *map(value, values)])


def delete(id: object, tenant: bytes = T) -> Delete:
    return Delete(ROW, [tenant, value(id), None, None])


def value(given: object) -> object:
    return given if given is None or given is UNCHANGED else str(given).encode()


@asynccontextmanager
async def writing(
    url: str, subject: MovedTable = ITEM, ddl: str = DDL.format("text PRIMARY KEY", "")
) -> AsyncIterator[Writer]:
    execute(url, ddl)
    identity = Identity(MigrationId(uuid4()), Epoch(1))
    database = Database(Secret(url), "target", identity)
    await agent.install(database, identity)
    async with Writer.open(database, Shape({}, (subject,), fresh=False), TENANT, identity) as opened:
        opened.set_copied({REF: EVERYTHING})
        yield opened


async def apply(to: Writer, *changes: Change) -> None:
    async with to.transaction() as transaction:
        await transaction.apply(changes)


def content(url: str) -> list:
    return execute(url, 'SELECT tenant_id::text, id, big, note FROM app.item ORDER BY id::text COLLATE "C"')


def ours(*rows: tuple) -> list:
    return [(T.decode(), *row) for row in rows]


@pytest.mark.parametrize("small_batch", [0, 1_000_000])
@given(history=histories(truncating=True))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_both_ways_do_what_the_changes_say(small_batch, history, shared_url, monkeypatch):
    monkeypatch.setattr("mover.postgres.apply.SMALL_BATCH", small_batch)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(replay(shared_url, history))
    rows = [(key, *row[1:]) for key, row in sorted(history.after.items())]
    assert content(shared_url) == ours(*(tuple(v and v.decode() for v in row) for row in rows))


@pytest.fixture(scope="module")
def shared_url(pg18) -> str:
    url = pg18.create_database(f"test_{uuid4().hex[:12]}")
    yield url
    pg18.drop_database(url.rpartition("/")[2])


async def replay(url: str, history) -> None:
    execute(url, "DROP SCHEMA IF EXISTS app CASCADE")
    async with writing(url) as to:
        await apply(to, *(Insert(ROW, [T, *row]) for row in history.before.values()))
        await apply(to, *map(with_tenant, history.changes))


def with_tenant(change: Change) -> Change:
    def whole(row: Row | None) -> Row | None:
        return row if row is None else [T, *row]

    match change:
        case Insert(_, new):
            return Insert(ROW, whole(new))
        case Update(_, old, new):
            return Update(ROW, whole(old), whole(new))
        case Delete(_, old):
            return Delete(ROW, whole(old))
        case Truncated():
            return change


@WAYS
async def test_unique_values_may_change_hands_within_a_batch(url, way):
    """As sets they collide for a moment; then the batch is replayed in source order."""
    async with writing(url, ddl=DDL.format("text PRIMARY KEY", "UNIQUE")) as to:
        await apply(to, insert(1, "a", "one"), insert(2, "b", "two"))
        await apply(
            to,
            update(1, UNCHANGED, "for a moment"),
            update(2, UNCHANGED, "one"),
            update(1, UNCHANGED, "two"),
            insert(3, "c", "three"),
        )
    assert content(url) == ours(("1", "a", "two"), ("2", "b", "one"), ("3", "c", "three"))


@WAYS
async def test_keys_may_change_hands_within_a_batch(url, way):
    async with writing(url) as to:
        await apply(to, insert(1, "a", "one"), insert(2, "b", "two"))
        await apply(
            to,
            update("x", UNCHANGED, "one", old=1),
            update(1, UNCHANGED, "two", old=2),
            update(2, UNCHANGED, "one", old="x"),
        )
    assert content(url) == ours(("1", "b", "two"), ("2", "a", "one"))


@WAYS
@pytest.mark.parametrize("change", [update(9, "x", "y"), delete(9), update(8, "x", "y", old=9)])
async def test_a_change_that_finds_no_row_is_a_conflict_and_changes_nothing(url, way, change):
    async with writing(url) as to:
        await apply(to, insert(1, "a", "one"))
        with pytest.raises(ApplyConflict):
            await apply(to, update(1, "b", "changed"), insert(2, "c", "two"), change)
    assert content(url) == ours(("1", "a", "one"))


@WAYS
@pytest.mark.parametrize(
    "change",
    [insert(1, "x", "y"), update(1, "x", "y"), delete(1), update(1, "x", "y", old=2)],
    ids=["insert", "update", "delete", "change of key"],
)
async def test_another_tenants_row_with_the_same_key_is_never_touched(url, way, change):
    async with writing(url) as to:
        await apply(to, insert(2, "a", "two"))
        execute(url, "INSERT INTO app.item VALUES (%s, '1', 'theirs', 'untouched')", OTHER)
        before = content(url)
        with pytest.raises(ApplyConflict):
            await apply(to, update(2, "b", "changed"), change)
    assert content(url) == before


@WAYS
@pytest.mark.parametrize("change", [insert(1, "x", "y", tenant=O), delete(1, tenant=O)])
async def test_a_row_of_another_tenant_in_the_stream_is_a_conflict(url, way, change):
    async with writing(url) as to:
        with pytest.raises(ApplyConflict, match="not the tenant's"):
            await apply(to, insert(2, "a", "two"), change)
    assert content(url) == []


@WAYS
async def test_a_truncation_takes_the_tenants_rows_only(url, way):
    async with writing(url) as to:
        execute(url, "INSERT INTO app.item VALUES (%s, '0', 'theirs', 'untouched')", OTHER)
        await apply(to, insert(1, "a", "one"))
        await apply(
            to, insert(2, "b", "two"), Truncated(REF), Truncated(TableRef("app", "x")), insert(3, "c", None)
        )
    assert content(url) == [(O.decode(), "0", "theirs", "untouched"), *ours(("3", "c", None))]


async def test_changes_of_a_table_that_is_not_here_yet_are_left_out(url):
    async with writing(url) as to:
        to.set_copied({})
        await apply(to, insert(1, "a", "one"), update(9, "x", "y"), Truncated(REF))
    assert content(url) == []


@pytest.mark.parametrize(
    "changed",
    [
        relation("tenant_id", "big", "note"),
        relation("tenant_id", "id", "big", "note", "added"),
        relation("tenant_id", "id", "big", "renamed"),
        relation("tenant_id", "id", "big", "note", type_oid=23),
    ],
    ids=["dropped", "added", "renamed", "retyped"],
)
async def test_other_columns_than_planned_are_told(url, changed):
    async with writing(url) as to:
        await apply(to, insert(1, "a", "one"))
        with pytest.raises(SchemaChanged):
            await apply(to, insert(2, "b", "two"), Insert(changed, [T, *[b"3"] * (len(changed.columns) - 1)]))
    assert content(url) == ours(("1", "a", "one"))


@WAYS
async def test_what_was_written_before_a_followed_column_came_leaves_it_null(url, way):
    """Also beside what was written after it, in one batch; an update leaves the column as it is."""
    before = relation("tenant_id", "id", "big")
    async with writing(url) as to:
        await apply(to, Insert(before, [T, b"1", b"b"]))
        await apply(
            to,
            Insert(before, [T, b"2", b"b"]),
            insert(3, "c", "new"),
            Update(before, None, [T, b"3", b"d"]),
        )
    assert content(url) == ours(("1", "b", None), ("2", "b", None), ("3", "d", "new"))


async def test_a_description_sent_again_is_no_change(url):
    async with writing(url) as to:
        await apply(to, insert(1, "a", "one"))
        again = relation("tenant_id", "id", "big", "note")
        assert again is not ROW
        await apply(to, Insert(again, [T, b"2", b"b", b"two"]))
    assert content(url) == ours(("1", "a", "one"), ("2", "b", "two"))


async def test_a_zombie_commits_nothing(url):
    async with writing(url) as to:
        await apply(to, insert(1, "a", "one"))
        execute(url, "UPDATE mover.owner SET epoch = epoch + 1")
        with pytest.raises(LeaseLost):
            await apply(to, insert(2, "b", "two"))
    assert content(url) == ours(("1", "a", "one"))


async def test_a_new_owner_ends_a_transaction_in_flight(url):
    async with writing(url) as to:
        newer = Identity(to._identity.migration, Epoch(2))
        with pytest.raises(Unreachable):
            async with to.transaction() as transaction:
                await transaction.apply([insert(2, "b", "two")])
                await owner.take(Database(Secret(url), "target", newer), newer)
        with pytest.raises(MoverError):
            await apply(to, insert(3, "c", "three"))
    assert content(url) == []


ALWAYS = table(
    Column("id", "bigint", "bigint", not_null=True, identity_always=True),
    Column("big", "text", "text"),
    Column("note", "text", "text"),
)


@WAYS
async def test_a_key_that_is_always_generated_takes_the_sources_values(url, way):
    ddl = DDL.format("bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY", "")
    async with writing(url, ALWAYS, ddl) as to:
        await apply(to, insert(41, "a", "one"), insert(42, "b", "two"), insert(43, "c", "three"))
        await apply(to, update(41, UNCHANGED, "changed"), delete(43))
        await apply(to, update(50, "b", "moved", old=42))
    assert content(url) == ours((41, "a", "changed"), (50, "b", "moved"))


@WAYS
async def test_an_always_generated_column_beside_the_key_takes_the_sources_values(url, way):
    """`SET n = DEFAULT` changes it, which no UPDATE of ours can follow; what was not sent stays."""
    subject = table(
        Column("id", "text", "text", not_null=True, collatable=True),
        Column("n", "integer", "integer", not_null=True, identity_always=True),
        Column("big", "text", "text"),
        Column("note", "text", "text"),
    )
    ddl = (
        "CREATE SCHEMA app; CREATE TABLE app.item (tenant_id uuid NOT NULL, id text PRIMARY KEY,"
        " n integer GENERATED ALWAYS AS IDENTITY UNIQUE, big text, note text)"
    )
    described = relation("tenant_id", "id", "n", "big", "note")
    async with writing(url, subject, ddl) as to:
        for key in (b"1", b"2", b"3"):
            await apply(to, Insert(described, [T, key, b"1" + key, b"big", b"one"]))
        await apply(to, Update(described, None, [T, b"1", b"11", UNCHANGED, b"same"]))
        await apply(to, Update(described, None, [T, b"2", b"22", UNCHANGED, None]))
        await apply(to, Update(described, [T, b"3", *[None] * 3], [T, b"4", b"33", UNCHANGED, b"moved"]))
        with pytest.raises(ApplyConflict):
            await apply(to, Update(described, None, [T, b"5", b"55", b"x", b"not there"]))
    rows = [("1", 11, "big", "same"), ("2", 22, "big", None), ("4", 33, "big", "moved")]
    assert execute(url, "SELECT id, n, big, note FROM app.item ORDER BY id") == rows


@WAYS
async def test_generated_columns_are_left_to_the_target(url, way):
    subject = table(
        Column("id", "text", "text", not_null=True, collatable=True),
        Column("twice", "text", "text", generated=True),
        Column("big", "text", "text"),
        Column("note", "text", "text"),
    )
    ddl = (
        "CREATE SCHEMA app; CREATE TABLE app.item (tenant_id uuid NOT NULL, id text PRIMARY KEY,"
        " twice text GENERATED ALWAYS AS (note || note) STORED, big text, note text)"
    )
    async with writing(url, subject, ddl) as to:
        await apply(to, insert(1, "a", "x"), insert(2, "b", "y"))
        await apply(to, update(2, UNCHANGED, "z"))
    assert execute(url, "SELECT id, twice FROM app.item ORDER BY id") == [("1", "xx"), ("2", "zz")]


@WAYS
async def test_names_need_no_manners_and_columns_no_order(url, way):
    subject = table(
        Column("ID %s", "integer", "integer", not_null=True),
        Column('quo"te$1', "text", "text"),
        Column("größe", "integer", "integer", not_null=True),
        key=("größe", "ID %s"),
    )
    ddl = """CREATE SCHEMA app; CREATE TABLE app.item ("größe" integer NOT NULL, tenant_id uuid NOT NULL,
             "quo""te$1" text, "ID %s" integer NOT NULL, PRIMARY KEY ("größe", "ID %s"))"""
    described = relation("tenant_id", "größe", 'quo"te$1', "ID %s", key=("größe", "ID %s"))
    async with writing(url, subject, ddl) as to:
        await apply(to, *(Insert(described, [T, b"1", b"%s", b"%d" % n]) for n in range(3)))
        await apply(to, Update(described, None, [T, b"1", b"changed", b"0"]))
        await apply(to, Update(described, [T, b"1", None, b"1"], [T, b"2", UNCHANGED, b"1"]))
        await apply(to, Delete(described, [T, b"1", None, b"2"]))
    assert execute(url, "SELECT * FROM app.item ORDER BY 1") == [
        (1, TENANT, "changed", 0),
        (2, TENANT, "%s", 1),
    ]


@WAYS
async def test_changed_keys_are_remembered_from_when_it_is_asked_for(url, way, monkeypatch):
    async with writing(url) as to:
        await apply(to, insert(1, "a", "one"))
        assert to.dirty() is None
        to.collect_dirty()
        await apply(to, update("2", UNCHANGED, "moved", old=1), insert(3, "c", "three"))
        assert to.dirty() == {REF: {("1",), ("2",), ("3",)}}
        to.collect_dirty()
        assert to.dirty() == {}
        await apply(to, Truncated(REF))
        assert to.dirty() is None
        to.collect_dirty()
        monkeypatch.setattr("mover.postgres.moved.MAX_DIRTY_KEYS", 2)
        await apply(to, *(insert(n, "x", None) for n in range(10, 13)))
        assert to.dirty() is None


async def test_keys_that_are_arrays_are_looked_for_in_the_copied_ranges(url):
    subject = table(
        Column("id", "integer[]", "integer[]", not_null=True), Column("note", "text", "text", collatable=True)
    )
    ddl = (
        "CREATE SCHEMA app; CREATE TABLE app.item (tenant_id uuid NOT NULL, id int[] PRIMARY KEY, note text)"
    )
    described = relation("tenant_id", "id", "note")
    async with writing(url, subject, ddl) as to:
        to.set_copied({REF: CopiedRanges(((None, ("{2}",)),))})
        rows = ((b"{1,2}", b"there"), (b"{3}", b"not yet"), (b"{{1,2},{3,4}}", b"there"))
        await apply(to, *(Insert(described, [T, key, note]) for key, note in rows))
    assert execute(url, "SELECT id, note FROM app.item ORDER BY id") == [
        ([1, 2], "there"),
        ([[1, 2], [3, 4]], "there"),
    ]


async def test_progress_is_part_of_the_transaction_and_never_goes_back(url):
    async with writing(url) as to:
        assert await to.progress() == (Lsn(0), None)
        async with to.transaction() as transaction:
            await transaction.advance(Lsn(100), None)
        async with to.transaction() as transaction:
            await transaction.advance(Lsn(50), None)
        assert await to.progress() == (Lsn(100), None)
        with pytest.raises(ApplyConflict):
            async with to.transaction() as transaction:
                await transaction.advance(Lsn(200), None)
                await transaction.apply([delete(1)])
        assert await to.progress() == (Lsn(100), None)


async def test_large_rows_in_source_order_go_out_in_small_turns(url, monkeypatch):
    monkeypatch.setattr("mover.postgres.apply.SMALL_BATCH", 1_000_000)
    async with writing(url) as to:
        await apply(to, *(insert(n, "x" * 400_000, n) for n in range(20)))
    assert execute(url, "SELECT count(*), sum(length(big)) FROM app.item") == [(20, 8_000_000)]
