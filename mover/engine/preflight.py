"""The judgement before a migration: facts in, a plan with every reason to refuse out. Pure.

What can be wrong is in `preflight_checks`; which table is moved, in `table_classes`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from mover.core.ddl import rename_schemas
from mover.core.errors import Refused, Where
from mover.core.facts import Facts, Relation, ServerFacts
from mover.core.ids import Capture, Side
from mover.core.tables import Column, Finding, MovedTable, Plan, SequenceRef, Shape
from mover.engine import ordinary_roles, table_classes
from mover.engine.preflight_checks import CHECKS, TABLE_CHECKS
from mover.engine.reference_checks import across_tenants
from mover.engine.server_checks import source_server
from mover.engine.table_classes import Classes
from mover.engine.wording import listed


def judge(facts: Facts) -> Plan:
    """The plan, with all refusals and warnings at once.

    Where nobody has said how changes are to be followed, it is by the WAL, unless something refuses that
    which triggers could do without."""
    return _by_what_serves(facts, _judge)


def judge_back(facts: Facts, there: Shape, prepared: Capture | None) -> Plan:
    """The plan of the way back from where `there` leads, by the same rules. `facts` are of the two sides with
    their roles swapped; they have no counts. `prepared`: it stays as it is, and has what it needs."""
    tables = tuple(replace(t, source=t.target, target=t.source) for t in there.tables)
    careful = frozenset({Side.SOURCE: Side.TARGET, Side.TARGET: Side.SOURCE}[side] for side in there.careful)
    before = replace(there, tables=tables, fresh=False, careful=careful)

    def judged(facts: Facts) -> Plan:
        capture = Capture.WAL if facts.is_streamed else Capture.TRIGGER
        shape, refusals = judge_again(facts, replace(before, capture=capture))
        if prepared is not None:
            return Plan(shape, refusals)
        servers = source_server(facts, table_classes.classify(facts))
        return Plan(shape, (*refusals, *(finding for finding in servers if not finding.warning)))

    return _by_what_serves(replace(facts, capture=prepared or facts.capture, is_back=True), judged)


def _by_what_serves(facts: Facts, judged: Callable[[Facts], Plan]) -> Plan:
    if facts.capture is not None:
        return judged(facts)
    streamed = judged(replace(facts, capture=Capture.WAL))
    if not streamed.refusals:
        return streamed
    written = judged(replace(facts, capture=Capture.TRIGGER))
    left = {finding.message for finding in written.refusals}
    if reasons := [finding for finding in streamed.refusals if finding.message not in left]:
        return replace(written, findings=(_by_triggers(reasons), *written.findings))
    return streamed


def _by_triggers(reasons: Sequence[Finding]) -> Finding:
    return Finding(
        "capture_by_triggers",
        f"changes are captured by triggers, since {'; '.join(finding.message for finding in reasons)}",
        "Nothing to do; the tenant's own writes cost more so. For the WAL instead: "
        + " ".join(finding.hint for finding in reasons),
        warning=True,
    )


def _judge(facts: Facts) -> Plan:
    classes = table_classes.classify(facts)
    ordered, cycle = table_classes.parents_first(classes.moved, facts.source.foreign_keys)
    findings = [finding for check in CHECKS for finding in check(facts, classes)]
    careful = ordinary_roles.careful_sides(facts)
    findings += ordinary_roles.findings(facts, classes, careful, fresh=facts.fresh)
    if cycle:
        findings.append(_cycle(cycle))
    return Plan(
        shape=_shape(facts, classes, ordered),
        findings=tuple(findings),
        classes={str(ref): name for ref, name in classes.names.items()},
        facts=_shown_facts(facts, classes),
    )


def refusal(plan: Plan) -> Refused:
    """Every refusal in one error: which, why, what to do."""
    first, *others = plan.refusals
    if not others:
        return Refused(first.message, where=Where(table=first.table), hint=first.hint)
    reasons = [f"({n}) {f.message}: {f.hint}" for n, f in enumerate(plan.refusals, start=1)]
    return Refused(" ".join(reasons), hint="Nothing was changed. A dry run shows whether all are gone.")


def judge_again(facts: Facts, before: Shape) -> tuple[Shape, tuple[Finding, ...]]:
    """The shape by the same rules once the migration has begun, and the refusals that a change of the
    schemas can bring. `facts` has no counts: the estimates of `before` are kept."""
    facts = replace(facts, capture=before.capture)
    classes = table_classes.classify(facts)
    ordered, _ = table_classes.parents_first(classes.moved, facts.source.foreign_keys)
    known = {t.source: t for t in before.tables}
    shape = _shape(facts, classes, ordered)
    tables = (
        replace(t, estimated_rows=old.estimated_rows, estimated_bytes=old.estimated_bytes)
        if (old := known.get(t.source))
        else t
        for t in shape.tables
    )
    findings = [finding for check in TABLE_CHECKS for finding in check(facts, classes)]
    findings += ordinary_roles.findings(facts, classes, before.careful, fresh=before.fresh)
    refusals = tuple(finding for finding in findings if not finding.warning)
    kept = replace(shape, tables=tuple(tables), fresh=before.fresh, careful=before.careful)
    return kept, refusals


def judge_references(facts: Facts) -> tuple[Finding, ...]:
    """What is to be said of rows that refer across tenants, the refusals first."""
    findings = across_tenants(facts, table_classes.classify(facts))
    return tuple(sorted(findings, key=lambda finding: finding.warning))


def _shape(facts: Facts, classes: Classes, ordered: list[Relation]) -> Shape:
    return Shape(
        schemas=dict(facts.schemas),
        tables=tuple(_moved_table(facts, classes, relation) for relation in ordered),
        sequences=_sequences(facts, classes),
        fresh=facts.fresh,
        careful=ordinary_roles.careful_sides(facts),
        capture=Capture.WAL if facts.is_streamed else Capture.TRIGGER,
    )


def _moved_table(facts: Facts, classes: Classes, relation: Relation) -> MovedTable:
    column, ownership = facts.tenancy.column, classes.ownership
    rows = facts.rows.get(relation.ref)
    return MovedTable(
        source=relation.ref,
        target=facts.mapped(relation.ref),
        columns=tuple(
            Column(
                name=column.name,
                source_type=column.type,
                target_type=rename_schemas(column.type, facts.schemas),
                generated=bool(column.generated),
                identity_always=column.identity == "a",
                not_null=column.not_null,
                collatable=column.collatable,
            )
            for column in relation.columns
        ),
        key=relation.key,
        tenant_column=None if classes.is_owned(relation) else column,
        estimated_rows=rows.rows if rows else 0,
        estimated_bytes=rows.bytes if rows else 0,
        owners=ownership.owners(relation.ref, facts.mapped, column),
        referenced=ownership.referenced(relation.ref),
        awaited=ownership.awaited(relation.ref),
        sends_all=facts.is_streamed and not classes.is_filtered(relation),
    )


def _sequences(facts: Facts, classes: Classes) -> tuple[SequenceRef, ...]:
    """Those of moved tables, and those that no table owns: code may draw from them by name."""
    moved = {relation.ref for relation in classes.touched}
    return tuple(
        SequenceRef(s.ref, facts.mapped(s.ref))
        for s in facts.source.sequences
        if s.owner is None or s.owner in moved
    )


def _shown_facts(facts: Facts, classes: Classes) -> dict[str, object]:
    return {
        "source": _shown_server(facts.source.server),
        "target": _shown_server(facts.target.server),
        "fresh_target": facts.fresh,
        "capture": (Capture.WAL if facts.is_streamed else Capture.TRIGGER).value,
        "rows": sum(r.rows for r in facts.rows.values()),
        "bytes": sum(r.bytes for r in facts.rows.values()),
        "rows_exact": all(r.exact for r in facts.rows.values()),
        "replica_identity_changes": [
            str(r.ref)
            for r in classes.moved
            if facts.is_streamed and not r.identity_covers(classes.identity(r))
        ],
    }


def _shown_server(server: ServerFacts) -> dict[str, object]:
    return {
        "version": server.version,
        "system_identifier": server.system_identifier,
        "timeline": server.timeline,
        "wal_level": server.wal_level,
        "role": server.role,
        "free_slots": server.slots_max - server.slots_used,
        "free_wal_senders": server.senders_max - server.senders_used,
        "free_connections": server.connections_free,
        "max_slot_wal_keep_mb": server.slot_wal_keep_mb,
        "long_transactions": len(server.long_transactions),
    }


def _cycle(tables: list[Relation]) -> Finding:
    return Finding(
        "foreign_key_cycle",
        f"foreign keys form a cycle among {listed(str(t.ref) for t in tables)}",
        "Nothing to do: rows are copied before the foreign keys are there, or without checking them, and"
        " every row is compared at the end.",
        warning=True,
    )
