"""What an applier knows of the moved tables on the target: their statements, which rows are there, and which
have changed."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import groupby

from mover.core.changes import (
    Change,
    Delete,
    Insert,
    OwnerChange,
    Relation,
    RelationColumn,
    RowChange,
    Truncated,
)
from mover.core.compaction import parts
from mover.core.copying import CopiedRanges, Key
from mover.core.errors import ApplyConflict, PlanOutdated, SchemaChanged, TableUnfit, Where
from mover.core.ids import Side, TableRef, TenantId
from mover.core.membership import followed
from mover.core.tables import MovedTable, Shape
from mover.postgres.layout import Layout
from mover.postgres.merge import Merge
from mover.postgres.owned import OwnedRows

MAX_DIRTY_KEYS = 300_000


class MovedTables:
    """Tables are named as on the source."""

    def __init__(self, shape: Shape, tenant: TenantId) -> None:
        self.careful = Side.TARGET in shape.careful
        self.tenant, self._tenant_text = tenant, str(tenant).encode()
        self._schemas = shape.schemas
        self.merges = {
            t.source: Merge(t, n, tenant, careful=self.careful) for n, t in enumerate(shape.tables)
        }
        self._order = {ref: number for number, ref in enumerate(self.merges)}
        self.moves_by_copy = {ref for ref, merge in self.merges.items() if merge.moves_by_copy}
        self.keyless = frozenset(t.source for t in shape.tables if not t.key)
        self.owned = OwnedRows(followed(shape.tables), tenant, self.copied, self.touch)
        self._layouts: dict[int, Layout] = {}
        self._as_read: dict[TableRef, Relation] = {}
        self._copied: Mapping[TableRef, CopiedRanges] = {}
        self._dirty: dict[TableRef, set[Key]] | None = None
        self._dirty_count = 0

    def set_copied(self, ranges: Mapping[TableRef, CopiedRanges]) -> None:
        self._copied = ranges

    def collect_dirty(self) -> None:
        self._dirty, self._dirty_count = {}, 0

    def dirty(self) -> Mapping[TableRef, frozenset[Key]] | None:
        if self._dirty is None:
            return None
        return {table: frozenset(keys) for table, keys in self._dirty.items()}

    def mapped(self, table: TableRef) -> TableRef:
        """The target's name of a table of the moved schemas."""
        return TableRef(self._schemas.get(table.schema, table.schema), table.name)

    def merge(self, table: TableRef) -> Merge:
        return self.merges[table]

    def order(self, table: TableRef) -> int:
        """Parents first."""
        return self._order[table]

    def in_parts(self, changes: Sequence[Change]) -> Iterator[Truncated | list[RowChange | OwnerChange]]:
        """The changes in order; tables that were truncated together, where foreign keys are in force,
        children first."""
        for truncated, group in groupby(parts(changes), lambda part: isinstance(part, Truncated)):
            if truncated and self.careful:
                yield from sorted(group, key=self._last_parents)
            else:
                yield from group

    def _last_parents(self, part: Truncated | list[RowChange | OwnerChange]) -> int:
        return -self._order.get(part.table, 0) if isinstance(part, Truncated) else 0

    def target_tables(self, changes: Sequence[Change]) -> set[TableRef]:
        """Those that the changes may touch, on the target."""
        return self.reached(
            change.table if isinstance(change, (Truncated, OwnerChange)) else change.relation.table
            for change in changes
        )

    def reached(self, changed: Iterable[TableRef]) -> set[TableRef]:
        """Those that changes of these tables may touch, on the target."""
        tables = set(changed)
        below = {further for table in tables for further in self.owned.below(table)}
        return {self.mapped(table) for table in tables | below}

    def layout(self, relation: Relation) -> Layout:
        """How the stream's rows of `relation` map to the planned table. Raises SchemaChanged.

        A column that the target has followed is not there yet in what was written before it came."""
        found = self._layouts.get(relation.oid)
        if found is None or found.relation is not relation:
            merge = self.merges.get(relation.table)
            if (
                merge is None
                or not _fits(relation, merge.table)
                or (found is not None and _has_other_types(relation, found.relation))
            ):
                raise PlanOutdated(
                    f"{relation.table} has other columns now than when the migration was planned",
                    where=Where(table=relation.table),
                )
            if relation.table in self.keyless and relation.identity != "f":
                raise SchemaChanged(
                    f"{relation.table} has no key, and its replica identity is not FULL any more",
                    where=Where(table=relation.table),
                    hint=f"ALTER TABLE {relation.table} REPLICA IDENTITY FULL; cancel and start again.",
                )
            found = self._layouts[relation.oid] = Layout(relation, merge)
        return found

    def as_read(self, ref: TableRef) -> Relation:
        """A table as its rows are copied; its number is none that a server gives."""
        if ref not in self._as_read:
            table = self.merges[ref].table
            columns = tuple(RelationColumn(c.name, c.name in table.key, 0, -1) for c in table.copied)
            self._as_read[ref] = Relation(-1 - self._order[ref], ref, "d", columns)
        return self._as_read[ref]

    def copied(self, table: TableRef) -> CopiedRanges:
        return self._copied.get(table, _NOTHING)

    @property
    def all_copied(self) -> Mapping[TableRef, CopiedRanges]:
        return self._copied

    def wanted(self, changes: Sequence[RowChange | OwnerChange]) -> list[RowChange | OwnerChange]:
        """The changes of tables of which anything is here yet.

        The publication's filter has seen to the tenant; a foreign row must not pass all the same."""
        wanted: list[RowChange | OwnerChange] = []
        relation: Relation | None = None
        for change in changes:
            if isinstance(change, OwnerChange):
                wanted.append(change)
                continue
            if change.relation is not relation:
                relation = change.relation
                # Only then the stream's description has to fit the plan: what came before a table is
                # copied anew may describe it as it was.
                is_here = not self.copied(relation.table).nothing
                layout = self.layout(relation) if is_here else None
            if layout is None:
                continue
            old = None if isinstance(change, Insert) else change.old
            if old is not None and not layout.identifies(old):
                raise TableUnfit(
                    f"a change of {relation.table} came without the row's key: the replica identity of the"
                    " table, or of a partition, does not cover it",
                    where=Where(table=relation.table),
                    hint="Give it the replica identity back that it had, and resume: it is copied anew.",
                )
            row = change.old if isinstance(change, Delete) else change.new
            if layout.tenant_at is not None and row[layout.tenant_at] != self._tenant_text:
                raise ApplyConflict(
                    f"the stream carried a row of {relation.table} that is not the tenant's",
                    where=Where(table=relation.table),
                    hint="Look for other publications or a changed row filter on the source.",
                )
            wanted.append(change)
        return wanted

    @property
    def collects_dirty(self) -> bool:
        return self._dirty is not None

    def touch(self, table: TableRef, keys: Collection[Key]) -> None:
        """Remember changed keys, as long as they are not too many."""
        if self._dirty is None:
            return
        known = self._dirty.setdefault(table, set())
        self._dirty_count -= len(known)
        known.update(keys)
        self._dirty_count += len(known)
        if self._dirty_count > MAX_DIRTY_KEYS:
            self.touch_everything()

    def touch_everything(self) -> None:
        self._dirty = None


def _fits(relation: Relation, table: MovedTable) -> bool:
    """Whether all its columns are planned, and those that it lacks may be NULL."""
    names = {c.name for c in relation.columns}
    return names <= {c.name for c in table.copied} and all(
        c.name in names or not (c.not_null or c.name in table.key) for c in table.copied
    )


def _has_other_types(relation: Relation, before: Relation) -> bool:
    """In a column that both have."""
    known = {c.name: (c.type_oid, c.type_modifier) for c in before.columns}
    return any((c.type_oid, c.type_modifier) != known[c.name] for c in relation.columns if c.name in known)


_NOTHING = CopiedRanges(())
