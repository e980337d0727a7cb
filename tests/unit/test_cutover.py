"""The cutover protocol in an in-memory world: every crash, lost answer and zombie, one after the other.

The world behaves as PostgreSQL does where it hurts: a fence's gate (the sequence) changes at once, its row
only with the commit, an epoch keeps an older owner out of a database once the new one has taken it, and an
answer may be lost before or after the work was done.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cutover.protocol import World, cut_over, recover
from mover.core.errors import (
    CutoverAborted,
    LeaseLost,
    LockNotAvailable,
    MoverError,
    OutcomeUnknown,
    Remedy,
    Unreachable,
    VerificationFailed,
    first_error,
)

BUDGET_S = 1000.0


class Crashed(BaseException):
    """The owner's process ends here."""


class Fault(Enum):
    """What may happen to one call."""

    NONE = "nothing"
    FAIL_BEFORE = "unreachable, nothing done"
    FAIL_AFTER = "done, the answer lost"
    FAIL_TORN = "the gate set, the commit failed"
    CRASH_BEFORE = "died before"
    CRASH_AFTER = "died after"
    CRASH_TORN = "died between the gate and the commit"


@dataclass
class Place:
    """One database: the fence's row and gate, the epoch that may change them, the tenant's rows."""

    row: str
    gate: str
    epoch: int = 1
    rows: list[int] = field(default_factory=list)


@dataclass
class Cluster:
    """Both databases, the platform and the stream between them."""

    source: Place = field(default_factory=lambda: Place("open", "open"))
    target: Place = field(default_factory=lambda: Place("closed", "closed"))
    claim_epoch: int = 1
    route: str = "source"
    decisions: int = 0
    mark: int | None = None  # how many rows stand before the mark
    verified: bool = False
    sequences_carried: bool = False
    gate: int | None = None  # how many of the target's rows do not flow back
    writes: int = 0
    forgetful: bool = False  # the platform lost the decision in a failover
    holder: int | None = None  # the owner whose session holds the source's writers

    def tick(self) -> None:
        """The tenant writes wherever a gate lets it; then every invariant has to hold."""
        open_here = self.source.gate == "open" and self.holder is None
        open_there = self.target.gate == "open"
        assert not (open_here and open_there), "both sides accept writes"
        for place, is_open in ((self.source, open_here), (self.target, open_there)):
            if is_open:
                self.writes += 1
                place.rows.append(self.writes)
        if open_there and not self.forgetful:
            assert self.route == "target", "the target is open and nobody decided"
        assert self.decisions <= 1, "decided twice"

    def check_decision(self) -> None:
        """switched implies drained, verified, and the fence held."""
        assert self.source.gate == self.source.row == "closed"
        assert self.target.rows[: len(self.source.rows)] == self.source.rows
        assert self.verified and self.sequences_carried
        assert self.gate == len(self.source.rows)

    def check_settled(self) -> None:
        """Nobody works on it any more: one side serves the tenant, with every acknowledged write."""
        self.tick()
        if self.route == "target":
            assert (self.target.row, self.target.gate) == ("open", "open")
            assert (self.source.row, self.source.gate) == ("moved", "moved")
            assert self.target.rows == list(range(1, self.writes + 1))
        else:
            assert (self.source.row, self.source.gate) == ("open", "open")
            assert (self.target.row, self.target.gate) == ("closed", "closed")
            assert self.source.rows == list(range(1, self.writes + 1))


@dataclass
class Owner:
    """One daemon's hands: every call waits for its turn, suffers its fault and lets the tenant write."""

    cluster: Cluster
    epoch: int
    faults: Mapping[int, Fault] = field(default_factory=dict)
    turn: Callable[[], Awaitable[None]] | None = None
    tries_again: bool = True
    calls: int = 0

    def end_sessions(self) -> None:
        if self.cluster.holder == self.epoch:
            self.cluster.holder = None

    async def act(self, work: Callable[[bool], None], lost: type[MoverError] = Unreachable) -> None:
        """`work(torn)`; torn stops between what is at once and what commits."""
        number, self.calls = self.calls, self.calls + 1
        fault = self.faults.get(number, Fault.NONE)
        if self.turn is not None:
            await self.turn()
        if fault is Fault.CRASH_BEFORE:
            raise Crashed
        if fault is Fault.FAIL_BEFORE:
            raise Unreachable("nothing done")
        work(fault in (Fault.FAIL_TORN, Fault.CRASH_TORN))
        self.cluster.tick()
        if self.turn is not None:
            await self.turn()
        if fault in (Fault.CRASH_AFTER, Fault.CRASH_TORN):
            raise Crashed
        if fault in (Fault.FAIL_AFTER, Fault.FAIL_TORN):
            raise lost("no answer")


@dataclass
class FakeFence:
    owner: Owner
    place: Place
    is_source: bool

    async def get_ready(self) -> None:
        await self.owner.act(lambda torn: None)

    async def close(self, lock_timeout_s: float) -> str:
        def work(torn: bool) -> None:
            self._swap(("open",), "closed", torn)
            cluster = self.owner.cluster
            cluster.holder = self.owner.epoch
            if not torn:
                cluster.mark, cluster.verified, cluster.sequences_carried = len(self.place.rows), False, False
                cluster.gate = None

        await self.owner.act(work)
        return "mark"

    async def reopen(self) -> None:
        await self._change(("closed", "aborted"), "open")

    async def open(self) -> None:
        await self._change(("closed", "aborted"), "open")

    async def move_away(self) -> None:
        await self._change(("closed",), "moved")

    async def abort(self) -> bool:
        if self.place.row == "open":
            await self.owner.act(lambda torn: None)
            return False
        await self._change(("closed",), "aborted")
        return True

    async def close_again(self) -> None:
        await self._change(("aborted",), "closed")

    async def let_go(self) -> None:
        self._unlock()

    async def state(self) -> str:
        return self.place.row

    async def _change(self, old: tuple[str, ...], new: str) -> None:
        def work(torn: bool) -> None:
            self._swap((*old, new), new, torn)
            self._unlock()

        await self.owner.act(work)

    def _swap(self, old: tuple[str, ...], new: str, torn: bool) -> None:
        if self.place.epoch != self.owner.epoch:
            raise LeaseLost("another owner")
        if self.place.row not in old:
            raise WrongState(f"{self.place.row}, not {old}")
        self.place.gate = new
        if not torn:
            self.place.row = new

    def _unlock(self) -> None:
        if self.is_source:
            self.owner.end_sessions()


class WrongState(MoverError):
    remedy = Remedy.HALT


@dataclass
class FakeWork:
    """Drain, proof, sequences, gate, decision and cache in one."""

    owner: Owner
    differs: bool = False

    async def get_ready(self) -> None:
        await self.owner.act(lambda torn: None)

    async def catch_up_once(self) -> None:
        await self.owner.act(lambda torn: None)

    def _hold(self, place: Place) -> None:
        if place.epoch != self.owner.epoch:
            raise LeaseLost("another owner")

    async def reached(self, mark: str) -> None:
        def work(torn: bool) -> None:
            cluster = self.owner.cluster
            self._hold(cluster.target)
            assert cluster.mark is not None
            cluster.target.rows[:] = cluster.source.rows[: cluster.mark]

        await self.owner.act(work)

    async def changed_rows_equal(self) -> Mapping[str, object]:
        def work(torn: bool) -> None:
            if self.differs:
                raise VerificationFailed("a row differs")
            self.owner.cluster.verified = True

        await self.owner.act(work)
        return {}

    async def carry_over(self) -> None:
        def work(torn: bool) -> None:
            self._hold(self.owner.cluster.target)
            self.owner.cluster.sequences_carried = True

        await self.owner.act(work, lost=LockNotAvailable)

    async def set(self) -> None:
        def work(torn: bool) -> None:
            self._hold(self.owner.cluster.target)
            self.owner.cluster.gate = len(self.owner.cluster.target.rows)

        await self.owner.act(work)

    async def switch(self, evidence: Mapping[str, object]) -> None:
        cluster = self.owner.cluster

        def work(torn: bool) -> None:
            if cluster.claim_epoch != self.owner.epoch:
                raise LeaseLost("another owner")
            if cluster.route == "source" and not torn:
                cluster.check_decision()
                cluster.route, cluster.decisions = "target", cluster.decisions + 1

        await self.owner.act(work, lost=OutcomeUnknown)

    async def is_switched(self) -> bool:
        def work(torn: bool) -> None:
            if self.owner.cluster.claim_epoch != self.owner.epoch:
                raise LeaseLost("another owner")

        await self.owner.act(work)
        return self.owner.cluster.route == "target"

    async def invalidate(self) -> None:
        await self.owner.act(lambda torn: None)


class InstantClock:
    def monotonic(self) -> float:
        return 0.0

    async def sleep(self, seconds: float) -> None:
        """Another try at once."""


def world_of(owner: Owner, differs: bool = False) -> World:
    work = FakeWork(owner, differs)
    return World(
        source=FakeFence(owner, owner.cluster.source, is_source=True),
        target=FakeFence(owner, owner.cluster.target, is_source=False),
        drain=work,
        proof=work,
        sequences=work,
        gate=work,
        decision=work,
        cache=work,
        clock=InstantClock(),
    )


async def attempt(owner: Owner) -> None:
    """One cutover, settled if its outcome is unknown."""
    world = world_of(owner)
    try:
        await cut_over(world, BUDGET_S)
    except OutcomeUnknown:
        await settle_unknown(world)


async def settle_unknown(world: World) -> None:
    while True:
        try:
            await recover(world)
            return
        except MoverError as error:
            if error.remedy is not Remedy.RETRY:
                raise


async def take_over(owner: Owner) -> None:
    """A new owner: the claim, then the epoch in both databases, then whatever was half done."""
    cluster = owner.cluster

    def claim(torn: bool) -> None:
        cluster.claim_epoch = max(owner.epoch, cluster.claim_epoch)

    def take(place: Place) -> Callable[[bool], None]:
        def work(torn: bool) -> None:
            if place.epoch > owner.epoch:
                raise LeaseLost("a newer owner")
            place.epoch = owner.epoch
            if place is cluster.source:
                cluster.holder = None  # the old owner's sessions are ended

        return work

    for work in (claim, take(cluster.source), take(cluster.target)):
        await owner.act(work)
    if not await recover(world_of(owner)) and owner.tries_again:
        await attempt(owner)


async def ended(coroutine: Coroutine[None, None, None], owner: Owner) -> None:
    """Run a daemon to its end, whatever that is; its sessions end with it."""
    try:
        with first_error():
            await coroutine
    except Crashed:
        pass
    except MoverError as error:
        assert error.remedy is not Remedy.HALT or isinstance(error, LeaseLost), error
    owner.end_sessions()


async def run(cluster: Cluster, *owners: Owner) -> None:
    """One after the other; then one that meets no fault settles it all."""
    first, *later = owners
    await ended(attempt(first), first)
    for owner in later:
        await ended(take_over(owner), owner)
    await settled(cluster)


async def settled(cluster: Cluster) -> None:
    await take_over(Owner(cluster, 99, tries_again=False))
    cluster.check_settled()


def single_faults(calls: int) -> Iterator[dict[int, Fault]]:
    yield {}
    for number, fault in itertools.product(range(calls), list(Fault)[1:]):
        yield {number: fault}


CUT_OVER_CALLS, RECOVER_CALLS = 14, 7


async def test_an_undisturbed_cutover_switches():
    cluster = Cluster()
    owner = Owner(cluster, 1)
    await attempt(owner)
    cluster.check_settled()
    assert cluster.route == "target"
    assert owner.calls == CUT_OVER_CALLS


async def test_an_owner_that_lives_settles_every_single_fault_itself():
    for faults in single_faults(CUT_OVER_CALLS):
        if not any(fault.name.startswith("CRASH") for fault in faults.values()):
            cluster = Cluster()
            owner = Owner(cluster, 1, faults)
            await ended(attempt(owner), owner)
            cluster.check_settled()


async def test_any_fault_of_an_owner_and_any_of_its_successor_end_settled():
    for first, second in itertools.product(single_faults(CUT_OVER_CALLS), single_faults(RECOVER_CALLS)):
        cluster = Cluster()
        await run(cluster, Owner(cluster, 1, first), Owner(cluster, 2, second))


FAULTS = st.dictionaries(
    st.integers(0, RECOVER_CALLS + CUT_OVER_CALLS + 4), st.sampled_from(Fault), max_size=6
)


@settings(max_examples=200, deadline=None, database=None)
@given(st.lists(FAULTS, min_size=1, max_size=5))
def test_any_series_of_faults_ends_settled(series):
    cluster = Cluster()
    asyncio.run(
        run(cluster, *(Owner(cluster, epoch, faults) for epoch, faults in enumerate(series, start=1)))
    )


async def test_an_owner_that_wakes_up_beside_its_successor_changes_nothing():
    """It stops at any moment, its successor begins and stops at any moment, and both go on."""
    for old_steps, new_steps in itertools.product(
        range(2 * CUT_OVER_CALLS + 1), range(2 * RECOVER_CALLS + 3)
    ):
        for more in (1, 2, 1000):
            await interleave([(0, old_steps), (1, new_steps), (0, more), (1, 1000), (0, 1000)])


@settings(max_examples=100, deadline=None, database=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 6)), max_size=30))
def test_three_owners_in_any_order_end_settled(schedule):
    asyncio.run(interleave([*schedule, (0, 1000), (1, 1000), (2, 1000)]))


async def interleave(schedule: Sequence[tuple[int, int]]) -> None:
    """`schedule`: which owner moves on, and how many steps. The first begins the cutover."""
    cluster = Cluster()
    turns = [Turns() for _ in range(3)]
    owners = [Owner(cluster, number + 1, turn=turns[number].wait) for number in range(3)]
    works = (attempt(owners[0]), take_over(owners[1]), take_over(owners[2]))
    tasks = [asyncio.create_task(ended(work, owner)) for work, owner in zip(works, owners, strict=True)]
    await asyncio.sleep(0)
    for who, steps in schedule:
        for _ in range(steps):
            if tasks[who].done():
                break
            await turns[who].grant(tasks[who])
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    for task in tasks:
        if not task.cancelled():
            task.result()
    await settled(cluster)


@dataclass
class Turns:
    """Lets one owner go step by step."""

    waiting: list[asyncio.Future[None]] = field(default_factory=list)

    async def wait(self) -> None:
        self.waiting.append(asyncio.get_running_loop().create_future())
        await self.waiting[-1]

    async def grant(self, task: asyncio.Task[None]) -> None:
        self.waiting = [turn for turn in self.waiting if not turn.done()]
        if self.waiting:
            self.waiting.pop(0).set_result(None)
        for _ in range(6):  # until it asks again, or has ended
            await asyncio.sleep(0)


async def test_a_difference_reopens_the_source():
    cluster = Cluster()
    with pytest.raises(VerificationFailed):
        await cut_over(world_of(Owner(cluster, 1), differs=True), BUDGET_S)
    assert cluster.route == "source"
    cluster.check_settled()


async def test_a_budget_that_is_spent_reopens_the_source():
    cluster = Cluster()
    world = world_of(Owner(cluster, 1))
    with pytest.raises(CutoverAborted, match="budget"):
        await cut_over(replace(world, drain=NeverDrained()), budget_s=0.01)
    cluster.check_settled()


async def test_a_cancelled_cutover_reopens_the_source():
    cluster = Cluster()
    drain = NeverDrained()
    task = asyncio.create_task(cut_over(replace(world_of(Owner(cluster, 1)), drain=drain), BUDGET_S))
    await drain.begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    cluster.check_settled()


@dataclass
class NeverDrained:
    begun: asyncio.Event = field(default_factory=asyncio.Event)

    async def catch_up_once(self) -> None:
        pass

    async def reached(self, mark: str) -> None:
        self.begun.set()
        await asyncio.get_running_loop().create_future()


async def test_the_route_follows_an_open_target_that_the_platform_has_forgotten():
    cluster = Cluster()
    await attempt(Owner(cluster, 1))
    cluster.route, cluster.decisions, cluster.forgetful = "source", 0, True
    cluster.source.row = cluster.source.gate = "closed"
    assert await recover(world_of(Owner(cluster, 1)))
    cluster.check_settled()
    assert cluster.route == "target"
