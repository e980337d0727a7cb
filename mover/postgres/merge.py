"""The statements that apply changes to one table: composed once, scoped to the tenant in every case.

Two ways, the same effect: a staged batch merged by set statements, and single statements in source
order. Locks: ROW EXCLUSIVE on the table and the rows themselves. Safe to repeat only as a whole: the
progress of the same transaction says whether it was done.
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


class Merge:
    """SQL for one table; `number` names its staging table."""

    def __init__(self, table: MovedTable, number: int, tenant: TenantId) -> None:
        self.table = table
        self._target = sql.Identifier(table.target.schema, table.target.name)
        self._stage = sql.Identifier("pg_temp", f"mover_stage_{number}")
        self._tenant = sql.SQL("t.{} = {}").format(
            sql.Identifier(table.tenant_column), sql.Literal(str(tenant))
        )
        self._same_key = sql.SQL(" AND ").join(
            sql.SQL("t.{0} = s.{0}").format(sql.Identifier(name)) for name in table.key
        )
        self._settable = {c.name for c in table.copied if not c.identity_always}

    @cached_property
    def create_stage(self) -> sql.Composed:
        """Columns of the target's types, all nullable, in front of them what to do."""
        return sql.SQL(
            "CREATE TEMPORARY TABLE {} AS SELECT 0::smallint AS mover_op, {} FROM {} WITH NO DATA"
        ).format(self._stage, ranges.columns(self.table.copied), self._target)

    def copy_stage(self, names: Sequence[str]) -> sql.Composed:
        return sql.SQL("COPY {} (mover_op, {}) FROM STDIN WITH (NULL {})").format(
            self._stage, _identifiers(names), sql.Literal(NULL_OPTION)
        )

    @cached_property
    def clear_stage(self) -> sql.Composed:
        return sql.SQL("TRUNCATE {}").format(self._stage)

    def drop_uncopied(self, copied: CopiedRanges) -> sql.Composed:
        """Changes of rows that a later wave copies."""
        inside = ranges.in_ranges(self.table, "s", copied, Side.TARGET)
        return sql.SQL("DELETE FROM {} AS s WHERE NOT {}").format(self._stage, inside)

    @cached_property
    def delete_all(self) -> sql.Composed:
        return sql.SQL("DELETE FROM {} AS t WHERE {}").format(self._target, self._tenant)

    @cached_property
    def delete_staged(self) -> sql.Composed:
        return sql.SQL("DELETE FROM {} AS t USING {} AS s WHERE {} AND {} AND s.mover_op = {}").format(
            self._target, self._stage, self._tenant, self._same_key, sql.Literal(DELETE)
        )

    def insert_staged(self, names: Sequence[str]) -> sql.Composed:
        return sql.SQL(
            "INSERT INTO {0} ({1}) OVERRIDING SYSTEM VALUE SELECT {1} FROM {2} WHERE mover_op = {3}"
        ).format(self._target, _identifiers(names), self._stage, sql.Literal(INSERT))

    def update_staged(self, names: Sequence[str], group: int) -> sql.Composed:
        """The rows of one column group; `names` are the columns whose values were sent."""
        assignments = sql.SQL(", ").join(
            sql.SQL("{0} = s.{0}").format(sql.Identifier(name)) for name in self._assigned(names)
        )
        return sql.SQL("UPDATE {} AS t SET {} FROM {} AS s WHERE {} AND {} AND s.mover_op = {}").format(
            self._target, assignments, self._stage, self._tenant, self._same_key, sql.Literal(UPDATE + group)
        )

    def insert_one(self, names: Sequence[str]) -> sql.Composed:
        return sql.SQL("INSERT INTO {} ({}) OVERRIDING SYSTEM VALUE VALUES ({})").format(
            self._target, _identifiers(names), sql.SQL(", ").join([sql.Placeholder()] * len(names))
        )

    def update_one(self, names: Sequence[str]) -> sql.Composed:
        """Parameters: the values of `assigned(names)`, then the old key."""
        assignments = sql.SQL(", ").join(
            sql.SQL("{} = {}").format(sql.Identifier(name), sql.Placeholder())
            for name in self._assigned(names)
        )
        return sql.SQL("UPDATE {} AS t SET {} WHERE {} AND {}").format(
            self._target, assignments, self._tenant, self._key_is_parameter
        )

    @cached_property
    def delete_one(self) -> sql.Composed:
        """Parameters: the old key."""
        return sql.SQL("DELETE FROM {} AS t WHERE {} AND {}").format(
            self._target, self._tenant, self._key_is_parameter
        )

    def assigned(self, names: Sequence[str]) -> list[str]:
        """The columns that `update_one(names)` sets, in its parameter order."""
        return list(self._assigned(names))

    def _assigned(self, names: Sequence[str]) -> list[str]:
        # GENERATED ALWAYS identity takes no assignment; its value cannot have changed in place
        return [name for name in names if name in self._settable]

    @cached_property
    def _key_is_parameter(self) -> sql.Composed:
        return sql.SQL(" AND ").join(
            sql.SQL("t.{} = {}").format(sql.Identifier(name), sql.Placeholder()) for name in self.table.key
        )


def _identifiers(names: Sequence[str]) -> sql.Composed:
    return sql.SQL(", ").join(sql.Identifier(name) for name in names)
