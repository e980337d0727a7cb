"""The net effect of a batch is what its changes do one by one."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import event, given

from mover.core.changes import UNCHANGED, Delete, Insert, Relation, RowChange, Truncated, Update
from mover.core.compaction import NeedsOrder, NetTable, compact, net_rows, parts
from mover.core.ids import TableRef
from tests.support.histories import REF, RELATION, History, Rows, apply_in_order, copy, histories

OTHER = Relation(2, TableRef("app", "other"), "i", RELATION.columns)


@given(histories(truncating=True))
def test_the_net_effect_equals_the_changes_one_by_one(history):
    rows = copy(history.before)
    try:
        for part in parts(history.changes):
            if isinstance(part, Truncated):
                rows.clear()
            else:
                for net in compact(part, key_positions).values():
                    apply_net(rows, net)
    except NeedsOrder:
        event("needs order")
        assert any(is_move_without_values(change) for change in history.changes)
    else:
        assert rows == history.after


@given(histories(entering=True))
def test_a_row_that_entered_without_its_values_needs_order_or_is_not_inserted(history: History):
    try:
        tables = compact(history.changes, key_positions)
    except NeedsOrder:
        return
    for net in tables.values():
        assert all(UNCHANGED not in row for row in net.inserts.values())


def test_a_truncation_cuts_the_batch():
    one, two = Insert(RELATION, [b"a", b"", b""]), Delete(RELATION, [b"a", None, None])
    truncated = Truncated(REF)
    assert list(parts([one, two, truncated, truncated, two])) == [[one, two], truncated, truncated, [two]]
    assert list(parts([])) == []


def test_an_update_inherits_what_was_not_sent_from_the_insert_before_it():
    net = compact(
        [Insert(RELATION, [b"a", b"big", b"1"]), Update(RELATION, None, [b"a", UNCHANGED, b"2"])],
        key_positions,
    )[REF]
    assert (net.inserts, net.updates, net.deletes) == ({b"a": [b"a", b"big", b"2"]}, {}, {})


def test_what_came_and_went_is_nothing():
    net = compact([Insert(RELATION, [b"a", b"", b""]), Delete(RELATION, [b"a", None, None])], key_positions)
    assert (net[REF].inserts, net[REF].updates, net[REF].deletes) == ({}, {}, {})


def test_a_key_that_changed_beside_values_not_sent_needs_order():
    with pytest.raises(NeedsOrder):
        compact([Update(RELATION, [b"a", None, None], [b"b", UNCHANGED, b"1"])], key_positions)


def test_a_table_that_changed_its_shape_needs_order():
    wider = Relation(RELATION.oid, REF, "i", (*RELATION.columns, RELATION.columns[2]))
    with pytest.raises(NeedsOrder):
        compact(
            [Insert(RELATION, [b"a", b"", b""]), Insert(wider, [b"b", b"", b"", b""])],
            key_positions,
        )


def test_composite_keys_and_several_tables():
    changes = [
        Insert(RELATION, [b"a", b"1", b"x"]),
        Insert(OTHER, [b"a", b"1", b"x"]),
        Insert(RELATION, [b"a", b"2", b"x"]),
        Delete(OTHER, [b"a", b"1", None]),
    ]
    net = compact(changes, lambda relation: (0, 1))
    assert set(net[REF].inserts) == {(b"a", b"1"), (b"a", b"2")}
    assert net[OTHER.table].inserts == {}


def key_positions(relation: Relation) -> tuple[int, ...]:
    return (0,)


def is_move_without_values(change: object) -> bool:
    return (
        isinstance(change, Update)
        and change.old is not None
        and change.old[0] != change.new[0]
        and UNCHANGED in change.new
    )


def apply_net(rows: Rows, net: NetTable) -> None:
    """As the set statements do it: deletions, updates, insertions, each of exactly the staged rows."""
    assert not (net.inserts.keys() & net.updates.keys() or net.deletes.keys() & net.updates.keys())
    for key in net.deletes:
        del rows[key]
    for key, row in net.updates.items():
        assert key in rows
        rows[key] = [was if v is UNCHANGED else v for was, v in zip(rows[key], row, strict=True)]
    for key, row in net.inserts.items():
        assert key not in rows
        rows[key] = list(row)


@given(histories())
def test_the_net_effect_on_whole_rows_leaves_the_same_rows(history: History):
    """Under REPLICA IDENTITY FULL every change carries whole rows."""
    rows = copy(history.before)
    changes: list[RowChange] = []
    for change in history.changes:
        before = copy(rows)
        apply_in_order(rows, [change])
        gone = [row for row in before.values() if row not in rows.values()]
        come = [row for row in rows.values() if row not in before.values()]
        match change:
            case Insert():
                changes.append(Insert(RELATION, come[0]))
            case Delete():
                changes.append(Delete(RELATION, gone[0]))
            case Update() if come:
                changes.append(Update(RELATION, gone[0], come[0]))
    left = Counter(tuple(row) for row in history.before.values())
    for net in net_rows(changes):
        assert not {*map(tuple, net.deletes)} & {*map(tuple, net.inserts)}
        left.subtract(map(tuple, net.deletes))
        left.update(map(tuple, net.inserts))
    assert +left == Counter(tuple(row) for row in history.after.values())
    assert not -left
