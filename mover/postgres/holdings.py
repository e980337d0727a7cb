"""Whose a row is, as a condition in SQL, for everything but the proof, which has its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from psycopg import sql

from mover.core.ids import TableRef, TenantId
from mover.core.tables import Holding, Tie


def is_tenants(holding: Holding, alias: str, tenant: TenantId, *, lock: bool = False) -> sql.Composed:
    """Whether the row `alias` is the tenant's; the literal takes the tenant column's type.

    With `lock`, the rows that say so are locked against any change, and have to be those that the
    transaction sees."""
    if holding.tenant_column is not None:
        column = sql.Identifier(alias, holding.tenant_column)
        return sql.SQL("{} = {}").format(column, sql.Literal(str(tenant)))
    values = {name: sql.Identifier(alias, name) for name in owning_columns(holding)}
    return is_owned(holding, values, tenant, parent=f"{alias}o", lock=lock)


def is_owned(
    holding: Holding,
    values: Mapping[str, sql.Composable],
    tenant: TenantId,
    *,
    parent: str = "o",
    lock: bool = False,
) -> sql.Composed:
    """The same of a row that has these values in its owning columns."""

    def condition(tie: Tie) -> sql.Composed:
        return is_tenants(tie.parent, parent, tenant, lock=lock)

    return _any_owner(holding, values, parent, condition, lock=lock)


def is_not_others(holding: Holding, alias: str, tenant: TenantId) -> sql.Composed:
    """The same for a row that is known to be the tenant's by other means, to make sure that another
    tenant's is never touched: it holds also where the owner went before the row."""
    if holding.tenant_column is not None:
        return is_tenants(holding, alias, tenant)
    return sql.SQL("NOT {}").format(_is_others(holding, alias, tenant))


def _is_others(holding: Holding, alias: str, tenant: TenantId) -> sql.Composed:
    if holding.tenant_column is not None:
        column = sql.Identifier(alias, holding.tenant_column)
        return sql.SQL("{} <> {}").format(column, sql.Literal(str(tenant)))
    values = {name: sql.Identifier(alias, name) for name in owning_columns(holding)}
    parent = f"{alias}o"
    return _any_owner(holding, values, parent, lambda tie: _is_others(tie.parent, parent, tenant))


def _any_owner(
    holding: Holding,
    values: Mapping[str, sql.Composable],
    parent: str,
    condition: Callable[[Tie], sql.Composed],
    *,
    lock: bool = False,
) -> sql.Composed:
    """Whether `condition` holds for the row `parent` that one of the foreign keys refers to; with `lock` it
    is locked whether or not it does."""
    template = "EXISTS (SELECT FROM {0} AS {1} WHERE {2} AND {3})"
    if lock:
        template = "coalesce((SELECT {3} FROM {0} AS {1} WHERE {2} FOR SHARE), false)"
    parts = []
    for tie in holding.ties:
        joined = sql.SQL(" AND ").join(
            sql.SQL("{} = {}").format(sql.Identifier(parent, theirs), values[ours])
            for ours, theirs in zip(tie.columns, tie.referenced, strict=True)
        )
        parts.append(
            sql.SQL(template).format(named(tie.parent.table), sql.Identifier(parent), joined, condition(tie))
        )
    return sql.SQL("({})").format(sql.SQL(" OR ").join(parts))


def owning_columns(holding: Holding) -> tuple[str, ...]:
    """The columns of an owned table that say whose a row is."""
    return tuple(dict.fromkeys(name for tie in holding.ties for name in tie.columns))


def named(table: TableRef) -> sql.Identifier:
    return sql.Identifier(table.schema, table.name)
