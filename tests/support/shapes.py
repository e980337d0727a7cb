"""Random schemas from the shapes of tables that can be moved, as DDL that runs on either side.

A shape is one function `(draw, draft)` that adds something to a table in the making, and stands in
`SHAPES`; `KEYS` are the ways in which a table's rows are identified. Texts hold `«0»`, `«1»` for the quoted
schema of each service, so that the same text makes the source's schemas and the target's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from uuid import UUID

from hypothesis import strategies as st

from tests.support.kinds import KEY_KINDS, TYPES, VALUE_KINDS, Kind, big_text

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
    parent_tenant: str
    nullable: bool


@dataclass(frozen=True)
class Table:
    name: str  # «0»."name"
    tenant: str  # its tenant column
    columns: tuple[Column, ...]
    key: tuple[str, ...]
    constraints: tuple[str, ...]
    after: tuple[str, ...]  # statements that follow CREATE TABLE
    references: tuple[Reference, ...]
    swaps: tuple[str, ...]  # columns with unique values
    roams: bool  # rows may change their tenant

    def create(self, *, reordered: bool = False) -> list[str]:
        columns = [f"{c.q} {c.ddl}" for c in self.columns]
        parts = [*(reversed(columns) if reordered else columns), *self.constraints]
        return [f"CREATE TABLE {self.name} (\n  " + ",\n  ".join(parts) + "\n)", *self.after]


@dataclass(frozen=True)
class Schema:
    tenant_column: str
    services: tuple[str, ...]
    tables: tuple[Table, ...]
    before: tuple[str, ...]  # types, sequences, functions

    def create(self, *, reordered: bool = False) -> list[str]:
        schemas = [f"CREATE SCHEMA «{n}»" for n in range(len(self.services))]
        tables = [statement for table in self.tables for statement in table.create(reordered=reordered)]
        return [*schemas, *self.before, *tables]


@dataclass
class Draft:
    """A table in the making."""

    service: int
    raw_name: str
    tenant: str
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
    swaps: list[str] = field(default_factory=list)
    roams: bool = True

    @property
    def name(self) -> str:
        return f"«{self.service}».{quoted(self.raw_name)}"

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
            tenant=quoted(self.tenant),
            columns=tuple(self.columns),
            key=self.key,
            constraints=tuple(constraints),
            after=tuple(self.after),
            references=tuple(self.references),
            swaps=tuple(self.swaps),
            roams=self.roams,
        )


def quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


# How rows are identified.


def _natural(draw: Draw, draft: Draft) -> None:
    """One to three columns that the application fills, with or without the tenant column."""
    kinds = draft.possible(KEY_KINDS)
    count = draw(st.integers(1, 2))
    names = [draft.add_kind(draw, draw(st.sampled_from(kinds)), "NOT NULL").name for _ in range(count)]
    if draw(st.booleans()):
        names.insert(draw(st.integers(0, count)), draft.tenant)
    draft.key = tuple(names)


def _serial(draw: Draw, draft: Draft) -> None:
    kind = draw(st.sampled_from(["bigserial", "serial"]))
    draft.key = (draft.add(draw, kind, updates=["700001", "700002"]).name,)


def _identity(draw: Draw, draft: Draft) -> None:
    always = draw(st.booleans())
    ddl = f"bigint GENERATED {'ALWAYS' if always else 'BY DEFAULT'} AS IDENTITY"
    options = draw(
        st.sampled_from(["", " (INCREMENT 3)", " (START 1000 INCREMENT -1 MINVALUE -90000 MAXVALUE 1000)"])
    )
    column = draft.add(draw, ddl + options, updates=["DEFAULT"] if always else ["DEFAULT", "800001"])
    draft.key = (column.name, draft.tenant) if draw(st.booleans()) else (column.name,)


def _random_uuid(draw: Draw, draft: Draft) -> None:
    column = draft.add(draw, "uuid DEFAULT gen_random_uuid()", updates=["gen_random_uuid()"])
    draft.key = (column.name,)


def _shared_sequence(draw: Draw, draft: Draft) -> None:
    ddl = "bigint DEFAULT nextval('«0».shared')"
    draft.key = (draft.add(draw, ddl, updates=["nextval('«0».shared')"]).name,)


KEYS: tuple[Callable[[Draw, Draft], None], ...] = (
    _natural,
    _natural,
    _serial,
    _identity,
    _random_uuid,
    _shared_sequence,
)

# What else a table may have.


def _values(draw: Draw, draft: Draft) -> None:
    for _ in range(draw(st.integers(1, 3))):
        kind = draw(st.sampled_from(draft.possible(VALUE_KINDS)))
        null = draw(st.booleans())
        values = (*kind.values, "NULL") if null else kind.values
        draft.add(draw, kind.ddl if null else f"{kind.ddl} NOT NULL", values)


def _toast(draw: Draw, draft: Draft) -> None:
    column = draft.add(draw, "text", [big_text(n) for n in range(3)] + ["'small'", "NULL"])
    storage = draw(st.sampled_from(["EXTERNAL", "EXTENDED", "MAIN"]))
    draft.after.append(f"ALTER TABLE {draft.name} ALTER {column.q} SET STORAGE {storage}")


def _generated(draw: Draw, draft: Draft) -> None:
    column = draft.add(draw, "integer", ["1", "2", "-3", "NULL"])
    expression = draw(st.sampled_from(["{} * 2", "coalesce({}, 0) + 1", "md5({}::text)"])).format(column.q)
    type = "text" if "md5" in expression else "integer"
    how = draw(st.sampled_from(["STORED", "VIRTUAL"])) if draft.major >= 18 else "STORED"
    draft.add(draw, f"{type} GENERATED ALWAYS AS ({expression}) {how}")


def _numbered(draw: Draw, draft: Draft) -> None:
    """Sequences beside the key."""
    match draw(st.sampled_from(["serial", "always", "default", "free"])):
        case "serial":
            draft.add(draw, "serial", updates=["DEFAULT", "5"])
        case "always":
            draft.add(draw, "integer GENERATED ALWAYS AS IDENTITY", updates=["DEFAULT"])
        case "default":
            draft.add(draw, "smallint GENERATED BY DEFAULT AS IDENTITY", updates=["DEFAULT", "7"])
        case "free":
            draft.add(draw, "bigint DEFAULT nextval('«0».shared')", updates=["DEFAULT", "9"])


def _unique(draw: Draw, draft: Draft) -> None:
    """Values that may swap between rows: immediately, or when the constraint looks again."""
    alone = draw(st.booleans())
    column = draft.add_kind(draw, draw(st.sampled_from(KEY_KINDS[:4])))
    columns = column.q if alone else f"{quoted(draft.tenant)}, {column.q}"
    nulls = draw(st.sampled_from(["", " NULLS NOT DISTINCT"])) if not alone else ""
    match draw(st.sampled_from(["index", "constraint", "immediate", "deferred", "partial"])):
        case "index":
            draft.after.append(f"CREATE UNIQUE INDEX ON {draft.name} ({columns}){nulls}")
        case "partial":
            where = f"{column.q} IS NOT NULL"
            draft.after.append(f"CREATE UNIQUE INDEX ON {draft.name} ({columns}) WHERE {where}")
        case "constraint":
            draft.constraints.append(f"UNIQUE{nulls} ({columns})")
        case "immediate":
            draft.constraints.append(f"UNIQUE{nulls} ({columns}) DEFERRABLE INITIALLY IMMEDIATE")
        case "deferred":
            draft.constraints.append(f"UNIQUE{nulls} ({columns}) DEFERRABLE INITIALLY DEFERRED")
    draft.swaps.append(column.name)


def _exclusion(draw: Draw, draft: Draft) -> None:
    pool = [f"'[{n},{n + 3})'" for n in (0, 2, 4, 10, 20)]
    column = draft.add(draw, "int4range", [*pool, "NULL"], elsewhere=["'[100,110)'", "'[120,130)'"])
    when = draw(st.sampled_from(["", " DEFERRABLE INITIALLY DEFERRED"]))
    draft.constraints.append(f"EXCLUDE USING gist ({column.q} WITH &&){when}")
    draft.swaps.append(column.name)


def _dropped(draw: Draw, draft: Draft) -> None:
    for n in range(draw(st.integers(1, 2))):
        gone = Column(f"gone {n}", draw(st.sampled_from(["text DEFAULT 'x'", "bigint", "int[]"])))
        draft.columns.insert(draw(st.integers(0, len(draft.columns))), gone)
        draft.after.append(f"ALTER TABLE {draft.name} DROP COLUMN {gone.q}")


def _late(draw: Draw, draft: Draft) -> None:
    """A column that old rows have without ever having been written with it."""
    column = draft.add(draw, "text DEFAULT 'late'", ["'x'", "NULL", "DEFAULT"])
    draft.after.append(f"ALTER TABLE {draft.name} ALTER {column.q} SET DEFAULT 'later'")


def _check(draw: Draw, draft: Draft) -> None:
    column = draft.add(draw, "integer", ["1", "2", "3", "NULL"])
    valid = draw(st.sampled_from(["", " NOT VALID"]))
    draft.after.append(f"ALTER TABLE {draft.name} ADD CHECK ({column.q} < 3){valid}")


def _touch(draw: Draw, draft: Draft) -> None:
    """A trigger that would count a second time, did it fire for applied rows as well."""
    column = draft.add(draw, "integer NOT NULL DEFAULT 0")
    function = f"«{draft.service}».{quoted('touch_' + str(len(draft.earlier)))}"
    draft.before.append(
        f"CREATE FUNCTION {function}() RETURNS trigger LANGUAGE plpgsql AS"
        f" $f$ BEGIN NEW.{column.q} := NEW.{column.q} + 1; RETURN NEW; END $f$"
    )
    draft.after.append(
        f"CREATE TRIGGER touch BEFORE INSERT OR UPDATE ON {draft.name}"
        f" FOR EACH ROW EXECUTE FUNCTION {function}()"
    )


def _log(draw: Draw, draft: Draft) -> None:
    """A trigger that writes into another moved table."""
    number = len(draft.earlier)
    log, function = (f"«{draft.service}».{quoted(f'{kind} {number}')}" for kind in ("log", "write log"))
    tenant = quoted(draft.tenant)
    draft.before += [
        f"CREATE TABLE {log} (id bigserial PRIMARY KEY, {tenant} {draft.tenant_type} NOT NULL, op text)",
        f"CREATE FUNCTION {function}() RETURNS trigger LANGUAGE plpgsql AS $f$ DECLARE r record; BEGIN"
        f" r := CASE WHEN TG_OP = 'DELETE' THEN OLD ELSE NEW END;"
        f" EXECUTE format('INSERT INTO %I.%I (%I, op) VALUES ($1, $2)', TG_TABLE_SCHEMA,"
        f" 'log {number}', {_literal(draft.tenant)}) USING r.{tenant}, TG_OP; RETURN NULL; END $f$",
    ]
    draft.after.append(
        f"CREATE TRIGGER log AFTER INSERT OR UPDATE OR DELETE ON {draft.name}"
        f" FOR EACH ROW EXECUTE FUNCTION {function}()"
    )


def _policy(draw: Draw, draft: Draft) -> None:
    draft.after.append(f"ALTER TABLE {draft.name} ENABLE ROW LEVEL SECURITY")
    draft.after.append(f"CREATE POLICY p ON {draft.name} USING (false)")


def _identity_of_its_own(draw: Draw, draft: Draft) -> None:
    draft.after.append(f"ALTER TABLE {draft.name} REPLICA IDENTITY FULL")


def _child(draw: Draw, draft: Draft) -> None:
    """A foreign key to an earlier table; by the tenant as well, or else rows keep their tenant."""
    parents = [p for p in draft.earlier if p.key]
    if parents:
        _refer(draw, draft, draw(st.sampled_from(parents)))


def _tree(draw: Draw, draft: Draft) -> None:
    if draft.key:
        _refer(draw, draft, draft)


ACTIONS = ("NO ACTION", "RESTRICT", "CASCADE", "SET NULL", "SET DEFAULT")


def _refer(draw: Draw, draft: Draft, parent: Draft) -> None:
    by_tenant = draft.tenant_type == parent.tenant_type and (not parent.plain_key or draw(st.booleans()))
    if not by_tenant and not parent.plain_key:
        return
    local = [k for k in parent.key if k != parent.tenant]
    nullable = parent is draft or draw(st.booleans())
    columns = [draft.add(draw, _referring(parent.column(k), nullable)) for k in local]
    ours, theirs = [c.name for c in columns], list(local)
    if by_tenant:
        ours, theirs = [draft.tenant, *ours], [parent.tenant, *theirs]
        if set(parent.key) != set(theirs):
            parent.constraints.append(f"UNIQUE ({_list(theirs)})")
    else:
        draft.roams = parent.roams = False
    on = [draw(st.sampled_from(ACTIONS[: 5 if nullable else 3])) for _ in range(2)]
    on_delete, on_update = (_action(a, ours, draft.tenant, n) for n, a in enumerate(on))
    when = draw(st.sampled_from(["", " DEFERRABLE", " DEFERRABLE INITIALLY DEFERRED"]))
    draft.after.append(
        f"ALTER TABLE {draft.name} ADD FOREIGN KEY ({_list(ours)}) REFERENCES {parent.name} ({_list(theirs)})"
        f" ON DELETE {on_delete} ON UPDATE {on_update}{when}"
    )
    names = tuple(c.name for c in columns)
    draft.references.append(Reference(names, parent.name, tuple(local), quoted(parent.tenant), nullable))


def _action(action: str, columns: list[str], tenant: str, number: int) -> str:
    """The tenant column itself is never emptied; which columns are can only be said for deletions."""
    if not action.startswith("SET") or tenant not in columns:
        return action
    return f"{action} ({_list(c for c in columns if c != tenant)})" if number == 0 else "NO ACTION"


def _referring(column: Column, nullable: bool) -> str:
    """The parent's type, and nothing else of its definition."""
    ddl = column.ddl.replace("bigserial", "bigint").replace("serial", "integer")
    for word in (" GENERATED", " DEFAULT", " NOT NULL"):
        ddl = ddl.partition(word)[0]
    return ddl if nullable else f"{ddl} NOT NULL"


def _list(names: Sequence[str] | object) -> str:
    return ", ".join(quoted(name) for name in names)  # type: ignore[attr-defined]


def _literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


SHAPES: tuple[Callable[[Draw, Draft], None], ...] = (
    _values,
    _toast,
    _generated,
    _numbered,
    _unique,
    _exclusion,
    _dropped,
    _late,
    _check,
    _touch,
    _log,
    _policy,
    _identity_of_its_own,
    _child,
    _tree,
)


@st.composite
def schemas(draw: Draw, *, major: int = 16, rich_build: bool = False) -> Schema:
    """One to three tables. `major` is the older server's; `rich_build`: both have ICU and libxml."""
    tenant = draw(st.sampled_from(TENANT_COLUMNS))
    tenant_type = draw(st.sampled_from(["uuid", "text", "varchar(40)"]))
    services = SERVICES[: draw(st.integers(1, len(SERVICES)))]
    names = list(TABLE_NAMES)
    drafts: list[Draft] = []
    for _ in range(draw(st.integers(1, 3))):
        name = names.pop(draw(st.integers(0, len(names) - 1)))
        service = draw(st.integers(0, len(services) - 1))
        draft = Draft(
            service, name, tenant, tenant_type, tuple(drafts), major, rich_build, list(COLUMN_NAMES)
        )
        draft.columns.append(Column(tenant, f"{tenant_type} NOT NULL"))
        draw(st.sampled_from(KEYS))(draw, draft)
        for shape in draw(st.lists(st.sampled_from(SHAPES), min_size=1, max_size=4, unique=True)):
            shape(draw, draft)
        drafts.append(draft)
    before = [
        *TYPES,
        "CREATE SEQUENCE «0».shared",
        f"CREATE TABLE «0».anchor ({quoted(tenant)} {tenant_type} PRIMARY KEY)",
        *(line for d in drafts for line in d.before),
    ]
    return Schema(tenant, services, tuple(d.table() for d in drafts), tuple(before))
