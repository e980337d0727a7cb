"""Random operations on a migration between real servers: daemons that die, freeze and come back, connections
that break, servers that stop, and an operator who cannot make up his mind. What always holds is checked after
each of them; in the end everything works again, and the migration comes to its end.

A failure names its example, which can be given to `@example`. `RANDOM_EXAMPLES` and `RANDOM_SEED` make other
runs.
"""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass

import pytest
import uvloop
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from mover.core.errors import first_error
from mover.core.ids import Capture
from mover.core.states import PHASES
from mover.core.states import Phase as MigrationPhase
from tests.support.acceptance import CORE, ESTATE, PLATFORM
from tests.support.chaos import DAEMONS, SIDES, World, world_on
from tests.support.crash_points import RETURNING, SWITCHING, every_point

EXAMPLES = int(os.environ.get("RANDOM_EXAMPLES", "2"))
FIRST_SEED = int(os.environ.get("RANDOM_SEED", "0"))
LONG_PARTS, LONG_EXAMPLES, EXAMPLE_TIMEOUT_S = 10, 5, 300
OPERATIONS = 10
TPS, WRITTEN_BETWEEN = 120, 100
ROWS = 2000

Operation = tuple[object, ...]  # how much is written before, a method of World, its arguments

daemons, sides = st.sampled_from(DAEMONS), st.sampled_from(SIDES)
points = st.one_of(st.just(""), st.sampled_from([*SWITCHING, *RETURNING]), st.sampled_from([*every_point()]))
blows = st.sampled_from(["SIGKILL", "SIGSTOP"])


def operation(name: str, *arguments: st.SearchStrategy[object]) -> st.SearchStrategy[Operation]:
    return st.tuples(st.integers(0, WRITTEN_BETWEEN), st.just(name), *arguments)


launches = operation("launch", daemons, points, blows)
operations = st.one_of(
    launches,
    launches,
    operation("submit"),
    operation("kill", daemons),
    operation("freeze", daemons),
    operation("thaw", daemons),
    operation("stop", daemons),
    operation("wish", st.sampled_from(["pause", "cancel", "rollback"])),
    operation("resume"),
    operation("cut", sides),
    operation("hold", sides),
    operation("restore", sides),
    operation("end_backends", sides),
    operation("crash", sides),
)


@dataclass(frozen=True)
class Example:
    """One run from beginning to end."""

    is_shared: bool  # the target has other tenants
    is_long: bool  # he can come back for long, and does
    first: tuple[str, str]  # what happens to the first daemon by itself
    begins_in: MigrationPhase  # the phase to which it gets before the operations, if it does
    operations: tuple[Operation, ...]


examples = st.builds(
    Example,
    is_shared=st.booleans(),
    is_long=st.booleans(),
    first=st.tuples(points, blows),
    begins_in=st.sampled_from(PHASES),
    # Unique, so that the first example is not one of nothing but zeros.
    operations=st.lists(operations, min_size=OPERATIONS, max_size=OPERATIONS, unique=True).map(tuple),
)


@pytest.fixture
def run_examples(pg16, pg18, make_scene):
    """`run_examples(capture, count, first_seed)`"""
    servers = {CORE: pg16, ESTATE: pg18, PLATFORM: pg16}

    def run(capture: Capture, count: int, first_seed: int) -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:

            @seed(first_seed)
            @settings(
                max_examples=count,
                database=None,
                deadline=None,
                suppress_health_check=list(HealthCheck),
                phases=[Phase.explicit, Phase.generate],  # each takes seconds, and none fails twice alike
            )
            @given(example=examples)
            def holds(example: Example) -> None:
                scene = make_scene(pg16, pg18, shared=example.is_shared, rows=ROWS, capture=capture)
                runner.run(run_example(world_on(scene, servers, abandoned_hours=0), example))

            holds()

    return run


@pytest.mark.long
@pytest.mark.parametrize("capture", list(Capture), ids=str)
def test_nothing_that_happens_breaks_a_promise(run_examples, capture):
    run_examples(capture, EXAMPLES, FIRST_SEED)


@pytest.mark.long
@pytest.mark.parametrize("part", range(LONG_PARTS))
@pytest.mark.parametrize("capture", list(Capture), ids=str)
def test_nothing_that_happens_breaks_a_promise_for_long(run_examples, capture, part):
    run_examples(capture, LONG_EXAMPLES, FIRST_SEED + 1 + part)


async def run_example(opened, example: Example) -> None:
    try:
        with first_error():
            async with asyncio.timeout(EXAMPLE_TIMEOUT_S), opened as world:
                await happen(world, example)
    except BaseException as error:
        error.add_note(f"in {example}")
        raise


async def happen(world: World, example: Example) -> None:
    world.set_window(is_long=example.is_long)
    async with world.writing(TPS):
        await world.launch(0, *example.first)
        await world.submit()
        await world.get_to(example.begins_in)
        for written, name, *arguments in example.operations:
            await world.write(written)
            await getattr(world, name)(*arguments)
            await world.check_invariants()
        status = await world.settle()
    if status == "monitoring":
        await world.until_equal()
        await world.wish("rollback")
        await world.settle()
    await world.check_ended()
    print(f"{world.watch.seen} {world.witness.looks} looks, {world.witness.changes} changes, {world.refused}")
