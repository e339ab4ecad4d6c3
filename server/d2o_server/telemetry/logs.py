"""Log lines, as text or as JSON, with the ids of the call that they belong to. Nothing but the standard library."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from datetime import UTC, datetime

Ids = Callable[[], Mapping[str, str]]

# What a record may carry as ``extra={FIELDS: {...}}``: facts that JSON has as fields of their own.
FIELDS = "fields"


def quoted(value: object) -> str:
    """``value`` as the right side of ``key=value``: what is no plain word is quoted, so that a line stays one."""
    text = str(value)
    return text if text.replace("-", "").replace("_", "").replace(".", "").isalnum() else json.dumps(text)


def pairs(fields: Mapping[str, object]) -> str:
    """``key=value`` pairs of one line."""
    return " ".join(f"{key}={quoted(value)}" for key, value in fields.items())


class Pairs:
    """:func:`pairs` for a log's message: a line that is written as JSON does not need them."""

    __slots__ = ("_fields",)

    def __init__(self, fields: Mapping[str, object]) -> None:
        self._fields = fields

    def __str__(self) -> str:
        return pairs(self._fields)


class TextFormatter(logging.Formatter):
    """A line of text; one that a call caused, and that does not say so itself, ends with the call's ids."""

    def __init__(self, ids: Ids) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s")
        self._ids = ids

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The line without the traceback."""
        line = super().formatMessage(record)
        known = {} if hasattr(record, FIELDS) else self._ids()
        return f"{line} [{pairs(known)}]" if known else line


class JsonFormatter(logging.Formatter):
    """One JSON document a line: time (UTC), level, logger, the call's ids, then the record's own fields or message."""

    def __init__(self, ids: Ids) -> None:
        super().__init__()
        self._ids, self._encode = ids, json.JSONEncoder(default=str).encode

    def format(self, record: logging.LogRecord) -> str:
        """The whole line."""
        document: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            **self._ids(),
        }
        fields = getattr(record, FIELDS, None)
        document |= {"message": record.getMessage()} if fields is None else fields
        if record.exc_info:
            document["traceback"] = self.formatException(record.exc_info)
        return self._encode(document)


def configure(level: str, log_format: str = "text", ids: Ids = dict) -> None:
    """Sends the process's log to standard error, as ``text`` or ``json``; ``ids`` are those of the call at hand."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter(ids) if log_format == "json" else TextFormatter(ids))
    logging.basicConfig(level=level, handlers=[handler])
