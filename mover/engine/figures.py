"""The live figures of a migration's progress that are worked out over time."""

from __future__ import annotations

from dataclasses import dataclass

from mover.core.migration import Progress
from mover.ports import Clock

# Under this lag the target counts as close behind, for the lag in seconds.
SMALL_LAG_BYTES = 1 << 20
WARNING_INTERVAL_S = 60.0


@dataclass
class Figures:
    """How far the target is behind, and when the copy will be over."""

    progress: Progress
    clock: Clock
    _near_at: float | None = None  # when the target was last close behind
    _first_bytes: tuple[float, int] | None = None  # where this owner began to copy
    _warned_at: float | None = None  # of the slot

    def note(self, lag_bytes: int) -> None:
        """Called about once a second."""
        now = self.clock.monotonic()
        if lag_bytes < SMALL_LAG_BYTES or self._near_at is None:
            self._near_at = now
        self.progress.lag_bytes, self.progress.lag_seconds = lag_bytes, round(now - self._near_at, 1)
        self._estimate(now)

    def warns_of_slot(self, wal_status: str) -> bool:
        """Whether to warn now that the source wants the slot's WAL back: not every time that we look."""
        now = self.clock.monotonic()
        is_due = self._warned_at is None or now - self._warned_at >= WARNING_INTERVAL_S
        if wal_status != "unreserved" or not is_due:
            return False
        self._warned_at = now
        return True

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
