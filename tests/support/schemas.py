"""Random schemas of tables with the tenant column, and of tables that these own."""

from __future__ import annotations

from hypothesis import strategies as st

from tests.support.drafts import (
    COLUMN_NAMES,
    SERVICES,
    TABLE_NAMES,
    TENANT_COLUMNS,
    Column,
    Draft,
    Draw,
    Schema,
    quoted,
)
from tests.support.kinds import TYPES
from tests.support.owned_shapes import add_owned
from tests.support.shapes import KEYS, SHAPES, Key, toast


@st.composite
def schemas(
    draw: Draw, first_key: Key, *, major: int = 16, rich_build: bool = False, owned: bool = False
) -> Schema:
    """One to three tables with the tenant column, whose first has `first_key`, and some that they own, now
    and then or if `owned`. `major` is the older server's; `rich_build`: both have ICU and libxml."""
    tenant = draw(st.sampled_from(TENANT_COLUMNS))
    tenant_type = draw(st.sampled_from(["uuid", "text", "varchar(40)"]))
    services = SERVICES[: draw(st.integers(1, len(SERVICES)))]
    names = list(TABLE_NAMES)
    drafts: list[Draft] = []

    def new(column: str | None) -> Draft:
        name = names.pop(draw(st.integers(0, len(names) - 1)))
        service = draw(st.integers(0, len(services) - 1))
        unused = list(COLUMN_NAMES)
        return Draft(service, name, column, tenant_type, tuple(drafts), major, rich_build, unused)

    for _ in range(draw(st.sampled_from([1, 1, 2, 2, 3]))):
        draft = new(tenant)
        draft.columns.append(Column(tenant, f"{tenant_type} NOT NULL"))
        key = draw(st.sampled_from(list(KEYS))) if drafts else first_key
        KEYS[key](draw, draft)
        if draw(st.booleans()):
            toast(draw, draft)
        for shape in draw(st.lists(st.sampled_from(SHAPES), min_size=1, max_size=4, unique=True)):
            shape(draw, draft)
        drafts.append(draft)
    anchor = Draft(0, "anchor", tenant, tenant_type, (), major, rich_build, [], key=(tenant,))
    anchor.columns.append(Column(tenant, tenant_type))
    owners = [anchor, *(draft for draft in drafts if draft.key and not draft.partition_by)]
    if owned or draw(st.integers(0, 2)) == 0:
        for _ in range(draw(st.sampled_from([1, 1, 2, 2, 3]))):
            draft = new(None)
            add_owned(draw, draft, owners)
            owners.append(draft)
            drafts.append(draft)
    before = [
        *TYPES,
        "CREATE SEQUENCE «0».shared",
        f"CREATE TABLE «0».anchor ({quoted(tenant)} {tenant_type} PRIMARY KEY)",
        *(line for d in drafts for line in d.before),
    ]
    return Schema(tenant, services, tuple(d.table() for d in drafts), tuple(before))
