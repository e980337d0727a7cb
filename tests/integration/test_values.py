"""Every kind of value through copy, slot, decoder and writer, with PostgreSQL itself as the oracle."""

from __future__ import annotations

from itertools import cycle, islice

from mover.core.ids import TableRef
from mover.core.tables import Column, MovedTable
from tests.support.rig import TENANT, Subject, execute, rig

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


async def test_every_value_arrives_as_it_was(pair):
    """Whether the rows come in a copy, in sets or one by one; the server is the oracle, by its text."""
    async with rig(pair.source, pair.target, subject=MANY_TYPES) as r, r.following():
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
