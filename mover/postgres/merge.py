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
from mover.core.ids import Side, TableRef, TenantId
from mover.core.tables import MovedTable
from mover.postgres import holdings, ranges

# The value of the staging table's first column; an update's is UPDATE + the number of its column group.
DELETE, INSERT, UPDATE = 0, 1, 2
Names = tuple[str, ...]
MAX_COLUMNS = 1600  # of any table
# Equal texts are equal values of these, which are quick to hash.
_HASHED_TYPES = frozenset(
    {"bigint", "date", "integer", "smallint", "text", "timestamp with time zone", "uuid"}
)


class Merge:
    """SQL for one table; `number` names its staging table."""

    def __init__(self, table: MovedTable, number: int, tenant: TenantId, *, careful: bool = False) -> None:
        self.table, self._careful = table, careful
        self._target = sql.Identifier(table.target.schema, table.target.name)
        self._stage = sql.Identifier("pg_temp", f"mover_stage_{number}")
        self._operation = sql.Identifier(table.spare("mover_op"))
        holding = table.holding(Side.TARGET)
        self._tenant = holdings.is_tenants(holding, "t", tenant)
        # Of a row that is known to be the tenant's, and whose owner may be gone already.
        self._known = holdings.is_not_others(holding, "t", tenant)
        self._is_always = {c.name for c in table.copied if c.identity_always}
        self._insert_one: dict[Names, bytes] = {}
        self._update_one: dict[Names, bytes] = {}
        self._update_moved: dict[Names, bytes] = {}
        self._always_beside_key = self._is_always - set(table.key)

    @cached_property
    def moves_by_copy(self) -> bool:
        """Whether a changed key takes a new row: a GENERATED ALWAYS identity cannot be assigned to."""
        return not self._is_always.isdisjoint(self.table.key)

    @property
    def can_stage(self) -> bool:
        """Whether the staging table has room for one more column than the table."""
        return not self.table.key or len(self.table.copied) < MAX_COLUMNS

    @cached_property
    def create_stage(self) -> sql.Composed:
        """Columns of the target's types, all nullable; with a key, in front of them what to do."""
        operation = sql.SQL("0::smallint AS {}, " if self.table.key else "").format(self._operation)
        return sql.SQL("CREATE TEMPORARY TABLE {} AS SELECT {}{} FROM {} WITH NO DATA").format(
            self._stage, operation, ranges.columns(self.table.copied), self._target
        )

    def copy_stage(self, names: Names) -> sql.Composed:
        """Lines of the operation and the columns `names`."""
        return sql.SQL("COPY {} ({}, {}) FROM STDIN WITH (NULL {})").format(
            self._stage, self._operation, _identifiers(names), sql.Literal(NULL_OPTION)
        )

    def copy_lines(self, names: Names, *, staged: bool) -> sql.Composed:
        """Lines of the columns `names`, into the table itself or the staging table."""
        return sql.SQL("COPY {} ({}) FROM STDIN WITH (NULL {})").format(
            self._stage if staged else self._target, _identifiers(names), sql.Literal(NULL_OPTION)
        )

    @cached_property
    def clear_stage(self) -> sql.Composed:
        return sql.SQL("TRUNCATE {}").format(self._stage)

    def inside(self, copied: CopiedRanges) -> sql.Composed:
        """Parameters: an array for each key column. The 1-based places of those in the copied ranges."""
        return sql.SQL("SELECT {n} FROM (SELECT n AS {n}, {} FROM {}) AS s WHERE {}").format(
            ranges.unnested(self.table.key_columns, Side.TARGET),
            ranges.unnest([_parameter(n) for n, _ in enumerate(self.table.key, start=1)]),
            ranges.in_ranges(self.table, "s", copied, Side.TARGET),
            n=sql.Identifier(self.table.spare("mover_n")),
        )

    @cached_property
    def delete_all(self) -> sql.Composed:
        return sql.SQL("DELETE FROM {} AS t WHERE {}").format(self._target, self._tenant)

    def delete_partition(self, partition: TableRef) -> sql.Composed:
        name = sql.Identifier(partition.schema, partition.name)
        return sql.SQL("DELETE FROM {} AS t WHERE {}").format(name, self._tenant)

    @cached_property
    def delete_staged(self) -> sql.Composed:
        return sql.SQL("DELETE FROM {} AS t USING {} AS s WHERE {} AND {} AND {}").format(
            self._target, self._stage, self._known, _equal(self.table.key), self._is_staged_for(DELETE)
        )

    @cached_property
    def delete_equal_staged(self) -> sql.Composed:
        """For a table without a key: of the rows that are the same to the letter, as many as are staged.

        Equality of types would be too much (1.0 = 1.00) or not be there at all (json). One scan of the
        tenant's rows, or of those that an index finds, however many are staged; only rows that agree in the
        columns of plain types are looked at as a whole."""
        plain = [
            c.name
            for c in self.table.copied
            if c.not_null and c.target_type in _HASHED_TYPES and c.name != self.table.tenant_column
        ]
        return sql.SQL(
            "WITH w AS MATERIALIZED ("
            "SELECT {staged} AS mover_row, count(*) AS mover_copies FROM {stage} AS s GROUP BY 1),"
            " c AS MATERIALIZED (SELECT t.ctid AS mover_place, {row} AS mover_row FROM {target} AS t"
            " WHERE {tenant} AND EXISTS (SELECT FROM {stage} AS s WHERE {same})),"
            " f AS (SELECT c.mover_place, w.mover_copies, row_number() OVER (PARTITION BY c.mover_row)"
            " AS mover_copy FROM w JOIN c ON c.mover_row = w.mover_row)"
            " DELETE FROM {target} AS t WHERE {tenant} AND t.ctid = ANY (ARRAY("
            "SELECT mover_place FROM f WHERE mover_copy <= mover_copies))"
        ).format(
            staged=self._row("s"),
            row=self._row("t"),
            stage=self._stage,
            target=self._target,
            same=_equal(plain) if plain else sql.SQL("true"),
            tenant=self._tenant,
        )

    def _row(self, alias: str) -> sql.Composed:
        """A row as the digest of its text, which tells NULL from an empty text and no value from its
        neighbour."""
        row = ranges.columns(self.table.copied, alias)
        return sql.SQL("sha256(convert_to(ROW({})::text, 'UTF8'))").format(row)

    def insert_staged(self, names: Names) -> sql.Composed:
        return sql.SQL(
            "INSERT INTO {0} ({1}) OVERRIDING SYSTEM VALUE SELECT {1} FROM {2} AS s WHERE {3}"
        ).format(self._target, _identifiers(names), self._stage, self._is_staged_for(INSERT))

    def update_staged(self, names: Names, group: int) -> sql.Composed:
        """The rows of one column group; `names` are the columns whose values were sent."""
        assignments = sql.SQL(", ").join(
            sql.SQL("{0} = s.{0}").format(sql.Identifier(name)) for name in self.assigned(names)
        )
        same = _equal((*self.table.key, *self._kept(names)))
        return sql.SQL("UPDATE {} AS t SET {} FROM {} AS s WHERE {} AND {} AND {}").format(
            self._target, assignments, self._stage, self._known, same, self._is_staged_for(UPDATE + group)
        )

    def _is_staged_for(self, operation: int) -> sql.Composed:
        return sql.SQL("s.{} = {}").format(self._operation, sql.Literal(operation))

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
            used = self.used_by_update(names)
            found = self._update_one[names] = self._update(used, self._key_from(len(used)))
        return found

    def update_moved(self, names: Names) -> bytes:
        """For a row that a foreign key's action may have given its new key already. Parameters: the values
        of `used_by_update(names)`, the old key, the new key."""
        found = self._update_moved.get(names)
        if found is None:
            used = self.used_by_update(names)
            old, new = self._key_from(len(used)), self._key_from(len(used) + len(self.table.key))
            either = sql.SQL("(({}) OR ({}))").format(old, new)
            found = self._update_moved[names] = self._update(used, either)
        return found

    def _update(self, names: Names, key: sql.Composed) -> bytes:
        # Where foreign keys act, the old row must not go, or others would go with it.
        is_replaced = self._always_beside_key and not self._careful
        make = self._replace_one if is_replaced else self._set_one
        return make(names, key).as_bytes()

    def _set_one(self, names: Names, key: sql.Composed) -> sql.Composed:
        """A row whose GENERATED ALWAYS identity has another value now is not found."""
        assignments = sql.SQL(", ").join(
            sql.SQL("{} = {}").format(sql.Identifier(name), _parameter(n))
            for n, name in enumerate(names, start=1)
            if name not in self._is_always
        )
        kept = [
            sql.SQL("t.{} = {}").format(sql.Identifier(name), _parameter(n))
            for n, name in enumerate(names, start=1)
            if name in self._always_beside_key
        ]
        return sql.SQL("UPDATE {} AS t SET {} WHERE {}").format(
            self._target, assignments, sql.SQL(" AND ").join([self._known, key, *kept])
        )

    def _replace_one(self, names: Names, key: sql.Composed) -> sql.Composed:
        """A new row in the old one's place: its GENERATED ALWAYS identity may have another value now."""
        types = {column.name: ranges.type_on(column, Side.TARGET) for column in self.table.copied}
        place = {name: _parameter(n) for n, name in enumerate(names, start=1)}
        values = sql.SQL(", ").join(
            sql.SQL("{}::{}").format(place[name], type)
            if name in place
            else sql.SQL("t.{}").format(sql.Identifier(name))
            for name, type in types.items()
        )
        return sql.SQL(
            "WITH t AS (DELETE FROM {target} AS t WHERE {tenant} AND {key} RETURNING t.*)"
            " INSERT INTO {target} ({names}) OVERRIDING SYSTEM VALUE SELECT {values} FROM t"
        ).format(
            target=self._target,
            tenant=self._known,
            key=key,
            names=_identifiers(list(types)),
            values=values,
        )

    @cached_property
    def delete_one(self) -> bytes:
        """Parameters: the old key."""
        statement = sql.SQL("DELETE FROM {} AS t WHERE {} AND {}")
        return statement.format(self._target, self._known, self._key_from(0)).as_bytes()

    def assigned(self, names: Names) -> Names:
        """The columns that an update can set."""
        return tuple(name for name in names if name not in self._is_always)

    def used_by_update(self, names: Names) -> Names:
        return names if self._always_beside_key else self.assigned(names)

    def _kept(self, names: Names) -> Names:
        """Identity columns beside the key that cannot be assigned: a row whose value changed is not
        found, rather than silently left with the old one, and the batch is replayed in source order."""
        return tuple(name for name in names if name in self._always_beside_key)

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
