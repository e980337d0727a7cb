"""The live figures of a migration's progress that are worked out over time."""

from __future__ import annotations

from dataclasses import dataclass

from mover.core.migration import Progress
from mover.engine.site import Kept
from mover.ports import Clock

# Under this lag the target counts as close behind, for the lag in seconds.
SMALL_LAG_BYTES = 1 << 20
WARNING_INTERVAL_S = 60.0
# A log of changes that is read all the time has some megabytes.
LARGE_LOG_BYTES = 1 << 30


@dataclass
class Figures:
    """How far the target is behind, and when the copy will be over."""

    progress: Progress
    clock: Clock
    _near_at: float | None = None  # when the target was last close behind
    _first_bytes: tuple[float, int] | None = None  # where this owner began to copy
    _warned_at: float | None = None  # of what the source keeps

    def note(self, lag_bytes: int) -> None:
        """Called about once a second."""
        now = self.clock.monotonic()
        if lag_bytes < SMALL_LAG_BYTES or self._near_at is None:
            self._near_at = now
        self.progress.lag_bytes, self.progress.lag_seconds = lag_bytes, round(now - self._near_at, 1)
        self._estimate(now)

    def warning(self, kept: Kept) -> str | None:
        """What to warn of now, if anything: not every time that we look."""
        now = self.clock.monotonic()
        is_due = self._warned_at is None or now - self._warned_at >= WARNING_INTERVAL_S
        text = _warning(kept)
        if text is None or not is_due:
            return None
        self._warned_at = now
        return text

    def _estimate(self, now: float) -> None:
        """Time left for copying, from the rate so far."""
        done, total = self.progress.bytes_done, self.progress.bytes_total
        if self._first_bytes is None:
            self._first_bytes = (now, done)
        since, before = self._first_bytes
        if done > before and total > done:
            self.progress.eta_seconds = round((total - done) * (now - since) / (done - before), 1)
        elif total <= done:
            self.progress.eta_seconds = None


def _warning(kept: Kept) -> str | None:
    if kept.wal_status == "unreserved":
        return "the slot is about to be lost: the source wants its WAL back"
    if kept.log_bytes >= LARGE_LOG_BYTES:
        return (
            f"the log of changes on the source has {kept.log_bytes >> 20} MiB: changes come faster than they"
            " are applied, or a transaction or snapshot that is open for long keeps what was read from"
            " being removed"
        )
    return None
