"""The checks of preflight: each a generator of findings, none of which stops another. Pure.

A finding says which object and why; its hint says what to do, as a statement where there is one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

from mover.core.facts import Facts, PublicationFacts, Relation
from mover.core.tables import Finding
from mover.engine.partitions import partial_foreign_keys
from mover.engine.table_classes import Classes

# Older minor releases can decode with a stale catalog after DDL and lose changes.
OLDEST_MINOR: Mapping[int, int] = {15: 13, 16: 9, 17: 5}
_SHOWN = 5  # of a long list, in one message


def listed(names: Iterable[str]) -> str:
    every = list(names)
    more = f" and {len(every) - _SHOWN} more" if len(every) > _SHOWN else ""
    return ", ".join(every[:_SHOWN]) + more


def _places(facts: Facts, _: Classes) -> Iterator[Finding]:
    source, target = facts.source.server, facts.target.server
    same_database = (source.system_identifier, source.database) == (target.system_identifier, target.database)
    if same_database and set(facts.schemas) & set(facts.schemas.values()):
        yield Finding(
            "same_place",
            "source and target are the same database and schemas",
            "Choose another vertical or tier, or correct the target's database_url.",
        )
    for schema in sorted(set(facts.schemas) - facts.source.schemas):
        yield Finding(
            "source_schema_missing",
            f"schema {schema} does not exist on the source",
            "Check tenancy.services and tenancy.schema_pattern.",
        )
    missing = sorted(set(facts.schemas.values()) - facts.target.schemas)
    if missing and not facts.fresh:
        yield Finding(
            "target_incomplete",
            f"the target has {listed(sorted(facts.target.schemas))} but not {listed(missing)}",
            "Create the missing schemas with the application's migrations, or drop those that are there.",
        )


def _tenant_known(facts: Facts, classes: Classes) -> Iterator[Finding]:
    if not classes.moved and not classes.findings:
        yield Finding(
            "nothing_to_move",
            f"no table of the source's schemas has the column {facts.tenancy.column}",
            "Check tenancy.column and tenancy.services.",
        )
    elif facts.rows and not any(r.exists for r in facts.rows.values()):
        yield Finding(
            "unknown_tenant",
            f"no table of the source holds a row of tenant {facts.tenant}",
            "Check the tenant's id and its route.",
        )


def _class_findings(_: Facts, classes: Classes) -> Iterator[Finding]:
    yield from classes.findings


def _source_server(facts: Facts, _: Classes) -> Iterator[Finding]:
    server = facts.source.server
    if server.wal_level != "logical":
        yield Finding(
            "wal_level",
            f"wal_level is {server.wal_level} on the source, so that changes cannot be followed",
            "ALTER SYSTEM SET wal_level = logical; then restart the source.",
        )
    if not server.replication:
        yield Finding(
            "no_replication",
            f"role {server.role} lacks REPLICATION on the source",
            f'ALTER ROLE "{server.role}" REPLICATION;',
        )
    for what, free, setting in (
        ("replication slot", server.slots_max - server.slots_used, "max_replication_slots"),
        ("WAL sender", server.senders_max - server.senders_used, "max_wal_senders"),
    ):
        if free < 1:
            yield Finding(
                f"no_free_{setting.removeprefix('max_')}",
                f"the source has no free {what}",
                f"Drop unused slots, or raise {setting} and restart the source.",
            )
    oldest = OLDEST_MINOR.get(server.major)
    if oldest is not None and server.version_num % 10000 < oldest:
        yield Finding(
            "old_minor",
            f"PostgreSQL {server.version} on the source can lose changes while decoding",
            f"Update it to {server.major}.{oldest} or later.",
        )
    if server.slot_wal_keep_mb >= 0:
        yield Finding(
            "slot_wal_keep",
            f"max_slot_wal_keep_size is {server.slot_wal_keep_mb} MB on the source: a slot that falls further"
            " behind is lost",
            "Raise it when the migration is expected to write more than that.",
            warning=True,
        )


def _both_servers(facts: Facts, _: Classes) -> Iterator[Finding]:
    for side, server in (("source", facts.source.server), ("target", facts.target.server)):
        if server.in_recovery:
            yield Finding("standby", f"the {side} is a standby", "Give the URL of the primary.")
        if server.pooled:
            yield Finding(
                "pooler",
                f"a connection pooler stands in front of the {side}",
                "Give a URL that reaches PostgreSQL directly: snapshots and locks need one session.",
            )
        if not server.may_create_schema:
            yield Finding(
                "no_create",
                f"role {server.role} may not create schemas on the {side}",
                f'GRANT CREATE ON DATABASE "{server.database}" TO "{server.role}";',
            )
        if server.connections_free < facts.connections_wanted:
            yield Finding(
                "few_connections",
                f"{server.connections_free} connections are free on the {side},"
                f" up to {facts.connections_wanted} may be used",
                "Lower engine.max_connections_per_database, or raise max_connections.",
                warning=True,
            )
        if server.long_transactions:
            oldest = server.long_transactions[0]
            yield Finding(
                "long_transactions",
                f"{len(server.long_transactions)} transactions are older than a minute on the {side};"
                f" the oldest, of {oldest.application or 'an unnamed application'}"
                f" (pid {oldest.pid or 'none'}), is {oldest.age_seconds:.0f} s old",
                "Preparing waits for them: end them, or expect a delay.",
                warning=True,
            )


def _forced_row_security(facts: Facts, classes: Classes) -> Iterator[Finding]:
    """It would apply to us as the owner of the clone."""
    server = facts.target.server
    for relation in classes.touched:
        if facts.fresh and relation.row_security_forced and not server.bypass_rls:
            yield Finding(
                "row_security",
                f"{facts.mapped(relation.ref)} forces row-level security, and role {server.role}"
                " lacks BYPASSRLS on the target",
                f'ALTER ROLE "{server.role}" BYPASSRLS;',
                table=relation.ref,
            )


def _triggers(_: Facts, classes: Classes) -> Iterator[Finding]:
    """Those that fire under session_replication_role = replica as well."""
    for relation in classes.touched:
        for trigger in relation.triggers:
            if trigger.enabled not in "AR":
                continue
            if trigger.on_delete:
                yield Finding(
                    "delete_trigger",
                    f"trigger {trigger.name} of {relation.ref} would fire when the tenant's rows are deleted"
                    " from the source",
                    f"ALTER TABLE {relation.ref} ENABLE TRIGGER {trigger.name}; makes it an ordinary one.",
                    table=relation.ref,
                )
            else:
                yield Finding(
                    "always_trigger",
                    f"trigger {trigger.name} of {relation.ref} fires also for replicated rows",
                    "Make sure that it does not change what is applied on the target.",
                    table=relation.ref,
                    warning=True,
                )


def _foreign_keys_of_partitions(facts: Facts, classes: Classes) -> Iterator[Finding]:
    yield from partial_foreign_keys(facts, classes.partitions)


def _foreign_keys_from_outside(facts: Facts, classes: Classes) -> Iterator[Finding]:
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


def _references(facts: Facts, classes: Classes) -> Iterator[Finding]:
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
            f"{_count(dangling.count, 'value')} of {key.child} ({', '.join(key.child_columns)})"
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
                f"{_count(dangling.count, 'row')} of {of} in {key.child}"
                f" {'refer' if dangling.count is not None else 'may refer'} to {to} rows in {key.parent}"
                f" by {key.name}",
                "Correct these references: they cannot survive a move.",
                table=key.child,
                warning=dangling.count is None,
            )


def _count(count: int | None, noun: str) -> str:
    if count is None:
        return f"an uncounted number of {noun}s"
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _orphans(facts: Facts, _: Classes) -> Iterator[Finding]:
    for table, count in sorted(facts.orphans.items()):
        yield Finding(
            "orphans",
            f"{_count(count, 'row')} of {table} refer to nothing that says whose they are",
            "They are nobody's, and stay on the source.",
            table=table,
            warning=True,
        )


def _existing_target(facts: Facts, classes: Classes) -> Iterator[Finding]:
    if facts.fresh:
        return
    for migration in sorted(facts.target.unfinished_clones):
        yield Finding(
            "target_in_the_making",
            f"the target's schemas were made by migration {migration}, which has not switched yet",
            "Start this migration when that one has switched or is cancelled.",
        )
    if facts.differences and not facts.target.unfinished_clones:
        yield Finding(
            "target_differs",
            f"the target's schemas differ from the source's in {len(facts.differences)} places: "
            + "; ".join(facts.differences[:_SHOWN]),
            "Bring both sides to the same version of the application's schema.",
        )
    for table in facts.target_tenant_tables:
        yield Finding(
            "tenant_already_there",
            f"{table} on the target already holds rows of this tenant",
            "Delete them there if they are leftovers; rows are never merged.",
            table=table,
        )
    for collision in facts.collisions:
        unknown = collision.count is None
        yield Finding(
            "collision_unchecked" if unknown else "collision",
            f"{_count(collision.count, 'value')} of the tenant in {collision.table}"
            f" {'may be' if unknown else 'are'} taken on the target by other tenants"
            f" (index {collision.index})",
            "A colliding row stops the migration while it is copied; nothing is overwritten."
            if unknown
            else "Change these values on one side; rows of other tenants are never overwritten.",
            table=collision.table,
            warning=unknown,
        )
    for relation in classes.touched:
        twin = facts.target.relation(facts.mapped(relation.ref))
        if twin is not None and not twin.owned:
            yield _not_owned(twin, facts.target.server.role, "target")
        if twin is not None and twin.row_security:
            yield Finding(
                "row_security",
                f"row-level security of {twin.ref} applies to role {facts.target.server.role} on the target",
                f'ALTER ROLE "{facts.target.server.role}" BYPASSRLS;',
                table=twin.ref,
            )


def _ownership(facts: Facts, classes: Classes) -> Iterator[Finding]:
    for relation in classes.touched:
        if not relation.owned:
            yield _not_owned(relation, facts.source.server.role, "source")
        missing = {"SELECT", "DELETE"} - relation.privileges
        if missing:
            yield Finding(
                "no_privilege",
                f"role {facts.source.server.role} lacks {' and '.join(sorted(missing))} on {relation.ref}",
                f'GRANT {", ".join(sorted(missing))} ON {relation.ref} TO "{facts.source.server.role}";',
                table=relation.ref,
            )


def _identity_indexes(facts: Facts, classes: Classes) -> Iterator[Finding]:
    """Where a replica identity has to be built, the table's schema has to let us."""
    role = facts.source.server.role
    building = [
        r
        for r in classes.moved
        if r.key
        and not r.identity_covers(classes.identity(r))
        and r.identity_candidate(classes.identity(r)) is None
    ]
    for schema in sorted({r.ref.schema for r in building} & facts.source.closed_schemas):
        yield Finding(
            "no_create_in_schema",
            f"role {role} may not create indexes in schema {schema} on the source",
            f'GRANT CREATE ON SCHEMA {schema} TO "{role}";',
        )


def _not_owned(relation: Relation, role: str, side: str) -> Finding:
    return Finding(
        "not_owner",
        f"role {role} does not own {relation.ref} on the {side}: triggers, indexes and publications need it",
        f'GRANT "{relation.owner}" TO "{role}";',
        table=relation.ref,
    )


def _subscriptions(facts: Facts, classes: Classes) -> Iterator[Finding]:
    moved = {r.ref for r in classes.touched} | {facts.mapped(r.ref) for r in classes.touched}
    for side in (facts.source, facts.target):
        for subscription in side.subscriptions:
            if subscription.table in moved:
                yield Finding(
                    "subscription",
                    f"subscription {subscription.name} writes into {subscription.table}",
                    "Its writes cannot be fenced: remove the table from the subscription first.",
                    table=subscription.table,
                )


def _publications(facts: Facts, classes: Classes) -> Iterator[Finding]:
    """Those whose UPDATEs would fail, for every tenant, under the replica identity that we need."""
    for relation in classes.moved:
        needed = classes.identity(relation)
        if relation.identity_covers(needed):
            continue
        candidate = relation.identity_candidate(needed)
        key = relation.key or [c.name for c in relation.columns]
        identity = set(candidate.columns) if candidate else {*needed, *key}
        for publication in facts.source.publications:
            if publication.table == relation.ref and _breaks(publication, identity):
                yield Finding(
                    "publication",
                    f"publication {publication.name} of {relation.ref} has a column list or row filter that"
                    f" the replica identity ({', '.join(sorted(identity))}) would break",
                    f"Add these columns to {publication.name}'s list, and filter by them only.",
                    table=relation.ref,
                )


def _breaks(publication: PublicationFacts, identity: set[str]) -> bool:
    sent = publication.columns is None or identity <= set(publication.columns)
    return publication.updates_or_deletes and not (sent and set(publication.filter_columns) <= identity)


def _clone(facts: Facts, classes: Classes) -> Iterator[Finding]:
    """What a clone of the schemas needs on the target, or leaves out."""
    if not facts.fresh:
        return
    target = facts.target.server
    for name in sorted(facts.source.extensions_inside):
        yield Finding(
            "extension_inside",
            f"extension {name} is installed inside a moved schema",
            f"ALTER EXTENSION {name} SET SCHEMA public; extensions are not moved.",
        )
    for name in sorted(facts.source.extensions_needed - facts.source.extensions_inside):
        there, wanted = target.extensions.get(name), facts.source.server.extensions.get(name)
        if there is None:
            yield Finding(
                "extension_missing",
                f"extension {name} is not installed on the target",
                f"CREATE EXTENSION {name}; in the same schema as on the source.",
            )
        elif there != wanted:
            yield Finding(
                "extension_version",
                f"extension {name} is {wanted} on the source and {there} on the target",
                "Make sure that its types have the same text form.",
                warning=True,
            )
    for name in sorted(facts.source.policy_roles - target.roles):
        yield Finding(
            "policy_role_missing",
            f"a policy names role {name}, which is not on the target",
            f'CREATE ROLE "{name}";',
        )
    missing = facts.source.granted_roles - facts.source.policy_roles - target.roles
    if missing:
        yield Finding(
            "grant_roles_missing",
            f"privileges of {listed(sorted(missing))} are left out: no such roles on the target",
            "Create the roles first if they shall keep their privileges.",
            warning=True,
        )
    for relation in classes.moved:
        virtual = [c.name for c in relation.columns if c.generated == "v"]
        if virtual and target.major < 18:
            yield Finding(
                "virtual_column",
                f"{relation.ref} has virtual generated columns ({listed(virtual)}), which PostgreSQL"
                f" {target.major} does not know",
                "Move to PostgreSQL 18 or newer, or make the columns STORED.",
                table=relation.ref,
            )
    for relation in facts.source.relations if target.major < 18 else ():
        for column in relation.columns:
            if column.unproven:
                yield Finding(
                    "not_null_not_valid",
                    f"constraint {column.unproven} of {relation.ref} is NOT NULL and NOT VALID, which"
                    f" PostgreSQL {target.major} does not know",
                    f"ALTER TABLE {relation.ref} VALIDATE CONSTRAINT {column.unproven}; or drop it.",
                    table=relation.ref,
                )
    renamed = any(old != new for old, new in facts.schemas.items())
    for name in facts.source.functions_with_literals if renamed else ():
        yield Finding(
            "schema_in_literal",
            f"function {name} names a moved schema inside a string, which is not renamed",
            "Qualify names outside of strings, or correct the function on the target.",
            warning=True,
        )


CHECKS: tuple[Callable[[Facts, Classes], Iterator[Finding]], ...] = (
    _places,
    _tenant_known,
    _class_findings,
    _source_server,
    _both_servers,
    _forced_row_security,
    _ownership,
    _identity_indexes,
    _triggers,
    _foreign_keys_of_partitions,
    _foreign_keys_from_outside,
    _references,
    across_tenants,
    _orphans,
    _existing_target,
    _subscriptions,
    _publications,
    _clone,
)

# Those that a schema may fail later though it passed before, and that need no look at rows.
TABLE_CHECKS: tuple[Callable[[Facts, Classes], Iterator[Finding]], ...] = (
    _class_findings,
    _ownership,
    _triggers,
    _foreign_keys_of_partitions,
    _foreign_keys_from_outside,
    _subscriptions,
    _publications,
)
