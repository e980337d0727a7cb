"""`mover verify`: are a tenant's rows the same in two databases? Needs no migration and changes nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from mover.core.errors import Refused
from mover.core.facts import ForeignKey, Relation, Tenancy
from mover.core.ids import TenantId
from mover.core.secret import Secret
from mover.core.tables import MovedTable
from mover.postgres import catalog
from mover.postgres.connect import Database
from mover.postgres.digests import verify_databases
from verify.pairing import Pairing, pair
from verify.report import Verdict


@dataclass(frozen=True, slots=True)
class Question:
    """Whose rows, and where."""

    tenant: TenantId
    source: Secret
    target: Secret
    schemas: Mapping[str, str]  # source schema -> target schema
    tenancy: Tenancy


@dataclass(frozen=True, slots=True)
class Comparison:
    """The rows' verdict, and the tables that could not be compared."""

    verdict: Verdict
    pairing: Pairing

    @property
    def equal(self) -> bool:
        return self.verdict.equal and not self.pairing.incomparable

    def report(self, *, with_keys: bool) -> dict[str, object]:
        """As JSON; a key is a value of a row, so keys are there only when they are asked for."""
        evidence = self.verdict.evidence()
        mismatches = [mismatch.evidence() for mismatch in self.verdict.mismatches]
        if not with_keys:
            mismatches = [_without_keys(mismatch) for mismatch in mismatches]
        incomparable = {str(table): reason for table, reason in self.pairing.incomparable.items()}
        return evidence | {
            "equal": self.equal,
            "mismatches": mismatches,
            "incomparable": incomparable,
            "left_out": [str(table) for table in self.pairing.left_out],
        }


class Counter(Protocol):
    """Hears how far a comparison is."""

    def expect(self, rows: int) -> None:
        """About so many rows; 0 when nobody knows."""
        ...

    def compared(self, rows: int) -> None:
        """So many more."""
        ...


async def compare(question: Question, counter: Counter) -> Comparison:
    """Raises Refused when there is nothing that could be compared."""
    source, target = Database(question.source, "source"), Database(question.target, "target")
    (ours, foreign_keys), (theirs, _) = await asyncio.gather(
        _read(source, question.schemas.keys()), _read(target, question.schemas.values())
    )
    pairing = pair(ours, theirs, foreign_keys, question.schemas, question.tenancy)
    if not pairing.tables and not pairing.incomparable:
        raise Refused(
            f"no table of {', '.join(question.schemas)} has the column {question.tenancy.column}",
            hint="Check the schemas and the column.",
        )
    tables = await _sized(source, pairing.tables, question.tenant)
    counter.expect(sum(table.estimated_rows for table in tables))
    verdict = await verify_databases(
        source, target, tables, question.tenant, pairing.fingerprints, progress=counter.compared
    )
    return Comparison(verdict, pairing)


async def _read(
    database: Database, schemas: Collection[str]
) -> tuple[tuple[Relation, ...], tuple[ForeignKey, ...]]:
    """The tables and foreign keys of all of `schemas`, which must be there."""
    async with database.connect("verify") as conn:
        there = await catalog.existing_schemas(conn, schemas)
        if missing := sorted(set(schemas) - there.keys()):
            raise Refused(
                f"schema {', '.join(missing)} does not exist on the {database.label}",
                hint="Check the schemas and the URL.",
            )
        relations = await catalog.read_relations(conn, schemas)
        return relations, await catalog.read_foreign_keys(conn, schemas)


async def _sized(database: Database, tables: Sequence[MovedTable], tenant: TenantId) -> Sequence[MovedTable]:
    """With what the statistics say of the tenant's rows: for a progress bar, and the largest first."""
    sized = []
    async with database.connect("verify") as conn:
        for table in tables:
            (size,) = await catalog.rows(
                conn,
                "table_size",
                schema=table.source.schema,
                name=table.source.name,
                column=table.tenant_column,
                value=str(tenant),
            )
            share = size["share"] or 0.0  # nobody knows an owned table's
            rows, total = round(size["tuples"] * share), round(size["bytes"] * share)
            sized.append(replace(table, estimated_rows=rows, estimated_bytes=total))
    return sized


def _without_keys(mismatch: Mapping[str, object]) -> dict[str, object]:
    return {
        name: {"count": found["count"]} if isinstance(found, Mapping) else found
        for name, found in mismatch.items()
    }
