"""Whose the rows of tables without the tenant column are, change by change."""

from __future__ import annotations

from dataclasses import replace

from mover.core.changes import UNCHANGED, Delete, Insert, Rehomed, Relation, RelationColumn, Update, Vacated
from mover.core.ids import TableRef
from mover.core.membership import Membership, followed, questions
from mover.core.tables import Column, MovedTable, Owner

BINDERS, SHEETS, MARKS = (TableRef("app", name) for name in ("binders", "sheets", "marks"))


def moved(ref: TableRef, names: str, **rest) -> MovedTable:
    columns = tuple(Column(name, "text", "text") for name in names.split())
    return MovedTable(ref, ref, columns, ("id",), **rest)


def owner(ref: TableRef, column: str, **rest) -> Owner:
    return Owner(ref, ref, (column,), ("id",), **rest)


OF_BINDERS = owner(BINDERS, "binder", tenant_column="tenant")
OF_SHEETS = owner(SHEETS, "sheet", tenant_column=None, owners=(OF_BINDERS,))
TABLES = followed(
    [
        moved(BINDERS, "id tenant", tenant_column="tenant", referenced=(("id",),)),
        moved(SHEETS, "id binder body", tenant_column=None, owners=(OF_BINDERS,), referenced=(("id",),)),
        moved(MARKS, "id sheet", tenant_column=None, owners=(OF_SHEETS,)),
    ]
)
RELATIONS = {
    ref: Relation(
        number, ref, "d", tuple(RelationColumn(c.name, c.name == "id", 25, -1) for c in table.columns)
    )
    for number, (ref, table) in enumerate(TABLES.items())
}
BINDER, SHEET, MARK = (RELATIONS[ref] for ref in (BINDERS, SHEETS, MARKS))


def row(*values):
    return [value.encode() if isinstance(value, str) else value for value in values]


def key_of(relation, found):
    return (found[0].decode(),)


def membership(keys=None, values=None) -> Membership:
    return Membership(TABLES, "T", key_of, keys or {}, values or {})


def test_a_child_is_the_tenants_by_the_parent_that_came_just_before_it():
    changes = [Insert(BINDER, row("b", "T")), Insert(SHEET, row("s", "b", "")), Insert(MARK, row("m", "s"))]
    known = membership()
    assert list(known.tenants(changes)) == changes
    assert known.rehomed == {}


def test_what_belongs_to_others_is_left_out():
    changes = [
        Insert(SHEET, row("s", "theirs", "")),
        Insert(MARK, row("m", "s")),
        Update(SHEET, None, row("s", "theirs", "x")),
        Delete(SHEET, row("s", None, None)),
    ]
    assert list(membership().tenants(changes)) == []


def test_a_child_is_deleted_after_the_parent_whose_deletion_cascades():
    changes = [Delete(BINDER, row("b", "T")), Delete(SHEET, row("s", None, None))]
    known = membership({SHEETS: {("s",)}}, {(BINDERS, ("id",)): {("b",)}})
    assert list(known.tenants(changes)) == changes


def test_a_row_that_goes_to_another_tenants_parent_leaves_with_what_refers_to_it():
    known = membership({SHEETS: {("s",)}}, {(SHEETS, ("id",)): {("s",)}})
    changes = [Update(SHEET, None, row("s", "theirs", UNCHANGED)), Insert(MARK, row("m", "s"))]
    assert list(known.tenants(changes)) == [Delete(SHEET, row("s", "theirs", UNCHANGED))]
    assert known.rehomed == {(SHEETS, ("id",)): {("s",)}}


def test_a_row_that_comes_to_the_tenants_parent_enters_with_what_refers_to_it():
    known = membership({}, {(BINDERS, ("id",)): {("b",)}})
    changes = [Update(SHEET, None, row("s", "b", UNCHANGED))]
    assert list(known.tenants(changes)) == [Insert(SHEET, row("s", "b", UNCHANGED))]
    assert known.rehomed == {(SHEETS, ("id",)): {("s",)}}


def test_what_entered_is_looked_for_under_its_later_key_too():
    known = membership({}, {(BINDERS, ("id",)): {("b",)}})
    enters = Update(SHEET, None, row("s", "b", ""))
    list(known.tenants([enters, Update(SHEET, row("s", None, None), row("s2", "b", ""))]))
    assert known.rehomed == {(SHEETS, ("id",)): {("s",), ("s2",)}}


def test_a_child_that_came_before_its_parent_is_looked_for_again():
    early = owner(BINDERS, "binder", tenant_column="tenant", waits=("update", "delete"))
    sheets = moved(SHEETS, "id binder body", tenant_column=None, owners=(early,))
    known = Membership({**TABLES, SHEETS: sheets}, "T", key_of, {}, {})
    parent = Insert(BINDER, row("b", "T"))
    assert list(known.tenants([Insert(SHEET, row("s", "b", "")), parent])) == [parent]
    assert known.rehomed == {(BINDERS, ("id",)): {("b",)}}


def test_a_parent_that_changed_its_tenant_is_looked_for_as_it_was_and_as_it_is():
    known = membership()
    assert list(known.tenants([Rehomed(BINDERS, ({"id": "b"}, {"id": "b2"}))])) == []
    assert known.rehomed == {(BINDERS, ("id",)): {("b",), ("b2",)}}
    list(known.tenants([Rehomed(TableRef("app", "other"), ({"id": "x"},))]))
    assert len(known.rehomed) == 1


def test_a_reference_that_was_not_sent_is_the_one_of_before():
    known = membership({SHEETS: {("s",)}}, {})
    change = Update(SHEET, None, row("s", UNCHANGED, "new"))
    assert list(known.tenants([change])) == [change]


def test_the_target_is_asked_for_owned_rows_and_for_what_they_refer_to():
    changes = [
        Insert(BINDER, row("b", "T")),
        Update(SHEET, row("s", None, None), row("s2", "b", "")),
        Insert(MARK, row("m", None)),
        Delete(MARK, row("n", None)),
    ]
    asked = questions(changes, TABLES, key_of)
    assert asked.keys == {SHEETS: {("s",), ("s2",)}, MARKS: {("m",), ("n",)}}
    assert asked.values == {(BINDERS, ("id",)): {("b",)}}


def waiting(keys=None, values=None) -> Membership:
    """Sheets may wait for their binder, and marks for their sheet."""
    of_binders = owner(BINDERS, "binder", tenant_column="tenant", waits=("update", "delete"))
    of_sheets = owner(SHEETS, "sheet", tenant_column=None, owners=(of_binders,), waits=("update", "delete"))
    tables = {
        BINDERS: TABLES[BINDERS],
        SHEETS: replace(TABLES[SHEETS], owners=(of_binders,)),
        MARKS: replace(TABLES[MARKS], owners=(of_sheets,)),
    }
    return Membership(tables, "T", key_of, keys or {}, values or {})


B, S = (BINDERS, ("id",)), (SHEETS, ("id",))


def test_what_waits_for_a_binder_that_another_tenant_may_make_anew_is_told():
    known = waiting({}, {B: {("b",)}})
    list(known.tenants([Delete(BINDER, row("b", "T"))]))
    assert known.left == {B: {("b",)}}
    list(known.tenants([Insert(BINDER, row("b", "T"))]))
    assert known.left == {B: set()}


def test_what_waited_for_a_binder_that_the_tenant_makes_anew_is_looked_for():
    known = waiting()
    list(known.tenants([Vacated(BINDERS, ({"id": "b"},)), Insert(BINDER, row("c", "T"))]))
    assert known.rehomed == {}
    list(known.tenants([Insert(BINDER, row("b", "T"))]))
    assert known.rehomed == {B: {("b",)}}


def test_what_another_tenants_binder_gave_up_may_be_told_after_the_tenants_has_taken_it():
    """A row trigger fires when the statement has made all its changes."""
    known = waiting()
    list(known.tenants([Insert(BINDER, row("b", "T")), Vacated(BINDERS, ({"id": "b"},))]))
    assert known.rehomed == {B: {("b",)}}
    assert questions([Vacated(BINDERS, ({"id": "b"},))], known.tables, key_of).values == {B: {("b",)}}


def test_a_sheet_made_anew_under_another_binder_takes_its_marks_along():
    known = waiting({SHEETS: {("s",)}}, {B: {("ours",)}, S: {("s",)}})
    list(known.tenants([Delete(SHEET, row("s", None, None)), Insert(SHEET, row("s", "theirs", ""))]))
    assert known.left == {S: {("s",)}}
    known = waiting({}, {B: {("ours",)}})
    list(known.tenants([Delete(SHEET, row("s", None, None)), Insert(SHEET, row("s", "ours", ""))]))
    assert known.rehomed == {S: {("s",)}}


def test_what_waits_for_a_number_that_a_sheet_gave_up_as_it_came_to_the_tenant_is_looked_for():
    """The sheet was another tenant's: its marks stay behind, and are the tenant's by the next sheet."""
    known = waiting({}, {B: {("ours",)}})
    comes = Update(SHEET, row("s", None, None), row("s2", "ours", ""))
    list(known.tenants([comes, Insert(SHEET, row("s", "ours", ""))]))
    assert known.rehomed == {S: {("s",), ("s2",)}}
