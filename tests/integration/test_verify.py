"""Both sides are read as they are: every kind of damage is found, and nothing else is."""

from contextlib import asynccontextmanager
from dataclasses import replace
from uuid import UUID

import psycopg
import pytest

from mover.core.errors import PlanOutdated, Unreachable
from mover.core.ids import Side, TableRef
from mover.core.secret import Secret
from mover.core.tables import Column, MovedTable
from mover.postgres.connect import Database
from mover.postgres.digest_queries import DigestQueries
from mover.postgres.digests import open_readers, verify_databases
from tests.conftest import Pair
from tests.support.comparing import verifying
from tests.support.rig import execute, rig
from verify.compare import compare, compare_keys
from verify.leaves import WHOLE, KeySet

TENANT = UUID("11111111-1111-1111-1111-111111111111")
OTHER = UUID("22222222-2222-2222-2222-222222222222")
ROWS = 60
ROWS_PER_LEAF = 7
TYPES = {
    "id": "bigint",
    "tenant_id": "uuid",
    "note": "text",
    "amount": "numeric",
    "at": "timestamp with time zone",
    "body": "jsonb",
    "tags": "text[]",
    "raw": "bytea",
    "ratio": "double precision",
}


def moved(name, types, key):
    columns = tuple(
        Column(name, kind, kind, collatable=kind.startswith(("text", "char", "app.")))
        for name, kind in types.items()
    )
    return MovedTable(TableRef("core_app", name), TableRef("new_app", name), columns, key, "tenant_id")


TABLE = moved("docs", TYPES, ("id",))


def database(url, label):
    return Database(Secret(url), label)


def run(url, *statements):
    with psycopg.connect(url, autocommit=True) as conn:
        for statement in statements:
            conn.execute(statement)


def create(url, side, table, primary_key=None):
    name = table.source if side is Side.SOURCE else table.target
    columns = ", ".join(f'"{c.name}" {c.source_type}' for c in table.columns)
    key = ", ".join(f'"{name}"' for name in primary_key or table.key)
    run(
        url,
        f"create schema if not exists {name.schema}",
        f"create table {name} ({columns}, primary key ({key}))",
    )


def fill(url, name, tenant=TENANT, numbers=range(1, ROWS + 1)):
    with psycopg.connect(url, autocommit=True) as conn:
        conn.execute(
            f"""insert into {name}
                select n, %s, 'note ' || n, n * 1.5,
                       timestamptz '2026-01-01 00:00+00' + n * interval '1 hour',
                       jsonb_build_object('n', n), array['a', null, 'b,' || n], decode('00ff', 'hex'), n / 3.0
                  from unnest(%s::bigint[]) as n""",
            (tenant, list(numbers)),
        )


@pytest.fixture
def sides(pair):
    """The same 60 rows on both sides, and rows of another tenant that are on the source only."""
    for url, side, name in (
        (pair.source, Side.SOURCE, TABLE.source),
        (pair.target, Side.TARGET, TABLE.target),
    ):
        create(url, side, TABLE)
        fill(url, name)
    fill(pair.source, TABLE.source, OTHER, range(1000, 1020))
    return pair


@asynccontextmanager
async def snapshots(pair, tenant=TENANT, workers=2):
    async with (
        open_readers(database(pair.source, "source"), Side.SOURCE, workers) as ours,
        open_readers(database(pair.target, "target"), Side.TARGET, workers) as theirs,
        ours.at_snapshot(tenant) as source,
        theirs.at_snapshot(tenant) as target,
    ):
        yield source, target


async def verdict_of(pair, *tables, rows_per_leaf=ROWS_PER_LEAF):
    async with snapshots(pair) as (source, target):
        return await compare(tables or (TABLE,), source, target, rows_per_leaf=rows_per_leaf)


def named(mismatch):
    return {kind: [",".join(key) for key in keys.examples] for kind, keys in mismatch.keys.by_kind().items()}


async def test_equal_sides_have_equal_roots_and_counts(sides):
    verdict = await verdict_of(sides)
    assert verdict.equal
    assert (verdict.source_rows, verdict.target_rows) == (ROWS, ROWS)
    assert verdict.source_root == verdict.target_root
    assert verdict.mismatches == ()


async def test_a_whole_comparison_needs_only_the_two_databases(sides):
    source, target = database(sides.source, "source"), database(sides.target, "target")
    assert (await verify_databases(source, target, [TABLE], TENANT)).equal
    run(sides.target, "delete from new_app.docs where id = 5")
    (mismatch,) = (await verify_databases(source, target, [TABLE], TENANT)).mismatches
    assert str(mismatch) == "core_app.docs: 1 missing"


NOTHING = {"missing": [], "extra": [], "different": []}
INSERT = "insert into new_app.docs (id, tenant_id) values ({}, '{}')"
DAMAGE = {
    "row missing": ("delete from new_app.docs where id = 30", {"missing": ["30"]}, ()),
    "first row missing": ("delete from new_app.docs where id = 1", {"missing": ["1"]}, ()),
    "last row missing": (f"delete from new_app.docs where id = {ROWS}", {"missing": [str(ROWS)]}, ()),
    "row extra below the smallest": (INSERT.format(-5, TENANT), {"extra": ["-5"]}, ()),
    "row extra past the largest": (INSERT.format(5000, TENANT), {"extra": ["5000"]}, ()),
    "one byte": ("update new_app.docs set note = 'nope 7' where id = 7", {"different": ["7"]}, ("note",)),
    "case": ("update new_app.docs set note = upper(note) where id = 7", {"different": ["7"]}, ("note",)),
    "NULL for empty": ("update new_app.docs set note = null where id = 8", {"different": ["8"]}, ("note",)),
    "values swapped between rows": (
        "update new_app.docs set note = 'note ' || 21 - id where id in (10, 11)",
        {"different": ["10", "11"]},
        ("note",),
    ),
    "values swapped between columns": (
        "update new_app.docs set note = amount::text, amount = 9 where id = 9",
        {"different": ["9"]},
        ("note", "amount"),
    ),
    "keys swapped": (
        "update new_app.docs set id = -1 where id = 10; update new_app.docs set id = 10 where id = 11",
        {"missing": ["11"], "extra": ["-1"], "different": ["10"]},
        ("note", "amount", "at", "body", "tags", "ratio"),
    ),
    "numeric scale": (
        "update new_app.docs set amount = amount * 1.0 where id = 3",
        {"different": ["3"]},
        ("amount",),
    ),
    "a microsecond": (
        "update new_app.docs set at = at + interval '1 microsecond' where id = 4",
        {"different": ["4"]},
        ("at",),
    ),
    "the last digit of a float": (
        "update new_app.docs set ratio = ratio + 1e-15 where id = 2",
        {"different": ["2"]},
        ("ratio",),
    ),
    "NULL element": (
        "update new_app.docs set tags[2] = 'NULL' where id = 5",
        {"different": ["5"]},
        ("tags",),
    ),
    "bytes": (r"update new_app.docs set raw = '\x00fe' where id = 6", {"different": ["6"]}, ("raw",)),
    "row given to another tenant": (
        f"update new_app.docs set tenant_id = '{OTHER}' where id = 12",
        {"missing": ["12"]},
        (),
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
async def test_damage_is_found_by_ranges_and_by_keys(sides, damage):
    statement, expected, columns = DAMAGE[damage]
    if damage == "NULL for empty":
        run(sides.source, "update core_app.docs set note = '' where id = 8")
    run(sides.target, statement)
    touched = [(key,) for keys in expected.values() for key in keys]
    untouched = [("40",), ("41",), ("777777",)]
    async with snapshots(sides) as (source, target):
        whole = await compare([TABLE], source, target, rows_per_leaf=ROWS_PER_LEAF)
        some = await compare_keys({TABLE: [*untouched, *touched, *touched]}, source, target)
        others = await compare_keys({TABLE: untouched}, source, target)
    for verdict in (whole, some):
        assert not verdict.equal
        (mismatch,) = verdict.mismatches
        assert named(mismatch) == NOTHING | expected
        assert mismatch.columns == columns
    assert others.equal
    assert (others.source_rows, others.target_rows) == (2, 2)


async def test_other_tenants_rows_do_not_matter(sides):
    fill(sides.target, TABLE.target, OTHER, range(-100, -50))
    run(
        sides.target,
        f"update core_app.docs set note = 'x' where tenant_id = '{OTHER}'".replace("core", "new"),
    )
    assert (await verdict_of(sides)).equal


async def test_settings_of_a_database_do_not_change_the_text(sides):
    name = sides.target.rpartition("/")[2]
    run(
        sides.target,
        f"alter database {name} set timezone = 'Asia/Tokyo'",
        f"alter database {name} set datestyle = 'German'",
        f"alter database {name} set extra_float_digits = 0",
        f"alter database {name} set bytea_output = 'escape'",
    )
    assert (await verdict_of(sides)).equal


async def test_physical_order_does_not_matter(sides):
    run(sides.target, "update new_app.docs set note = note where id % 2 = 0")
    assert (await verdict_of(sides)).equal


async def test_generated_columns_are_left_out_and_order_is_by_name(sides):
    generated = Column("twice", "bigint", "bigint", generated=True)
    run(sides.source, "alter table core_app.docs add twice bigint generated always as (id * 2) stored")
    run(
        sides.target,
        "alter table new_app.docs drop note",
        "alter table new_app.docs add note text",
        "update new_app.docs set note = 'note ' || id",
    )
    assert (await verdict_of(sides, replace(TABLE, columns=(generated, *TABLE.columns)))).equal


async def test_nothing_equals_nothing_and_one_row_does_not(pair):
    create(pair.source, Side.SOURCE, TABLE)
    create(pair.target, Side.TARGET, TABLE)
    verdict = await verdict_of(pair)
    assert verdict.equal
    assert verdict.source_rows == 0
    fill(pair.target, TABLE.target, numbers=[1])
    verdict = await verdict_of(pair)
    assert named(verdict.mismatches[0]) == NOTHING | {"extra": ["1"]}


async def test_a_big_row_differs_in_its_last_byte(sides):
    big = "update {}.docs set note = repeat('0123456789', 2000000) || '{}' where id = 33"
    run(sides.source, big.format("core_app", "a"))
    run(sides.target, big.format("new_app", "a"))
    assert (await verdict_of(sides)).equal
    run(sides.target, big.format("new_app", "b"))
    verdict = await verdict_of(sides)
    assert named(verdict.mismatches[0]) == NOTHING | {"different": ["33"]}


async def test_a_flood_of_extra_rows_is_counted(sides):
    fill(sides.target, TABLE.target, numbers=range(1000, 2000))
    (mismatch,) = (await verdict_of(sides)).mismatches
    assert mismatch.keys.extra.count == 1000
    assert len(mismatch.keys.extra.examples) == 100


AWKWARD = [
    "",
    " ",
    "'",
    "\\",
    'a"b',
    "a\nb",
    "a\tb",
    "a,b",
    "{a}",
    "$1",
    "%s",
    "é",
    "Z",
    "a",
    "A",
    "_a",
    "😀",
    "\x01",
]
KEY_TYPES = {
    "text": AWKWARD,
    'text collate "C"': AWKWARD,
    "character varying(10)": AWKWARD,
    "character(4)": ["a", "B", "b c", "é", "zzzz"],
    "app.code": AWKWARD,  # a domain over text
    "uuid": ["00000000-0000-0000-0000-000000000001", "ffffffff-0000-0000-0000-000000000000"],
    "integer": ["-5", "0", "10", "9"],
    "numeric": ["-1.5", "0", "10.25", "9", "NaN"],
    "date": ["0044-03-15 BC", "1999-12-31", "2026-01-01", "infinity"],
    "timestamp with time zone": ["2026-01-01 00:00:00+00", "2026-06-01 00:00:00.000001+00"],
    "interval": ["1 mon", "29 days", "-00:00:01"],
    "boolean": ["true", "false"],
    "app.mood": ["sad", "ok", "happy"],  # an enum whose order is not the alphabet's
    "bytea": [r"\x00", r"\xff", r"\x5c"],
}


@pytest.mark.parametrize("kind", KEY_TYPES)
async def test_every_key_is_in_one_leaf_and_can_be_asked_for(pair, kind):
    values = KEY_TYPES[kind]
    table = moved("keyed", {"id": kind.partition(" collate")[0], "tenant_id": "uuid", "v": "text"}, ("id",))
    declared = replace(table, columns=(Column("id", kind, kind), *table.columns[1:]))
    for url, side, name in (
        (pair.source, Side.SOURCE, table.source),
        (pair.target, Side.TARGET, table.target),
    ):
        run(
            url,
            "create schema app",
            "create domain app.code as text",
            "create type app.mood as enum ('sad', 'ok', 'happy')",
        )
        create(url, side, declared)
        with psycopg.connect(url, autocommit=True) as conn:
            for value in values if side is Side.SOURCE else reversed(values):
                conn.execute(f"insert into {name} values (%s, %s, 'v')", (value, TENANT))
    verdict = await verdict_of(pair, table, rows_per_leaf=1)
    assert verdict.equal
    async with snapshots(pair) as (source, target):
        boundaries = await source.boundaries(table, WHOLE, 1)
        ranges = [await target.digest(table, part) for part in WHOLE.cut(boundaries)]
        assert [leaf.rows for leaf in ranges] == [1] * len(values) + [0]
        asked = await compare_keys({table: boundaries}, source, target)
    assert asked.equal
    assert asked.source_rows == len(values)
    run(pair.target, f"update {table.target} set v = 'w'")
    verdict = await verdict_of(pair, table, rows_per_leaf=1)
    assert sorted(verdict.mismatches[0].keys.different.examples) == sorted(boundaries)


@pytest.mark.parametrize(
    "key",
    [("tenant_id", "a", "b"), ("a", "b"), ("b", "a"), ("b", "tenant_id", "a"), ("tenant_id", "b", "a")],
    ids=str,
)
async def test_composite_keys(pair, key):
    table = moved("pairs", {"tenant_id": "uuid", "a": "integer", "b": "text", "v": "text"}, key)
    for url, side, name in (
        (pair.source, Side.SOURCE, table.source),
        (pair.target, Side.TARGET, table.target),
    ):
        create(url, side, table)
        run(
            url,
            f"""insert into {name} select '{TENANT}', a, chr(64 + b), 'v'
                  from generate_series(1, 9) a, generate_series(1, 5) b""",
        )
    assert (await verdict_of(pair, table, rows_per_leaf=4)).equal
    run(
        pair.target,
        f"update {table.target} set v = 'w' where a = 4 and b = 'C'",
        f"delete from {table.target} where a = 9 and b = 'E'",
    )
    (mismatch,) = (await verdict_of(pair, table, rows_per_leaf=4)).mismatches
    values = {"tenant_id": str(TENANT), "a": "4", "b": "C"}
    assert mismatch.keys.different.examples == [tuple(values[name] for name in key)]
    assert mismatch.keys.missing.count == 1


async def test_a_key_that_is_the_tenant_alone(pair):
    table = moved("settings", {"tenant_id": "uuid", "v": "text"}, ("tenant_id",))
    for url, side, name in (
        (pair.source, Side.SOURCE, table.source),
        (pair.target, Side.TARGET, table.target),
    ):
        create(url, side, table)
        run(url, f"insert into {name} values ('{TENANT}', 'v'), ('{OTHER}', '{side}')")
    verdict = await verdict_of(pair, table, rows_per_leaf=1)
    assert verdict.equal
    assert verdict.source_rows == 1
    run(pair.target, f"update {table.target} set v = 'w'")
    assert named((await verdict_of(pair, table)).mismatches[0]) == NOTHING | {"different": [str(TENANT)]}


async def test_servers_that_sort_texts_differently_agree(pg15, pg18, make_database):
    """The source's collation puts a, B, c before the target's B, a, c."""
    table = moved("words", {"id": "text", "tenant_id": "uuid", "v": "text"}, ("id",))
    source, target = make_database(pg15), make_database(pg18)
    run(source, "create collation public.english (provider = icu, locale = 'en-US')")
    for url, side, name, collation in (
        (source, Side.SOURCE, table.source, "public.english"),
        (target, Side.TARGET, table.target, '"C"'),
    ):
        create(
            url,
            side,
            replace(table, columns=(Column("id", f"text collate {collation}", ""), *table.columns[1:])),
        )
        run(
            url,
            f"""insert into {name} select p || s || n, '{TENANT}', 'v'
                  from unnest('{{a,B,c,D,ä,_,-}}'::text[]) p, unnest('{{"",-,x,Y}}'::text[]) s,
                       generate_series(1, 4) n""",
        )

    sides = Pair(source, target, pg15, pg18)
    async with snapshots(sides) as (ours, theirs):
        assert not await ours.seekable(table)
        assert await theirs.seekable(table)
        boundaries = await ours.boundaries(table, WHOLE, 10)
        assert boundaries == sorted(boundaries)
        for part in WHOLE.cut(boundaries):
            assert await ours.digest(table, part) == await theirs.digest(table, part)
    assert (await verdict_of(sides, table)).equal
    run(target, f"delete from {table.target} where id = 'B-2'")
    assert named((await verdict_of(sides, table, rows_per_leaf=5)).mismatches[0]) == NOTHING | {
        "missing": ["B-2"]
    }


async def test_a_range_is_found_by_an_index_whatever_the_statistics_say(sides):
    """One leaf of many must not scan the table, even where the planner believes it is tiny."""
    run(sides.source, "analyze core_app.docs")
    async with snapshots(sides, workers=1) as (source, _):
        part = WHOLE.cut(await source.boundaries(TABLE, WHOLE, 30))[0]
        await source.digest(TABLE, part)
        async with source._session() as session:
            queries = DigestQueries(TABLE, Side.SOURCE, TENANT, frozenset())
            of_a_leaf = await session.connection.fetch("explain " + queries.rows(part))
            assert "Index" in str(of_a_leaf)
        await source.digest(TABLE, WHOLE)
        async with source._session() as session:
            of_all = await session.connection.fetch("explain " + queries.rows(WHOLE))
            assert "Seq Scan" in str(of_all)


async def test_all_connections_read_one_moment(sides):
    async with snapshots(sides, workers=3) as (source, target):
        run(sides.source, "delete from core_app.docs")
        verdict = await compare([TABLE], source, target, rows_per_leaf=2)
    assert verdict.equal
    assert not (await verdict_of(sides)).equal


async def test_an_exported_snapshot_is_read(sides):
    with psycopg.connect(sides.source) as holder:
        holder.execute("set transaction isolation level repeatable read")
        (snapshot_id,) = holder.execute("select pg_export_snapshot()").fetchone()
        run(sides.source, "update core_app.docs set note = 'later'")
        async with (
            open_readers(database(sides.source, "source"), Side.SOURCE) as ours,
            open_readers(database(sides.target, "target"), Side.TARGET) as theirs,
            ours.at_snapshot(TENANT, snapshot_id) as source,
            theirs.at_snapshot(TENANT) as target,
        ):
            assert (await compare([TABLE], source, target)).equal


async def test_open_readers_see_the_next_moment_with_each_snapshot(sides):
    async with open_readers(database(sides.source, "source"), Side.SOURCE) as readers:
        async with readers.at_snapshot(TENANT) as before:
            rows_before = (await before.digest(TABLE, WHOLE)).rows
        run(sides.source, "delete from core_app.docs where id = 1")
        async with readers.at_snapshot(TENANT) as after:
            assert (await after.digest(TABLE, WHOLE)).rows == rows_before - 1


async def test_readers_write_nothing(sides):
    async with snapshots(sides, workers=1) as (source, _):
        async with source._session() as session:
            assert await session.connection.fetchval("show transaction_read_only") == "on"
            assert await session.connection.fetchval("show transaction_isolation") == "repeatable read"


async def test_a_broken_connection_is_an_error_that_may_pass(sides):
    with pytest.raises(Unreachable):
        async with snapshots(sides) as (source, target):
            run(
                sides.target,
                "select pg_terminate_backend(pid) from pg_stat_activity"
                " where application_name like '%/verify' and datname = current_database()",
            )
            await compare([TABLE], source, target)


async def test_thousands_of_keys_are_compared(sides):
    for url, name in ((sides.source, TABLE.source), (sides.target, TABLE.target)):
        fill(url, name, numbers=range(10_000, 16_000))
    run(sides.target, "update new_app.docs set amount = 0 where id = 15999")
    keys = [(str(number),) for number in range(10_000, 16_000)]
    async with snapshots(sides) as (source, target):
        verdict = await compare_keys({TABLE: keys}, source, target)
        assert (await source.digest(TABLE, KeySet(()))).rows == 0
    assert (verdict.source_rows, verdict.target_rows) == (6000, 6000)
    assert named(verdict.mismatches[0]) == NOTHING | {"different": ["15999"]}


async def test_rows_that_differ_since_a_table_was_emptied_are_no_damage(pair):
    """A truncation is seen by every snapshot: the stamp of the schemas tells of it."""
    mismatches: list[int] = []

    async def changed() -> None:
        raise PlanOutdated("a table was emptied")

    async with rig(pair.source, pair.target, rows=50) as r, r.following():
        await r.copy().run()
        async with verifying(r) as verification:
            await verification.one_pass()
            verification.check_schemas, verification.on_mismatch = changed, mismatches.append
            execute(pair.target, "DELETE FROM app.item WHERE id = 7")
            verification.passes = 0  # everything once more
            with pytest.raises(PlanOutdated):
                await verification.one_pass()
    assert mismatches == []
