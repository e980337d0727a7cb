"""Types and their values as SQL expressions, for generated schemas."""

from __future__ import annotations

from dataclasses import dataclass

# Types of the application's own; «0» stands for the first service's schema.
TYPES = (
    "CREATE TYPE «0».mood AS ENUM ('sad', 'it''s ok', 'Ünd', '{happy}', 'm5', 'm6', 'm7', 'm8')",
    "CREATE DOMAIN «0».label AS text CHECK (value <> 'forbidden')",
    'CREATE TYPE «0».pair AS ("First" integer, second text)',
    "CREATE TYPE «0».span AS RANGE (subtype = text)",
)


@dataclass(frozen=True)
class Kind:
    """A type; its last two values are for the neighbours on a shared target, where they must differ."""

    ddl: str
    values: tuple[str, ...]
    rich_build: bool = False  # needs a server that is built with ICU and libxml

    @property
    def own(self) -> tuple[str, ...]:
        return self.values[:-2]

    @property
    def elsewhere(self) -> tuple[str, ...]:
        return self.values[-2:]


def big_text(number: int) -> str:
    """Nine kilobytes that do not compress, so that they are TOASTed."""
    return f"(SELECT string_agg(md5(g::text || '/{number}'), '') FROM generate_series(1, 280) g)"


def _texts(*texts: str) -> tuple[str, ...]:
    return tuple("'" + text.replace("'", "''") + "'" for text in texts)


_NAMES = _texts(
    "a", "B", "b", "", " a", "ä", "Z\\N", "it's\ttab", "\\.", "{x}", "%s", "\U0001f600", "n1", "n2"
)
_WORDS = _texts("a", "A", "b", "ab", "a b", "a-b", "ä", "z", "Z", "zz", "n1", "n2")
_DATES = _texts(
    "2024-02-29", "0044-03-15 BC", "infinity", "-infinity", "1999-12-31", "2000-01-01", "2001-01-01"
)

KEY_KINDS = (
    Kind("integer", ("1", "2", "3", "-4", "2147483647", "6", "7", "1001", "1002")),
    Kind("text", _NAMES),
    Kind('text COLLATE "C"', _NAMES),
    Kind("uuid", tuple(f"'00000000-0000-4000-8000-{n:012x}'" for n in range(9))),
    Kind("bigint", ("1", "-9223372036854775808", "9223372036854775807", "4", "5", "6", "1001", "1002")),
    Kind("smallint", ("1", "2", "3", "-32768", "32767", "6", "101", "102")),
    Kind("date", (*_DATES, "'2010-01-01'", "'2010-01-02'")),
    Kind("«0».mood", _texts("sad", "it's ok", "Ünd", "{happy}", "m5", "m6", "m7", "m8")),
    Kind("varchar(30)", _NAMES),
    Kind("char(4)", _texts("a", "b", "ab", "a b", "ä", "", "n1", "n2")),
    Kind("«0».label", _NAMES),
    Kind('text COLLATE "C.utf8"', _NAMES),
    Kind('text COLLATE "de-x-icu"', _WORDS, rich_build=True),
    Kind("timestamptz", (*_DATES, "'2010-01-01 12:00:00.000001+14'", "'2010-01-02'")),
    Kind("bytea", _texts("\\x", "\\x00", "\\xff00", "\\x5c", "\\x61", "\\x01", "\\x02")),
    Kind("numeric", ("1", "-1", "0.5", "1e30", "'NaN'", "'Infinity'", "1001", "1002")),
    Kind("inet", _texts("10.0.0.1", "10.0.0.1/24", "::1", "10.0.0.0/8", "1.1.1.1", "2.2.2.2")),
    Kind("int4range", _texts("[1,2)", "empty", "(,)", "[3,)", "[100,101)", "[200,201)")),
    Kind("integer[]", _texts("{}", "{1,NULL}", "{{1,2},{3,4}}", "{2}", "{100}", "{200}")),
)

VALUE_KINDS = (
    *KEY_KINDS,
    Kind("boolean", ("true", "false")),
    Kind(
        "numeric",
        ("0", "-0.00", "1.10", "1.1000", "'NaN'", "'-Infinity'", "1e-300", "12345678901234567890.5"),
    ),
    Kind("numeric(12,3)", ("0", "1.5", "-123456789.123")),
    Kind("real", _texts("0.1", "-0", "NaN", "Infinity", "1e-45", "3.4028235e38")),
    Kind("double precision", _texts("0.1", "-0", "NaN", "-Infinity", "5e-324", "0.30000000000000004")),
    Kind("timestamp", _texts("2024-02-29 23:59:59.999999", "infinity", "0044-03-15 12:00 BC")),
    Kind("time", _texts("00:00", "24:00", "12:34:56.789")),
    Kind("timetz", _texts("00:00+14", "23:59:59.999999-12:30")),
    Kind("interval", _texts("1 day", "24 hours", "-1 mon 3 days -04:05:06.7", "0")),
    Kind("json", _texts('{"a": 1,  "a":2}', "null", '"\\u0041\\n"', "[ ]")),
    Kind("jsonb", _texts('{"a": [1.10, null, "\\\\ \\" \\n"]}', "null", '"ü"', "1e2")),
    Kind("text[]", _texts("{}", '{"",NULL,"NULL","a,b","q\\"q\\\\"}', "{{a,b},{c,d}}", "[3:4]={x,y}")),
    Kind("«0».mood[]", _texts("{}", '{sad,"it\'s ok",NULL}')),
    Kind("«0».pair", _texts("(1,a)", '(,"")', '(2,"a,b ""q"" \\\\")')),
    Kind("«0».pair[]", _texts("{}", '{"(1,a)","(2,\\"x y\\")"}')),
    Kind("«0».span", _texts("[a,b)", "empty", '["",z]', "(,)")),
    Kind("int4multirange", _texts("{}", "{[1,3),[5,7)}")),
    Kind("tstzrange", _texts("[2024-01-01,infinity]", "empty")),
    Kind("bit varying", _texts("", "1", "0101")),
    Kind("bit(3)", _texts("000", "101")),
    Kind("point", _texts("(1,2)", "(0.1,-1e300)")),
    Kind("polygon", _texts("((0,0),(1,0),(1,1))")),
    Kind("box", _texts("(0,0),(1,1)")),
    Kind("cidr", _texts("10.0.0.0/8", "2001:db8::/32")),
    Kind("macaddr8", _texts("08:00:2b:01:02:03:04:05")),
    Kind("tsvector", _texts("'a b':1A c:2,3", "")),
    Kind("tsquery", _texts("a & !b", "")),
    Kind('"char"', _texts("a", "\\377", "")),
    Kind("name", _texts("n", "")),
    Kind("money", _texts("1.50", "-92233720368547758.08")),
    Kind("pg_lsn", _texts("0/0", "16/B374D848")),
    Kind("xid8", _texts("0", "18446744073709551615")),
    Kind("oid", _texts("0", "4294967295")),
    Kind("jsonpath", _texts("$.a[*] ? (@ > 1)")),
    Kind("xml", _texts("<a>&amp;</a>", "x"), rich_build=True),
)
