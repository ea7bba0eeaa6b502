"""Log lines of every process: text for people or one JSON object per line, to standard error.

Whoever logs about a request passes `extra={"request_id": ...}`; both formats show it.
"""

import json
import logging
import sys
from datetime import UTC, datetime

_OURS = ("winnow", "services")


class TextFormatter(logging.Formatter):
    """`12:00:00.123 INFO services.prefill.worker [request id] message`"""

    def format(self, record: logging.LogRecord) -> str:
        clock = f"{datetime.fromtimestamp(record.created, UTC):%H:%M:%S}.{int(record.msecs):03d}"
        request_id = getattr(record, "request_id", None)
        about = f"[{request_id}] " if request_id else ""
        return f"{clock} {record.levelname} {record.name} {about}{_message(self, record)}"


class JsonFormatter(logging.Formatter):
    """One object per line: time (ISO 8601, UTC), level, logger, message, request_id if there is."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": _message(self, record),
        }
        if request_id := getattr(record, "request_id", None):
            line["request_id"] = request_id
        return json.dumps(line, ensure_ascii=False)


def _message(formatter: logging.Formatter, record: logging.LogRecord) -> str:
    if record.exc_info is None:
        return record.getMessage()
    return f"{record.getMessage()}\n{formatter.formatException(record.exc_info)}"


def configure_logging(level: str, log_format: str) -> None:
    """Send Winnow's own loggers, and others' warnings, to standard error.

    level: debug, info, warning or error. log_format: text or json.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    for name in _OURS:
        logging.getLogger(name).setLevel(level.upper())
