"""What changes mean on a target where rows are not there: half-copied tables, rows not sent whole."""

from __future__ import annotations

from hypothesis import event, given
from hypothesis import strategies as st

from mover.core.changes import UNCHANGED, Delete, Insert, Relation, Row, Update
from mover.core.compaction import NeedsOrder, compact
from mover.core.presence import Missing, keys_of, on_target
from tests.support.histories import KEYS, REF, RELATION, apply_in_order, histories
from tests.unit.test_compaction import apply_net


def key_of(relation: Relation, row: Row) -> tuple[str, ...]:
    return (row[0].decode(),)


def key(raw: bytes) -> tuple[str, ...]:
    return (raw.decode(),)


@given(histories(entering=True), st.sets(st.sampled_from(KEYS)), st.booleans(), st.booleans(), st.data())
def test_the_target_stays_the_source_restricted_to_what_is_copied(
    history, copied, is_whole, moves_by_copy, data
):
    inside = set(KEYS) if is_whole else copied
    ranges = {} if is_whole else {REF: {key(k) for k in copied}}
    target = {k: list(row) for k, row in history.before.items() if k in inside}
    missing: Missing = {}
    cut = data.draw(st.integers(0, len(history.changes)))
    for changes in (history.changes[:cut], history.changes[cut:]):  # a batch ends anywhere
        fitted = list(
            on_target(changes, key_of, ranges, missing, moves_by_copy={REF} if moves_by_copy else ())
        )
        if data.draw(st.booleans()):
            apply_in_order(target, fitted)
        else:
            try:
                tables = compact(fitted, lambda relation: (0,))
            except NeedsOrder:
                apply_in_order(target, fitted)
            else:
                for net in tables.values():
                    apply_net(target, net)
    for absent in missing.get(REF, ()):
        event("a missing row")
        raw = absent[0].encode()
        assert raw not in target and raw in inside
        if raw in history.after:
            target[raw] = history.after[raw]
    assert target == {k: row for k, row in history.after.items() if k in inside}


@given(histories())
def test_a_whole_table_takes_every_change_as_it_is(history):
    assert list(on_target(history.changes, key_of, {}, {})) == history.changes


def test_a_row_that_leaves_the_copied_ranges_is_deleted_and_one_that_enters_is_inserted():
    out = Update(RELATION, [b"a", None, None], [b"d", b"big", b"1"])
    back = Update(RELATION, [b"d", None, None], [b"b", b"big", b"2"])
    fitted = on_target([out, back], key_of, {REF: {("a",), ("b",)}}, {})
    assert list(fitted) == [
        Delete(RELATION, [b"a", None, None]),
        Insert(RELATION, [b"b", b"big", b"2"]),
    ]


def test_a_row_that_enters_without_its_values_is_missing_and_its_later_changes_are_left_out():
    missing: Missing = {}
    changes = [
        Insert(RELATION, [b"a", UNCHANGED, b"1"]),
        Update(RELATION, None, [b"a", UNCHANGED, b"2"]),
        Update(RELATION, [b"a", None, None], [b"b", UNCHANGED, b"2"]),
        Insert(RELATION, [b"c", b"", b""]),
    ]
    assert list(on_target(changes, key_of, {}, missing)) == changes[3:]
    assert missing == {REF: {("a",), ("b",)}}


def test_both_keys_of_a_change_are_known():
    assert keys_of(Update(RELATION, [b"a", None, None], [b"b", b"", b""]), key_of) == (("a",), ("b",))
    assert keys_of(Delete(RELATION, [b"a", None, None]), key_of) == (("a",), ("a",))
