"""The server's log: one JSON object a line, in which nothing of a prompt stands.

Messages of the server's own loggers name counts, kinds and routes. Of an exception the log has its type and the lines
of code that it came by; its message, and those of its causes, may quote what a client sent.
"""

from __future__ import annotations

import contextlib
import json
import logging
import traceback
from collections.abc import Iterator
from datetime import datetime, timezone
from typing import Any

_OURS, _UVICORN = "radix_ops.serve", "uvicorn.error"


class JsonFormatter(logging.Formatter):
    """Formats a record as a JSON object of time, level, logger and message, and the keys of `record.fields`, a dict."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record's line."""
        found: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        error = record.exc_info[1] if record.exc_info else None
        if error is not None:
            found["exception"] = _described(error)
        return json.dumps(found, default=str)


@contextlib.contextmanager
def json_logs(quiet: bool = False) -> Iterator[None]:
    """Write what the server says, and uvicorn's warnings, as JSON to the standard error stream until the end.

    quiet: warnings and what is worse alone.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter())
    with contextlib.ExitStack() as stack:
        for name, level in ((_OURS, logging.WARNING if quiet else logging.INFO), (_UVICORN, logging.WARNING)):
            logger = logging.getLogger(name)
            before = logger.level, logger.propagate
            logger.addHandler(handler)
            stack.callback(_put_back, logger, handler, *before)
            logger.setLevel(level)
            logger.propagate = False
        yield


def _put_back(logger: logging.Logger, handler: logging.Handler, level: int, propagates: bool) -> None:
    logger.removeHandler(handler)
    logger.setLevel(level)
    logger.propagate = propagates


def _described(error: BaseException) -> list[dict[str, Any]]:
    """Return type and frames of an exception and of those that it came from, without their messages."""
    found: list[dict[str, Any]] = []
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        frames = traceback.extract_tb(current.__traceback__)
        found.append({"type": type(current).__name__, "at": [f"{f.filename}:{f.lineno} in {f.name}" for f in frames]})
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)
    return found
