"""Pure: which tables of two databases hold the tenant's rows, and which of them can be compared.

A migration has its plan; without one the catalogs of both sides say what belongs together.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from mover.core.ddl import rename_schemas
from mover.core.facts import ColumnFacts, ForeignKey, Relation, Tenancy
from mover.core.ids import Side, TableRef
from mover.core.ownership import ownership_in
from mover.core.tables import Column, MovedTable, Owner
from verify.compare import Fingerprints

_TABLE_KINDS = ("r", "p")


@dataclass(frozen=True, slots=True)
class Pairing:
    """What is compared and what is not; tables under the source's names."""

    tables: tuple[MovedTable, ...]
    fingerprints: Fingerprints
    incomparable: Mapping[TableRef, str]  # each with its reason: the two sides are not known to be equal
    left_out: tuple[TableRef, ...]  # reference tables, and those whose rows are nobody's


def pair(
    source: Sequence[Relation],
    target: Sequence[Relation],
    foreign_keys: Sequence[ForeignKey],
    schemas: Mapping[str, str],
    tenancy: Tenancy,
) -> Pairing:
    """`schemas` maps the source's to the target's; both sides' relations are those of these schemas, and
    `foreign_keys` the source's."""
    back = {theirs: ours for ours, theirs in schemas.items()}
    ours = {r.ref: r for r in source if _is_whole(r, schemas.keys())}
    theirs = {TableRef(back[r.ref.schema], r.ref.name): r for r in target if _is_whole(r, schemas.values())}
    ownership = ownership_in(
        list(ours.values()), foreign_keys, tenancy.column, lambda table: _is_listed(table, tenancy)
    )
    tables: list[MovedTable] = []
    incomparable: dict[TableRef, str] = {}
    left_out: list[TableRef] = []
    for ref in sorted(ours.keys() | theirs.keys()):
        one, other = ours.get(ref), theirs.get(ref)
        there = [r for r in (one, other) if r is not None]
        is_owned = ref in ownership.keys
        if _exempt(there, tenancy) or not (is_owned or any(r.column(tenancy.column) for r in there)):
            left_out.append(ref)
        elif reason := _reason(one, other, tenancy, is_owned) or ownership.unfit.get(ref):
            incomparable[ref] = reason
        elif one is not None and other is not None:
            owners = ownership.owners(ref, lambda table: _mapped(table, schemas), tenancy.column)
            tables.append(_paired(one, other, None if owners else tenancy.column, owners))
    return Pairing(tuple(tables), _fingerprints(ours, theirs, schemas), incomparable, tuple(left_out))


def _mapped(table: TableRef, schemas: Mapping[str, str]) -> TableRef:
    return TableRef(schemas.get(table.schema, table.schema), table.name)


def _is_whole(relation: Relation, schemas: Collection[str]) -> bool:
    """Whether it is a table, and not a partition of one that is compared as a whole."""
    is_part = relation.root is not None and relation.root.schema in schemas
    return relation.kind in _TABLE_KINDS and not is_part


def _exempt(relations: Sequence[Relation], tenancy: Tenancy) -> bool:
    return any(_is_listed(relation.ref, tenancy) for relation in relations)


def _is_listed(table: TableRef, tenancy: Tenancy) -> bool:
    return str(table) in tenancy.reference_tables | tenancy.ignore_tables


def _reason(ours: Relation | None, theirs: Relation | None, tenancy: Tenancy, is_owned: bool) -> str | None:
    """Why the rows of a tenant table cannot be compared."""
    if ours is None:
        return "is on the target only"
    if theirs is None:
        return "is missing on the target"
    if ours.inherits or theirs.inherits:
        return "inherits: not supported by this version"
    if ours.key != theirs.key:
        return "has no key that is the same on both sides"
    if {c.name for c in _copied(ours)} != {c.name for c in _copied(theirs)}:
        return "has other columns on the target"
    if not is_owned and (ours.column(tenancy.column) is None or theirs.column(tenancy.column) is None):
        return f"has {tenancy.column} on one side only"
    return None


def _copied(relation: Relation) -> list[ColumnFacts]:
    return [column for column in relation.columns if not column.generated]


def _paired(
    ours: Relation, theirs: Relation, tenant_column: str | None, owners: tuple[Owner, ...]
) -> MovedTable:
    types = {column.name: column.type for column in theirs.columns}
    return MovedTable(
        source=ours.ref,
        target=theirs.ref,
        columns=tuple(
            Column(
                name=column.name,
                source_type=column.type,
                target_type=types[column.name],
                identity_always=column.identity == "a",
                not_null=column.not_null,
                collatable=column.collatable,
            )
            for column in _copied(ours)
        ),
        key=ours.key,
        tenant_column=tenant_column,
        owners=owners,
    )


def _fingerprints(
    ours: Mapping[TableRef, Relation], theirs: Mapping[TableRef, Relation], schemas: Mapping[str, str]
) -> Fingerprints:
    """Columns and types as the target spells them."""
    return {
        Side.SOURCE: {ref: rename_schemas(_described(relation), schemas) for ref, relation in ours.items()},
        Side.TARGET: {ref: _described(relation) for ref, relation in theirs.items()},
    }


def _described(relation: Relation) -> str:
    return "\n".join(sorted(f"{c.name} {c.type} {c.not_null}" for c in _copied(relation)))
