"""Frames of the streaming replication protocol: parse what arrives, build what is answered.

Source: PostgreSQL documentation, "Streaming Replication Protocol" (unchanged from 15 to 18).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

from mover.core.ids import Lsn

# Microseconds between 1970-01-01 and PostgreSQL's epoch, 2000-01-01.
_PG_EPOCH_US: Final = 946_684_800_000_000
_KEEPALIVE: Final = struct.Struct(">QqB")
_STATUS: Final = struct.Struct(">cQQQqB")
HEADER_BYTES: Final = 25  # of an XLogData frame: type, start, end, time


class ProtocolViolation(ValueError):
    """The server sent a frame or message that does not follow the documented format."""


@dataclass(frozen=True, slots=True)
class KeepAlive:
    """The server has nothing to send up to `wal_end`."""

    wal_end: Lsn
    reply_requested: bool


def parse_keepalive(frame: bytes) -> KeepAlive:
    """Raises ProtocolViolation on a malformed frame."""
    try:
        wal_end, _, reply = _KEEPALIVE.unpack_from(frame, 1)
    except struct.error as error:
        raise ProtocolViolation("truncated keepalive") from error
    return KeepAlive(Lsn(wal_end), reply == 1)


def status_update(flushed: Lsn, now_us: int, *, reply: bool = False) -> bytes:
    """A standby status update: everything before `flushed` is durable on the target.

    `now_us` is microseconds since 1970. With `reply` the server answers at once."""
    return _STATUS.pack(b"r", flushed, flushed, flushed, now_us - _PG_EPOCH_US, reply)
