"""The shapes of tables that can be moved, as DDL that runs on either side.

A shape is one function `(draw, draft)` that adds something to a table in the making, and stands in
`SHAPES`; `KEYS` are the ways in which a table's rows are identified.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from hypothesis import strategies as st

from tests.support.drafts import (
    Column,
    Draft,
    Draw,
    Reference,
    quoted,
)
from tests.support.kinds import KEY_KINDS, VALUE_KINDS, big_text

# How rows are identified.


def _natural(draw: Draw, draft: Draft) -> None:
    """One to three columns that the application fills, with or without the tenant column."""
    kinds = draft.possible(KEY_KINDS)
    count = draw(st.integers(1, 2))
    names = [draft.add_kind(draw, draw(st.sampled_from(kinds)), "NOT NULL").name for _ in range(count)]
    if draft.tenant is not None and draw(st.booleans()):
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
    with_tenant = draft.tenant is not None and draw(st.booleans())
    draft.key = (column.name, draft.tenant) if with_tenant else (column.name,)


def _random_uuid(draw: Draw, draft: Draft) -> None:
    column = draft.add(draw, "uuid DEFAULT gen_random_uuid()", updates=["gen_random_uuid()"])
    draft.key = (column.name,)


def _shared_sequence(draw: Draw, draft: Draft) -> None:
    ddl = "bigint DEFAULT nextval('«0».shared')"
    draft.key = (draft.add(draw, ddl, updates=["nextval('«0».shared')"]).name,)


def _nothing(draw: Draw, draft: Draft) -> None:
    """Rows that only their values tell apart, or that are there twice."""


def _partitioned(draw: Draw, draft: Draft) -> None:
    """By a part of the key, so that rows move between partitions. Without the tenant in it: refused."""
    by = draft.add(draw, "integer NOT NULL", ["1", "2", "3", "40"], elsewhere=["101", "102"])
    beside = draft.add_kind(draw, draw(st.sampled_from(KEY_KINDS[:4])), "NOT NULL")
    draft.key = tuple(draw(st.permutations([by.name, beside.name, draft.tenant])))

    def part(name: str, of: str, bounds: str) -> str:
        full_name = f"«{draft.service}».{quoted(f'part {name} of {len(draft.earlier)}')}"
        draft.after.append(f"CREATE TABLE {full_name} PARTITION OF {of} {bounds}")
        return full_name

    match draw(st.sampled_from(["HASH", "LIST", "RANGE"])):
        case "HASH":
            draft.partition_by = f"PARTITION BY HASH ({by.q})"
            for n in range(3):
                part(str(n), draft.name, f"FOR VALUES WITH (MODULUS 3, REMAINDER {n})")
        case "LIST":
            draft.partition_by = f"PARTITION BY LIST ({by.q})"
            part("some", draft.name, "FOR VALUES IN (1, 3)")
            part("others", draft.name, "DEFAULT")
        case "RANGE":
            draft.partition_by = f"PARTITION BY RANGE ({by.q})"
            part("low", draft.name, "FOR VALUES FROM (MINVALUE) TO (3)")
            high = part(
                "high", draft.name, "FOR VALUES FROM (3) TO (MAXVALUE) PARTITION BY LIST " + f"({by.q})"
            )
            part("highest", high, "FOR VALUES IN (40)")
            part("higher", high, "DEFAULT")


Key = str
KEYS: Mapping[Key, Callable[[Draw, Draft], None]] = {
    "natural": _natural,
    "serial": _serial,
    "identity": _identity,
    "uuid": _random_uuid,
    "shared sequence": _shared_sequence,
    "no key": _nothing,
    "partitioned": _partitioned,
}

# What else a table may have.


def _values(draw: Draw, draft: Draft) -> None:
    for _ in range(draw(st.integers(1, 3))):
        kind = draw(st.sampled_from(draft.possible(VALUE_KINDS)))
        null = draw(st.booleans())
        values = (*kind.values, "NULL") if null else kind.values
        draft.add(draw, kind.ddl if null else f"{kind.ddl} NOT NULL", values)


def toast(draw: Draw, draft: Draft) -> None:
    column = draft.add(draw, "text", [big_text(n) for n in range(3)] + ["'small'", "NULL"])
    storage = draw(st.sampled_from(["EXTERNAL", "EXTENDED", "MAIN"]))
    draft.after.append(f"ALTER TABLE {draft.name} ALTER {column.q} SET STORAGE {storage}")


def _generated(draw: Draw, draft: Draft) -> None:
    if not draft.key:  # refused where the source is PostgreSQL 18
        return
    column = draft.add(draw, "integer", ["1", "2", "-3", "NULL"])
    expression = draw(st.sampled_from(["{} * 2", "coalesce({}, 0) + 1", "md5({}::text)"])).format(column.q)
    type = "text" if "md5" in expression else "integer"
    how = draw(st.sampled_from(["STORED", "VIRTUAL"])) if draft.major >= 18 else "STORED"
    draft.add(draw, f"{type} GENERATED ALWAYS AS ({expression}) {how}")


def _numbered(draw: Draw, draft: Draft) -> None:
    """Sequences beside the key."""
    if draft.partition_by:  # identities only from PostgreSQL 17 on
        return
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
    if draft.partition_by:  # it would have to be a part of each
        return
    alone = draft.tenant is None or draw(st.booleans())
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
    if draft.partition_by:
        return
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
    if not draft.partition_by:  # each partition has its own
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
    columns = [draft.add(draw, referring(parent.column(k), nullable)) for k in local]
    ours, theirs = [c.name for c in columns], list(local)
    if by_tenant:
        ours, theirs = [draft.tenant, *ours], [parent.tenant, *theirs]
        if set(parent.key) != set(theirs):
            parent.constraints.append(f"UNIQUE ({name_list(theirs)})")
    else:
        draft.roams = parent.roams = False
    on = [draw(st.sampled_from(ACTIONS[: 5 if nullable else 3])) for _ in range(2)]
    on_delete, on_update = (_action(a, ours, draft.tenant, n) for n, a in enumerate(on))
    when = draw(st.sampled_from(["", " DEFERRABLE", " DEFERRABLE INITIALLY DEFERRED"]))
    draft.after.append(
        f"ALTER TABLE {draft.name} ADD FOREIGN KEY ({name_list(ours)})"
        f" REFERENCES {parent.name} ({name_list(theirs)})"
        f" ON DELETE {on_delete} ON UPDATE {on_update}{when}"
    )
    names = tuple(c.name for c in columns)
    draft.references.append(Reference(names, parent.name, tuple(local), parent.whose, nullable))


def _action(action: str, columns: list[str], tenant: str, number: int) -> str:
    """The tenant column itself is never emptied; which columns are can only be said for deletions."""
    if not action.startswith("SET") or tenant not in columns:
        return action
    return f"{action} ({name_list(c for c in columns if c != tenant)})" if number == 0 else "NO ACTION"


def referring(column: Column, nullable: bool) -> str:
    """The parent's type, and nothing else of its definition."""
    ddl = column.ddl.replace("bigserial", "bigint").replace("serial", "integer")
    for word in (" GENERATED", " DEFAULT", " NOT NULL"):
        ddl = ddl.partition(word)[0]
    return ddl if nullable else f"{ddl} NOT NULL"


def name_list(names: Iterable[str]) -> str:
    return ", ".join(quoted(name) for name in names)


def _literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


SHAPES: tuple[Callable[[Draw, Draft], None], ...] = (
    _values,
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
# Those that need no tenant column, and refuse few rows.
OWNED_SHAPES = tuple(shape for shape in SHAPES if shape not in (_check, _log, _child, _tree))
