"""What a migration's work tells whoever counts it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from mover.core.migration import Migration
from mover.core.states import Phase
from mover.engine.site import Kept


class Observer(Protocol):
    """Hears what metrics need."""

    def phase_took(self, phase: Phase, seconds: float) -> None: ...

    def chunk_copied(self, rows: int, size: int) -> None: ...

    def changes_applied(self, kinds: Mapping[str, int]) -> None: ...

    def rows_verified(self, rows: int) -> None: ...

    def integrity_failed(self, rows: int) -> None: ...

    def cutover(self, outcome: str, pause_ms: float | None) -> None: ...

    def rolled_back(self, trigger: str) -> None: ...

    def measured(self, migration: Migration, lag_bytes: int, lag_seconds: float, kept: Kept) -> None: ...

    def fence_held(self, seconds: float) -> None:
        """For so long a fence has been closed already without an outcome; 0: it is over."""
        ...

    def writes_refused(self, count: int) -> None: ...
