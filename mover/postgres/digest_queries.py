"""The SQL of `digests.py`, composed for one table on one side. No input, no output.

Bounds and the tenant are literals without a type, so that PostgreSQL reads them as the column's own type
and its indexes serve.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from psycopg import sql

from mover.core.ids import Side, TableRef, TenantId
from mover.core.tables import Column, Holding, MovedTable
from verify.leaves import Key, KeyRange, KeySet, Part

# Types whose own order COLLATE replaces; others (citext) compare by a rule of their own.
_PLAIN_TEXT = ("text", "character varying", "character", "name")

# Columns whose collation compares bytes, as "C" does: their indexes are in our order.
BYTEWISE_COLUMNS = """
select a.attname::text
  from pg_attribute a
  join pg_collation c on c.oid = a.attcollation
  join pg_database d on d.datname = current_database()
 where a.attrelid = $1::text::regclass and a.attnum > 0
   and (   c.collprovider = 'b'
        or (c.collprovider = 'c' and c.collcollate in ('C', 'POSIX'))
        or (c.collprovider = 'd' and d.datlocprovider = 'b')
        or (c.collprovider = 'd' and d.datlocprovider = 'c' and d.datcollate in ('C', 'POSIX')))
"""


@dataclass(frozen=True)
class DigestQueries:
    """What is asked of `table` on `side`; `bytewise` are its columns that BYTEWISE_COLUMNS found."""

    table: MovedTable
    side: Side
    tenant: TenantId
    bytewise: frozenset[str]

    @property
    def name(self) -> TableRef:
        return self.table.source if self.side is Side.SOURCE else self.table.target

    @property
    def seekable(self) -> bool:
        """The key's index is in our order, by its first column at least."""
        return self._own_order(self._ordered[0])

    def rows(self, part: Part) -> str:
        """The copied columns of the part's rows, in key order."""
        return _text("{}", self._select(self._values(), part))

    def boundaries(self, within: KeyRange, rows_per_leaf: int) -> str:
        """Numbered first and printed afterwards, so that only the boundaries become text."""
        numbered = _compose(
            "SELECT {}, row_number() OVER (ORDER BY {}) FROM {} WHERE {}",
            _list(_column(column) for column in self.table.key_columns),
            self._order(),
            self._from(),
            self._where(within),
        )
        keys = [_name(f"k{i}") for i, _ in enumerate(self.table.key)]
        return _text(
            "SELECT {} FROM ({}) AS numbered ({}, n) WHERE n % {} = 0 ORDER BY n",
            _list(_compose("{}::pg_catalog.text", key) for key in keys),
            numbered,
            _list(keys),
            sql.Literal(rows_per_leaf),
        )

    def row_digests(self, part: Part) -> str:
        """Key texts, then one digest for the row."""
        return self._digests(part, [_digest(self._values())])

    def column_digests(self, keys: Sequence[Key]) -> str:
        """Key texts, then one digest for each copied column."""
        return self._digests(KeySet(tuple(keys)), [_digest([value]) for value in self._values()])

    def _digests(self, part: Part, digests: Iterable[sql.Composable]) -> str:
        return _text("{}", self._select([*self._key_texts(), *digests], part))

    def _select(self, expressions: Iterable[sql.Composable], part: Part) -> sql.Composed:
        return _compose(
            "SELECT {} FROM {} WHERE {} ORDER BY {}",
            _list(expressions),
            self._from() if isinstance(part, KeyRange) else self._from_keys(part),
            self._where(part),
            self._order(),
        )

    def _from(self) -> sql.Composed:
        return _compose("{} AS t", sql.Identifier(self.name.schema, self.name.name))

    def _from_keys(self, part: KeySet) -> sql.Composed:
        """The keys' rows, each looked up in the key's index. As JSON, thousands of keys cost little."""
        keys = sql.Literal(json.dumps(part.keys, ensure_ascii=False))
        equal = [
            _compose(
                "{} = CAST(wanted.key ->> {} AS {})",
                _column(column),
                sql.Literal(i),
                sql.SQL(self._type(column)),
            )
            for i, column in enumerate(self.table.key_columns)
        ]
        return _compose(
            "json_array_elements({}) AS wanted (key) JOIN {} ON {}",
            keys,
            self._from(),
            sql.SQL(" AND ").join(equal),
        )

    def _where(self, part: Part) -> sql.Composed:
        conditions = [_belongs(self.table.holding(self.side), self.tenant)]
        if isinstance(part, KeyRange):
            if part.after is not None:
                conditions.append(_compose("({}) > ({})", self._order(), self._bound(part.after)))
            if part.upto is not None:
                conditions.append(_compose("({}) <= ({})", self._order(), self._bound(part.upto)))
        return sql.SQL(" AND ").join(conditions)

    @property
    def _ordered(self) -> tuple[Column, ...]:
        """The key without the tenant column, which is constant here and would keep indexes away."""
        columns = self.table.key_columns
        return tuple(c for c in columns if c.name != self.table.tenant_column) or columns

    def _bound(self, key: Key) -> sql.Composed:
        values = dict(zip(self.table.key, key, strict=True))
        return _list(sql.Literal(values[column.name]) for column in self._ordered)

    def _order(self) -> sql.Composed:
        return _list(self._order_by(column) for column in self._ordered)

    def _order_by(self, column: Column) -> sql.Composed:
        if self._own_order(column):
            return _column(column)
        if self._is_plain_text(column):
            return _compose('{} COLLATE pg_catalog."C"', _column(column))
        return _compose('{}::pg_catalog.text COLLATE pg_catalog."C"', _column(column))

    def _own_order(self, column: Column) -> bool:
        if not column.collatable:
            return True
        return column.name in self.bytewise and self._is_plain_text(column)

    def _is_plain_text(self, column: Column) -> bool:
        return self._type(column).partition("(")[0] in _PLAIN_TEXT

    def _type(self, column: Column) -> str:
        return column.source_type if self.side is Side.SOURCE else column.target_type

    def _values(self) -> list[sql.Composable]:
        return [_column(column) for column in self.table.copied]

    def _key_texts(self) -> list[sql.Composable]:
        return [_compose("{}::pg_catalog.text", _column(column)) for column in self.table.key_columns]


@dataclass(frozen=True)
class WholeRowQueries(DigestQueries):
    """Of `rows_of`, a table without a key: a row is known by the digest of its values, and by its number
    among its equals. So `table` has these two for a key."""

    rows_of: MovedTable

    @property
    def seekable(self) -> bool:
        return False

    def _from(self) -> sql.Composed:
        assert self.table.tenant_column is not None  # owned tables have a key
        rows = _compose(
            "SELECT {tenant}, {digest} AS {row} FROM {name} AS t WHERE {tenant} = {value}",
            tenant=sql.Identifier("t", self.table.tenant_column),
            digest=_digest(_column(column) for column in self.rows_of.copied),
            row=_name(_ROW.name),
            name=sql.Identifier(self.name.schema, self.name.name),
            value=sql.Literal(str(self.tenant)),
        )
        return _compose(
            "(SELECT t.*, row_number() OVER (PARTITION BY {}) AS {} FROM ({}) AS t) AS t",
            _column(_ROW),
            _name(_NUMBER.name),
            rows,
        )


_ROW = Column("mover_row", "bytea", "bytea")
_NUMBER = Column("mover_number", "bigint", "bigint")


def queries_of(table: MovedTable, side: Side, tenant: TenantId, bytewise: frozenset[str]) -> DigestQueries:
    if table.key:
        return DigestQueries(table, side, tenant, bytewise)
    keyed = replace(table, columns=(_ROW, _NUMBER), key=(_ROW.name, _NUMBER.name))
    return WholeRowQueries(keyed, side, tenant, bytewise, table)


def _belongs(holding: Holding, tenant: TenantId, depth: int = 0) -> sql.Composed:
    """Whether the row is the tenant's, by its own column or by one of those that it refers to."""
    row = f"p{depth}" if depth else "t"
    if holding.tenant_column is not None:
        return _compose("{} = {}", sql.Identifier(row, holding.tenant_column), sql.Literal(str(tenant)))
    parent = f"p{depth + 1}"
    chains = []
    for tie in holding.ties:
        refers = sql.SQL(" AND ").join(
            _compose("{} = {}", sql.Identifier(parent, theirs), sql.Identifier(row, ours))
            for ours, theirs in zip(tie.columns, tie.referenced, strict=True)
        )
        chains.append(
            _compose(
                "EXISTS (SELECT 1 FROM {} AS {} WHERE {} AND {})",
                sql.Identifier(tie.parent.table.schema, tie.parent.table.name),
                _name(parent),
                refers,
                _belongs(tie.parent, tenant, depth + 1),
            )
        )
    return _compose("({})", sql.SQL(" OR ").join(chains))


def _digest(values: Iterable[sql.Composable]) -> sql.Composed:
    """Of a record's text, which tells NULL from an empty text and no value from its neighbour."""
    return _compose("sha256(convert_to(ROW({})::pg_catalog.text, 'UTF8'))", _list(values))


def _column(column: Column) -> sql.Composed:
    return _compose("{}", sql.Identifier("t", column.name))


def _name(name: str) -> sql.Composable:
    return sql.Identifier(name)


def _list(parts: Iterable[sql.Composable]) -> sql.Composed:
    return sql.SQL(", ").join(parts)


def _compose(template: str, *parts: sql.Composable, **named: sql.Composable) -> sql.Composed:
    return sql.SQL(template).format(*parts, **named)


def _text(template: str, *parts: sql.Composable, **named: sql.Composable) -> str:
    return _compose(template, *parts, **named).as_string(None)
