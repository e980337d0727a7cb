"""A plan as JSON-able data and back, for `platform.tenant_migrations.plan`.

The keys are the fields' names: a plan that was stored by this release is read by this release.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from mover.core.ids import Capture, Side, TableRef
from mover.core.tables import Column, Finding, MovedTable, Owner, Plan, SequenceRef, Shape


def encode_plan(plan: Plan) -> dict[str, Any]:
    return {
        "shape": {
            "schemas": dict(plan.shape.schemas),
            "tables": [asdict(table) for table in plan.shape.tables],
            "sequences": [asdict(sequence) for sequence in plan.shape.sequences],
            "fresh": plan.shape.fresh,
            "careful": sorted(plan.shape.careful),
            "capture": plan.shape.capture,
        },
        "findings": [asdict(finding) for finding in plan.findings],
        "classes": dict(plan.classes),
        "facts": dict(plan.facts),
    }


def decode_plan(data: Mapping[str, Any]) -> Plan:
    """Raises KeyError or TypeError when `data` is not what `encode_plan` makes."""
    shape = data["shape"]
    return Plan(
        shape=Shape(
            schemas=dict(shape["schemas"]),
            tables=tuple(_table(item) for item in shape["tables"]),
            sequences=tuple(_sequence(item) for item in shape["sequences"]),
            fresh=shape["fresh"],
            careful=frozenset(map(Side, shape["careful"])),
            capture=Capture(shape["capture"]),
        ),
        findings=tuple(_finding(item) for item in data["findings"]),
        classes=dict(data["classes"]),
        facts=dict(data["facts"]),
    )


def _ref(data: Mapping[str, str]) -> TableRef:
    return TableRef(**data)


def _table(data: Mapping[str, Any]) -> MovedTable:
    nested = {
        "source": _ref(data["source"]),
        "target": _ref(data["target"]),
        "columns": tuple(Column(**column) for column in data["columns"]),
        "key": tuple(data["key"]),
        "owners": tuple(_owner(item) for item in data.get("owners", ())),
        "referenced": tuple(tuple(names) for names in data.get("referenced", ())),
        "awaited": tuple(data.get("awaited", ())),
    }
    return MovedTable(**{**data, **nested})


def _owner(data: Mapping[str, Any]) -> Owner:
    nested = {
        "source": _ref(data["source"]),
        "target": _ref(data["target"]),
        "columns": tuple(data["columns"]),
        "referenced": tuple(data["referenced"]),
        "waits": tuple(data.get("waits", ())),
        "owners": tuple(_owner(item) for item in data.get("owners", ())),
    }
    return Owner(**{**data, **nested})


def _sequence(data: Mapping[str, Any]) -> SequenceRef:
    return SequenceRef(source=_ref(data["source"]), target=_ref(data["target"]))


def _finding(data: Mapping[str, Any]) -> Finding:
    table = data["table"]
    return Finding(**{**data, "table": _ref(table) if table is not None else None})
