"""Walks both sides leaf by leaf, in parallel, and names the keys of leaves that differ.

A leaf is hashed on both sides at the same time and only digests are kept, so memory does not grow with
the tables; a differing leaf is split until its rows' digests fit.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias, TypeVar

from mover.core.ids import Side, TableRef
from mover.core.tables import MovedTable
from verify.digest import LeafDigest, table_root
from verify.leaves import WHOLE, Key, KeyRange, KeySet, Part, key_sets
from verify.narrow import Differences, differing_columns
from verify.ports import DigestReader
from verify.report import Mismatch, TableVerdict, Verdict

# Fewer rows cost a round trip and a plan more often, more rows make a differing leaf dearer to narrow.
ROWS_PER_LEAF = 20_000
KEYS_PER_SET = 2_500
# More than the readers' connections, so that neither side waits for the other's slower leaf.
LANES = 4

T = TypeVar("T")
R = TypeVar("R")

# One side's schema of each table, by the source's name; equal schemas have equal texts.
Fingerprints: TypeAlias = Mapping[Side, Mapping[TableRef, str]]


async def compare(
    tables: Sequence[MovedTable],
    source: DigestReader,
    target: DigestReader,
    *,
    fingerprints: Fingerprints | None = None,
    rows_per_leaf: int = ROWS_PER_LEAF,
    progress: Callable[[int], None] | None = None,
) -> Verdict:
    """Compare every row of the tenant; `progress` hears of each leaf's rows on the source."""
    walk = _Walk(source, target, rows_per_leaf, fingerprints or {}, progress or (lambda rows: None))

    async def one(table: MovedTable) -> TableVerdict:
        return await walk.table(table, await walk.leaves(table))

    largest_first = sorted(tables, key=lambda table: -table.estimated_bytes)
    return Verdict(tuple(sorted(await _each(largest_first, one), key=lambda verdict: verdict.table)))


async def compare_keys(
    keys: Mapping[MovedTable, Iterable[Key]], source: DigestReader, target: DigestReader
) -> Verdict:
    """Compare only the rows with these keys; a key that neither side has is equal.

    A table without a key is compared as a whole."""
    walk = _Walk(source, target)

    async def one(item: tuple[MovedTable, Iterable[Key]]) -> TableVerdict:
        table, its_keys = item
        return await walk.table(table, key_sets(its_keys, KEYS_PER_SET) if table.key else [WHOLE])

    return Verdict(tuple(sorted(await _each(keys.items(), one), key=lambda verdict: verdict.table)))


async def differing(
    table: MovedTable,
    ranges: Sequence[KeyRange],
    source: DigestReader,
    target: DigestReader,
    progress: Callable[[int], None] = lambda rows: None,
) -> frozenset[KeyRange]:
    """Those of `ranges` in which the sides differ; `progress` hears of each range's rows on the source."""
    walk = _Walk(source, target)

    async def one(part: KeyRange) -> bool:
        ours, theirs = await walk.digests(table, part)
        progress(ours.rows)
        return ours != theirs

    differ = await _each(ranges, one)
    return frozenset(part for part, does in zip(ranges, differ, strict=True) if does)


@dataclass
class _Walk:
    source: DigestReader
    target: DigestReader
    rows_per_leaf: int = ROWS_PER_LEAF
    fingerprints: Fingerprints = field(default_factory=dict)
    progress: Callable[[int], None] = lambda rows: None
    # Narrowing holds two leaves' row digests: one leaf at a time bounds the memory of all.
    _narrowing: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def leaves(self, table: MovedTable) -> list[KeyRange]:
        """One leaf for the whole table where ranges would each scan it."""
        if not all(await self._both(lambda side: side.seekable(table))):
            return [WHOLE]
        return WHOLE.cut(await self.source.boundaries(table, WHOLE, self.rows_per_leaf))

    async def table(self, table: MovedTable, parts: Sequence[Part]) -> TableVerdict:
        differences = Differences()

        async def leaf(part: Part) -> tuple[LeafDigest, LeafDigest]:
            ours, theirs = await self.digests(table, part)
            if ours != theirs:
                async with self._narrowing:
                    await self._narrow(table, part, ours, theirs, differences)
            self.progress(ours.rows)
            return ours, theirs

        leaves = await _each(parts, leaf)
        ours, theirs = self._fingerprint(Side.SOURCE, table), self._fingerprint(Side.TARGET, table)
        return TableVerdict(
            table.source,
            source_rows=sum(leaf.rows for leaf, _ in leaves),
            target_rows=sum(leaf.rows for _, leaf in leaves),
            source_root=table_root(ours, [leaf for leaf, _ in leaves]),
            target_root=table_root(theirs, [leaf for _, leaf in leaves]),
            mismatch=await self._mismatch(table, differences, schema=ours != theirs)
            if ours != theirs or any(one != other for one, other in leaves)
            else None,
        )

    async def _narrow(
        self, table: MovedTable, part: Part, ours: LeafDigest, theirs: LeafDigest, differences: Differences
    ) -> None:
        if isinstance(part, KeySet) or max(ours.rows, theirs.rows) <= 2 * self.rows_per_leaf:
            differences.add(*await self._both(lambda side: side.row_digests(table, part)))
            return
        fuller = self.source if ours.rows >= theirs.rows else self.target
        for smaller in part.cut(await fuller.boundaries(table, part, self.rows_per_leaf)):
            ours, theirs = await self.digests(table, smaller)
            if ours != theirs:
                await self._narrow(table, smaller, ours, theirs, differences)

    async def _mismatch(self, table: MovedTable, differences: Differences, *, schema: bool) -> Mismatch:
        columns: tuple[str, ...] = ()
        if examples := differences.different.examples:
            ours, theirs = await self._both(lambda side: side.column_digests(table, examples))
            columns = differing_columns([column.name for column in table.copied], ours, theirs)
        return Mismatch(table.source, differences, columns, schema)

    async def digests(self, table: MovedTable, part: Part) -> tuple[LeafDigest, LeafDigest]:
        return await self._both(lambda side: side.digest(table, part))

    async def _both(self, ask: Callable[[DigestReader], Awaitable[R]]) -> tuple[R, R]:
        ours, theirs = await _each((self.source, self.target), ask)
        return ours, theirs

    def _fingerprint(self, side: Side, table: MovedTable) -> str:
        return self.fingerprints.get(side, {}).get(table.source, "")


async def _each(items: Iterable[T], work: Callable[[T], Awaitable[R]]) -> list[R]:
    """The results in the items' order, LANES at a time; the first error cancels the rest."""
    waiting = enumerate(items)
    results: dict[int, R] = {}

    async def lane() -> None:
        for position, item in waiting:
            results[position] = await work(item)

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(LANES):
                group.create_task(lane())
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [results[position] for position in sorted(results)]
