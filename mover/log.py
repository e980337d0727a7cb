"""Logging: JSON lines on standard error, with the migration, tenant and phase that are being worked on.

Defence in depth: passwords in URLs are masked in every field, and of an exception that is not ours only
the type and the places are kept, since a driver's message may hold a row's value.
"""

from __future__ import annotations

import logging
import re
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any, TextIO

import structlog
from structlog.contextvars import bind_contextvars, reset_contextvars
from structlog.typing import EventDict, Processor, WrappedLogger

from mover.core.errors import MoverError

_MASKS = (
    (re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]*://[^\s:/@]*:)[^\s/@]*(?:/[^\s@]*)?@"), r"\1***@"),
    (re.compile(r"(?i)\b(password|passwd|token|secret)(\s*[=:]\s*)[^\s,;&'\"]+"), r"\1\2***"),
    (re.compile(r"(?i)\b(bearer\s+)\S+"), r"\1***"),
)


def configure(*, level: str = "INFO", stream: TextIO | None = None) -> None:
    """Send our own and the libraries' log lines to `stream`: for people on a terminal, else as JSON."""
    stream = stream or sys.stderr
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="at"),
        describe_exception,
        mask_secrets,
    ]
    renderer: Processor = (
        structlog.dev.ConsoleRenderer() if stream.isatty() else structlog.processors.JSONRenderer(default=str)
    )
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        )
    )
    logging.basicConfig(handlers=[handler], level=level, force=True)
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )


def logger(name: str) -> structlog.stdlib.BoundLogger:
    """A logger; pass facts as keywords and an `action` for machines."""
    bound: structlog.stdlib.BoundLogger = structlog.stdlib.get_logger(name)
    return bound


@contextmanager
def bound(**context: object) -> Iterator[None]:
    """Every line inside carries `context`: migration, tenant, phase."""
    tokens = bind_contextvars(**{key: str(value) for key, value in context.items()})
    try:
        yield
    finally:
        reset_contextvars(**tokens)


def masked(text: str) -> str:
    """`text` without passwords and tokens."""
    for pattern, replacement in _MASKS:
        text = pattern.sub(replacement, text)
    return text


def mask_secrets(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    return {key: _masked_value(value) for key, value in event.items()}


def describe_exception(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    """`exc_info` as type and places; the message only where it is one of our own."""
    info = event.pop("exc_info", None)
    error = info[1] if isinstance(info, tuple) else sys.exc_info()[1] if info is True else info
    if isinstance(error, BaseException):
        event["error"] = type(error).__name__
        if isinstance(error, MoverError):
            event["reason"] = error.message
        event["trace"] = _places(error.__traceback__)
    return event


def _masked_value(value: Any) -> Any:
    match value:
        case str():
            return masked(value)
        case Mapping():
            return {key: _masked_value(inner) for key, inner in value.items()}
        case list() | tuple():
            return [_masked_value(inner) for inner in value]
    return value


def _places(trace: TracebackType | None) -> list[str]:
    return [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in traceback.extract_tb(trace)]
