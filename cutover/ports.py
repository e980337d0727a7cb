"""What a cutover needs of the world. Adapters live in `mover/postgres`; tests use their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol


class Fence(Protocol):
    """The tenant's writes at one place.

    Every change of state is a compare-and-swap at this owner's epoch, durable when it returns.
    """

    async def get_ready(self) -> None:
        """Before the fence: open what the changes of state need."""
        ...

    async def close(self, lock_timeout_s: float) -> str:
        """Wait for in-flight writers, hold new ones, set `closed` and put a mark behind the last write.

        Returns the mark. The hold frees itself should we freeze. Raises CutoverAborted when the
        writers did not end within `lock_timeout_s`; after any error only `reopen` tells whether it
        happened."""
        ...

    async def reopen(self) -> None:
        """Undo `close`, whatever it has done so far: writers go on here. Harmless when the fence is open."""
        ...

    async def open(self) -> None:
        """(closed or aborted) -> open: this place serves the tenant now. Repeatable."""
        ...

    async def move_away(self) -> None:
        """closed -> moved: waiting writers wake and are told to go elsewhere. Repeatable."""
        ...

    async def let_go(self) -> None:
        """End what `get_ready` opened; the state stays."""
        ...

    async def state(self) -> str: ...


class TargetFence(Fence, Protocol):
    """The place that takes over: its fence is the arbiter of a half-done cutover."""

    async def abort(self) -> bool:
        """closed -> aborted: nobody can open it any more. False when it is open already."""
        ...

    async def expect_return(self) -> None:
        """moved -> closed: the tenant, who had left this place, may come back."""
        ...

    async def close_again(self) -> None:
        """aborted -> closed: ready for another attempt."""
        ...


class Drain(Protocol):
    """The change stream, as far as a cutover needs it."""

    async def catch_up_once(self) -> None:
        """Until everything that has committed by now is applied."""
        ...

    async def reached(self, mark: str) -> None:
        """Until everything before the mark is applied and durable on the target."""
        ...


class Proof(Protocol):
    """That both sides hold the same."""

    async def get_ready(self) -> None:
        """Before the fence: open what the comparison under it needs."""
        ...

    async def changed_rows_equal(self) -> Mapping[str, object]:
        """Compare the rows changed since the last comparison; the evidence.

        The snapshots of both sides stay open, for the complete comparison after the switch. Raises
        VerificationFailed when they differ or were too many to know."""
        ...


class Sequences(Protocol):
    async def get_ready(self) -> None: ...

    async def carry_over(self) -> None:
        """Set the target's sequences beyond every value that the source has given out."""
        ...


class Gate(Protocol):
    """Where the way back begins."""

    async def set(self) -> None:
        """What has been written to the target so far does not flow back; whatever the tenant writes there
        later does. Durable when it returns; a later attempt sets it anew."""
        ...


class Decision(Protocol):
    """The route, changed exactly once."""

    async def switch(self, evidence: Mapping[str, object]) -> None:
        """Commit the switch; taken already, it returns. Any MoverError says that it certainly did not
        happen, but for OutcomeUnknown: the answer was lost after it was sent."""
        ...

    async def is_switched(self) -> bool:
        """Read at this owner's epoch: a decision of an older owner can no longer arrive afterwards."""
        ...


class Cache(Protocol):
    """Copies of the route that the applications keep."""

    async def invalidate(self) -> None: ...
