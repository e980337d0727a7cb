"""What a partitioned table has to be so that its rows move through its root. Pure.

Changes, guards and copies go by the root, but a replica identity, a trigger's state and a policy are each
partition's own, and a partition that comes later has the defaults.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from mover.core.facts import Facts, Relation
from mover.core.ids import TableRef
from mover.core.tables import Finding


def can_filter(relation: Relation, column: str) -> bool:
    """Whether the server can filter the table's changes by `column`: in a partition that comes later it has
    to be a part of the primary key, or updates there would fail for every tenant."""
    return relation.kind != "p" or _has_primary(relation, column)


def unfit_root(facts: Facts, root: Relation) -> Iterator[Finding]:
    """Why a partitioned table with the tenant column cannot be moved."""
    column = facts.tenancy.column
    outside = [p for p in root.partitions if p.schema not in facts.schemas]
    for partition in outside:
        yield _refusal(
            partition,
            "partition_outside",
            f"is a partition of {root.ref} in a schema that is not moved",
            f"ALTER TABLE {partition} SET SCHEMA {root.ref.schema};",
        )
    if not _has_primary(root):
        yield _refusal(
            root.ref,
            "partition_key",
            "is partitioned, and has no primary key: updates in a partition that is made while the tenant"
            " moves would fail for every tenant",
            f"Give {root.ref} a primary key, not DEFERRABLE.",
        )
        return
    if not facts.is_streamed:
        return
    if not can_filter(root, column):
        yield _everybodys(root, column)
    if not root.identity_covers(_needed(root, column)):
        yield _identity(root, column)


def _everybodys(root: Relation, column: str) -> Finding:
    finding = _refusal(
        root.ref,
        "partition_unfiltered",
        f"is partitioned, and its primary key does not contain {column}: while the tenant moves, everybody's"
        " changes of it are read from the stream",
        f"Make {column} a part of {root.ref}'s primary key where that costs too much.",
    )
    return replace(finding, warning=True)


def unfit_partition(facts: Facts, partition: Relation, root: Relation | None) -> Iterator[Finding]:
    """Why a partition of a tenant table cannot hold rows that move; `root` is None outside our schemas."""
    if root is None:
        exempt = facts.tenancy.reference_tables | facts.tenancy.ignore_tables
        if not facts.listed(partition.ref, exempt):
            yield _refusal(
                partition.ref,
                "partition_outside",
                f"is a partition of {partition.root}, which is in a schema that is not moved",
                f'tenancy.ignore_tables += ["{partition.ref}"] to leave its rows behind.',
            )
        return
    if not facts.is_tenant_table(root):
        return
    column = facts.tenancy.column
    if partition.kind == "f":
        yield _refusal(
            partition.ref,
            "foreign_table",
            f"is a partition of {root.ref} on another server: its changes are not in the WAL",
            f"ALTER TABLE {root.ref} DETACH PARTITION {partition.ref};",
        )
        return
    if partition.persistence != "p":
        yield _refusal(
            partition.ref,
            "unlogged",
            "is unlogged: its changes are not in the WAL",
            f"ALTER TABLE {partition.ref} SET LOGGED;",
        )
    if partition.row_security:
        role = facts.source.server.role
        yield _refusal(
            partition.ref,
            "row_security",
            f"has row-level security that applies to role {role}: it would hide rows",
            f'ALTER ROLE "{role}" BYPASSRLS;',
        )
    is_stored = facts.is_streamed and partition.kind == "r"
    is_unfit = is_stored and not partition.identity_covers(_needed(root, column))
    if _has_primary(root) and is_unfit:  # else the root's is said
        yield _identity(partition, column)


def partial_foreign_keys(facts: Facts, partitions: tuple[Relation, ...]) -> Iterator[Finding]:
    """Those of a single partition, or to one: the tenant's rows are not looked at partition by partition."""
    roots = {p.ref: p.root for p in partitions}
    for key in facts.source.foreign_keys:
        for table in (key.child, key.parent):
            if table in roots:
                yield _refusal(
                    table,
                    "partition_foreign_key",
                    f"is a partition with a foreign key of its own, {key.name} of {key.child}",
                    f"Make it a foreign key of the whole table {roots[table]}, or drop it.",
                )


def _has_primary(root: Relation, *columns: str) -> bool:
    return any(i.primary and i.immediate and {*columns} <= {*i.columns} for i in root.indexes)


def _needed(root: Relation, column: str) -> list[str]:
    """What a change of one of its rows has to carry beside the key."""
    return [column] if can_filter(root, column) else []


def _identity(relation: Relation, column: str) -> Finding:
    return _refusal(
        relation.ref,
        "partition_identity",
        f"is in a partitioned table and has a replica identity without {column} or the key: updates would"
        " fail for every tenant",
        f"ALTER TABLE {relation.ref} REPLICA IDENTITY DEFAULT;",
    )


def _refusal(table: TableRef, code: str, why: str, hint: str) -> Finding:
    return Finding(code, f"table {table} {why}", hint, table=table)
