"""Dates of a JSON schema that there are: llguidance lets every February have 29 days."""

from typing import Any

from winnow.grammar.keywords import with_members

_LEAP_YEAR = "(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:[02468][048]|[13579][26])00)"
# Beside the format, which says the rest.
_BEGINNING = rf"^(?:[0-9]{{4}}-(?:0[13-9]|1[0-2]|02-[01]|02-2[0-8])|{_LEAP_YEAR}-02-29)"


def with_leap_days(schema: Any) -> Any:  # noqa: ANN401 - any JSON
    """The schema in which 29 February is a `date`, or of a `date-time`, in leap years alone.

    One with a `pattern` of its own stays as it is: llguidance takes one.
    """
    if not isinstance(schema, dict):
        return schema
    done = with_members(schema, with_leap_days)
    if done.get("format") in ("date", "date-time"):
        done.setdefault("pattern", _BEGINNING)
    return done
