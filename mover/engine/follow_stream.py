"""Keeps the target at the source by its change stream: takes transactions from it and applies them in
batches.

> Outside a running batch the target is the source at some commit, exactly (restricted to the rows
> copied so far).

`hold` stops at a consistent point instead, where the target is what a snapshot of the source sees.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from itertools import chain

from mover.core.changes import Change, Piece, kinds
from mover.core.crash import reach
from mover.core.errors import broken_off
from mover.core.ids import Lsn, new_mark
from mover.core.migration import Progress
from mover.core.snapshot import Snapshot
from mover.ports import ApplyTarget, ApplyTransaction, ChangeSource, ChangeStream, ConsistentPoint

BATCH_BYTES = 16 << 20
# On a quiet source the slot must still move on, or an idle tenant pins everybody's WAL.
IDLE_CONFIRM_S = 10.0
IDLE_CONFIRM_BYTES = 1 << 20
# A commit that waits for a synchronous standby is in the stream, and in no snapshot yet. What is applied
# is remembered until it is looked whether snapshots see it, and not confirmed before: after a new start the
# slot tells again of what may be waiting.
VISIBLE_INTERVAL_S = 0.01
LOOK_INTERVAL_S = 1.0
APPLIED_XIDS = 10_000  # are remembered at most
SEEN_MARKS = 10_000  # of every migration in the database

_START = Lsn(0)


@dataclass
class StreamFollower:
    """Implements engine.follow.Follower: one reader and applier of a migration."""

    stream: ChangeStream
    source: ChangeSource
    target: ApplyTarget
    progress: Progress
    on_applied: Callable[[Mapping[str, int]], None] = lambda kinds: None
    applied: Lsn = _START
    _snapshot: Snapshot | None = None
    _snapshot_until: Lsn | None = None  # all that the snapshot sees stands before this
    _turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    _awaited: dict[str, list[asyncio.Future[None]]] = field(default_factory=dict)
    _seen: deque[str] = field(default_factory=lambda: deque(maxlen=SEEN_MARKS))
    _ended: Exception | None = None
    _idle_confirmed_at: float = 0.0
    # Applied, and no snapshot is known to see them: xids, and where their commits stand.
    _unseen: dict[int, Lsn] = field(default_factory=dict)
    _looked_at: float = 0.0

    async def start(self) -> None:
        """Go on from the progress that the target has stored."""
        self.applied, self._snapshot = await self.target.progress()
        self._snapshot_until = await self.source.wal_lsn() if self._snapshot else None
        self._ended = None
        self._unseen = {}
        await self.stream.start(self.applied)

    async def run(self) -> None:
        """Apply what arrives, for ever; ends with the error that ended the stream."""
        try:
            while True:
                try:
                    async with asyncio.timeout(1.0):
                        await self.stream.wait()
                except TimeoutError:
                    async with self._turn:
                        self._must_go_on()
                        await self._look_at_times()
                        await self._confirm_idle()
                    continue
                async with self._turn:
                    self._must_go_on()
                    await self._apply_batch()
        except BaseException as error:
            self._end(error)
            await self.stream.close()  # a server that shuts down waits for its readers' answers
            raise

    async def reached(self, mark: str) -> None:
        """Until everything before `mark` is applied and durable; needs `run`."""
        if mark in self._seen:
            return
        self._must_go_on()
        await self._passing(mark)

    async def catch_up_once(self) -> None:
        """Until everything that has committed by now is applied."""
        self._must_go_on()
        mark = new_mark()
        passed = self._passing(mark)
        await self.source.mark(mark)
        await passed

    def _passing(self, mark: str) -> asyncio.Future[None]:
        """Done when the mark has passed. To be asked for before it is made: in a busy database so many others
        may stand behind ours that `_seen` has forgotten it when we hear that it stands."""
        passed = asyncio.get_running_loop().create_future()
        passed.add_done_callback(_is_known)
        self._awaited.setdefault(mark, []).append(passed)
        return passed

    async def lag_bytes(self) -> int:
        """How far the target is behind the end of the source's WAL."""
        end = await self.source.wal_lsn()
        reached = self.applied if self._turn.locked() else max(self.applied, self.stream.idle_lsn)
        return max(0, end - reached)

    async def close(self) -> None:
        await self.stream.close()

    @asynccontextmanager
    async def hold(self, lifetime: AsyncExitStack) -> AsyncIterator[ConsistentPoint]:
        """Stop where the target is exactly what the point's snapshot sees; go on when the context ends.

        The snapshot itself lives as long as `lifetime`."""
        async with self._turn:
            self._must_go_on()
            await self._drain_backlog()
            async with self._at_point(lifetime) as point:
                with self._or_end():  # what the holder has put on the target is not known here
                    yield point

    @asynccontextmanager
    async def paused(self) -> AsyncIterator[None]:
        """Apply nothing meanwhile."""
        async with self._turn:
            yield

    async def _apply_batch(self) -> None:
        """One target transaction: everything that has arrived, ending at a source commit."""
        await self._look_at_times()
        pieces = self.stream.take(BATCH_BYTES)
        if not pieces:
            return
        marks: list[str] = []
        with self._or_end():
            try:
                async with self.target.transaction() as transaction:
                    await self._apply_pieces(transaction, pieces, marks)
                    while (end := pieces[-1].end_lsn) is None:  # a huge transaction flows through in pieces
                        await self.stream.wait()
                        pieces = self.stream.take(BATCH_BYTES)
                        await self._apply_pieces(transaction, pieces, marks)
                    end = max(end, self.applied)  # what comes again stands before it
                    await transaction.advance(end, self._snapshot)
                    reach("follow.written")
            except _RowsMissing:
                await self._step_to_a_point()
                return
        reach("follow.applied")
        self._durable(end, marks)

    async def _apply_pieces(
        self, transaction: ApplyTransaction, pieces: list[Piece], marks: list[str]
    ) -> None:
        changes: list[Change] = []
        ends: list[int] = []
        for piece in pieces:
            marks += piece.marks
            if piece.changes:
                self._unseen[piece.xid] = piece.final_lsn
                if not self._is_applied(piece):
                    changes += piece.changes
                    if piece.end_lsn is not None:
                        ends.append(len(changes))
        await self._apply_changes(transaction, changes, ends)
        if transaction.is_missing_rows:
            raise _RowsMissing

    async def _step_to_a_point(self) -> None:
        """A change did not carry its row, which can be read only where the target equals a snapshot of
        the source. What was taken from the stream comes again."""
        await self.stream.start(self.applied)
        async with AsyncExitStack() as lifetime, self._at_point(lifetime):
            pass

    async def _drain_backlog(self) -> None:
        """In ordinary batches first, so that little is left for the transaction that makes the point."""
        mark = new_mark()
        passed = self._passing(mark)
        await self.source.mark(mark)
        while not passed.done():
            await self.stream.wait()
            await self._apply_batch()

    @asynccontextmanager
    async def _at_point(self, lifetime: AsyncExitStack) -> AsyncIterator[ConsistentPoint]:
        point = await self._point_that_sees_all(lifetime)
        # A transaction is visible only after its commit record is in the WAL, so everything that the
        # snapshot sees stands before the mark.
        mark = new_mark()
        await self.source.mark(mark)
        with self._or_end():
            deferred = await self._apply_visible(point, mark)
        yield point
        if deferred:
            # Never confirmed, so the slot sends them again; `_snapshot` skips the others.
            with self._or_end():
                await self.stream.start(self.applied)

    async def _point_that_sees_all(self, lifetime: AsyncExitStack) -> ConsistentPoint:
        """At a snapshot that does not see a transaction which is applied already, the target is not the
        source: what it changed would be missing in rows that are copied from there."""
        before = self.progress.waiting_for
        try:
            while True:
                self._forget_seen(await self.source.snapshot())
                if not self._unseen:
                    # Whatever is seen now, a later snapshot sees as well.
                    return await lifetime.enter_async_context(self.source.consistent_point())
                self.progress.waiting_for = _UNSEEN.format(len(self._unseen))
                await asyncio.sleep(VISIBLE_INTERVAL_S)
        finally:
            self.progress.waiting_for = before

    async def _look_at_times(self) -> None:
        """Which of the applied transactions snapshots see by now: those need not be sent again."""
        now = asyncio.get_running_loop().time()
        if self._unseen and (now - self._looked_at >= LOOK_INTERVAL_S or len(self._unseen) >= APPLIED_XIDS):
            self._looked_at = now
            self._forget_seen(await self.source.snapshot())
            self._confirm()

    def _forget_seen(self, snapshot: Snapshot) -> None:
        self._unseen = {xid: lsn for xid, lsn in self._unseen.items() if not snapshot.sees(xid)}

    def _confirm(self) -> None:
        self.stream.confirm(min((self.applied, *self._unseen.values())))

    async def _apply_visible(self, point: ConsistentPoint, mark: str) -> bool:
        """In one target transaction, what the point sees of the stream up to the mark behind it.

        Returns whether there were transactions that it does not see: they are left for later."""
        deferred, marks, end = False, list[str](), self.applied
        visible: list[Change] = []
        ends: list[int] = []
        size_bytes = 0
        async with self.target.transaction() as transaction:
            piece = await self._next_piece()
            while mark not in piece.marks:
                if piece.changes and not self._is_applied(piece):
                    if point.snapshot.sees(piece.xid):
                        visible += piece.changes
                        if piece.end_lsn is not None:
                            ends.append(len(visible))
                        size_bytes += piece.size_bytes
                        if size_bytes >= BATCH_BYTES:
                            await self._apply_changes(transaction, visible, ends)
                            visible, ends, size_bytes = [], [], 0
                    else:
                        deferred = True
                if not deferred:
                    marks += piece.marks
                    end = max(end, piece.end_lsn or end)
                piece = await self._next_piece()
            assert piece.end_lsn is not None  # a mark's transaction holds nothing else
            await self._apply_changes(transaction, visible, ends)
            await transaction.fetch_missing(point)
            self._snapshot, self._snapshot_until = point.snapshot, piece.end_lsn
            end = end if deferred else piece.end_lsn
            await transaction.advance(end, point.snapshot)
            reach("point.written")
        reach("point.reached")
        self._durable(end, marks)
        return deferred

    async def _apply_changes(
        self, transaction: ApplyTransaction, changes: list[Change], ends: list[int]
    ) -> None:
        if changes:
            if ends[-1:] != [len(changes)]:
                ends.append(len(changes))  # of a transaction so large that it flows through in pieces
            await transaction.apply(changes, ends)
            self.progress.changes_applied += len(changes)
            self.on_applied(kinds(changes))

    async def _next_piece(self) -> Piece:
        while not (pieces := self.stream.take(0)):
            await self.stream.wait()
        return pieces[0]

    def _is_applied(self, piece: Piece) -> bool:
        return piece.final_lsn < self.applied or (
            self._snapshot is not None and self._snapshot.sees(piece.xid)
        )

    def _durable(self, end: Lsn, marks: list[str]) -> None:
        """The target has committed everything up to `end`."""
        self.applied = end
        if self._snapshot_until is not None and end >= self._snapshot_until:
            self._snapshot = self._snapshot_until = None
        self._confirm()
        for mark in marks:
            self._seen.append(mark)
            for awaited in self._awaited.pop(mark, ()):
                if not awaited.done():
                    awaited.set_result(None)

    async def _confirm_idle(self) -> None:
        """Nothing for us, but others write: move the slot on, the target's progress first."""
        now, idle = asyncio.get_running_loop().time(), self.stream.idle_lsn
        if idle - self.applied < IDLE_CONFIRM_BYTES and now - self._idle_confirmed_at < IDLE_CONFIRM_S:
            return
        self._idle_confirmed_at = now
        if idle > self.applied:
            async with self.target.transaction() as transaction:
                await transaction.advance(idle, self._snapshot)
            self._durable(idle, [])

    @contextmanager
    def _or_end(self) -> Iterator[None]:
        """After an error what was taken from the stream comes again only with a new start: nothing is applied
        until then."""
        try:
            yield
        except BaseException as error:
            self._end(error)
            raise

    def _must_go_on(self) -> None:
        """Raises what ended the following: what the stream had sent may be lost to us."""
        if self._ended is not None:
            raise self._ended

    def _end(self, error: BaseException) -> None:
        """Whoever waits for a mark learns that it will not come."""
        self._ended = broken_off(error)
        for awaited in chain.from_iterable(self._awaited.values()):
            if isinstance(error, Exception) and not awaited.done():
                awaited.set_exception(error)
            else:
                awaited.cancel()
        self._awaited.clear()


_UNSEEN = "transactions that have committed to show: {}; a synchronous standby has not confirmed them"


def _is_known(passed: asyncio.Future[None]) -> None:
    """Whoever drains hears of the error by the call that failed."""
    if not passed.cancelled():
        passed.exception()


class _RowsMissing(Exception):
    """The batch cannot be applied from the stream alone."""
