"""What the writers were told: every acknowledged write, kept in memory and in a file of plain lines,
apart from every database; and the comparison with what a database holds in the end.

A write adds a number (mostly 1 or -1) to a counted thing: how many rows carry a write's id, or a
counter in a row. Knows nothing of how the writes are made.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import Any, LiteralString, NamedTuple, Self

import psycopg
from psycopg import sql

from mover.core.ids import TenantId
from mover.core.secret import Secret


class Counted(StrEnum):
    """The things that writes count up and down."""

    ACTIVITY = "activity"  # rows of activities, by write_id
    INVOICE = "invoice"  # rows of invoices, by reference
    INVOICE_LINE = "invoice_line"  # rows of invoice_lines, by their invoice's reference
    DOCUMENT = "document"  # rows of documents, by id
    CONTACT_TOUCHES = "contact_touches"
    DOCUMENT_REVISION = "document_revision"


class Key(NamedTuple):
    tenant: TenantId
    counted: Counted
    id: str


class Write(NamedTuple):
    """One part of a transaction."""

    key: Key
    change: int = 1


@dataclass(slots=True)
class _Expected:
    count: int = 0  # as acknowledged
    writes: int = 0
    removed: bool = False  # a removal was acknowledged: what is there too much is a lost write
    maybe_more: int = 0  # the connection broke before the answer
    maybe_less: int = 0

    @property
    def unknown(self) -> int:
        return self.maybe_more + self.maybe_less


@dataclass(frozen=True, slots=True)
class LedgerReport:
    checked: int  # acknowledged writes
    lost: int
    duplicated: int
    unknown: int  # writes whose answer never came; they may be there or not
    examples: tuple[str, ...] = ()  # ids of differing things, never values

    @property
    def complete(self) -> bool:
        return not self.lost and not self.duplicated


@dataclass
class Ledger:
    """Append-only. One line a write: `A` acknowledged or `U` unknown, tenant, thing, id, change."""

    path: Path | None = None
    writes: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self._expected: defaultdict[Key, _Expected] = defaultdict(_Expected)
        self._file = self.path.open("a", encoding="ascii", buffering=1) if self.path else None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def begin(self, key: Key, value: int) -> None:
        """What a counter is before the first write."""
        self._expected[key].count = value

    def acknowledge(self, writes: Iterable[Write]) -> None:
        """The database has answered that the transaction with these writes is committed."""
        for key, change in writes:
            expected = self._expected[key]
            expected.count += change
            expected.writes += 1
            expected.removed |= change < 0
            self.writes += 1
            self._note("A", key, change)

    def doubt(self, writes: Iterable[Write]) -> None:
        """The connection broke before the answer."""
        for key, change in writes:
            expected = self._expected[key]
            expected.maybe_more += max(0, change)
            expected.maybe_less += max(0, -change)
            self._note("U", key, change)

    def compare(self, tenant: TenantId, actual: Mapping[Key, int]) -> LedgerReport:
        """With the counts of a database; a key that is not there counts 0."""
        lost = duplicated = 0
        examples: list[str] = []
        ours = {key: expected for key, expected in self._expected.items() if key.tenant == tenant}
        for key, expected in ours.items():
            count = actual.get(key, 0)
            missing = max(0, expected.count - expected.maybe_less - count)
            surplus = max(0, count - expected.count - expected.maybe_more)
            lost += missing + (surplus if expected.removed else 0)
            duplicated += 0 if expected.removed else surplus
            if missing or surplus:
                examples.append(f"{key.counted} {key.id}: {count} instead of {expected.count}")
        for key in actual.keys() - ours.keys():
            duplicated += actual[key]
            examples.append(f"{key.counted} {key.id}: never acknowledged")
        return LedgerReport(
            checked=sum(expected.writes for expected in ours.values()),
            lost=lost,
            duplicated=duplicated,
            unknown=sum(expected.unknown for expected in ours.values()),
            examples=tuple(examples[:10]),
        )

    def _note(self, mark: str, key: Key, change: int) -> None:
        if self._file is not None:
            self._file.write(f"{mark} {key.tenant} {key.counted} {key.id} {change}\n")


# Each answers (id, count) of what the writers have made for a tenant.
_COUNTS: Mapping[Counted, LiteralString] = {
    Counted.ACTIVITY: """
        select write_id, count(*) from {crm}.activities
         where tenant_id = %(tenant)s and write_id is not null group by write_id""",
    Counted.INVOICE: """
        select reference, count(*) from {crm}.invoices
         where tenant_id = %(tenant)s and reference is not null group by reference""",
    Counted.INVOICE_LINE: """
        select i.reference, count(*) from {crm}.invoice_lines l join {crm}.invoices i on i.id = l.invoice_id
         where l.tenant_id = %(tenant)s and i.reference is not null group by i.reference""",
    Counted.DOCUMENT: """
        select id, count(*) from {dms}.documents
         where tenant_id = %(tenant)s and metadata ? 'writer' group by id""",
    Counted.CONTACT_TOUCHES: """
        select id, touches from {crm}.contacts where tenant_id = %(tenant)s and touches > 0""",
    Counted.DOCUMENT_REVISION: """
        select id, revision from {dms}.documents where tenant_id = %(tenant)s and revision > 0""",
}


def verify_ledger(ledger: Ledger, url: Secret, schemas: Mapping[str, str], tenant: TenantId) -> LedgerReport:
    """The ledger against the database where the tenant lives in the end; `schemas` by service."""
    names = {service: sql.Identifier(name) for service, name in schemas.items()}
    actual: dict[Key, int] = {}
    with psycopg.connect(url.reveal(), autocommit=True) as conn:
        for counted, query in _COUNTS.items():
            rows: list[Any] = conn.execute(sql.SQL(query).format(**names), {"tenant": tenant}).fetchall()
            actual |= {Key(tenant, counted, str(id_)): count for id_, count in rows}
    return ledger.compare(tenant, actual)
