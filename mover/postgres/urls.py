"""A database's URL as each driver's parameters, and why nobody can connect to it. Never the URL itself."""

from __future__ import annotations

import ssl
from socket import gaierror
from typing import Any

import asyncpg
import psycopg
from psycopg.conninfo import conninfo_to_dict

from mover.core.errors import MoverError, Refused, Unreachable
from mover.core.secret import Secret
from mover.postgres.errors import translated

CONNECT_TIMEOUT_S = 10
_CHECK = "Check that the server runs, and host and port of its URL."


def libpq_parameters(url: Secret, label: str) -> dict[str, Any]:
    """Raises Refused when libpq does not understand the URL."""
    try:
        return conninfo_to_dict(url.reveal())
    except psycopg.ProgrammingError:
        raise Refused(
            f"{label}: the URL is not one that PostgreSQL's client library understands",
            hint="Check its form; special characters of a password are percent-encoded (@ is %40).",
        ) from None  # the library quotes the URL's parts


def asyncpg_parameters(url: Secret) -> dict[str, Any]:
    """libpq's URL or key=value form as asyncpg's arguments."""
    params = conninfo_to_dict(url.reveal())
    known = {"host": "host", "port": "port", "user": "user", "password": "password", "dbname": "database"}
    arguments: dict[str, Any] = {ours: params[theirs] for theirs, ours in known.items() if theirs in params}
    if "port" in arguments:
        arguments["port"] = int(arguments["port"])
    arguments["ssl"] = _ssl(str(params.get("sslmode", "prefer")), params.get("sslrootcert"))
    return arguments


def _ssl(mode: str, root_certificate: Any) -> str | ssl.SSLContext:
    """asyncpg reads sslmode words itself; a root certificate needs a context."""
    if root_certificate is None or mode not in ("verify-ca", "verify-full"):
        return mode
    context = ssl.create_default_context(cafile=str(root_certificate))
    context.check_hostname = mode == "verify-full"
    return context


async def why_unreachable(url: Secret, label: str, error: psycopg.OperationalError) -> MoverError:
    """What a failed connection means: libpq gives no SQLSTATE for one, asyncpg does, so it tries as well."""
    if isinstance(error, psycopg.errors.ConnectionTimeout):
        return Unreachable(f"{label}: the server does not answer", hint=_CHECK)
    try:
        conn = await asyncpg.connect(**asyncpg_parameters(url), timeout=CONNECT_TIMEOUT_S)
    except asyncpg.PostgresError as reason:
        return translated(reason, label)
    except TimeoutError:
        return Unreachable(f"{label}: the server does not answer", hint=_CHECK)
    except ConnectionRefusedError:
        return Unreachable(f"{label}: nothing listens at the server's address", hint=_CHECK)
    except gaierror:
        return Unreachable(f"{label}: the server's host name is not known", hint=_CHECK)
    except (OSError, ValueError, asyncpg.InterfaceError, asyncpg.InternalClientError) as reason:
        return Unreachable(f"{label}: no connection to the server ({type(reason).__name__})", hint=_CHECK)
    await conn.close()
    return Unreachable(f"{label}: the server did not answer just now", hint=_CHECK)
