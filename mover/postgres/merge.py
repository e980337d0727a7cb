"""The statements that apply changes to one table: composed once, scoped to the tenant in every case.

Two ways, the same effect: a staged batch merged by set statements, and single statements in source
order, with `$n` parameters. Locks: ROW EXCLUSIVE on the table and the rows themselves. Safe to repeat
only as a whole: the progress of the same transaction says whether it was done.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from psycopg import sql

from mover.core.copying import CopiedRanges
from mover.core.copytext import NULL_OPTION
from mover.core.ids import Side, TenantId
from mover.core.tables import MovedTable
from mover.postgres import ranges

# The value of the staging table's `mover_op`; an update's is UPDATE + the number of its column group.
DELETE, INSERT, UPDATE = 0, 1, 2
Names = tuple[str, ...]


class Merge:
    """SQL for one table; `number` names its staging table."""

    def __init__(self, table: MovedTable, number: int, tenant: TenantId) -> None:
        self.table = table
        self._target = sql.Identifier(table.target.schema, table.target.name)
        self._stage = sql.Identifier("pg_temp", f"mover_stage_{number}")
        self._tenant = sql.SQL("t.{} = {}").format(
            sql.Identifier(table.tenant_column), sql.Literal(str(tenant))
        )
        self._is_always = {c.name for c in table.copied if c.identity_always}
        self._insert_one: dict[Names, bytes] = {}
        self._update_one: dict[Names, bytes] = {}

    @cached_property
    def moves_by_copy(self) -> bool:
        """Whether a changed key takes a new row: a GENERATED ALWAYS identity cannot be assigned to."""
        return not self._is_always.isdisjoint(self.table.key)

    @cached_property
    def create_stage(self) -> sql.Composed:
        """Columns of the target's types, all nullable, in front of them what to do."""
        return sql.SQL(
            "CREATE TEMPORARY TABLE {} AS SELECT 0::smallint AS mover_op, {} FROM {} WITH NO DATA"
        ).format(self._stage, ranges.columns(self.table.copied), self._target)

    def copy_stage(self, names: Names) -> sql.Composed:
        return sql.SQL("COPY {} (mover_op, {}) FROM STDIN WITH (NULL {})").format(
            self._stage, _identifiers(names), sql.Literal(NULL_OPTION)
        )

    @cached_property
    def clear_stage(self) -> sql.Composed:
        return sql.SQL("TRUNCATE {}").format(self._stage)

    @cached_property
    def copy_rows(self) -> sql.Composed:
        """COPY of whole rows in the plan's column order."""
        return sql.SQL("COPY {} ({}) FROM STDIN").format(self._target, ranges.columns(self.table.copied))

    def inside(self, copied: CopiedRanges) -> sql.Composed:
        """Parameters: an array for each key column. The 1-based places of those in the copied ranges."""
        arrays = sql.SQL(", ").join(
            sql.SQL("{}::{}[]").format(_parameter(n), ranges.type_on(column, Side.TARGET))
            for n, column in enumerate(self.table.key_columns, start=1)
        )
        return sql.SQL("SELECT mover_n FROM unnest({}) WITH ORDINALITY AS s ({}, mover_n) WHERE {}").format(
            arrays, _identifiers(self.table.key), ranges.in_ranges(self.table, "s", copied, Side.TARGET)
        )

    @cached_property
    def delete_all(self) -> sql.Composed:
        return sql.SQL("DELETE FROM {} AS t WHERE {}").format(self._target, self._tenant)

    @cached_property
    def delete_staged(self) -> sql.Composed:
        return sql.SQL("DELETE FROM {} AS t USING {} AS s WHERE {} AND {} AND s.mover_op = {}").format(
            self._target, self._stage, self._tenant, _equal(self.table.key), sql.Literal(DELETE)
        )

    def insert_staged(self, names: Names) -> sql.Composed:
        return sql.SQL(
            "INSERT INTO {0} ({1}) OVERRIDING SYSTEM VALUE SELECT {1} FROM {2} WHERE mover_op = {3}"
        ).format(self._target, _identifiers(names), self._stage, sql.Literal(INSERT))

    def update_staged(self, names: Names, group: int) -> sql.Composed:
        """The rows of one column group; `names` are the columns whose values were sent."""
        assignments = sql.SQL(", ").join(
            sql.SQL("{0} = s.{0}").format(sql.Identifier(name)) for name in self.assigned(names)
        )
        same = _equal((*self.table.key, *self._kept(names)))
        return sql.SQL("UPDATE {} AS t SET {} FROM {} AS s WHERE {} AND {} AND s.mover_op = {}").format(
            self._target, assignments, self._stage, self._tenant, same, sql.Literal(UPDATE + group)
        )

    def insert_one(self, names: Names) -> bytes:
        """Parameters: the values of `names`."""
        found = self._insert_one.get(names)
        if found is None:
            statement = sql.SQL("INSERT INTO {} ({}) OVERRIDING SYSTEM VALUE VALUES ({})").format(
                self._target,
                _identifiers(names),
                sql.SQL(", ").join(_parameter(n) for n in range(1, len(names) + 1)),
            )
            found = self._insert_one[names] = statement.as_bytes()
        return found

    def update_one(self, names: Names) -> bytes:
        """Parameters: the values of `used_by_update(names)`, then the old key."""
        found = self._update_one.get(names)
        if found is None:
            place = {name: _parameter(n) for n, name in enumerate(self.used_by_update(names), start=1)}
            assignments = sql.SQL(", ").join(
                sql.SQL("{} = {}").format(sql.Identifier(name), place[name]) for name in self.assigned(names)
            )
            kept = sql.SQL("").join(
                sql.SQL(" AND t.{} = {}").format(sql.Identifier(name), place[name])
                for name in self._kept(names)
            )
            statement = sql.SQL("UPDATE {} AS t SET {} WHERE {} AND {}{}").format(
                self._target, assignments, self._tenant, self._key_from(len(place)), kept
            )
            found = self._update_one[names] = statement.as_bytes()
        return found

    @cached_property
    def delete_one(self) -> bytes:
        """Parameters: the old key."""
        statement = sql.SQL("DELETE FROM {} AS t WHERE {} AND {}")
        return statement.format(self._target, self._tenant, self._key_from(0)).as_bytes()

    def assigned(self, names: Names) -> Names:
        """The columns that an update can set."""
        return tuple(name for name in names if name not in self._is_always)

    def used_by_update(self, names: Names) -> Names:
        return (*self.assigned(names), *self._kept(names))

    def _kept(self, names: Names) -> Names:
        """Identity columns beside the key that cannot be assigned: a row whose value changed is not
        found, rather than silently left with the old one."""
        return tuple(name for name in names if name in self._is_always and name not in self.table.key)

    def _key_from(self, parameters_before: int) -> sql.Composed:
        return sql.SQL(" AND ").join(
            sql.SQL("t.{} = {}").format(sql.Identifier(name), _parameter(n))
            for n, name in enumerate(self.table.key, start=parameters_before + 1)
        )


def _identifiers(names: Sequence[str]) -> sql.Composed:
    return sql.SQL(", ").join(sql.Identifier(name) for name in names)


def _equal(names: Sequence[str]) -> sql.Composed:
    return sql.SQL(" AND ").join(sql.SQL("t.{0} = s.{0}").format(sql.Identifier(name)) for name in names)


def _parameter(number: int) -> sql.Composed:
    return sql.SQL("${}").format(sql.Literal(number))
