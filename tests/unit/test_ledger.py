"""The ledger must see what it is trusted to see."""

from uuid import UUID

import pytest

from mover.core.ids import TenantId
from mover.demo.ledger import Counted, Key, Ledger, Write

TENANT, OTHER = TenantId(UUID(int=1)), TenantId(UUID(int=2))
ROW = Key(TENANT, Counted.ACTIVITY, "row")
COUNTER = Key(TENANT, Counted.CONTACT_TOUCHES, "7")


def judged(ledger, actual):
    report = ledger.compare(TENANT, actual)
    return report.lost, report.duplicated


def ledger_of(*acknowledged, doubted=()):
    ledger = Ledger()
    ledger.begin(COUNTER, 10)
    ledger.acknowledge(acknowledged)
    ledger.doubt(doubted)
    return ledger


@pytest.mark.parametrize(
    ("acknowledged", "doubted", "actual", "verdict"),
    [
        pytest.param([Write(ROW)], [], {ROW: 1, COUNTER: 10}, (0, 0), id="as acknowledged"),
        pytest.param([Write(ROW)], [], {COUNTER: 10}, (1, 0), id="row lost"),
        pytest.param([Write(ROW)], [], {ROW: 2, COUNTER: 10}, (0, 1), id="row twice"),
        pytest.param([Write(COUNTER)] * 3, [], {COUNTER: 13}, (0, 0), id="counted as often as acknowledged"),
        pytest.param([Write(COUNTER)] * 3, [], {COUNTER: 11}, (2, 0), id="updates lost"),
        pytest.param([Write(COUNTER)] * 3, [], {COUNTER: 14}, (0, 1), id="update applied twice"),
        pytest.param([Write(ROW), Write(ROW, -1)], [], {COUNTER: 10}, (0, 0), id="removed"),
        pytest.param([Write(ROW), Write(ROW, -1)], [], {ROW: 1, COUNTER: 10}, (1, 0), id="removal lost"),
        pytest.param([], [Write(ROW)], {COUNTER: 10}, (0, 0), id="unknown and absent"),
        pytest.param([], [Write(ROW)], {ROW: 1, COUNTER: 10}, (0, 0), id="unknown and there"),
        pytest.param([], [Write(ROW)], {ROW: 2, COUNTER: 10}, (0, 1), id="unknown and twice"),
        pytest.param([Write(ROW)], [Write(ROW, -1)], {COUNTER: 10}, (0, 0), id="removal unknown"),
        pytest.param([], [], {ROW: 1, COUNTER: 10}, (0, 1), id="never acknowledged"),
    ],
)
def test_a_write_is_judged_by_what_its_writer_was_told(acknowledged, doubted, actual, verdict):
    assert judged(ledger_of(*acknowledged, doubted=doubted), actual) == verdict


def test_each_tenant_is_judged_alone():
    ledger = ledger_of(Write(Key(OTHER, Counted.ACTIVITY, "theirs")))
    assert judged(ledger, {COUNTER: 10}) == (0, 0)
    assert ledger.compare(OTHER, {}).lost == 1


def test_every_answer_is_in_the_file_before_the_next_one(tmp_path):
    path = tmp_path / "ledger"
    with Ledger(path) as ledger:
        ledger.acknowledge([Write(ROW)])
        assert path.read_text() == f"A {TENANT} activity row 1\n"
        ledger.doubt([Write(COUNTER)])
        assert path.read_text().endswith(f"U {TENANT} contact_touches 7 1\n")
