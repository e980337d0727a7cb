"""Rows that are read again at a consistent point, told by their keys, and settled as those that are written
down."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol

from mover.core.changes import RowChange, Seen
from mover.core.copying import CopiedRanges, Key
from mover.core.copytext import decode_row
from mover.core.ids import TableRef
from mover.core.presence import Missing
from mover.ports import ChangesSince, ConsistentPoint
from mover.postgres.moved import MovedTables

BATCH_ROWS, BATCH_BYTES = 5_000, 8 << 20


class RowsToSettle(Protocol):
    """As of ports.ChangesSince."""

    def rows(self, copied: Mapping[TableRef, CopiedRanges]) -> AsyncIterator[list[Seen]]: ...

    def whole_rows(self, copied: Mapping[TableRef, CopiedRanges]) -> AsyncIterator[list[RowChange]]: ...


@dataclass(slots=True)
class ReadAgain:
    """Implements RowsToSettle: the rows with these `keys`, beside what is `written` down or was `left` of
    tables without a key."""

    point: ConsistentPoint
    tables: MovedTables
    keys: Missing
    written: ChangesSince | None = None
    left: Sequence[RowChange] = ()

    async def rows(self, copied: Mapping[TableRef, CopiedRanges]) -> AsyncIterator[list[Seen]]:
        """Parents first, each row once, all of a table one after the other."""
        keys = {table: set(found) for table, found in self.keys.items()}
        waiting = sorted(keys, key=self.tables.order)
        if self.written is not None:
            async for batch in self.written.rows(copied):
                for table, group in groupby(batch, lambda seen: seen.relation.table):
                    if table in keys:
                        keys[table] |= {self.tables.layout(seen.relation).key(seen.key) for seen in group}
                        continue
                    while waiting and self.tables.order(waiting[0]) < self.tables.order(table):
                        async for rows in self._read(first := waiting.pop(0), keys[first], copied):
                            yield rows
                    yield list(group)
        for table in waiting:
            async for rows in self._read(table, keys[table], copied):
                yield rows

    async def whole_rows(self, copied: Mapping[TableRef, CopiedRanges]) -> AsyncIterator[list[RowChange]]:
        if self.left:
            yield list(self.left)
        if self.written is not None:
            async for rows in self.written.whole_rows(copied):
                yield rows

    async def _read(
        self, ref: TableRef, keys: set[Key], copied: Mapping[TableRef, CopiedRanges]
    ) -> AsyncIterator[list[Seen]]:
        table, tenant, there = self.tables.merge(ref).table, self.tables.tenant, copied.get(ref)
        if there is None or there.nothing:
            return
        relation = self.tables.as_read(ref)
        layout = self.tables.layout(relation)
        ordered = sorted(keys)
        for start in range(0, len(ordered), BATCH_ROWS):
            some = set(ordered[start : start + BATCH_ROWS])
            batch, size_bytes = list[Seen](), 0
            async for block in self.point.rows(table, tenant, table.key, some, there):
                for line in block.splitlines():  # a row is never cut
                    row = decode_row(line)
                    some.discard(layout.key(row))
                    batch.append(Seen(relation, row, row))
                    size_bytes += len(line)
                if size_bytes >= BATCH_BYTES:
                    yield batch
                    batch, size_bytes = [], 0
            yield batch + [Seen(relation, layout.row_of(key), None) for key in some]
