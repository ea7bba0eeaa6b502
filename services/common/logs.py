"""Logging for every process: text or one JSON object per line, to standard error.

Log calls about a request pass `extra={"request_id": ...}`; both formats show it.
"""

import json
import logging
import re
import sys
from datetime import UTC, datetime
from textwrap import indent

from winnow.errors import WinnowError

_OURS = ("winnow", "services")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


class TextFormatter(logging.Formatter):
    """`12:00:00.123 INFO services.prefill.worker [request id] message`

    Untrusted text in a message cannot forge a log line: control characters are escaped, and the
    lines of a traceback indented.
    """

    def format(self, record: logging.LogRecord) -> str:
        clock = f"{datetime.fromtimestamp(record.created, UTC):%H:%M:%S}.{int(record.msecs):03d}"
        request_id = getattr(record, "request_id", None)
        about = f"[{request_id}] " if request_id else ""
        message = _escaped(f"{about}{record.getMessage()}")
        line = f"{clock} {record.levelname} {record.name} {message}"
        if record.exc_info is None:
            return line
        return f"{line}\n{indent(self.formatException(record.exc_info), '  ', lambda _: True)}"


class JsonFormatter(logging.Formatter):
    """One object per line: time (ISO 8601, UTC), level, logger, message, request_id if present."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": _whole_message(self, record),
        }
        if request_id := getattr(record, "request_id", None):
            line["request_id"] = request_id
        return json.dumps(line, ensure_ascii=False)


def _escaped(text: str) -> str:
    return _CONTROL.sub(lambda found: found.group().encode("unicode_escape").decode(), text)


def _whole_message(formatter: logging.Formatter, record: logging.LogRecord) -> str:
    if record.exc_info is None:
        return record.getMessage()
    return f"{record.getMessage()}\n{formatter.formatException(record.exc_info)}"


def _in_one_line(record: logging.LogRecord) -> bool:
    """A WinnowError is an answer to the caller: Serve's line about it takes no traceback."""
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, WinnowError):
        record.msg, record.args = f"{record.getMessage()} {type(error).__name__}: {error}", None
        record.exc_info = record.exc_text = None
    return True


def configure_logging(level: str, log_format: str) -> None:
    """Send Winnow's logs, and warnings of other libraries, to standard error.

    level: debug, info, warning or error. log_format: text or json.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    for name in _OURS:
        logging.getLogger(name).setLevel(level.upper())
    logging.getLogger("ray.serve").addFilter(_in_one_line)


def show_downloads() -> None:
    """Write what Winnow says of a hub's models to standard error, for commands without a log."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("winnow: %(message)s"))
    logger = logging.getLogger("winnow.hub")
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.INFO)
