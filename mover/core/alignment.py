"""What a schema that changes while its tenant moves means for the rows. Pure.

> A tenant is switched only under the schemas that its rows were copied, followed and compared under.

The target follows a change by itself where no value depends on it: an index, or a column that is
certainly NULL in every row that nobody has written since it came. Whoever writes such a column is in the
stream, behind a description of the table that the plan does not know yet, so nothing is lost in between.
Everything else needs an operator first; what it may have done to rows that are on the target already is
then copied anew.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Set
from dataclasses import dataclass

from mover.core import ddl
from mover.core.errors import SchemaChanged, Where
from mover.core.ids import TableRef, TenantId
from mover.core.tables import Column, MovedTable, Shape

_SHOWN = 5  # differences in one message
_SHOWN_TEXT_CHARS = 160
_PLAIN_INDEX, _PARTITIONED = "CREATE INDEX ", " ON ONLY "
# What a clone makes after the rows are there.
_BUILT_WITH_A_TABLE = frozenset({"constraint", "trigger", "security", "policy", "policy condition", "rule"})
_BUILT_LATE = _BUILT_WITH_A_TABLE | {"index", "view"}
_OF_A_TABLE = _BUILT_WITH_A_TABLE | {"relation", "column"}
_HINTS = {
    "column": "Make the same change on the target and resume: the table is copied anew where rows may have"
    " changed. Or cancel.",
    "relation": "Make the same change on the target and resume: a new table is then copied. Or cancel.",
}
_HINT = "Make the same change on the target and resume, or cancel."
START_AGAIN = "Cancel the migration and start it again."


@dataclass(frozen=True, slots=True)
class Difference:
    """An object that the two sides do not have alike, under the target's names."""

    key: str  # "column realestate_crm.deals.amount"
    source: str | None  # its description there; None: it is not there
    target: str | None

    def __str__(self) -> str:
        if self.target is None:
            return f"{self.key} is missing on the target"
        if self.source is None:
            return f"{self.key} is on the target only"
        shown = max(len(self.source), len(self.target)) <= _SHOWN_TEXT_CHARS
        texts = f": source has `{self.source}`, target has `{self.target}`" if shown else ""
        return f"{self.key} differs{texts}"

    @property
    def kind(self) -> str:
        return "policy condition" if self.key.startswith("policy condition ") else self.key.split(" ")[0]

    @property
    def names(self) -> tuple[str, ...]:
        """The parts of its qualified name."""
        words = ddl.significant(self.key.removeprefix(self.kind))
        return tuple(name for word in words if (name := word.identifier) is not None)

    @property
    def table(self) -> TableRef | None:
        return TableRef(*self.names[:2]) if self.kind in _OF_A_TABLE else None


@dataclass(frozen=True, slots=True)
class Verdict:
    """What becomes of the differences; those in neither are no concern of a migration."""

    follow: tuple[Difference, ...]  # the target shall have them too; columns before indexes
    stop: tuple[Difference, ...]  # everything, if an operator has to look at any


def judge_differences(
    found: Collection[Difference], shape: Shape, unfilled: Set[tuple[TableRef, str]], *, is_built: bool
) -> Verdict:
    """`unfilled` are the source's columns that are NULL in every row not written since they came; `is_built`
    says whether a fresh target has its indexes and what follows them yet."""
    tables = {t.target: t for t in shape.tables}
    late_views = {d.table for d in found if d.kind == "relation" and (d.source or "").startswith("v ")}
    follow: list[Difference] = []
    stop: list[Difference] = []
    for difference in found:
        is_late = difference.kind in _BUILT_LATE or difference.table in late_views
        if difference.target is None and shape.fresh and not is_built and is_late:
            continue
        if _is_foreign_index(difference, shape):
            continue
        harmless = _is_plain_index(difference) or _is_unfilled(difference, tables, unfilled)
        (follow if harmless else stop).append(difference)
    if stop:  # a name that came may be one that went
        return Verdict((), tuple(_summary([*stop, *follow])))
    return Verdict(tuple(sorted(follow, key=lambda d: d.kind != "column")), ())


def check_return(found: Collection[Difference], tenant: TenantId) -> None:
    """Raises SchemaChanged where rows could not flow back as things are. Plain indexes do not matter then."""
    matter = [difference.key for difference in _summary(found) if not _is_plain_index(difference)]
    if matter:
        more = f", and {len(matter) - _SHOWN} more" if len(matter) > _SHOWN else ""
        raise SchemaChanged(
            f"the two sides' schemas differ: {', '.join(matter[:_SHOWN])}{more}",
            where=Where(tenant),
            hint="Make the same change on the other side, then resume: nothing can flow back until then.",
        )


def _summary(found: Collection[Difference]) -> list[Difference]:
    """Tables that only one side has, without what belongs to them, then the rest."""
    tables = [d for d in found if d.kind == "relation" and None in (d.source, d.target)]
    named = {d.table for d in tables}
    return tables + [d for d in found if d.table not in named]


def _is_plain_index(difference: Difference) -> bool:
    """One that only one side has, and that refuses no row."""
    one_sided = None in (difference.source, difference.target)
    text = difference.source or difference.target or ""
    is_plain = text.startswith(_PLAIN_INDEX) and _PARTITIONED not in text
    return one_sided and difference.kind == "index" and is_plain


def _is_foreign_index(difference: Difference, shape: Shape) -> bool:
    """A plain index that only a target with other tenants has may be somebody's who works there."""
    return not shape.fresh and difference.source is None and _is_plain_index(difference)


def _is_unfilled(
    difference: Difference, tables: Mapping[TableRef, MovedTable], unfilled: Set[tuple[TableRef, str]]
) -> bool:
    """Not where rows are told apart as a whole: those described before the column came would fit none."""
    table = tables.get(difference.table) if difference.kind == "column" and difference.table else None
    if table is None or difference.target is not None:
        return False
    return bool(table.key) and (table.source, difference.names[2]) in unfilled


def operator_needed(stop: Collection[Difference], shape: Shape, tenant: TenantId) -> SchemaChanged:
    """Which, where, and what to do."""
    sources = {target: source for source, target in shape.schemas.items()}
    first, *_ = stop
    table = first.table and TableRef(sources.get(first.table.schema, first.table.schema), first.table.name)
    more = f"; and {len(stop) - _SHOWN} more" if len(stop) > _SHOWN else ""
    return SchemaChanged(
        "the target's schemas differ from the source's: " + "; ".join(map(str, [*stop][:_SHOWN])) + more,
        where=Where(tenant, table),
        hint=_HINTS.get(first.kind, _HINT),
    )


def check_keys(before: Shape, now: Shape, tenant: TenantId) -> None:
    """Raises SchemaChanged where rows are told apart by other columns than when the stream began, or are the
    tenant's by others."""
    planned = {t.source: t for t in before.tables}
    for table in now.tables:
        was = planned.get(table.source, table)
        if was.key != table.key:
            what = (
                f"the key of {table.source} is ({', '.join(table.key)}) now, and was ({', '.join(was.key)})"
            )
        elif (was.tenant_column, was.owners) != (table.tenant_column, table.owners):
            what = f"rows of {table.source} are the tenant's by other columns now than"
        elif was.sends_all != table.sends_all:
            what = f"{table.source} has another key in its partitions now than"
        else:
            continue
        raise SchemaChanged(
            f"{what} when the migration was planned", where=Where(tenant, table.source), hint=START_AGAIN
        )


def copied_anew(
    before: Shape,
    now: Shape,
    unfilled: Set[tuple[TableRef, str]],
    storage_before: Mapping[str, str],
    storage_now: Mapping[str, str],
) -> frozenset[TableRef]:
    """The source's tables whose rows on the target may be wrong, or are not to be there any more.

    A table whose storage is another was made anew, truncated, or had its rows rewritten, none of which is
    in the stream."""
    old, new = ({t.source: t for t in shape.tables} for shape in (before, now))
    suspect = {
        ref
        for ref in old.keys() & new.keys()
        if storage_before.get(str(ref)) not in (None, storage_now.get(str(ref)))
        or not _values_hold(old[ref], new[ref], unfilled)
    }
    return frozenset(suspect | old.keys() ^ new.keys())


def with_owned(tables: Set[TableRef], shape: Shape) -> frozenset[TableRef]:
    """These and all whose rows are the tenant's by rows of these."""
    owned = {t.source for t in shape.tables if any(owner.source in tables for owner in t.owners)}
    return frozenset(tables) if owned <= tables else with_owned(tables | owned, shape)


def _values_hold(old: MovedTable, new: MovedTable, unfilled: Set[tuple[TableRef, str]]) -> bool:
    """Whether rows that came under the old columns are right under the new ones."""
    before, now = _values(old.columns), _values(new.columns)
    added = {(new.source, name) for name in now.keys() - before.keys()}
    followed = bool(new.key) and added <= unfilled
    return before.items() <= now.items() and (followed or not added)


def _values(columns: Iterable[Column]) -> Mapping[str, tuple[str, str, bool]]:
    return {c.name: (c.source_type, c.target_type, c.generated) for c in columns}
