"""The daemon's log lines in memory."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager

import structlog

from mover import log


@contextmanager
def captured_log() -> Iterator[io.StringIO]:
    """Where the lines go; what was configured before is put back."""
    handlers, level = logging.root.handlers[:], logging.root.level
    stream = io.StringIO()
    log.configure(stream=stream)
    try:
        yield stream
    finally:
        structlog.reset_defaults()
        logging.root.handlers[:] = handlers
        logging.root.setLevel(level)
