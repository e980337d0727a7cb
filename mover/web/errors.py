"""Errors as HTTP answers: one status and one shape for each kind, never a value or a secret."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from mover.core.errors import Conflict, InvalidRequest, MoverError, NotFound, Refused, Unreachable


class Unauthorized(MoverError):
    """No token, or one that nobody knows."""

    code = "unauthorized"


class Forbidden(MoverError):
    """The token's role does not allow this."""

    code = "forbidden"


class MalformedBody(MoverError):
    """The body is not JSON at all."""

    code = "malformed_json"


class NotImplementedYet(MoverError):
    """A route whose name is fixed and whose work is not built yet."""

    code = "not_implemented"


@dataclass(eq=False)
class InvalidBody(MoverError):
    """The body is JSON, and several of its fields may be wrong."""

    fields: Sequence[Mapping[str, str]] = ()

    code = "invalid_request"


# The first that fits.
_STATUS: tuple[tuple[type[MoverError], int], ...] = (
    (MalformedBody, 400),
    (Unauthorized, 401),
    (Forbidden, 403),
    (NotFound, 404),
    (Conflict, 409),
    (Refused, 409),
    (InvalidRequest, 422),
    (InvalidBody, 422),
    (NotImplementedYet, 501),
    (Unreachable, 503),
)


def status_of(error: MoverError) -> int:
    return next((status for kind, status in _STATUS if isinstance(error, kind)), 500)


def error_object(error: MoverError) -> dict[str, str]:
    """The API's error object; what is unknown is left out."""
    known = {
        "code": error.code,
        "message": error.message,
        "hint": error.hint,
        "tenant": error.where.tenant,
        "table": error.where.table,
        "lsn": error.where.lsn,
    }
    return {key: str(value) for key, value in known.items() if value is not None}


def error_response(error: MoverError) -> web.Response:
    body: dict[str, Any]
    match error:
        case InvalidBody():
            body = {"errors": list(error.fields)}
        case InvalidRequest():
            body = {"errors": [{"field": error.field or "body", "message": error.message}]}
        case _:
            body = {"error": error_object(error)}
    headers = {"WWW-Authenticate": "Bearer"} if isinstance(error, Unauthorized) else None
    return web.json_response(body, status=status_of(error), headers=headers)


def plain_response(error: web.HTTPException) -> web.Response:
    """aiohttp's own refusals (no such route, body too large) in our shape."""
    code = error.reason.lower().replace(" ", "_")
    headers = {"Allow": error.headers["Allow"]} if "Allow" in error.headers else None
    body = {"error": {"code": code, "message": error.reason}}
    return web.json_response(body, status=error.status, headers=headers)


def internal_response() -> web.Response:
    """For what we did not foresee: the reason is in the log alone."""
    body = {"error": {"code": "internal", "message": "internal error; the daemon's log has the place"}}
    return web.json_response(body, status=500)
