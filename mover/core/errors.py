"""What can go wrong, where, and what follows. A text here never holds a row's value or a secret."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum

from mover.core.ids import Lsn, TableRef, TenantId


class Remedy(StrEnum):
    """What the engine does with an error; it looks at nothing else."""

    RETRY = "retry"  # passes by itself: try the phase again after a back-off
    PAUSE = "pause"  # needs an operator: stop, keep everything, resume later
    ABORT = "abort"  # cannot succeed: undo everything we made, then `failed`
    HALT = "halt"  # a promise may be broken: touch nothing more, raise the alarm


@dataclass(frozen=True, slots=True)
class Where:
    """Where an error happened."""

    tenant: TenantId | None = None
    table: TableRef | None = None
    lsn: Lsn | None = None


@dataclass(eq=False)  # an exception is compared and hashed by identity
class MoverError(Exception):
    """Base of all errors that an operator sees. `code` is stable and machine-readable."""

    message: str
    where: Where = field(default_factory=Where)
    hint: str | None = None

    code = "internal"
    remedy = Remedy.ABORT

    def __str__(self) -> str:
        return self.message

    def __post_init__(self) -> None:
        super().__init__(self.message)


class Unreachable(MoverError):
    """A server does not answer, or the connection broke; the next attempt may succeed."""

    code, remedy = "unreachable", Remedy.RETRY


class NotReady(Unreachable):
    """A server did not answer before anything was made: the request fails, and can be made again."""

    remedy = Remedy.ABORT


class LockNotAvailable(MoverError):
    """A lock on a shared table was not free within our short timeout."""

    code, remedy = "lock_not_available", Remedy.RETRY


class LeaseLost(MoverError):
    """Another daemon owns the migration now; this one must stop at once and touch nothing."""

    code, remedy = "lease_lost", Remedy.HALT


class Refused(MoverError):
    """Preflight or policy says no; nothing was changed."""

    code, remedy = "refused", Remedy.ABORT


class SlotLost(MoverError):
    """The source dropped WAL that we still needed, or the slot is not the one we made. Both sides are
    compared, and what differs is copied anew."""

    code, remedy = "slot_lost", Remedy.RETRY


class SchemaChanged(MoverError):
    """The source's tables changed in a way that cannot be followed without an operator."""

    code, remedy = "schema_changed", Remedy.PAUSE


class DanglingReferences(MoverError):
    """Rows refer to rows that do not move with them, which they did not when the migration was planned."""

    code, remedy = "dangling_references", Remedy.PAUSE


class TableUnfit(SchemaChanged):
    """`where.table` is not one that can be moved, or its changes came without what tells rows apart. Once
    an operator has mended it, it is copied anew: what was streamed meanwhile may be wrong."""


class PlanOutdated(SchemaChanged):
    """The source's schemas are not those that the plan was made of: they are compared anew."""

    code, remedy = "plan_outdated", Remedy.RETRY


class ApplyConflict(MoverError):
    """A change does not fit the target's rows: another tenant's row, or a row that is not there."""

    code, remedy = "apply_conflict", Remedy.ABORT


class VerificationFailed(MoverError):
    """Source and target differ at a consistent point; nothing is switched."""

    code, remedy = "verification_failed", Remedy.ABORT
    # The differing tables with their keys: for the stored evidence, never for a log line.
    evidence: Sequence[Mapping[str, object]] = ()


class DamageAfterSwitch(MoverError):
    """The complete comparison after the switch found a difference: the source is kept as it is."""

    code, remedy = "damage_after_switch", Remedy.HALT


class NoWayBack(MoverError):
    """The tenant cannot be brought back as things are; he is served by the target."""

    code, remedy = "no_way_back", Remedy.PAUSE


class KeepsTooMuch(MoverError):
    """What is kept for the way back endangers the disk of the server that the tenant is served by."""

    code, remedy = "keeps_too_much", Remedy.PAUSE


class CutoverAborted(MoverError):
    """The fence gave up within its budget and writers went on at the source; tried again later."""

    code, remedy = "cutover_aborted", Remedy.RETRY


class OutcomeUnknown(MoverError):
    """The decision was sent and its answer was lost; the fence stays closed until it is known."""

    code, remedy = "outcome_unknown", Remedy.RETRY


class ServerChanged(MoverError):
    """A server's identity or timeline is another one than before: a standby was promoted, or a backup was
    restored, which may lack what was acknowledged.

    Both sides are compared, and what differs is copied anew."""

    code, remedy = "server_changed", Remedy.RETRY


class CannotResynchronise(MoverError):
    """What was to come from the source is lost, and what differs cannot be copied anew by itself."""

    code, remedy = "cannot_resynchronise", Remedy.ABORT


@dataclass(eq=False)
class InvalidRequest(MoverError):
    """The request itself is wrong; `field` names the part, as the API spells it."""

    field: str | None = None

    code = "invalid_request"


class Conflict(MoverError):
    """The state does not allow what was asked."""

    code = "conflict"


class NotFound(MoverError):
    """No such migration."""

    code = "not_found"


class UnknownTenant(NotFound):
    """The routing table has no such tenant."""

    code = "unknown_tenant"


@contextmanager
def first_error() -> Iterator[None]:
    """Of the errors that a task group raises together, let the first leave as itself."""
    try:
        yield
    except BaseExceptionGroup as group:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        raise error from group


def broken_off(error: BaseException) -> Exception:
    """What ended the following of a source, for those who come later: nobody has cancelled them."""
    return error if isinstance(error, Exception) else Unreachable("following the source was broken off")
