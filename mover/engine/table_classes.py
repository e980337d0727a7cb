"""Which class each relation of the moved schemas is in: tenant, owned, partition, reference, ignored or
refused. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace

from mover.core.facts import Facts, ForeignKey, Relation
from mover.core.ids import TableRef
from mover.core.ownership import Ownership, find_ownership
from mover.core.tables import MAX_SCANNED_ROWS, Finding
from mover.engine.partitions import can_filter, unfit_partition, unfit_root


@dataclass(frozen=True, slots=True)
class Classes:
    """`moved` are the tenant and owned tables without a reason to refuse them; `partitions` store their
    rows."""

    moved: tuple[Relation, ...]
    partitions: tuple[Relation, ...]
    names: Mapping[TableRef, str]
    findings: tuple[Finding, ...]
    ownership: Ownership
    tenant_column: str

    def is_owned(self, relation: Relation) -> bool:
        return relation.ref in self.ownership.keys

    def identity(self, relation: Relation) -> tuple[str, ...]:
        """What changes have to carry in the stream beside the key."""
        referenced = (name for names in self.ownership.referenced(relation.ref) for name in names)
        return (*((self.tenant_column,) if self.is_filtered(relation) else ()), *referenced)

    def is_filtered(self, relation: Relation) -> bool:
        """Whether the server can send the tenant's changes only."""
        return not self.is_owned(relation) and can_filter(relation, self.tenant_column)

    @property
    def touched(self) -> tuple[Relation, ...]:
        """The tables on which we make something, or which we read or delete from by name."""
        return (*self.moved, *self.partitions)


def classify(facts: Facts) -> Classes:
    moved: list[Relation] = []
    names: dict[TableRef, str] = {}
    findings: list[Finding] = []
    ownership = find_ownership(facts)
    for relation in facts.source.relations:
        if relation.kind == "v":
            continue
        reasons = list(_reasons(facts, relation, ownership))
        findings += reasons
        is_refused = any(not reason.warning for reason in reasons)
        names[relation.ref] = _class(facts, relation, ownership, is_refused)
        if names[relation.ref] in ("tenant", "owned"):
            moved.append(relation)
    roots = {relation.ref for relation in moved}
    partitions = tuple(r for r in facts.source.relations if r.root in roots)
    return Classes(tuple(moved), partitions, names, tuple(findings), ownership, facts.tenancy.column)


def _class(facts: Facts, relation: Relation, ownership: Ownership, is_refused: bool) -> str:
    if is_refused:
        return "refused"
    if relation.root is not None:
        return "partition"
    if facts.listed(relation.ref, facts.tenancy.reference_tables):
        return "reference"
    if relation.ref in ownership.keys:
        return "owned"
    return "tenant" if facts.is_tenant_table(relation) else "ignored"


def _reasons(facts: Facts, relation: Relation, ownership: Ownership) -> Iterator[Finding]:
    if relation.root is not None:
        yield from unfit_partition(facts, relation, facts.source.relation(relation.root))
        return
    exempt = facts.tenancy.reference_tables | facts.tenancy.ignore_tables
    if facts.listed(relation.ref, exempt):
        return
    if relation.kind == "m":
        yield Finding(
            "materialized_view",
            f"materialised view {relation.ref} is not moved, and not refreshed",
            f"REFRESH MATERIALIZED VIEW {facts.mapped(relation.ref)}; on the target after the switch.",
            table=relation.ref,
            warning=True,
        )
    elif relation.kind == "f":
        yield _refusal(relation, "foreign_table", "is a foreign table", _exempting(relation))
    elif facts.is_tenant_table(relation):
        yield from _unfit(facts, relation)
    elif relation.ref in ownership.keys:
        yield from _unfit_owned(facts, relation, ownership)
    else:
        yield _refusal(
            relation, "no_tenant_column", f"has no column {facts.tenancy.column}", _exempting(relation)
        )


def _unfit_owned(facts: Facts, relation: Relation, ownership: Ownership) -> Iterator[Finding]:
    """Why a table whose rows are the tenant's by foreign keys cannot be moved."""
    if why := ownership.unfit.get(relation.ref):
        yield _refusal(
            relation,
            "owned_table",
            f"belongs to the tenant by foreign keys only, and {why}",
            f"Give it the column {facts.tenancy.column}.",
        )
    else:
        yield _owned(facts, relation, ownership)
    yield from _unfit_storage(facts, relation)


def _owned(facts: Facts, relation: Relation, ownership: Ownership) -> Finding:
    parents = ", ".join(sorted({str(key.parent) for key in ownership.keys[relation.ref]}))
    return replace(
        _refusal(
            relation,
            "owned_rows",
            f"belongs to the tenant by foreign keys to {parents}: while the tenant moves, everybody's writes"
            f" to it look that up{', and all of them are read from the stream' if facts.is_streamed else ''};"
            f" the columns of these keys, and those of {parents}, can be neither dropped nor retyped before"
            " the source is cleaned up",
            f"Give it the column {facts.tenancy.column} where that costs too much.",
        ),
        warning=True,
    )


def _unfit(facts: Facts, relation: Relation) -> Iterator[Finding]:
    """Why a table with the tenant column cannot be moved."""
    yield from _unfit_storage(facts, relation)
    if relation.kind == "p":
        yield from unfit_root(facts, relation)
    if relation.kind == "r" and not relation.key:
        yield _keyless(facts, relation)
    column = relation.column(facts.tenancy.column)
    if column is not None and not column.not_null:
        yield _refusal(
            relation,
            "nullable_tenant_column",
            f"allows NULL in {column.name}: such rows belong to nobody",
            f"ALTER TABLE {relation.ref} ALTER COLUMN {column.name} SET NOT NULL;",
        )
    if column is not None and not column.can_name_tenants:
        yield _refusal(
            relation,
            "tenant_column_type",
            f"has {column.name} of type {column.type}"
            + ("" if column.deterministic else ", whose collation takes different texts for equal"),
            "The tenant column must be uuid, text or character varying, under a deterministic collation.",
        )


def _unfit_storage(facts: Facts, relation: Relation) -> Iterator[Finding]:
    """Why nobody's rows of the table could be moved."""
    if relation.inherits:
        yield _refusal(
            relation,
            "inheritance",
            "is part of an inheritance tree, whose rows stand in several tables",
            f"Partition it instead, or end it with ALTER TABLE {relation.ref} NO INHERIT …;",
        )
    if relation.persistence != "p":
        yield _refusal(
            relation,
            "unlogged",
            "is unlogged: its changes are not in the WAL",
            f"ALTER TABLE {relation.ref} SET LOGGED;",
        )
    if relation.row_security:
        role = facts.source.server.role
        yield _refusal(
            relation,
            "row_security",
            f"has row-level security that applies to role {role}: it would hide rows",
            f'ALTER ROLE "{role}" BYPASSRLS;',
        )


def _keyless(facts: Facts, relation: Relation) -> Finding:
    """Without a key a row is found by all of its values, which changes carry under REPLICA IDENTITY FULL."""
    hint = f"ALTER TABLE {relation.ref} ADD PRIMARY KEY (…);"
    rows = facts.rows.get(relation.ref)
    is_large = rows is not None and rows.rows > MAX_SCANNED_ROWS
    late = "; since it is large, what changes last is compared only after the switch" if is_large else ""
    if facts.is_streamed and facts.source.server.major >= 18 and any(c.generated for c in relation.columns):
        return _refusal(
            relation,
            "no_key_generated_columns",
            "has generated columns and no key: PostgreSQL 18 would refuse everybody's changes of it",
            hint,
        )
    return replace(
        _refusal(
            relation,
            "no_key",
            "has no key (primary or unique, of NOT NULL columns, not DEFERRABLE): while the tenant moves,"
            f" {'every' if facts.is_streamed else 'the'} tenant's updates and deletes write whole rows to the"
            f" {'WAL' if facts.is_streamed else 'log'}, and the tenant's are found by a scan{late}",
            hint,
        ),
        warning=True,
    )


def _refusal(relation: Relation, code: str, why: str, hint: str) -> Finding:
    return Finding(code, f"table {relation.ref} {why}", hint, table=relation.ref)


def _exempting(relation: Relation) -> str:
    return (
        f'tenancy.reference_tables += ["{relation.ref}"] when it is the same on both sides,'
        f' or tenancy.ignore_tables += ["{relation.ref}"] to leave it behind.'
    )


def parents_first(
    relations: Sequence[Relation], foreign_keys: Sequence[ForeignKey]
) -> tuple[list[Relation], list[Relation]]:
    """The relations in an order that foreign keys allow, otherwise by name; and those in a cycle, of which
    the first by name is taken as if it had no parents."""
    waiting = sorted(relations, key=lambda r: r.ref)
    parents = {r.ref: {k.parent for k in foreign_keys if k.child == r.ref != k.parent} for r in waiting}
    ordered: list[Relation] = []
    while waiting:
        left = {r.ref for r in waiting}
        ready = [r for r in waiting if not parents[r.ref] & left]
        ready = ready or [next(r for r in waiting if _is_own_ancestor(r.ref, parents, left))]
        ordered += ready
        waiting = [r for r in waiting if r not in ready]
    everywhere = set(parents)
    return ordered, [r for r in ordered if _is_own_ancestor(r.ref, parents, everywhere)]


def _is_own_ancestor(
    table: TableRef, parents: Mapping[TableRef, Set[TableRef]], among: Set[TableRef]
) -> bool:
    found: set[TableRef] = set()
    new = parents[table] & among
    while new:
        found |= new
        new = {parent for child in new for parent in parents[child] & among} - found
    return table in found
