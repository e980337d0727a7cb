"""Generated values of PostgreSQL's types, as the text that the type's input function takes."""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Sequence

from hypothesis import strategies as st

Texts = st.SearchStrategy[str]
# Every character that a text may hold, of one to four bytes, the awkward ones often.
AWKWARD = "\t\n\r\v\f\b\x01\x7f\\'\"{}(),;:|%$ .\u00e9\u0130\u2028\ufeff\uffff\U0001f600\U0010ffff"
CHARACTERS = st.one_of(
    st.sampled_from(AWKWARD),
    st.characters(min_codepoint=1, exclude_categories=["Cs"]),
    st.sampled_from("aNx0"),
)
WORDS = st.text(CHARACTERS, max_size=12)
TEXTS = st.one_of(WORDS, st.sampled_from(["", "NULL", "\\N", "\\.", " "]), WORDS.map(lambda word: word * 300))
FLOATS = st.one_of(st.floats(), st.sampled_from([5e-324, -5e-324, 2.2250738585072e-308, -0.0])).map(repr)
FINITE = st.floats(allow_nan=False, allow_infinity=False, min_value=-1e100, max_value=1e100)
BITS = st.text("01", max_size=70)


def integers(bits: int) -> Texts:
    limit = 1 << (bits - 1)
    return st.one_of(st.integers(-limit, limit - 1), st.sampled_from([-limit, limit - 1])).map(str)


@st.composite
def numerics(draw: st.DrawFn) -> str:
    if special := draw(st.sampled_from(["NaN", "Infinity", "-Infinity", "", "", "", "", ""])):
        return special
    whole, fraction = draw(st.text("0123456789", min_size=1)), draw(st.text("0123456789"))
    longer = draw(st.sampled_from([1, 1, 1, 200]))
    exponent = draw(st.integers(-200, 200))
    return f"{draw(st.sampled_from(['', '-']))}{whole * longer}.{fraction * longer}e{exponent}"


@st.composite
def moneys(draw: st.DrawFn) -> str:
    cents = int(draw(integers(64)))
    return f"{'-' if cents < 0 else ''}{abs(cents) // 100}.{abs(cents) % 100:02}"


@st.composite
def dates(draw: st.DrawFn, last_year: int = 5874897) -> str:
    years = st.one_of(st.integers(-4711, last_year - 1), st.integers(-2, 2), st.integers(1900, 2100))
    year = draw(years)
    written, era = (year, "") if year > 0 else (1 - year, " BC")
    return f"{written:04}-{draw(st.integers(1, 12)):02}-{draw(st.integers(1, 28)):02}{era}"


@st.composite
def times(draw: st.DrawFn) -> str:
    micros = draw(st.integers(0, 24 * 3600 * 10**6))
    seconds = micros // 10**6
    return f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}.{micros % 10**6:06}"


@st.composite
def zones(draw: st.DrawFn) -> str:
    seconds = draw(st.integers(-57599, 57599))
    minutes, second = divmod(abs(seconds), 60)
    return f"{'-' if seconds < 0 else '+'}{minutes // 60:02}:{minutes % 60:02}:{second:02}"


@st.composite
def timestamps(draw: st.DrawFn, zone: Texts) -> str:
    if special := draw(st.sampled_from(["infinity", "-infinity", "", "", "", "", "", ""])):
        return special
    day, _, era = draw(dates(294276)).partition(" ")
    return f"{day} {draw(times())}{draw(zone)} {era}"


@st.composite
def intervals(draw: st.DrawFn) -> str:
    months, days = draw(integers(32)), draw(integers(32))
    return f"{months} mons {days} days {draw(st.integers(-(2**62), 2**62))} microseconds"


@st.composite
def documents(draw: st.DrawFn) -> str:
    leaves = st.one_of(st.none(), st.booleans(), st.integers(), FINITE, WORDS)
    values = st.recursive(leaves, lambda inner: st.lists(inner) | st.dictionaries(WORDS, inner), max_leaves=6)
    escaped, indent = draw(st.booleans()), draw(st.sampled_from([None, 1]))
    return json.dumps(draw(values), ensure_ascii=escaped, indent=indent)


@st.composite
def addresses(draw: st.DrawFn) -> str:
    address = draw(st.ip_addresses())
    return f"{address}/{draw(st.integers(0, address.max_prefixlen))}"


def networks() -> Texts:
    return addresses().map(lambda text: str(ipaddress.ip_network(text, strict=False)))


def hardware(octets: int) -> Texts:
    return st.binary(min_size=octets, max_size=octets).map(lambda raw: raw.hex(":"))


def quoted(text: str) -> str:
    """As tsvector and tsquery want it."""
    return "'" + text.replace("\\", "\\\\").replace("'", "''") + "'"


@st.composite
def tsvectors(draw: st.DrawFn) -> str:
    weights = st.tuples(st.integers(1, 16383), st.sampled_from("ABCD ")).map(
        lambda p: f"{p[0]}{p[1].strip()}"
    )
    words = draw(st.lists(st.tuples(WORDS.filter(bool), st.lists(weights, max_size=3)), max_size=4))
    return " ".join(f"{quoted(word)}{':' + ','.join(at) if at else ''}" for word, at in words)


TSQUERIES = st.recursive(
    st.tuples(WORDS.filter(bool).map(quoted), st.sampled_from(["", ":*", ":AB"])).map("".join),
    lambda inner: st.tuples(inner, st.sampled_from(["&", "|", "<->", "<3>"]), inner).map(
        lambda parts: f"!({' '.join(parts)})"
    ),
    max_leaves=4,
)


@st.composite
def ranges(draw: st.DrawFn, ordered: Sequence[str]) -> str:
    """Of bounds that are given in ascending order."""
    if draw(st.integers(0, 5)) == 0:
        return "empty"
    low, high = sorted((draw(st.integers(0, len(ordered) - 1)), draw(st.integers(0, len(ordered) - 1))))
    opening, closing = draw(st.sampled_from("[(")), draw(st.sampled_from("])"))
    left, right = draw(st.sampled_from(["", ordered[low]])), draw(st.sampled_from(["", ordered[high]]))
    return f"{opening}{left and _in_quotes(left)},{right and _in_quotes(right)}{closing}"


def multiranges(ordered: Sequence[str]) -> Texts:
    several = st.lists(ranges(ordered), max_size=4)
    return several.map(lambda inner: "{" + ",".join(r for r in inner if r != "empty") + "}")


INTEGERS = [str(n) for n in (-(2**31), -7, 0, 1, 5, 2**31 - 2)]
DECIMALS = ["-Infinity", "-1.50", "0", "0.0001", "3", "Infinity"]
DAYS = ["0044-03-15 BC", "1999-12-31", "2024-02-29", "5874897-12-30"]
MOMENTS = ["-infinity", "0001-01-01 00:00:00 BC", "2024-03-31 02:30:00.000001", "infinity"]

POINTS = st.tuples(FINITE, FINITE).map(lambda p: f"({p[0]!r},{p[1]!r})")
PATHS = st.lists(POINTS, min_size=1, max_size=4).map(",".join)


def arrays(elements: Texts) -> Texts:
    """Of one or two dimensions, with NULLs, and with bounds that do not begin at 1."""
    cells = st.one_of(st.none(), elements).map(lambda cell: "NULL" if cell is None else _in_quotes(cell))
    flat = st.lists(cells, max_size=4)
    moved = st.tuples(flat.filter(bool), st.integers(-3, 3)).map(
        lambda pair: f"[{pair[1]}:{pair[1] + len(pair[0]) - 1}]={{{','.join(pair[0])}}}"
    )
    table = st.tuples(cells, cells, cells, cells).map(lambda c: f"{{{{{c[0]},{c[1]}}},{{{c[2]},{c[3]}}}}}")
    return st.one_of(flat.map(lambda row: "{" + ",".join(row) + "}"), moved, table)


def composites(*fields: Texts) -> Texts:
    empty_or = [st.one_of(st.just(""), field.map(_in_quotes)) for field in fields]  # empty: NULL
    return st.tuples(*empty_or).map(lambda row: f"({','.join(row)})")


def _in_quotes(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


MOODS = st.sampled_from(["happy", 'in between, "so so"'])
# Type -> its values. The types of schema `app` are those of test_values.
VALUES: dict[str, Texts] = {
    "boolean": st.sampled_from(["t", "f"]),
    "smallint": integers(16),
    "integer": integers(32),
    "bigint": integers(64),
    "oid": st.integers(0, 2**32 - 1).map(str),
    "xid8": st.integers(0, 2**64 - 1).map(str),
    "pg_lsn": st.integers(0, 2**64 - 1).map(lambda n: f"{n >> 32:X}/{n & 0xFFFFFFFF:X}"),
    "real": st.floats(width=32).map(repr),
    "double precision": FLOATS,
    "numeric": numerics(),
    "numeric(10,2)": st.integers(-(10**10) + 1, 10**10 - 1).map(lambda n: f"{n}e-2"),
    "money": moneys(),
    "text": TEXTS,
    "character varying(20)": st.text(CHARACTERS, max_size=20),
    "character(5)": st.text(CHARACTERS, max_size=5),
    '"char"': st.characters(min_codepoint=1, max_codepoint=127),
    "name": st.text(CHARACTERS, max_size=15),
    "bytea": st.binary(max_size=3000).map(lambda raw: "\\x" + raw.hex()),
    "uuid": st.uuids().map(str),
    "date": st.one_of(dates(), st.sampled_from(["infinity", "-infinity"])),
    "time without time zone": times(),
    "time with time zone": st.tuples(times(), zones()).map("".join),
    "timestamp without time zone": timestamps(st.just("")),
    "timestamp with time zone": timestamps(zones()),
    "interval": intervals(),
    "json": documents(),
    "jsonb": documents(),
    "inet": addresses(),
    "cidr": networks(),
    "macaddr": hardware(6),
    "macaddr8": hardware(8),
    "bit(3)": st.text("01", min_size=3, max_size=3),
    "bit varying": BITS,
    "tsvector": tsvectors(),
    "tsquery": TSQUERIES,
    "point": POINTS,
    "line": st.tuples(FINITE, FINITE).map(lambda p: f"{{1,{p[0]!r},{p[1]!r}}}"),
    "lseg": st.tuples(POINTS, POINTS).map(lambda p: f"[{p[0]},{p[1]}]"),
    "box": st.tuples(POINTS, POINTS).map(",".join),
    "path": st.one_of(PATHS.map(lambda p: f"[{p}]"), PATHS.map(lambda p: f"({p})")),
    "polygon": PATHS.map(lambda p: f"({p})"),
    "circle": st.tuples(POINTS, FINITE).map(lambda c: f"<{c[0]},{abs(c[1])!r}>"),
    "int4range": ranges(INTEGERS),
    "int8range": ranges(INTEGERS),
    "numrange": ranges(DECIMALS),
    "daterange": ranges(DAYS),
    "tsrange": ranges(MOMENTS),
    "tstzrange": ranges(MOMENTS),
    "int4multirange": multiranges(INTEGERS),
    "nummultirange": multiranges(DECIMALS),
    "tstzmultirange": multiranges(MOMENTS),
    "app.floats": ranges(["-Infinity", "-0", "5e-324", "0.1", "Infinity"]),
    "app.mood": MOODS,
    "app.positive": st.integers(1, 2**31 - 1).map(str),
    "app.pair": composites(TEXTS, integers(32)),
    "integer[]": arrays(integers(32)),
    "numeric[]": arrays(numerics()),
    "double precision[]": arrays(FLOATS),
    "text[]": arrays(TEXTS),
    "bytea[]": arrays(st.binary(max_size=20).map(lambda raw: "\\x" + raw.hex())),
    "jsonb[]": arrays(documents()),
    "timestamp with time zone[]": arrays(timestamps(zones())),
    "int4range[]": arrays(ranges(INTEGERS)),
    "app.mood[]": arrays(MOODS),
    "app.pair[]": arrays(composites(TEXTS, integers(32))),
    "app.positive[]": arrays(st.integers(1, 9).map(str)),
}
# Where the servers have them.
OPTIONAL: dict[str, Texts] = {
    "xml": st.text(st.characters(codec="ascii", categories=["L", "N"])).map(lambda t: f"<a b='{t}'>{t}</a>"),
    "public.citext": TEXTS,
    "public.ltree": st.lists(st.text("abcXYZ_09", min_size=1, max_size=9), max_size=5).map(".".join),
    "public.hstore": st.dictionaries(WORDS, st.none() | WORDS, max_size=4).map(
        lambda pairs: ",".join(
            f"{_in_quotes(k)}=>{'NULL' if v is None else _in_quotes(v)}" for k, v in pairs.items()
        )
    ),
}
