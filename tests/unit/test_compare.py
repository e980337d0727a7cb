"""Walking and narrowing, over readers that hold their rows in memory."""

import asyncio
import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mover.core.errors import Unreachable
from mover.core.ids import Side, TableRef
from mover.core.tables import Column, MovedTable
from verify.compare import compare, compare_keys
from verify.digest import LeafHasher
from verify.leaves import KeySet
from verify.narrow import MAX_KEYS


def moved(name, size=0):
    columns = (Column("id", "text", "text"), Column("a", "text", "text"), Column("b", "text", "text"))
    where = TableRef("app", name)
    return MovedTable(where, where, columns, ("id",), "tenant_id", estimated_bytes=size)


TABLE = moved("rows")


class MemoryReader:
    """A DigestReader over {table name: {key: (a, b)}}; knows what was asked of it."""

    def __init__(self, tables, seekable=True):
        self.tables = tables
        self.can_seek = seekable
        self.largest_part = 0
        self.running = 0
        self.most_running = 0

    def _rows(self, table, part):
        rows = self.tables[table.source.name]
        if isinstance(part, KeySet):
            return {key: rows[key] for key in sorted(part.keys) if key in rows}
        return {
            key: rows[key]
            for key in sorted(rows)
            if (part.after is None or part.after < key) and (part.upto is None or key <= part.upto)
        }

    async def seekable(self, table):
        return self.can_seek

    async def boundaries(self, table, within, rows_per_leaf):
        return list(self._rows(table, within))[rows_per_leaf - 1 :: rows_per_leaf]

    async def digest(self, table, part):
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        await asyncio.sleep(0)
        self.running -= 1
        rows = self._rows(table, part)
        hasher = LeafHasher()
        hasher.update(repr(rows).encode())
        return hasher.finish(len(rows))

    async def row_digests(self, table, part):
        rows = self._rows(table, part)
        self.largest_part = max(self.largest_part, len(rows))
        return {key: hashlib.sha256(repr(row).encode()).digest() for key, row in rows.items()}

    async def column_digests(self, table, keys):
        rows = self._rows(table, KeySet(tuple(keys)))
        return {key: [v.encode() for v in (*key, *row)] for key, row in rows.items()}


def reader(rows, **how):
    return MemoryReader({"rows": rows}, **how)


def numbered(*numbers):
    return {(f"{number:06}",): ("a", "b") for number in numbers}


rows_of_a_side = st.dictionaries(
    st.tuples(st.text("abc", min_size=1, max_size=3)),
    st.tuples(st.text("xy", max_size=1), st.text("xy", max_size=1)),
    max_size=30,
)


@given(rows_of_a_side, rows_of_a_side, st.integers(1, 9), st.booleans())
def test_exactly_the_differing_keys_are_named(ours, theirs, rows_per_leaf, seekable):
    sides = reader(ours, seekable=seekable), reader(theirs)
    verdict = asyncio.run(compare([TABLE], *sides, rows_per_leaf=rows_per_leaf))
    assert verdict.equal == (ours == theirs)
    assert (verdict.source_rows, verdict.target_rows) == (len(ours), len(theirs))
    found = verdict.mismatches[0].keys if verdict.mismatches else None
    assert bool(found) == (ours != theirs)
    if found:
        assert set(found.missing.examples) == ours.keys() - theirs.keys()
        assert set(found.extra.examples) == theirs.keys() - ours.keys()
        assert set(found.different.examples) == {
            k for k in ours.keys() & theirs.keys() if ours[k] != theirs[k]
        }


@given(rows_of_a_side, rows_of_a_side, st.sets(st.tuples(st.text("abc", min_size=1, max_size=3))))
def test_given_keys_are_compared_and_no_others(ours, theirs, keys):
    verdict = asyncio.run(compare_keys({TABLE: keys}, reader(ours), reader(theirs)))
    differing = {key for key in keys if ours.get(key) != theirs.get(key)}
    assert verdict.equal == (not differing)
    named = [key for m in verdict.mismatches for k in m.keys.by_kind().values() for key in k.examples]
    assert sorted(named) == sorted(differing)


async def test_roots_are_equal_whatever_the_order_in_which_leaves_end():
    ours, theirs = reader(numbered(*range(100))), reader(numbered(*range(100)))
    verdict = await compare([TABLE], ours, theirs, rows_per_leaf=3)
    assert verdict.source_root == verdict.target_root
    assert ours.most_running > 1


async def test_columns_that_differ_are_named():
    ours = numbered(1, 2, 3)
    theirs = ours | {("000002",): ("a", "B")}
    (mismatch,) = (await compare([TABLE], reader(ours), reader(theirs))).mismatches
    assert mismatch.columns == ("b",)
    assert str(mismatch) == "app.rows: 1 different, in columns b"


async def test_examples_are_bounded_and_counts_are_not():
    (mismatch,) = (
        await compare([TABLE], reader(numbered(*range(1000))), reader({}), rows_per_leaf=50)
    ).mismatches
    assert mismatch.keys.missing.count == 1000
    assert len(mismatch.keys.missing.examples) == MAX_KEYS


@pytest.mark.parametrize("extra", [range(1000, 2000), range(-1000, 0)], ids=["above", "below"])
async def test_a_flood_outside_the_sources_keys_is_split_before_it_is_held(extra):
    target = reader(numbered(*range(20), *(number + 5000 for number in extra)))
    verdict = await compare([TABLE], reader(numbered(*range(20))), target, rows_per_leaf=10)
    assert verdict.mismatches[0].keys.extra.count == 1000
    assert target.largest_part <= 20


async def test_progress_hears_of_every_row():
    rows = numbered(*range(100))
    heard = []
    await compare([TABLE], reader(rows), reader(rows), rows_per_leaf=7, progress=heard.append)
    assert sum(heard) == 100
    assert len(heard) == 15


async def test_tables_are_reported_in_name_order_and_only_the_damaged_one_is_named():
    tables = [moved("b", size=1), moved("a", size=2), moved("c", size=3)]
    ours = {"a": numbered(1), "b": numbered(1), "c": numbered(1)}
    verdict = await compare(tables, MemoryReader(ours), MemoryReader(ours | {"b": numbered(1, 2)}))
    assert [str(table.table) for table in verdict.tables] == ["app.a", "app.b", "app.c"]
    assert [str(mismatch) for mismatch in verdict.mismatches] == ["app.b: 1 extra"]
    assert not verdict.equal


async def test_equal_rows_under_different_schemas_are_a_mismatch():
    rows = numbered(1, 2)
    prints = {Side.SOURCE: {TABLE.source: "b text"}, Side.TARGET: {TABLE.source: "b varchar"}}
    verdict = await compare([TABLE], reader(rows), reader(rows), fingerprints=prints)
    assert not verdict.equal
    assert str(verdict) == "app.rows: different schemas"


async def test_the_evidence_names_keys_and_the_message_does_not():
    verdict = await compare([TABLE], reader(numbered(77)), reader({}))
    assert verdict.evidence()["mismatches"][0]["missing"] == {"count": 1, "keys": [["000077"]]}
    assert "000077" not in str(verdict)


async def test_a_sides_error_arrives_as_itself():
    class Broken(MemoryReader):
        async def digest(self, table, part):
            raise Unreachable("target: gone")

    with pytest.raises(Unreachable):
        await compare([TABLE], reader(numbered(1)), Broken({"rows": {}}))
