"""Random schemas, random transactions before, during and after a move: both sides are equal in the end.

Each part has a seed of its own, so that a failure comes again. `GENERATED_EXAMPLES` (of each part) and
`GENERATED_SEED` make long runs, `GENERATED_OWNED=1` those with owned tables only; `GENERATED_SHRINK=1` looks
for the smallest failure, which takes minutes, and `GENERATED_CAPTURE` names one way of capture;
`GENERATED_CAREFUL=1` lets foreign keys and triggers act on what the mover writes in all of them.
"""

from __future__ import annotations

import asyncio
import os
from contextlib import AsyncExitStack
from itertools import cycle, product

import pytest
import uvloop
from hypothesis import HealthCheck, Phase, given, seed, settings

from mover.core.ids import Capture
from tests.support.generated_move import TARGETS, Example, examples, run_example
from tests.support.shapes import KEYS

EXAMPLES = int(os.environ.get("GENERATED_EXAMPLES", "10"))
FIRST_SEED = int(os.environ.get("GENERATED_SEED", "0"))
OWNED = bool(os.environ.get("GENERATED_OWNED"))
CAPTURES = tuple(map(Capture, os.environ.get("GENERATED_CAPTURE", "wal trigger").split()))
CAREFUL = (True,) if os.environ.get("GENERATED_CAREFUL") else (False, False, True)
PHASES = [Phase.generate, *([Phase.shrink] if os.environ.get("GENERATED_SHRINK") else [])]
VERSIONS = [("pg16", "pg18"), ("pg18", "pg16"), ("pg15", "pg15"), ("pg18", "pg18")]
# What identifies the first table's rows, where the tenant goes, and between which servers.
PARTS = [
    pytest.param(number, key, target, *versions, id=f"{key}-{target}-{'-'.join(versions)}")
    for number, ((key, target), versions) in enumerate(zip(product(KEYS, TARGETS), cycle(VERSIONS)))
]


@pytest.mark.parametrize(("part", "key", "target", "ours", "theirs"), PARTS)
def test_a_generated_schema_moves_under_a_generated_history(
    part, key, target, ours, theirs, request, between
):
    source_server, target_server = request.getfixturevalue(ours), request.getfixturevalue(theirs)
    both_15 = source_server.version == target_server.version == 15  # built with ICU and libxml, alone
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        stack = AsyncExitStack()
        servers = runner.run(stack.enter_async_context(between(source_server, target_server)))

        @seed(FIRST_SEED + part)
        @settings(
            max_examples=EXAMPLES,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            report_multiple_bugs=False,
            phases=PHASES,
        )
        @given(
            examples(
                target,
                key,
                major=min(source_server.version, target_server.version),
                rich_build=both_15,
                owned=OWNED,
                captures=CAPTURES,
                careful=CAREFUL,
            )
        )
        def moves(example: Example) -> None:
            runner.run(run_example(servers, example))

        try:
            moves()
        finally:
            runner.run(stack.aclose())
