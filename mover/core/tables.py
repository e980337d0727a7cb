"""The shape of what is moved: columns, tables, sequences, and the whole plan. Pure data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from mover.core.ids import Capture, Side, TableRef

MAX_SCANNED_ROWS = 20_000  # of a table without a key, read within some ten milliseconds


@dataclass(frozen=True, slots=True)
class Column:
    """One live column. The types are `format_type()` text, schema-qualified for our own types,

    as each side spells them (`core_dms.status` against `realestate_dms.status`)."""

    name: str
    source_type: str
    target_type: str
    generated: bool = False  # GENERATED ALWAYS AS (…) STORED: left out of copy, changes and digests
    identity_always: bool = False
    not_null: bool = False
    collatable: bool = False  # ordered with COLLATE "C", since collations differ between servers


@dataclass(frozen=True, slots=True)
class Owner:
    """A foreign key that makes a row the tenant's, if the row that it refers to is."""

    source: TableRef  # the table referred to, on both sides
    target: TableRef
    columns: tuple[str, ...]  # of the owned table
    referenced: tuple[str, ...]  # what they refer to, in the same order
    tenant_column: str | None  # of the table referred to; None where it is owned itself
    owners: tuple[Owner, ...] = ()
    waits: tuple[
        str, ...
    ] = ()  # after which of `update` and `delete` the row stays, for another owner: NO ACTION


@dataclass(frozen=True, slots=True)
class MovedTable:
    """On both sides, the tenant's rows are those `WHERE tenant_column = T`, or those with an owner of his."""

    source: TableRef
    target: TableRef
    columns: tuple[Column, ...]  # in the source's order
    key: tuple[str, ...]  # in index order; empty where only whole rows can be told apart
    tenant_column: str | None
    estimated_rows: int = 0
    estimated_bytes: int = 0
    owners: tuple[Owner, ...] = ()  # any of them makes a row the tenant's; only without a tenant column
    referenced: tuple[tuple[str, ...], ...] = ()  # the columns by which owned tables refer to it
    awaited: tuple[str, ...] = ()  # after which of `update` and `delete` these may wait for the next such row
    sends_all: bool = False  # the server cannot filter by the tenant column, which is not in the key

    @property
    def filter_column(self) -> str | None:
        """By which the server sends only the tenant's changes; None where everybody's are in the stream."""
        return None if self.sends_all else self.tenant_column

    @property
    def is_filtered(self) -> bool:
        return self.filter_column is not None

    @property
    def copied(self) -> tuple[Column, ...]:
        """The columns whose values travel."""
        return tuple(c for c in self.columns if not c.generated)

    @property
    def identity(self) -> tuple[str, ...]:
        """What every change has to carry of the row before, the column of the filter first; whole rows
        without a key."""
        first = () if self.filter_column is None else (self.filter_column,)
        return tuple(
            dict.fromkeys((*first, *self.key, *(name for names in self.referenced for name in names)))
        )

    @property
    def shown(self) -> tuple[str, ...]:
        """The columns by which a row is told, and then those by which others refer to it."""
        return (*self.key, *(name for names in self.referenced for name in names))

    def holding(self, side: Side) -> Holding:
        table = self.source if side is Side.SOURCE else self.target
        return Holding(
            table, self.tenant_column, ties(self.owners, side), self.referenced, self.awaited, self.key
        )

    @property
    def is_quickly_compared(self) -> bool:
        """Whether what changed can be compared within a pause: without a key, every row is read for it."""
        return bool(self.key) or self.estimated_rows <= MAX_SCANNED_ROWS

    def spare(self, name: str) -> str:
        """`name`, or longer, as long as a column has it: for what we put beside the table's columns."""
        while any(column.name == name for column in self.columns):
            name += "_"
        return name

    @property
    def key_columns(self) -> tuple[Column, ...]:
        return self.named(self.key)

    def named(self, names: Iterable[str]) -> tuple[Column, ...]:
        by_name = {c.name: c for c in self.columns}
        return tuple(by_name[name] for name in names)


@dataclass(frozen=True, slots=True)
class Holding:
    """Which rows of a table on one side are the tenant's."""

    table: TableRef
    tenant_column: str | None
    ties: tuple[Tie, ...] = ()
    referenced: tuple[tuple[str, ...], ...] = ()
    awaited: tuple[str, ...] = ()
    key: tuple[str, ...] = ()

    @property
    def depth(self) -> int:
        """How many rows away the tenant column is."""
        return max((tie.parent.depth + 1 for tie in self.ties), default=0)


@dataclass(frozen=True, slots=True)
class Tie:
    """An owner on one side."""

    parent: Holding
    columns: tuple[str, ...]
    referenced: tuple[str, ...]


def ties(owners: Iterable[Owner], side: Side) -> tuple[Tie, ...]:
    return tuple(
        Tie(
            Holding(
                owner.source if side is Side.SOURCE else owner.target,
                owner.tenant_column,
                ties(owner.owners, side),
            ),
            owner.columns,
            owner.referenced,
        )
        for owner in owners
    )


@dataclass(frozen=True, slots=True)
class SequenceRef:
    """A sequence of the moved schemas under its name on each side."""

    source: TableRef
    target: TableRef


@dataclass(frozen=True, slots=True)
class Finding:
    """Something preflight has to say; a refusal unless `warning`."""

    code: str  # stable, e.g. "no_tenant_column"
    message: str  # which and why
    hint: str  # what to do
    table: TableRef | None = None
    warning: bool = False


@dataclass(frozen=True, slots=True)
class Shape:
    """What moves: everything that copy, stream, digest and clean-up need to know of the schemas."""

    schemas: Mapping[str, str]  # source schema -> target schema
    tables: tuple[MovedTable, ...]  # parents before children
    sequences: tuple[SequenceRef, ...] = ()
    fresh: bool = True  # the target's schemas did not exist before this migration
    # The sides on which triggers and foreign keys act on what we write: our role may not set
    # session_replication_role there.
    careful: frozenset[Side] = frozenset()
    capture: Capture = Capture.WAL

    @property
    def checks_while_copying(self) -> bool:
        """Whether the target checks foreign keys of rows that are copied; a fresh one gets them later."""
        return Side.TARGET in self.careful and not self.fresh


@dataclass(frozen=True, slots=True)
class Plan:
    """Preflight's answer, shown by `--dry-run`."""

    shape: Shape
    findings: tuple[Finding, ...] = ()
    classes: Mapping[str, str] = field(default_factory=dict)  # "schema.table" -> tenant | reference | …
    facts: Mapping[str, object] = field(default_factory=dict)  # versions, wal_level, free slots, …

    @property
    def refusals(self) -> tuple[Finding, ...]:
        return tuple(f for f in self.findings if not f.warning)
