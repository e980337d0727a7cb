"""Digests tell apart what differs, and do not depend on how the bytes arrived."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from verify.digest import FAN_OUT, LeafDigest, LeafHasher, table_root, tenant_root
from verify.leaves import WHOLE, KeyRange, KeySet, key_sets

leaf_digests = st.builds(LeafDigest, st.integers(0, 3), st.binary(min_size=16, max_size=16))
keys = st.tuples(st.integers(0, 50))


def leaf(pieces, rows=1):
    hasher = LeafHasher()
    for piece in pieces:
        hasher.update(piece)
    return hasher.finish(rows)


@given(st.binary(max_size=200), st.lists(st.integers(0, 200)))
def test_pieces_may_be_cut_anywhere(text, cuts):
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[start:end] for start, end in pairwise(edges)]
    assert leaf(pieces) == leaf([text])


def test_the_row_count_is_part_of_a_leaf():
    assert leaf([b"1\t2\n"], rows=1) != leaf([b"1\t2\n"], rows=2)
    assert table_root("", [leaf([b"1\n"], rows=1)]) != table_root("", [leaf([b"1\n"], rows=2)])


@given(st.lists(leaf_digests, max_size=5), st.lists(leaf_digests, max_size=5))
def test_roots_are_equal_for_equal_leaves_only(ours, theirs):
    assert (table_root("s", ours) == table_root("s", theirs)) == (ours == theirs)


def test_the_order_of_leaves_matters_and_duplicates_do_not_cancel():
    one, two = leaf([b"1\n"]), leaf([b"2\n"])
    roots = {table_root("s", leaves) for leaves in ([one, two], [two, one], [one, one], [two, two], [])}
    assert len(roots) == 5


def test_every_leaf_of_a_deep_tree_counts():
    leaves = [leaf([str(i).encode()]) for i in range(FAN_OUT * FAN_OUT + 3)]
    root = table_root("s", leaves)
    for position in (0, FAN_OUT, len(leaves) - 1):
        damaged = [*leaves]
        damaged[position] = leaf([b"damaged"])
        assert table_root("s", damaged) != root


def test_the_schema_is_part_of_a_tables_root():
    assert table_root("a int", []) != table_root("a bigint", [])


def test_the_tenants_root_takes_tables_by_name():
    root = tenant_root({"a.one": b"1", "a.two": b"2"})
    assert root == tenant_root({"a.two": b"2", "a.one": b"1"})
    assert root != tenant_root({"a.one": b"2", "a.two": b"1"})
    assert root != tenant_root({"a.one": b"1"})


@given(st.sets(keys), st.sets(keys))
def test_leaves_cover_every_key_once(boundaries, probes):
    leaves = WHOLE.cut(sorted(boundaries))
    for key in probes:
        holders = [
            part
            for part in leaves
            if (part.after is None or part.after < key) and (part.upto is None or key <= part.upto)
        ]
        assert len(holders) == 1


def test_a_cut_range_keeps_its_ends():
    assert KeyRange(("b",), ("f",)).cut([("d",)]) == [KeyRange(("b",), ("d",)), KeyRange(("d",), ("f",))]


def test_key_sets_hold_each_key_once():
    assert key_sets([("1",), ("2",), ("1",), ("3",)], size=2) == [KeySet((("1",), ("2",))), KeySet((("3",),))]
    assert key_sets([], size=2) == []
