"""What holds at any moment of any migration, seen by queries of its own: on the platform every change of a
migration's record is written down as it is committed; on both sides the fences and the owners' epochs are
looked at again and again.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from uuid import UUID

import psycopg
from psycopg.rows import class_row

from mover.core.ids import TenantId
from mover.core.states import STATUS_NEXT, Status

# Written in the transaction that makes the change, so that none is missed, and with the route as it is there.
WRITE_DOWN = """
create schema if not exists witness;
create table if not exists witness.record (
    id bigint generated always as identity, migration uuid, status_before text, status text,
    epoch_before bigint, epoch bigint, switched_before timestamptz, switched_at timestamptz,
    returned_before timestamptz, returned_at timestamptz, source text, target text, route text);
create or replace function witness.write_down() returns trigger language plpgsql security definer as $$
begin
    insert into witness.record (migration, status_before, status, epoch_before, epoch, switched_before,
                                switched_at, returned_before, returned_at, source, target, route)
    select new.id, old.status, new.status, old.epoch, new.epoch, old.switched_at, new.switched_at,
           old.rolled_back_at, new.rolled_back_at, new.source_vertical, new.target_vertical, o.vertical
      from auth.organizations o where o.id = new.tenant_id;
    return null;
end $$;
create or replace trigger witness after update on platform.tenant_migrations for each row
  when ((old.status, old.epoch, old.switched_at, old.rolled_back_at)
        is distinct from (new.status, new.epoch, new.switched_at, new.rolled_back_at))
  execute function witness.write_down();
"""
RECORD = "select * from witness.record where id > %s order by id"
MIGRATION = """
select m.id, m.status, m.phase, m.epoch, m.switched_at is not null as switched,
       m.rolled_back_at is not null as returned
  from platform.tenant_migrations m where m.id = %s
"""
FENCE = """
select state, epoch, pg_sequence_last_value(format('mover.state_%%s', name)::regclass) = 1 as lets_pass
  from mover.fence where tenant = %s and vertical = %s
"""
OWNERS = "select migration, epoch from mover.owner"
# Nothing of the mover's is there, or it is just going.
ABSENT = (psycopg.errors.UndefinedTable, psycopg.errors.InvalidSchemaName, psycopg.errors.UndefinedObject)
OPTIONS = "-c statement_timeout=2s -c lock_timeout=1s"
HISTORY = 20


class Violated(AssertionError):
    """A promise is broken."""


class Change(NamedTuple):
    """One line of the record."""

    id: int
    migration: UUID
    status_before: str
    status: str
    epoch_before: int
    epoch: int
    switched_before: object
    switched_at: object
    returned_before: object
    returned_at: object
    source: str
    target: str
    route: str

    @property
    def served_at(self) -> str:
        """By what the record says."""
        is_away = self.switched_at is not None and self.returned_at is None
        return self.target if is_away else self.source

    def wrongs(self) -> Iterator[str]:
        before, now = Status(self.status_before), Status(self.status)
        if now is not before and now not in STATUS_NEXT[before]:
            yield f"{before} became {now}"
        if self.epoch < self.epoch_before:
            yield "the epoch fell"
        if self.switched_before not in (None, self.switched_at):
            yield "it was switched twice"
        if self.returned_before not in (None, self.returned_at):
            yield "it came back twice"
        if self.route != self.served_at:
            yield f"the route is {self.route}, and not {self.served_at}"


@dataclass(frozen=True)
class Seen:
    """A migration's record at one moment."""

    id: UUID
    status: str
    phase: str | None
    epoch: int
    switched: bool
    returned: bool

    @property
    def is_away(self) -> bool:
        return self.switched and not self.returned


@dataclass(frozen=True)
class Fence:
    """One side at one moment; where there is none, nothing is held back."""

    state: str = "absent"
    epoch: int = 0
    lets_pass: bool | None = None


@dataclass(frozen=True)
class Look:
    """The record before and after both sides were looked at: what was true of it both times was true
    meanwhile, since neither a switch nor a return is ever taken back."""

    before: Seen
    source: Fence
    target: Fence
    after: Seen

    def wrongs(self) -> Iterator[str]:
        always_away = self.before.is_away and self.after.is_away
        if self.target.lets_pass and not self.after.switched:
            yield "the target is open before it was decided for"
        if self.target.lets_pass and self.before.returned:
            yield "the target is open behind the return"
        if self.source.lets_pass and always_away:
            yield "the source is open behind the switch"
        if self.source.state == "absent" and always_away and self.after.status != "completed":
            yield "the source has no fence behind the switch"


@dataclass
class Witness:
    """Of one migration after the other of a tenant; `look` may be called from any thread."""

    platform: str  # URLs as superuser
    tenant: TenantId
    looks: int = 0
    missed: int = 0  # a server was away, or a lock did not come in time
    changes: int = 0
    history: list[str] = field(default_factory=list)
    _epochs: dict[tuple[str, str, UUID], int] = field(default_factory=dict)
    _last: int = 0
    _connections: dict[str, psycopg.Connection[Any]] = field(default_factory=dict)
    _alone: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        with psycopg.connect(self.platform, autocommit=True) as conn:
            conn.execute(WRITE_DOWN)

    def look(self, migration: str, source: tuple[str, str], target: tuple[str, str]) -> None:
        """Raises Violated; `source` and `target` are (URL, vertical). A server that is away is seen later."""
        with self._alone:
            try:
                self._read_record()
                self._look(migration, source, target)
            except psycopg.OperationalError:
                self.missed += 1

    def look_at_rest(self, *sides: tuple[str, str]) -> None:
        """Nobody changes anything now: what the guards go by is what the fence's row says."""
        for url, vertical in sides:
            with self._alone, closing(psycopg.connect(url, options=OPTIONS)) as conn:
                fence = self._fence_on(conn, vertical)
                if fence.lets_pass is not None and fence.lets_pass != (fence.state == "open"):
                    raise self._violated(f"the guards at {vertical} do not go by their row", fence)

    def close(self) -> None:
        for conn in self._connections.values():
            conn.close()

    def _read_record(self) -> None:
        cursor = self._connection(self.platform).cursor(row_factory=class_row(Change))
        for change in cursor.execute(RECORD, (self._last,)).fetchall():
            self._last = change.id
            self.changes += 1
            self._judge(change)

    def _look(self, migration: str, source: tuple[str, str], target: tuple[str, str]) -> None:
        before = self._seen(migration)
        look = Look(before, self._fence(*source), self._fence(*target), self._seen(migration))
        if look.source.lets_pass and look.target.lets_pass:
            # One may have been closed before the other was opened: then this is not seen with both held.
            look = self._look_at_both(migration, source, target)
            if look.source.lets_pass and look.target.lets_pass:
                raise self._violated("both sides are open", look)
        self.looks += 1
        self._judge(look)
        for url, vertical in (source, target):
            self._check_epochs(url, vertical, look.after)

    def _look_at_both(self, migration: str, source: tuple[str, str], target: tuple[str, str]) -> Look:
        """While neither can change: a change of the state waits for our locks."""
        before = self._seen(migration)
        with self._held(source) as on_source, self._held(target) as on_target:
            return Look(before, on_source, on_target, self._seen(migration))

    @contextmanager
    def _held(self, side: tuple[str, str]) -> Iterator[Fence]:
        url, vertical = side
        with closing(psycopg.connect(url, options=OPTIONS, connect_timeout=2)) as conn:
            yield self._fence_on(conn, vertical, " for share")

    def _judge(self, found: Change | Look) -> None:
        self.history = [*self.history[-HISTORY:], str(found)]
        for wrong in found.wrongs():
            raise self._violated(wrong, found)

    def _violated(self, wrong: str, found: object) -> Violated:
        return Violated("\n".join([wrong, str(found), "seen before:", *self.history]))

    def _check_epochs(self, url: str, vertical: str, after: Seen) -> None:
        """They only rise, and none is ahead of the claim that it comes from."""
        try:
            owners = self._connection(url).execute(OWNERS).fetchall()
        except ABSENT:
            return
        for migration, epoch in owners:
            key = (url, vertical, migration)
            if epoch < self._epochs.get(key, 0):
                raise self._violated(f"the owner's epoch fell to {epoch} at {vertical}", self._epochs[key])
            if migration == after.id and epoch > self._seen(str(migration)).epoch:
                raise self._violated(f"epoch {epoch} at {vertical} was never claimed", after)
            self._epochs[key] = epoch

    def _seen(self, migration: str) -> Seen:
        cursor = self._connection(self.platform).cursor(row_factory=class_row(Seen))
        found = cursor.execute(MIGRATION, (migration,)).fetchone()
        assert found is not None, "the migration is gone"
        return found

    def _fence(self, url: str, vertical: str) -> Fence:
        return self._fence_on(self._connection(url), vertical)

    def _fence_on(self, conn: psycopg.Connection[Any], vertical: str, lock: str = "") -> Fence:
        try:
            cursor = conn.cursor(row_factory=class_row(Fence))
            return cursor.execute(FENCE + lock, (self.tenant, vertical)).fetchone() or Fence()
        except ABSENT:
            conn.rollback()
            return Fence()
        except psycopg.errors.InternalError_ as error:
            # A sequence that was found by name and dropped before it was read has no better error.
            if "could not open relation with OID" not in str(error):
                raise
            conn.rollback()
            return Fence()

    def _connection(self, url: str) -> psycopg.Connection[Any]:
        """One that stays open, or a new one where it broke."""
        conn = self._connections.get(url)
        if conn is None or conn.closed:
            conn = psycopg.connect(
                url, autocommit=True, options=OPTIONS, connect_timeout=2, prepare_threshold=None
            )
            self._connections[url] = conn
        return conn
