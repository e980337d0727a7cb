"""Whose a row is, as a condition in SQL, for everything but the proof, which has its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from psycopg import sql

from mover.core.ids import TableRef, TenantId
from mover.core.tables import Holding, Tie


def is_tenants(holding: Holding, alias: str, tenant: TenantId) -> sql.Composed:
    """Whether the row `alias` is the tenant's; the literal takes the tenant column's type."""
    if holding.tenant_column is not None:
        column = sql.Identifier(alias, holding.tenant_column)
        return sql.SQL("{} = {}").format(column, sql.Literal(str(tenant)))
    values = {name: sql.Identifier(alias, name) for name in owning_columns(holding)}
    parent = f"{alias}o"
    return _any_owner(holding, values, parent, lambda tie: is_tenants(tie.parent, parent, tenant))


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
) -> sql.Composed:
    """Whether `condition` holds for the row `parent` that one of the foreign keys refers to."""
    template = "EXISTS (SELECT FROM {} AS {} WHERE {} AND {})"
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
