"""Pure: which rows a leaf holds. The key space is cut into contiguous ranges that exclude their lower
bound and include their upper one; the first and the last are open-ended, so that no key falls outside,
whichever side it is on.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

# A key's values as PostgreSQL prints them, in the order of `MovedTable.key`.
Key: TypeAlias = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class KeyRange:
    """The rows with after < key <= upto; None is open."""

    after: Key | None = None
    upto: Key | None = None

    def cut(self, boundaries: Sequence[Key]) -> list[KeyRange]:
        """This range as leaves; `boundaries` lie inside it, ascending, each the last key of its leaf."""
        lower = (self.after, *boundaries)
        upper = (*boundaries, self.upto)
        return [KeyRange(after, upto) for after, upto in zip(lower, upper, strict=True)]


WHOLE = KeyRange()


@dataclass(frozen=True, slots=True)
class KeySet:
    """The rows that have one of these keys."""

    keys: tuple[Key, ...]


# What a digest is asked of.
Part: TypeAlias = KeyRange | KeySet


def key_sets(keys: Iterable[Key], size: int) -> list[KeySet]:
    """`keys`, each once, in sets of at most `size`."""
    unique = tuple(dict.fromkeys(keys))
    return [KeySet(unique[i : i + size]) for i in range(0, len(unique), size)]
