"""Our own messages inside the source's WAL: marks that the stream must reach, truncations, and rows that
changed their tenant.

Messages are not filtered by publications: every slot of the database sees those of all migrations, so
a mark is a token that only its maker waits for.
"""

from __future__ import annotations

import json
import re

from mover.core.changes import OwnerChange, Rehomed, Truncated, Vacated
from mover.core.ids import TableRef

MARK_PREFIX = "mover.mark"
TRUNCATE_PREFIX = "mover.truncate"
OWNER_PREFIXES = REHOME_PREFIX, VACATE_PREFIX = ("mover.rehome", "mover.vacate")

_MARK = re.compile(rb"[0-9a-f]{32}")
# Transactional, so that it stands in the stream where its transaction commits; any role may call it.
EMIT_MARK = "SELECT pg_logical_emit_message(true, 'mover.mark', %s)"


def parse_mark(content: bytes) -> str | None:
    """One of ours (core.ids.new_mark); or None, since any role may write messages, of any length."""
    return content.decode() if _MARK.fullmatch(content) else None


def parse_truncated(content: bytes) -> Truncated | None:
    """The content that the guard's TRUNCATE trigger writes, a JSON array of schema and table, and of the
    partition's schema and name if it was one; or None, since any role may write messages."""
    try:
        names = json.loads(content)
    except (ValueError, RecursionError):
        return None
    match names:
        case [str(schema), str(table)]:
            return Truncated(TableRef(schema, table))
        case [str(schema), str(table), str(partition_schema), str(partition)]:
            return Truncated(TableRef(schema, table), TableRef(partition_schema, partition))
    return None


def parse_owner_change(prefix: str, content: bytes) -> OwnerChange | None:
    """The content that the telling triggers write, a JSON array of schema, table, and the row's referenced
    columns before and after; or None."""
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        return None
    match found:
        case [str(schema), str(table), dict(before), dict()] if prefix == VACATE_PREFIX:
            return Vacated(TableRef(schema, table), (before,))
        case [str(schema), str(table), dict(before), dict(after)]:
            return Rehomed(TableRef(schema, table), (before, after))
    return None
