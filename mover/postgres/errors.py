"""The one mapping from driver errors to ours. A server's message may hold a row's value (a unique
violation's DETAIL does), so only its SQLSTATE, condition name, table and constraint are passed on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import asyncpg
import psycopg

from mover.core.errors import (
    ApplyConflict,
    LockNotAvailable,
    MoverError,
    Refused,
    SchemaChanged,
    Unreachable,
    Where,
)
from mover.core.ids import TableRef

_CONFLICTS = {"23505", "23503", "23001", "23P01", "23502", "23514"}
# 57P0x: shutdown and start-up; 53xxx: out of connections, memory or disk; 25P0x: idle timeouts.
_PASSING_CLASSES = ("08", "53", "57P0", "25P03", "57P05", "58")
_PASSING = {"40001", "40P01", "57014", "55006"}
_DENIED = {"42501", "28000", "28P01", "3D000"}
_PARTITION = "Create the partition that the other side has, then resume."
_PLAIN = {
    "28P01": "wrong password",
    "28000": "the server does not let this role in",
    "3D000": "there is no such database",
    "53300": "the server has no connection left",
    "57P03": "the server is not ready yet",
}


class ServerError(MoverError):
    """PostgreSQL refused a statement of ours for a reason we do not know how to mend."""

    code = "server_error"


@contextmanager
def translate(label: str) -> Iterator[None]:
    """Driver errors inside the block leave as MoverError that names `label`, never a value."""
    try:
        yield
    except (
        psycopg.Error,
        asyncpg.PostgresError,
        asyncpg.InterfaceError,
        asyncpg.InternalClientError,  # what asyncpg says of a connection that the server ended while idle
    ) as error:
        raise translated(error, label) from error
    except (OSError, TimeoutError) as error:
        raise Unreachable(f"{label}: {type(error).__name__} while talking to the server") from error


def translated(error: Exception, label: str) -> MoverError:
    """`error` as ours, by its SQLSTATE."""
    state = getattr(error, "sqlstate", None)
    where = Where(table=_table(error))
    if state is None:
        return Unreachable(f"{label}: the connection broke ({type(error).__name__})", where=where)
    text = f"{label}: {_condition(error)} (SQLSTATE {state}){_objects(error)}"
    if state == "55P03":
        return LockNotAvailable(text, where=where)
    if state == "23514" and where.table is not None and _diagnostic(error, "constraint_name") is None:
        text = f"{label}: no partition of {where.table} takes a row"
        return SchemaChanged(text, where=where, hint=_PARTITION)
    if state in _CONFLICTS:
        return ApplyConflict(text, where=where)
    if state in _DENIED:
        return Refused(text, where=where, hint="Check the role, its password and its grants.")
    if state in _PASSING or state.startswith(_PASSING_CLASSES):
        return Unreachable(text, where=where)
    return ServerError(text, where=where)


def _condition(error: Exception) -> str:
    """`UniqueViolation` -> `unique violation`; in plain words where the name is none for people."""
    if (plain := _PLAIN.get(getattr(error, "sqlstate", None) or "")) is not None:
        return plain
    name = type(error).__name__.removesuffix("Error")
    return "".join(f" {c.lower()}" if c.isupper() else c for c in name).strip() or "error"


def _diagnostic(error: Exception, name: str) -> str | None:
    holder = error.diag if isinstance(error, psycopg.Error) else error
    value = getattr(holder, name, None)
    return value if isinstance(value, str) else None


def _table(error: Exception) -> TableRef | None:
    schema, table = _diagnostic(error, "schema_name"), _diagnostic(error, "table_name")
    return TableRef(schema, table) if schema and table else None


def _objects(error: Exception) -> str:
    named = [(kind, _diagnostic(error, f"{kind}_name")) for kind in ("table", "column", "constraint")]
    text = ", ".join(f"{kind} {name}" for kind, name in named if name)
    return f": {text}" if text else ""
