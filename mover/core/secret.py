"""A text that never shows itself: connection URLs and tokens are carried as `Secret`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, repr=False)
class Secret:
    """Prints as asterisks everywhere; `reveal()` is called only where a connection is opened."""

    _value: str

    def reveal(self) -> str:
        return self._value

    def __str__(self) -> str:
        return "***"

    __repr__ = __str__
