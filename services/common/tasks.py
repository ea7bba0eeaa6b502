"""Tasks that have to end."""

import asyncio
from typing import Any

_AGAIN_S = 1.0


async def end(*tasks: asyncio.Task[Any]) -> None:
    """Cancels tasks, and returns when all have ended, however they did.

    More than once where it must: asyncio.wait_for loses a cancel that comes as its inner future
    gets done (Python before 3.12), and so does all that uses it, as redis-py does.
    """
    pending = set(tasks)
    while pending:
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=_AGAIN_S)
    for task in tasks:
        note_error(task)


def note_error(task: asyncio.Task[Any]) -> None:
    """A done callback: the task's error, if it has one, does not count as forgotten."""
    if not task.cancelled():
        task.exception()


def is_cancelled() -> bool:
    """Whether the task that runs was asked to end.

    If not, a CancelledError in it is somebody else's.
    """
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
