"""Which foreign keys make a table's rows the tenant's."""

from __future__ import annotations

from dataclasses import replace

from mover.core.ownership import find_ownership
from tests.support.facts import column, facts, key, table


def owned(name, **optional):
    """A table without the tenant column; of its columns beside the key, which may be NULL."""
    columns = [column(other, not_null=not null) for other, null in optional.items()]
    return table(name, columns=(column("id"), *columns))


def named(name, *arguments):
    return replace(key(*arguments), name=name)


def deciding(tables, keys):
    found = find_ownership(facts(*tables, foreign_keys=keys)).keys
    return {table.name: [key.name for key in chosen] for table, chosen in found.items()}


def test_a_foreign_key_that_is_always_given_decides_alone():
    tables = [table("binders"), owned("sheets", binder=False, other=True)]
    keys = [named("a", "sheets", "binders", ("other",)), named("b", "sheets", "binders", ("binder",))]
    assert deciding(tables, keys) == {"sheets": ["b"]}


def test_it_decides_also_where_what_it_refers_to_is_told_by_others():
    """Marks are on a sheet, which is in a binder or on a shelf; some are in a binder themselves."""
    tables = [
        table("binders"),
        table("shelves"),
        owned("sheets", binder=True, shelf=True),
        owned("marks", sheet=False, binder=True),
    ]
    keys = [
        named("a", "sheets", "binders", ("binder",)),
        named("b", "sheets", "shelves", ("shelf",)),
        named("c", "marks", "sheets", ("sheet",)),
        named("d", "marks", "binders", ("binder",)),
    ]
    assert deciding(tables, keys) == {"sheets": ["a", "b"], "marks": ["c"]}


def test_all_that_may_be_null_decide_however_far_the_tenant_is():
    tables = [table("binders"), owned("sheets", binder=True), owned("marks", sheet=True, binder=True)]
    keys = [
        named("a", "sheets", "binders", ("binder",)),
        named("b", "marks", "binders", ("binder",)),
        named("c", "marks", "sheets", ("sheet",)),
    ]
    assert deciding(tables, keys) == {"sheets": ["a"], "marks": ["b", "c"]}


def test_where_none_that_is_always_given_leads_to_the_tenant_any_of_the_others_does():
    tables = [
        table("binders"),
        owned("sheets", binder=True, mark=False),
        owned("marks", sheet=False, binder=True),
    ]
    keys = [
        named("a", "sheets", "binders", ("binder",)),
        named("b", "sheets", "marks", ("mark",)),
        named("c", "marks", "sheets", ("sheet",)),
        named("d", "marks", "binders", ("binder",)),
    ]
    assert deciding(tables, keys) == {"sheets": ["a"], "marks": ["d"]}


def test_a_cycle_none_of_which_is_always_given_is_not_followed():
    tables = [
        table("binders"),
        owned("sheets", binder=True, mark=True),
        owned("marks", sheet=True, binder=True),
    ]
    keys = [
        named("a", "sheets", "binders", ("binder",)),
        named("b", "sheets", "marks", ("mark",)),
        named("c", "marks", "binders", ("binder",)),
        named("d", "marks", "sheets", ("sheet",)),
    ]
    unfit = find_ownership(facts(*tables, foreign_keys=keys)).unfit
    assert {found.name: why for found, why in unfit.items()} == dict.fromkeys(
        ["sheets", "marks"], "may belong to the tenant by rows that belong to it by its own"
    )


def test_a_table_that_never_leads_to_the_tenant_keeps_nobody_waiting():
    tables = [
        table("binders"),
        owned("sheets", binder=True, stray=True),
        owned("marks", sheet=True, binder=True),
        owned("strays", lone=True),
        owned("lone"),
    ]
    keys = [
        named("a", "sheets", "binders", ("binder",)),
        named("b", "sheets", "strays", ("stray",)),
        named("c", "marks", "sheets", ("sheet",)),
        named("d", "marks", "binders", ("binder",)),
        named("e", "strays", "lone", ("lone",)),
    ]
    assert deciding(tables, keys) == {"sheets": ["a"], "marks": ["c", "d"]}
    assert find_ownership(facts(*tables, foreign_keys=keys)).unfit == {}
