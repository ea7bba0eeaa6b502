"""What the parts of a chat request are called where a client writes them otherwise."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from winnow.errors import InvalidRequest


@contextmanager
def client_names(names: Mapping[str, str]) -> Iterator[None]:
    """Context manager: errors name the client's parameters, in `param` and in the text.

    names: the client's names, by those of OpenAI's chat completions.
    """
    try:
        yield
    except InvalidRequest as error:
        param = error.param and _renamed(error.param, names)
        text = _renamed(error.message, names)
        if (param, text) == (error.param, error.message):
            raise
        raise type(error)(text, param=param) from error


def _renamed(text: str, names: Mapping[str, str]) -> str:
    """The text with every name of a part as the client knows it; quoted words stay."""
    if not names:
        return text
    longest_first = sorted(names, key=len, reverse=True)
    known = "|".join(map(re.escape, longest_first))
    return re.sub(rf"(?<![\w.'\"])({known})(?!\w)", lambda found: names[found[0]], text)
