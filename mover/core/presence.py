"""What a change of the source means on a target where some rows are not there.

A table that is copied in several waves holds only its copied key ranges; and a row whose change did not
carry all its values (it entered the tenant, or the copied ranges, with TOASTed values that were not sent)
is *missing* until it is read from the source at a consistent point.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping

from mover.core.changes import UNCHANGED, Delete, Insert, Relation, Row, RowChange, Update
from mover.core.copying import Key
from mover.core.ids import TableRef

KeyOf = Callable[[Relation, Row], Key]
Missing = dict[TableRef, set[Key]]


def keys_of(change: RowChange, key_of: KeyOf) -> tuple[Key, Key]:
    """The row's key before and after the change; the same one for most."""
    match change:
        case Update(relation, old, new) if old is not None:
            return key_of(relation, old), key_of(relation, new)
        case Insert(relation, row) | Update(relation, _, row) | Delete(relation, row):
            key = key_of(relation, row)
            return key, key


def on_target(
    changes: Iterable[RowChange],
    key_of: KeyOf,
    copied: Mapping[TableRef, Container[Key]],
    missing: Missing,
    moves_by_copy: Container[TableRef] = (),
) -> Iterator[RowChange]:
    """The changes as the target has to make them, each exactly one row there, in order.

    `copied` has the keys inside the copied ranges of the tables that are not there as a whole. Rows that
    the target cannot know are added to `missing`; from then on their changes are left out. A change of
    key in `moves_by_copy` becomes a deletion and an insertion."""
    for change in changes:
        table = change.relation.table
        inside = copied.get(table)
        absent = missing.get(table, ())
        old_key, new_key = keys_of(change, key_of)
        was_inside = inside is None or old_key in inside
        is_inside = was_inside if old_key == new_key else inside is None or new_key in inside
        was_there = was_inside and old_key not in absent
        match change:
            case Delete():
                if was_there:
                    yield change
            case Insert(relation, new):
                if is_inside and new_key not in absent:
                    yield from _appearing(relation, new, new_key, missing)
            case Update() if old_key == new_key:
                if was_there:
                    yield change
            case Update(relation, old, new):
                stays = was_there and is_inside and new_key not in absent
                if stays and table not in moves_by_copy:
                    yield change
                    continue
                if was_there and old is not None:
                    yield Delete(relation, old)
                if is_inside and new_key not in absent:
                    yield from _appearing(relation, new, new_key, missing)


def _appearing(relation: Relation, new: Row, key: Key, missing: Missing) -> Iterator[RowChange]:
    if UNCHANGED in new:
        missing.setdefault(relation.table, set()).add(key)
    else:
        yield Insert(relation, new)
