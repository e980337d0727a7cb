"""Facts as preflight gathers them of a sound migration, for tests that change one thing."""

from __future__ import annotations

from dataclasses import replace
from uuid import UUID

from mover.core.facts import (
    ColumnFacts,
    Facts,
    ForeignKey,
    IndexFacts,
    Relation,
    Rows,
    ServerFacts,
    SideFacts,
    Tenancy,
)
from mover.core.ids import Capture, TableRef, TenantId

SERVER = ServerFacts(
    version_num=160014,
    system_identifier="1",
    timeline=1,
    in_recovery=False,
    database="core",
    encoding="UTF8",
    wal_level="logical",
    role="mover",
    superuser=False,
    replication=True,
    bypass_rls=False,
    create_role=False,
    slots_max=10,
    slots_used=0,
    senders_max=10,
    senders_used=0,
    connections_max=100,
    connections_used=10,
    connections_reserved=3,
    slot_wal_keep_mb=-1,
    may_set_replica_role=True,
    may_create_schema=True,
    pooled=False,
)
KEY = IndexFacts("pkey", ("id",), primary=True, partial=False, immediate=True, replica_identity=False)


def column(name, type="uuid", not_null=True):
    return ColumnFacts(name, type, not_null, generated="", identity="", collatable=type == "text")


def table(name, **changes):
    base = Relation(
        ref=TableRef("core_dms", name),
        kind="r",
        persistence="p",
        inherits=False,
        row_security=False,
        row_security_forced=False,
        owner="mover",
        owned=True,
        privileges=frozenset({"SELECT", "INSERT", "UPDATE", "DELETE"}),
        replica_identity="d",
        columns=(column("id"), column("tenant_id"), column("title", "text")),
        indexes=(KEY,),
    )
    return replace(base, **changes)


def key(child, parent, columns=("parent_id",)):
    return ForeignKey(
        f"{child}_fk", TableRef("core_dms", child), TableRef("core_dms", parent), columns, ("id",)
    )


def facts(*relations, foreign_keys=(), source=None, target=None, **changes):
    """A sound migration of `relations` to a fresh target, but for what the arguments change."""
    relations = relations or (table("documents"),)
    side = SideFacts(SERVER, frozenset({"core_dms"}), relations=relations, foreign_keys=tuple(foreign_keys))
    other = SideFacts(replace(SERVER, system_identifier="2", version_num=180004), frozenset())
    base = Facts(
        tenant=TenantId(UUID(int=1)),
        tenancy=Tenancy("tenant_id"),
        schemas={"core_dms": "realestate_dms"},
        source=replace(side, **(source or {})),
        target=replace(other, **(target or {})),
        connections_wanted=12,
        capture=Capture.WAL,
        rows={r.ref: Rows(10, 1000, exact=True, exists=True) for r in relations},
    )
    return replace(base, **changes)


def server(**changes):
    return {"server": replace(SERVER, **changes)}
