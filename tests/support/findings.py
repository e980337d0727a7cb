"""Every finding of preflight with facts that bring it up, and docs/refusals.md, which is made of them.

`python -m tests.support.findings` writes the page.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import mover.engine
from mover.core.facts import (
    Collision,
    ColumnFacts,
    Dangling,
    Facts,
    ForeignKey,
    LongTransaction,
    PublicationFacts,
    Relation,
    Rows,
    SubscriptionFacts,
    Tenancy,
    TriggerFacts,
)
from mover.core.ids import TableRef
from mover.core.tables import Finding
from mover.engine.preflight import judge
from tests.support.facts import KEY, SERVER, column, facts, key, server, table

PAGE = Path(__file__).parents[2] / "docs/refusals.md"
_HEAD = """# What preflight says

Every refusal and every warning, each with an example of its words. Refusals come all at once, before anything
is touched; warnings do not stop a migration. `mover migrate … --dry-run` shows them without starting one.

| code | says, for example | and what to do |
|---|---|---|
"""
DOCUMENTS = TableRef("core_dms", "documents")
ON_TARGET = TableRef("realestate_dms", "documents")
OUTSIDE = ForeignKey("country_fk", DOCUMENTS, TableRef("shared", "countries"), ("country",), ("code",))
INSIDE = key("documents", "folders")
OTHER_SERVER = replace(SERVER, system_identifier="2", version_num=180004)
PARTITIONED_KEY = replace(KEY, columns=("tenant_id", "id"))


def existing(**changes: object) -> Mapping[str, object]:
    """A target whose schemas are there already."""
    twin = table("documents", ref=ON_TARGET)
    return {"schemas": frozenset({"realestate_dms"}), "relations": (twin,), **changes}


def shared(**of_twin: object) -> Mapping[str, object]:
    """A target with other tenants, and a role that may not set session_replication_role."""
    twin = table("documents", ref=ON_TARGET, **of_twin)
    return existing(relations=(twin,), server=replace(OTHER_SERVER, may_set_replica_role=False))


def partitioned(**of_partition: object) -> tuple[Relation, Relation]:
    """A partitioned table that could move, and its partition, which `of_partition` changes."""
    name = TableRef("core_dms", "visits_2026")
    root = table("visits", kind="p", indexes=(PARTITIONED_KEY,), partitions=(name,))
    leaf = table("visits_2026", root=root.ref, indexes=(PARTITIONED_KEY,))
    return root, replace(leaf, **of_partition)


def examples() -> Mapping[str, Facts]:
    """By the finding's code."""
    long = (LongTransaction(7, "report", 900.0),)
    theirs = PublicationFacts("theirs", DOCUMENTS, ("id",), (), True)
    virtual = ColumnFacts("v", "text", False, generated="v", identity="", collatable=True)
    old = replace(OTHER_SERVER, version_num=160014, extensions={"vector": "0.8"})
    no_tenant = table("logs", columns=(column("id"),))
    note = table("notes", columns=(column("id"), column("parent_id")))
    ignoring = Tenancy("tenant_id", ignore_tables=frozenset({"core_dms.logs"}))
    foreign_root = table("visits_2026", root=TableRef("elsewhere", "visits"))
    return {
        "same_place": facts(target={"server": SERVER}, schemas={"core_dms": "core_dms"}),
        "source_schema_missing": facts(source={"schemas": frozenset()}),
        "target_incomplete": facts(
            target=existing(), schemas={"core_dms": "realestate_dms", "core_crm": "realestate_crm"}
        ),
        "nothing_to_move": facts(table("documents", kind="v")),
        "unknown_tenant": facts(rows={DOCUMENTS: Rows(0, 0, exact=True, exists=False)}),
        "wal_level": facts(source=server(wal_level="replica")),
        "capture_by_triggers": facts(source=server(wal_level="replica", replication=False), capture=None),
        "no_replication": facts(source=server(replication=False)),
        "no_free_replication_slots": facts(source=server(slots_used=10)),
        "no_free_wal_senders": facts(source=server(senders_used=10)),
        "old_minor": facts(source=server(version_num=160008)),
        "slot_wal_keep": facts(source=server(slot_wal_keep_mb=512)),
        "standby": facts(source=server(in_recovery=True)),
        "encoding": facts(source=server(encoding="LATIN1")),
        "pooler": facts(source=server(pooled=True)),
        "no_create": facts(source=server(may_create_schema=False)),
        "schema_of_a_stranger": facts(source=server(strangers=("app",))),
        "no_replica_role": facts(source=server(may_set_replica_role=False)),
        "trigger_on_clean_up": facts(
            table("documents", triggers=(TriggerFacts("audit", True, "O"),)),
            source=server(may_set_replica_role=False),
        ),
        "foreign_key_unindexed": facts(
            table("documents"),
            table("folders"),
            foreign_keys=[replace(INSIDE, indexed=False)],
            source=server(may_set_replica_role=False),
        ),
        "trigger_fires_twice": facts(target=shared(triggers=(TriggerFacts("touch", False, "O"),))),
        "rule": facts(target=shared(rules=(TriggerFacts("keep", True, "O"),))),
        "owned_rows_checked": facts(
            table("documents"),
            note,
            foreign_keys=[replace(key("notes", "documents"), on_delete="d")],
            target=shared(),
        ),
        "foreign_key_cycle_checked": facts(
            table("documents"),
            table("folders"),
            foreign_keys=[INSIDE, key("folders", "documents")],
            target=shared(),
        ),
        "few_connections": facts(source=server(connections_used=90)),
        "long_transactions": facts(source=server(long_transactions=long)),
        "no_tenant_column": facts(table("documents"), no_tenant),
        "owned_table": facts(
            table("documents"), replace(note, indexes=()), foreign_keys=[key("notes", "documents")]
        ),
        "owned_rows": facts(table("documents"), note, foreign_keys=[key("notes", "documents")]),
        "orphans": facts(orphans={note.ref: 3}),
        "no_key": facts(table("documents", indexes=())),
        "no_key_generated_columns": facts(
            table("documents", indexes=(), columns=(column("tenant_id"), replace(virtual, generated="s"))),
            source={"server": replace(SERVER, version_num=180004)},
        ),
        "nullable_tenant_column": facts(
            table("documents", columns=(column("id"), column("tenant_id", not_null=False)))
        ),
        "tenant_column_type": facts(
            table("documents", columns=(column("id"), column("tenant_id", "integer")))
        ),
        "unlogged": facts(table("documents", persistence="u")),
        "inheritance": facts(table("documents", inherits=True)),
        "foreign_table": facts(table("documents"), table("remote", kind="f")),
        "materialized_view": facts(table("documents"), table("totals", kind="m")),
        "partition_key": facts(table("visits", kind="p", indexes=())),
        "partition_unfiltered": facts(table("visits", kind="p", indexes=(KEY,))),
        "partition_outside": facts(table("documents"), foreign_root),
        "partition_identity": facts(*partitioned(replica_identity="n")),
        "partition_foreign_key": facts(
            *partitioned(), table("documents"), foreign_keys=[key("visits_2026", "documents")]
        ),
        "row_security": facts(table("documents", row_security=True)),
        "not_owner": facts(table("documents", owned=False, owner="app")),
        "no_privilege": facts(table("documents", privileges=frozenset({"SELECT"}))),
        "no_create_in_schema": facts(source={"closed_schemas": frozenset({"core_dms"})}),
        "delete_trigger": facts(table("documents", triggers=(TriggerFacts("audit", True, "A"),))),
        "always_trigger": facts(table("documents", triggers=(TriggerFacts("audit", False, "A"),))),
        "referenced_from_outside": facts(
            table("documents"), no_tenant, foreign_keys=[key("logs", "documents")], tenancy=ignoring
        ),
        "reference_table_missing": facts(foreign_keys=[OUTSIDE]),
        "no_privilege_on_parent": facts(
            foreign_keys=[OUTSIDE], parents_outside={OUTSIDE.parent: frozenset({"SELECT"})}
        ),
        "references_missing": facts(
            foreign_keys=[OUTSIDE],
            parents_outside={OUTSIDE.parent: frozenset({"SELECT", "REFERENCES"})},
            missing_references=(Dangling(OUTSIDE, 3),),
        ),
        "references_unchecked": facts(
            foreign_keys=[OUTSIDE],
            parents_outside={OUTSIDE.parent: frozenset({"SELECT", "REFERENCES"})},
            missing_references=(Dangling(OUTSIDE, None),),
        ),
        "cross_tenant_reference": facts(foreign_parents=(Dangling(INSIDE, 2),)),
        "cross_tenant_unchecked": facts(foreign_parents=(Dangling(INSIDE, None),)),
        "target_in_the_making": facts(target=existing(unfinished_clones=frozenset({"6f1c…"}))),
        "target_differs": facts(
            target=existing(), differences=("column documents.title is missing on the target",)
        ),
        "tenant_already_there": facts(target=existing(), target_tenant_tables=(ON_TARGET,)),
        "collision": facts(target=existing(), collisions=(Collision(ON_TARGET, "documents_slug_key", 4),)),
        "collision_unchecked": facts(target=existing(), collisions=(Collision(ON_TARGET, "slug", None),)),
        "subscription": facts(source={"subscriptions": (SubscriptionFacts("theirs", DOCUMENTS),)}),
        "publication": facts(source={"publications": (theirs,)}),
        "extension_inside": facts(source={"extensions_inside": frozenset({"hstore"})}),
        "extension_missing": facts(source={"extensions_needed": frozenset({"citext"})}),
        "extension_version": facts(
            source={
                "extensions_needed": frozenset({"vector"}),
                "server": replace(SERVER, extensions={"vector": "0.7"}),
            },
            target={"server": old},
        ),
        "policy_role_missing": facts(source={"policy_roles": frozenset({"app"})}),
        "grant_roles_missing": facts(source={"granted_roles": frozenset({"app", "report"})}),
        "virtual_column": facts(
            table("documents", columns=(column("id"), column("tenant_id"), virtual)), target={"server": old}
        ),
        "not_null_not_valid": facts(
            table("documents", columns=(replace(column("id"), unproven="id_given"), column("tenant_id"))),
            target={"server": old},
        ),
        "schema_in_literal": facts(source={"functions_with_literals": ("core_dms.purge()",)}),
        "foreign_key_cycle": facts(
            table("documents"), table("folders"), foreign_keys=[INSIDE, key("folders", "documents")]
        ),
    }


def example(code: str) -> Finding:
    """What preflight says to the example of `code`."""
    return next(f for f in judge(examples()[code]).findings if f.code == code)


def codes_in_the_source() -> Iterator[str]:
    """The codes that preflight's modules write down: the first argument that is one."""
    for module in Path(mover.engine.__path__[0]).glob("*.py"):
        for node in ast.walk(ast.parse(module.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("Finding", "_refusal"):
                for argument in node.args[:2]:
                    yield from _codes(argument)


def _codes(argument: ast.expr) -> Iterator[str]:
    if isinstance(argument, ast.Constant) and str(argument.value).replace("_", "").isalpha():
        yield str(argument.value)
    elif isinstance(argument, ast.IfExp):
        yield from _codes(argument.body)
        yield from _codes(argument.orelse)


def page() -> str:
    lines = []
    for code in sorted(examples()):
        finding = example(code)
        kind = "<br>warning" if finding.warning else ""
        lines.append(f"| `{code}`{kind} | {_cell(finding.message)} | {_cell(finding.hint)} |\n")
    return _HEAD + "".join(lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page())
