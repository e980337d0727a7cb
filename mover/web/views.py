"""Values as the API's JSON: camelCase keys, ISO times, nothing that is not meant to be seen."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from datetime import datetime
from functools import partial
from typing import Any

from mover.core.migration import (
    Event,
    Migration,
    MigrationRequest,
    Place,
    Progress,
    Step,
    percent_done,
)
from mover.core.states import PHASES
from mover.core.tables import Finding, MovedTable, Plan

dumps = partial(json.dumps, default=str)
_RENAMED = {"tenant": "tenantId"}


def camel(name: str) -> str:
    """`lag_bytes` -> `lagBytes`."""
    first, *rest = name.split("_")
    return first + "".join(word.capitalize() for word in rest)


def time_text(at: datetime | None) -> str | None:
    return at.isoformat() if at else None


def migration_view(migration: Migration) -> dict[str, Any]:
    view = {}
    for field in fields(migration):
        value = getattr(migration, field.name)
        if isinstance(value, datetime):
            value = time_text(value)
        elif value is not None and not isinstance(value, int | dict):
            value = str(value)
        view[_RENAMED.get(field.name, camel(field.name))] = value
    return view


def step_view(step: Step) -> dict[str, Any]:
    return {
        "name": step.name,
        "status": step.status,
        "startedAt": time_text(step.started_at),
        "durationMs": step.duration_ms,
        "detail": step.detail,
    }


def progress_view(migration: Migration, progress: Progress, steps: Sequence[Step]) -> dict[str, Any]:
    return {
        "id": str(migration.id),
        "tenantId": str(migration.tenant),
        "status": migration.status.value,
        "phase": migration.phase.value if migration.phase else None,
        "percent": percent_done(migration.status, migration.phase, progress),
        "steps": [step_view(step) for step in steps],
        "rows": {"done": progress.rows_done, "total": progress.rows_total},
        "bytes": {"done": progress.bytes_done, "total": progress.bytes_total},
        "changesApplied": progress.changes_applied,
        "lagBytes": progress.lag_bytes,
        "lagSeconds": progress.lag_seconds,
        "etaSeconds": progress.eta_seconds,
        "pauseMs": progress.pause_ms,
        "waitingFor": progress.waiting_for,
        "capture": progress.capture,
        "error": migration.error,
    }


def event_view(event: Event) -> dict[str, Any]:
    return {
        "type": "event",
        "id": event.id,
        "at": time_text(event.at),
        "level": event.level,
        "message": event.message,
        "facts": {camel(key): value for key, value in event.facts.items()},
    }


def plan_view(request: MigrationRequest, source: Place, target: Place, plan: Plan) -> dict[str, Any]:
    warnings = [finding for finding in plan.findings if finding.warning]
    return {
        "tenantId": str(request.tenant),
        "source": _place_view(source),
        "target": _place_view(target),
        "steps": [phase.value for phase in PHASES],
        "tables": [_table_view(table) for table in plan.shape.tables],
        "sequences": [str(sequence.source) for sequence in plan.shape.sequences],
        "classes": dict(plan.classes),
        "freshTarget": plan.shape.fresh,
        "refusals": [_finding_view(finding) for finding in plan.refusals],
        "warnings": [_finding_view(finding) for finding in warnings],
        "estimates": {
            "rows": sum(table.estimated_rows for table in plan.shape.tables),
            "bytes": sum(table.estimated_bytes for table in plan.shape.tables),
        },
        "facts": _camel_keys(plan.facts),
    }


def _place_view(place: Place) -> dict[str, Any]:
    return {"vertical": place.vertical, "tier": place.tier.value, "schemas": list(place.schemas)}


def _table_view(table: MovedTable) -> dict[str, Any]:
    return {
        "source": str(table.source),
        "target": str(table.target),
        "key": list(table.key),
        "estimatedRows": table.estimated_rows,
        "estimatedBytes": table.estimated_bytes,
    }


def _finding_view(finding: Finding) -> dict[str, Any]:
    return {
        "code": finding.code,
        "message": finding.message,
        "hint": finding.hint,
        "table": str(finding.table) if finding.table else None,
    }


def _camel_keys(data: Mapping[str, object]) -> dict[str, object]:
    return {
        camel(key): _camel_keys(value) if isinstance(value, Mapping) else value for key, value in data.items()
    }
