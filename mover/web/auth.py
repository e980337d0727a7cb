"""Who calls: bearer tokens, known by their SHA-256 alone and compared in constant time."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from dataclasses import dataclass

from mover.config import Role, Token
from mover.web.errors import Forbidden, Unauthorized

_ROLES = tuple(Role)  # each may do what those before it may


@dataclass(frozen=True, slots=True)
class Caller:
    """A token's name and role."""

    name: str
    role: Role

    def require(self, role: Role) -> None:
        """Raises Forbidden when this caller's role is a lesser one."""
        if _ROLES.index(self.role) < _ROLES.index(role):
            raise Forbidden(f"this needs the role {role}; the token {self.name} has {self.role}")


class Doorkeeper:
    """Tells callers by their tokens."""

    def __init__(self, tokens: Sequence[Token]) -> None:
        self._tokens = tuple(tokens)

    def caller(self, authorization: str | None, query_token: str | None = None) -> Caller:
        """Raises Unauthorized. `query_token` is what stands for the header where none can be set."""
        scheme, _, token = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not token.strip():
            token = query_token or ""
        if not token:
            raise Unauthorized("a token is needed", hint="Send `Authorization: Bearer TOKEN`.")
        digest = hashlib.sha256(token.strip().encode(errors="surrogateescape")).hexdigest()
        # Every token is compared, so that the time tells neither whether nor which one fits.
        fitting = [known for known in self._tokens if hmac.compare_digest(known.sha256, digest)]
        if not fitting:
            raise Unauthorized("the token is not known", hint="Check `api.tokens` in the configuration.")
        return Caller(fitting[0].name, fitting[0].role)
