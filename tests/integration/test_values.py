"""Every kind of value through copy, slot, decoder and writer, with PostgreSQL itself as the oracle."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from itertools import count, cycle, islice

import psycopg
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from mover.core.ids import Capture, TableRef
from mover.core.tables import Column, MovedTable
from mover.postgres.digests import verify_databases
from tests.conftest import Pair
from tests.support import values
from tests.support.rig import TENANT, Subject, execute, rig

ROWS = 12  # generated before, and while, the rows are followed
LARGE = 32 << 20  # bytes of one value

# Type -> literals that a text format could get wrong.
VALUES: dict[str, list[str]] = {
    "boolean": ["true", "false"],
    "smallint": ["-32768", "32767"],
    "integer": ["-2147483648", "0"],
    "bigint": ["-9223372036854775808", "9223372036854775807"],
    "real": ["'3.4028235e38'", "'1e-45'", "'NaN'", "'-Infinity'", "0.1"],
    "double precision": ["0.1::float8 + 0.2", "'1.7976931348623157e308'", "'5e-324'", "'-0'", "'Infinity'"],
    "numeric": [
        "'NaN'",
        "'Infinity'",
        "'-Infinity'",
        "1e-300",
        "123456789012345678901234567890.000",
        "-0.10",
    ],
    "numeric(10,2)": ["99999999.99", "-0.01"],
    "money": ["'-92233720368547758.08'", "'12.34'"],
    "text": [
        r"E'a\tb\nc\r\nd\\e\x01f'",
        "''",
        r"'\N'",
        r"'\.'",
        "'NULL'",
        "U&'\\+01F600 \\00DF'",
        "repeat('ab', 400)",
    ],
    "character varying(20)": ["'  blanks  '", r"E'\\\\'"],
    "character(5)": ["'ab'", "''"],
    '"char"': ["'x'", r"'\\'"],
    "name": ["'a name'"],
    "bytea": [r"'\x'", r"'\x00ff5c0a09'", "decode(repeat('ab', 3000), 'hex')"],
    "uuid": ["'00000000-0000-0000-0000-000000000000'"],
    "date": ["'infinity'", "'4713-01-01 BC'", "'5874897-12-31'", "'0044-03-15 BC'"],
    "time without time zone": ["'24:00:00'", "'23:59:59.999999'"],
    "time with time zone": ["'12:00:00.000001+15:59:59'"],
    "timestamp without time zone": [
        "'-infinity'",
        "'4714-11-24 00:00:00 BC'",
        "'294276-12-31 23:59:59.999999'",
    ],
    "timestamp with time zone": ["'infinity'", "'0001-01-01 00:00:00+00 BC'", "'2024-03-31 02:30:00+02'"],
    "interval": ["'-1 year 2 mons -3 days 04:05:06.000007'", "'178000000 years'", "'-00:00:00.000001'"],
    "json": [r"""'{"b": 1, "a": "\u00e9\n\\" , "a": null}'""", "'  [1,  2]  '"],
    "jsonb": [r"""'{"k": "tab\tnew\nline \"quoted\" \\ \u20ac"}'""", "'1e1000'", "'[]'"],
    "inet": ["'::ffff:1.2.3.4/96'", "'10.0.0.1'"],
    "cidr": ["'10.0.0.0/8'"],
    "macaddr": ["'08:00:2b:01:02:03'"],
    "bit(3)": ["B'101'"],
    "bit varying": ["B''", "B'0001'"],
    "tsvector": [r"'a:1A b:2 ''it''''s'' ''back\\\\slash'''"],
    "tsquery": ["'a & !(b | c:*)'"],
    "point": ["'(1e-300,-0)'"],
    "box": ["'((0,0),(1.1,2.2))'"],
    "polygon": ["'((0,0),(1,1),(2,0))'"],
    "int4range": ["'empty'", "'(,5)'", "'[1,1]'"],
    "tstzrange": ["""'["2024-01-01 00:00:00+00",infinity)'"""],
    "int4multirange": ["'{[1,2),[5,9)}'", "'{}'"],
    "integer[]": ["'{}'", "'{1,NULL,3}'", "'[-1:1]={1,2,3}'", "'{{1,2},{3,4}}'"],
    "text[]": [r"""'{"", NULL, "NULL", "a,b", "{", "\"", "\\", "tab\t"}'""", r"ARRAY[E'new\nline', E'\x01']"],
    "jsonb[]": [r"""ARRAY['{"a": [1, "x,y"]}']::jsonb[]"""],
    "app.mood": ["'happy'", "'in between, \"so so\"'"],
    "app.mood[]": ["ARRAY['happy', NULL]::app.mood[]"],
    "app.positive": ["1"],
    "app.pair": [r"""ROW('a,b"\', NULL)::app.pair""", "ROW('', 1)::app.pair"],
    "pg_lsn": ["'16/B374D848'"],
}
TYPES = list(VALUES)
COLUMNS = [f"c{n}" for n in range(len(TYPES))]
MANY_TYPES = Subject(
    tables=(
        MovedTable(
            TableRef("app", "item"),
            TableRef("app", "item"),
            (
                Column("tenant_id", "uuid", "uuid", not_null=True),
                Column("id", "bigint", "bigint", not_null=True),
                *(Column(name, kind, kind) for name, kind in zip(COLUMNS, TYPES, strict=True)),
            ),
            ("id",),
            "tenant_id",
        ),
    ),
    ddl="CREATE SCHEMA app;"
    """CREATE TYPE app.mood AS ENUM ('happy', 'in between, "so so"');"""
    "CREATE DOMAIN app.positive AS integer CHECK (VALUE > 0);"
    "CREATE TYPE app.pair AS (a text, b integer);"
    "CREATE TABLE app.item (tenant_id uuid NOT NULL, id bigint PRIMARY KEY, "
    + ", ".join(f"{name} {kind}" for name, kind in zip(COLUMNS, TYPES, strict=True))
    + ")",
    identity="CREATE UNIQUE INDEX item_identity ON app.item (tenant_id, id);"
    "ALTER TABLE app.item REPLICA IDENTITY USING INDEX item_identity",
)
AS_TEXT = f"SELECT id, {', '.join(f'{name}::text' for name in COLUMNS)} FROM app.item ORDER BY id"


async def test_every_value_arrives_as_it_was(pair, capture):
    """Whether the rows come in a copy, in sets or one by one; the server is the oracle, by its text."""
    async with rig(pair.source, pair.target, subject=MANY_TYPES, capture=capture) as r, r.following():
        insert_values(pair.source, 0, 10)
        await r.copy().run()
        insert_values(pair.source, 100, 10)
        await r.follower.catch_up_once()
        insert_values(pair.source, 1000, 300)
        await r.follower.catch_up_once()
        expect_same_text(pair)
        rotated = ", ".join(f"{name} = o.{name}" for name in COLUMNS)
        for ids in ((0, 120), (1000, 1300)):
            execute(
                pair.source,
                f"UPDATE app.item SET {rotated} FROM app.item o WHERE item.id BETWEEN {ids[0]} AND {ids[1]}"
                " AND o.id = item.id / 100 * 100 + mod(item.id + 1, 10)",
            )
            await r.follower.catch_up_once()
        expect_same_text(pair)


def insert_values(url: str, first: int, rows: int) -> None:
    """Row n holds the n-th value of each type, and a NULL here and there."""
    streams = [islice(cycle([*VALUES[kind], "NULL"]), rows) for kind in TYPES]
    lines = [
        f"('{TENANT}', {first + n}, {', '.join(values)})"
        for n, values in enumerate(zip(*streams, strict=True))
    ]
    execute(url, f"INSERT INTO app.item VALUES {', '.join(lines)}")


def expect_same_text(pair) -> None:
    source, target = execute(pair.source, AS_TEXT), execute(pair.target, AS_TEXT)
    assert len(source) == len(target)
    for ours, theirs in zip(source, target, strict=True):
        different = [TYPES[n] for n, (o, t) in enumerate(zip(ours[1:], theirs[1:], strict=True)) if o != t]
        assert ours[0] == theirs[0] and not different, (ours[0], different)


def subject_of(types: Sequence[str], extensions: Sequence[str]) -> Subject:
    """A table with a column of each type, in another order on the target, and one dropped on the source."""
    columns = [(f"c{n}", kind) for n, kind in enumerate(types)]
    table = MovedTable(
        TableRef("app", "item"),
        TableRef("app", "item"),
        (
            Column("tenant_id", "uuid", "uuid", not_null=True),
            Column("id", "bigint", "bigint", not_null=True),
            *(Column(name, kind, kind) for name, kind in columns),
        ),
        ("id",),
        "tenant_id",
    )
    ddl = (
        "".join(f"CREATE EXTENSION {name} SCHEMA public;" for name in extensions)
        + """CREATE SCHEMA app;
        CREATE TYPE app.mood AS ENUM ('happy', 'in between, "so so"');
        CREATE DOMAIN app.positive AS integer CHECK (VALUE > 0);
        CREATE TYPE app.pair AS (a text, b integer);
        CREATE TYPE app.floats AS RANGE (subtype = float8);"""
    )
    names = ", ".join(f"{name} {kind}" for name, kind in columns)
    reversed_names = ", ".join(f"{name} {kind}" for name, kind in reversed(columns))
    return Subject(
        (table,),
        ddl + f"CREATE TABLE app.item ({reversed_names}, id bigint PRIMARY KEY, tenant_id uuid NOT NULL)",
        f"""DROP TABLE app.item;
        CREATE TABLE app.item (gone text, tenant_id uuid NOT NULL, id bigint PRIMARY KEY, also int, {names});
        ALTER TABLE app.item DROP gone, DROP also;
        CREATE UNIQUE INDEX item_identity ON app.item (tenant_id, id);
        ALTER TABLE app.item REPLICA IDENTITY USING INDEX item_identity""",
    )


def insert_generated(url: str, types: Sequence[str], first: int, rows: int) -> None:
    strategies = {**values.VALUES, **values.OPTIONAL}
    marks = ", ".join(f"%s::{kind}" for kind in types)
    ids = count(first)
    with psycopg.connect(url, autocommit=True) as conn:
        names = ", ".join(f"c{n}" for n in range(len(types)))

        @settings(
            max_examples=rows,
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(st.data())
        def insert(data: st.DataObject) -> None:
            row = [data.draw(st.none() | strategies[kind]) for kind in types]
            conn.execute(
                f"INSERT INTO app.item (tenant_id, id, {names}) VALUES (%s, %s, {marks})",
                (TENANT, next(ids), *row),
            )

        insert()


async def test_generated_values_arrive_bit_identical(pair, capture):
    await move_generated(pair, list(values.VALUES), [], capture)


async def test_values_of_extensions_arrive_bit_identical(pg15, make_database, capture):
    """Where both servers have them; XML as well, which not every build has."""
    pair = Pair(make_database(pg15), make_database(pg15), pg15, pg15)
    there = {name for (name,) in execute(pair.source, "SELECT name FROM pg_available_extensions")}
    extensions = sorted(there & {"citext", "hstore", "ltree"})
    types = [f"public.{name}" for name in extensions]
    with suppress(psycopg.errors.FeatureNotSupported):
        execute(pair.source, "SELECT '<a/>'::xml")
        types.append("xml")
    if not types:
        pytest.skip("the server has neither extensions nor XML")
    await move_generated(pair, types, extensions, capture)


async def move_generated(
    pair: Pair, types: Sequence[str], extensions: Sequence[str], capture: Capture
) -> None:
    """By copy and by stream: inserted, updated, and with another key."""
    names = [f"c{n}" for n in range(len(types))]
    changes = (
        # Every value once more, as an update of another row.
        f"UPDATE app.item SET {', '.join(f'{name} = o.{name}' for name in names)} FROM app.item o"
        f" WHERE o.id = {50 + ROWS - 1} - item.id",
        "UPDATE app.item SET id = id + 100",
    )
    subject = subject_of(types, extensions)
    async with rig(pair.source, pair.target, subject=subject, capture=capture) as r, r.following():
        await asyncio.to_thread(insert_generated, pair.source, types, 0, ROWS)
        await r.copy().run()
        await asyncio.to_thread(insert_generated, pair.source, types, 50, ROWS)
        await r.follower.catch_up_once()
        expect_identical(pair, types)
        for change in changes:
            changed = execute(pair.source, f"WITH c AS ({change} RETURNING 1) SELECT count(*) FROM c")
            assert changed == [(2 * ROWS,)]
            await r.follower.catch_up_once()
            expect_identical(pair, types)
        assert (await verify_databases(r.source, r.target, r.subject.tables, TENANT)).equal


def expect_identical(pair: Pair, types: Sequence[str]) -> None:
    """By the text, and by what the types' own binary output says."""
    with psycopg.connect(pair.source) as source, psycopg.connect(pair.target) as target:
        for n, kind in enumerate(types):
            query = f"SELECT id, c{n}::text, c{n} IS NULL FROM app.item ORDER BY id"
            ours, theirs = (conn.execute(query).fetchall() for conn in (source, target))
            assert ours == theirs and ours, kind
            if not (kind.startswith("app.") and kind.endswith("[]")):  # these carry OIDs
                assert binary(source, n) == binary(target, n), kind


def binary(conn: psycopg.Connection, column: int) -> bytes:
    query = f"COPY (SELECT id, c{column} FROM app.item ORDER BY id) TO STDOUT (FORMAT BINARY)"
    with conn.cursor().copy(query) as copy:
        return b"".join(copy)


@pytest.mark.parametrize("key", [("id",), ()], ids=["with a key", "without a key"])
@pytest.mark.parametrize("small_batch", [0, 200])
async def test_as_many_columns_as_a_table_can_have(
    pg16, make_database, key, small_batch, monkeypatch, capture
):
    monkeypatch.setattr("mover.postgres.apply.SMALL_BATCH", small_batch)
    names = [f"column_{n}" for n in range(1598)]
    columns = (
        Column("tenant_id", "uuid", "uuid", not_null=True),
        Column("id", "bigint", "bigint", not_null=True),
        *(Column(name, "smallint", "smallint") for name in names),
    )
    item = TableRef("app", "item")
    ddl = f"""CREATE SCHEMA app; CREATE TABLE app.item (tenant_id uuid NOT NULL, id bigint NOT NULL
              {", PRIMARY KEY (id)" if key else ""}, {", ".join(f"{name} smallint" for name in names)})"""
    identity = "CREATE UNIQUE INDEX i ON app.item (tenant_id, id); ALTER TABLE app.item REPLICA IDENTITY {}"
    subject = Subject(
        (MovedTable(item, item, columns, key, "tenant_id"),),
        ddl,
        identity.format("USING INDEX i" if key else "FULL"),
    )
    source, target = make_database(pg16), make_database(pg16)
    async with rig(source, target, subject=subject, capture=capture) as r, r.following():
        numbers = f"n{', n' * 1598} FROM generate_series(%s::int, %s::int) n"
        insert = f"INSERT INTO app.item SELECT '{TENANT}', {numbers}"
        execute(source, insert, 1, 3)
        await r.copy().run()
        execute(source, insert, 4, 6)
        execute(source, "UPDATE app.item SET column_1597 = -1 WHERE id > 1")
        execute(source, "DELETE FROM app.item WHERE id = 2")
        await r.follower.catch_up_once()
        rows = "SELECT md5(i::text) FROM app.item i ORDER BY id"
        assert execute(target, rows) == execute(source, rows)
        assert len(execute(target, rows)) == 5
        assert (await verify_databases(r.source, r.target, subject.tables, TENANT)).equal


async def test_values_of_many_megabytes(pg16, make_database, capture):
    """A text of LARGE bytes, by copy and by stream, in an update that sends it and in one that does not."""
    source, target = make_database(pg16), make_database(pg16)
    content = "SELECT id, name, octet_length(big), md5(big) FROM app.item ORDER BY id"
    async with rig(source, target, rows=0, capture=capture) as r, r.following():
        insert = f"INSERT INTO app.item VALUES ('{TENANT}', %s, 'n', 1, repeat(%s, {LARGE // 8}))"
        execute(source, insert, 1, "copied \t")
        await r.copy().run()
        execute(source, insert, 2, "\u00e9\u00e9\u00e9\\\n")
        await r.follower.catch_up_once()
        execute(source, "UPDATE app.item SET name = 'unsent'")
        execute(source, "UPDATE app.item SET big = upper(big) WHERE id = 1")
        await r.follower.catch_up_once()
        assert execute(target, content) == execute(source, content)
        assert [size for _, _, size, _ in execute(target, content)] == [LARGE, LARGE]
