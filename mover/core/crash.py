"""Crash points: the named moments at which a test lets the daemon be killed, stopped or frozen.

`reach("name")` does nothing, unless the environment says `MOVER_CRASH_AT=name`: then the process gets
SIGKILL there, once; `MOVER_CRASH_AT=name:SIGSTOP` sends another signal. A name says what has just
happened; `STEP.begun` and `STEP.done` exist for every line of the journal.
"""

from __future__ import annotations

import os
import signal

VARIABLE = "MOVER_CRASH_AT"


class CrashPoint:
    """Where the signal comes, and which."""

    def __init__(self, setting: str) -> None:
        self._name, _, number = setting.partition(":")
        self._signal = signal.Signals[number or "SIGKILL"]

    def reach(self, name: str) -> None:
        if name == self._name:
            self._name = ""
            os.kill(os.getpid(), self._signal)


_point = CrashPoint(os.environ.get(VARIABLE, ""))


def reach(name: str) -> None:
    """The daemon is at this moment now."""
    _point.reach(name)
