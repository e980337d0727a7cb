"""Crash points: the named moments at which a test lets the daemon be killed, stopped or frozen.

`reach("name")` does nothing, unless the environment says `MOVER_CRASH_AT=name`: then the process gets
SIGKILL there, once; `MOVER_CRASH_AT=name:SIGSTOP` sends another signal, and several are separated by commas.
They stand around every write that changes the outside world; `STEP.begun` and `STEP.done` exist for every
line of the journal.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping

VARIABLE = "MOVER_CRASH_AT"

# What has just happened, by name.
POINTS: Mapping[str, str] = {
    "claimed": "the lease is taken, with a higher epoch",
    "plan.saved": "the plan is stored",
    "owner.ended": "the backends of older owners are ended, on one side; the epoch there is theirs still",
    "owned.source": "the epoch is raised on the source",
    "owned.target": "the epoch is raised on the target, too",
    "align.planned": "the plan is stored as the schemas are now",
    "identity.recorded": "a table's replica identity is written down, and not changed yet",
    "identity.built": "the index of a new replica identity is built, and not used yet",
    "guards.target": "the guards stand on the target",
    "guards.source": "the guards stand on the source, too",
    "stream.published": "the publication is made, without a slot",
    "stream.slot": "the slot is made; the target does not know where it begins",
    "stream.dropped": "a slot whose changes are lost is dropped, and not made anew",
    "stream.slot_anew": "it is made anew; the target's progress is the old one",
    "slot.dropped": "the slot is dropped, and the publication stands",
    "copy.planned": "the chunks of a table are recorded",
    "copy.chunk_written": "a chunk's rows are written, and not committed",
    "copy.chunk": "a chunk is committed; nobody has heard of it",
    "follow.written": "a batch is written, and not committed",
    "follow.applied": "a batch is committed; the source has not heard of it",
    "point.written": "what a point sees is written, and not committed",
    "point.reached": "it is committed; the source has not heard of it",
    "resync.compared": "after a loss: both sides are compared, nothing is removed",
    "resync.taken_back": "a range that differed is removed, to be copied anew",
    "cutover.locked": "the tenant's lock is held, and the fence open",
    "cutover.closed": "the fence is closed, and the mark written",
    "cutover.drained": "all before the mark is applied",
    "cutover.sequences": "the target's sequences are ahead",
    "cutover.way_back": "where the way back begins is stored",
    "cutover.proved": "everything is proved, nothing is decided",
    "cutover.deciding": "the route is changed, and not committed",
    "return.deciding": "the same when the tenant comes back",
    "cutover.decided": "the decision is committed, no fence has heard of it",
    "cutover.opened": "the place that takes over is open",
    "cutover.released": "the place that was left refuses, waiting writers go",
    "cutover.flushed": "the routing cache is flushed",
    "recovery.aborted": "nobody can open the place that was to take over any more",
    "recovery.reopened": "the place that was to be left is open again",
    "removal.batch": "some of the rows that are to go are gone",
    "forgotten.source": "nothing of the migration's is left on the source",
    "forgotten.target": "nothing of the migration's is left on the target",
    "tombstone.noted": "when to look at the tombstone is stored, the migration is not completed",
    "completed": "it is completed, and the lease still held",
    "tombstone.removed": "the tombstone is gone, and still to be looked at",
    "undone": "the migration has ended, and the lease is still held",
}


class CrashPoint:
    """Where the signal comes, and which."""

    def __init__(self, setting: str) -> None:
        self._name, _, number = setting.partition(":")
        self._signal = signal.Signals[number or "SIGKILL"]

    def reach(self, name: str) -> None:
        if name == self._name:
            self._name = ""
            os.kill(os.getpid(), self._signal)


_points = [CrashPoint(setting) for setting in os.environ.get(VARIABLE, "").split(",")]


def reach(name: str) -> None:
    """The daemon is at this moment now."""
    for point in _points:
        point.reach(name)
