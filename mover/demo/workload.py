"""Live writers: clients that hold a rate of transactions on the tenant that moves, and a few on others;
what they were told goes to the ledger, what they waited for to the report.
"""

from __future__ import annotations

import asyncio
import random
from array import array
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from statistics import quantiles
from typing import Protocol

import psycopg

from cutover.router import Route, Router
from mover.core.ids import TenantId
from mover.demo.ledger import Ledger
from mover.demo.places import ByHand, PsycopgPlaces, Session
from mover.demo.transactions import HotRows, Job, Jobs, find_hot_rows

# Transactions that were waiting around a switch began before and ended after these.
BEFORE_SWITCH_S = 1.0
AFTER_SWITCH_S = 0.1
LATE_S = 1.0  # a client that is later than this gives up the transactions it missed
RATE_WINDOW_S = 5.0
RECONNECT_DELAY_S = 0.2
HOT_ROWS = 400
# Nobody knows whether a transaction was committed whose connection broke.
BROKEN = ("08", "57P0")


@dataclass(frozen=True, slots=True)
class Rates:
    """How many clients do how much; every other client goes through the router."""

    tps: float = 300.0
    clients: int = 12
    others_tps: float = 30.0
    others_clients: int = 3
    seed: int = 1


@dataclass(frozen=True, slots=True)
class Waits:
    """Milliseconds."""

    p50: float
    p99: float
    max: float

    @classmethod
    def of(cls, values_s: Sequence[float]) -> Waits | None:
        if not values_s:
            return None
        percentiles = (
            quantiles(values_s, n=100, method="inclusive") if len(values_s) > 1 else [*values_s] * 99
        )
        return cls(*(round(1000 * value, 1) for value in (percentiles[49], percentiles[98], max(values_s))))


@dataclass(frozen=True, slots=True)
class WorkloadReport:
    """Everything but the first two figures is about the tenant that moves."""

    others_transactions: int
    client_errors: int  # of all writers: what the contract's three lines do not hide
    errors: tuple[str, ...]  # kinds of errors, most frequent first
    transactions: int
    tps: float
    lowest_tps: float  # in any five seconds
    stale_reads: int
    latency_ms: Waits | None
    # Each writer's longest wait around a switch of the route; None when no writer saw one.
    pause_ms: Waits | None


class Runner(Protocol):
    """`Router.run`, or the same by hand."""

    async def run(self, tenant: TenantId, work: Callable[[Session], Awaitable[int]], /) -> int: ...


@dataclass
class _Writer:
    """One client: its jobs, its pace, and what it saw."""

    jobs: Jobs
    runner: Runner
    interval_s: float
    place: Route | None = None
    began_s: array[float] = field(default_factory=lambda: array("d"))
    ended_s: array[float] = field(default_factory=lambda: array("d"))
    wrote: bytearray = field(default_factory=bytearray)
    switched_s: list[float] = field(default_factory=list)

    async def run(self, job: Job) -> int:
        """The job's result; notes when the tenant is served from another place than before."""
        reached = self.place

        async def work(session: Session) -> int:
            nonlocal reached
            reached = session.route
            return await job.work(session)

        result = await self.runner.run(self.jobs.tenant, work)
        if self.place not in (None, reached):
            self.switched_s.append(_now())
        self.place = reached
        return result

    def note(self, began_s: float, ended_s: float, job: Job) -> None:
        self.began_s.append(began_s)
        self.ended_s.append(ended_s)
        self.wrote.append(bool(job.writes))

    def longest_wait_s(self, switch_s: float) -> float | None:
        """Among the writes that were under way around `switch_s`."""
        waits = [
            ended - began
            for began, ended, wrote in zip(self.began_s, self.ended_s, self.wrote, strict=True)
            if wrote and began <= switch_s + AFTER_SWITCH_S and ended >= switch_s - BEFORE_SWITCH_S
        ]
        return max(waits, default=None)


class Workload:
    """Writers on `tenant` and on `others`, from `running()` entered until left."""

    def __init__(
        self,
        places: PsycopgPlaces,
        tenant: TenantId,
        others: Sequence[TenantId],
        ledger: Ledger,
        rates: Rates | None = None,
    ) -> None:
        self._places = places
        self._tenant = tenant
        self._others = others
        self._ledger = ledger
        self._rates = rates or Rates()
        self._router: Router[Session] = Router(places)
        self._writers: list[_Writer] = []
        self._errors: Counter[str] = Counter()
        self._stopping = False

    @property
    def transactions(self) -> int:
        """Committed so far, on all tenants."""
        return sum(len(writer.ended_s) for writer in self._writers)

    @property
    def client_errors(self) -> int:
        return self._errors.total()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Workload]:
        """Leaving waits for each writer's last answer, so that the ledger is settled."""
        rates = self._rates
        self._writers = await self._make_writers(self._tenant, rates.clients, rates.tps)
        share = len(self._others)
        for tenant in self._others:
            clients = max(1, rates.others_clients // share)
            self._writers += await self._make_writers(tenant, clients, rates.others_tps / share)
        await self._places.warm(len(self._writers))
        self._stopping = False
        names = (f"writer {number}" for number in range(len(self._writers)))
        tasks = [
            asyncio.create_task(self._write(w), name=n) for w, n in zip(self._writers, names, strict=True)
        ]
        try:
            yield self
        finally:
            self._stopping = True
            try:
                await asyncio.gather(*tasks)
            finally:
                await self._places.close()

    def report(self) -> WorkloadReport:
        ours = [writer for writer in self._writers if writer.jobs.tenant == self._tenant]
        ended = sorted(moment for writer in ours for moment in writer.ended_s)
        seconds = ended[-1] - ended[0] if len(ended) > 1 else 0.0
        waits = [e - b for writer in ours for b, e in zip(writer.began_s, writer.ended_s, strict=True)]
        return WorkloadReport(
            others_transactions=self.transactions - len(ended),
            client_errors=self.client_errors,
            errors=tuple(f"{kind} ({count})" for kind, count in self._errors.most_common()),
            transactions=len(ended),
            tps=round(len(ended) / seconds, 1) if seconds else 0.0,
            lowest_tps=round(_lowest_rate(ended), 1),
            stale_reads=sum(writer.jobs.stale_reads for writer in ours),
            latency_ms=Waits.of(waits),
            pause_ms=Waits.of(_pauses_s(ours)),
        )

    async def _make_writers(self, tenant: TenantId, clients: int, tps: float) -> list[_Writer]:
        async with self._places.transaction(await self._router.route(tenant)) as session:
            shares = await find_hot_rows(session, tenant, self._ledger, clients, HOT_ROWS)
        return [self._writer(tenant, number, rows, clients / tps) for number, rows in enumerate(shares)]

    def _writer(self, tenant: TenantId, number: int, rows: HotRows, interval_s: float) -> _Writer:
        rng = random.Random(f"{self._rates.seed} {tenant} {number}")
        runner: Runner = ByHand(self._places) if number % 2 else self._router
        return _Writer(Jobs(tenant, rows, rng), runner, interval_s)

    async def _write(self, writer: _Writer) -> None:
        due_s = _now() + writer.jobs.rng.random() * writer.interval_s
        while not self._stopping:
            now_s = _now()
            if now_s < due_s:
                await asyncio.sleep(due_s - now_s)
            due_s = max(due_s + writer.interval_s, now_s - LATE_S)
            await self._one(writer, writer.jobs.next())

    async def _one(self, writer: _Writer, job: Job) -> None:
        began_s = _now()
        try:
            result = await writer.run(job)
        except asyncio.CancelledError:
            self._ledger.doubt(job.writes)
            raise
        except Exception as error:
            self._errors[f"{job.name}: {_kind(error)}"] += 1
            if _outcome_unknown(error):
                self._ledger.doubt(job.writes)
                await asyncio.sleep(RECONNECT_DELAY_S)
            return
        ended_s = _now()
        self._ledger.acknowledge(job.writes)
        job.committed(result)
        writer.note(began_s, ended_s, job)


def _now() -> float:
    return asyncio.get_running_loop().time()


def _kind(error: Exception) -> str:
    """Never the message, which may hold a row's value."""
    state = getattr(error, "sqlstate", None)
    return f"{type(error).__name__} {state}" if state else type(error).__name__


def _outcome_unknown(error: Exception) -> bool:
    if not isinstance(error, psycopg.Error):
        return isinstance(error, OSError)
    return error.sqlstate is None or error.sqlstate.startswith(BROKEN)


def _pauses_s(writers: Sequence[_Writer]) -> list[float]:
    """Each writer's longest wait at each switch; a switch is when the first writer saw it."""
    switches = [min(seen) for seen in _by_ordinal([writer.switched_s for writer in writers])]
    waits = (writer.longest_wait_s(switch) for switch in switches for writer in writers)
    return [wait for wait in waits if wait is not None]


def _by_ordinal(lists: Sequence[Sequence[float]]) -> list[list[float]]:
    """First elements together, second elements together, and so on."""
    longest = max(map(len, lists), default=0)
    return [[values[i] for values in lists if i < len(values)] for i in range(longest)]


def _lowest_rate(ended_s: Sequence[float]) -> float:
    """The fewest transactions a second in any full window."""
    if not ended_s:
        return 0.0
    windows = int((ended_s[-1] - ended_s[0]) / RATE_WINDOW_S)
    counts = Counter(int((moment - ended_s[0]) / RATE_WINDOW_S) for moment in ended_s)
    return min((counts[window] / RATE_WINDOW_S for window in range(windows)), default=0.0)
