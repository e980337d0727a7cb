"""One side of a generated move: its schemas are made there, and its rows are read by plain SQL."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from uuid import UUID

import psycopg
from psycopg import sql

from tests.support.checks import Table, connect, leftovers_on, tenant_tables_on
from tests.support.drafts import quoted


@dataclass(frozen=True)
class Place:
    """One side of a move."""

    url: str
    vertical: str
    services: tuple[str, ...]
    conn: psycopg.Connection = field(repr=False, compare=False)

    @classmethod
    @contextmanager
    def at(cls, url: str, vertical: str, services: tuple[str, ...]) -> Iterator[Place]:
        with connect(url) as conn:
            yield cls(url, vertical, services, conn)

    @property
    def schemas(self) -> list[str]:
        return [f"{self.vertical}_{service}" for service in self.services]

    def text(self, statement: str) -> str:
        """A generated statement for this side."""
        for number, schema in enumerate(self.schemas):
            statement = statement.replace(f"«{number}»", quoted(schema))
        return statement.replace("«db»", self.url.rpartition("/")[2])

    def fill(self, statements: Sequence[str]) -> None:
        """Rows that a constraint refuses are left out."""
        for statement in statements:
            try:
                self.conn.execute(self.text(statement))
            except psycopg.errors.IntegrityError:
                continue

    def run(self, statement: str) -> int:
        """How many rows it found or changed."""
        return self.conn.execute(self.text(statement)).rowcount

    def refuses(self, statement: str) -> bool:
        """Whether the tenant has moved."""
        try:
            self.run(statement)
        except psycopg.errors.ReadOnlySqlTransaction:
            return True
        return False

    def empty(self) -> None:
        for schema in self.schemas:
            self.conn.execute(sql.SQL("drop schema if exists {} cascade").format(sql.Identifier(schema)))

    def move_sequences_ahead(self) -> None:
        """Neighbours have other numbers than the tenant that comes."""
        self.conn.execute(
            "select setval(format('%I.%I', schemaname, sequencename)::regclass,"
            " case when increment_by > 0 then 20000 else -20000 end) from pg_sequences"
        )

    def rows(self, tenant_column: str, *tenants: UUID, others: bool = False) -> dict[str, Counter[str]]:
        """The rows of these tenants, or of all others, by table without its schema."""
        return {
            f"{self.schemas.index(table[0])}.{table[1]}": _contents(self.conn, table, whose, tenants, others)
            for table, whose in self._whose(tenant_column).items()
        }

    def _whose(self, tenant_column: str) -> dict[Table, sql.Composable]:
        """By table, the tenant of its row `r`: in its column, or that of a row it refers to."""
        column = sql.SQL("r.{}").format(sql.Identifier(tenant_column))
        tables = tenant_tables_on(self.conn, self.schemas, tenant_column)
        found: dict[Table, sql.Composable] = dict.fromkeys(tables, column)
        keys = [
            (tuple(child), tuple(parent), ours, referenced)
            for child, parent, ours, referenced in self.conn.execute(FOREIGN_KEYS, {"schemas": self.schemas})
        ]

        def of_row(table: Table, row: str, below: frozenset[Table]) -> sql.Composable:
            if table in tables:
                return sql.Identifier(row, tenant_column)
            parents = [
                sql.SQL("(select {} from {} as {} where {})").format(
                    of_row(parent, row + "o", below | {table}),
                    sql.Identifier(*parent),
                    sql.Identifier(row + "o"),
                    sql.SQL(" and ").join(
                        sql.SQL('{}::text collate "C" = {}::text collate "C"').format(
                            sql.Identifier(row + "o", theirs), sql.Identifier(row, mine)
                        )
                        for mine, theirs in zip(ours, referenced, strict=True)
                    ),
                )
                for child, parent, ours, referenced in keys
                if child == table and parent not in {table, *below}
            ]
            return sql.SQL("coalesce({})").format(sql.SQL(", ").join([*parents, sql.NULL]))

        owned = sorted({child for child, *_ in keys} - found.keys())
        return found | {table: of_row(table, "r", frozenset()) for table in owned}

    def leftovers(self) -> list[str]:
        return sorted(leftovers_on(self.conn))

    def sequences(self) -> dict[str, tuple[int, bool, int]]:
        """(last_value, is_called, increment) by the name without its schema."""
        named = self.conn.execute(
            "select schemaname, sequencename, increment_by from pg_sequences where schemaname = any(%s)",
            (self.schemas,),
        ).fetchall()
        return {
            f"{self.schemas.index(schema)}.{name}": (
                *self.conn.execute(
                    sql.SQL("select last_value, is_called from {}").format(sql.Identifier(schema, name))
                ).fetchone(),
                increment,
            )
            for schema, name, increment in named
        }


def _contents(
    conn: psycopg.Connection, table: Table, whose: sql.Composed, tenants: Sequence[UUID], others: bool
) -> Counter[str]:
    """Each row as the text and the binary form of its columns, by name."""
    columns = conn.execute(COLUMNS, table).fetchall()
    values = sql.SQL(", ").join(
        part.format(sql.Identifier(name), sql.SQL(send or ""))
        for name, send in columns
        for part in (sql.SQL("{0}::text"), sql.SQL("encode({1}({0}), 'hex')"))[: 2 if send else 1]
    )
    # Names may hold a percent sign: no parameters.
    query = sql.SQL("select row({})::text from {} as r where (({})::text = any({})) is {}").format(
        values,
        sql.Identifier(*table),
        whose,
        sql.Literal([str(t) for t in tenants]),
        sql.SQL(str(not others)),
    )
    return Counter(row for (row,) in conn.execute(query))


FOREIGN_KEYS = """
select array[cn.nspname, c.relname], array[pn.nspname, p.relname],
       array(select a.attname from unnest(k.conkey) with ordinality u(attnum, n)
               join pg_attribute a on a.attrelid = k.conrelid and a.attnum = u.attnum order by n),
       array(select a.attname from unnest(k.confkey) with ordinality u(attnum, n)
               join pg_attribute a on a.attrelid = k.confrelid and a.attnum = u.attnum order by n)
  from pg_constraint k
  join pg_class c on c.oid = k.conrelid join pg_namespace cn on cn.oid = c.relnamespace
  join pg_class p on p.oid = k.confrelid join pg_namespace pn on pn.oid = p.relnamespace
 where k.contype = 'f' and k.conparentid = 0 and not c.relispartition and cn.nspname = any(%(schemas)s)
 order by k.conname
"""
# Binary forms hold OIDs of the application's own types, which differ between databases: those are left out.
COLUMNS = """
select a.attname,
       case when t.typsend <> 0 and (b.oid < 16384 or b.typtype = 'e') then b.typsend::regproc::text end
  from pg_attribute a
  join pg_type t on t.oid = a.atttypid
  join pg_type b on b.oid = case t.typtype when 'd' then t.typbasetype else t.oid end
 where a.attrelid = format('%%I.%%I', %s::text, %s::text)::regclass and a.attnum > 0 and not a.attisdropped
 order by a.attname collate "C"
"""


def assert_same(ours: Mapping[str, Counter[str]], theirs: Mapping[str, Counter[str]]) -> None:
    lines: list[str] = []
    for table in sorted(ours.keys() | theirs.keys()):
        here, there = ours.get(table, Counter()), theirs.get(table, Counter())
        lines += [f"{table}: only before or on the source: {row[:500]}" for row in (here - there).elements()]
        lines += [f"{table}: only after or on the target: {row[:500]}" for row in (there - here).elements()]
    assert not lines, "rows differ:\n" + "\n".join(lines)
