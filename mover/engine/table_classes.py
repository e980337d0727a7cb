"""Which class each relation of the moved schemas is in: tenant, reference, ignored or refused. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from mover.core.facts import Facts, ForeignKey, Relation
from mover.core.ids import TableRef
from mover.core.tables import Finding


@dataclass(frozen=True, slots=True)
class Classes:
    """`moved` are the tenant tables without a reason to refuse them."""

    moved: tuple[Relation, ...]
    names: Mapping[TableRef, str]
    findings: tuple[Finding, ...]


def classify(facts: Facts) -> Classes:
    moved: list[Relation] = []
    names: dict[TableRef, str] = {}
    findings: list[Finding] = []
    owned = _owned_tables(facts)
    for relation in facts.source.relations:
        if relation.kind == "v":
            continue
        reasons = list(_reasons(facts, relation, owned))
        findings += reasons
        names[relation.ref] = _class(facts, relation, any(not r.warning for r in reasons))
        if names[relation.ref] == "tenant":
            moved.append(relation)
    return Classes(tuple(moved), names, tuple(findings))


def _class(facts: Facts, relation: Relation, refused: bool) -> str:
    if refused:
        return "refused"
    if facts.listed(relation.ref, facts.tenancy.reference_tables):
        return "reference"
    return "tenant" if facts.is_tenant_table(relation) else "ignored"


def _reasons(facts: Facts, relation: Relation, owned: frozenset[TableRef]) -> Iterator[Finding]:
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
    elif relation.ref in owned:
        yield _refusal(
            relation,
            "owned_table",
            "belongs to the tenant by foreign keys only: rows owned through foreign keys are not"
            " supported by this version",
            f"Give it the column {facts.tenancy.column}.",
        )
    else:
        yield _refusal(
            relation, "no_tenant_column", f"has no column {facts.tenancy.column}", _exempting(relation)
        )


def _unfit(facts: Facts, relation: Relation) -> Iterator[Finding]:
    """Why a table with the tenant column cannot be moved."""
    if relation.kind == "p" or relation.inherits:
        kind = "partitioned" if relation.kind == "p" else "part of an inheritance or partition tree"
        yield _refusal(
            relation, "partitioned", f"is {kind}: not supported by this version", _exempting(relation)
        )
    if relation.persistence != "p":
        yield _refusal(
            relation,
            "unlogged",
            "is unlogged: its changes are not in the WAL",
            f"ALTER TABLE {relation.ref} SET LOGGED;",
        )
    if not relation.key:
        yield _refusal(
            relation,
            "no_primary_key",
            "has no primary key: its changes cannot be followed",
            f"ALTER TABLE {relation.ref} ADD PRIMARY KEY (…);",
        )
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
            f"has {column.name} of type {column.type}",
            "The tenant column must be uuid, text or character varying.",
        )
    if relation.row_security:
        role = facts.source.server.role
        yield _refusal(
            relation,
            "row_security",
            f"has row-level security that applies to role {role}: it would hide rows",
            f'ALTER ROLE "{role}" BYPASSRLS;',
        )


def _refusal(relation: Relation, code: str, why: str, hint: str) -> Finding:
    return Finding(code, f"table {relation.ref} {why}", hint, table=relation.ref)


def _exempting(relation: Relation) -> str:
    return (
        f'tenancy.reference_tables += ["{relation.ref}"] when it is the same on both sides,'
        f' or tenancy.ignore_tables += ["{relation.ref}"] to leave it behind.'
    )


def _owned_tables(facts: Facts) -> frozenset[TableRef]:
    """Tables without the tenant column from which a chain of foreign keys leads to a tenant table."""
    reached = {r.ref for r in facts.source.relations if facts.is_tenant_table(r)}
    exempt = facts.tenancy.reference_tables | facts.tenancy.ignore_tables
    candidates = {
        r.ref
        for r in facts.source.relations
        if r.ref not in reached and not facts.listed(r.ref, exempt) and r.kind in ("r", "p")
    }
    owned: set[TableRef] = set()
    growing = True
    while growing:
        children = {k.child for k in facts.source.foreign_keys if k.parent in reached | owned}
        growing = not children & candidates <= owned
        owned |= children & candidates
    return frozenset(owned)


def parents_first(
    relations: Sequence[Relation], foreign_keys: Sequence[ForeignKey]
) -> tuple[list[Relation], list[Relation]]:
    """The relations in an order that foreign keys allow, otherwise by name; and those in or behind a
    cycle, which keep their order."""
    waiting = sorted(relations, key=lambda r: r.ref)
    ordered: list[Relation] = []
    while waiting:
        left = {r.ref for r in waiting}
        blocked = {k.child for k in foreign_keys if k.parent in left and k.parent != k.child}
        ready = [r for r in waiting if r.ref not in blocked]
        if not ready:
            return ordered + waiting, waiting
        ordered += ready
        waiting = [r for r in waiting if r.ref in blocked]
    return ordered, []
