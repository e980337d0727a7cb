"""What generated schemas are made of: tables in the making, and finished ones.

Texts hold `«0»`, `«1»` for the quoted schema of each service, so that the same text makes the source's
schemas and the target's, and `«r»` for the alias of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from uuid import UUID

from hypothesis import strategies as st

from tests.support.kinds import Kind

TENANT, OTHER, NEIGHBOUR = (UUID(int=n) for n in (0xA1, 0xB2, 0xC3))
SERVICES = ("app", 'Ünd "side"')
Draw = st.DrawFn

# Names that somebody forgot to quote, that clash with ours, or that are as long as they can be.
TABLE_NAMES = (
    "item",
    "Mixed Case",
    'say "hi"',
    "select",
    "größe_des_überbaus",
    "per%cent %s",
    "dotted.name",
    "{brace}",
    "$1",
    "back\\slash",
    "x" * 63,
    "x" * 62 + "y",
    "ü" * 31,
    "tab\tname",
    "it's",
)
COLUMN_NAMES = (
    "a",
    "B",
    "t",
    "s",
    "mover_op",
    "mover_n",
    "user",
    'q"q',
    "%s",
    "{0}",
    "$2",
    "naïve",
    "z" * 63,
    "z" * 62 + "w",
    "a.b",
    "; --",
    "new",
    "old",
    "xmin2",
    "back\\n",
)
TENANT_COLUMNS = ("tenant_id", 'Mandant "Nr" %s')


@dataclass(frozen=True)
class Column:
    name: str
    ddl: str  # what follows the name
    inserts: tuple[str, ...] = ()  # SQL expressions that an INSERT may give; none: it leaves the column out
    updates: tuple[str, ...] = ()  # those that an UPDATE may assign
    elsewhere: tuple[str, ...] = ()  # of the neighbours on a shared target, where values must be unique

    @property
    def q(self) -> str:
        return quoted(self.name)


@dataclass(frozen=True)
class Reference:
    """A foreign key's columns, which take the values of one row of the parent's."""

    columns: tuple[str, ...]
    parent: str  # «0»."name"
    parent_columns: tuple[str, ...]
    parent_whose: str  # as Table.whose
    nullable: bool
    may_cross: bool = False  # to another tenant's row, when either changes its tenant

    @property
    def matches(self) -> str:
        """Whether «r»o is the row that «r» refers to; collations of their own have no common one."""
        pairs = zip(self.columns, self.parent_columns, strict=True)
        return " AND ".join(
            f'«r»o.{quoted(theirs)}::text COLLATE "C" = «r».{quoted(mine)}::text COLLATE "C"'
            for mine, theirs in pairs
        )

    @property
    def whose(self) -> str:
        """The tenant of the row that «r» refers to."""
        return f"(SELECT {of_row(self.parent_whose, '«r»o')} FROM {self.parent} AS «r»o WHERE {self.matches})"


@dataclass(frozen=True)
class Table:
    name: str  # «0»."name"
    tenant: str | None  # its tenant column
    whose: str  # the tenant of the row «r»
    columns: tuple[Column, ...]
    key: tuple[str, ...]
    constraints: tuple[str, ...]
    after: tuple[str, ...]  # statements that follow CREATE TABLE
    references: tuple[Reference, ...]
    swaps: tuple[str, ...]  # columns with unique values
    roams: bool  # rows may change their tenant
    partition_by: str  # "PARTITION BY …" or nothing

    def is_of(self, tenant: UUID) -> str:
        return f"{of_row(self.whose, 'r')} = '{tenant}'"

    @property
    def unchanged(self) -> str:
        """An assignment of a column to itself."""
        column = self.tenant or quoted(self.references[0].columns[0])
        return f"{column} = {column}"

    def create(self, *, reordered: bool = False) -> list[str]:
        columns = [f"{c.q} {c.ddl}" for c in self.columns]
        parts = [*(reversed(columns) if reordered else columns), *self.constraints]
        return [
            f"CREATE TABLE {self.name} (\n  " + ",\n  ".join(parts) + f"\n) {self.partition_by}".rstrip(),
            *self.after,
        ]


@dataclass(frozen=True)
class Schema:
    tenant_column: str
    services: tuple[str, ...]
    tables: tuple[Table, ...]
    before: tuple[str, ...]  # types, sequences, functions

    @property
    def roaming_owners(self) -> list[Table]:
        """Tables whose rows may change their tenant, and those that refer to them with them."""
        owners = {r.parent for table in self.tables if table.tenant is None for r in table.references}
        return [table for table in self.tables if table.name in owners and table.roams]

    @property
    def crossings(self) -> list[str]:
        """Whether rows refer to another tenant's, for every foreign key by which they could."""
        return [
            f"EXISTS (SELECT FROM {table.name} AS r JOIN {reference.parent} AS ro"
            f" ON {of_row(reference.matches, 'r')}"
            f" WHERE {of_row(table.whose, 'r')} IS DISTINCT FROM {of_row(reference.parent_whose, 'ro')})"
            for table in self.tables
            for reference in table.references
            if reference.may_cross
        ]

    def create(self, *, reordered: bool = False) -> list[str]:
        schemas = [f"CREATE SCHEMA «{n}»" for n in range(len(self.services))]
        tables = [statement for table in self.tables for statement in table.create(reordered=reordered)]
        return [*schemas, *self.before, *tables]


@dataclass
class Draft:
    """A table in the making."""

    service: int
    raw_name: str
    tenant: str | None  # None: its rows are the tenant's by `owners`
    tenant_type: str
    earlier: Sequence[Draft]
    major: int  # the older of both servers'
    rich_build: bool  # whether both servers have ICU's collations and XML
    unused: list[str]
    columns: list[Column] = field(default_factory=list)
    key: tuple[str, ...] = ()
    constraints: list[str] = field(default_factory=list)
    after: list[str] = field(default_factory=list)
    before: list[str] = field(default_factory=list)
    references: list[Reference] = field(default_factory=list)
    owners: list[Reference] = field(default_factory=list)
    swaps: list[str] = field(default_factory=list)
    roams: bool = True
    partition_by: str = ""

    @property
    def name(self) -> str:
        return f"«{self.service}».{quoted(self.raw_name)}"

    @property
    def whose(self) -> str:
        if self.tenant is not None:
            return f"«r».{quoted(self.tenant)}"
        return f"coalesce({', '.join(owner.whose for owner in self.owners)})"

    @property
    def plain_key(self) -> bool:
        return self.tenant not in self.key

    def add(self, draw: Draw, ddl: str, inserts: Sequence[str] = (), **more: object) -> Column:
        """A column with one of the unused names, somewhere among the others."""
        name = self.unused.pop(draw(st.integers(0, len(self.unused) - 1)))
        given = {"updates": inserts, **more}
        column = Column(name, ddl, tuple(inserts), **{k: tuple(v) for k, v in given.items()})
        self.columns.insert(draw(st.integers(0, len(self.columns))), column)
        return column

    def add_kind(self, draw: Draw, kind: Kind, more_ddl: str = "") -> Column:
        """A column whose values may have to be unique."""
        return self.add(draw, f"{kind.ddl} {more_ddl}".strip(), kind.own, elsewhere=kind.elsewhere)

    def possible(self, kinds: Sequence[Kind]) -> list[Kind]:
        return [kind for kind in kinds if self.rich_build or not kind.rich_build]

    def column(self, name: str) -> Column:
        return next(c for c in self.columns if c.name == name)

    def table(self) -> Table:
        key = ", ".join(quoted(k) for k in self.key)
        constraints = [*([f"PRIMARY KEY ({key})"] if self.key else []), *self.constraints]
        return Table(
            name=self.name,
            tenant=None if self.tenant is None else quoted(self.tenant),
            whose=self.whose,
            columns=tuple(self.columns),
            key=self.key,
            constraints=tuple(constraints),
            after=tuple(self.after),
            references=tuple(self.references),
            swaps=tuple(self.swaps),
            roams=self.roams,
            partition_by=self.partition_by,
        )


def quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def of_row(text: str, alias: str) -> str:
    return text.replace("«r»", alias)
