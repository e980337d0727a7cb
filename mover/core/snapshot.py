"""MVCC snapshots: which of the streamed transactions a consistent point has already seen.

Whether a transaction is in a snapshot is decided by its xid, never by comparing LSNs: under load the
set that a snapshot sees is often not a prefix of the stream.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Snapshot:
    """`pg_current_snapshot()`: 64-bit xids below xmin are visible, from xmax on are not,
    and those between are visible unless they were in progress."""

    xmin: int
    xmax: int
    in_progress: frozenset[int]

    @classmethod
    def parse(cls, text: str) -> Snapshot:
        """From `xmin:xmax:xip,xip,…`. Raises ValueError on anything else."""
        xmin, xmax, listed = text.split(":")
        return cls(int(xmin), int(xmax), frozenset(int(x) for x in listed.split(",") if x))

    def __str__(self) -> str:
        return f"{self.xmin}:{self.xmax}:{','.join(map(str, sorted(self.in_progress)))}"

    def sees(self, xid: int) -> bool:
        """Whether the top-level transaction `xid`, 32 bits as the stream carries it, is visible."""
        full = self.extend(xid)
        if full < self.xmin:
            return True
        return full < self.xmax and full not in self.in_progress

    def extend(self, xid: int) -> int:
        """`xid` with its epoch: of the candidates the nearest to xmax, since live xids span under 2^31."""
        distance = (xid - self.xmax) & 0xFFFFFFFF
        return self.xmax + (distance - (1 << 32) if distance >= 1 << 31 else distance)
