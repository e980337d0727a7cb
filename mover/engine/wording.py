"""How findings list and count things."""

from __future__ import annotations

from collections.abc import Iterable

SHOWN = 5  # of a long list, in one message


def listed(names: Iterable[str]) -> str:
    every = list(names)
    more = f" and {len(every) - SHOWN} more" if len(every) > SHOWN else ""
    return ", ".join(every[:SHOWN]) + more


def counted(count: int | None, noun: str) -> str:
    if count is None:
        return f"an uncounted number of {noun}s"
    return f"{count} {noun}{'' if count == 1 else 's'}"
