"""Frames of the replication protocol."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mover.core.ids import Lsn
from mover.core.walsender import KeepAlive, ProtocolViolation, parse_keepalive, status_update

LSNS = st.integers(0, 2**64 - 1).map(Lsn)


@given(LSNS, st.booleans())
def test_a_keepalive_tells_the_position_and_whether_to_answer(wal_end, reply):
    frame = b"k" + struct.pack(">QqB", wal_end, 0, reply)
    assert parse_keepalive(frame) == KeepAlive(wal_end, reply)


@given(st.binary(max_size=16))
def test_a_truncated_keepalive_is_a_violation(tail):
    with pytest.raises(ProtocolViolation):
        parse_keepalive(b"k" + tail)


@given(LSNS, st.booleans())
def test_a_status_says_written_flushed_and_applied_up_to_what_is_durable(flushed, reply):
    kind, written, durable, applied, _, asked = struct.unpack(
        ">cQQQqB", status_update(flushed, 0, reply=reply)
    )
    assert (kind, written, durable, applied, asked) == (b"r", flushed, flushed, flushed, reply)


def test_the_clock_counts_from_the_year_2000():
    year_2000_us = 946_684_800 * 1_000_000
    (sent_us,) = struct.unpack_from(">q", status_update(Lsn(0), year_2000_us + 5), 25)
    assert sent_us == 5
