"""What preflight says where our role may not set session_replication_role. Pure.

There the application's triggers and rules, and foreign keys, act on what we write (`postgres/roles.py`); what
would change rows a second time, and cannot be kept from it, is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from mover.core.facts import Facts, Relation, TriggerFacts
from mover.core.ids import Side
from mover.core.tables import Finding
from mover.engine.table_classes import Classes, parents_first

# A trigger that tells our sessions apart by itself is none to worry about: the catalog's query skips it.
_WHEN = "WHEN (current_setting('mover.tenant', true) IS NULL)"
_SET_NULL, _SET_DEFAULT = "n", "d"


def careful_sides(facts: Facts) -> frozenset[Side]:
    servers = {Side.SOURCE: facts.source.server, Side.TARGET: facts.target.server}
    return frozenset(side for side, server in servers.items() if not server.may_set_replica_role)


def findings(facts: Facts, classes: Classes, careful: frozenset[Side], *, fresh: bool) -> Iterator[Finding]:
    if Side.SOURCE in careful:
        yield from _on_source(facts, classes)
    if Side.TARGET in careful:
        yield from _on_target(facts, classes, fresh)


def _on_source(facts: Facts, classes: Classes) -> Iterator[Finding]:
    yield _slower(facts.source.server.role, Side.SOURCE)
    grant = _grant(facts.source.server.role)
    for relation in classes.touched:
        for trigger in relation.triggers:
            if trigger.on_delete and trigger.enabled == "O":
                yield Finding(
                    "trigger_on_clean_up",
                    f"trigger {trigger.name} of {relation.ref} would fire when the tenant's rows are deleted"
                    " from the source after the move",
                    f"Make it again with {_WHEN}, or {grant}",
                    table=relation.ref,
                )
        yield from _rules(relation, [rule for rule in relation.rules if rule.on_delete], Side.SOURCE, grant)
    moved = {relation.ref for relation in classes.moved}
    for key in facts.source.foreign_keys:
        if key.parent in moved and not key.indexed:
            yield Finding(
                "foreign_key_unindexed",
                f"no index of {key.child} finds the rows that refer to {key.parent} by {key.name}: all is"
                " read for each of the tenant's rows that is deleted from the source after the move",
                f"CREATE INDEX CONCURRENTLY ON {key.child} ({', '.join(key.child_columns)});",
                table=key.child,
                warning=True,
            )


def _on_target(facts: Facts, classes: Classes, fresh: bool) -> Iterator[Finding]:
    """On a fresh target we keep the triggers from firing, as nobody else works there."""
    yield _slower(facts.target.server.role, Side.TARGET)
    grant = _grant(facts.target.server.role)
    for relation in classes.touched:
        twin = relation if fresh else facts.target.relation(facts.mapped(relation.ref))
        if twin is None:
            continue
        yield from _rules(twin, twin.rules, Side.TARGET, grant)
        for trigger in () if fresh else twin.triggers:
            if trigger.enabled == "O":
                yield Finding(
                    "trigger_fires_twice",
                    f"trigger {trigger.name} of {twin.ref} on the target would fire again for what it did on"
                    " the source, and other tenants need it meanwhile",
                    f"Make it again, on both sides, with {_WHEN}, or {grant}",
                    table=twin.ref,
                )
    for relation in filter(classes.is_owned, classes.moved):
        for key in classes.ownership.keys[relation.ref]:
            if key.on_delete == _SET_DEFAULT or key.on_update in (_SET_NULL, _SET_DEFAULT):
                yield Finding(
                    "owned_rows_checked",
                    f"foreign key {key.name} says whose rows of {relation.ref} are, and its SET DEFAULT or"
                    " ON UPDATE SET NULL would give them to others, or to nobody, out of turn",
                    f"Make it again with another action on both sides, or {grant}",
                    table=relation.ref,
                )
    _, cycle = parents_first(classes.moved, facts.source.foreign_keys)
    if cycle and not fresh:
        yield Finding(
            "foreign_key_cycle_checked",
            f"foreign keys form a cycle among {', '.join(str(r.ref) for r in cycle)}, and the target checks"
            " them while rows are copied",
            f"Drop one of them on both sides until the tenant has moved, or {grant}",
            table=cycle[0].ref,
        )


def _rules(relation: Relation, rules: Iterable[TriggerFacts], side: Side, grant: str) -> Iterator[Finding]:
    for rule in rules:
        if rule.enabled in "OA":
            yield Finding(
                "rule",
                f"rule {rule.name} of {relation.ref} would rewrite what is written on the {side}",
                f"Make a trigger of it, or {grant}",
                table=relation.ref,
            )


def _slower(role: str, side: Side) -> Finding:
    return Finding(
        "no_replica_role",
        f"role {role} may not set session_replication_role on the {side}: foreign keys are in force while"
        f" rows are {'removed' if side is Side.SOURCE else 'written'} there, which is slower",
        _grant(role),
        warning=True,
    )


def _grant(role: str) -> str:
    return f'GRANT SET ON PARAMETER session_replication_role TO "{role}";'
