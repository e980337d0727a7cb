"""Rows that are read again at a consistent point, told by their keys, and settled as those that are written
down."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
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

    def rows(self, copied: Mapping[TableRef, CopiedRanges]) -> AsyncGenerator[list[Seen]]: ...

    def whole_rows(self, copied: Mapping[TableRef, CopiedRanges]) -> AsyncGenerator[list[RowChange]]: ...


@dataclass(slots=True)
class ReadAgain:
    """Implements RowsToSettle: the rows with these `keys`, beside what is `written` down or was `left` of
    tables without a key."""

    point: ConsistentPoint
    tables: MovedTables
    keys: Missing
    written: ChangesSince | None = None
    left: Sequence[RowChange] = ()

    async def rows(self, copied: Mapping[TableRef, CopiedRanges]) -> AsyncGenerator[list[Seen]]:
        """Parents first, each row once, all of a table one after the other: the point can be asked only one
        thing at a time."""
        written = set() if self.written is None else set(self.written.tables)
        for table in sorted({*self.keys, *written}, key=self.tables.order):
            there = {table: copied[table]} if table in copied else {}
            keys = set(self.keys.get(table, ()))
            if self.written is not None and table in written:
                async with aclosing(self.written.rows(there)) as batches:
                    async for batch in batches:
                        if table not in self.keys:
                            yield batch
                        else:
                            keys |= {self.tables.layout(seen.relation).key(seen.key) for seen in batch}
            if table in self.keys:
                async with aclosing(self._read(table, keys, copied)) as found:
                    async for rows in found:
                        yield rows

    async def whole_rows(self, copied: Mapping[TableRef, CopiedRanges]) -> AsyncGenerator[list[RowChange]]:
        if self.left:
            yield list(self.left)
        if self.written is not None:
            async with aclosing(self.written.whole_rows(copied)) as found:
                async for rows in found:
                    yield rows

    async def _read(
        self, ref: TableRef, keys: set[Key], copied: Mapping[TableRef, CopiedRanges]
    ) -> AsyncGenerator[list[Seen]]:
        table, tenant, there = self.tables.merge(ref).table, self.tables.tenant, copied.get(ref)
        if there is None or there.nothing:
            return
        relation = self.tables.as_read(ref)
        layout = self.tables.layout(relation)
        ordered = sorted(keys)
        for start in range(0, len(ordered), BATCH_ROWS):
            some = set(ordered[start : start + BATCH_ROWS])
            batch, size_bytes = list[Seen](), 0
            async with aclosing(self.point.rows(table, tenant, table.key, some, there)) as blocks:
                async for block in blocks:
                    for line in block.splitlines():  # a row is never cut
                        row = decode_row(line)
                        some.discard(layout.key(row))
                        batch.append(Seen(relation, row, row))
                        size_bytes += len(line)
                    if size_bytes >= BATCH_BYTES:
                        yield batch
                        batch, size_bytes = [], 0
            yield batch + [Seen(relation, layout.row_of(key), None) for key in some]
