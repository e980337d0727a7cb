"""The socket between a slot and `core.pgoutput`: START_REPLICATION at libpq level.

psycopg has no replication class; this is the only file that drives `pq` by hand. It decodes while the
event loop waits for the target, holds a bounded number of bytes, and answers keepalives by itself.
An error ends the stream; `start` begins it again.
"""

from __future__ import annotations

import asyncio
import select
import time
from collections import deque

import psycopg
from psycopg import pq
from psycopg.conninfo import make_conninfo
from psycopg.errors import error_from_result

from mover.core.changes import Begin, Change, Commit, Delete, Insert, Message, Piece, Relation, Update
from mover.core.errors import MoverError, SlotLost, Unreachable
from mover.core.ids import Lsn
from mover.core.pgoutput import Decoder
from mover.core.walsender import HEADER_BYTES, ProtocolViolation, parse_keepalive, status_update
from mover.postgres.connect import Database
from mover.postgres.errors import ServerError, translated
from mover.postgres.marks import (
    MARK_PREFIX,
    OWNER_PREFIXES,
    TRUNCATE_PREFIX,
    parse_mark,
    parse_owner_change,
    parse_truncated,
)

QUEUE_LIMIT_BYTES = 32 << 20
PIECE_BYTES = 4 << 20
# What Python adds to the bytes of a message: measured, so that the limits above are of memory.
CHANGE_BYTES, VALUE_BYTES = 180, 38
MESSAGE_BYTES = 1000
MESSAGES_PER_TURN = 500  # then the event loop gets its turn; about 5 ms of decoding
STATUS_INTERVAL_S = 5.0
WAL_SENDER_TIMEOUT = "60s"  # the server ends a connection that was silent for so long


class WalStream:
    """Implements ports.ChangeStream on a pgoutput slot. One reader at a time."""

    def __init__(self, database: Database, slot: str, publication: str) -> None:
        self._database, self._slot, self._publication = database, slot, publication
        self._conn: pq.abc.PGconn | None = None
        self._socket = -1  # libpq forgets it when the connection breaks
        self._input = select.poll()
        self._loop = asyncio.get_running_loop()
        self._confirmed = Lsn(0)
        self._reset()

    def _reset(self) -> None:
        self._decoder = Decoder()
        self._queue: deque[Piece] = deque()
        self._queued_bytes = 0
        self._arrived = asyncio.Event()
        self._error: Exception | None = None
        self._begin: Begin | None = None
        self._changes: list[Change] = []
        self._marks: list[str] = []
        self._open_bytes = 0
        self._idle_lsn = Lsn(0)
        self._reading = False
        self._turn: asyncio.Handle | None = None
        self._heartbeat: asyncio.TimerHandle | None = None

    async def start(self, after: Lsn) -> None:
        """Begin reading transactions that commit after what is confirmed, which is `after` or before it.

        Raises SlotLost when the slot is gone or already ahead of `after`."""
        await self.close()
        self._reset()
        self._confirmed = await self._release_slot(after)
        options = f"proto_version '1', publication_names '{self._publication}', messages 'true'"
        command = f'START_REPLICATION SLOT "{self._slot}" LOGICAL {self._confirmed} ({options})'
        conn = await self._connect()
        try:
            await self._send_query(conn, command.encode())
        except BaseException:
            conn.finish()
            raise
        self._database.open_connections.add(conn)
        self._conn, self._socket = conn, conn.socket
        self._input.register(self._socket, select.POLLIN)
        self._resume_reading()
        self._beat()

    async def wait(self) -> None:
        """Until `take` has something to give; raises what ended the stream."""
        await self._arrived.wait()
        if self._error is not None and not self._queue:
            raise self._error

    def take(self, max_bytes: int) -> list[Piece]:
        """What has arrived, in commit order, at least one piece if there is any; may end mid-transaction."""
        taken: list[Piece] = []
        size = 0
        while self._queue and (not taken or size + self._queue[0].size_bytes <= max_bytes):
            piece = self._queue.popleft()
            size += piece.size_bytes
            taken.append(piece)
        self._queued_bytes -= size
        if not self._queue and self._error is None:
            self._arrived.clear()
        is_paused = self._conn is not None and self._error is None and not self._reading
        if is_paused and self._queued_bytes < QUEUE_LIMIT_BYTES // 2:
            self._resume_reading()
        return taken

    @property
    def idle_lsn(self) -> Lsn:
        """The server has sent everything up to here and nothing is waiting; 0 while something is."""
        return Lsn(0) if self._queue or self._begin is not None else self._idle_lsn

    def confirm(self, flushed: Lsn) -> None:
        """Everything that committed before `flushed` is durable on the target; the source may forget it."""
        if flushed > self._confirmed:
            self._confirmed = flushed
            self._send_status()

    async def close(self) -> None:
        """Leave the slot; what was taken but not confirmed comes again at the next start."""
        conn, self._conn = self._conn, None
        if conn is None:
            return
        self._pause_reading()
        self._input.unregister(self._socket)
        if self._heartbeat is not None:
            self._heartbeat.cancel()
        conn.finish()

    async def _release_slot(self, after: Lsn) -> Lsn:
        """Ends the backend that still holds the slot: an earlier connection of ours, or a dead owner's.

        Returns up to where the slot is confirmed."""
        async with self._database.connect("slot") as conn:
            deadline = self._loop.time() + 10
            while True:
                row = await (await conn.execute(_SLOT_STATE, (self._slot,))).fetchone()
                if row is None or row[2] == "lost":
                    raise SlotLost(f"slot {self._slot} is gone", hint=_SLOT_HINT)
                if (confirmed := Lsn.parse(row[1])) > after:
                    raise SlotLost(f"slot {self._slot} is at {row[1]}, ahead of the stored progress {after}")
                if row[0] is None:
                    return confirmed
                if self._loop.time() > deadline:
                    raise Unreachable(f"slot {self._slot} is held by backend {row[0]}")
                await conn.execute("SELECT pg_terminate_backend(%s)", (row[0],))
                await asyncio.sleep(0.01)

    async def _connect(self) -> pq.abc.PGconn:
        params = self._database.conninfo("stream", wal_sender_timeout=WAL_SENDER_TIMEOUT)
        conninfo = make_conninfo(**{**params, "replication": "database"})
        conn = psycopg.pq.PGconn.connect_start(conninfo.encode())
        while True:
            status = conn.connect_poll()
            if status == pq.PollingStatus.OK:
                break
            if status == pq.PollingStatus.FAILED:
                raise Unreachable(f"{self._database.label}: no replication connection")
            await self._ready(conn, write=status == pq.PollingStatus.WRITING)
        conn.nonblocking = 1
        conn.notice_handler = self._on_notice
        return conn

    async def _ready(self, conn: pq.abc.PGconn, *, write: bool = False) -> None:
        """Until the socket is readable (or writable)."""
        ready: asyncio.Future[None] = self._loop.create_future()
        add, remove = (
            (self._loop.add_writer, self._loop.remove_writer)
            if write
            else (self._loop.add_reader, self._loop.remove_reader)
        )

        def announce() -> None:
            if not ready.done():
                ready.set_result(None)

        add(conn.socket, announce)
        try:
            async with asyncio.timeout(30):
                await ready
        except TimeoutError:
            raise Unreachable(f"{self._database.label}: the replication connection does not answer") from None
        finally:
            remove(conn.socket)

    async def _send_query(self, conn: pq.abc.PGconn, command: bytes) -> None:
        try:
            conn.send_query(command)
            while conn.flush():
                await self._ready(conn, write=True)
            while conn.is_busy():
                await self._ready(conn)
                conn.consume_input()
            result = conn.get_result()
        except psycopg.Error as error:
            raise self._broken() from error
        if result is None or result.status != pq.ExecStatus.COPY_BOTH:
            raise self._refusal(result)

    def _refusal(self, result: pq.abc.PGresult | None) -> MoverError:
        """Why the server does not stream any longer."""
        if result is None or result.status != pq.ExecStatus.FATAL_ERROR:
            return Unreachable(f"{self._database.label}: the source ended the change stream")
        error = error_from_result(result)
        if error.sqlstate in _SLOT_LOST:
            return SlotLost(f"slot {self._slot} cannot be read (SQLSTATE {error.sqlstate})", hint=_SLOT_HINT)
        return translated(error, self._database.label)

    def _on_notice(self, notice: pq.abc.PGresult) -> None:
        """From PostgreSQL 18 a publication that is gone ends nothing: its changes are left out."""
        if notice.error_field(pq.DiagnosticField.SQLSTATE) == b"55000":
            self._fail(SlotLost(f"the source skips publication {self._publication}", hint=_SLOT_HINT))

    def _broken(self) -> Unreachable:
        return Unreachable(f"{self._database.label}: the replication connection broke")

    def _resume_reading(self) -> None:
        self._reading = True
        self._loop.add_reader(self._socket, self._on_readable)
        # libpq may already hold input that the socket will not announce again.
        self._turn = self._loop.call_soon(self._read)

    def _pause_reading(self) -> None:
        self._reading = False
        self._loop.remove_reader(self._socket)
        if self._turn is not None:
            self._turn.cancel()
            self._turn = None

    def _on_readable(self) -> None:
        if self._turn is None:  # otherwise still decoding: libpq's buffer must not grow meanwhile
            self._read()

    def _read(self) -> None:
        """Decode what has arrived, at most one turn's worth.

        Ends early only when the socket has neither input nor an error: the event loop may announce an
        error once and never again."""
        self._turn = None
        try:
            for _ in range(MESSAGES_PER_TURN):
                if self._conn is None or not self._reading:
                    return
                length, data = self._conn.get_copy_data(1)
                if length > 0:
                    self._frame(data)
                elif length < 0:
                    raise self._refusal(self._conn.get_result())
                elif self._input.poll(0):
                    self._conn.consume_input()
                else:
                    return
            self._turn = self._loop.call_soon(self._read)
        except psycopg.Error:
            self._fail(self._broken())
        except ProtocolViolation as error:
            self._fail(ServerError(f"{self._database.label}: the change stream is malformed: {error}"))
        except Exception as error:  # a callback has no caller: whoever waits must hear of it
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        self._error = error
        self._pause_reading()
        self._arrived.set()

    def _frame(self, frame: memoryview) -> None:
        if frame[0] == _KEEPALIVE:
            keepalive = parse_keepalive(bytes(frame))
            self._idle_lsn = max(self._idle_lsn, keepalive.wal_end)
            if keepalive.reply_requested:
                self._send_status()
            return
        change = self._decoder.decode(bytes(frame[HEADER_BYTES:]))
        match change:
            case Insert(relation) | Update(relation) | Delete(relation):
                self._changes.append(change)
                self._open_bytes += len(frame) + CHANGE_BYTES + VALUE_BYTES * len(relation.columns)
                if self._open_bytes >= PIECE_BYTES:
                    self._close_piece(None)
            case Begin():
                self._begin = change
                self._open_bytes = CHANGE_BYTES
            case Commit(_, end_lsn):
                self._close_piece(end_lsn)
                self._begin = None
            case Message():
                self._message(change, len(frame))
            case Relation() | None:
                pass

    def _message(self, message: Message, size_bytes: int) -> None:
        if not message.transactional:  # ours all are; it stands outside any transaction
            return
        known = len(self._changes)
        if message.prefix == MARK_PREFIX and (mark := parse_mark(message.content)):
            if self._open_bytes >= PIECE_BYTES:  # before it: the transaction of one of ours is one piece
                self._close_piece(None)
            self._marks.append(mark)
            self._open_bytes += size_bytes + MESSAGE_BYTES
        elif message.prefix == TRUNCATE_PREFIX and (truncated := parse_truncated(message.content)):
            self._changes.append(truncated)
        elif message.prefix in OWNER_PREFIXES and (
            owner_change := parse_owner_change(message.prefix, message.content)
        ):
            self._changes.append(owner_change)
        if len(self._changes) > known:
            self._open_bytes += size_bytes + MESSAGE_BYTES
            if self._open_bytes >= PIECE_BYTES:
                self._close_piece(None)

    def _close_piece(self, end_lsn: Lsn | None) -> None:
        if self._begin is None:
            raise ProtocolViolation("a change outside a transaction")
        piece = Piece(
            self._begin.xid,
            self._begin.final_lsn,
            self._changes,
            self._open_bytes,
            tuple(self._marks),
            end_lsn,
        )
        self._changes, self._marks, self._open_bytes = [], [], 0
        self._queue.append(piece)
        self._queued_bytes += piece.size_bytes
        self._arrived.set()
        if self._queued_bytes >= QUEUE_LIMIT_BYTES and self._conn is not None:
            self._pause_reading()

    def _beat(self) -> None:
        """wal_sender_timeout counts from our last answer, also while we do not read."""
        self._send_status()
        self._heartbeat = self._loop.call_later(STATUS_INTERVAL_S, self._beat)

    def _send_status(self) -> None:
        if self._conn is None or self._error is not None:
            return
        try:
            self._conn.put_copy_data(status_update(self._confirmed, time.time_ns() // 1000))
            self._conn.flush()
        except psycopg.Error:
            self._fail(self._broken())


_KEEPALIVE = ord("k")
# The slot or the publication is gone, the slot was invalidated, its WAL was removed.
_SLOT_LOST = {"42704", "55000", "58P01"}
_SLOT_STATE = (
    "SELECT active_pid, confirmed_flush_lsn::text, wal_status FROM pg_replication_slots WHERE slot_name = %s"
)
_SLOT_HINT = "Raise max_slot_wal_keep_size on the source, then start the migration again."
