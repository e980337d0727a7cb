"""The checks of preflight: each a generator of findings, none of which stops another. Pure.

A finding says which object and why; its hint says what to do, as a statement where there is one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from mover.core.facts import Facts, PublicationFacts, Relation
from mover.core.tables import Finding
from mover.engine import reference_checks, server_checks
from mover.engine.table_classes import Classes
from mover.engine.wording import SHOWN, counted, listed


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
            + "; ".join(facts.differences[:SHOWN]),
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
            f"{counted(collision.count, 'value')} of the tenant in {collision.table}"
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
    if not facts.is_streamed:
        return
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
    if not facts.is_streamed:
        return
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
    server_checks.source_server,
    server_checks.encodings,
    server_checks.both_servers,
    _forced_row_security,
    _ownership,
    _identity_indexes,
    _triggers,
    reference_checks.foreign_keys_of_partitions,
    reference_checks.foreign_keys_from_outside,
    reference_checks.references,
    reference_checks.across_tenants,
    reference_checks.orphans,
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
    reference_checks.foreign_keys_of_partitions,
    reference_checks.foreign_keys_from_outside,
    _subscriptions,
    _publications,
)
