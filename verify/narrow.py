"""Pure: from the row digests of both sides to the keys that differ. Counts are exact, keys are examples."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from verify.digest import Digest
from verify.leaves import Key

MAX_KEYS = 100


@dataclass(slots=True)
class Keys:
    """How many keys, and the first MAX_KEYS that were found."""

    count: int = 0
    examples: list[Key] = field(default_factory=list)

    def add(self, keys: Iterable[Key]) -> None:
        for key in keys:
            self.count += 1
            if len(self.examples) < MAX_KEYS:
                self.examples.append(key)


@dataclass(slots=True)
class Differences:
    """One table's keys that differ, gathered leaf by leaf."""

    missing: Keys = field(default_factory=Keys)  # on the source only
    extra: Keys = field(default_factory=Keys)  # on the target only
    different: Keys = field(default_factory=Keys)

    def by_kind(self) -> dict[str, Keys]:
        return {"missing": self.missing, "extra": self.extra, "different": self.different}

    def add(self, source: Mapping[Key, Digest], target: Mapping[Key, Digest]) -> None:
        """Compare the same part of both sides."""
        self.missing.add(key for key in source if key not in target)
        self.extra.add(key for key in target if key not in source)
        self.different.add(key for key, digest in source.items() if target.get(key, digest) != digest)


def differing_columns(
    names: Sequence[str],
    source: Mapping[Key, Sequence[Digest]],
    target: Mapping[Key, Sequence[Digest]],
) -> tuple[str, ...]:
    """The columns in which any row that both sides have differs."""
    pairs = [(source[key], target[key]) for key in source if key in target]
    return tuple(name for i, name in enumerate(names) if any(ours[i] != theirs[i] for ours, theirs in pairs))
