"""The shape of what is moved: columns, tables, sequences, and the whole plan. Pure data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from mover.core.ids import Side, TableRef

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
class MovedTable:
    """A tenant table: on both sides, its rows are those `WHERE tenant_column = T`."""

    source: TableRef
    target: TableRef
    columns: tuple[Column, ...]  # in the source's order
    key: tuple[str, ...]  # in index order; empty where only whole rows can be told apart
    tenant_column: str
    estimated_rows: int = 0
    estimated_bytes: int = 0

    @property
    def copied(self) -> tuple[Column, ...]:
        """The columns whose values travel."""
        return tuple(c for c in self.columns if not c.generated)

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
        by_name = {c.name: c for c in self.columns}
        return tuple(by_name[name] for name in self.key)


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
