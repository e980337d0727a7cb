"""A row's text form, as PostgreSQL writes composite values (documentation, "Composite Type Input and Output
Syntax")."""

from __future__ import annotations

import re

from mover.core.changes import Row

_FIELD = re.compile(r'"((?:[^"\\]|""|\\.)*)"|([^,"\\]*)', re.DOTALL)
_ESCAPED = re.compile(r'""|\\(.)', re.DOTALL)


def parse_row(text: str) -> Row:
    """The values of a row with at least one column, in order: text, and NULL where nothing stands.

    Raises ValueError on anything that the server does not write."""
    if not (text.startswith("(") and text.endswith(")")):
        raise ValueError("not a row")
    values: Row = []
    at = 1
    while True:
        found = _FIELD.match(text, at, len(text) - 1)
        assert found is not None  # it may be empty
        quoted, plain = found.groups()
        if quoted is not None:
            values.append(_ESCAPED.sub(lambda escape: escape[1] or '"', quoted).encode())
        else:
            values.append(plain.encode() if plain else None)
        at = found.end()
        if at == len(text) - 1:
            return values
        if text[at] != ",":
            raise ValueError("not a row")
        at += 1
