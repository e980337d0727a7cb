"""Random histories of transactions by several tenants around the phases of a move.

A timeline is a flat list: statements of up to three sessions, and the gates that the mover and the writers
pass together. What stands between two gates runs beside the mover's phase between them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from uuid import UUID

from hypothesis import strategies as st

from tests.support.drafts import NEIGHBOUR, OTHER, TENANT, Column, Draw, Schema, Table, of_row, quoted

# Steps of the mover's journal before which it waits for the writers.
GATES = (
    "preflight",
    "prepare.identity",
    "prepare.guards",
    "prepare.stream",
    "copy",
    "index",
    "catch_up",
    "verify",
    "cutover",
    "monitor",
    "cleanup",
)
SESSIONS = "ABC"
ISOLATION = ("", "", "", " ISOLATION LEVEL REPEATABLE READ", " ISOLATION LEVEL SERIALIZABLE")


@dataclass(frozen=True)
class Gate:
    name: str

    def __str__(self) -> str:
        return f"-- {self.name} begins"


@dataclass(frozen=True)
class Action:
    """One statement of a session, which works for one tenant until its transaction ends."""

    session: str
    tenant: UUID
    sql: str
    copied: tuple[str, ...] = ()  # what yields the lines that a COPY … FROM STDIN reads
    # A row changes its tenant, or a table is emptied: not where the tenant lives alone.
    before_switch_only: bool = False

    def __str__(self) -> str:
        who = {TENANT: "tenant", OTHER: "other"}.get(self.tenant, "neighbour")
        lines = "".join(f"\n    -- from: {query}" for query in self.copied)
        return f"{self.session} ({who}): {self.sql};{lines}"


Timeline = list[Gate | Action]


@st.composite
def timelines(draw: Draw, schema: Schema, *, truncates: bool = True) -> Timeline:
    """`monitor` stands where the tenant has been switched; what follows `cutover` runs beside the switch."""
    made = _Sessions(draw, schema, truncates)
    timeline: Timeline = []
    for gate in GATES:
        timeline.append(Gate(gate))
        if gate != GATES[-1]:
            for _ in range(draw(st.integers(0, 5))):
                timeline += made.next_actions()
    return timeline


def seeding(draw: Draw, schema: Schema) -> list[str]:
    """Rows of both tenants of the source, there before the move; one of each in any case, without which
    the move is refused."""
    anchor = f"INSERT INTO «0».anchor VALUES ('{TENANT}'), ('{OTHER}')"
    return [anchor] + [
        insert(draw, table, tenant, draw(st.integers(1, 4)))
        for _ in range(draw(st.integers(1, 2)) + bool(schema.roaming_owners))
        for table in schema.tables
        for tenant in (TENANT, OTHER)
    ]


def neighbours(draw: Draw, schema: Schema) -> list[str]:
    """Rows of a tenant of the target, with values that no tenant of the source ever has."""
    return [f"INSERT INTO «0».anchor VALUES ('{NEIGHBOUR}')"] + [
        insert(draw, table, NEIGHBOUR, draw(st.integers(1, 2))) for table in schema.tables
    ]


@dataclass
class _Sessions:
    """Which sessions have a transaction open, and whose it is."""

    draw: Draw
    schema: Schema
    truncates: bool
    open: dict[str, UUID] = field(default_factory=dict)
    savepoints: dict[str, int] = field(default_factory=dict)
    last_table: dict[str, Table] = field(default_factory=dict)
    prepared: int = 0

    def next_actions(self) -> Iterator[Action]:
        """A whole transaction, or a part of one that stays open beside others."""
        session = self.draw(st.sampled_from(SESSIONS))
        if session not in self.open:
            self.open[session] = self.draw(st.sampled_from([TENANT, TENANT, OTHER]))
            self.savepoints[session] = 0
            isolation = "" if self.schema.crossings else self.draw(st.sampled_from(ISOLATION))
            yield self._action(session, "BEGIN" + isolation)
        for _ in range(self.draw(st.sampled_from([1, 1, 1, 2, 3, 4]))):
            yield from self._statements(session)
        if self.draw(st.integers(0, 3)):
            yield from self._end(session)

    def _action(self, session: str, sql: str, **more: object) -> Action:
        return Action(session, self.open[session], sql, **more)  # type: ignore[arg-type]

    def _statements(self, session: str) -> Iterator[Action]:
        tenant, table = self.open[session], self.last_table.get(session)
        if table is None or self.draw(st.booleans()):  # else the same rows are likely to change again
            table = self.last_table[session] = self.draw(st.sampled_from(self.schema.tables))
        kinds = ["insert", "insert", "copy", "update", "update", "key", "delete", "savepoint"]
        kinds += ["truncate"] if self.truncates and self.draw(st.integers(0, 4)) == 0 else []
        kinds += ["roam"] if table.roams else []
        kinds += ["roam with others"] * 3 if self.schema.roaming_owners else []
        kinds += ["exodus"] if self.schema.crossings and self.draw(st.integers(0, 4)) == 0 else []
        kinds += ["swap"] if table.swaps else []
        kinds += ["undo"] if self.savepoints[session] else []
        match self.draw(st.sampled_from(kinds)):
            case "insert":
                sql = insert(self.draw, table, tenant, self.draw(st.integers(1, 4)))
                yield self._action(session, sql)
            case "copy":
                names = ", ".join(column.q for column in _given(table))
                count = self.draw(st.integers(1, 3))
                rows = [_row(self.draw, table, tenant, is_copied=True) for _ in range(count)]
                queries = tuple(f"COPY (VALUES {row}) TO STDOUT" for row in rows)
                yield self._action(session, f"COPY {table.name} ({names}) FROM STDIN", copied=queries)
            case "update":
                yield self._action(session, _update(self.draw, table, tenant, _beside_key(table)))
            case "key":
                yield self._action(session, _update(self.draw, table, tenant, _of_key(table), most=1))
            case "delete":
                sql = f"DELETE FROM {table.name} WHERE {_some(self.draw, table, tenant)}"
                yield self._action(session, sql)
            case "roam":
                sql = _roam(self.draw, table, tenant, _some(self.draw, table, tenant))
                yield self._action(session, sql, before_switch_only=True)
            case "roam with others":
                owner = self.draw(st.sampled_from(self.schema.roaming_owners))
                sql = _roam(self.draw, owner, tenant, _some(self.draw, owner, tenant))
                yield self._action(session, sql, before_switch_only=True)
            case "exodus":  # of rows that refer to each other
                for each in self.schema.tables:
                    if each.tenant and each.roams:
                        sql = _roam(self.draw, each, tenant, f"{each.tenant} = '{tenant}'")
                        yield self._action(session, sql, before_switch_only=True)
            case "swap":
                for sql in _swap(self.draw, table, tenant):
                    yield self._action(session, sql)
            case "truncate":
                sql = f"TRUNCATE {table.name} {self.draw(st.sampled_from(['', 'RESTART IDENTITY ']))}CASCADE"
                yield self._action(session, sql, before_switch_only=True)
            case "savepoint":
                self.savepoints[session] += 1
                yield self._action(session, f"SAVEPOINT s{self.savepoints[session]}")
            case "undo":
                name = f"s{self.draw(st.integers(1, self.savepoints[session]))}"
                how = self.draw(st.sampled_from(["ROLLBACK TO", "RELEASE"]))
                yield self._action(session, f"{how} {name}")
                self.savepoints[session] = int(name[1:]) - (how == "RELEASE")

    def _end(self, session: str) -> Iterator[Action]:
        end = self.draw(st.sampled_from(["COMMIT", "COMMIT", "COMMIT", "ROLLBACK", "PREPARE"]))
        if self.schema.crossings and end != "ROLLBACK":
            yield self._action(session, _refuse_crossings(self.schema))
        match end:
            case "PREPARE":
                self.prepared += 1
                name = f"'«db»/{self.prepared}'"
                yield self._action(session, f"PREPARE TRANSACTION {name}")
                end = self.draw(st.sampled_from(["COMMIT", "COMMIT", "ROLLBACK"]))
                yield self._action(session, f"{end} PREPARED {name}")
            case _:
                yield self._action(session, end)
        del self.open[session]


def insert(draw: Draw, table: Table, tenant: UUID, count: int) -> str:
    names = ", ".join(column.q for column in _given(table))
    rows = [_row(draw, table, tenant) for _ in range(count)]
    # A deferrable constraint cannot say at once what conflicts.
    otherwise = "" if any("DEFERRABLE" in c for c in table.constraints) else " ON CONFLICT DO NOTHING"
    return f"INSERT INTO {table.name} ({names}) VALUES {', '.join(rows)}{otherwise}"


def _given(table: Table) -> list[Column]:
    """The columns that an INSERT names."""
    references = {name for reference in table.references for name in reference.columns}
    tenant = [c for c in table.columns if c.q == table.tenant]
    return tenant + [c for c in table.columns if c.inserts or c.name in references]


def _row(draw: Draw, table: Table, tenant: UUID, *, is_copied: bool = False) -> str:
    values = _whose(draw, table, tenant)
    for column in table.columns:
        if column.inserts:
            choice = column.elsewhere if tenant == NEIGHBOUR and column.elsewhere else column.inserts
            choice = [value for value in choice if not (is_copied and value == "DEFAULT")]
            values[column.q] = draw(st.sampled_from(choice))
    return "(" + ", ".join(values[column.q] for column in _given(table)) + ")"


def _whose(draw: Draw, table: Table, tenant: UUID) -> dict[str, str]:
    """What makes a row that tenant's."""
    own = {table.tenant: f"'{tenant}'"} if table.tenant else {}
    return own | _references(draw, table, tenant)


def _references(draw: Draw, table: Table, tenant: UUID) -> dict[str, str]:
    """The key of one of the tenant's rows of each parent; NULL when there is none."""
    found = {}
    for reference in table.references:
        number = draw(st.integers(0, 4))
        may_be_null = reference.nullable and (table.tenant or len(table.references) > 1)
        is_parents = f"{of_row(reference.parent_whose, 'p')} = '{tenant}'"
        for mine, theirs in zip(reference.columns, reference.parent_columns, strict=True):
            query = (
                f"(SELECT p.{quoted(theirs)} FROM {reference.parent} p WHERE {is_parents}"
                f" ORDER BY md5(p::text || '{number}') LIMIT 1)"
            )
            found[quoted(mine)] = "NULL" if may_be_null and number == 4 else query
    return found


def _beside_key(table: Table) -> list[Column]:
    return [c for c in table.columns if c.name not in table.key]


def _of_key(table: Table) -> list[Column]:
    return [c for c in table.columns if c.name in table.key]


def _update(draw: Draw, table: Table, tenant: UUID, columns: Sequence[Column], most: int = 3) -> str:
    """Columns get another value, or their own again, which leaves a TOASTed value where it is."""
    sets = {c.q: c.updates for c in columns if c.updates}
    chosen = draw(st.lists(st.sampled_from(sorted(sets)), max_size=2, unique=True)) if sets else []
    assigned = [f"{name} = {draw(st.sampled_from(sets[name]))}" for name in chosen]
    if table.references and draw(st.booleans()):
        assigned += [f"{n} = {v}" for n, v in _references(draw, table, tenant).items() if n not in chosen]
    if not assigned:
        assigned = [table.unchanged]
    where = _some(draw, table, tenant, most)
    return f"UPDATE {table.name} SET {', '.join(assigned)} WHERE {where}"


def _roam(draw: Draw, table: Table, tenant: UUID, where: str) -> str:
    """Rows become another tenant's: by their own column, or by the rows that they refer to."""
    to = OTHER if tenant == TENANT else TENANT
    new = {table.tenant: f"'{to}'"} if table.tenant else _references(draw, table, to)
    assigned = ", ".join(f"{name} = {value}" for name, value in new.items())
    return f"UPDATE {table.name} SET {assigned} WHERE {where}"


def _refuse_crossings(schema: Schema) -> str:
    """Before a transaction ends: what it did to both ends of a reference must not have torn it."""
    return (
        f"DO $do$ BEGIN IF {' OR '.join(schema.crossings)} THEN"
        " RAISE EXCEPTION USING ERRCODE = '23000', MESSAGE = 'a reference to another tenant''s row'; END IF;"
        " END $do$"
    )


def _swap(draw: Draw, table: Table, tenant: UUID) -> Iterator[str]:
    """Two rows exchange their unique values: at once, as deferred constraints allow, or by way of NULL."""
    name = draw(st.sampled_from(table.swaps))
    column = next(c for c in table.columns if c.name == name)
    a, b = (draw(st.sampled_from(column.inserts)) for _ in range(2))
    mine = table.is_of(tenant)
    if draw(st.booleans()):
        type = column.ddl.partition(" NOT NULL")[0]
        yield (
            f"UPDATE {table.name} AS r SET {column.q} = CASE WHEN {column.q} = {a} THEN ({b})::{_type(type)}"
            f" ELSE ({a})::{_type(type)} END WHERE {mine} AND {column.q} IN ({a}, {b})"
        )
    else:
        yield f"UPDATE {table.name} AS r SET {column.q} = NULL WHERE {mine} AND {column.q} = {a}"
        yield f"UPDATE {table.name} AS r SET {column.q} = {a} WHERE {mine} AND {column.q} = {b}"
        yield f"UPDATE {table.name} AS r SET {column.q} = {b} WHERE {mine} AND {column.q} IS NULL"


def _type(ddl: str) -> str:
    return ddl.partition(" COLLATE")[0]


def _some(draw: Draw, table: Table, tenant: UUID, most: int = 3) -> str:
    """A few of the tenant's rows, whatever identifies them."""
    count, skip = draw(st.integers(1, most)), draw(st.sampled_from([0, 0, 0, 1, 2, 3]))
    return (
        f"(tableoid, ctid) IN (SELECT r.tableoid, r.ctid FROM {table.name} r"
        f" WHERE {table.is_of(tenant)} ORDER BY r::text LIMIT {count} OFFSET {skip})"
    )
