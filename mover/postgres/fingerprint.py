"""A canonical description of schemas' contents, by which two sides are compared whatever their versions.

Everything of ours is left out, and so are comments, privileges and statistics, which moved rows do not
depend on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import psycopg
from psycopg.rows import dict_row

from mover.core.alignment import Difference
from mover.core.ddl import rename_body, rename_schemas
from mover.sql import load

_PORTABLE = (
    "types",
    "relations",
    "row_security",
    "partitions",
    "columns",
    "constraints",
    "indexes",
    "triggers",
    "policies",
    "sequences",
    "functions",
)
_WORDS = ("words_functions", "words_views", "words_rules", "words_policies")


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """`lines` and `words` are object -> description, under the target's schema names."""

    major: int
    lines: Mapping[str, str]
    words: Mapping[str, str]  # deparsed queries: comparable between equal major versions only

    @property
    def digest(self) -> str:
        """Equal for equal schemas, across versions."""
        return hashlib.sha256(json.dumps(dict(self.lines), sort_keys=True).encode()).hexdigest()


async def fingerprint(conn: psycopg.AsyncConnection[Any], schemas: Mapping[str, str]) -> Fingerprint:
    """Of this side's schemas, named by their counterparts: on the target every schema maps to itself."""
    lines: dict[str, str] = {}
    for query in _PORTABLE:
        lines |= await _described(conn, query, schemas)
    for row in await _rows(conn, "function_bodies", schemas):
        key = rename_schemas(row["key"], schemas)
        lines[key] = rename_body(row["text"], row["language"], schemas)
    words: dict[str, str] = {}
    for query in _WORDS:
        words |= await _described(conn, query, schemas)
    return Fingerprint(conn.info.server_version // 10000, lines, words)


def differences(source: Fingerprint, target: Fingerprint) -> list[Difference]:
    """What differs, in a stable order."""
    found = _compared(source.lines, target.lines)
    if source.major == target.major:
        found += _compared(source.words, target.words)
    else:
        found += _compared(dict.fromkeys(source.words, ""), dict.fromkeys(target.words, ""))
    return found


def _compared(source: Mapping[str, str], target: Mapping[str, str]) -> list[Difference]:
    return [
        Difference(key, source.get(key), target.get(key))
        for key in sorted(source.keys() | target.keys())
        if source.get(key) != target.get(key)
    ]


async def _described(
    conn: psycopg.AsyncConnection[Any], query: str, schemas: Mapping[str, str]
) -> dict[str, str]:
    return {
        rename_schemas(row["key"], schemas): rename_schemas(row["text"] or "", schemas)
        for row in await _rows(conn, query, schemas)
    }


async def _rows(
    conn: psycopg.AsyncConnection[Any], query: str, schemas: Mapping[str, str]
) -> list[dict[str, Any]]:
    async with conn.cursor(row_factory=dict_row) as cursor:
        await cursor.execute(load("fingerprint")[query], {"schemas": list(schemas)})
        return await cursor.fetchall()
