"""Chunks: the key ranges in which a table is copied, and which rows are therefore on the target."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias

# A key as text, one entry a column, in the key's column order.
Key: TypeAlias = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Chunk:
    """The rows with lo < key <= hi; None means open-ended. Chunks of a table adjoin, in `number` order."""

    number: int
    lo: Key | None
    hi: Key | None
    done: bool = False
    rows: int = 0
    bytes: int = 0


@dataclass(frozen=True, slots=True)
class CopiedRanges:
    """The parts of a table that are on the target, as (lo, hi] ranges in ascending order."""

    ranges: tuple[tuple[Key | None, Key | None], ...]

    @classmethod
    def of(cls, chunks: Iterable[Chunk]) -> CopiedRanges:
        """Neighbouring finished chunks make one range, so that the usual table has none or one."""
        ranges: list[tuple[Key | None, Key | None]] = []
        previous = None
        for chunk in sorted(chunks, key=lambda c: c.number):
            if not chunk.done:
                continue
            if previous == chunk.number - 1 and ranges:
                ranges[-1] = (ranges[-1][0], chunk.hi)
            else:
                ranges.append((chunk.lo, chunk.hi))
            previous = chunk.number
        return cls(tuple(ranges))

    @property
    def nothing(self) -> bool:
        return not self.ranges

    @property
    def everything(self) -> bool:
        return self.ranges == ((None, None),)
