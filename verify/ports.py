"""What a comparison needs of one side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from mover.core.tables import MovedTable
from verify.digest import Digest, LeafDigest
from verify.leaves import Key, KeyRange, Part


class DigestReader(Protocol):
    """Reads one side's rows of the tenant, all methods under one snapshot.

    Methods may be called concurrently; a reader does as many at a time as it has connections.
    """

    async def seekable(self, table: MovedTable) -> bool:
        """Whether an index finds a key range; if not, each range costs a scan of the table."""
        ...

    async def boundaries(self, table: MovedTable, within: KeyRange, rows_per_leaf: int) -> list[Key]:
        """Every `rows_per_leaf`-th key of the range, ascending."""
        ...

    async def digest(self, table: MovedTable, part: Part) -> LeafDigest:
        """The digest of a part's rows; memory does not grow with the part."""
        ...

    async def row_digests(self, table: MovedTable, part: Part) -> Mapping[Key, Digest]:
        """One digest for each row of a part that is small enough to be held."""
        ...

    async def column_digests(self, table: MovedTable, keys: Sequence[Key]) -> Mapping[Key, Sequence[Digest]]:
        """One digest for each copied column of each of these rows."""
        ...
