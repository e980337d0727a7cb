"""What preflight has to say of the two servers and our roles there. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from mover.core.facts import Facts
from mover.core.tables import Finding
from mover.engine.table_classes import Classes

# Older minor releases can decode with a stale catalog after DDL and lose changes.
OLDEST_MINOR: Mapping[int, int] = {15: 13, 16: 9, 17: 5}


def source_server(facts: Facts, _: Classes) -> Iterator[Finding]:
    """What logical decoding needs."""
    server, side = facts.source.server, "target" if facts.is_back else "source"
    if not facts.is_streamed:
        return
    if server.wal_level != "logical":
        yield Finding(
            "wal_level",
            f"wal_level is {server.wal_level} on the {side}, so that changes cannot be decoded",
            f"ALTER SYSTEM SET wal_level = logical; then restart the {side}.",
        )
    if not server.replication:
        yield Finding(
            "no_replication",
            f"role {server.role} lacks REPLICATION on the {side}",
            f'ALTER ROLE "{server.role}" REPLICATION;',
        )
    for what, free, setting in (
        ("replication slot", server.slots_max - server.slots_used, "max_replication_slots"),
        ("WAL sender", server.senders_max - server.senders_used, "max_wal_senders"),
    ):
        if free < 1:
            yield Finding(
                f"no_free_{setting.removeprefix('max_')}",
                f"the {side} has no free {what}",
                f"Drop unused slots, or raise {setting} and restart the {side}.",
            )
    oldest = OLDEST_MINOR.get(server.major)
    if oldest is not None and server.version_num % 10000 < oldest:
        yield Finding(
            "old_minor",
            f"PostgreSQL {server.version} on the {side} can lose changes while decoding",
            f"Update it to {server.major}.{oldest} or later.",
        )
    if server.slot_wal_keep_mb >= 0:
        yield Finding(
            "slot_wal_keep",
            f"max_slot_wal_keep_size is {server.slot_wal_keep_mb} MB on the {side}: a slot that falls further"
            " behind is lost",
            "Raise it when the migration is expected to write more than that.",
            warning=True,
        )


def encodings(facts: Facts, _: Classes) -> Iterator[Finding]:
    """Values are compared by their bytes, and what triggers tell is read as UTF-8."""
    source, target = facts.source.server.encoding, facts.target.server.encoding
    if "SQL_ASCII" in (source, target):
        yield Finding(
            "encoding",
            f"the encodings are {source} on the source and {target} on the target: with SQL_ASCII nobody"
            " knows what bytes mean",
            "Bring the rows into a database with ENCODING 'UTF8' first.",
        )
    elif source != target:
        yield Finding(
            "encoding",
            f"the source's encoding is {source}, the target's {target}: the same text has other bytes there",
            f"Create the target's database with TEMPLATE template0 ENCODING '{source}'.",
        )


def both_servers(facts: Facts, _: Classes) -> Iterator[Finding]:
    for side, server in (("source", facts.source.server), ("target", facts.target.server)):
        if server.in_recovery:
            yield Finding("standby", f"the {side} is a standby", "Give the URL of the primary.")
        if server.pooled:
            yield Finding(
                "pooler",
                f"a connection pooler stands in front of the {side}",
                "Give a URL that reaches PostgreSQL directly: snapshots and locks need one session.",
            )
        if not server.may_create_schema:
            yield Finding(
                "no_create",
                f"role {server.role} may not create schemas on the {side}",
                f'GRANT CREATE ON DATABASE "{server.database}" TO "{server.role}";',
            )
        if server.strangers:
            yield Finding(
                "schema_of_a_stranger",
                f"schema mover on the {side}, or something in it, belongs to {', '.join(server.strangers)},"
                f" whose triggers would run with the rights of {server.role}",
                f"DROP SCHEMA mover CASCADE; or, when it is an earlier mover's, ALTER SCHEMA mover OWNER TO"
                f' "{server.role}"; and what is in it.',
            )
        if server.connections_free < facts.connections_wanted:
            yield Finding(
                "few_connections",
                f"{server.connections_free} connections are free on the {side},"
                f" up to {facts.connections_wanted} may be used",
                "Lower engine.max_connections_per_database, or raise max_connections.",
                warning=True,
            )
        if server.long_transactions:
            oldest = server.long_transactions[0]
            yield Finding(
                "long_transactions",
                f"{len(server.long_transactions)} transactions are older than a minute on the {side};"
                f" the oldest, of {oldest.application or 'an unnamed application'}"
                f" (pid {oldest.pid or 'none'}), is {oldest.age_seconds:.0f} s old",
                "Preparing waits for them: end them, or expect a delay.",
                warning=True,
            )
