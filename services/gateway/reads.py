"""Reading of requests in threads: those that may wait for a grammar have threads of their own."""

import asyncio
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from winnow.errors import Overloaded

_NUM_THREADS = 4
MAX_OPEN = 32
# Fields of any API by which a request may have a grammar; some have it in their own `format`.
_FORMS = ("response_format", "structured_outputs", "output_format")
_WITH_FORMAT = ("text", "output_config")
_PREFIX = "guided_"
_TEXT = "text"  # the type of a form that is none
_LEFT_TO_THE_MODEL = (None, "", "auto", "none")  # choices of tools that enforce no call

_T = TypeVar("_T")


def may_have_grammar(body: Mapping[str, Any]) -> bool:
    """Whether the answer to this body may have to match a grammar."""
    forms = [body.get(name) for name in _FORMS]
    forms += [_part(body.get(name), "format") for name in _WITH_FORMAT]
    return (
        any(form and _part(form, "type") != _TEXT for form in forms)
        or any(name.startswith(_PREFIX) for name in body)
        or bool(body.get("tools") and _enforces_calls(body.get("tool_choice")))
        or _has_strict_tool(body.get("tools"))
    )


def _enforces_calls(choice: object) -> bool:
    kind = _part(choice, "type") if isinstance(choice, Mapping) else choice
    return kind not in _LEFT_TO_THE_MODEL


def _has_strict_tool(tools: object) -> bool:
    """As they are in any API: in the tool, or in its function."""
    own = tools if isinstance(tools, list) else []
    return any(_part(one, "strict") for tool in own for one in (tool, _part(tool, "function")))


def _part(value: object, name: str) -> Any:  # noqa: ANN401 - what JSON can hold
    return value.get(name) if isinstance(value, Mapping) else None


class GrammarReads:
    """Reads requests with a grammar: few at once, so that others need not wait for them."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(_NUM_THREADS, "winnow-read")
        self._may_open = threading.BoundedSemaphore(MAX_OPEN)

    async def read(self, parse: Callable[[], _T]) -> _T:
        """What `parse` returns.  Raises Overloaded if MAX_OPEN are being read, or wait for it."""
        if not self._may_open.acquire(blocking=False):
            raise Overloaded(f"{MAX_OPEN} requests with a grammar are being read already")
        future = self._threads.submit(parse)
        future.add_done_callback(lambda _: self._may_open.release())
        return await asyncio.wrap_future(future)

    def close(self) -> None:
        """Read no more; what is being read ends by itself."""
        self._threads.shutdown(wait=False, cancel_futures=True)
