"""Which ranges of a table are copied."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from mover.core.copying import Chunk, CopiedRanges


@st.composite
def tables(draw: st.DrawFn) -> list[Chunk]:
    """Adjoining chunks over the keys 0 to 99, in any order, some of them done."""
    edges = sorted(draw(st.sets(st.integers(0, 99), max_size=8)))
    bounds = [None, *((f"{edge:02}",) for edge in edges), None]
    chunks = [Chunk(n, lo, hi, done=draw(st.booleans())) for n, (lo, hi) in enumerate(pairwise(bounds), 1)]
    return draw(st.permutations(chunks))


@given(tables())
def test_a_key_is_copied_if_its_chunk_is_done(chunks):
    copied = CopiedRanges.of(chunks)
    for number in range(-1, 100):
        key = (f"{number:02}",) if number >= 0 else ("",)
        holders = [c for c in chunks if holds(key, c.lo, c.hi)]
        assert len(holders) == 1
        assert any(holds(key, lo, hi) for lo, hi in copied.ranges) == holders[0].done


@given(tables())
def test_neighbours_make_one_range(chunks):
    ranges = CopiedRanges.of(chunks).ranges
    assert all(one[1] is not None and one[1] != other[0] for one, other in pairwise(ranges))


@given(tables())
def test_everything_and_nothing(chunks):
    copied = CopiedRanges.of(chunks)
    assert copied.everything == all(c.done for c in chunks)
    assert copied.nothing == (not any(c.done for c in chunks))


def test_a_table_without_chunks_has_nothing():
    assert CopiedRanges.of([]).nothing and not CopiedRanges.of([]).everything


def holds(key, lo, hi) -> bool:
    return (lo is None or key > lo) and (hi is None or key <= hi)
