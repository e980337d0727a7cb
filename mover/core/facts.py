"""What was read of both servers before a migration: gathered in `postgres`, judged in `engine`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from mover.core.ids import Capture, TableRef, TenantId


@dataclass(frozen=True, slots=True)
class Tenancy:
    """Which column says whose a row is, and which tables are exempt. Tables are "schema.table"."""

    column: str
    reference_tables: frozenset[str] = frozenset()
    ignore_tables: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class LongTransaction:
    """Somebody's old transaction: it delays concurrent index builds and the creation of a slot."""

    pid: int | None  # None: a prepared transaction
    application: str
    age_seconds: float


@dataclass(frozen=True, slots=True)
class ServerFacts:
    """One server, as our role sees it."""

    version_num: int  # 160014
    system_identifier: str
    timeline: int | None  # None on a standby
    in_recovery: bool
    database: str
    encoding: str
    wal_level: str
    role: str
    superuser: bool
    replication: bool
    bypass_rls: bool
    create_role: bool
    slots_max: int
    slots_used: int
    senders_max: int
    senders_used: int
    connections_max: int
    connections_used: int
    connections_reserved: int
    slot_wal_keep_mb: int  # max_slot_wal_keep_size; -1: unlimited
    may_set_replica_role: bool
    may_create_schema: bool
    pooled: bool  # somebody between us and the server hands out other backends
    extensions: Mapping[str, str] = field(default_factory=dict)
    roles: frozenset[str] = frozenset()
    long_transactions: tuple[LongTransaction, ...] = ()
    strangers: tuple[str, ...] = ()  # ordinary roles other than ours that own schema `mover`, or a part of it

    @property
    def major(self) -> int:
        return self.version_num // 10000

    @property
    def version(self) -> str:
        return f"{self.major}.{self.version_num % 10000}"

    @property
    def connections_free(self) -> int:
        return self.connections_max - self.connections_reserved - self.connections_used


@dataclass(frozen=True, slots=True)
class ColumnFacts:
    name: str
    type: str  # format_type(), schema-qualified outside pg_catalog
    not_null: bool
    generated: str  # "", "s" (stored) or "v" (virtual)
    identity: str  # "", "a" (always) or "d" (by default)
    collatable: bool
    collation: str = ""  # as SQL; "" for the database's own, or none
    deterministic: bool = True  # the collation: only equal texts are equal
    unproven: str | None = None  # the NOT NULL constraint that is NOT VALID

    def is_collated_apart(self, other: ColumnFacts) -> bool:
        """Whether the two cannot be compared without saying by which collation."""
        return self.collation != other.collation and bool(self.collation and other.collation)

    @property
    def can_name_tenants(self) -> bool:
        """Whether a tenant's id is compared with it as one text, letter by letter."""
        is_text = self.type == "text" or self.type.startswith("character varying")
        return self.type == "uuid" or (is_text and self.deterministic)


@dataclass(frozen=True, slots=True)
class IndexFacts:
    """A valid unique index."""

    name: str
    columns: tuple[str, ...]  # the key columns' names; "" for an expression
    primary: bool
    partial: bool
    immediate: bool
    replica_identity: bool
    nulls_equal: bool = False  # NULLS NOT DISTINCT
    expressions: tuple[str, ...] = ()  # the key columns as SQL, quoted where needed
    predicate: str | None = None

    def identifies(self, needed: frozenset[str], not_null: frozenset[str]) -> bool:
        """Whether it can serve as replica identity that covers `needed`."""
        plain = self.immediate and not self.partial
        return plain and needed <= set(self.columns) <= not_null


@dataclass(frozen=True, slots=True)
class TriggerFacts:
    """Or a rule, which has the same words."""

    name: str
    on_delete: bool
    enabled: str  # O origin, D disabled, R replica, A always


@dataclass(frozen=True, slots=True)
class Relation:
    """A table or view of the moved schemas."""

    ref: TableRef
    kind: str  # r table, p partitioned, f foreign, v view, m materialised view
    persistence: str  # p permanent, u unlogged, t temporary
    inherits: bool  # a parent or a child by INHERITS
    row_security: bool  # policies apply to our role
    row_security_forced: bool  # they apply to the table's owner
    owner: str
    owned: bool  # by our role, or one that it is a member of
    privileges: frozenset[str]
    replica_identity: str  # d default, n nothing, f full, i index
    columns: tuple[ColumnFacts, ...] = ()
    indexes: tuple[IndexFacts, ...] = ()
    triggers: tuple[TriggerFacts, ...] = ()  # the application's, on changes of rows, that fire for us
    rules: tuple[TriggerFacts, ...] = ()  # on changes of rows
    root: TableRef | None = None  # of a partition: the table whose rows it stores
    partitions: tuple[TableRef, ...] = ()  # of a root: on all levels, whatever their schema

    def column(self, name: str) -> ColumnFacts | None:
        return next((c for c in self.columns if c.name == name), None)

    @property
    def key_index(self) -> IndexFacts | None:
        """What tells its rows apart: the primary key, else the smallest unique index that could be one.

        Generated values do not travel, and DEFERRABLE ones may be there twice inside a transaction."""
        travelling = frozenset(c.name for c in self.columns if c.not_null and not c.generated)
        usable = [i for i in self.indexes if i.identifies(frozenset(), travelling)]
        return min(usable, key=lambda i: (not i.primary, len(i.columns), i.columns, i.name), default=None)

    @property
    def key(self) -> tuple[str, ...]:
        """The key's columns, in index order; empty where only whole rows can be told apart."""
        return self.key_index.columns if self.key_index else ()

    @property
    def not_null(self) -> frozenset[str]:
        return frozenset(c.name for c in self.columns if c.not_null)

    def identity_covers(self, columns: Iterable[str]) -> bool:
        """Whether UPDATE and DELETE already carry these columns and the key in the stream."""
        if self.replica_identity == "f":
            # Where generated columns are not published (ours are not), PostgreSQL 18 refuses such UPDATEs.
            return not (self.key and any(column.generated for column in self.columns))
        if not self.key:
            return False
        needed = frozenset({*columns, *self.key})
        return any(
            index.identifies(needed, self.not_null)
            and (index.primary if self.replica_identity == "d" else index.replica_identity)
            for index in self.indexes
        )

    def identity_candidate(self, columns: Iterable[str]) -> IndexFacts | None:
        """An existing index that can become the replica identity; the primary key first."""
        if not self.key:
            return None
        needed = frozenset({*columns, *self.key})
        suitable = [i for i in self.indexes if i.identifies(needed, self.not_null)]
        return min(suitable, key=lambda i: (not i.primary, len(i.columns), i.name), default=None)


@dataclass(frozen=True, slots=True)
class ForeignKey:
    name: str
    child: TableRef
    parent: TableRef
    child_columns: tuple[str, ...]
    parent_columns: tuple[str, ...]
    validated: bool = True
    indexed: bool = True  # an index finds the children of a parent
    on_delete: str = "a"  # as pg_constraint has it: no action, restrict, cascade, set null, set default
    on_update: str = "a"

    @property
    def waits(self) -> tuple[str, ...]:
        """After which changes of the parent its children may stay as they are, for another row with its
        values. NO ACTION is checked when the statement has ended, or the transaction; RESTRICT at once."""
        actions = {"delete": self.on_delete, "update": self.on_update}
        return tuple(event for event, action in actions.items() if action == "a")


@dataclass(frozen=True, slots=True)
class SequenceFacts:
    ref: TableRef
    owner: TableRef | None  # the table whose column owns it
    increment: int


@dataclass(frozen=True, slots=True)
class PublicationFacts:
    """Somebody else's publication of a table, as far as it depends on the replica identity."""

    name: str
    table: TableRef
    columns: tuple[str, ...] | None  # its column list
    filter_columns: tuple[str, ...]  # what its row filter reads
    updates_or_deletes: bool


@dataclass(frozen=True, slots=True)
class SubscriptionFacts:
    name: str
    table: TableRef


@dataclass(frozen=True, slots=True)
class SideFacts:
    """The moved schemas on one side."""

    server: ServerFacts
    schemas: frozenset[str]  # those of ours that exist
    closed_schemas: frozenset[str] = frozenset()  # in which our role may not create an index
    unfinished_clones: frozenset[str] = frozenset()  # migrations that made them and may still drop them
    relations: tuple[Relation, ...] = ()
    foreign_keys: tuple[ForeignKey, ...] = ()  # from or into the moved schemas
    sequences: tuple[SequenceFacts, ...] = ()
    publications: tuple[PublicationFacts, ...] = ()
    subscriptions: tuple[SubscriptionFacts, ...] = ()
    extensions_needed: frozenset[str] = frozenset()  # objects of the schemas depend on them
    extensions_inside: frozenset[str] = frozenset()  # they live in the schemas themselves
    granted_roles: frozenset[str] = frozenset()
    policy_roles: frozenset[str] = frozenset()
    functions_with_literals: tuple[str, ...] = ()  # name a moved schema inside a string

    def relation(self, ref: TableRef) -> Relation | None:
        return next((r for r in self.relations if r.ref == ref), None)


@dataclass(frozen=True, slots=True)
class Rows:
    """How much of a table is the tenant's."""

    rows: int
    bytes: int
    exact: bool
    exists: bool


@dataclass(frozen=True, slots=True)
class Collision:
    """Unique values of the tenant that rows of other tenants on the target already have."""

    table: TableRef  # the target's
    index: str
    count: int | None  # None: could not be counted in time


@dataclass(frozen=True, slots=True)
class Dangling:
    """References of the tenant's rows that would find no parent, or another tenant's."""

    foreign_key: ForeignKey
    count: int | None  # None: could not be counted in time


@dataclass(frozen=True, slots=True)
class Facts:
    """Everything that preflight judges."""

    tenant: TenantId
    tenancy: Tenancy
    schemas: Mapping[str, str]  # source schema -> target schema
    source: SideFacts
    target: SideFacts
    connections_wanted: int
    capture: Capture | None = None  # None: as the servers allow
    is_back: bool = False  # the roles are swapped: `source` is what the migration calls its target
    rows: Mapping[TableRef, Rows] = field(default_factory=dict)  # by the source's name
    target_tenant_tables: tuple[TableRef, ...] = ()  # that hold rows of this tenant already
    # Referenced, not moved, there on the target; with what our role may do: SELECT, REFERENCES.
    parents_outside: Mapping[TableRef, frozenset[str]] = field(default_factory=dict)
    differences: tuple[str, ...] = ()  # of the fingerprints, when the target's schemas exist
    collisions: tuple[Collision, ...] = ()
    missing_references: tuple[Dangling, ...] = ()
    foreign_children: tuple[Dangling, ...] = ()  # rows of other tenants that refer to the tenant's
    foreign_parents: tuple[Dangling, ...] = ()  # rows of the tenant that refer to other tenants'
    # Rows of tables without the tenant column that are nobody's; None: could not be counted in time.
    orphans: Mapping[TableRef, int | None] = field(default_factory=dict)

    @property
    def is_streamed(self) -> bool:
        """Whether the changes are those that the server decodes from its WAL."""
        return self.capture is not Capture.TRIGGER

    @property
    def fresh(self) -> bool:
        """None of the target's schemas exist."""
        return not self.target.schemas

    def mapped(self, ref: TableRef) -> TableRef:
        """The name on the target; tables outside the moved schemas keep theirs."""
        return TableRef(self.schemas.get(ref.schema, ref.schema), ref.name)

    def listed(self, ref: TableRef, tables: frozenset[str]) -> bool:
        """Whether the configuration lists the table, under either side's name."""
        return str(ref) in tables or str(self.mapped(ref)) in tables

    def is_tenant_table(self, relation: Relation) -> bool:
        """A table with the tenant column that the configuration does not exempt; never a partition, whose
        rows are its root's."""
        exempt = self.tenancy.reference_tables | self.tenancy.ignore_tables
        return (
            relation.kind in ("r", "p")
            and relation.root is None
            and relation.column(self.tenancy.column) is not None
            and not self.listed(relation.ref, exempt)
        )
