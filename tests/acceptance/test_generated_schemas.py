"""Random schemas, random transactions before, during and after a move: both sides are equal in the end.

Each part has a seed of its own, so that a failure comes again; `GENERATED_EXAMPLES` (of each part) and
`GENERATED_SEED` make long runs.
"""

from __future__ import annotations

import asyncio
import os

import pytest
import uvloop
from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.support.generated_move import Example, Servers, examples, run_example
from tests.support.queue import platform_database

EXAMPLES = int(os.environ.get("GENERATED_EXAMPLES", "8"))
FIRST_SEED = int(os.environ.get("GENERATED_SEED", "0"))
PARTS = [
    *((part, "pg16", "pg18") for part in range(4)),
    *((part, "pg18", "pg16") for part in range(4, 7)),
    (7, "pg15", "pg15"),
]


@pytest.mark.parametrize(("part", "source", "target"), PARTS, ids=[f"{p}-{s}-{t}" for p, s, t in PARTS])
def test_a_generated_schema_moves_under_a_generated_history(part, source, target, request, make_database):
    ours, theirs = request.getfixturevalue(source), request.getfixturevalue(target)
    servers = Servers(ours, theirs, make_database(ours), make_database(theirs), make_database(theirs))
    both_15 = ours.version == theirs.version == 15  # the only ones that are built with ICU and libxml
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(platform_database(servers.platform_url))

        @seed(FIRST_SEED + part)
        @settings(
            max_examples=EXAMPLES,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate, Phase.shrink],
        )
        @given(examples(major=min(ours.version, theirs.version), rich_build=both_15))
        def moves(example: Example) -> None:
            runner.run(run_example(servers, example))

        moves()
