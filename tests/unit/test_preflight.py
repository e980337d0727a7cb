"""Preflight's judgement on facts that no test server need be broken for."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mover.core.facts import (
    Collision,
    ColumnFacts,
    Dangling,
    ForeignKey,
    LongTransaction,
    PublicationFacts,
    Rows,
    SubscriptionFacts,
    Tenancy,
    TriggerFacts,
)
from mover.core.ids import Capture, Side, TableRef
from mover.engine.preflight import judge, judge_again, judge_references
from tests.support.facts import KEY, SERVER, column, facts, key, server, table
from tests.support.findings import partitioned


def found(some_facts):
    return [(f.code, f.warning) for f in judge(some_facts).findings]


def test_a_sound_migration_has_no_findings():
    plan = judge(facts())
    assert plan.findings == ()
    assert [(str(t.source), str(t.target)) for t in plan.shape.tables] == [
        ("core_dms.documents", "realestate_dms.documents")
    ]
    assert plan.classes == {"core_dms.documents": "tenant"}
    assert plan.facts["source"]["version"] == "16.14"


@pytest.mark.parametrize(
    ("changes", "code", "warning"),
    [
        ({"wal_level": "replica"}, "wal_level", False),
        ({"replication": False}, "no_replication", False),
        ({"slots_used": 10}, "no_free_replication_slots", False),
        ({"senders_used": 10}, "no_free_wal_senders", False),
        ({"version_num": 160008}, "old_minor", False),
        ({"version_num": 150012}, "old_minor", False),
        ({"version_num": 170004}, "old_minor", False),
        ({"in_recovery": True}, "standby", False),
        ({"encoding": "LATIN1"}, "encoding", False),
        ({"encoding": "SQL_ASCII"}, "encoding", False),
        ({"pooled": True}, "pooler", False),
        ({"may_create_schema": False}, "no_create", False),
        ({"strangers": ("app",)}, "schema_of_a_stranger", False),
        ({"may_set_replica_role": False}, "no_replica_role", True),
        ({"slot_wal_keep_mb": 512}, "slot_wal_keep", True),
        ({"connections_used": 90}, "few_connections", True),
        ({"long_transactions": (LongTransaction(7, "report", 900.0),)}, "long_transactions", True),
    ],
)
def test_each_lack_of_the_source_is_found(changes, code, warning):
    assert found(facts(source=server(**changes))) == [(code, warning)]


@pytest.mark.parametrize("version_num", [150013, 160009, 170005, 180000])
def test_minor_versions_that_decode_well_are_accepted(version_num):
    assert found(facts(source=server(version_num=version_num))) == []


@pytest.mark.parametrize(
    "changes", [{"wal_level": "replica"}, {"replication": False}, {"slots_used": 10}, {"version_num": 160008}]
)
def test_a_source_that_does_not_decode_is_followed_by_triggers_unless_somebody_insists(changes):
    """The plan says why."""
    source = server(**changes)
    (refusal,) = judge(facts(source=source)).refusals
    plan = judge(facts(source=source, capture=None))
    assert plan.refusals == () and plan.shape.capture is Capture.TRIGGER
    (warning,) = plan.findings
    assert warning.code == "capture_by_triggers"
    assert refusal.message in warning.message and refusal.hint in warning.hint
    asked = judge(facts(source=source, capture=Capture.TRIGGER))
    assert asked.findings == () and asked.shape == plan.shape


def test_a_source_that_decodes_is_streamed_and_a_refusal_that_triggers_share_changes_nothing():
    assert judge(facts(capture=None)).shape.capture is Capture.WAL
    plan = judge(facts(table("documents", persistence="u"), capture=None))
    assert plan.shape.capture is Capture.WAL
    assert [f.code for f in plan.refusals] == ["unlogged"]
    both = facts(table("documents", persistence="u"), source=server(wal_level="replica"), capture=None)
    assert [f.code for f in judge(both).findings] == ["capture_by_triggers", "unlogged"]


def test_captured_by_triggers_a_table_needs_no_replica_identity():
    root, leaf = partitioned(replica_identity="n")
    assert found(facts(root, leaf)) == [("partition_identity", False)]
    assert found(facts(root, leaf, capture=Capture.TRIGGER)) == []


def test_once_begun_a_migration_keeps_its_way_of_capture():
    by_triggers = judge(facts(capture=Capture.TRIGGER)).shape
    assert judge_again(facts(capture=None), by_triggers) == (by_triggers, ())


def test_all_refusals_come_at_once_with_a_hint_each():
    plan = judge(
        facts(
            table("documents", columns=(column("id"),)),
            table("folders", persistence="u"),
            source=server(wal_level="replica", replication=False),
        )
    )
    assert {f.code for f in plan.refusals} == {
        "no_tenant_column",
        "unlogged",
        "wal_level",
        "no_replication",
    }
    assert all(f.hint and f.message for f in plan.findings)


def test_parents_come_before_children_and_a_cycle_is_noted():
    keys = [key("a_child", "b_parent"), key("b_parent", "c_root"), key("c_root", "c_root")]
    tables = [table(name) for name in ("a_child", "b_parent", "c_root")]
    plan = judge(facts(*tables, foreign_keys=keys))
    assert [t.source.name for t in plan.shape.tables] == ["c_root", "b_parent", "a_child"]
    assert plan.findings == ()

    plan = judge(facts(*tables, foreign_keys=[*keys, key("c_root", "a_child")]))
    assert [t.source.name for t in plan.shape.tables] == ["a_child", "c_root", "b_parent"]
    assert [(f.code, f.warning) for f in plan.findings] == [("foreign_key_cycle", True)]


def test_exempt_tables_are_known_by_either_sides_name():
    tables = (table("documents"), table("countries", columns=(column("id"),)))
    for listed in ("core_dms.countries", "realestate_dms.countries"):
        tenancy = Tenancy("tenant_id", reference_tables=frozenset({listed}))
        plan = judge(facts(*tables, tenancy=tenancy))
        assert plan.refusals == ()
        assert plan.classes["core_dms.countries"] == "reference"
    tenancy = Tenancy("tenant_id", ignore_tables=frozenset({"core_dms.documents"}))
    assert judge(facts(tables[0], tenancy=tenancy)).classes == {"core_dms.documents": "ignored"}


def test_an_exempt_table_that_refers_to_moved_rows_is_refused():
    tables = (table("documents"), table("audit", columns=(column("id"),)))
    tenancy = Tenancy("tenant_id", ignore_tables=frozenset({"core_dms.audit"}))
    plan = judge(facts(*tables, foreign_keys=[key("audit", "documents")], tenancy=tenancy))
    assert [f.code for f in plan.refusals] == ["referenced_from_outside"]


@pytest.mark.parametrize(
    ("columns", "filter_columns", "updates", "refused"),
    [
        (("id", "title"), (), True, True),
        (("id", "tenant_id", "title"), (), True, False),
        (None, ("title",), True, True),
        (None, ("tenant_id",), True, False),
        (("id",), (), False, False),
    ],
)
def test_publications_that_the_new_identity_would_break_are_refused(
    columns, filter_columns, updates, refused
):
    documents = table("documents")
    publication = PublicationFacts("theirs", documents.ref, columns, filter_columns, updates)
    plan = judge(facts(documents, source={"publications": (publication,)}))
    assert [f.code for f in plan.refusals] == (["publication"] if refused else [])
    assert plan.facts["replica_identity_changes"] == ["core_dms.documents"]


def test_publications_do_not_matter_where_the_identity_stays():
    documents = table("documents", replica_identity="f")
    publication = PublicationFacts("theirs", documents.ref, ("id",), (), True)
    assert judge(facts(documents, source={"publications": (publication,)})).findings == ()


def test_subscriptions_into_moved_tables_are_refused_on_both_sides():
    theirs = SubscriptionFacts("s", TableRef("core_dms", "documents"))
    mapped = SubscriptionFacts("s", TableRef("realestate_dms", "documents"))
    plan = judge(facts(source={"subscriptions": (theirs,)}, target={"subscriptions": (mapped,)}))
    assert [f.code for f in plan.refusals] == ["subscription", "subscription"]


@pytest.mark.parametrize(
    ("enabled", "on_delete", "expected"),
    [
        ("O", True, []),
        ("D", True, []),
        ("A", True, [("delete_trigger", False)]),
        ("R", True, [("delete_trigger", False)]),
        ("A", False, [("always_trigger", True)]),
    ],
)
def test_triggers_that_cannot_be_bypassed_are_found(enabled, on_delete, expected):
    documents = table("documents", triggers=(TriggerFacts("t", on_delete, enabled),))
    assert found(facts(documents)) == expected


ORDINARY = server(may_set_replica_role=False)
ORDINARY_TARGET = {"server": replace(ORDINARY["server"], system_identifier="2")}
TOUCH, AUDIT = TriggerFacts("touch", False, "O"), TriggerFacts("audit", True, "O")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"source": ORDINARY}, [("trigger_on_clean_up", "audit"), ("rule", "kept")]),
        ({"target": ORDINARY_TARGET}, [("rule", "kept")]),
        ({}, []),
    ],
)
def test_what_would_fire_for_us_is_found_where_it_cannot_be_bypassed(changes, expected):
    """On a fresh target we keep the triggers out ourselves."""
    documents = table("documents", triggers=(TOUCH, AUDIT), rules=(replace(AUDIT, name="kept"),))
    plan = judge(facts(documents, **changes))
    assert [(f.code, f.message.split()[1]) for f in plan.refusals] == expected
    assert plan.shape.careful == frozenset(Side(side) for side in changes)


def test_what_would_act_for_a_second_time_among_other_tenants_is_refused():
    tables = table("documents", triggers=(TOUCH,)), table("folders")
    keys = [key("documents", "folders"), key("folders", "documents")]
    twin = table("documents", ref=TableRef("realestate_dms", "documents"), triggers=(TOUCH,))
    target = {"schemas": frozenset({"realestate_dms"}), "relations": (twin,)}
    plan = judge(facts(*tables, foreign_keys=keys, target={**target, **ORDINARY_TARGET}))
    assert [f.code for f in plan.refusals] == ["trigger_fires_twice", "foreign_key_cycle_checked"]
    assert judge(facts(*tables, foreign_keys=keys, target=target)).refusals == ()


def test_how_a_side_is_written_is_decided_once():
    documents = table("documents")
    before = judge(facts(documents, target=ORDINARY_TARGET)).shape
    granted, refusals = judge_again(facts(documents), before)
    assert (granted.careful, refusals) == (frozenset({Side.TARGET}), ())
    audited = facts(table("documents", triggers=(AUDIT,)))
    _, refusals = judge_again(audited, replace(before, careful=frozenset({Side.SOURCE})))
    assert [f.code for f in refusals] == ["trigger_on_clean_up"]


def test_a_role_that_owns_nothing_is_told_whose_membership_it_needs():
    plan = judge(facts(table("documents", owned=False, owner="app", privileges=frozenset({"SELECT"}))))
    assert [(f.code, f.hint) for f in plan.refusals] == [
        ("not_owner", 'GRANT "app" TO "mover";'),
        ("no_privilege", 'GRANT DELETE ON core_dms.documents TO "mover";'),
    ]


def test_forced_row_security_matters_on_a_fresh_target():
    documents = table("documents", row_security_forced=True)
    assert found(facts(documents)) == [("row_security", False)]
    bypassing = replace(SERVER, system_identifier="2", bypass_rls=True)
    assert found(facts(documents, target={"server": bypassing})) == []


def test_what_could_not_be_counted_is_a_warning():
    documents = TableRef("realestate_dms", "documents")
    outside = ForeignKey("fk", TableRef("core_dms", "documents"), TableRef("auth", "o"), ("a",), ("b",))
    plan = judge(
        facts(
            foreign_keys=[outside],
            target={
                "schemas": frozenset({"realestate_dms"}),
                "relations": (table("documents", ref=documents),),
            },
            parents_outside={outside.parent: frozenset({"SELECT", "REFERENCES"})},
            collisions=(Collision(documents, "pkey", None),),
            missing_references=(Dangling(outside, None),),
            foreign_parents=(Dangling(outside, None),),
        )
    )
    assert plan.refusals == ()
    assert [f.code for f in plan.findings] == [
        "references_unchecked",
        "cross_tenant_unchecked",
        "collision_unchecked",
    ]


def test_a_clone_needs_its_extensions_and_policy_roles():
    plan = judge(
        facts(
            source={
                "extensions_needed": frozenset({"citext", "vector", "hstore"}),
                "extensions_inside": frozenset({"hstore"}),
                "policy_roles": frozenset({"app"}),
                "granted_roles": frozenset({"app", "report"}),
                "server": replace(SERVER, extensions={"citext": "1.6", "vector": "0.7"}),
            },
            target={"server": replace(SERVER, system_identifier="2", extensions={"vector": "0.8"})},
        )
    )
    assert [(f.code, f.warning) for f in plan.findings] == [
        ("extension_inside", False),
        ("extension_missing", False),
        ("extension_version", True),
        ("policy_role_missing", False),
        ("grant_roles_missing", True),
    ]


def test_virtual_columns_need_a_target_that_knows_them():
    virtual = ColumnFacts("v", "text", False, generated="v", identity="", collatable=True)
    documents = table("documents", columns=(column("id"), column("tenant_id"), virtual))
    assert found(facts(documents)) == []
    old = replace(SERVER, system_identifier="2", version_num=170005)
    assert found(facts(documents, target={"server": old})) == [("virtual_column", False)]


def test_the_same_database_and_schemas_are_refused():
    same = {"server": SERVER}
    assert found(facts(target=same, schemas={"core_dms": "core_dms"})) == [("same_place", False)]
    assert found(facts(target=same)) == []


def unique(*columns, name="", **changes):
    return replace(KEY, name=name or "_".join(columns), columns=columns, primary=False, **changes)


DEFERRABLE = replace(KEY, immediate=False)
KEYS = {
    "the primary key": ((unique("tenant_id"), KEY), ("id",)),
    "the smallest unique one": (
        (unique("id", "code", "tenant_id"), unique("code", "tenant_id")),
        ("code", "tenant_id"),
    ),
    "by the names of its columns, not its own": (
        (unique("id", name="z"), unique("code", name="a")),
        ("code",),
    ),
    "not one that allows NULL": ((unique("title"), unique("id", "code")), ("id", "code")),
    "not one of generated values": ((unique("made"), unique("id", "code")), ("id", "code")),
    "not one of some rows, or of expressions": ((unique("id", partial=True), unique("")), ()),
    "not one that may be broken for a while": ((DEFERRABLE, unique("code")), ("code",)),
    "none": ((DEFERRABLE,), ()),
}


@pytest.mark.parametrize("indexes", KEYS)
def test_rows_are_told_apart_by(indexes):
    given, expected = KEYS[indexes]
    made = ColumnFacts("made", "text", not_null=True, generated="s", identity="", collatable=True)
    columns = (*(column(name) for name in ("id", "tenant_id", "code")), column("title", not_null=False), made)
    for order in (given, given[::-1]):
        documents = table("documents", columns=columns, indexes=order)
        plan = judge(facts(documents))
        assert plan.refusals == ()
        assert plan.shape.tables[0].key == expected
        assert [f.code for f in plan.findings] == ([] if expected else ["no_key"])


def test_a_table_without_a_key_needs_whole_rows_in_the_stream():
    documents = table("documents", indexes=())
    for identity, changes in (("d", ["core_dms.documents"]), ("n", ["core_dms.documents"]), ("f", [])):
        plan = judge(facts(replace(documents, replica_identity=identity)))
        assert plan.facts["replica_identity_changes"] == changes
    large = {documents.ref: Rows(1_000_000, 1 << 30, exact=False, exists=True)}
    (finding,) = judge(facts(documents, rows=large)).findings
    assert "compared only after the switch" in finding.message


def test_a_tenant_column_whose_equal_texts_are_not_the_same_is_refused():
    """Rows that the server does not filter are told apart by their letters."""
    loose = replace(column("tenant_id", "text"), deterministic=False)
    plan = judge(facts(table("documents", columns=(column("id"), loose))))
    assert [f.code for f in plan.refusals] == ["tenant_column_type"]


def test_references_that_must_be_corrected_are_told_before_those_that_were_not_counted():
    unknown, wrong = Dangling(key("a", "b"), None), Dangling(key("c", "d"), 2)
    found = judge_references(facts(foreign_parents=(unknown,), foreign_children=(wrong,)))
    assert [f.code for f in found] == ["cross_tenant_reference", "cross_tenant_unchecked"]
