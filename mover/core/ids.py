"""The value types that name things: positions, tenants, migrations, tables."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import NewType
from uuid import UUID, uuid4, uuid5

TenantId = NewType("TenantId", UUID)
MigrationId = NewType("MigrationId", UUID)
# Rises at every claim of a migration; a transaction that carries an older one must not commit.
Epoch = NewType("Epoch", int)


def back_of(migration: MigrationId) -> MigrationId:
    """By which a migration's way back, from target to source, is told from its way there: both may pass
    through one database."""
    return MigrationId(uuid5(migration, "back"))


class Lsn(int):
    """A byte position in a server's WAL; prints and parses as PostgreSQL does (`16/B374D848`)."""

    @classmethod
    def parse(cls, text: str) -> Lsn:
        """Raises ValueError when `text` is not of the form `hex/hex`."""
        high, slash, low = text.partition("/")
        if not slash:
            raise ValueError(f"not an LSN: {text!r}")
        return cls((int(high, 16) << 32) | int(low, 16))

    def __str__(self) -> str:
        return f"{self >> 32:X}/{self & 0xFFFFFFFF:X}"

    __repr__ = __str__


def new_mark() -> str:
    """What nobody else waits for in the stream: 32 hexadecimal digits."""
    return uuid4().hex


class Tier(StrEnum):
    """How isolated a tenant's rows are: a schema, a vertical's database, its own database."""

    SCHEMA = "schema"
    DATABASE = "database"
    DEDICATED = "dedicated"


class Capture(StrEnum):
    """How the source's changes are followed."""

    WAL = "wal"  # logical decoding: a publication and a slot
    TRIGGER = "trigger"  # triggers write down which rows changed


class Side(StrEnum):
    """Which of a migration's two databases."""

    SOURCE = "source"
    TARGET = "target"


@dataclass(frozen=True, slots=True, order=True)
class TableRef:
    """A table's schema and name, unquoted; for people: compose SQL from the parts."""

    schema: str
    name: str

    def __str__(self) -> str:
        return f"{self.schema}.{self.name}"
