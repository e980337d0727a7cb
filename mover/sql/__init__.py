"""The loader of the SQL that ships with the package.

A topic file holds blocks that open with `-- name: x`, followed by a comment that says which locks the
query takes and why it may be repeated. A `{placeholder}` is filled with `psycopg.sql` by the caller.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from types import MappingProxyType
from typing import LiteralString, NamedTuple

_NAME = re.compile(r"^-- name: (\w+)\n", re.MULTILINE)


class NumberedFile(NamedTuple):
    """One schema migration: `0001_name.sql`."""

    version: int
    name: str
    text: LiteralString


@cache
def load(topic: str) -> Mapping[str, LiteralString]:
    """The queries of `mover/sql/<topic>.sql`, by name."""
    return parse(_read(f"{topic}.sql"), topic)


def parse(text: LiteralString, topic: str) -> Mapping[str, LiteralString]:
    """Split a topic file into its queries; raises ValueError for one without name or comment."""
    opening, *parts = _NAME.split(text)
    if any(line.strip() and not line.startswith("--") for line in opening.splitlines()):
        raise ValueError(f"{topic}: a query before the first name")
    queries: dict[str, LiteralString] = {}
    for name, body in zip(parts[::2], parts[1::2], strict=True):
        if name in queries:
            raise ValueError(f"{topic}: {name} is there twice")
        if not body.startswith("-- "):
            raise ValueError(f"{topic}: {name} does not say why it is safe")
        queries[name] = body.strip()
    return MappingProxyType(queries)


@cache
def load_numbered(folder: str) -> tuple[NumberedFile, ...]:
    """The numbered files of `mover/sql/<folder>`, in order."""
    found = []
    for entry in (files(__name__) / folder).iterdir():
        number, _, rest = entry.name.partition("_")
        if entry.name.endswith(".sql") and number.isdigit():
            found.append(
                NumberedFile(int(number), rest.removesuffix(".sql"), _read(f"{folder}/{entry.name}"))
            )
    return tuple(sorted(found))


def _read(path: str) -> LiteralString:
    # Shipped with the code and never built from input: a literal in all but syntax.
    return (files(__name__) / path).read_text(encoding="utf-8")
