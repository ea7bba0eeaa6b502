"""How calls of tools are told from the text around them."""

import re
from dataclasses import dataclass

BRACKETS = ("{", "[")


@dataclass(frozen=True, slots=True)
class CallSyntax:
    """How calls are told from text. Each is a JSON object with a name and arguments, or a list.

    opens: strings after which a call follows.  close: a string that may follow a call.
    bare: an answer may begin with a call, after one of `starts` or nothing.
    named: a call may also be its arguments alone, after text that matches this and has its name.
    """

    opens: tuple[str, ...] = ()
    close: str | None = None
    bare: bool = False
    starts: tuple[str, ...] = ()
    named: re.Pattern[str] | None = None

    @property
    def at_start(self) -> tuple[str, ...]:
        """What begins a call at the start of an answer."""
        return (*self.opens, *self.starts, *(BRACKETS if self.bare else ()))

    @property
    def next_call(self) -> tuple[str, ...]:
        """What begins the next call after one."""
        return (*self.opens, "{")

    @property
    def after_call(self) -> tuple[str, ...]:
        """What begins the next call after one, or is its end."""
        return (*self.next_call, *((self.close,) if self.close else ()))
