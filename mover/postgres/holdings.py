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


def is_tenants_or_left(holding: Holding, alias: str, tenant: TenantId) -> sql.Composed:
    """The same where an owner may have changed its values, or gone, earlier in our transaction: the row is
    the tenant's if it refers to nothing. One that has no reference at all is nobody's."""
    if holding.tenant_column is not None:
        return is_tenants(holding, alias, tenant)
    return sql.SQL("({} AND {})").format(
        _has_no_strange_owner(holding, alias, tenant), is_not_others(holding, alias, tenant)
    )


def _has_no_strange_owner(holding: Holding, alias: str, tenant: TenantId) -> sql.Composed:
    """Whether through one of the foreign keys there is either no row, or the tenant's."""
    if holding.tenant_column is not None:
        return is_tenants(holding, alias, tenant)
    parent = f"{alias}o"
    template = "(({}) IS NOT NULL AND NOT EXISTS (SELECT FROM {} AS {} WHERE {} AND NOT {}))"
    parts = [
        sql.SQL(template).format(
            sql.SQL(", ").join(sql.Identifier(alias, name) for name in tie.columns),
            named(tie.parent.table),
            sql.Identifier(parent),
            _joined(tie, {name: sql.Identifier(alias, name) for name in tie.columns}, parent),
            _has_no_strange_owner(tie.parent, parent, tenant),
        )
        for tie in holding.ties
    ]
    return sql.SQL("({})").format(sql.SQL(" OR ").join(parts))


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
        joined = _joined(tie, values, parent)
        parts.append(
            sql.SQL(template).format(named(tie.parent.table), sql.Identifier(parent), joined, condition(tie))
        )
    return sql.SQL("({})").format(sql.SQL(" OR ").join(parts))


def _joined(tie: Tie, values: Mapping[str, sql.Composable], parent: str) -> sql.Composed:
    """Whether the row `parent` is the one that the `values` refer to."""
    return sql.SQL(" AND ").join(
        sql.SQL("{} = {}").format(sql.Identifier(parent, theirs), values[ours])
        for ours, theirs in zip(tie.columns, tie.referenced, strict=True)
    )


def owning_columns(holding: Holding) -> tuple[str, ...]:
    """The columns of an owned table that say whose a row is."""
    return tuple(dict.fromkeys(name for tie in holding.ties for name in tie.columns))


def named(table: TableRef) -> sql.Identifier:
    return sql.Identifier(table.schema, table.name)
