"""Random histories of one table, as the stream tells them, and strict models that apply them.

Columns: id (the key), big (TOASTed: may be left out where it did not change), note.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import strategies as st

from mover.core.changes import (
    UNCHANGED,
    Change,
    Delete,
    Insert,
    Relation,
    RelationColumn,
    Row,
    RowChange,
    Truncated,
    Update,
)
from mover.core.ids import TableRef

REF = TableRef("app", "item")
RELATION = Relation(
    1,
    REF,
    "i",
    (
        RelationColumn("id", True, 20, -1),
        RelationColumn("big", False, 25, -1),
        RelationColumn("note", False, 25, -1),
    ),
)
KEYS = [b"a", b"b", b"c", b"d", b"e"]
VALUES = st.sampled_from([b"1", b"2", None])
Rows = dict[bytes, list]


@dataclass
class History:
    before: Rows
    changes: list[Change] = field(default_factory=list)
    after: Rows = field(default_factory=dict)


@st.composite
def histories(draw: st.DrawFn, *, entering: bool = False, truncating: bool = False) -> History:
    """`entering`: inserts may come without `big`, as when a row enters the tenant."""
    rows = {key: [key, draw(VALUES), draw(VALUES)] for key in draw(st.sets(st.sampled_from(KEYS)))}
    history = History(before=copy(rows))
    for _ in range(draw(st.integers(0, 12))):
        absent = [key for key in KEYS if key not in rows]
        possible = (
            (["insert"] if absent else [])
            + (["update", "delete"] if rows else [])
            + (["move"] if rows and absent else [])
            + (["truncate"] if truncating else [])
        )
        match draw(st.sampled_from(possible)):
            case "insert":
                key = draw(st.sampled_from(absent))
                rows[key] = [key, draw(VALUES), draw(VALUES)]
                sent = list(rows[key])
                if entering and draw(st.booleans()):
                    sent[1] = UNCHANGED
                history.changes.append(Insert(RELATION, sent))
            case "update":
                key = draw(st.sampled_from(sorted(rows)))
                new, sent = change_values(draw, rows[key], key)
                rows[key] = new
                # the old key comes along, too, when another column of the identity changed
                old = draw(st.sampled_from([None, [key, None, None]]))
                history.changes.append(Update(RELATION, old, sent))
            case "move":
                key, other = draw(st.sampled_from(sorted(rows))), draw(st.sampled_from(absent))
                new, sent = change_values(draw, rows.pop(key), other)
                rows[other] = new
                history.changes.append(Update(RELATION, [key, None, None], sent))
            case "delete":
                key = draw(st.sampled_from(sorted(rows)))
                del rows[key]
                history.changes.append(Delete(RELATION, [key, None, None]))
            case "truncate":
                rows.clear()
                history.changes.append(Truncated(REF))
    history.after = rows
    return history


def change_values(draw: st.DrawFn, row: list, key: bytes) -> tuple[list, Row]:
    new = [key, draw(st.one_of(st.just(row[1]), VALUES)), draw(VALUES)]
    sent: Row = list(new)
    if new[1] == row[1] and draw(st.booleans()):
        sent[1] = UNCHANGED
    return new, sent


def copy(rows: Rows) -> Rows:
    return {key: list(row) for key, row in rows.items()}


def apply_in_order(rows: Rows, changes: list[RowChange]) -> None:
    """Each change fits exactly one row, as the server would have it."""
    for change in changes:
        match change:
            case Insert(_, new):
                assert UNCHANGED not in new
                assert new[0] not in rows, "a duplicate key"
                rows[new[0]] = list(new)
            case Delete(_, old):
                del rows[old[0]]
            case Update(_, old, new):
                row = rows.pop(new[0] if old is None else old[0])
                assert new[0] not in rows, "a duplicate key"
                rows[new[0]] = [was if v is UNCHANGED else v for was, v in zip(row, new, strict=True)]
