"""The verdict of a comparison. It names tables, counts and keys, never another value of a row; keys are
for the operator's report and the stored evidence, not for log lines.
"""

from __future__ import annotations

from dataclasses import dataclass

from mover.core.ids import TableRef
from verify.digest import Digest, tenant_root
from verify.narrow import Differences


@dataclass(frozen=True, slots=True)
class Mismatch:
    """How one table differs, under the source's name."""

    table: TableRef
    keys: Differences
    columns: tuple[str, ...] = ()  # in which the `different` keys differ
    schema: bool = False  # the schema fingerprints differ

    def __str__(self) -> str:
        """Without keys: fit for messages and logs."""
        parts = [f"{keys.count} {kind}" for kind, keys in self.keys.by_kind().items() if keys.count]
        if self.columns:
            parts.append(f"in columns {', '.join(self.columns)}")
        if self.schema:
            parts.append("different schemas")
        return f"{self.table}: {', '.join(parts) or 'digests differ'}"

    def evidence(self) -> dict[str, object]:
        return {
            "table": str(self.table),
            "columns": list(self.columns),
            "schema": self.schema,
            **{
                kind: {"count": keys.count, "keys": [list(key) for key in keys.examples]}
                for kind, keys in self.keys.by_kind().items()
            },
        }


@dataclass(frozen=True, slots=True)
class TableVerdict:
    """One table's comparison, under the source's name."""

    table: TableRef
    source_rows: int
    target_rows: int
    source_root: Digest
    target_root: Digest
    mismatch: Mismatch | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """The whole comparison."""

    tables: tuple[TableVerdict, ...]

    @property
    def equal(self) -> bool:
        return all(t.source_root == t.target_root for t in self.tables)

    @property
    def source_root(self) -> str:
        return tenant_root({str(t.table): t.source_root for t in self.tables}).hex()

    @property
    def target_root(self) -> str:
        return tenant_root({str(t.table): t.target_root for t in self.tables}).hex()

    @property
    def source_rows(self) -> int:
        return sum(t.source_rows for t in self.tables)

    @property
    def target_rows(self) -> int:
        return sum(t.target_rows for t in self.tables)

    @property
    def mismatches(self) -> tuple[Mismatch, ...]:
        return tuple(t.mismatch for t in self.tables if t.mismatch)

    def __str__(self) -> str:
        """One line for people, without keys."""
        if self.equal:
            return f"equal: {self.source_rows} rows in {len(self.tables)} tables, root {self.source_root}"
        return "; ".join(str(mismatch) for mismatch in self.mismatches)

    def evidence(self) -> dict[str, object]:
        """What is stored with the migration, as JSON."""
        return {
            "equal": self.equal,
            "source_root": self.source_root,
            "target_root": self.target_root,
            "rows": {str(t.table): [t.source_rows, t.target_rows] for t in self.tables},
            "mismatches": [mismatch.evidence() for mismatch in self.mismatches],
        }
