"""What a migration's notes keep of changes that will never come: a slot that is gone, a server for which
another one stands now.

The note is there before anything is done about it, and goes when both sides are equal."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import cast

from mover.core.errors import SlotLost
from mover.core.ids import Side
from mover.core.migration import Claim
from mover.engine.site import Site
from mover.ports import MoveStore

LOST, LOST_BACK = "stream_lost", "way_back_lost"  # the notes: on the way there, and back
SERVERS = "servers"  # the note that keeps which ones they were
DAMAGE = "damage_after_switch"  # the note that keeps the source from being cleaned
KEPT = f"The source keeps its rows while the migration's notes hold `{DAMAGE}`."


@asynccontextmanager
async def noting_loss(store: MoveStore, claim: Claim, note: str) -> AsyncIterator[None]:
    """The next try begins with a comparison."""
    try:
        yield
    except SlotLost:
        await store.save_note(claim, note, True)
        raise


async def is_lost(store: MoveStore, claim: Claim, note: str) -> bool:
    return bool((await store.load_notes(claim)).get(note))


async def found_again(store: MoveStore, claim: Claim, note: str) -> None:
    await store.save_note(claim, note, False)


async def note_changed_servers(store: MoveStore, claim: Claim, site: Site, note: str) -> str | None:
    """Keep which servers these are, and what has become of an earlier one's changes; what to tell people.

    One that was promoted, or restored, may lack what was acknowledged on the one before."""
    found = dict(await site.server_identities())
    known = (await store.load_notes(claim)).get(SERVERS)
    if known == found:
        return None
    if known is not None:
        await store.save_note(claim, note, True)
    await store.save_note(claim, SERVERS, found)
    return f"another server than before: {known} then, {found} now" if known else None


async def changed_server(store: MoveStore, claim: Claim, site: Site, side: Side) -> tuple[str, str] | None:
    """The side's server as it is noted, and as it is; None where it is the same. Notes nothing."""
    known = cast(Mapping[str, str], (await store.load_notes(claim)).get(SERVERS) or {}).get(side.value)
    found = (await site.server_identities())[side.value]
    return None if known in (None, found) else (str(known), found)
