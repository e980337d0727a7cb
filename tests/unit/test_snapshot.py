"""Visibility of streamed transactions, whose xids have 32 bits, in snapshots, whose xids have 64."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mover.core.snapshot import Snapshot

EPOCH = 1 << 32


@st.composite
def snapshots(draw: st.DrawFn) -> Snapshot:
    # near the places where 32 bits wrap, too
    xmin = draw(st.one_of(st.integers(EPOCH, 9 * EPOCH), st.integers(3 * EPOCH - 50, 3 * EPOCH + 50)))
    xmax = xmin + draw(st.integers(0, 40))
    running = draw(st.sets(st.integers(xmin, xmax), max_size=10)) - {xmax}
    return Snapshot(min(running, default=xmax), xmax, frozenset(running))


@given(snapshots())
def test_text_and_back(snapshot):
    assert Snapshot.parse(str(snapshot)) == snapshot


def test_as_the_server_writes_it():
    assert Snapshot.parse("10:20:10,14,15") == Snapshot(10, 20, frozenset({10, 14, 15}))
    assert Snapshot.parse("795:795:") == Snapshot(795, 795, frozenset())


@pytest.mark.parametrize("text", ["", "10", "10:20", "a:b:", "10:20:x", "1:2:3:4"])
def test_anything_else_is_refused(text):
    with pytest.raises(ValueError):
        Snapshot.parse(text)


@given(snapshots(), st.integers(-(2**31) + 1, 2**31 - 1))
def test_a_live_xid_gets_its_epoch_back_across_the_wrap(snapshot, distance):
    full = snapshot.xmax + distance
    assert snapshot.extend(full % EPOCH) == full


@given(snapshots(), st.integers(-(2**31) + 1, 2**31 - 1))
def test_visible_is_what_had_ended_when_the_snapshot_was_taken(snapshot, distance):
    full = snapshot.xmax + distance
    ended = full < snapshot.xmax and full not in snapshot.in_progress
    assert snapshot.sees(full % EPOCH) == ended


def test_just_before_and_after_the_wrap():
    snapshot = Snapshot(EPOCH - 2, EPOCH + 3, frozenset({EPOCH - 2, EPOCH + 1}))
    assert [snapshot.sees(x % EPOCH) for x in range(EPOCH - 3, EPOCH + 5)] == [
        *(True, False, True, True, False, True),
        *(False, False),
    ]
