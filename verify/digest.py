"""Pure hashing: rows into leaves, leaves into a table's root, tables into the tenant's root.

A leaf's digest covers the rows' COPY text in key order, and the row count. Parents hash their children
in order and length-prefixed, so that no two different trees feed the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import xxhash

Digest = bytes  # xxh3-128, 16 bytes

# Children a parent; the same on every machine, or roots of equal data would differ.
FAN_OUT = 64


@dataclass(frozen=True, slots=True)
class LeafDigest:
    """What is compared: two leaves are equal when both fields are."""

    rows: int
    digest: Digest


class LeafHasher:
    """Hashes a leaf's COPY text as it arrives; where the text is cut into pieces does not matter."""

    def __init__(self) -> None:
        self._hash = xxhash.xxh3_128()

    def update(self, text: bytes) -> None:
        self._hash.update(text)

    def finish(self, rows: int) -> LeafDigest:
        return LeafDigest(rows, self._hash.digest())


def table_root(schema_fingerprint: str, leaves: Sequence[LeafDigest]) -> Digest:
    """The root of one table on one side: its schema and its leaves, in key order."""
    nodes = [_node(b"leaf", (leaf.rows.to_bytes(8), leaf.digest)) for leaf in leaves]
    while len(nodes) > FAN_OUT:
        nodes = [_node(b"parent", nodes[i : i + FAN_OUT]) for i in range(0, len(nodes), FAN_OUT)]
    return _node(b"table", (schema_fingerprint.encode(), *nodes))


def tenant_root(tables: Mapping[str, Digest]) -> Digest:
    """The root of all tables on one side, in name order."""
    return _node(b"tenant", (part for name in sorted(tables) for part in (name.encode(), tables[name])))


def _node(kind: bytes, parts: Iterable[bytes]) -> Digest:
    hasher = xxhash.xxh3_128(kind)
    for part in parts:
        hasher.update(len(part).to_bytes(8))
        hasher.update(part)
    return hasher.digest()
