"""What preflight has to say of foreign keys and of the rows that refer by them. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from mover.core.facts import Facts
from mover.core.tables import Finding
from mover.engine.partitions import partial_foreign_keys
from mover.engine.table_classes import Classes
from mover.engine.wording import counted, listed


def foreign_keys_of_partitions(facts: Facts, classes: Classes) -> Iterator[Finding]:
    yield from partial_foreign_keys(facts, classes.partitions)


def foreign_keys_from_outside(facts: Facts, classes: Classes) -> Iterator[Finding]:
    moved = {relation.ref for relation in classes.moved}
    known = {r.ref for r in classes.touched} | {r for r, name in classes.names.items() if name == "refused"}
    for key in facts.source.foreign_keys:
        if key.parent in moved and key.child not in known:
            yield Finding(
                "referenced_from_outside",
                f"foreign key {key.name} of {key.child}, which is not moved, refers to {key.parent}",
                f"Move {key.child} as well, or drop the foreign key.",
                table=key.parent,
            )


def references(facts: Facts, classes: Classes) -> Iterator[Finding]:
    moved = {relation.ref for relation in classes.moved}
    for key in facts.source.foreign_keys:
        parent = facts.mapped(key.parent)
        inside = key.parent.schema in facts.schemas
        if key.child in moved and key.parent not in moved and not inside:
            if parent not in facts.parents_outside:
                yield Finding(
                    "reference_table_missing",
                    f"{key.child} refers to {parent}, which is not on the target",
                    f"Create {parent} on the target and load its rows.",
                    table=key.child,
                )
    role = facts.target.server.role
    for table, privileges in sorted(facts.parents_outside.items()):
        needed = {"SELECT", "REFERENCES"} if facts.fresh else {"SELECT"}
        if missing := listed(sorted(needed - privileges)):
            yield Finding(
                "no_privilege_on_parent",
                f"role {role} lacks {missing} on {table} on the target, to which moved tables refer",
                f'GRANT USAGE ON SCHEMA {table.schema} TO "{role}"; GRANT {missing} ON {table} TO "{role}";',
                table=table,
            )
    for dangling in facts.missing_references:
        key, parent = dangling.foreign_key, facts.mapped(dangling.foreign_key.parent)
        if key.parent.schema not in facts.schemas and parent not in facts.parents_outside:
            continue  # said above
        where = "its schema is not there yet" if facts.fresh and key.parent.schema in facts.schemas else ""
        yield Finding(
            "references_missing" if dangling.count is not None else "references_unchecked",
            f"{counted(dangling.count, 'value')} of {key.child} ({', '.join(key.child_columns)})"
            f" {'are' if dangling.count is not None else 'may be'} missing in {parent} on the target"
            + (f": {where}" if where else ""),
            f"Load the rows of {parent} on the target; tables that are not moved must be there before.",
            table=key.child,
            warning=dangling.count is None,
        )


def across_tenants(facts: Facts, _: Classes) -> Iterator[Finding]:
    for found, of, to in (
        (facts.foreign_parents, "the tenant", "other tenants'"),
        (facts.foreign_children, "other tenants", "the tenant's"),
    ):
        for dangling in found:
            key = dangling.foreign_key
            yield Finding(
                "cross_tenant_reference" if dangling.count is not None else "cross_tenant_unchecked",
                f"{counted(dangling.count, 'row')} of {of} in {key.child}"
                f" {'refer' if dangling.count is not None else 'may refer'} to {to} rows in {key.parent}"
                f" by {key.name}",
                "Correct these references: they cannot survive a move.",
                table=key.child,
                warning=dangling.count is None,
            )


def orphans(facts: Facts, _: Classes) -> Iterator[Finding]:
    for table, count in sorted(facts.orphans.items()):
        yield Finding(
            "orphans",
            f"{counted(count, 'row')} of {table} refer to nothing that says whose they are",
            "They are nobody's, and stay on the source.",
            table=table,
            warning=True,
        )
