"""What the demo's writers do: transactions of an application on its tenants' rows, each with the
writes that the ledger will expect. Knows nothing of routes that change, pacing or time.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from itertools import accumulate
from typing import LiteralString
from uuid import UUID

from psycopg import IsolationLevel, sql

from mover.core.ids import TenantId
from mover.demo.ledger import Counted, Key, Ledger, Write
from mover.demo.places import Session
from mover.demo.schema import identifiers

LARGE_TEXT_PARTS = 300  # of 32 characters: some 10 kB, kept outside of the row

QUERIES: Mapping[str, LiteralString] = {
    "insert_activity": """
        insert into {crm}.activities (tenant_id, contact_id, write_id, kind, payload)
        values (%(tenant)s, %(contact)s, %(write)s, 'call', jsonb_build_object('minutes', %(number)s::int))
        returning id""",
    "delete_activity": "delete from {crm}.activities where tenant_id = %(tenant)s and id = %(id)s",
    "touch_contact": """
        update {crm}.contacts set touches = touches + 1, balance = balance + 1.01
         where tenant_id = %(tenant)s and id = %(contact)s""",
    "read_contact": """
        select touches, full_name, phones from {crm}.contacts
         where tenant_id = %(tenant)s and id = %(contact)s""",
    "revise_document": """
        update {dms}.documents set revision = revision + 1, labels = array['revised', %(number)s::text]
         where tenant_id = %(tenant)s and id = %(document)s""",
    "rewrite_document": """
        update {dms}.documents set revision = revision + 1, body = %(body)s
         where tenant_id = %(tenant)s and id = %(document)s""",
    "insert_invoice": """
        insert into {crm}.invoices (tenant_id, contact_id, reference)
        values (%(tenant)s, %(contact)s, %(write)s) returning id""",
    "insert_lines": """
        insert into {crm}.invoice_lines (invoice_id, line, tenant_id, item, quantity, unit_price)
        values (%(id)s, 1, %(tenant)s, 'Consulting', 2, 95.50),
               (%(id)s, 2, %(tenant)s, 'Travel', 1, %(number)s::int + 0.10)""",
    "delete_invoice": "delete from {crm}.invoices where tenant_id = %(tenant)s and id = %(id)s",
    "insert_document": """
        insert into {dms}.documents (id, tenant_id, folder_id, title, metadata, body)
        values (%(write)s, %(tenant)s, %(folder)s, 'Letter', jsonb_build_object('writer', true), %(body)s)""",
    "insert_version": """
        insert into {dms}.document_versions (document_id, version, tenant_id, content, checksum)
        values (%(write)s, 1, %(tenant)s, %(content)s, 'none')""",
    "hot_contacts": """
        select id, touches from {crm}.contacts where tenant_id = %(tenant)s order by id limit %(limit)s""",
    "hot_documents": """
        select id, revision from {dms}.documents where tenant_id = %(tenant)s
         order by length(body) desc nulls last, id limit %(limit)s""",
    "folders": "select id from {dms}.folders where tenant_id = %(tenant)s order by id limit %(limit)s",
}
ISOLATION = (None, IsolationLevel.REPEATABLE_READ, IsolationLevel.SERIALIZABLE)  # None: the server's


@cache
def query(name: str, vertical: str) -> bytes:
    """A query for the schemas of a vertical."""
    return sql.SQL(QUERIES[name]).format(**identifiers(vertical)).as_bytes(None)


class RowMissing(Exception):
    """A row that the database had acknowledged is not there."""


async def _returning(session: Session, name: str, parameters: Mapping[str, object]) -> int:
    """The first column of the only row."""
    cursor = await session.conn.execute(query(name, session.route.vertical), parameters)
    row = await cursor.fetchone()
    if row is None:
        raise RowMissing(name)
    value: int = row[0]
    return value


async def _affecting(session: Session, name: str, parameters: Mapping[str, object]) -> int:
    """How many rows; raises when there are none."""
    cursor = await session.conn.execute(query(name, session.route.vertical), parameters)
    if not cursor.rowcount:
        raise RowMissing(name)
    return cursor.rowcount


@dataclass(frozen=True, slots=True)
class Job:
    """One transaction: `work` may run more than once, `committed` runs once and only afterwards."""

    name: str
    work: Callable[[Session], Awaitable[int]]
    writes: tuple[Write, ...] = ()
    committed: Callable[[int], None] = lambda _: None  # gets what `work` returned


@dataclass(frozen=True, slots=True)
class HotRows:
    """Rows that one client updates, and nobody else."""

    contacts: tuple[int, ...]
    documents: tuple[UUID, ...]
    folders: tuple[int, ...]


async def find_hot_rows(
    session: Session, tenant: TenantId, ledger: Ledger, clients: int, rows: int
) -> list[HotRows]:
    """Each client's share of some of the tenant's rows; tells the ledger what their counters are."""
    found = {}
    for name in ("hot_contacts", "hot_documents", "folders"):
        parameters = {"tenant": tenant, "limit": rows}
        cursor = await session.conn.execute(query(name, session.route.vertical), parameters)
        found[name] = await cursor.fetchall()
    for id_, touches in found["hot_contacts"]:
        ledger.begin(Key(tenant, Counted.CONTACT_TOUCHES, str(id_)), touches)
    for id_, revision in found["hot_documents"]:
        ledger.begin(Key(tenant, Counted.DOCUMENT_REVISION, str(id_)), revision)
    contacts, documents, folders = ([row[0] for row in rows] for rows in found.values())
    return [
        HotRows(tuple(contacts[i::clients]), tuple(documents[i::clients]), tuple(folders))
        for i in range(clients)
    ]


@dataclass
class Jobs:
    """A client's endless, reproducible sequence of transactions on one tenant."""

    tenant: TenantId
    rows: HotRows
    rng: random.Random
    stale_reads: int = 0  # a client did not see what it had itself been told was committed
    _activities: list[tuple[UUID, int]] = field(default_factory=list)
    _invoices: list[tuple[UUID, int]] = field(default_factory=list)
    _touches: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        mix: list[tuple[int, Callable[[], Job]]] = [
            (40, self._add_activity),
            (12, self._touch_contact),
            (12, self._revise_document),
            (2, self._rewrite_document),
            (9, self._add_invoice),
            (8, self._remove_activity),
            (2, self._remove_invoice),
            (2, self._file_document),
            (13, self._read_contact),
        ]
        self._makers = [maker for _, maker in mix]
        self._weights = list(accumulate(weight for weight, _ in mix))

    def next(self) -> Job:
        (maker,) = self.rng.choices(self._makers, cum_weights=self._weights)
        return maker()

    def _add_activity(self) -> Job:
        write = self._uuid()
        parameters = {
            "tenant": self.tenant,
            "contact": self._contact(),
            "write": write,
            "number": self._number(),
        }

        async def work(session: Session) -> int:
            return await _returning(session, "insert_activity", parameters)

        return Job(
            "add activity",
            work,
            (self._write(Counted.ACTIVITY, write),),
            lambda id_: self._activities.append((write, id_)),
        )

    def _remove_activity(self) -> Job:
        if not self._activities:
            return self._add_activity()
        write, id_ = self._activities.pop(self.rng.randrange(len(self._activities)))

        async def work(session: Session) -> int:
            return await _affecting(session, "delete_activity", {"tenant": self.tenant, "id": id_})

        return Job("remove activity", work, (self._write(Counted.ACTIVITY, write, -1),))

    def _touch_contact(self) -> Job:
        contact = self._contact()

        async def work(session: Session) -> int:
            return await _affecting(session, "touch_contact", {"tenant": self.tenant, "contact": contact})

        def committed(_: int) -> None:
            self._touches[contact] = self._touches.get(contact, 0) + 1

        return Job("touch contact", work, (self._write(Counted.CONTACT_TOUCHES, contact),), committed)

    def _read_contact(self) -> Job:
        contact = self._contact()

        async def work(session: Session) -> int:
            return await _returning(session, "read_contact", {"tenant": self.tenant, "contact": contact})

        def committed(touches: int) -> None:
            self.stale_reads += touches < self._touches.get(contact, 0)

        return Job("read contact", work, committed=committed)

    def _revise_document(self) -> Job:
        """The large text is not touched, and so not in the change stream either."""
        return self._update_document("revise_document", {"number": self._number()})

    def _rewrite_document(self) -> Job:
        return self._update_document("rewrite_document", {"body": self._large_text()})

    def _update_document(self, name: str, values: Mapping[str, object]) -> Job:
        document = self.rng.choice(self.rows.documents)
        parameters = {"tenant": self.tenant, "document": document, **values}

        async def work(session: Session) -> int:
            return await _affecting(session, name, parameters)

        return Job(name.replace("_", " "), work, (self._write(Counted.DOCUMENT_REVISION, document),))

    def _add_invoice(self) -> Job:
        write, isolation = self._uuid(), self.rng.choice(ISOLATION)
        parameters = {
            "tenant": self.tenant,
            "contact": self._contact(),
            "write": write,
            "number": self._number(),
        }

        async def work(session: Session) -> int:
            await session.conn.set_isolation_level(isolation)
            async with session.conn.transaction():
                id_ = await _returning(session, "insert_invoice", parameters)
                await _affecting(session, "insert_lines", {**parameters, "id": id_})
                await _affecting(session, "insert_activity", parameters)
            return id_

        writes = (
            self._write(Counted.INVOICE, write),
            self._write(Counted.INVOICE_LINE, write, 2),
            self._write(Counted.ACTIVITY, write),
        )
        return Job("add invoice", work, writes, lambda id_: self._invoices.append((write, id_)))

    def _remove_invoice(self) -> Job:
        if not self._invoices:
            return self._add_invoice()
        write, id_ = self._invoices.pop(self.rng.randrange(len(self._invoices)))

        async def work(session: Session) -> int:
            return await _affecting(session, "delete_invoice", {"tenant": self.tenant, "id": id_})

        writes = (self._write(Counted.INVOICE, write, -1), self._write(Counted.INVOICE_LINE, write, -2))
        return Job("remove invoice", work, writes)

    def _file_document(self) -> Job:
        write, isolation = self._uuid(), self.rng.choice(ISOLATION)
        parameters = {
            "tenant": self.tenant,
            "write": write,
            "folder": self.rng.choice(self.rows.folders),
            "body": self._large_text(),
            "content": self.rng.randbytes(200),
        }

        async def work(session: Session) -> int:
            await session.conn.set_isolation_level(isolation)
            async with session.conn.transaction():
                await _affecting(session, "insert_document", parameters)
                return await _affecting(session, "insert_version", parameters)

        return Job("file document", work, (self._write(Counted.DOCUMENT, write),))

    def _write(self, counted: Counted, id_: object, change: int = 1) -> Write:
        return Write(Key(self.tenant, counted, str(id_)), change)

    def _contact(self) -> int:
        return self.rng.choice(self.rows.contacts)

    def _number(self) -> int:
        return self.rng.randrange(1000)

    def _uuid(self) -> UUID:
        return UUID(int=self.rng.getrandbits(128), version=4)

    def _large_text(self) -> str:
        return self.rng.randbytes(16 * LARGE_TEXT_PARTS).hex()
