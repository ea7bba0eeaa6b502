"""Strict parsing of the JSON that clients send."""

import json
import sys
from typing import Any, NoReturn

from winnow.errors import InvalidRequest


def parse_object(data: bytes, name: str, param: str | None = None) -> dict[str, Any]:
    """The JSON object in `data`.

    name: what `data` is, for the error.
    Raises InvalidRequest, with `param`, for anything but a JSON object in UTF-8.
    """
    try:
        parsed = json.loads(data.decode(), parse_constant=_refuse_constant)
        _require_unicode(data, parsed)
    except UnicodeDecodeError as error:
        fault = f"is not UTF-8: byte 0x{data[error.start]:02x} at position {error.start}"
    except json.JSONDecodeError as error:
        fault = f"is not JSON: {error.msg} at line {error.lineno}, column {error.colno}"
    except UnicodeEncodeError:
        fault = "has half a surrogate pair, which is no character"
    except _NotJson as error:
        fault = f"is not JSON: {error}"
    except RecursionError:
        fault = "is nested too deep to be read"
    except ValueError:
        fault = f"has a number of more than {sys.get_int_max_str_digits():,} digits"
    else:
        if isinstance(parsed, dict):
            return parsed
        fault = "must be a JSON object"
    raise InvalidRequest(f"{name} {fault}", param=param)


class _NotJson(Exception):
    pass


def _refuse_constant(name: str) -> NoReturn:
    raise _NotJson(f"it has {name}, which is no JSON number")


def _require_unicode(data: bytes, parsed: object) -> None:
    """Raises UnicodeEncodeError for half a surrogate pair (`"\\ud800"`)."""
    if b"\\ud" in data.lower():
        json.dumps(parsed, ensure_ascii=False).encode()
