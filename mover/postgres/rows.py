"""Rows of schema `platform` as the values that ports speak of."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from functools import partial
from typing import Any

from psycopg import sql
from psycopg.types.json import Jsonb

from mover.core.ids import MigrationId, TenantId, Tier
from mover.core.migration import Event, Migration, Progress, Step, Wish
from mover.core.states import Phase, Status

_RENAMED = {"tenant": "tenant_id"}
COLUMNS = sql.SQL(", ").join(sql.Identifier(_RENAMED.get(f.name, f.name)) for f in fields(Migration))
_PROGRESS_FIELDS = frozenset(f.name for f in fields(Progress))
_as_json = partial(json.dumps, default=str)  # LSNs, UUIDs, times


def jsonb(value: object) -> Jsonb:
    return Jsonb(value, dumps=_as_json)


def migration_of(row: Mapping[str, Any]) -> Migration:
    return Migration(
        id=MigrationId(row["id"]),
        tenant=TenantId(row["tenant_id"]),
        source_vertical=row["source_vertical"],
        source_tier=Tier(row["source_tier"]),
        target_vertical=row["target_vertical"],
        target_tier=Tier(row["target_tier"]),
        status=Status(row["status"]),
        phase=Phase(row["phase"]) if row["phase"] else None,
        priority=row["priority"],
        scheduled_at=row["scheduled_at"],
        reason=row["reason"],
        requested_by=row["requested_by"],
        created_at=row["created_at"],
        started_at=row["started_at"],
        switched_at=row["switched_at"],
        completed_at=row["completed_at"],
        rolled_back_at=row["rolled_back_at"],
        error=row["error"],
        wish=Wish(row["wish"]) if row["wish"] else None,
        outcome=Status(row["outcome"]) if row["outcome"] else None,
    )


def step_of(row: Mapping[str, Any]) -> Step:
    return Step(
        name=row["name"],
        status=row["status"],
        started_at=row["started_at"],
        duration_ms=row["duration_ms"],
        detail=row["detail"],
    )


def event_of(row: Mapping[str, Any]) -> Event:
    return Event(row["id"], row["at"], row["level"], row["message"], row["facts"])


def progress_document(progress: Progress) -> Jsonb:
    return jsonb(asdict(progress))


def progress_of(document: Mapping[str, Any]) -> Progress:
    """Keys that another release wrote are left out."""
    return Progress(**{key: value for key, value in document.items() if key in _PROGRESS_FIELDS})
