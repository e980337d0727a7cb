"""One migration's two databases: implements engine.site.Site by calling the module that knows each thing."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace

from mover.core.alignment import (
    Difference,
    check_keys,
    check_return,
    judge_differences,
    operator_needed,
)
from mover.core.crash import reach
from mover.core.errors import DanglingReferences, NotReady, PlanOutdated, TableUnfit, Unreachable, Where
from mover.core.facts import Facts, ForeignKey, Tenancy
from mover.core.ids import Capture, Side, TableRef, TenantId
from mover.core.migration import Place
from mover.core.ownership import holdings_in
from mover.core.tables import Holding, MovedTable, Plan, Shape
from mover.engine.preflight import judge, judge_again, judge_back, judge_references
from mover.engine.site import Aligned, Kept, Link, Say, Stream
from mover.postgres import (
    agent,
    align,
    capture,
    catalog,
    clone,
    identity,
    publication,
    pulse,
    remarks,
    timeline,
)
from mover.postgres.align import Look
from mover.postgres.bulk import BulkCopier
from mover.postgres.change_log import PgChangeLog
from mover.postgres.connect import Database, Identity
from mover.postgres.digests import open_readers
from mover.postgres.facts import gather, gather_references
from mover.postgres.fence import PgFence
from mover.postgres.identity import IdentityNeed
from mover.postgres.points import Points
from mover.postgres.removal import holds_rows, remove_rows
from mover.postgres.replication import WalStream
from mover.postgres.sequences import PgSequences
from mover.postgres.writer import Writer

# Connections of a side that are open beside the copy workers': stream, marks, snapshot holder, two
# readers, the fence's holder, and one for whatever is asked in between. The pulse takes one that copy workers
# have left when the fence's holder comes.
BESIDE_WORKERS = 7
# Of a side, worth keeping open between two questions: one for the algorithm, one for the slot's watch.
KEPT_CONNECTIONS = 2


@dataclass
class PgSite:
    """`budget_s` bounds how long a frozen daemon can hold the tenant's writers; up to `kept` connections of
    each side stay open between two questions, until `rest`. `capture`: how an operator wants changes to be
    followed, if he says so."""

    tenant: TenantId
    identity: Identity
    source_place: Place
    target_place: Place
    tenancy: Tenancy
    workers: int
    connections: int
    budget_s: float
    kept: int = 0
    capture: Capture | None = None
    source: Database = field(init=False)
    target: Database = field(init=False)
    source_fence: PgFence = field(init=False)
    target_fence: PgFence = field(init=False)
    _cloned: clone.ClonedDdl | None = None  # the same for every wave

    def __post_init__(self) -> None:
        self.source = self._database(self.source_place, "source")
        self.target = self._database(self.target_place, "target")
        self.source_fence = self._fence(self.source, self.source_place, self.identity)
        # What is written down there is for the way back.
        self.target_fence = self._fence(self.target, self.target_place, replace(self.identity, is_back=True))

    def _database(self, place: Place, label: str) -> Database:
        return Database(place.url, label, self.identity, self.connections, self.kept)

    def _fence(self, database: Database, place: Place, identity: Identity) -> PgFence:
        return PgFence(database, self.tenant, place.vertical, identity, self.budget_s)

    def back(self) -> PgSite:
        back = replace(
            self,
            identity=replace(self.identity, is_back=True),
            source_place=self.target_place,
            target_place=self.source_place,
        )
        back.source, back.target = self.target, self.source
        back.source_fence, back.target_fence = self.target_fence, self.source_fence
        return back

    def rest(self) -> None:
        self.source.end_idle()
        self.target.end_idle()

    async def preflight(self) -> Plan:
        try:
            facts = await gather(
                self.source,
                self.target,
                self.source_place,
                self.target_place,
                self.tenancy,
                self.tenant,
                self.capture,
            )
        except Unreachable as error:
            raise NotReady(error.message, error.where, error.hint) from error
        return judge(facts)

    async def provision(self) -> None:
        async with self.target.borrow("provision") as conn:
            await conn.execute("SELECT 1")

    async def watch_pulse(self, say: Callable[[str | None], None]) -> None:
        troubles: dict[str, str | None] = {}

        def note(label: str, trouble: str | None) -> None:
            troubles[label] = trouble
            say(next(filter(None, troubles.values()), None))

        async with asyncio.TaskGroup() as tasks:
            for database in (self.source, self.target):
                tasks.create_task(pulse.watch_pulse(database, functools.partial(note, database.label)))

    async def target_answers(self) -> bool:
        try:
            async with self.target.connect("probe"):
                return True
        except Unreachable:
            return False

    async def server_identities(self) -> Mapping[str, str]:
        sides = ((Side.SOURCE, self.source), (Side.TARGET, self.target))
        return {side.value: await timeline.identity(database) for side, database in sides}

    async def has_all_that_was_applied(self, known: str) -> bool:
        has = await timeline.left_at(self.source, known)
        applied = await publication.applied(self.target, self.identity)
        return has is not None and applied <= has

    async def own_source(self) -> None:
        await agent.install(self.source, self.identity)
        reach("owned.source")

    async def own_target(self) -> None:
        await agent.install(self.target, self.identity)
        reach("owned.target")

    async def take_over(self) -> None:
        await self.own_source()
        await self.own_target()

    async def clone_schemas(self, shape: Shape) -> None:
        if shape.fresh:
            self._cloned = await self._ddl(shape)
            await clone.apply_pre(self.target, self._cloned, self.identity.migration)

    async def schema_stamp(self) -> str:
        async with self.source.borrow("compare") as conn:
            return await align.read_stamp(conn, self.source_place.schemas, self.tenancy.column)

    async def align(self, shape: Shape, say: Say, *, is_built: bool) -> Aligned:
        look = await self._look(shape)
        while changes := self._to_follow(look, shape, is_built=is_built):
            await align.follow(self.target, self.identity, changes, say)
            look = await self._look(shape)
        return Aligned(self._planned_again(look, shape), look.stamp, look.unfilled, look.storage)

    async def check_schemas(self, shape: Shape) -> None:
        look = await self._look(shape)
        if self._to_follow(look, shape, is_built=True) or self._planned_again(look, shape) != shape:
            raise PlanOutdated("the source's schemas have changed since the migration was planned")

    async def plan_back(self, shape: Shape, capture: Capture | None) -> Plan:
        back = self.back()
        schemas = {there: here for here, there in shape.schemas.items()}
        look = await align.look(back.source, back.target, schemas, self.tenancy, self.tenant)
        check_return(look.differences, self.tenant)
        return judge_back(replace(look.facts, capture=self.capture), shape, capture)

    async def check_references(self, shape: Shape, say: Say) -> None:
        facts = (await self._look(shape)).facts
        await self._judge_references(await gather_references(self.source, facts), say)

    async def check_others_references(self, shape: Shape, say: Say) -> None:
        facts = (await self._look(shape)).facts
        found = await gather_references(self.source, facts, of_tenant=False)
        await self._judge_references(found, say)

    async def _judge_references(self, facts: Facts, say: Say) -> None:
        for finding in judge_references(facts):
            if not finding.warning:
                where = Where(self.tenant, finding.table)
                raise DanglingReferences(finding.message, where=where, hint=finding.hint)
            await say(finding.message)

    async def _look(self, shape: Shape) -> Look:
        return await align.look(self.source, self.target, shape.schemas, self.tenancy, self.tenant)

    def _to_follow(self, look: Look, shape: Shape, *, is_built: bool) -> tuple[Difference, ...]:
        """Raises SchemaChanged where the target cannot follow by itself."""
        verdict = judge_differences(look.differences, shape, look.unfilled, is_built=is_built)
        if verdict.stop:
            raise operator_needed(verdict.stop, shape, self.tenant)
        return verdict.follow

    def _planned_again(self, look: Look, shape: Shape) -> Shape:
        """Raises SchemaChanged where a migration that has begun cannot go on so, TableUnfit where a table
        is why."""
        now, refusals = judge_again(look.facts, shape)
        for refusal in refusals:
            relation = look.facts.source.relation(refusal.table) if refusal.table else None
            table = (relation and relation.root) or refusal.table
            raise TableUnfit(refusal.message, where=Where(self.tenant, table), hint=refusal.hint)
        check_keys(shape, now, self.tenant)
        return now

    async def carry_remarks(self, shape: Shape, say: Say) -> None:
        if shape.fresh:
            await remarks.carry(self.source, self.target, self.identity, shape.schemas, say)

    async def forget_copies(self, shape: Shape, tables: Collection[TableRef], say: Say) -> None:
        there = [h for h in await self._held_on_target(shape) if self._on_source(h.table) in tables]
        await self._remove_target_rows(shape, there, say)
        await align.forget_chunks(self.target, self.identity, tables)

    async def build_keys(self, shape: Shape, tables: Sequence[MovedTable]) -> None:
        if shape.fresh and tables:
            self._cloned = self._cloned or await self._ddl(shape)
            await clone.build_keys(self.target, self._cloned, {t.target for t in tables})

    async def build_rest(self, shape: Shape) -> None:
        if shape.fresh:
            ddl = await self._ddl(shape)
            await clone.build_keys(self.target, ddl, set(ddl.keys))
            await clone.build_rest(self.target, ddl, workers=self.workers)

    async def identify_rows(self, shape: Shape, say: Say) -> None:
        if shape.capture is Capture.TRIGGER:
            return  # the triggers know what they write down
        needs = [IdentityNeed(t.source, t.identity, t.key) for t in shape.tables]
        await identity.ensure_identities(self.source, self.identity.stream, needs, say)

    async def guard(self, shape: Shape, say: Say) -> None:
        await self.target_fence.install(_holdings(shape, Side.TARGET), "closed", say)
        reach("guards.target")
        captures = shape.capture is Capture.TRIGGER
        await self.source_fence.install(_holdings(shape, Side.SOURCE), "open", say, captures=captures)
        reach("guards.source")

    async def guard_departure(self, shape: Shape, say: Say) -> None:
        captures = shape.capture is Capture.TRIGGER
        await self.source_fence.install(_holdings(shape, Side.SOURCE), "closed", say, captures=captures)

    async def reserve_sequences(self, shape: Shape) -> None:
        async with self.sequences(shape) as sequences:
            await sequences.get_ready()

    async def publish(self, shape: Shape, say: Say) -> None:
        stream = self.identity.stream
        if shape.capture is Capture.TRIGGER:
            return  # the guards write it down
        await publication.create_publication(self.source, stream, shape.tables, self.tenant, say)
        reach("stream.published")
        start = await publication.create_slot(self.source, stream, say)
        reach("stream.slot")
        if not self.identity.is_back:  # which begins later, see `begin_here`
            await publication.store_start(self.target, self.identity, start)

    async def begin_anew(self, shape: Shape, say: Say) -> None:
        stream, start = self.identity.stream, None
        if shape.capture is Capture.WAL:
            await publication.drop_slot(self.source, stream)
            reach("stream.dropped")
            await publication.create_publication(self.source, stream, shape.tables, self.tenant, say)
            start = await publication.create_slot(self.source, stream, say)
        reach("stream.slot_anew")
        await publication.store_new_start(self.source, self.target, self.identity, start)

    async def skip_ahead(self, shape: Shape) -> None:
        if shape.capture is Capture.WAL:
            await publication.skip_ahead(self.source, self.identity.stream)

    async def begin_here(self) -> None:
        await publication.begin_here(self.source, self.target, self.identity)

    def sequences(self, shape: Shape) -> AbstractAsyncContextManager[PgSequences]:
        return _opened(PgSequences(self.source, self.target, shape, self.identity))

    @asynccontextmanager
    async def link(self, shape: Shape) -> AsyncIterator[Link]:
        async with AsyncExitStack() as stack:
            points = await stack.enter_async_context(Points.open(self.source))
            writer = Writer.open(self.target, shape, self.tenant, self.identity)
            yield Link(
                changes=await stack.enter_async_context(self._changes(shape, points)),
                target=await stack.enter_async_context(writer),
                copier=BulkCopier(self.source, self.target, shape, self.tenant, self.identity),
                source_readers=await stack.enter_async_context(open_readers(self.source, Side.SOURCE)),
                target_readers=await stack.enter_async_context(open_readers(self.target, Side.TARGET)),
                schema_stamp=functools.partial(
                    points.schema_stamp, self.source_place.schemas, self.tenancy.column
                ),
            )

    @asynccontextmanager
    async def _changes(self, shape: Shape, points: Points) -> AsyncIterator[Stream | PgChangeLog]:
        if shape.capture is Capture.TRIGGER:
            async with PgChangeLog.open(self.source, points, shape, self.tenant, self.identity) as log:
                yield log
        else:
            name = publication.name_of(self.identity.stream)
            yield Stream(WalStream(self.source, name, name), points)

    async def kept_for_us(self) -> Kept:
        stream = self.identity.stream
        async with self.source.borrow("kept") as conn:
            slot = await publication.retained_bytes(conn, stream)
            return Kept(*(slot or (0, "")), log_bytes=await capture.log_bytes(conn, stream))

    async def stop_stream(self, shape: Shape, say: Say) -> None:
        if shape.capture is Capture.TRIGGER:
            return await self.source_fence.stop_capturing(_holdings(shape, Side.SOURCE))
        await publication.drop_slot(self.source, self.identity.stream)
        reach("slot.dropped")
        await publication.drop_publication(self.source, self.identity.stream, say)

    async def restore_identity(self, shape: Shape, say: Say) -> None:
        await identity.release_identities(self.source, self.identity.stream, say)

    async def keep_target(self, shape: Shape) -> None:
        if shape.fresh:
            await clone.keep_clone(self.target, shape.schemas.values(), self.identity.migration)

    async def reopen_source(self) -> None:
        if await self.source_fence.state() != "absent":
            await self.source_fence.reopen()

    async def unguard_source(self, shape: Shape, say: Say) -> None:
        await self.source_fence.remove(_holdings(shape, Side.SOURCE), say)

    async def keep_tombstone(self, shape: Shape, say: Say) -> None:
        await self.source_fence.keep_tombstone(_holdings(shape, Side.SOURCE), say)

    async def unguard_target(self, shape: Shape, say: Say) -> None:
        await self.target_fence.remove(await self._held_on_target(shape), say)

    async def remove_target_rows(self, shape: Shape, say: Say) -> None:
        held = await self._held_on_target(shape)
        if shape.fresh and await clone.drop_clone(
            self.target, shape.schemas.values(), self.identity.migration, held, self.tenant
        ):
            return
        await self._remove_target_rows(shape, held, say)

    async def holds_rows(self, shape: Shape, side: Side) -> bool:
        database = self.source if side is Side.SOURCE else self.target
        return await holds_rows(database, _holdings(shape, side), self.tenant)

    async def remove_source_rows(self, shape: Shape, say: Say) -> None:
        held, careful = _holdings(shape, Side.SOURCE), Side.SOURCE in shape.careful
        await remove_rows(self.source, held, self.tenant, self.identity, say, careful=careful)

    async def forget_source(self) -> None:
        await agent.forget(self.source, self.identity.migration)
        reach("forgotten.source")

    async def forget_target(self) -> None:
        await agent.forget(self.target, self.identity.migration)
        reach("forgotten.target")

    async def refused_writes(self) -> int:
        if await self.source_fence.state() == "absent":  # gone, or a later migration's
            return 0
        return await self.source_fence.refused_writes()

    async def remove_tombstone(self, shape: Shape, say: Say) -> None:
        await agent.install(self.source, self.identity)  # to hold the epoch while we remove it
        await self.source_fence.remove(_holdings(shape, Side.SOURCE), say)
        await agent.forget(self.source, self.identity.migration)

    async def _ddl(self, shape: Shape) -> clone.ClonedDdl:
        return await clone.read_ddl(self.source, self.target, shape.schemas)

    async def _held_on_target(self, shape: Shape) -> list[Holding]:
        """The target's tables in which we may have put rows of the tenant, owners first: not only the planned
        ones, since an operator may have renamed one to follow the source."""
        schemas = self.target_place.schemas
        async with self.target.borrow("undo") as conn:
            relations = [
                r for r in await catalog.read_relations(conn, schemas) if r.kind in "rp" and r.root is None
            ]
            keys = [*await catalog.read_foreign_keys(conn, schemas), *_planned_keys(shape)]
        if any(table.owners for table in shape.tables):  # which a fresh target's keys follow at the end
            async with self.source.borrow("undo") as conn:
                found = await catalog.read_foreign_keys(conn, self.source_place.schemas)
            keys += [
                replace(k, child=self._on_target(k.child), parent=self._on_target(k.parent)) for k in found
            ]
        exempt = self.tenancy.reference_tables | self.tenancy.ignore_tables
        return holdings_in(
            relations,
            keys,
            self.tenancy.column,
            lambda table: not exempt.isdisjoint({str(table), str(self._on_source(table))}),
        )

    def _on_target(self, table: TableRef) -> TableRef:
        schemas = dict(zip(self.source_place.schemas, self.target_place.schemas, strict=True))
        return TableRef(schemas.get(table.schema, table.schema), table.name)

    def _on_source(self, table: TableRef) -> TableRef:
        schemas = dict(zip(self.target_place.schemas, self.source_place.schemas, strict=True))
        return TableRef(schemas[table.schema], table.name)

    async def _remove_target_rows(self, shape: Shape, held: Sequence[Holding], say: Say) -> None:
        careful = Side.TARGET in shape.careful
        await remove_rows(self.target, held, self.tenant, self.identity, say, careful=careful)


@asynccontextmanager
async def _opened(sequences: PgSequences) -> AsyncIterator[PgSequences]:
    try:
        yield sequences
    finally:
        await sequences.close()


def _holdings(shape: Shape, side: Side) -> list[Holding]:
    """Each moved table on that side, parents first as far as foreign keys allow, owners always."""
    return sorted((t.holding(side) for t in shape.tables), key=lambda holding: holding.depth)


def _planned_keys(shape: Shape) -> Iterator[ForeignKey]:
    for table in shape.tables:
        for owner in table.owners:
            yield ForeignKey("", table.target, owner.target, owner.columns, owner.referenced)


# Any role may call both functions (PostgreSQL 15 to 18).
# The timeline by the WAL that is written now: the last checkpoint's may be older than a promotion.
