"""Every crash point, in the order in which migrations pass them: the chains of the kill matrix."""

from __future__ import annotations

from collections.abc import Iterator


def step(*names: str) -> list[str]:
    """Both points of each line of the journal."""
    return [f"{name}.{moment}" for name in names for moment in ("begun", "done")]


def around(name: str, *inside: str) -> list[str]:
    """A line of the journal with what it passes."""
    return [f"{name}.begun", *inside, f"{name}.done"]


PREPARING = [
    "claimed",
    "preflight.begun",
    "preflight.done",
    *step("provision"),
    "prepare.begun",
    *step("prepare.servers"),
    *around("prepare.ownership", "owner.ended", "owned.source", "owned.target"),
    *step("prepare.schemas"),
    *around("prepare.alignment", "align.planned"),
    *around("prepare.identity", "identity.recorded", "identity.built"),
    *step("prepare.sequences"),
    *around("prepare.guards", "guards.target", "guards.source"),
    *around("prepare.stream", "stream.published", "stream.slot"),
    "prepare.done",
]
TRANSFERRING = [
    "plan.saved",
    "copy.begun",
    "point.written",
    "point.reached",
    "copy.planned",
    "copy.chunk_written",
    "copy.chunk",
    "follow.written",
    "follow.applied",
    "copy.done",
    *step("index", "catch_up", "verify"),
]
SWITCHING = [
    "cutover.begun",
    *step("back.identity", "back.guards", "back.stream"),
    "cutover.locked",
    "cutover.closed",
    "recovery.aborted",
    "recovery.reopened",
    "cutover.drained",
    "cutover.sequences",
    "cutover.way_back",
    "cutover.proved",
    "cutover.deciding",
    "cutover.decided",
    "cutover.opened",
    "cutover.released",
    "cutover.flushed",
]
ENDING = [
    "cutover.done",
    "monitor.begun",
    *step("monitor.keep_target"),
    *around("monitor.stop_stream", "slot.dropped"),
    "monitor.done",
    "cleanup.begun",
    *step("cleanup.back_stream", "cleanup.back_identity", "cleanup.last_check"),
    *around("cleanup.source_rows", "removal.batch"),
    *step("cleanup.tombstone", "cleanup.identity", "cleanup.target_guards"),
    *around("cleanup.forget_source", "forgotten.source"),
    *around("cleanup.forget_target", "forgotten.target"),
    "cleanup.done",
    "tombstone.noted",
    "completed",
]
# The tenant does not want to go any more; his daemon died at `cutover.closed`.
CANCELLING = [
    "claimed",
    "recovery.aborted",
    "recovery.reopened",
    *step("undo.source_ownership", "undo.reopen"),
    *around("undo.stream", "slot.dropped"),
    *step("undo.source_guards", "undo.identity"),
    *around("undo.forget_source", "forgotten.source"),
    *step("undo.target_ownership", "undo.back_stream", "undo.back_identity", "undo.target_guards"),
    *around("undo.target_rows", "removal.batch"),
    *around("undo.forget_target", "forgotten.target"),
    "undone",
]
# He comes back after the switch, and what he leaves on the target is cleared.
RETURNING = [
    "return.switch.begun",
    "cutover.locked",
    "cutover.closed",
    "recovery.aborted",
    "recovery.reopened",
    "cutover.drained",
    "cutover.sequences",
    "cutover.proved",
    "return.deciding",
    "cutover.decided",
    "cutover.opened",
    "cutover.released",
    "cutover.flushed",
    "return.switch.done",
    *step("return.target_ownership", "return.back_stream", "return.back_identity"),
    *step("undo.source_ownership", "undo.reopen", "undo.stream", "undo.source_guards", "undo.identity"),
    *around("undo.forget_source", "forgotten.source"),
    "undone",
    *step("undo.target_ownership"),
    *around("undo.target_rows", "removal.batch"),
    *step("undo.target_guards"),
    *around("undo.forget_target", "forgotten.target"),
]
# What only a return passes that nobody has to take up.
RETURN_IS_COMPARED = step("return.complete_comparison")
# Changes were lost on the way there, or on the way back.
RESYNCHRONISING = [
    *around("prepare.stream_anew", "stream.dropped", "stream.slot_anew"),
    "resync.compared",
    "resync.taken_back",
]
RESYNCHRONISING_BACK = [
    *step("back.stream_anew"),
    "resync.compared",
    *around("back.resynchronise", "resync.taken_back", "copy.chunk_written"),
]
# The way back keeps too much.
GIVING_UP = step("monitor.back_stream", "monitor.back_identity")
TOMBSTONE = ["tombstone.removed"]

# What only the stream needs is not reached by triggers.
OF_THE_STREAM = {
    "identity.recorded",
    "identity.built",
    "stream.published",
    "stream.slot",
    "stream.dropped",
    "slot.dropped",
    "point.written",
    "point.reached",
}


def every_point() -> Iterator[str]:
    for chain in (PREPARING, TRANSFERRING, SWITCHING, ENDING, CANCELLING, RETURNING, RETURN_IS_COMPARED):
        yield from chain
    for chain in (RESYNCHRONISING, RESYNCHRONISING_BACK, GIVING_UP, TOMBSTONE):
        yield from chain
