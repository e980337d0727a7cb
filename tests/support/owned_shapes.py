"""The shapes of tables whose rows are a tenant's by foreign keys: to tables with the tenant column, or to
others of their own kind."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import strategies as st

from tests.support.drafts import Column, Draft, Draw, Reference
from tests.support.kinds import KEY_KINDS
from tests.support.shapes import KEYS, OWNED_SHAPES, name_list, referring, toast

# Types whose equal values are written alike, each with those of columns that may refer to them. PostgreSQL
# allows foreign keys between two collations of their own, but does not compare them.
REFERRING = {
    "smallint": ("smallint", "integer", "bigint"),
    "integer": ("integer", "bigint"),
    "bigint": ("bigint",),
    "text": ("text", "varchar", 'text COLLATE "C"'),
    "varchar(30)": ("varchar(30)", "text"),
    "varchar(40)": ("varchar(40)", "text"),
    "uuid": ("uuid",),
    "date": ("date",),
}
ALIKE_KINDS = [kind for kind in KEY_KINDS if kind.ddl.partition(" COLLATE")[0] in REFERRING]
OWNED_KEYS = ("natural", "serial", "identity", "uuid", "shared sequence")
ON_UPDATE = ("NO ACTION", "CASCADE", "CASCADE")
ON_DELETE = ("NO ACTION", "RESTRICT", "CASCADE", "CASCADE", "SET NULL")


def add_owned(draw: Draw, draft: Draft, owners: Sequence[Draft]) -> None:
    """Make `draft` a table that one of `owners` owns, often the last, or several do."""
    is_given = draw(st.integers(0, 3)) > 0
    tables = owners[1:] or owners  # the anchor's rows keep their tenant
    first = _owned_by(draw, draft, draw(st.sampled_from([*tables, tables[-1]])), nullable=not is_given)
    if not is_given:
        _any_of(draw, draft, owners)
    if is_given and draw(st.booleans()):
        beside = [draft.add_kind(draw, draw(st.sampled_from(KEY_KINDS[:4])), "NOT NULL").name]
        draft.key = tuple(draw(st.permutations([*first, *(beside if draw(st.booleans()) else [])])))
    else:
        KEYS[draw(st.sampled_from(OWNED_KEYS))](draw, draft)
    if is_given:
        for _ in range(draw(st.sampled_from([0, 0, 1]))):
            _also_refers(draw, draft, draw(st.sampled_from([draft, *owners])))
    children = [owner for owner in owners if owner.tenant is not None and owner.unused]
    if children and draw(st.integers(0, 3)) == 0:
        _is_referred_to(draw, draft, draw(st.sampled_from(children)))
    if draw(st.booleans()):
        toast(draw, draft)
    for shape in draw(st.lists(st.sampled_from(OWNED_SHAPES), max_size=2, unique=True)):
        shape(draw, draft)


def _owned_by(draw: Draw, draft: Draft, parent: Draft, *, nullable: bool) -> list[str]:
    """The columns of a foreign key by which rows of `draft` are the tenant's."""
    reference = _foreign_key(draw, draft, parent, _alike(draw, parent), nullable=nullable, decides=True)
    draft.owners.append(reference)
    return list(reference.columns)


def _any_of(draw: Draw, draft: Draft, owners: Sequence[Draft]) -> None:
    """Rows are the tenant's by whichever foreign key is given."""
    for _ in range(draw(st.integers(0, 1))):
        _owned_by(draw, draft, draw(st.sampled_from(owners)), nullable=True)
    given = ", ".join(name_list([owner.columns[0]]) for owner in draft.owners)
    draft.constraints.append(f"CHECK (num_nonnulls({given}) > 0)")


def _alike(draw: Draw, parent: Draft) -> tuple[str, ...]:
    """Columns by which rows of `parent` can be referred to: its key, or others."""
    types = [_type(parent.column(name)) for name in parent.key]
    if not parent.unused or (all(type in REFERRING for type in types) and draw(st.booleans())):
        return parent.key
    kinds = parent.possible(ALIKE_KINDS)
    count = draw(st.sampled_from([1, 1, 2]))
    names = [parent.add_kind(draw, draw(st.sampled_from(kinds)), "NOT NULL").name for _ in range(count)]
    if parent.tenant is not None and draw(st.integers(0, 2)) == 0:
        names.insert(draw(st.integers(0, count)), parent.tenant)
    parent.constraints.append(f"UNIQUE ({name_list(names)})")
    return tuple(names)


def _also_refers(draw: Draw, draft: Draft, parent: Draft) -> None:
    """A foreign key that does not decide whose the rows are."""
    nullable = parent is draft or draw(st.booleans())
    if nullable or set(map(_type, map(parent.column, parent.key))) <= set(REFERRING):
        _foreign_key(draw, draft, parent, parent.key, nullable=nullable, decides=not nullable)


def _is_referred_to(draw: Draw, draft: Draft, child: Draft) -> None:
    """By a table with the tenant column, as that of the documents by that of their versions."""
    _foreign_key(draw, child, draft, draft.key, nullable=True, decides=False, declared_by=draft)


def _foreign_key(
    draw: Draw,
    child: Draft,
    parent: Draft,
    columns: Sequence[str],
    *,
    nullable: bool,
    decides: bool,
    declared_by: Draft | None = None,
) -> Reference:
    mine = []
    for name in columns:
        same = referring(parent.column(name), nullable=True)
        like = REFERRING.get(same, ()) if decides else ()
        ddl = draw(st.sampled_from([same, *like]))
        mine.append(child.add(draw, ddl if nullable else f"{ddl} NOT NULL").name)
    on_delete = draw(st.sampled_from(ON_DELETE if nullable else ON_DELETE[:-1]))
    when = draw(st.sampled_from(["", "", " DEFERRABLE", " DEFERRABLE INITIALLY DEFERRED"]))
    (declared_by or child).after.append(
        f"ALTER TABLE {child.name} ADD FOREIGN KEY ({name_list(mine)})"
        f" REFERENCES {parent.name} ({name_list(columns)})"
        f" ON DELETE {on_delete} ON UPDATE {draw(st.sampled_from(ON_UPDATE))}{when}"
    )
    may_cross = bool(child.references) or child.tenant is not None
    names = tuple(mine)
    reference = Reference(names, parent.name, tuple(columns), parent.whose, nullable, may_cross)
    child.references.append(reference)
    return reference


def _type(column: Column) -> str:
    return referring(column, nullable=True).partition(" COLLATE")[0]
