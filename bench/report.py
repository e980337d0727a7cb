"""What a scenario found, in the form that is kept."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass, field
from pathlib import Path

Figures = dict[str, float]


@dataclass(frozen=True)
class Report:
    """Figures of one run on the same data, medians; a ratio above 1 means that we are better."""

    scenario: str
    settings: dict[str, object]
    ours: Figures
    peers: dict[str, Figures] = field(default_factory=dict)
    floor: Figures = field(default_factory=dict)
    ratios: Figures = field(default_factory=dict)

    def as_json(self) -> dict[str, object]:
        return {
            "scenario": self.scenario,
            "machine": machine(),
            "settings": self.settings,
            "ours": self.ours,
            "peers": self.peers,
            "floor": self.floor,
            "ratios": self.ratios,
        }


def machine() -> dict[str, object]:
    models = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "processors": os.cpu_count(),
        "model": models[0] if models else platform.processor(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": platform.system(),
        "python": platform.python_version(),
    }
