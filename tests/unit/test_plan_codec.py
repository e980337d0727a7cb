"""A stored plan is read back as it was."""

from __future__ import annotations

import json

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mover.core.ids import Side, TableRef
from mover.core.plan_codec import decode_plan, encode_plan
from mover.core.tables import Column, Finding, MovedTable, Owner, Plan, SequenceRef, Shape

names = st.text(min_size=1, max_size=12)
tables = st.builds(TableRef, names, names)
columns = st.builds(Column, names, names, names, *(st.booleans() for _ in range(4)))
texts = st.lists(names, max_size=2).map(tuple)
owners = st.recursive(
    st.just(()),
    lambda deeper: st.lists(
        st.builds(Owner, tables, tables, texts, texts, st.none() | names, deeper, texts), max_size=2
    ).map(tuple),
    max_leaves=3,
)
moved = st.builds(
    MovedTable,
    source=tables,
    target=tables,
    columns=st.lists(columns, max_size=3).map(tuple),
    key=st.lists(names, max_size=2).map(tuple),
    tenant_column=st.none() | names,
    estimated_rows=st.integers(0, 2**40),
    estimated_bytes=st.integers(0, 2**40),
    owners=owners,
    referenced=st.lists(texts, max_size=2).map(tuple),
    awaited=texts,
)
shapes = st.builds(
    Shape,
    schemas=st.dictionaries(names, names, max_size=2),
    tables=st.lists(moved, max_size=3).map(tuple),
    sequences=st.lists(st.builds(SequenceRef, tables, tables), max_size=2).map(tuple),
    fresh=st.booleans(),
    careful=st.frozensets(st.sampled_from(Side)),
)
plans = st.builds(
    Plan,
    shape=shapes,
    findings=st.lists(
        st.builds(Finding, names, names, names, st.none() | tables, st.booleans()), max_size=3
    ).map(tuple),
    classes=st.dictionaries(names, names, max_size=3),
    facts=st.dictionaries(names, st.integers() | names | st.booleans(), max_size=3),
)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # they measure the machine
@given(plans)
def test_a_plan_survives_json(plan: Plan) -> None:
    assert decode_plan(json.loads(json.dumps(encode_plan(plan)))) == plan


def test_a_plan_from_before_owned_tables_is_read() -> None:
    table = MovedTable(TableRef("a", "t"), TableRef("b", "t"), (), ("id",), "tenant_id")
    stored = encode_plan(Plan(Shape({"a": "b"}, (table,))))
    for name in ("owners", "referenced"):
        del stored["shape"]["tables"][0][name]
    assert decode_plan(stored).shape.tables == (table,)
