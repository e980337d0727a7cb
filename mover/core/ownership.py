"""Which tables without the tenant column are owned: their rows are the tenant's by foreign keys. Pure.

A row is the tenant's if one that it refers to is, through one foreign key whose columns are never NULL;
where there is none, through any of those that lead to the tenant. A chain may be of any length and has no
cycle: each table's owners are known before its own.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass

from mover.core.facts import ColumnFacts, Facts, ForeignKey, Relation
from mover.core.ids import Side, TableRef
from mover.core.tables import Holding, Owner, ties

# Equal values of these are written by the same letters, whichever of the types they have.
_SAME_LETTERS = (
    frozenset({"smallint", "integer", "bigint"}),
    frozenset({"text", "character varying"}),
    frozenset({"uuid"}),
    frozenset({"date"}),
)


@dataclass(frozen=True, slots=True)
class Ownership:
    """The owned tables, owners before what they own, each with the foreign keys that decide."""

    keys: Mapping[TableRef, tuple[ForeignKey, ...]]
    unfit: Mapping[TableRef, str]  # tables that hang on the tenant's in a way that cannot be followed: why

    def owners(
        self, table: TableRef, mapped: Callable[[TableRef], TableRef], tenant_column: str
    ) -> tuple[Owner, ...]:
        """None for a table that is not owned."""
        return tuple(
            Owner(
                source=key.parent,
                target=mapped(key.parent),
                columns=key.child_columns,
                referenced=key.parent_columns,
                tenant_column=None if key.parent in self.keys else tenant_column,
                owners=self.owners(key.parent, mapped, tenant_column),
                waits=key.waits,
            )
            for key in self.keys.get(table, ())
        )

    def referenced(self, table: TableRef) -> tuple[tuple[str, ...], ...]:
        """The columns by which owned tables refer to it."""
        found = (key.parent_columns for keys in self.keys.values() for key in keys if key.parent == table)
        return tuple(sorted(set(found)))

    def awaited(self, table: TableRef) -> tuple[str, ...]:
        """After which changes of one of its rows those that refer to it may wait for another."""
        keys = (key for keys in self.keys.values() for key in keys if key.parent == table)
        return tuple(sorted({event for key in keys for event in key.waits}))


def find_ownership(facts: Facts) -> Ownership:
    """That of the source's tables."""
    relations = facts.source.relations
    tenants = {r.ref for r in relations if facts.is_tenant_table(r)}
    candidates = {r.ref: r for r in relations if r.ref not in tenants and _may_be_owned(facts, r)}
    return ownership_of({r.ref: r for r in relations}, facts.source.foreign_keys, tenants, candidates)


def ownership_in(
    relations: Collection[Relation],
    foreign_keys: Sequence[ForeignKey],
    tenant_column: str,
    is_exempt: Callable[[TableRef], bool],
) -> Ownership:
    """That of one side's tables, where there is no plan that says so."""
    there = {r.ref: r for r in relations if not is_exempt(r.ref)}
    tenants = {ref for ref, relation in there.items() if relation.column(tenant_column)}
    candidates = {ref: relation for ref, relation in there.items() if ref not in tenants}
    return ownership_of({r.ref: r for r in relations}, foreign_keys, tenants, candidates)


def holdings_in(
    relations: Collection[Relation],
    foreign_keys: Iterable[ForeignKey],
    tenant_column: str,
    is_exempt: Callable[[TableRef], bool],
) -> list[Holding]:
    """The tables of one side that may have rows of a tenant, owners first. `foreign_keys` may be repeated,
    and of columns that are not there."""
    there = {r.ref: {c.name for c in r.columns} for r in relations}
    keys = {
        (k.child, k.child_columns, k.parent, k.parent_columns): k
        for k in foreign_keys
        if there.get(k.child, set()).issuperset(k.child_columns)
        and there.get(k.parent, set()).issuperset(k.parent_columns)
    }
    ownership = ownership_in(relations, list(keys.values()), tenant_column, is_exempt)
    return [
        *(
            Holding(t, tenant_column)
            for t, names in there.items()
            if tenant_column in names and not is_exempt(t)
        ),
        *(
            Holding(t, None, ties(ownership.owners(t, lambda same: same, tenant_column), Side.TARGET))
            for t in ownership.keys
        ),
    ]


def ownership_of(
    relations: Mapping[TableRef, Relation],
    foreign_keys: Sequence[ForeignKey],
    tenants: set[TableRef],
    candidates: Mapping[TableRef, Relation],
) -> Ownership:
    """`tenants` are the tables with the tenant column, `candidates` those that may be owned."""
    leading: dict[TableRef, list[ForeignKey]] = {}
    for key in foreign_keys:
        if key.child in candidates and key.child != key.parent:
            leading.setdefault(key.child, []).append(key)
    leading = _reachable(leading, tenants)
    keys: dict[TableRef, tuple[ForeignKey, ...]] = {}
    while found := _next(leading, tenants | keys.keys(), keys, candidates):
        keys.update(found)
    unfit = {table: why for table in keys if (why := _unfit(table, keys, foreign_keys, relations))}
    return Ownership(keys, unfit)


def _may_be_owned(facts: Facts, relation: Relation) -> bool:
    exempt = facts.tenancy.reference_tables | facts.tenancy.ignore_tables
    return relation.kind in ("r", "p") and relation.root is None and not facts.listed(relation.ref, exempt)


def _reachable(
    leading: Mapping[TableRef, list[ForeignKey]], tenants: Set[TableRef]
) -> dict[TableRef, list[ForeignKey]]:
    """Of the tables that refer to something, those that lead to the tenant at all: nobody need wait for
    the others."""
    reached = set(tenants)
    while more := {t for t, keys in leading.items() if any(k.parent in reached for k in keys)} - reached:
        reached |= more
    return {table: keys for table, keys in leading.items() if table in reached}


def _next(
    leading: Mapping[TableRef, Sequence[ForeignKey]],
    reached: set[TableRef],
    known: Mapping[TableRef, tuple[ForeignKey, ...]],
    candidates: Mapping[TableRef, Relation],
) -> dict[TableRef, tuple[ForeignKey, ...]]:
    """The tables that `reached` ones own: by a foreign key that is always given, or only then by others, and
    first those of which all that they refer to is known."""
    open_keys = {
        table: [key for key in keys if key.parent in reached]
        for table, keys in leading.items()
        if table not in known
    }
    given = {
        table: sorted(there, key=lambda key: (key.parent in known, key.name))
        for table, keys in open_keys.items()
        if (there := [key for key in keys if set(key.child_columns) <= candidates[table].not_null])
    }
    if given:
        return {table: (keys[0],) for table, keys in given.items()}
    others = {table: tuple(keys) for table, keys in open_keys.items() if keys}
    unknown = leading.keys() - reached
    waiting = {key.child for keys in leading.values() for key in keys if key.parent in unknown}
    return {table: keys for table, keys in others.items() if table not in waiting} or others


def _unfit(
    table: TableRef,
    keys: Mapping[TableRef, tuple[ForeignKey, ...]],
    foreign_keys: Sequence[ForeignKey],
    relations: Mapping[TableRef, Relation],
) -> str | None:
    """Why the rows of an owned table cannot be followed."""
    child = relations[table]
    if child.kind == "p":
        return "is partitioned"
    if not child.key:
        return "has no key (primary or unique, of NOT NULL columns, not DEFERRABLE)"
    is_optional = not set(keys[table][0].child_columns) <= child.not_null
    if is_optional and any(key.child == key.parent == table for key in foreign_keys):
        return "may belong to the tenant by a row of its own only"
    if is_optional and any(
        key.child == table and key.parent in keys and key not in keys[table] for key in foreign_keys
    ):
        return "may belong to the tenant by rows that belong to it by its own"
    for key in keys[table]:
        if why := _unfit_key(key, child, relations[key.parent]):
            return f"by {key.name} {why}"
    return None


def _unfit_key(key: ForeignKey, child: Relation, parent: Relation) -> str | None:
    if not key.validated:
        return "which is NOT VALID: rows may refer to nothing"
    if parent.kind == "p":
        return f"refers to {parent.ref}, which is partitioned: a change of its rows' tenant may not be seen"
    if not set(key.parent_columns) <= parent.not_null:
        return f"refers to columns of {parent.ref} that allow NULL"
    pairs = zip(key.child_columns, key.parent_columns, strict=True)
    columns = [(child.column(mine), parent.column(other)) for mine, other in pairs]
    if not all(_written_alike(*both) for both in columns):
        return f"refers to {parent.ref} by columns whose equal values may be written differently"
    if any(mine and other and mine.is_collated_apart(other) for mine, other in columns):
        return f"refers to {parent.ref} by columns of another collation, which cannot be joined"
    return None


def _written_alike(*columns: ColumnFacts | None) -> bool:
    there = [column for column in columns if column is not None]
    types = {column.type.partition("(")[0] for column in there}
    return all(c.deterministic for c in there) and any(types <= alike for alike in _SAME_LETTERS)
