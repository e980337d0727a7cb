"""Key ranges as SQL, for the copy path: the same order on both sides, whatever their collations."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from psycopg import sql

from mover.core.copying import CopiedRanges, Key
from mover.core.ids import Side
from mover.core.tables import Column, MovedTable


def type_on(column: Column, side: Side) -> sql.SQL:
    """The column's type as that side's catalog spells it: trusted text, not an identifier."""
    return sql.SQL(column.source_type if side is Side.SOURCE else column.target_type)


def order_key(table: MovedTable, alias: str) -> sql.Composed:
    """The key's columns for ORDER BY and row comparison."""
    return sql.SQL(", ").join(_ordered(column, alias) for column in table.key_columns)


def in_range(table: MovedTable, alias: str, lo: Key | None, hi: Key | None, side: Side) -> sql.Composed:
    """`lo < key AND key <= hi`, each bound only where there is one."""
    conditions: list[sql.Composed] = []
    for bound, operator in ((lo, ">"), (hi, "<=")):
        if bound is not None:
            left = order_key(table, alias)
            right = key_literal(table, bound, side)
            conditions.append(sql.SQL("ROW({}) {} ROW({})").format(left, sql.SQL(operator), right))
    return sql.SQL(" AND ").join(conditions) if conditions else sql.SQL("true").format()


def in_ranges(table: MovedTable, alias: str, copied: CopiedRanges, side: Side) -> sql.Composed:
    """Whether a key is in one of the copied ranges."""
    if copied.nothing:
        return sql.SQL("false").format()
    parts = [sql.SQL("({})").format(in_range(table, alias, lo, hi, side)) for lo, hi in copied.ranges]
    return sql.SQL("({})").format(sql.SQL(" OR ").join(parts))


def key_literal(table: MovedTable, key: Key, side: Side) -> sql.Composed:
    return sql.SQL(", ").join(
        sql.SQL("{}::{}").format(sql.Literal(value), type_on(column, side))
        for value, column in zip(key, table.key_columns, strict=True)
    )


def in_values(alias: str, names: Sequence[Column], values: Collection[Key], side: Side) -> sql.Composed:
    """Whether a row has one of `values` in the columns `names`."""
    arrays = [sql.Literal(list(of_column)) for of_column in zip(*values, strict=True)]
    return sql.SQL("({}) IN (SELECT {} FROM {})").format(
        columns(names, alias), unnested(names, side), unnest(arrays)
    )


def unnest(arrays: Sequence[sql.Composable]) -> sql.Composed:
    """Keys from an array of texts for each column: `unnest` would take array values apart as well."""
    texts = sql.SQL(", ").join(sql.SQL("{}::text[]").format(array) for array in arrays)
    names = sql.SQL(", ").join(sql.Identifier(f"k{n}") for n in range(len(arrays)))
    return sql.SQL("unnest({}) WITH ORDINALITY AS u ({}, n)").format(texts, names)


def unnested(names: Sequence[Column], side: Side) -> sql.Composed:
    """The columns of `unnest`, each with its own type and name."""
    return sql.SQL(", ").join(
        sql.SQL("{}::{} AS {}").format(
            sql.Identifier(f"k{n}"), type_on(column, side), sql.Identifier(column.name)
        )
        for n, column in enumerate(names)
    )


def columns(names: Sequence[Column], alias: str | None = None) -> sql.Composed:
    """A column list, each under `alias` when given."""
    parts = [sql.Identifier(alias, c.name) if alias else sql.Identifier(c.name) for c in names]
    return sql.SQL(", ").join(parts)


def _ordered(column: Column, alias: str) -> sql.Composed:
    collation = sql.SQL(' COLLATE "C"') if column.collatable else sql.SQL("")
    return sql.SQL("{}{}").format(sql.Identifier(alias, column.name), collation)
